"""Shared informers: a local, indexed copy of one resource, kept up by list and watch.

Controllers, scheduler, kubelet, proxy and DNS read from here instead of asking the server.
Invariants: handlers run after the store shows the event, in the order of events per object,
and never see an object that they or others may mutate: cached objects are read-only. A watch
that breaks resumes at the last resourceVersion; an expired one lists again and the difference
is handed out as events. Bound: one decoded object per stored object, less what `transform` drops.
Source: client-go tools/cache (reflector.go, shared_informer.go).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.config import CredentialError
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)

Handler = Callable[[Object], None]
UpdateHandler = Callable[[Object, Object], None]
IndexFunction = Callable[[Object], Iterable[str]]
Transform = Callable[[Object], Object]
Objects = list[Object]

# The server ends watches after about this long; resuming is cheap and balances API servers.
_WATCH_SECONDS = 480
# After so many events in one go other tasks get a turn.
_YIELD_EVENTS = 256


class Selector(Protocol):
    """What `list` needs of a label selector."""

    def matches(self, labels: Any, /) -> bool: ...


def _drop_managed_fields(obj: Object) -> Object:
    # managedFields often weigh more than the rest and no controller reads them.
    obj["metadata"].pop("managedFields", None)
    return obj


class Informer:
    """The copy of one resource (of one namespace, of one field selector). Make them with `Informers.get`."""

    def __init__(
        self,
        client: Client,
        resource: Resource,
        namespace: str | None,
        field_selector: str,
        label_selector: str,
        transform: Transform | None,
        relatives: list[Informer] | None = None,
    ) -> None:
        self.resource = resource
        self.namespace = namespace
        self.resource_version = ""
        """The last resourceVersion seen; "" before the first list."""
        self._client = client
        self._field_selector = field_selector
        self._label_selector = label_selector
        self._transform = transform or _drop_managed_fields
        self._relatives: list[Informer] = relatives if relatives is not None else []
        self._objects: dict[str, dict[str, Object]] = {}
        self._indexes: dict[str, tuple[IndexFunction, dict[str, dict[tuple[str, str], Object]]]] = {}
        self._added: list[Handler] = []
        self._updated: list[UpdateHandler] = []
        self._deleted: list[Handler] = []
        self._synced = asyncio.Event()

    # Reading

    @property
    def synced(self) -> bool:
        """Whether the first list has been handed out."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        await self._synced.wait()

    def __len__(self) -> int:
        return sum(len(objects) for objects in self._objects.values())

    def get(self, namespace: str | None, name: str) -> Object | None:
        """Give the cached object, not to be mutated, or None. Namespace is None or "" for cluster-scoped ones."""
        objects = self._objects.get(namespace or "")
        return objects.get(name) if objects is not None else None

    def get_key(self, key: str) -> Object | None:
        """The same by "namespace/name" or "name"."""
        namespace, _, name = key.rpartition("/")
        return self.get(namespace, name)

    def list(self, namespace: str | None = None, selector: Selector | None = None) -> Objects:
        """Give the cached objects (of one namespace, of one label selector), not to be mutated."""
        if namespace:
            result = list(self._objects.get(namespace, {}).values())
        elif len(self._objects) == 1:
            result = list(next(iter(self._objects.values())).values())
        else:
            result = [obj for objects in self._objects.values() for obj in objects.values()]
        if selector is not None:
            matches = selector.matches
            result = [obj for obj in result if matches(obj["metadata"].get("labels") or {})]
        return result

    def __iter__(self) -> Iterator[Object]:
        return iter(self.list())

    def add_index(self, name: str, function: IndexFunction) -> None:
        """Keep objects findable by the strings that the function gives; the same name again changes nothing."""
        if name in self._indexes:
            return
        values: dict[str, dict[tuple[str, str], Object]] = {}
        self._indexes[name] = (function, values)
        for namespace, objects in self._objects.items():
            for key, obj in objects.items():
                for value in function(obj):
                    values.setdefault(value, {})[namespace, key] = obj

    def by_index(self, index: str, value: str) -> Objects:
        """Give the cached objects with that value in the index."""
        found = self._indexes[index][1].get(value)
        return list(found.values()) if found else []

    def add_handler(
        self, on_add: Handler | None = None, on_update: UpdateHandler | None = None, on_delete: Handler | None = None
    ) -> None:
        """Call plain functions per event. What is cached already is handed to `on_add` at once."""
        if on_add is not None:
            self._added.append(on_add)
            for obj in self.list():
                self._call(on_add, obj)
        if on_update is not None:
            self._updated.append(on_update)
        if on_delete is not None:
            self._deleted.append(on_delete)

    # Keeping up

    def leave_family(self) -> None:
        """Neither take objects of relatives any more, nor give them any: what is no longer kept up is not kept alive."""
        if self in self._relatives:
            self._relatives.remove(self)
        self._relatives = []

    def _call(self, handler: Callable[..., None], *objects: Object) -> None:
        try:
            handler(*objects)
        except Exception as error:
            # One component's fault must not stop the copy that others share.
            log.error("informer handler failed", resource=self.resource.plural, error=repr(error), exc_info=error)

    def _kept(self, obj: Object) -> Object:
        """Give what to keep of an object from the server: what a relative keeps of this very version, if one does."""
        meta = obj["metadata"]
        for other in self._relatives:
            known = other.get(meta.get("namespace"), meta["name"]) if other is not self else None
            if known is not None:
                theirs = known["metadata"]
                if theirs.get("resourceVersion") == meta.get("resourceVersion") and theirs.get("uid") == meta.get("uid"):
                    return known
        return self._transform(obj)

    def _store(self, obj: Object) -> None:
        obj = self._kept(obj)
        meta = obj["metadata"]
        namespace, name = meta.get("namespace", ""), meta["name"]
        objects = self._objects.get(namespace)
        if objects is None:
            objects = self._objects[namespace] = {}
        old = objects.get(name)
        objects[name] = obj
        for function, values in self._indexes.values():
            _reindex(function, values, (namespace, name), old, obj)
        if old is None:
            for handler in self._added:
                self._call(handler, obj)
        elif old["metadata"].get("uid") != meta.get("uid"):
            # Deleted and made again while we were not looking: both have to be seen.
            for handler in self._deleted:
                self._call(handler, old)
            for handler in self._added:
                self._call(handler, obj)
        else:
            for update in self._updated:
                self._call(update, old, obj)

    def _remove(self, namespace: str, name: str, final: Object | None) -> None:
        objects = self._objects.get(namespace)
        old = objects.pop(name, None) if objects is not None else None
        if objects is not None and not objects:
            del self._objects[namespace]
        if old is None:
            return
        for function, values in self._indexes.values():
            _reindex(function, values, (namespace, name), old, None)
        if final is None or final["metadata"].get("uid") != old["metadata"].get("uid"):
            final = old
        for handler in self._deleted:
            self._call(handler, final)

    async def _list(self) -> None:
        # "0" answers from any cache; later lists must not fall behind what was seen before.
        version = self.resource_version or "0"
        answer = await self._list_pages(version)
        items = answer.get("items") or []
        kind, api_version = self.resource.kind, self.resource.api_version
        seen: set[tuple[str, str]] = set()
        for count, obj in enumerate(items):
            obj.setdefault("kind", kind)
            obj.setdefault("apiVersion", api_version)
            meta = obj["metadata"]
            seen.add((meta.get("namespace", ""), meta["name"]))
            self._store_listed(obj)
            if count % 1000 == 999:
                await asyncio.sleep(0)
        gone = [(namespace, name) for namespace, objects in self._objects.items() for name in objects if (namespace, name) not in seen]
        for namespace, name in gone:
            self._remove(namespace, name, None)
        self.resource_version = answer["metadata"].get("resourceVersion", "")
        self._synced.set()

    async def _list_pages(self, version: str) -> Object:
        try:
            return await self._client.list(
                self.resource, self.namespace, resource_version=version, field_selector=self._field_selector, label_selector=self._label_selector
            )
        except StatusError as error:
            if not errors.is_expired(error) and error.reason not in ("Timeout", "Gone"):
                raise
            return await self._client.list(
                self.resource, self.namespace, resource_version="", field_selector=self._field_selector, label_selector=self._label_selector
            )

    def _store_listed(self, obj: Object) -> None:
        meta = obj["metadata"]
        old = self.get(meta.get("namespace"), meta["name"])
        if old is not None and old["metadata"].get("resourceVersion") == meta.get("resourceVersion"):
            return
        self._store(obj)

    async def _watch(self) -> None:
        count = 0
        async for kind, obj in self._client.watch(
            self.resource,
            self.namespace,
            resource_version=self.resource_version,
            field_selector=self._field_selector,
            label_selector=self._label_selector,
            timeout_seconds=_WATCH_SECONDS,
        ):
            meta = obj["metadata"]
            version = meta.get("resourceVersion", "")
            if kind == "ADDED" or kind == "MODIFIED":
                self._store(obj)
            elif kind == "DELETED":
                self._remove(meta.get("namespace", ""), meta["name"], self._transform(obj))
            if version:
                self.resource_version = version
            count += 1
            if count % _YIELD_EVENTS == 0:
                await asyncio.sleep(0)

    async def _run(self) -> None:
        """List, then watch for ever."""
        backoff = Backoff(0.1, 30.0, 2.0, 120.0, jitter=0.2)
        listed = False
        while True:
            try:
                if not listed:
                    await self._list()
                    listed = True
                    backoff.reset()
                started = asyncio.get_running_loop().time()
                await self._watch()
                if asyncio.get_running_loop().time() - started < 1.0:
                    await backoff.sleep()
            except StatusError as error:
                if errors.is_expired(error) or error.code == 410:
                    listed = False
                    log.debug("watch expired, listing again", resource=self.resource.plural)
                    continue
                delay = backoff.next_seconds()
                level = log.warning if delay > 1 else log.debug
                level("list or watch was refused, will retry", resource=self.resource.plural, delay_seconds=delay, error=error)
                await asyncio.sleep(delay)
            except (HTTPError, OSError, CredentialError, ValueError) as error:
                delay = backoff.next_seconds()
                log.debug("list or watch broke, will retry", resource=self.resource.plural, delay_seconds=delay, error=repr(error))
                await asyncio.sleep(delay)


def _reindex(
    function: IndexFunction, values: dict[str, dict[tuple[str, str], Object]], key: tuple[str, str], old: Object | None, new: Object | None
) -> None:
    now = tuple(function(new)) if new is not None else ()
    if old is not None:
        for value in function(old):
            if value not in now and (entries := values.get(value)) is not None:
                entries.pop(key, None)
                if not entries:
                    del values[value]
    if new is not None:
        for value in now:
            entries = values.get(value)
            if entries is None:
                entries = values[value] = {}
            entries[key] = new


class Family:
    """Informers of several clients in one process, that keep equal objects once.

    Those of one resource with one transform, whatever their selectors, look into each other's stores: the controllers and the
    scheduler would otherwise each keep all pods.
    """

    def __init__(self) -> None:
        self._members: dict[tuple[str, str, str, Transform], list[Informer]] = {}

    def relatives(self, resource: Resource, transform: Transform) -> list[Informer]:
        """Give the list that informers of a resource and a transform have in common."""
        return self._members.setdefault((resource.group, resource.version, resource.plural, transform), [])


class Informers:
    """The shared informers of one process: the same question is asked of the server once.

    Args:
      family: with whose informers objects are shared.
    """

    def __init__(self, client: Client, family: Family | None = None) -> None:
        self.client = client
        self._family = family
        self._informers: dict[tuple[str, str, str, str | None, str, str, Transform | None], Informer] = {}
        self._tasks = Tasks()
        self._running: dict[int, asyncio.Task[None]] = {}
        self._started = False

    def get(
        self,
        resource: Resource,
        namespace: str | None = None,
        field_selector: str = "",
        transform: Transform | None = None,
        *,
        label_selector: str = "",
    ) -> Informer:
        """Give the informer of a resource, making it on the first call; `start` again starts new ones.

        Args:
          transform: drops what is not needed from a fresh object, in place or as a new one. The same
            function object shares one informer. None drops managedFields only.
        """
        key = (resource.group, resource.version, resource.plural, namespace, field_selector, label_selector, transform)
        informer = self._informers.get(key)
        if informer is None:
            relatives = self._family.relatives(resource, transform) if self._family is not None and transform is not None else []
            informer = Informer(self.client, resource, namespace, field_selector, label_selector, transform, relatives)
            relatives.append(informer)
            self._informers[key] = informer
        return informer

    async def start(self) -> None:
        """Start all informers that are not running yet."""
        self._started = True
        for informer in list(self._informers.values()):
            if id(informer) not in self._running:
                name = f"informer-{informer.resource.plural}"
                self._running[id(informer)] = self._tasks.spawn_eternal(informer._run(), name)

    async def stop_informer(self, informer: Informer) -> None:
        """Stop and forget one informer, e.g. of a resource that is no longer served."""
        self._informers = {key: value for key, value in self._informers.items() if value is not informer}
        informer.leave_family()
        task = self._running.pop(id(informer), None)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])

    async def wait_synced(self) -> None:
        """Wait until every informer known now has handed out its first list."""
        for informer in list(self._informers.values()):
            await informer.wait_synced()

    async def close(self) -> None:
        """Stop all informers; their stores stay readable."""
        await self._tasks.close()
        self._running.clear()
        for informer in self._informers.values():
            informer.leave_family()
