"""ConfigMaps and Secrets that this node's pods refer to: fetched on first use, then watched one by one.

Callers: env, volumes, images. A watch per object and not per kind, because a node may read only what its pods name (node
authorizer). An immutable object is not watched. When the last pod lets go of an object its watch ends.
Bound: one watch per referenced object. Source: pkg/kubelet/util/manager/watch_based_manager.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet.faults import UNREACHABLE

log = get_logger(__name__)

_RETRY_SECONDS = 1.0
_RETRY_MAX_SECONDS = 30.0


@dataclass(slots=True)
class _Entry:
    resource: Resource
    namespace: str
    name: str
    value: Object | None = None
    version: str = ""
    loaded: bool = False
    loading: asyncio.Task[None] | None = None
    watching: asyncio.Task[None] | None = None
    users: set[str] = field(default_factory=set)


class ReferencedObjects:
    """A cache of single objects, each kept new by its own watch; see the module."""

    def __init__(self, client: Client, changed: Callable[[set[str]], None]) -> None:
        """`changed` is called with the uids of the pods that use an object which became another."""
        self._client = client
        self._changed = changed
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._tasks = Tasks()

    async def close(self) -> None:
        await self._tasks.close()

    async def get(self, resource: Resource, namespace: str, name: str, pod_uid: str) -> Object:
        """Give the object's present state, and remember that this pod uses it.

        Raises:
          StatusError: not found, forbidden, or the API server does not answer.
        """
        key = (resource.plural, namespace, name)
        entry = self._entries.get(key)
        if entry is None:
            entry = self._entries[key] = _Entry(resource, namespace, name)
        entry.users.add(pod_uid)
        if not entry.loaded:
            if entry.loading is None or entry.loading.done():
                entry.loading = self._tasks.spawn(self._load(entry), f"load-{resource.plural}-{namespace}/{name}")
            await asyncio.shield(entry.loading)
        if entry.value is None:
            # Worded by kind, as upstream's watching cache does: events and states show this text.
            raise errors.StatusError(404, "NotFound", f'{resource.singular} "{name}" not found')
        return entry.value

    def has(self, plural: str, namespace: str, name: str) -> bool:
        """Whether the object is known to exist now."""
        entry = self._entries.get((plural, namespace, name))
        return entry is not None and entry.value is not None

    def release(self, pod_uid: str, keep: set[tuple[str, str, str]] | None = None) -> None:
        """Forget that this pod uses anything (but `keep`)."""
        for key, entry in list(self._entries.items()):
            if keep is not None and key in keep:
                continue
            entry.users.discard(pod_uid)
            if not entry.users:
                del self._entries[key]
                if entry.watching is not None:
                    entry.watching.cancel()

    async def _load(self, entry: _Entry) -> None:
        listed = await self._client.list(entry.resource, entry.namespace, field_selector=f"metadata.name={entry.name}")
        items = listed.get("items") or []
        entry.version = listed["metadata"].get("resourceVersion", "")
        self._store(entry, items[0] if items else None, announce=entry.loaded)
        if entry.watching is None and not (items and items[0].get("immutable")):
            name = f"watch-{entry.resource.plural}-{entry.namespace}/{entry.name}"
            entry.watching = self._tasks.spawn(self._watch(entry), name)

    def _store(self, entry: _Entry, value: Object | None, *, announce: bool) -> None:
        different = (value or {}).get("metadata", {}).get("resourceVersion") != (entry.value or {}).get("metadata", {}).get("resourceVersion")
        entry.value, entry.loaded = value, True
        if announce and different:
            self._changed(set(entry.users))

    async def _watch(self, entry: _Entry) -> None:
        delay = _RETRY_SECONDS
        while True:
            try:
                if not entry.version:
                    await self._load(entry)
                watch = self._client.watch(
                    entry.resource,
                    entry.namespace,
                    resource_version=entry.version,
                    field_selector=f"metadata.name={entry.name}",
                )
                async for kind, obj in watch:
                    delay = _RETRY_SECONDS
                    if kind == "ERROR":
                        entry.version = ""
                        break
                    entry.version = obj["metadata"].get("resourceVersion", entry.version)
                    if kind in ("ADDED", "MODIFIED"):
                        self._store(entry, obj, announce=True)
                    elif kind == "DELETED":
                        self._store(entry, None, announce=True)
            except errors.StatusError as e:
                entry.version = ""
                log.debug("watch of a referenced object ended", object=f"{entry.namespace}/{entry.name}", error=str(e))
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MAX_SECONDS)
            except UNREACHABLE as e:
                log.debug("watch of a referenced object broke", object=f"{entry.namespace}/{entry.name}", error=repr(e))
                await asyncio.sleep(delay)
                delay = min(delay * 2, _RETRY_MAX_SECONDS)
