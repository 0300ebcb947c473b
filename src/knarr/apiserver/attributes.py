"""The words that the floors inside the API server share: who asks, for what, and what admission sees.

Callers: the request pipeline (makes Attributes and AdmissionRequests), apiserver/auth, apiserver/admission and
apiserver/proxy (implement the Protocols below and are built by the functions named there). This module imports nothing
of the rest of the API server, so that every part can import it.

Builders that server.py calls, each taking `Services`:
  knarr.apiserver.auth.setup.build_auth(services) -> Auth
  knarr.apiserver.admission.chain.build_admission(services) -> AdmissionChain
  knarr.apiserver.proxy.setup.build_connect(services) -> dict[ResourceKey, ConnectHandler]
"""

from __future__ import annotations

import enum
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, Protocol

from knarr.api.types import Object
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.aiokits.tasks import Tasks
    from knarr.api.scheme import Resource
    from knarr.apiserver.config import APIServerConfig


class ResourceKey(NamedTuple):
    """Names a resource or subresource without its version: ("", "pods", "exec"), ("apps", "deployments", "")."""

    group: str
    resource: str
    subresource: str = ""


@dataclass(frozen=True, slots=True)
class UserInfo:
    """An authenticated caller. Hashable: authorizers key their caches by it (extra is left out of equality)."""

    name: str
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, tuple[str, ...]] = field(default_factory=dict, compare=False)
    _hash: int = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_hash", hash((self.name, self.uid, self.groups)))

    def __hash__(self) -> int:
        return self._hash

    def to_object(self) -> Object:
        """Return the authentication.k8s.io/v1 UserInfo form, as reviews and webhooks carry it."""
        out: Object = {"username": self.name}
        if self.uid:
            out["uid"] = self.uid
        if self.groups:
            out["groups"] = list(self.groups)
        if self.extra:
            out["extra"] = {key: list(values) for key, values in self.extra.items()}
        return out


ANONYMOUS = UserInfo("system:anonymous", groups=("system:unauthenticated",))
SYSTEM_MASTERS = UserInfo("system:apiserver", groups=("system:masters", "system:authenticated"))


class Attributes(NamedTuple):
    """What a request wants to do; the input of authorization, and a cache key (a NamedTuple hashes in C)."""

    user: UserInfo
    verb: str
    """get, list, watch, create, update, patch, delete, deletecollection; for paths the lower-case HTTP method."""
    group: str = ""
    version: str = ""
    resource: str = ""
    subresource: str = ""
    namespace: str = ""
    name: str = ""
    path: str = ""
    is_resource: bool = True
    field_selector: str = ""
    label_selector: str = ""


class Decision(enum.Enum):
    """An authorizer's answer."""

    ALLOW = "allow"
    DENY = "deny"
    NO_OPINION = "no opinion"
    ASK = "ask"
    """Not decidable without waiting: await authorize_async."""


@dataclass(slots=True)
class AdmissionRequest:
    """One operation on its way through admission. `object` may be changed, in place or by assignment, by mutating plugins."""

    operation: str
    """CREATE, UPDATE, DELETE or CONNECT."""
    resource: Resource
    subresource: str
    kind: tuple[str, str, str]
    """(group, version, kind) of `object` (of the options for CONNECT)."""
    namespace: str
    name: str
    object: Object | None
    """The new object, decoded and defaulted; None for DELETE."""
    old_object: Object | None
    """The stored object for UPDATE and DELETE; never changed."""
    user: UserInfo
    dry_run: bool = False
    options: Object | None = None
    """CreateOptions, UpdateOptions, PatchOptions or DeleteOptions."""
    warnings: list[str] = field(default_factory=list)
    """Texts for Warning headers."""
    audit_annotations: dict[str, str] = field(default_factory=dict)
    undo: list[Callable[[], None]] = field(default_factory=list)
    """Called, last first, when the operation does not happen after all (a quota charge given back)."""


@dataclass(slots=True)
class ReviewRequest:
    """A create on a resource that is answered, not stored (access reviews, token requests)."""

    user: UserInfo
    namespace: str
    name: str
    """For subresources (serviceaccounts/NAME/token)."""
    object: Object
    dry_run: bool = False


class Authenticator(Protocol):
    """Finds out who asks."""

    def authenticate_nowait(self, request: Request) -> UserInfo | None:
        """Answer from memory (connection, token cache); None means: ask `authenticate`."""
        ...

    async def authenticate(self, request: Request) -> UserInfo | None:
        """Return the user (ANONYMOUS where the path allows it); None gives 401. May raise StatusError."""
        ...


class Authorizer(Protocol):
    """Decides whether a user may."""

    def authorize(self, attributes: Attributes) -> tuple[Decision, str]:
        """Decide without waiting; the text is the reason, used in 403 messages."""
        ...

    async def authorize_async(self, attributes: Attributes) -> tuple[Decision, str]:
        """Decide with waiting (webhooks); called when authorize said ASK."""
        ...


class AdmissionChain(Protocol):
    """Admission, mutating then validating; a refusal is a StatusError."""

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        """Return False when no plugin has anything to do now: the operation then goes on without building a request."""
        ...

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        """Let the mutating plugins run; what is returned, if anything, is to be awaited."""
        ...

    def validate(self, request: AdmissionRequest) -> Awaitable[None] | None:
        """Let the validating plugins run; what is returned, if anything, is to be awaited."""
        ...

    async def run(self, request: AdmissionRequest) -> None:
        """Both, one after the other: for operations that do nothing in between."""
        ...

    async def start(self) -> None:
        """Called once the stores are loaded."""
        ...

    async def close(self) -> None: ...


ReviewHandler = Callable[[ReviewRequest], Awaitable[Object]]
PathHandler = Callable[[Request], Awaitable[None]]


@dataclass(slots=True)
class ConnectRequest:
    """A connect to a subresource that streams or proxies (exec, attach, portforward, log, proxy); authorized already."""

    request: Request
    attributes: Attributes
    resource: Resource
    path: str
    """What follows .../proxy in the path, with its leading slash, percent-encoded as received; else ""."""


ConnectHandler = Callable[[ConnectRequest], Awaitable[None]]


class Store(Protocol):
    """What in-process users (auth, admission) see of a resource's store; objects are shared, never change them."""

    def get_nowait(self, namespace: str, name: str) -> Object | None: ...

    def list_nowait(self, namespace: str | None = None) -> list[Object]: ...

    async def get_live(self, namespace: str, name: str) -> Object | None:
        """Like get_nowait, reading past the cache."""
        ...

    def add_handler(self, handler: Callable[[str, Object, Object | None], None], *, previous: bool = True) -> Callable[[], None]:
        """Call handler(type, object, old) for each later event (ADDED, MODIFIED, DELETED), at once in the publishing turn.

        Without `previous`, `old` may be None although there was one: spares decoding it.
        """
        ...

    @property
    def generation(self) -> int:
        """Grows with every event of this resource: cheap invalidation of what was computed from list_nowait."""
        ...

    async def create(self, obj: Object, *, dry_run: bool = False) -> Object: ...

    async def update(self, namespace: str, name: str, change: Callable[[Object], Object | None]) -> Object:
        """Compare and swap, retried: change gets a private copy and returns the new object, None for no change."""
        ...

    async def delete(self, namespace: str, name: str, *, uid: str = "") -> None: ...


class Auth(Protocol):
    """What build_auth returns."""

    @property
    def authenticator(self) -> Authenticator: ...

    @property
    def authorizer(self) -> Authorizer: ...

    @property
    def reviews(self) -> Mapping[ResourceKey, ReviewHandler]: ...

    @property
    def paths(self) -> Mapping[str, PathHandler]:
        """Non-resource paths served by auth: /openid/v1/jwks and so on."""
        ...

    async def impersonate(self, request: Request, user: UserInfo) -> UserInfo:
        """Return whom the request acts as (the user itself without Impersonate-* headers; cheap then).

        Raises:
          StatusError: 403.
          knarr.apiserver.auth.impersonation.ImpersonationWithoutUser: answer a plain-text 500.
        """
        ...

    async def start(self) -> None:
        """Called once the stores are loaded, before serving: write bootstrap policy."""
        ...

    async def close(self) -> None: ...


class Services(Protocol):
    """What the API server offers to its parts; passed to their builders."""

    config: APIServerConfig
    tasks: Tasks
    admission: AdmissionChain | None
    auth: Auth | None

    def store(self, group: str, resource: str) -> Store:
        """Return the store of a served resource ("" for the core group). Raises KeyError."""
        ...

    def is_ready(self) -> bool: ...


