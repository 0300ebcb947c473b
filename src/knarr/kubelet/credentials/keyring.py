"""Credentials in docker's form, and which of them are for an image. Pure.

Callers: images (pull secrets, the node's own file), credentials.provider (answers of plugins). A key names a registry, perhaps with a path,
whose host's labels may have wildcards. Source: pkg/credentialprovider/keyring.go, secrets/secrets.go.
"""

from __future__ import annotations

import base64
import binascii
import fnmatch
import hashlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.runtime.cri import AuthConfig

log = get_logger(__name__)

_DOCKER_HUB = ("docker.io", "index.docker.io", "registry-1.docker.io")
_FORMS = {"kubernetes.io/dockerconfigjson": ".dockerconfigjson", "kubernetes.io/dockercfg": ".dockercfg"}


@dataclass(frozen=True, slots=True)
class Owner:
    """The Secret or ServiceAccount that credentials are from."""

    namespace: str
    name: str
    uid: str


@dataclass(frozen=True, slots=True)
class Credential:
    """What one pull may present. Without an owner, every pod of the node has it."""

    auth: AuthConfig
    secret: Owner | None = None
    account: Owner | None = None

    def digest(self) -> str:
        """Tells whether a secret holds the same as before, and no more than that."""
        auth = self.auth
        text = orjson.dumps([auth.username, auth.password, auth.auth, auth.server_address, auth.identity_token, auth.registry_token])
        return hashlib.sha256(text).hexdigest()


def matches(pattern: str, image: str) -> bool:
    """Whether credentials for `pattern` are for an image: same port, a host label by label with wildcards, a path that begins so."""
    pattern_host, _, pattern_path = pattern.partition("/")
    host, _, path = image.partition("/")
    pattern_host, _, pattern_port = pattern_host.partition(":")
    host, _, port = host.partition(":")
    pattern_labels, labels = pattern_host.split("."), host.split(".")
    if pattern_port != port or len(pattern_labels) != len(labels) or not path.startswith(pattern_path):
        return False
    return all(fnmatch.fnmatchcase(label, wanted.replace("[^", "[!")) for wanted, label in zip(pattern_labels, labels, strict=True))


def choose(entries: Iterable[tuple[str, Credential]], image: str) -> list[Credential]:
    """Those that are for an image (registry and repository, no tag), the more specific keys first."""
    found = [(key, credential) for key, credential in ((_plain(key), credential) for key, credential in entries) if matches(key, image)]
    return [credential for _, credential in sorted(found, key=lambda item: item[0], reverse=True)]


def _plain(key: str) -> str:
    """A key of a docker configuration as host and path; docker's own registry has several names."""
    key = re.sub(r"^https?://", "", key)
    host, slash, path = key.partition("/")
    path = re.sub(r"^v[12](/|$)", "", path)
    return "docker.io" + (slash and path and f"/{path}") if host in _DOCKER_HUB else host + (slash and path and f"/{path}")


def of_secrets(secrets: Iterable[Object]) -> list[tuple[str, Credential]]:
    """(key, credential) of each entry of pull secrets; what is no docker configuration is told and left out."""
    out: list[tuple[str, Credential]] = []
    for secret in secrets:
        raw = (secret.get("data") or {}).get(_FORMS.get(secret.get("type") or "", ""))
        if not raw:
            continue
        meta = secret["metadata"]
        try:
            document = orjson.loads(base64.b64decode(raw))
            if secret["type"] == "kubernetes.io/dockerconfigjson":
                document = document.get("auths") or {}
            out += of_config(document, Owner(meta.get("namespace", ""), meta["name"], meta.get("uid", "")))
        except (ValueError, AttributeError, TypeError):
            log.warning("image pull secret is no docker configuration", secret=f"{meta.get('namespace', '')}/{meta['name']}")
    return out


def of_config(document: dict[str, Any], owner: Owner | None = None) -> list[tuple[str, Credential]]:
    """The same of a docker configuration's servers."""
    return [(server, Credential(_auth(server, entry), owner)) for server, entry in document.items() if isinstance(entry, dict)]


def _auth(server: str, entry: dict[str, Any]) -> AuthConfig:
    username, password = entry.get("username", ""), entry.get("password", "")
    if entry.get("auth") and not username:
        try:
            username, _, password = base64.b64decode(entry["auth"]).decode(errors="replace").partition(":")
        except binascii.Error:
            log.warning("credentials of a registry are not base64", server=server)
    return AuthConfig(
        username=username,
        password=password.rstrip("\x00"),
        server_address=server,
        identity_token=entry.get("identitytoken", ""),
        registry_token=entry.get("registrytoken", ""),
    )
