"""EncryptionConfiguration: which resources are encrypted at rest, and by which providers.

Source: apiserver pkg/server/options/encryptionconfig/config.go, pkg/apis/apiserver/validation/validation_encryption.go.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import yaml

from knarr.api import times
from knarr.storage.ciphers import AESCBCTransformer, AESGCMTransformer, Identity, SecretboxTransformer, Transformer
from knarr.storage.kms import DEFAULT_TIMEOUT_SECONDS, KMSProvider, Observer

_AES_SIZES = (16, 24, 32)
_KEYED: dict[str, tuple[Callable[[str, bytes], Transformer], tuple[int, ...]]] = {
    "aesgcm": (AESGCMTransformer, _AES_SIZES), "aescbc": (AESCBCTransformer, _AES_SIZES), "secretbox": (SecretboxTransformer, (32,)),
}  # fmt: skip
_PROVIDERS = (*_KEYED, "kms", "identity")
_WITHOUT_API = frozenset({"apiserveripinfo", "serviceipallocations", "servicenodeportallocations"})


class Configuration(NamedTuple):
    """One reading of the file."""

    transformers: dict[tuple[str, str], tuple[Transformer, ...]]
    """(resource, group), either "*" for all -> those that read; the first writes."""
    plugins: tuple[KMSProvider, ...]
    hash: str
    """Of the file: "sha256:..."."""

    def transformers_of(self, resource: str, group: str) -> tuple[Transformer, ...]:
        """Return what concerns a resource, () when it is stored as it is; what names it more closely counts."""
        for known in ((resource, group), ("*", group), ("*", "*")):
            found = self.transformers.get(known)
            if found is not None:
                return found
        return ()

    @property
    def grace_seconds(self) -> float:
        """How long calls that are under way with these plugins may last."""
        return 2 * sum(one.timeout_seconds for one in self.plugins)


def load_configuration(path: str | Path, observer: Observer | None = None) -> Configuration:
    """Read an EncryptionConfiguration.

    Raises:
      ValueError: it is malformed; the text says where.
      OSError: the file cannot be read.
    """
    content = Path(path).read_bytes()
    try:
        document = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(document, dict) or document.get("kind") != "EncryptionConfiguration" or document.get("apiVersion") != "apiserver.config.k8s.io/v1":
        raise ValueError(f"{path} is no apiserver.config.k8s.io/v1 EncryptionConfiguration")
    found: dict[tuple[str, str], tuple[Transformer, ...]] = {}
    plugins: list[KMSProvider] = []
    entries = document.get("resources") or ()
    if not entries:
        raise ValueError("resources: Required value: at least one resources is required")
    for index, entry in enumerate(entries):
        where = f"resources[{index}]"
        names = [str(name) for name in entry.get("resources") or ()]
        _check_names(names, f"{where}.resources")
        if not entry.get("providers"):
            raise ValueError(f"{where}.providers: Required value: at least one {where}.providers is required")
        made = [
            one for place, provider in enumerate(entry["providers"])
            for one in _transformers(provider, f"{where}.providers[{place}]", plugins, observer or Observer())
        ]  # fmt: skip
        for name in names:
            resource, _, group = name.partition(".")
            for wider in (("*", group), ("*", "*")):
                if wider in found:
                    raise ValueError(f'resource "{name}" is masked by earlier rule "{wider[0]}.{wider[1]}"')
            found[resource, group] = (*found.get((resource, group), ()), *made)
    return Configuration(found, tuple(plugins), f"sha256:{hashlib.sha256(content).hexdigest()}")


def _check_names(names: Sequence[str], where: str) -> None:
    if not names:
        raise ValueError(f"{where}: Required value: at least one {where} is required")
    parsed = [(name.partition(".")[0], name.partition(".")[2]) for name in names]
    if len(set(parsed)) < len(parsed):
        raise ValueError(f"{where}: Invalid value: the same resource cannot be specified multiple times")
    if len(parsed) > 1 and any(
        one == ("*", "*") or (one is not other and one[1] == other[1] and one[0] == "*") for one in parsed for other in parsed
    ):
        raise ValueError(
            f"{where}: Invalid value: using overlapping resources such as 'secrets' and '*.' in the same resource list is not allowed as they will be masked"
        )
    for index, (name, (resource, group)) in enumerate(zip(names, parsed, strict=True)):
        reason = _refused(name, resource, group)
        if reason:
            raise ValueError(f'{where}[{index}]: Invalid value: "{name}": {reason}')


def _refused(name: str, resource: str, group: str) -> str:
    """Say why a resource cannot be named, "" when it can."""
    if name != name.lower():
        return "resource name should not contain capital letters"
    if name == "*":
        return "use '*.' to encrypt all the resources from core API group or *.* to encrypt all resources"
    if name in _WITHOUT_API:
        return "resources which do not have REST API/s cannot be encrypted"
    if group == "events.k8s.io":
        return "'*.events.k8s.io' objects are stored using the 'events' API group in etcd. Use 'events' instead in the config file"
    if group == "extensions":
        return "'extensions' group has been removed and cannot be used for encryption"
    if group == "*" and resource != "*":
        return "encrypting the same resource across groups is not supported"
    return ""


def _transformers(provider: dict[str, Any], where: str, plugins: list[KMSProvider], observer: Observer) -> list[Transformer]:
    """Return one entry's transformers; a plugin is added to the others, too."""
    kinds = [kind for kind in _PROVIDERS if kind in provider]
    if len(kinds) > 1:
        raise ValueError(f"{where}: Invalid value: more than one provider specified in a single element, should split into different list elements")
    if not kinds:
        raise ValueError(f"{where}: encryption provider {', '.join(provider)} is not supported: {', '.join(_PROVIDERS)} are")
    kind = kinds[0]
    if kind == "identity":
        return [Identity()]
    settings = provider[kind] or {}
    if kind == "kms":
        plugin = _plugin(settings, f"{where}.kms", [one.name for one in plugins], observer)
        plugins.append(plugin)
        return [plugin]
    make, sizes = _KEYED[kind]
    keys = settings.get("keys") or ()
    if not keys:
        raise ValueError(f"{where}.{kind}.keys: Required value: at least one keys is required")
    return [make(str(key["name"]), _secret(key, f"{where}.{kind}.keys[{index}]", sizes)) for index, key in enumerate(keys)]


def _secret(key: dict[str, Any], where: str, sizes: tuple[int, ...]) -> bytes:
    for name in ("name", "secret"):
        if not key.get(name):
            raise ValueError(f"{where}.{name}: Required value: {name} is a mandatory field for a key")
    try:
        secret = base64.b64decode(str(key["secret"]), validate=True)
    except binascii.Error as error:
        raise ValueError(f"{where}.secret: Invalid value: secrets must be base64 encoded") from error
    if len(secret) not in sizes:
        raise ValueError(
            f"{where}.secret: Invalid value: secret is not of the expected length, got {len(secret)}, expected one of [{' '.join(map(str, sizes))}]"
        )
    return secret


def _plugin(settings: dict[str, Any], where: str, others: Sequence[str], observer: Observer) -> KMSProvider:
    name, version, endpoint = (str(settings.get(key) or "") for key in ("name", "apiVersion", "endpoint"))
    if not name:
        raise ValueError(f"{where}.name: Required value: name is a mandatory field for a provider")
    if version != "v2":
        # Version 1, the default, is behind a gate that is off upstream, too.
        raise ValueError(f"{where}.apiVersion: Invalid value: {version or 'v1'}: KMSv1 is deprecated, use v2 instead")
    if ":" in name:
        raise ValueError(f"{where}.name: Invalid value: invalid KMS provider name {name}, must not contain ':'")
    if name in others:
        raise ValueError(f"{where}.name: Invalid value: duplicate KMS provider name {name}, names must be unique")
    if settings.get("cachesize") is not None:
        raise ValueError(f"{where}.cachesize: Invalid value: cachesize is not supported in v2")
    parts = urlsplit(endpoint)
    if parts.scheme != "unix" or not parts.path:
        raise ValueError(f'{where}.endpoint: Invalid value: "{endpoint}": unsupported scheme "{parts.scheme}" for KMS provider, only unix is supported')
    timeout = settings.get("timeout")
    seconds = DEFAULT_TIMEOUT_SECONDS if timeout is None else times.parse_duration(str(timeout)) / 1e9
    if seconds <= 0:
        raise ValueError(f"{where}.timeout: Invalid value: timeout should be a positive value")
    return KMSProvider(name, parts.path, seconds, observer)
