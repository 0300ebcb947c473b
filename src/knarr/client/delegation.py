"""Who asks, and whether he may: authentication and authorization of a component's own server, delegated to the API server.

Callers: kubelet's server, the endpoints of controller manager and scheduler. Client certificates are verified by the TLS layer and
only read here; tokens go into TokenReviews, rights into SubjectAccessReviews. Answers are remembered for a while, at most 4,096.
Source: apiserver authentication and authorization webhooks (delegating options).
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.api.resources import SUBJECT_ACCESS_REVIEWS, TOKEN_REVIEWS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.http.server import Request

log = get_logger(__name__)

_ENTRIES = 4096
VERBS = {"GET": "get", "HEAD": "get", "POST": "create", "PUT": "update", "PATCH": "patch", "DELETE": "delete"}


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


class Delegation:
    """Asks the API server, and remembers.

    Args:
      client: may create TokenReviews and SubjectAccessReviews (system:auth-delegator).
      anonymous: whether who shows nothing is system:anonymous; otherwise he is nobody.
    """

    def __init__(
        self, client: Client, *, anonymous: bool, token_seconds: float = 10.0, allowed_seconds: float = 10.0, denied_seconds: float = 10.0
    ) -> None:
        self._client = client
        self._anonymous = anonymous
        self._token_seconds = token_seconds
        self._allowed_seconds = allowed_seconds
        self._denied_seconds = denied_seconds
        self._cache = _Cache()

    async def authenticate(self, request: Request) -> User | None:
        """Tell who asks; None for nobody."""
        der = request.peer_certificate_der()
        if der:
            # The TLS layer has verified the chain; only the name is read here.
            from cryptography import x509
            from cryptography.x509.oid import NameOID

            subject = x509.load_der_x509_certificate(der).subject
            names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
            groups = tuple(str(a.value) for a in subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
            if names:
                return User(str(names[0].value), (*groups, "system:authenticated"))
        scheme, _, token = (request.headers.get("authorization") or "").partition(" ")
        if scheme.lower() == "bearer" and token.strip():
            return await self._review(token.strip())
        return User("system:anonymous", groups=("system:unauthenticated",)) if self._anonymous else None

    async def _review(self, token: str) -> User | None:
        key = ("token", hashlib.sha256(token.encode()).digest())
        known = self._cache.get(key)
        if known is not None:
            return known if isinstance(known, User) else None
        review = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenReview", "spec": {"token": token}}
        try:
            status = (await self._client.create(TOKEN_REVIEWS, review)).get("status") or {}
        except (StatusError, HTTPError, OSError) as error:
            log.warning("token not reviewed", error=str(error))
            return None
        if not status.get("authenticated"):
            self._cache.put(key, False, self._denied_seconds)
            return None
        info = status.get("user") or {}
        user = User(info.get("username", ""), tuple(info.get("groups") or []), info.get("uid", ""), info.get("extra") or {})
        self._cache.put(key, user, self._token_seconds)
        return user

    async def allowed(self, user: User, attributes: Object) -> bool:
        """Whether a user may.

        Args:
          attributes: {"resourceAttributes": …} or {"nonResourceAttributes": …} of a SubjectAccessReview.
        """
        if "system:masters" in user.groups:
            return True
        key = (user, repr(attributes))
        known = self._cache.get(key)
        if known is not None:
            return bool(known)
        spec = {"user": user.name, "groups": list(user.groups), "uid": user.uid, "extra": user.extra, **attributes}
        review = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": spec}
        try:
            status = (await self._client.create(SUBJECT_ACCESS_REVIEWS, review)).get("status") or {}
        except (StatusError, HTTPError, OSError) as error:
            log.warning("access not reviewed", user=user.name, error=str(error))
            return False
        allowed = bool(status.get("allowed"))
        self._cache.put(key, 1 if allowed else 0, self._allowed_seconds if allowed else self._denied_seconds)
        return allowed
