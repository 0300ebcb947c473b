"""Reading and writing one stored resource: the cache in front, compare-and-swap on the revision store behind.

Callers: the verbs (with strategies and admission around it) and, through the Store Protocol of attributes.py, parts of the
API server that keep objects of their own (auth, admission, allocators, bootstrap). In-process writers skip admission and
validation: they are the server itself.

Invariants: stored bytes are `{"kind":…,"apiVersion":…,"metadata":{…},…}` without resourceVersion; a write that changes
nothing writes nothing and keeps its revision; after a won write the cache shows it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter

import orjson

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.encode import trimmed
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.cache import CachedObject, ResourceCache
from knarr.apiserver.storage import Storage
from knarr.storage.errors import UnavailableError

UPDATE_TRIES = 64


_RANDOM_BYTES = 4096
_random: list[str] = []
os.register_at_fork(after_in_child=_random.clear)


def new_uid() -> str:
    """Make a random UUID; the uuid module takes three times as long, and so does a system call for each."""
    if not _random:
        digits = os.urandom(_RANDOM_BYTES).hex()
        _random.extend(digits[start : start + 32] for start in range(0, 2 * _RANDOM_BYTES, 32))
    h = _random.pop()
    return f"{h[:8]}-{h[8:12]}-4{h[13:16]}-{'89ab'[int(h[16], 16) & 3]}{h[17:20]}-{h[20:]}"


def object_key(namespace: str, name: str) -> str:
    return f"{namespace}/{name}" if namespace else name


def encode(resource: Resource, obj: Object) -> bytes:
    """Encode for the store; takes the resourceVersion off the object."""
    obj["metadata"].pop("resourceVersion", None)
    kind, version = obj.get("kind"), obj.get("apiVersion")
    if kind and version:
        first, second, third, *_ = obj
        if third == "metadata" and first in _TYPE and second in _TYPE:
            return trimmed(orjson.dumps(obj))  # in order already, as most clients send it
    kind, version = kind or resource.kind, version or resource.storage_api_version
    rest = {key: value for key, value in obj.items() if key not in _HEAD_KEYS}
    return trimmed(orjson.dumps({"kind": kind, "apiVersion": version, "metadata": obj["metadata"], **rest}))


_HEAD_KEYS = frozenset({"kind", "apiVersion", "metadata"})
_TYPE = frozenset({"kind", "apiVersion"})


def same(old: Object, new: Object) -> bool:
    """Whether two objects are equal but for resourceVersion. Equality of Python's dicts takes 1 for True, so it only rules out."""
    a, b = old.get("metadata") or {}, new.get("metadata") or {}
    if any(old.get(key) != new.get(key) for key in old.keys() | new.keys() if key != "metadata"):
        return False
    if any(a.get(key) != b.get(key) for key in a.keys() | b.keys() if key != "resourceVersion"):
        return False
    sort = orjson.OPT_SORT_KEYS
    first = {**old, "metadata": {**a, "resourceVersion": ""}}
    second = {**new, "metadata": {**b, "resourceVersion": ""}}
    return orjson.dumps(first, option=sort) == orjson.dumps(second, option=sort)


class ResourceStore:
    """See the module's docstring."""

    def __init__(self, storage: Storage, cache: ResourceCache, resource: Resource, *, lease_seconds: int = 0) -> None:
        self.storage = storage
        self.cache = cache
        self.resource = resource
        """The resource in its stored version."""
        self.lease_seconds = lease_seconds
        cache.head = b'{"kind":%b,"apiVersion":%b,' % (orjson.dumps(resource.kind), orjson.dumps(resource.storage_api_version))

    # -- reading -----------------------------------------------------------------------------------------------------------
    def find(self, namespace: str, name: str) -> CachedObject | None:
        return self.cache.objects.get(f"{namespace}/{name}" if namespace else name)

    def get_nowait(self, namespace: str, name: str) -> Object | None:
        """Return the object, None if there is none. Shared: never change it."""
        cached = self.find(namespace, name)
        return self.cache.decoded(cached) if cached is not None else None

    def list_nowait(self, namespace: str | None = None) -> list[Object]:
        """Return the objects of a namespace (None or "" for all) in key order. Shared: never change them."""
        decoded = self.cache.decoded
        return [decoded(cached) for cached in self.cache.in_order(namespace or "")]

    @property
    def generation(self) -> int:
        return self.cache.generation

    def is_stale(self, cached: CachedObject) -> bool:
        """Whether an object is stored in another way than a write would store it now: in an older version, under an older key."""
        if cached.version and cached.version != self.resource.api_version:
            return True
        return self.storage.store.is_stale(self.cache.prefix + cached.key)

    def add_handler(self, handler: Callable[[str, Object, Object | None], None], *, previous: bool = True) -> Callable[[], None]:
        """Call handler(type, object, old) for every later event; returns the way to stop that."""
        cache = self.cache
        cache.handlers = (*cache.handlers, handler)
        cache.want_previous += previous

        def cancel() -> None:
            cache.want_previous -= previous
            cache.handlers = tuple(other for other in cache.handlers if other is not handler)

        return cancel

    def _stored(self, operation: str, seconds: float) -> None:
        self.storage.activity.stored(operation, self.resource.group, self.resource.plural).observe(seconds)

    def _not_stored(self, operation: str) -> None:
        self.storage.activity.not_stored(operation, self.resource.group, self.resource.plural)

    # -- raw writes --------------------------------------------------------------------------------------------------------
    async def put(self, key: str, obj: Object, expected: int, form: object = None) -> CachedObject | None:
        """Write an object (private, given away) if the key is at `expected`; None means the race was lost.

        Args:
          form: Id of a form that the stored bytes are in already.

        Raises:
          StatusError: the store cannot write now.
        """
        cache = self.cache
        value = encode(self.resource, obj)
        cache.pending[key] = (value, obj, form)
        begin = perf_counter()
        try:
            put = await self.storage.store.put(cache.prefix + key, value, expected=expected, lease_seconds=self.lease_seconds)
        except UnavailableError as error:
            self._not_stored("update" if expected else "create")
            raise errors.internal(str(error)) from error
        finally:
            written = cache.pending.get(key)
            if written is not None and written[0] is value:
                del cache.pending[key]
        self._stored("update" if expected else "create", perf_counter() - begin)
        if not put.won:
            return None
        cached = cache.objects.get(key)
        if cached is not None and cached.revision == put.revision:
            return cached
        # Someone wrote again in the same commit; the answer shows our own write.
        return cache.make(key, value, put.revision, obj)

    async def remove(self, cached: CachedObject) -> CachedObject | None:
        """Remove the object if it is still this version; returns it as of the deletion, None when the race was lost."""
        begin = perf_counter()
        try:
            put = await self.storage.store.remove(self.cache.prefix + cached.key, expected=cached.revision)
        except UnavailableError as error:
            self._not_stored("delete")
            raise errors.internal(str(error)) from error
        self._stored("delete", perf_counter() - begin)
        return cached.at_revision(put.revision) if put.won else None

    async def live(self, key: str) -> CachedObject | None:
        """Return the object to change: where other servers write too, as it is stored now."""
        return await self.refresh(key) if self.storage.shared else self.cache.objects.get(key)

    async def get_live(self, namespace: str, name: str) -> Object | None:
        """Like get_nowait, reading past the cache."""
        stored = await self.refresh(object_key(namespace, name))
        return self.cache.decoded(stored) if stored is not None else None

    async def refresh(self, key: str) -> CachedObject | None:
        """Read past the cache: after a lost race with another server the cache may be behind."""
        current = self.cache.objects.get(key)
        begin = perf_counter()
        stored = await self.storage.store.get(self.cache.prefix + key)
        self._stored("get", perf_counter() - begin)
        if stored is None:
            return None
        if current is not None and current.revision == stored.revision:
            return current
        return self.cache.make(key, stored.value, stored.revision)

    # -- in-process writers --------------------------------------------------------------------------------------------------
    async def create(self, obj: Object, *, dry_run: bool = False) -> Object:
        """Store a new object with uid and creationTimestamp filled in.

        Raises:
          StatusError: AlreadyExists.
        """
        metadata = obj["metadata"]
        metadata.setdefault("uid", new_uid())
        metadata.setdefault("creationTimestamp", clock.now_rfc3339())
        obj.setdefault("kind", self.resource.kind)
        obj.setdefault("apiVersion", self.resource.storage_api_version)
        key = object_key(metadata.get("namespace") or "", metadata["name"])
        if key in self.cache.objects:
            raise errors.already_exists(self.resource, metadata["name"])
        if dry_run:
            return obj
        cached = await self.put(key, obj, 0)
        if cached is None:
            raise errors.already_exists(self.resource, metadata["name"])
        return self.cache.private(cached)

    async def update(self, namespace: str, name: str, change: Callable[[Object], Object | None]) -> Object:
        """Compare and swap, retried: change gets a private copy and returns the new object, None for no change.

        Raises:
          StatusError: NotFound; Conflict after very many lost races.
        """
        key = object_key(namespace, name)
        cached = self.cache.objects.get(key)
        for attempt in range(UPDATE_TRIES):
            if cached is None and attempt == 0:
                cached = await self.refresh(key)
            if cached is None:
                raise errors.not_found(self.resource, name)
            new = change(self.cache.private(cached))
            if new is None or same(self.cache.decoded(cached), new):
                return self.cache.private(cached)
            written = await self.put(key, new, cached.revision)
            if written is not None:
                return self.cache.private(written)
            cached = await self.refresh(key)
        raise errors.conflict(self.resource, name, "the object has been modified; please apply your changes to the latest version and try again")

    async def change(self, namespace: str, name: str, change: Callable[[Object], Object]) -> None:
        """The same for a change that always is one, and whose result nobody asks for.

        Args:
          change: gets the shared object, of which it must copy what it changes and the metadata.

        Raises:
          StatusError: as update.
        """
        key = object_key(namespace, name)
        cached = self.cache.objects.get(key) or await self.refresh(key)
        for _ in range(UPDATE_TRIES):
            if cached is None:
                raise errors.not_found(self.resource, name)
            if await self.put(key, change(self.cache.decoded(cached)), cached.revision) is not None:
                return
            cached = await self.refresh(key)
        raise errors.conflict(self.resource, name, "the object has been modified; please apply your changes to the latest version and try again")

    async def delete(self, namespace: str, name: str, *, uid: str = "") -> None:
        """Remove an object at once, finalizers or not; absent is fine."""
        cached = self.cache.objects.get(object_key(namespace, name))
        while cached is not None and (not uid or cached.uid == uid):
            if await self.remove(cached) is not None:
                return
            cached = await self.refresh(cached.key)
