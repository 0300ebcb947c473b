"""What is said to a key management plugin, and what is stored of its answers.

Source: k8s.io/kms apis/v2/api.proto; apiserver pkg/storage/value/encrypt/envelope/kmsv2 (v2/api.proto, envelope.go).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from knarr.storage.etcd_wire import data, fields, integer, message

_MOST_KEY_ID, _MOST_SOURCE, _MOST_ANNOTATIONS = 1024, 1024, 32 * 1024
DEK, SEED = 0, 1
"""How the key of a value comes from the secret that the plugin has encrypted: it is that, or is derived from it."""
_DOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)+")


class Sealed(NamedTuple):
    """What is stored behind the prefix."""

    body: bytes
    key_id: str
    source: bytes
    """The encrypted seed or key."""
    annotations: Mapping[str, bytes]
    kind: int

    def encode(self) -> bytes:
        return data(1, self.body) + self.tail()

    def tail(self) -> bytes:
        """All but the body: the same for every value under one seed."""
        return data(2, self.key_id.encode()) + data(3, self.source) + pairs(4, self.annotations) + integer(5, self.kind)


def pairs(number: int, values: Mapping[str, bytes]) -> bytes:
    return b"".join(message(number, data(1, name.encode()) + data(2, values[name])) for name in sorted(values))


def decode_sealed(stored: bytes) -> Sealed:
    """Read an EncryptedObject. Raises ValueError."""
    found: dict[int, Any] = {}
    annotations: dict[str, bytes] = {}
    try:
        for number, value in fields(stored):
            if number == 4 and isinstance(value, bytes):
                name, content = _pair(value)
                annotations[name] = content
            else:
                found[number] = value
        sealed = Sealed(bytes(found.get(1, b"")), bytes(found.get(2, b"")).decode(), bytes(found.get(3, b"")), annotations, int(found.get(5, DEK)))
    except (IndexError, TypeError) as error:
        raise ValueError("it is no encrypted object") from error
    check(sealed)
    return sealed


def _pair(body: bytes) -> tuple[str, bytes]:
    parts = {number: value for number, value in fields(body) if isinstance(value, bytes)}
    return parts.get(1, b"").decode(), parts.get(2, b"")


def check(sealed: Sealed) -> None:
    """Raise ValueError for what no plugin may answer and no store may hold."""
    if sealed.kind not in (DEK, SEED):
        raise ValueError(f"unknown encryptedDEKSourceType: {sealed.kind}")
    if not sealed.body:
        raise ValueError("encrypted data is empty")
    if not sealed.source:
        raise ValueError("failed to validate encrypted DEK source: encrypted DEK source is empty")
    if len(sealed.source) > _MOST_SOURCE:
        raise ValueError(f"failed to validate encrypted DEK source: encrypted DEK source is {len(sealed.source)} bytes, which exceeds the max size of {_MOST_SOURCE}")
    _, reason = invalid_key_id(sealed.key_id)
    if reason:
        raise ValueError(f"failed to validate key id: {reason}")
    for name in sealed.annotations:
        if len(name) > 253 or not _DOMAIN.fullmatch(name.removesuffix(".")):
            raise ValueError(f"failed to validate annotations: {name!r} should be a domain with at least two segments separated by dots")
    size = sum(len(name.encode()) + len(value) for name, value in sealed.annotations.items())
    if size > _MOST_ANNOTATIONS:
        raise ValueError(f"failed to validate annotations: total size of annotations is {size}, which exceeds the max size of {_MOST_ANNOTATIONS}")


def invalid_key_id(key_id: str) -> tuple[str, str]:
    """Return (code, reason) for a key id that cannot be, ("", "") for others."""
    size = len(key_id.encode())
    if not size:
        return "empty", "keyID is empty"
    return ("too_long", f"keyID is {size} bytes, which exceeds the max size of {_MOST_KEY_ID}") if size > _MOST_KEY_ID else ("", "")


def key_hash(text: str) -> str:
    """What is told of a key id where people read it."""
    return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}" if text else ""


def identity(sealed: Sealed) -> tuple[object, ...]:
    """Return what tells one seed from others."""
    return sealed.kind, sealed.source, sealed.key_id, tuple(sorted(sealed.annotations.items()))


def sealed_by(answer: bytes) -> Sealed:
    """Return what an EncryptResponse says of a seed; the body is any that is not empty. Raises ValueError."""
    found: dict[int, bytes] = {}
    annotations: dict[str, bytes] = {}
    for number, value in fields(answer):
        if not isinstance(value, bytes):
            continue
        if number == 3:
            name, content = _pair(value)
            annotations[name] = content
        else:
            found[number] = value
    return Sealed(b"\0", found.get(2, b"").decode(), found.get(1, b""), annotations, SEED)
