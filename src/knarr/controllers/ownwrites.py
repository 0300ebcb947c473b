"""Waiting for our own writes to come back: a guard against acting on a cache that lacks them.

Source: endpointslice/util/endpointslice_tracker.go (same purpose).
"""

from __future__ import annotations

from knarr.api.types import Object
from knarr.client.informer import Informer

_DELETED = -1


def _version(obj: Object) -> int:
    text = obj["metadata"].get("resourceVersion", "0")
    return int(text) if text.isdigit() else 0


class OwnWrites:
    """Writes that the cache has not shown yet, per key of the thing reconciled."""

    __slots__ = ("_cache", "_pending")

    def __init__(self, cache: Informer) -> None:
        self._cache = cache
        self._pending: dict[str, dict[str, int]] = {}

    def wrote(self, key: str, obj: Object) -> None:
        """We created or updated an object, as answered by the server."""
        meta = obj["metadata"]
        cached = self._cache.get(meta.get("namespace"), meta["name"])
        if cached is None or _version(cached) < _version(obj):
            self._pending.setdefault(key, {})[meta["name"]] = _version(obj)

    def deleted(self, key: str, obj: Object) -> None:
        """We deleted an object."""
        meta = obj["metadata"]
        if self._cache.get(meta.get("namespace"), meta["name"]) is not None:
            self._pending.setdefault(key, {})[meta["name"]] = _DELETED

    def behind(self, key: str) -> bool:
        """Whether the cache still lacks a write for this key."""
        return key in self._pending

    def seen(self, key: str, obj: Object, deleted: bool = False) -> bool:
        """Note an event of the cache; says whether the event was the echo of our own write."""
        pending = self._pending.get(key)
        name = obj["metadata"]["name"]
        if pending is None or name not in pending:
            return False
        version = pending[name]
        if deleted or (version != _DELETED and _version(obj) >= version):
            del pending[name]
            if not pending:
                del self._pending[key]
            return deleted == (version == _DELETED)
        return True

    def forget(self, key: str) -> None:
        self._pending.pop(key, None)
