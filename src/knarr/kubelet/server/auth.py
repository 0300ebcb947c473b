"""Who may use the kubelet's server: client certificates and bearer tokens, asked of the API server what they may do.

Caller: server.server, before every request. Answers are cached: allowed five minutes, denied thirty seconds; at most 4096.
Source: pkg/kubelet/server/auth.go, apiserver authentication and authorization webhooks.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.x509.oid import NameOID

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.scheme import SCHEME
from knarr.client.rest import Client
from knarr.http.server import Request
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.faults import UNREACHABLE

log = get_logger(__name__)

_ALLOWED_SECONDS = 300.0
_DENIED_SECONDS = 30.0
_ENTRIES = 4096
_VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


@dataclass(frozen=True, slots=True)
class User:
    """Who asks."""

    name: str
    groups: tuple[str, ...] = ()
    uid: str = ""
    extra: dict[str, list[str]] = field(default_factory=dict, hash=False, compare=False)


class _Cache:
    def __init__(self) -> None:
        self._entries: OrderedDict[object, tuple[float, object]] = OrderedDict()

    def get(self, key: object) -> object | None:
        entry = self._entries.get(key)
        if entry is None or entry[0] < clock.now():
            return None
        return entry[1]

    def put(self, key: object, value: object, seconds: float) -> None:
        self._entries[key] = (clock.now() + seconds, value)
        while len(self._entries) > _ENTRIES:
            self._entries.popitem(last=False)


def subresources(path: str) -> list[str]:
    """The subresources of nodes that allow this path, the finest first."""
    first = path.strip("/").partition("/")[0]
    if first == "stats":
        return ["stats"]
    if first == "metrics":
        return ["metrics"]
    if first == "logs":
        return ["log"]
    if first == "checkpoint":
        return ["checkpoint"]
    if first in ("pods", "runningpods"):
        return ["pods", "proxy"]
    if first in ("healthz", "configz"):
        return [first, "proxy"]
    return ["proxy"]


class Authorizer:
    """Decides on requests to the kubelet."""

    def __init__(self, config: KubeletConfig, client: Client) -> None:
        self._config = config
        self._client = client
        self._cache = _Cache()

    async def check(self, request: Request) -> tuple[int, str] | None:
        """None when the request may go on, else (HTTP status, text)."""
        user = await self._authenticate(request)
        if user is None:
            return 401, "Unauthorized"
        if self._config.authorization_mode == "AlwaysAllow" or "system:masters" in user.groups:
            return None
        verb = _VERBS.get(request.method, request.method.lower())
        wanted = subresources(request.path)
        for subresource in wanted:
            if await self._allowed(user, verb, subresource):
                return None
        return 403, f"Forbidden (user={user.name}, verb={verb}, resource=nodes, subresource(s)={wanted})"

    async def _authenticate(self, request: Request) -> User | None:
        der = request.peer_certificate_der()
        if der:
            # The TLS layer has verified the chain; only the name is read here.
            subject = x509.load_der_x509_certificate(der).subject
            names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            groups = tuple(str(a.value) for a in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
            if names:
                return User(str(names[0].value), (*groups, "system:authenticated"))
        scheme, _, token = (request.headers.get("authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return await self._review(token.strip())
        if self._config.anonymous_auth:
            return User("system:anonymous", ("system:unauthenticated",))
        return None

    async def _review(self, token: str) -> User | None:
        key = ("token", hashlib.sha256(token.encode()).digest())
        known = self._cache.get(key)
        if known is not None:
            return known if isinstance(known, User) else None
        resource = SCHEME.resource("authentication.k8s.io", "v1", "tokenreviews")
        assert resource is not None
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        try:
            status = (await self._client.create(resource, review)).get("status") or {}
        except (errors.StatusError, *UNREACHABLE) as e:
            log.warning("token not reviewed", error=str(e))
            return None
        if not status.get("authenticated"):
            self._cache.put(key, False, _DENIED_SECONDS)
            return None
        info = status.get("user") or {}
        user = User(info.get("username", ""), tuple(info.get("groups") or []), info.get("uid", ""), info.get("extra") or {})
        self._cache.put(key, user, 120.0)
        return user

    async def _allowed(self, user: User, verb: str, subresource: str) -> bool:
        key = (user, verb, subresource)
        known = self._cache.get(key)
        if known is not None:
            return bool(known)
        resource = SCHEME.resource("authorization.k8s.io", "v1", "subjectaccessreviews")
        assert resource is not None
        attributes = {"verb": verb, "version": "v1", "resource": "nodes", "subresource": subresource, "name": self._config.node_name}
        spec = {"user": user.name, "groups": list(user.groups), "uid": user.uid, "extra": user.extra, "resourceAttributes": attributes}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        try:
            status = (await self._client.create(resource, review)).get("status") or {}
        except (errors.StatusError, *UNREACHABLE) as e:
            log.warning("access not reviewed", user=user.name, error=str(e))
            return False
        allowed = bool(status.get("allowed"))
        self._cache.put(key, 1 if allowed else 0, _ALLOWED_SECONDS if allowed else _DENIED_SECONDS)
        return allowed
