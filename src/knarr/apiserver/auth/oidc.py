"""Users from OpenID Connect ID tokens of one provider.

Keys are fetched from the provider's discovery document when first needed, and again (at most every ten seconds) when a token
names a key that is not known.

Source: apiserver plugin/pkg/authenticator/token/oidc.
"""

from __future__ import annotations

import asyncio
import ssl
from dataclasses import dataclass
from urllib.parse import urlsplit

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import jwt
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.auth.tokens import TokenRefused, TokenUser
from knarr.http.client import HTTPClient
from knarr.http.errors import HTTPError

log = get_logger(__name__)

_REFETCH_SECONDS = 10.0
_FETCH_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class OIDCConfig:
    """Options by upstream's flag names."""

    issuer_url: str
    client_id: str
    username_claim: str = "sub"
    username_prefix: str = ""
    """"" puts "<issuer>#" before names (not before e-mail addresses); "-" puts nothing."""
    groups_claim: str = ""
    groups_prefix: str = ""
    required_claims: tuple[tuple[str, str], ...] = ()
    ca_file: str = ""
    signing_algs: tuple[str, ...] = ("RS256",)
    ca_data: str = ""
    """CA bundle in PEM form, instead of a file."""
    discovery_url: str = ""
    """Where the discovery document is when not below the issuer's URL."""
    audiences: tuple[str, ...] = ()
    """A token must be for one of these; empty means for the client."""

    @classmethod
    def from_options(cls, options: dict[str, str]) -> OIDCConfig:
        """Read {"issuer-url": ..., "client-id": ...}. Raises ValueError."""
        issuer, client = options.get("issuer-url", ""), options.get("client-id", "")
        if not issuer.startswith("https://"):
            raise ValueError(f"oidc issuer-url {issuer!r} must be an https URL")
        if not client:
            raise ValueError("oidc client-id is missing")
        required = tuple((key, value) for key, _, value in (part.partition("=") for part in options.get("required-claim", "").split(",") if part))
        return cls(
            issuer_url=issuer, client_id=client, username_claim=options.get("username-claim", "sub"),
            username_prefix=options.get("username-prefix", ""), groups_claim=options.get("groups-claim", ""),
            groups_prefix=options.get("groups-prefix", ""), required_claims=required, ca_file=options.get("ca-file", ""),
            signing_algs=tuple(options.get("signing-algs", "RS256").split(",")),
        )  # fmt: skip


class OIDC:
    """TokenAuthenticator for one provider."""

    def __init__(self, config: OIDCConfig) -> None:
        self._config = config
        self._keys: dict[str, jwt.PublicKey] = {}
        self._fetched_at = -_REFETCH_SECONDS
        self._turn = asyncio.Lock()

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        config = self._config
        try:
            claims, kid = jwt.unverified_claims(token), str(jwt.header(token).get("kid") or "")
        except jwt.TokenError:
            return None
        if claims.get("iss") != config.issuer_url:
            return None
        try:
            claims = jwt.verify(token, await self._keys_for(kid), algorithms=frozenset(config.signing_algs))
        except jwt.TokenError as error:
            raise TokenRefused(f"oidc: verify token: {error}") from error
        return TokenUser(self._user(claims), (), float(claims["exp"]))

    async def _keys_for(self, kid: str) -> list[jwt.PublicKey]:
        async with self._turn:
            if kid not in self._keys and asyncio.get_running_loop().time() - self._fetched_at >= _REFETCH_SECONDS:
                self._fetched_at = asyncio.get_running_loop().time()
                try:
                    self._keys = await self._fetch()
                except (HTTPError, ValueError, KeyError, jwt.TokenError) as error:
                    log.warning("oidc keys not fetched", issuer=self._config.issuer_url, error=str(error))
        found = self._keys.get(kid)
        return [found] if found is not None else list(self._keys.values()) if not kid else []

    async def _fetch(self) -> dict[str, jwt.PublicKey]:
        config = self._config
        url = config.discovery_url or config.issuer_url.rstrip("/") + "/.well-known/openid-configuration"
        document = orjson.loads(await self._get(url))
        if document.get("issuer") != config.issuer_url:
            raise ValueError(f"discovery document names issuer {document.get('issuer')!r}")
        keys: dict[str, jwt.PublicKey] = {}
        for one in orjson.loads(await self._get(document["jwks_uri"])).get("keys") or ():
            if one.get("use", "sig") == "sig" and one.get("kty") in ("RSA", "EC"):
                keys[str(one.get("kid") or "")] = jwt.from_jwk(one)
        return keys

    async def _get(self, url: str) -> bytes:
        parts = urlsplit(url)
        context = ssl.create_default_context(cafile=self._config.ca_file or None, cadata=self._config.ca_data or None)
        client = HTTPClient(f"{parts.scheme}://{parts.netloc}", context, timeout_seconds=_FETCH_TIMEOUT_SECONDS, max_body_bytes=1 << 20)
        try:
            response = await client.request("GET", parts.path or "/", {"Accept": "application/json"})
        finally:
            await client.close()
        if response.status != 200:
            raise ValueError(f"{url} answered {response.status}")
        return response.body

    def _user(self, claims: dict[str, object]) -> UserInfo:
        self._check(claims)
        return UserInfo(self._name(claims), "", self._groups(claims))

    def _check(self, claims: dict[str, object]) -> None:
        """Check times, audience and required claims. Raises TokenRefused."""
        config = self._config
        now = clock.now()
        expires, begins = claims.get("exp"), claims.get("nbf")
        if not isinstance(expires, int | float) or now > expires:
            raise TokenRefused("oidc: verify token: oidc: token is expired")
        if isinstance(begins, int | float) and now < begins - 300:
            raise TokenRefused("oidc: verify token: oidc: current time is before the nbf (not before) time")
        audience = claims.get("aud")
        given = audience if isinstance(audience, list) else [audience]
        if not any(one in given for one in config.audiences or (config.client_id,)):
            raise TokenRefused(f'oidc: verify token: oidc: expected audience "{config.client_id}" got {audience}')
        for name, wanted in config.required_claims:
            if claims.get(name) != wanted:
                raise TokenRefused(f"oidc: required claim {name} not present in ID token" if name not in claims else f"oidc: required claim {name} value does not match. Got = {claims[name]}, want = {wanted}")

    def _name(self, claims: dict[str, object]) -> str:
        config = self._config
        name = claims.get(config.username_claim)
        if not isinstance(name, str) or not name:
            raise TokenRefused(f'oidc: parse username claims "{config.username_claim}": claim not present')
        if config.username_claim == "email" and claims.get("email_verified", True) is not True:
            raise TokenRefused("oidc: email not verified")
        prefix = config.username_prefix
        if prefix == "-":
            prefix = ""
        elif not prefix and config.username_claim != "email":
            prefix = f"{config.issuer_url}#"
        return prefix + name

    def _groups(self, claims: dict[str, object]) -> tuple[str, ...]:
        found = claims.get(self._config.groups_claim) if self._config.groups_claim else None
        if found is None:
            return ()
        groups = [found] if isinstance(found, str) else found
        if not isinstance(groups, list) or not all(isinstance(group, str) for group in groups):
            raise TokenRefused(f'oidc: parse groups claim "{self._config.groups_claim}": not a list of strings')
        return tuple(self._config.groups_prefix + group for group in groups)
