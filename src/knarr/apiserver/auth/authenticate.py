"""The union of all authenticators over a request: client certificate, front proxy, bearer token, anonymous.

Certificates are looked at once per connection; tokens once per ten seconds (service account tokens check what they are bound to
every time, from memory). A request with credentials that are not good gets 401, never the anonymous user.

Source: kubernetes pkg/kubeapiserver/authenticator/config.go, apiserver pkg/authentication.
"""

from __future__ import annotations

import binascii
from base64 import urlsafe_b64decode
from collections.abc import Sequence

from cryptography import x509

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError, unauthorized
from knarr.apiserver.attributes import ANONYMOUS, UserInfo
from knarr.apiserver.auth import users
from knarr.apiserver.auth.chains import MOST_PRESENTED, CABundle
from knarr.apiserver.auth.requestheader import RequestHeader
from knarr.apiserver.auth.serviceaccounts import ServiceAccountTokens
from knarr.apiserver.auth.tokens import TokenAuthenticator, TokenRefused, TokenUser
from knarr.apiserver.auth.x509 import user_of
from knarr.apiserver.instruments import Histograms
from knarr.http.server import Request

log = get_logger(__name__)

CACHE_SECONDS = 10.0
_MOST_CACHED = 4000
_WEBSOCKET_TOKEN = "base64url.bearer.authorization.k8s.io."
_STATE = "auth.certificate"
_HOUR, _DAY = 3600, 86400
_LIFETIMES = (
    0, 0.5 * _HOUR, _HOUR, 2 * _HOUR, 6 * _HOUR, 12 * _HOUR, _DAY, 2 * _DAY, 4 * _DAY, 7 * _DAY, 30 * _DAY, 90 * _DAY, 180 * _DAY, 360 * _DAY,
)  # fmt: skip


def with_authenticated(user: UserInfo) -> UserInfo:
    """Add the group of everybody who has credentials."""
    if users.AUTHENTICATED in user.groups or users.UNAUTHENTICATED in user.groups:
        return user
    return UserInfo(user.name, user.uid, (*user.groups, users.AUTHENTICATED), user.extra)


class _Judged:
    """What a client's certificates are good for."""

    __slots__ = ("proxy", "until", "user", "uses")

    def __init__(self, proxy: bool, user: UserInfo | None, until: float) -> None:
        self.proxy = proxy
        self.user = user
        self.until = until
        self.uses = 0
        """Requests that metrics do not tell of yet."""


_REFUSED = _Judged(False, None, 0.0)


class RequestAuthenticator:
    """Authenticator of attributes.py."""

    def __init__(
        self, *, client_ca: CABundle | None, request_header: RequestHeader | None, service_accounts: ServiceAccountTokens,
        tokens: Sequence[TokenAuthenticator], anonymous_paths: Sequence[str], api_audiences: tuple[str, ...] = (),
    ) -> None:  # fmt: skip
        self._client_ca = client_ca
        self._request_header = request_header
        self._service_accounts = service_accounts
        self._tokens = tuple(tokens)
        self._anonymous_paths = frozenset(anonymous_paths)
        self._api_audiences = api_audiences
        self._expirations = Histograms(
            "apiserver_client_certificate_expiration_seconds",
            "[ALPHA] Distribution of the remaining lifetime on the certificate used to authenticate a request.", (), _LIFETIMES,
        )  # fmt: skip
        self._lifetimes = self._expirations.at()
        self._judged: dict[bytes | tuple[bytes, ...], _Judged] = {}
        """Certificates that were found good, with those shown beside them and without."""
        self._cache: dict[tuple[str, tuple[str, ...]], tuple[float, TokenUser]] = {}

    def replace_tokens(self, tokens: Sequence[TokenAuthenticator]) -> None:
        """Ask these about tokens from now on; what others said is forgotten."""
        self._tokens = tuple(tokens)
        self._cache.clear()

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        self._fold()
        return [*self._expirations.lines(), *self._service_accounts.metrics()]

    def _fold(self) -> None:
        """Take over how often certificates were used; told by the time that they have left now."""
        now = clock.now()
        for judged in {id(one): one for one in self._judged.values()}.values():
            uses, judged.uses = judged.uses, 0
            if uses and judged.until > now:
                self._lifetimes.observe(judged.until - now, uses)

    # -- requests ----------------------------------------------------------------------------------------------------
    def authenticate_nowait(self, request: Request) -> UserInfo | None:
        known = self._certificate_user(request)
        if known is not None:
            return known
        token = self._bearer(request)
        if token is None:
            return self._without_token(request)
        # Cheap first: tokens of service accounts have three parts.
        found = self._service_accounts_nowait(token) if token.count(".") == 2 else None
        if found is None:
            found = self._cached(token, self._api_audiences)
        return with_authenticated(found.user) if found is not None else None

    async def authenticate(self, request: Request) -> UserInfo | None:
        known = self._certificate_user(request)
        if known is not None:
            return known
        token = self._bearer(request)
        if token is None:
            return self._without_token(request)
        try:
            found = await self.authenticate_token(token, ())
        except TokenRefused as refusal:
            log.debug("token refused", reason=str(refusal))
            return None
        return found.user if found is not None else None

    def _service_accounts_nowait(self, token: str) -> TokenUser | None:
        try:
            return self._service_accounts.check(token, self._api_audiences)
        except TokenRefused:
            return None

    def _anonymous(self, request: Request) -> UserInfo | None:
        paths = self._anonymous_paths
        return ANONYMOUS if "*" in paths or request.path in paths else None

    def _without_token(self, request: Request) -> UserInfo | None:
        """Who shows nothing is anonymous; who showed a certificate that is good for nothing is nobody."""
        return self._anonymous(request) if request.connection_state.get(_STATE) is None else None

    def _certificate_user(self, request: Request) -> UserInfo | None:
        state = request.connection_state
        if _STATE not in state:
            state[_STATE] = self._inspect(request)
        found = state[_STATE]
        if found is None:
            return None
        if clock.now() > found.until:
            return None
        found.uses += 1
        if found.proxy:
            named = RequestHeader.user(request)
            if named is not None:
                return with_authenticated(named)
        result: UserInfo | None = found.user
        return result

    def _inspect(self, request: Request) -> _Judged | None:
        """Return what the connection's certificate is good for, None when it shows none, or one that names nobody."""
        shown = request.presented_certificates()
        if not shown:
            return None
        known = self._judged.get(shown) or (self._judged.get(shown[0]) if len(shown) == 1 else None)
        if known is not None and known.until > clock.now():
            return known
        try:
            judged = self._judge(shown)
        except (ValueError, StatusError):
            judged = None
        if judged is None:
            return _REFUSED
        if judged.user is None and not judged.proxy:
            # A certificate that names nobody says nothing.
            return None
        if len(self._judged) >= _MOST_CACHED:
            self._fold()
            self._judged.clear()
        # A session that is resumed shows the client's own certificate without those between it and the authority.
        self._judged[shown] = self._judged[shown[0]] = judged
        return judged

    def _judge(self, shown: tuple[bytes, ...]) -> _Judged | None:
        """Look at certificates for the first time; None when nobody vouches for them. Raises ValueError, StatusError."""
        leaf, *others = (x509.load_der_x509_certificate(der) for der in shown[:MOST_PRESENTED])
        header = self._request_header
        proxy_until = header.trusted_until(leaf, others) if header is not None else None
        user_until = self._client_ca.trusted_until(leaf, others) if self._client_ca is not None else None
        ends = [until for until in (user_until, proxy_until) if until is not None]
        if not ends:
            return None
        user = user_of(leaf, shown[0]) if user_until is not None else None
        return _Judged(proxy_until is not None, with_authenticated(user) if user is not None else None, min(ends).timestamp())

    @staticmethod
    def _bearer(request: Request) -> str | None:
        header = request.headers.get("authorization")
        if header:
            if header.startswith("Bearer ") and header.count(" ") == 1 and len(header) > 7:
                return header[7:]
            parts = header.strip().split(" ", 2)
            if len(parts) >= 2 and parts[0].lower() == "bearer" and parts[1]:
                return parts[1]
        if request.headers.get("upgrade", "").lower() == "websocket":
            return _websocket_bearer(request)
        return None

    # -- tokens ------------------------------------------------------------------------------------------------------
    def _cached(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        entry = self._cache.get((token, audiences))
        if entry is None:
            return None
        until, found = entry
        now = clock.now()
        return found if now < until and (found.expires_at is None or now < found.expires_at) else None

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        """Find out whom a token stands for, with the group of authenticated users; no audiences means the API's own.

        Raises:
          TokenRefused: the token is of a known kind but not good.
        """
        audiences = audiences or self._api_audiences
        refusals: list[str] = []
        try:
            found = self._service_accounts.check(token, audiences)
        except TokenRefused as refusal:
            found = None
            refusals.append(str(refusal))
        if found is None:
            found = self._cached(token, audiences)
        for authenticator in self._tokens if found is None else ():
            try:
                found = await authenticator.authenticate_token(token, audiences)
            except TokenRefused as refusal:
                refusals.append(str(refusal))
                continue
            if found is not None:
                if len(self._cache) >= _MOST_CACHED:
                    self._cache.clear()
                found = TokenUser(with_authenticated(found.user), found.audiences, found.expires_at)
                self._cache[(token, audiences)] = (clock.now() + CACHE_SECONDS, found)
                break
        if found is None:
            if refusals:
                raise TokenRefused(refusals[0] if len(refusals) == 1 else f"[{', '.join(refusals)}]")
            return None
        # Tokens that know no audiences of their own are good for the API's.
        granted = found.audiences or tuple(audience for audience in audiences if audience in self._api_audiences)
        return TokenUser(with_authenticated(found.user), granted, found.expires_at)


def _websocket_bearer(request: Request) -> str | None:
    """Browsers cannot set Authorization on a WebSocket; they offer the token as a subprotocol, which is taken out again."""
    offered = [protocol.strip() for line in request.header_values("sec-websocket-protocol") for protocol in line.split(",")]
    tokens = [protocol[len(_WEBSOCKET_TOKEN) :] for protocol in offered if protocol.startswith(_WEBSOCKET_TOKEN)]
    if not tokens:
        return None
    rest = [protocol for protocol in offered if not protocol.startswith(_WEBSOCKET_TOKEN)]
    if len(tokens) > 1 or not rest:
        raise unauthorized()
    try:
        token = urlsafe_b64decode(tokens[0] + "=" * (-len(tokens[0]) % 4)).decode()
    except (binascii.Error, UnicodeDecodeError) as error:
        raise unauthorized() from error
    request.headers["sec-websocket-protocol"] = ", ".join(rest)
    request.header_list = [(name, value) for name, value in request.header_list if name != "sec-websocket-protocol"]
    request.header_list.append(("sec-websocket-protocol", ", ".join(rest)))
    return token or None
