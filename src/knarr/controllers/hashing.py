"""Names made from contents: pod template hashes and revision hashes.

FNV-1a over a canonical form, written in the alphabet that upstream uses for generated names, so
that no vowels make words. The same template always gives the same name, also after a restart.
Source: pkg/controller/controller_utils.go ComputeHash, apimachinery util/rand SafeEncodeString.
"""

from __future__ import annotations

import orjson

from knarr.api.types import Object

_ALPHABET = "bcdfghjklmnpqrstvwxz2456789"


def fnv1a32(data: bytes, start: int = 0x811C9DC5) -> int:
    """Compute the 32 bit FNV-1a hash."""
    value = start
    for byte in data:
        value = ((value ^ byte) * 0x01000193) & 0xFFFFFFFF
    return value


def fnv132(data: bytes, start: int = 0x811C9DC5) -> int:
    """Compute the 32 bit FNV-1 hash (multiply first)."""
    value = start
    for byte in data:
        value = ((value * 0x01000193) & 0xFFFFFFFF) ^ byte
    return value


def safe_encode(text: str) -> str:
    """Map each character into the alphabet of generated names."""
    return "".join([_ALPHABET[ord(c) % len(_ALPHABET)] for c in text])


def template_hash(template: Object, collision_count: int | None = None) -> str:
    """Give the hash of a pod template, changed by a collision count."""
    value = fnv1a32(orjson.dumps(template, option=orjson.OPT_SORT_KEYS))
    if collision_count is not None:
        value = fnv1a32(collision_count.to_bytes(8, "little"), value)
    return safe_encode(str(value))


def revision_hash(data: bytes, probe: int | None = None) -> str:
    """Give the hash of a ControllerRevision's data, changed by a probe number (the collision count)."""
    value = fnv132(data)
    if probe is not None:
        value = fnv132(str(probe).encode(), value)
    return safe_encode(str(value))
