"""All stored resources of one API server: one subscription to the revision store, one cache per resource.

Owner: APIServer. Loads everything at start (subscribe first, scan second, drop what the scan already showed), then
feeds each cache the events under its prefix. Custom resources add a cache while the server runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.apiserver.activity import Activity
from knarr.apiserver.cache import FieldsFunction, ResourceCache
from knarr.apiserver.metrics import family
from knarr.storage.errors import CompactedError, UnavailableError
from knarr.storage.protocol import Event, RevisionStore

log = get_logger(__name__)

REPLAYED_EVENTS = 10_000
"""How many of the newest revisions a fresh process takes into its watch history."""


class Storage:
    """The caches by store prefix ("/registry/<group>/<plural>/")."""

    def __init__(self, store: RevisionStore) -> None:
        self.store = store
        self.caches: dict[str, ResourceCache] = {}
        self.activity = Activity()
        self._loading: list[Event] | None = []
        self._loading_caches: dict[str, list[Event]] = {}
        self._unsubscribe: Any = None

    @property
    def revision(self) -> int:
        """The newest revision that every cache has seen."""
        return self.store.revision

    @property
    def shared(self) -> bool:
        """Whether other servers write to the same store."""
        return self.store.shared

    async def catch_up(self) -> None:
        """Wait until the caches show all that was stored before this call, by whomever. Raises StatusError."""
        try:
            await self.store.catch_up()
        except UnavailableError as error:
            raise errors.internal(str(error)) from error

    def add(self, prefix: str, field_names: tuple[str, ...] = (), fields: FieldsFunction | None = None, trigger: str = "") -> ResourceCache:
        """Return the cache of a prefix, made at first; before `start` it is filled then, later by `load`."""
        cache = self.caches.get(prefix)
        if cache is None:
            cache = self.caches[prefix] = ResourceCache(prefix, field_names, fields)
            if trigger:
                cache.trigger = cache.field_index[trigger]
        return cache

    def metrics(self) -> list[str]:
        """Return lines of the exposition format: what is stored, and how far each cache has come."""
        stored: list[tuple[str, float]] = []
        objects: list[tuple[str, float]] = []
        sizes: list[tuple[str, float]] = []
        revisions: list[tuple[str, float]] = []
        for prefix, cache in self.caches.items():
            group, plural = prefix.removeprefix("/registry/").strip("/").split("/", 1)
            group = "" if group == "core" else group
            labels = f'group="{group}",resource="{plural}"'
            stored.append((f'resource="{plural}.{group}"' if group else f'resource="{plural}"', len(cache.objects)))
            objects.append((labels, len(cache.objects)))
            sizes.append((labels, cache.bytes))
            revisions.append((labels, cache.revision))
        return [
            *family("apiserver_storage_objects", "gauge",
                    "[STABLE] (Deprecated since 1.34.0) [DEPRECATED, consider using apiserver_resource_objects instead] Number of stored objects "
                    "at the time of last check split by kind. In case of a fetching error, the value will be -1.", stored),
            *family("apiserver_storage_size_bytes", "gauge", "[STABLE] Size of the storage database file physically allocated in bytes.",
                    [('storage_cluster_id="etcd-0"', self.store.size_bytes)]),
            *family("apiserver_resource_objects", "gauge",
                    "[ALPHA] Number of stored objects at the time of last check split by kind. In case of a fetching error, the value will be -1.", objects),
            *family("apiserver_resource_size_estimate_bytes", "gauge",
                    "[ALPHA] Estimated size of stored objects in database. Estimate is based on sum of last observed sizes of serialized objects.", sizes),
            *family("apiserver_watch_cache_resource_version", "gauge",
                    "[ALPHA] Current resource version of watch cache broken by resource type.", revisions),
        ]  # fmt: skip

    async def start(self) -> None:
        """Open the store and fill the caches with what it holds."""
        await self.store.start()
        self._unsubscribe = self.store.subscribe(self._on_events)
        revision = await self._load_recent()
        missed, self._loading = self._loading or [], None
        self._dispatch([event for event in missed if event.revision > revision])

    async def _load_recent(self) -> int:
        """Fill the caches with the state of a little while ago and replay what came since; returns the revision reached.

        So watchers that resume after a restart of this process find their events, instead of having to list again. Not where others
        write too: there a revision need not be one of ours, so nothing tells when the last has been replayed; and watchers turn to
        another server meanwhile.
        """
        revision = self.store.revision
        base = revision if self.shared else max(self.store.compacted, revision - REPLAYED_EVENTS)
        recent: list[Event] = []
        try:
            items = (await self.store.scan("/registry/", at=base)).items if base else ()
            if base < revision:
                recent = await self._recent(base, revision)
        except CompactedError:
            base, items = revision, (await self.store.scan("/registry/")).items
        by_prefix: dict[str, list[tuple[str, bytes, int]]] = {}
        for key, value, at in items:
            prefix, rest = _split(key)
            by_prefix.setdefault(prefix, []).append((rest, value, at))
        for prefix, cache in self.caches.items():
            cache.load(by_prefix.get(prefix, []), base)
        self._dispatch(recent)
        return revision

    async def _recent(self, since: int, until: int) -> list[Event]:
        """Return what was stored behind one revision up to another. Raises CompactedError."""
        found: list[Event] = []
        async with self.store.watch("/registry/", since=since) as stream:
            async for batch in stream:
                found += [event for event in batch if event.revision <= until]
                if batch[-1].revision >= until:
                    break
        return found

    async def add_loaded(self, prefix: str, field_names: tuple[str, ...], fields: FieldsFunction | None) -> ResourceCache:
        """Return the cache of a prefix that appears while the server runs, filled from the store."""
        cache = self.caches.get(prefix)
        if cache is not None:
            return cache
        cache = ResourceCache(prefix, field_names, fields)
        missed = self._loading_caches.setdefault(prefix, [])
        page = await self.store.scan(prefix)
        if prefix in self.caches:
            return self.caches[prefix]
        cache.load([(item.key[len(prefix):], item.value, item.revision) for item in page.items], page.revision)
        self.caches[prefix] = cache
        self._loading_caches.pop(prefix, None)
        cache.publish([(e.key[len(prefix):], e.value, e.revision) for e in missed if e.revision > page.revision])
        return cache

    def drop(self, prefix: str) -> None:
        """Forget a cache (its custom resource is gone); its watchers are closed by the caller."""
        self.caches.pop(prefix, None)

    def _on_events(self, events: Sequence[Event]) -> None:
        if self._loading is not None:
            self._loading.extend(events)
            return
        try:
            self._dispatch(events)
        except Exception as error:
            # The store must not be told: the write is durable. But a cache that failed to take it is wrong from now on.
            log.error("publishing failed", exc_info=error)

    def _dispatch(self, events: Sequence[Event]) -> None:
        if len(events) == 1:
            event = events[0]
            prefix, rest = _split(event.key)
            cache = self.caches.get(prefix)
            if cache is not None:
                cache.publish([(rest, event.value, event.revision)])
            elif prefix in self._loading_caches:
                self._loading_caches[prefix].append(event)
            return
        by_prefix: dict[str, list[tuple[str, bytes | None, int]]] = {}
        for event in events:
            prefix, rest = _split(event.key)
            if prefix in self._loading_caches:
                self._loading_caches[prefix].append(event)
            by_prefix.setdefault(prefix, []).append((rest, event.value, event.revision))
        for prefix, changes in by_prefix.items():
            cache = self.caches.get(prefix)
            if cache is not None:
                cache.publish(changes)

    async def close(self) -> None:
        if self._unsubscribe is not None:
            self._unsubscribe()
        await self.store.close()


def _split(key: str) -> tuple[str, str]:
    """("/registry/core/pods/", "default/web-1") of "/registry/core/pods/default/web-1"."""
    end = key.index("/", key.index("/", 10) + 1) + 1
    return key[:end], key[end:]
