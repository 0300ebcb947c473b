"""Bearer tokens that are not service account tokens: the static token file and bootstrap tokens; and the contract of all.

Source: apiserver pkg/authentication/token/tokenfile, kubernetes plugin/pkg/auth/authenticator/token/bootstrap.
"""

from __future__ import annotations

import base64
import binascii
import csv
import hmac
import re
from pathlib import Path
from typing import NamedTuple, Protocol

from knarr.aiokits import clock
from knarr.api.types import Object
from knarr.apiserver.attributes import Store, UserInfo


class TokenUser(NamedTuple):
    """Who a token stands for, for which audiences (empty: any that were asked for), and when that answer expires."""

    user: UserInfo
    audiences: tuple[str, ...] = ()
    expires_at: float | None = None


class TokenRefused(Exception):
    """The token was recognised but is not good; the text goes into TokenReview's status.error."""


class TokenAuthenticator(Protocol):
    """Looks at one kind of token."""

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        """Return the user; None when the token is of another kind. Raises TokenRefused."""
        ...


class TokenFile:
    """Static tokens: CSV lines token,user,uid,"group1,group2"."""

    def __init__(self, path: str) -> None:
        self._users: dict[str, UserInfo] = {}
        with Path(path).open(newline="") as file:
            for row in csv.reader(file, skipinitialspace=True):
                if not row or row[0].startswith("#"):
                    continue
                if len(row) < 3:
                    raise ValueError(f"token file {path!r} must have at least 3 columns (token, user name, user uid), found {len(row)}")
                groups = tuple(group.strip() for group in row[3].split(",") if group.strip()) if len(row) > 3 else ()
                self._users[row[0].strip()] = UserInfo(row[1].strip(), row[2].strip(), groups)

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        user = self._users.get(token)
        return TokenUser(user) if user is not None else None


_BOOTSTRAP = re.compile(r"([a-z0-9]{6})\.([a-z0-9]{16})")
_BOOTSTRAP_GROUP = re.compile(r"system:bootstrappers:[a-z0-9:-]{0,255}[a-z0-9]")


def _data(secret: Object, key: str) -> str:
    try:
        return base64.b64decode((secret.get("data") or {}).get(key, "")).decode()
    except (binascii.Error, UnicodeDecodeError):
        return ""


class BootstrapTokens:
    """Tokens kept as secrets bootstrap-token-ID in kube-system, for machines that join."""

    def __init__(self, secrets: Store) -> None:
        self._secrets = secrets

    async def authenticate_token(self, token: str, audiences: tuple[str, ...]) -> TokenUser | None:
        match = _BOOTSTRAP.fullmatch(token)
        if match is None:
            return None
        token_id, token_secret = match.groups()
        secret = self._secrets.get_nowait("kube-system", f"bootstrap-token-{token_id}")
        if secret is None or secret["metadata"].get("deletionTimestamp") or secret.get("type") != "bootstrap.kubernetes.io/token":
            return None
        if not hmac.compare_digest(_data(secret, "token-secret"), token_secret) or _data(secret, "token-id") != token_id:
            return None
        expiration = _data(secret, "expiration")
        expires_at: float | None = None
        if expiration:
            try:
                expires_at = clock.parse_rfc3339(expiration)
            except ValueError:
                return None
            if expires_at < clock.now():
                return None
        if _data(secret, "usage-bootstrap-authentication") != "true":
            return None
        groups = ["system:bootstrappers"]
        for group in filter(None, _data(secret, "auth-extra-groups").split(",")):
            if _BOOTSTRAP_GROUP.fullmatch(group) is None:
                return None
            groups.append(group)
        return TokenUser(UserInfo(f"system:bootstrap:{token_id}", "", tuple(dict.fromkeys(groups))), (), expires_at)
