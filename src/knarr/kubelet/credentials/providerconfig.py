"""Reads a CredentialProviderConfig: which plugins give credentials for which images.

Callers: kubelet at its start, `knarr up` to refuse a bad file at once. Source: pkg/credentialprovider/plugin/config.go,
staging kubelet/config/v1 types.go.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

from knarr.api import times, yamldoc

_GROUP = "kubelet.config.k8s.io"
_VERSIONS = ("v1", "v1beta1", "v1alpha1")
V1 = "credentialprovider.kubelet.k8s.io/v1"
_PLUGIN_VERSIONS = (V1, "credentialprovider.kubelet.k8s.io/v1beta1", "credentialprovider.kubelet.k8s.io/v1alpha1")
_CACHE_TYPES = ("ServiceAccount", "Token")
_FIELDS = {"name", "matchImages", "defaultCacheDuration", "apiVersion", "args", "env", "tokenAttributes"}
_TOKEN_FIELDS = {"serviceAccountTokenAudience", "cacheType", "requireServiceAccount", "requiredServiceAccountAnnotationKeys", "optionalServiceAccountAnnotationKeys"}


class ProviderConfigError(Exception):
    """The configuration cannot be used; the text names file and field."""


@dataclass(frozen=True, slots=True)
class TokenAttributes:
    """What a plugin wants to know of the pod's service account."""

    audience: str
    per_token: bool
    """Cache by token, not by account."""
    required: bool
    required_annotations: tuple[str, ...] = ()
    optional_annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """One plugin."""

    name: str
    match_images: tuple[str, ...]
    cache_seconds: float
    api_version: str
    args: tuple[str, ...] = ()
    env: dict[str, str] = field(default_factory=dict)
    token: TokenAttributes | None = None


def load(path: str, folder: str) -> list[ProviderConfig]:
    """Read a file, or all *.json, *.yaml and *.yml of a folder in the order of their names; `folder` holds the plugins' programs.

    Raises:
      ProviderConfigError: unreadable, not valid, or a program is missing.
    """
    if not os.path.isdir(folder):
        raise ProviderConfigError(f"plugin binary directory {folder} did not exist")
    try:
        files = [path]
        if os.path.isdir(path):
            files = [os.path.join(path, name) for name in sorted(os.listdir(path)) if os.path.splitext(name)[1] in (".json", ".yaml", ".yml")]
            if not files:
                raise ProviderConfigError(f'no configuration files found in directory "{path}"')
        found = [one for name in files for one in _read(name)]
    except OSError as error:
        raise ProviderConfigError(f'unable to access path "{path}": {error.strerror}') from error
    if not found:
        raise ProviderConfigError("providers: Required value: at least 1 item in plugins is required")
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise ProviderConfigError(f'duplicate provider name "{one.name}" found in configuration file(s)')
        if not os.access(os.path.join(folder, one.name), os.X_OK):
            raise ProviderConfigError(f"plugin binary executable {os.path.join(folder, one.name)} did not exist")
    return found


def _read(path: str) -> list[ProviderConfig]:
    with open(path, "rb") as file:
        content = file.read()
    try:
        document, duplicates = yamldoc.load(content, strict=True)
        if duplicates:
            raise ValueError(duplicates)
        group, _, version = str(document.get("apiVersion")).partition("/") if isinstance(document, dict) else ("", "", "")
        if group != _GROUP or version not in _VERSIONS or document.get("kind") != "CredentialProviderConfig":
            raise ValueError(f"not a CredentialProviderConfig of {_GROUP}/v1")
        _only(document, {"apiVersion", "kind", "providers"}, "")
        return [_provider(entry) for entry in document.get("providers") or []]
    except (ValueError, TypeError, AttributeError) as error:
        raise ProviderConfigError(f'error decoding config "{path}": {error}') from error


def _only(document: dict[str, Any], known: set[str], where: str) -> None:
    for name in document:
        if name not in known:
            raise ValueError(f'unknown field "{where}{name}"')


def _provider(entry: dict[str, Any]) -> ProviderConfig:
    _only(entry, _FIELDS, "providers.")
    name, version = str(entry.get("name") or ""), str(entry.get("apiVersion") or "")
    if not name or "/" in name or " " in name or name in (".", ".."):
        raise ValueError(f'providers.name: Invalid value: "{name}"')
    if version not in _PLUGIN_VERSIONS:
        raise ValueError(f'providers.apiVersion: Unsupported value: "{version}": supported values: {", ".join(_PLUGIN_VERSIONS)}')
    if not entry.get("matchImages"):
        raise ValueError("providers.matchImages: Required value: at least 1 item in matchImages is required")
    if not entry.get("defaultCacheDuration"):
        raise ValueError("providers.defaultCacheDuration: Required value")
    seconds = times.parse_duration(entry["defaultCacheDuration"]) / 1e9
    if seconds < 0:
        raise ValueError("providers.defaultCacheDuration: must be greater than or equal to 0")
    env = {str(item["name"]): str(item["value"]) for item in entry.get("env") or []}
    token = _token(entry["tokenAttributes"], version) if entry.get("tokenAttributes") else None
    return ProviderConfig(name, tuple(map(str, entry["matchImages"])), seconds, version, tuple(map(str, entry.get("args") or [])), env, token)


def _token(entry: dict[str, Any], version: str) -> TokenAttributes:
    _only(entry, _TOKEN_FIELDS, "providers.tokenAttributes.")
    if version != V1:
        raise ValueError(f"providers.tokenAttributes: Forbidden: tokenAttributes is only supported for {V1} API version")
    audience, required, kind = entry.get("serviceAccountTokenAudience"), entry.get("requireServiceAccount"), entry.get("cacheType")
    if not audience:
        raise ValueError("providers.tokenAttributes.serviceAccountTokenAudience: Required value")
    if not isinstance(required, bool):
        raise ValueError("providers.tokenAttributes.requireServiceAccount: Required value")
    if kind not in _CACHE_TYPES:
        raise ValueError(f'providers.tokenAttributes.cacheType: Unsupported value: "{kind or ""}": supported values: {", ".join(_CACHE_TYPES)}')
    must, may = tuple(entry.get("requiredServiceAccountAnnotationKeys") or ()), tuple(entry.get("optionalServiceAccountAnnotationKeys") or ())
    if must and not required:
        raise ValueError("providers.tokenAttributes.requiredServiceAccountAnnotationKeys: Forbidden: requireServiceAccount cannot be false when it is set")
    if len({*must, *may}) != len(must) + len(may):
        raise ValueError("providers.tokenAttributes: annotation keys cannot be given twice, nor be both required and optional")
    return TokenAttributes(audience, kind == "Token", required, must, may)
