"""Tokens in secrets: Secrets of type kubernetes.io/service-account-token are filled, and go with their account.

Source: pkg/controller/serviceaccount/tokens_controller.go, pkg/serviceaccount/legacy.go, jwt.go.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from typing import Any

import orjson

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import SECRETS, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context, object_key

_TYPE = "kubernetes.io/service-account-token"
_NAME = "kubernetes.io/service-account.name"
_UID = "kubernetes.io/service-account.uid"
_ISSUER = "kubernetes/serviceaccount"


class ServiceAccountTokenController:
    """Fills and deletes token secrets. Keys are those of secrets."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._root_ca = base64.b64encode(ctx.config.root_ca).decode() if ctx.config.root_ca else ""
        self._key = ctx.config.service_account_key
        self._secrets = ctx.informers.get(SECRETS, field_selector=f"type={_TYPE}")
        self._accounts = ctx.informer(SERVICE_ACCOUNTS)
        self.controller = Controller("serviceaccount-token-controller", self._reconcile, workers=5, max_retries=10)
        self._secrets.add_handler(self._changed, lambda old, new: self._changed(new), self._secret_deleted)
        self._accounts.add_handler(self._account_changed, None, self._account_changed)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, secret: Object) -> None:
        if meta.annotations(secret).get(_NAME):
            self.controller.queue.add(object_key(secret))

    def _account_changed(self, account: Object) -> None:
        for secret in self._secrets.list(account["metadata"]["namespace"]):
            if meta.annotations(secret).get(_NAME) == account["metadata"]["name"]:
                self.controller.queue.add(object_key(secret))

    def _secret_deleted(self, secret: Object) -> None:
        namespace, name = secret["metadata"]["namespace"], meta.annotations(secret).get(_NAME, "")
        account = self._accounts.get(namespace, name)
        if account is not None and any(item.get("name") == secret["metadata"]["name"] for item in account.get("secrets") or ()):
            self.controller.queue.add(f"{namespace}/{name}#{secret['metadata']['name']}")

    async def _account(self, namespace: str, name: str, uid: str) -> Object | None:
        account = self._accounts.get(namespace, name)
        if account is None or (uid and account["metadata"]["uid"] != uid):
            # Before anything is deleted, the server has the last word.
            try:
                account = await self._client.get(SERVICE_ACCOUNTS, name, namespace)
            except StatusError as error:
                if errors.is_not_found(error):
                    return None
                raise
        return account if not uid or account["metadata"]["uid"] == uid else None

    async def _reconcile(self, key: str) -> None:
        path, _, removed = key.partition("#")
        if removed:
            await self._forget_reference(path, removed)
            return
        secret = self._secrets.get_key(key)
        if secret is None or "deletionTimestamp" in secret["metadata"]:
            return
        namespace, annotations = secret["metadata"]["namespace"], meta.annotations(secret)
        account = await self._account(namespace, annotations.get(_NAME, ""), annotations.get(_UID, ""))
        if account is None:
            try:
                await self._client.delete(SECRETS, secret["metadata"]["name"], namespace, uid=secret["metadata"]["uid"])
            except StatusError as error:
                if not errors.is_not_found(error) and not errors.is_conflict(error):
                    raise
            return
        await self._fill(secret, account)

    async def _fill(self, secret: Object, account: Object) -> None:
        data = dict(secret.get("data") or {})
        if self._root_ca:
            data["ca.crt"] = self._root_ca
        if not data.get("namespace"):
            data["namespace"] = base64.b64encode(secret["metadata"]["namespace"].encode()).decode()
        if not data.get("token") and self._key is not None:
            data["token"] = base64.b64encode(legacy_token(self._key, account, secret).encode()).decode()
        annotations = {**meta.annotations(secret), _NAME: account["metadata"]["name"], _UID: account["metadata"]["uid"]}
        if data == (secret.get("data") or {}) and annotations == meta.annotations(secret):
            return
        changed = {**secret, "data": data, "metadata": {**secret["metadata"], "annotations": annotations}}
        try:
            await self._client.update(SECRETS, changed)
        except StatusError as error:
            if not errors.is_not_found(error) and not errors.is_conflict(error):
                raise

    async def _forget_reference(self, path: str, name: str) -> None:
        namespace, _, account_name = path.partition("/")
        account = await self._account(namespace, account_name, "")
        if account is None:
            return
        kept = [item for item in account.get("secrets") or () if item.get("name") != name]
        if len(kept) != len(account.get("secrets") or ()):
            await self._client.update(SERVICE_ACCOUNTS, {**account, "secrets": kept})


# Signing


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


@functools.lru_cache(maxsize=4)
def _signer(pem: bytes) -> tuple[Any, str, str]:
    """(private key, algorithm, key id) of a PEM key."""
    # Imported here: most clusters never make such a secret, and the library is large.
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    key = serialization.load_pem_private_key(pem, None)
    public = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    key_id = _base64url(hashlib.sha256(public).digest())
    if isinstance(key, rsa.RSAPrivateKey):
        return key, "RS256", key_id
    if isinstance(key, ec.EllipticCurvePrivateKey):
        return key, {256: "ES256", 384: "ES384", 521: "ES512"}[key.curve.key_size], key_id
    raise ValueError("service account key is neither RSA nor EC")


def _sign(pem: bytes, claims: Object) -> str:
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec, padding
    from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature

    key, algorithm, key_id = _signer(pem)
    message = f"{_base64url(orjson.dumps({'alg': algorithm, 'kid': key_id}))}.{_base64url(orjson.dumps(claims))}"
    if algorithm == "RS256":
        signature = key.sign(message.encode(), padding.PKCS1v15(), hashes.SHA256())
    else:
        digest = {"ES256": hashes.SHA256(), "ES384": hashes.SHA384(), "ES512": hashes.SHA512()}[algorithm]
        r, s = decode_dss_signature(key.sign(message.encode(), ec.ECDSA(digest)))
        size = (key.curve.key_size + 7) // 8
        signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
    return f"{message}.{_base64url(signature)}"


def legacy_token(pem: bytes, account: Object, secret: Object) -> str:
    """Make the token of a secret, which does not expire."""
    namespace, name = account["metadata"]["namespace"], account["metadata"]["name"]
    return _sign(
        pem,
        {
            "iss": _ISSUER,
            "kubernetes.io/serviceaccount/namespace": namespace,
            "kubernetes.io/serviceaccount/secret.name": secret["metadata"]["name"],
            "kubernetes.io/serviceaccount/service-account.name": name,
            "kubernetes.io/serviceaccount/service-account.uid": account["metadata"]["uid"],
            "sub": f"system:serviceaccount:{namespace}:{name}",
        },
    )
