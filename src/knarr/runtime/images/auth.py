"""Registry credentials: choosing them, challenges, tokens.

Role: below registry.py. Source: distribution spec token authentication (Bearer), RFC 7617 (Basic).
"""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable
from urllib.parse import urlencode, urlsplit

import orjson

from knarr.http.client import Response
from knarr.runtime.cri import AuthConfig, ImagePullError

_PARAMETER = re.compile(r'([a-zA-Z_]+)=(?:"((?:[^"\\]|\\.)*)"|([^\s,]+))')
Fetch = Callable[[str, str, dict[str, str], bytes | None], Awaitable[Response]]
"""method, absolute URL, headers, body -> answer."""


def user_and_password(auth: AuthConfig) -> tuple[str, str]:
    """Plain credentials; "auth" is base64 of user:password as docker writes it. Malformed ones are empty."""
    if auth.auth and not auth.username:
        try:
            user, _, password = base64.b64decode(auth.auth, validate=False).decode().partition(":")
        except (ValueError, UnicodeDecodeError):
            return "", ""
        return user, password.rstrip("\0")
    return auth.username, auth.password


def basic(user: str, password: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()


def parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    """(scheme in lower case, parameters) of a WWW-Authenticate header; the first challenge only."""
    scheme, _, rest = header.strip().partition(" ")
    return scheme.lower(), {match[0].lower(): match[1] or match[2] for match in _PARAMETER.findall(rest)}


class Authorizer:
    """Authorization headers for one repository with one set of credentials (None: anonymous)."""

    def __init__(self, fetch: Fetch, repository: str, auth: AuthConfig | None) -> None:
        self._fetch, self._repository, self._auth = fetch, repository, auth
        self.header = f"Bearer {auth.registry_token}" if auth is not None and auth.registry_token else ""

    async def answer(self, challenge: str) -> bool:
        """Answer a challenge; False when there is nothing (new) to offer. Raises ImagePullError when the token server refuses."""
        scheme, parameters = parse_challenge(challenge)
        user, password = user_and_password(self._auth) if self._auth is not None else ("", "")
        if scheme == "basic":
            if not user or self.header:
                return False
            self.header = basic(user, password)
            return True
        if scheme != "bearer" or not parameters.get("realm", "").startswith(("http://", "https://")):
            return False
        before = self.header
        self.header = await self._token(parameters, user, password)
        return self.header != before

    async def _token(self, parameters: dict[str, str], user: str, password: str) -> str:
        realm = parameters["realm"]
        scope = parameters.get("scope") or f"repository:{self._repository}:pull"
        service = parameters.get("service", "")
        if self._auth is not None and self._auth.identity_token:
            form = {"grant_type": "refresh_token", "service": service, "scope": scope, "client_id": "knarr", "refresh_token": self._auth.identity_token}
            headers = {"Content-Type": "application/x-www-form-urlencoded"}
            answer = await self._fetch("POST", realm, headers, urlencode(form).encode())
        else:
            query = urlencode([(key, value) for key, value in (("service", service), ("scope", scope)) if value])
            url = realm + ("&" if urlsplit(realm).query else "?") + query
            answer = await self._fetch("GET", url, {"Authorization": basic(user, password)} if user else {}, None)
        if answer.status != 200:
            raise ImagePullError(f"failed to authorize: failed to fetch token: unexpected status from GET request to {realm}: {answer.status}")
        try:
            document = orjson.loads(answer.body)
            token = document.get("token") or document["access_token"]
        except (orjson.JSONDecodeError, KeyError, AttributeError) as error:
            raise ImagePullError("failed to authorize: malformed token response") from error
        return f"Bearer {token}"
