"""Bootstrap tokens: signing the cluster-info for joining nodes, and deleting expired tokens.

Source: pkg/controller/bootstrap/bootstrapsigner.go, tokencleaner.go, pkg/cluster-bootstrap token/jws.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re

import orjson

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.resources import CONFIG_MAPS, SECRETS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers.context import Context

_TYPE = "bootstrap.kubernetes.io/token"
_PREFIX = "jws-kubeconfig-"
_NAME = re.compile(r"^bootstrap-token-([a-z0-9]{6})$")


def _data(secret: Object, name: str) -> str:
    try:
        return base64.b64decode((secret.get("data") or {}).get(name, "")).decode()
    except ValueError:
        return ""


def _expires(secret: Object) -> float | None:
    """When the token ends (epoch seconds); None never; what cannot be read ended long ago."""
    text = _data(secret, "expiration")
    if not text:
        return None
    try:
        return clock.parse_rfc3339(text)
    except ValueError:
        return 0.0


def _token(secret: Object) -> tuple[str, str] | None:
    """(id, secret) of a valid token that may sign, else None."""
    match = _NAME.match(secret["metadata"]["name"])
    identity, value = _data(secret, "token-id"), _data(secret, "token-secret")
    if match is None or match[1] != identity or not value or _data(secret, "usage-bootstrap-signing") != "true":
        return None
    expires = _expires(secret)
    return (identity, value) if expires is None or expires > clock.now() else None


def detached_signature(content: str, identity: str, secret: str) -> str:
    """Sign content with a token: a JWS (HS256) without its payload."""
    header = base64.urlsafe_b64encode(orjson.dumps({"alg": "HS256", "kid": identity})).rstrip(b"=")
    payload = base64.urlsafe_b64encode(content.encode()).rstrip(b"=")
    digest = hmac.new(f"{identity}.{secret}".encode(), header + b"." + payload, hashlib.sha256).digest()
    return f"{header.decode()}..{base64.urlsafe_b64encode(digest).rstrip(b'=').decode()}"


class BootstrapSigner:
    """Keeps the signatures in kube-public/cluster-info."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._maps = ctx.informers.get(CONFIG_MAPS, "kube-public", "metadata.name=cluster-info")
        self._secrets = ctx.informers.get(SECRETS, "kube-system", f"type={_TYPE}")
        self.controller = Controller("bootstrap-signer-controller", self._reconcile, workers=1)
        for informer in (self._maps, self._secrets):
            informer.add_handler(self._changed, lambda old, new: self._changed(new), self._changed)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, _: Object) -> None:
        self.controller.queue.add("cluster-info")

    async def _reconcile(self, key: str) -> None:
        info = self._maps.get("kube-public", "cluster-info")
        if info is None:
            return
        data = info.get("data") or {}
        content = data.get("kubeconfig")
        if content is None:
            return
        wanted = {name: value for name, value in data.items() if not name.startswith(_PREFIX)}
        for secret in self._secrets:
            token = _token(secret)
            if token is not None:
                wanted[_PREFIX + token[0]] = detached_signature(content, *token)
        if wanted != data:
            await self._client.update(CONFIG_MAPS, {**info, "data": wanted})


class TokenCleaner:
    """Deletes expired bootstrap tokens."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._secrets = ctx.informers.get(SECRETS, "kube-system", f"type={_TYPE}")
        self.controller = Controller("token-cleaner-controller", self._reconcile)
        add = self.controller.queue.add
        self._secrets.add_handler(lambda obj: add(meta.key(obj)), lambda old, new: add(meta.key(new)))

    async def run(self) -> None:
        await self.controller.run()

    async def _reconcile(self, key: str) -> Result | None:
        secret = self._secrets.get_key(key)
        expires = _expires(secret) if secret is not None else None
        if secret is None or expires is None:
            return None
        if expires > clock.now():
            return Result(expires - clock.now())
        await self._client.delete(SECRETS, secret["metadata"]["name"], secret["metadata"]["namespace"], uid=secret["metadata"]["uid"])
        return None
