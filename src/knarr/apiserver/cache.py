"""The watch cache of one stored resource: its objects as bytes, recent events, and who watches.

Owner: Storage (storage.py) makes one per resource and hands it every event of the revision store. Callers: the read
handlers (get, list, watch) and ResourceStore (writes, in-process readers).

Invariants:
- `publish` runs in the event loop's turn in which the store announces a commit, before the writer is answered. So
  whoever has an answer finds the write here, and a list at the store's revision needs no waiting.
- An object's bytes are encoded once. `item` is the stored value without kind and apiVersion, with the resourceVersion
  spliced in; GET, LIST and WATCH are made of it by concatenation. Reading decodes nothing.
- Other forms (protobuf, Table rows, another version) are made on first demand and kept beside the bytes in `forms`.
- CachedObject and Event are never changed after publication, apart from those memo slots.

Memory: the ring keeps events for RING_SECONDS, at most RING_EVENTS of them, as bytes; a watcher asking for older ones gets 410.
Objects are kept decoded, which takes five times the memory of their bytes, only up to MEMO_BYTES of those bytes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections import OrderedDict, deque
from collections.abc import Callable
from sys import intern
from time import monotonic
from typing import TYPE_CHECKING, Any

import orjson

from knarr.api.types import Object
from knarr.apiserver.activity import EventSizes

if TYPE_CHECKING:
    from knarr.apiserver.watching import WatchGroup

RING_EVENTS = 20_000
RING_MINIMUM = 200
RING_SECONDS = 75.0
MEMO_BYTES = 4 << 20
LABEL_SETS = 4096

ADDED = "ADDED"
MODIFIED = "MODIFIED"
DELETED = "DELETED"

_METADATA = b'"metadata":{'
_ITEM_HEAD = b'{"metadata":{"resourceVersion":"'
_NO_LABELS: dict[str, str] = {}

FieldsFunction = Callable[[Object], tuple[str, ...]]


class CachedObject:
    """One version of one object."""

    __slots__ = ("fields", "forms", "item", "key", "labels", "name", "namespace", "obj", "revision", "uid", "version")

    def __init__(
        self, key: str, item: bytes, revision: int, namespace: str, name: str, uid: str, labels: dict[str, str],
        fields: tuple[str, ...] | None,
    ) -> None:  # fmt: skip
        self.key = key
        """ "namespace/name" or "name"."""
        self.item = item
        """JSON beginning with the metadata and its resourceVersion; kind and apiVersion are left to the form."""
        self.revision = revision
        self.namespace = namespace
        self.name = name
        self.uid = uid
        self.labels = labels
        self.fields = fields
        """Values of the selectable fields, in the order of the resource's field names."""
        self.obj: Object | None = None
        self.forms: dict[Any, Any] | None = None
        self.version = ""
        """apiVersion as stored, where several are stored side by side (custom resources)."""

    def at_revision(self, revision: int) -> CachedObject:
        """Return the same object as if written at another revision: what a DELETED event carries."""
        made = CachedObject(self.key, item_at(self.item, revision), revision, self.namespace, self.name, self.uid, self.labels, self.fields)
        made.version = self.version
        return made


class Event:
    """One change. `current` is what the event shows (for DELETED the last state at the deletion's revision)."""

    __slots__ = ("current", "previous", "rendered", "revision", "time", "type")

    def __init__(self, type: str, revision: int, current: CachedObject, previous: CachedObject | None, time: float) -> None:
        self.type = type
        self.revision = revision
        self.current = current
        self.previous = previous
        self.time = time
        self.rendered: dict[Any, bytes] = {}
        """(form, type) -> the frame, shared by all watchers."""


def item_at(item: bytes, revision: int) -> bytes:
    """Return an item as if written at another revision."""
    return b"%b%d%b" % (_ITEM_HEAD, revision, item[item.index(b'"', len(_ITEM_HEAD)):])


def splice(value: bytes, revision: int) -> bytes:
    """Turn a stored value into an item: kind and apiVersion off, resourceVersion in."""
    start = value.index(_METADATA) + len(_METADATA)
    return b'%b%d",%b' % (_ITEM_HEAD, revision, value[start:])


class ResourceCache:
    """See the module's docstring."""

    def __init__(self, prefix: str, field_names: tuple[str, ...] = (), fields: FieldsFunction | None = None) -> None:
        self.prefix = prefix
        self.head = b"{"
        """What item lacks: `{"kind":…,"apiVersion":…,` of the stored version; set by the resource's store."""
        self.versioned = False
        """Objects may be stored under several apiVersions."""
        self.field_names = field_names
        self.field_index = {name: index for index, name in enumerate(field_names)}
        self._fields = fields
        self.objects: dict[str, CachedObject] = {}
        self.keys: list[str] = []
        """Sorted."""
        self.revision = 0
        """Revision of the newest event of this resource."""
        self.generation = 0
        self.ring: deque[Event] = deque()
        self.ring_start = 0
        """Every event after this revision is in the ring."""
        self.groups: dict[Any, WatchGroup] = {}
        self._by_scope: dict[str, list[WatchGroup]] = {}
        """Groups by what they can see: "" everything, "ns/" a namespace, a key, or "field\\0value"."""
        self.trigger = -1
        """Index of the field by which most watchers select (pods: spec.nodeName); -1 without."""
        self.handlers: tuple[Callable[[str, Object, Object | None], None], ...] = ()
        self.want_previous = 0
        """How many of them look at what was there before."""
        self.pending: dict[str, tuple[bytes, Object, object]] = {}
        """Key -> (value, decoded, form) of writes on their way: spares decoding what was just encoded here, and converting it to a form
        that it is in already (None: to none)."""
        self.bytes = 0
        self.published = self.lists = self.listed = 0
        """How many events came, how many lists were answered from here, how many objects those showed."""
        self.sent: dict[str, EventSizes] = {}
        """Version -> what its watchers were sent."""
        self._labels: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
        self._memo: OrderedDict[CachedObject, None] = OrderedDict()
        """Objects that are kept decoded, in the order in which they were."""
        self._memo_bytes = 0

    # -- filling ---------------------------------------------------------------------------------------------------------
    def make(self, key: str, value: bytes, revision: int, obj: Object | None = None) -> CachedObject:
        """Index a stored value. Only what selectors may ask for is taken out of it."""
        if obj is None:
            obj = orjson.loads(value)
        metadata = obj["metadata"]
        fields = tuple(map(intern, self._fields(obj))) if self._fields is not None else None
        made = CachedObject(
            key, splice(value, revision), revision, intern(metadata.get("namespace") or ""), metadata["name"], metadata.get("uid") or "",
            self._known_labels(metadata.get("labels")), fields,
        )  # fmt: skip
        if self.versioned:
            made.version = intern(obj["apiVersion"])
        return made

    def _known_labels(self, labels: dict[str, str] | None) -> dict[str, str]:
        """Return equal labels as one: those of a workload's pods would be a tenth of what the pods cost here."""
        if not labels:
            return _NO_LABELS
        key = tuple(labels.items())
        found = self._labels.get(key)
        if found is None:
            if len(self._labels) >= LABEL_SETS:
                self._labels.clear()
            found = self._labels[key] = labels
        return found

    def view_of(self, obj: Object) -> tuple[dict[str, str], tuple[str, ...] | None]:
        """Return what selectors may ask for of an object that is shown in another version than it is stored in."""
        return obj["metadata"].get("labels") or _NO_LABELS, self._fields(obj) if self._fields is not None else None

    def reindex(self, field_names: tuple[str, ...], fields: FieldsFunction | None) -> None:
        """Change the selectable fields; every object's are worked out anew."""
        self.field_names = field_names
        self.field_index = {name: index for index, name in enumerate(field_names)}
        self._fields = fields
        for cached in self.objects.values():
            cached.fields = fields(self.private(cached)) if fields is not None else None

    def load(self, items: list[tuple[str, bytes, int]], revision: int) -> None:
        """Take the state at a revision (key without the prefix, value, its revision), before any event."""
        for key, value, at in items:
            cached = self.make(key, value, at)
            self.objects[key] = cached
            self.bytes += len(cached.item)
        self.keys = sorted(self.objects)
        self.revision = max(self.revision, revision)
        self.ring_start = revision

    # -- events ----------------------------------------------------------------------------------------------------------
    def publish(self, changes: list[tuple[str, bytes | None, int]]) -> None:
        """Take a commit's changes (key, value or None, revision), in order, and hand them to all watchers."""
        now = monotonic()
        events: list[Event] = []
        for key, value, revision in changes:
            event = self._apply(key, value, revision, now)
            if event is not None:
                events.append(event)
        if not events:
            return
        self.revision = events[-1].revision
        self.generation += 1
        self.published += len(events)
        self.ring.extend(events)
        self.trim(now)
        if self.handlers:
            self._call_handlers(events)
        if self.groups:
            self._fan_out(events)
            for event in events:
                # Whoever resumes later has it rendered anew; thousands of frames would wait for that in vain.
                event.rendered.clear()

    def _apply(self, key: str, value: bytes | None, revision: int, now: float) -> Event | None:
        previous = self.objects.get(key)
        if value is None:
            if previous is None:
                return None
            del self.objects[key]
            index = bisect_left(self.keys, key)
            del self.keys[index]
            self.bytes -= len(previous.item)
            return Event(DELETED, revision, previous.at_revision(revision), previous, now)
        written = self.pending.get(key)
        if written is not None and written[0] is value:
            obj = written[1]
            current = self.make(key, value, revision, obj)
            if self.handlers and "kind" in obj and "apiVersion" in obj:
                # Handlers want it decoded; the writer has given its own away.
                obj["metadata"]["resourceVersion"] = str(revision)
                self._keep(current, obj)
            if written[2] is not None:
                current.forms = {written[2]: current.item}
        else:
            current = self.make(key, value, revision)
        self.objects[key] = current
        self.bytes += len(current.item)
        if previous is None:
            insort(self.keys, key)
            return Event(ADDED, revision, current, None, now)
        self.bytes -= len(previous.item)
        return Event(MODIFIED, revision, current, previous, now)

    def trim(self, now: float) -> None:
        """Forget events that are too old or too many; called with each commit, and from time to time where nothing is written any more."""
        ring = self.ring
        horizon = now - RING_SECONDS
        while len(ring) > RING_MINIMUM and (len(ring) > RING_EVENTS or ring[0].time < horizon):
            self.ring_start = ring.popleft().revision

    def _call_handlers(self, events: list[Event]) -> None:
        for event in events:
            obj = self.decoded(event.current)
            old = self.decoded(event.previous) if event.previous is not None and self.want_previous else None
            for handler in self.handlers:
                handler(event.type, obj, old)
            # The ring keeps what has passed for a while, as bytes; hardly anybody asks for it decoded again.
            previous = event.previous
            if previous is not None and previous in self._memo:
                del self._memo[previous]
                self._drop(previous)

    def _fan_out(self, events: list[Event]) -> None:
        """Give each group that can see something its events; a group renders once for all its watchers."""
        scopes = self._by_scope
        everywhere = scopes.get("", ())
        for group in list(everywhere):
            group.deliver(events)
        if len(scopes) == (1 if everywhere else 0):
            return
        chosen: dict[WatchGroup, list[Event]] = {}
        for event in events:
            current = event.current
            for scope in self._scopes_of(current, event.previous):
                for group in scopes.get(scope, ()):
                    chosen.setdefault(group, []).append(event)
        for group, seen in chosen.items():
            group.deliver(seen)

    def _scopes_of(self, current: CachedObject, previous: CachedObject | None) -> list[str]:
        out = [current.key]
        if current.namespace:
            out.append(current.namespace + "/")
        if self.trigger >= 0 and current.fields is not None:
            now = current.fields[self.trigger]
            out.append("\0" + now)
            if previous is not None and previous.fields is not None and previous.fields[self.trigger] != now:
                out.append("\0" + previous.fields[self.trigger])
        return out

    def add_group(self, group: WatchGroup, scope: str) -> None:
        self.groups[group.key] = group
        self._by_scope.setdefault(scope, []).append(group)

    def remove_group(self, group: WatchGroup, scope: str) -> None:
        self.groups.pop(group.key, None)
        peers = self._by_scope.get(scope)
        if peers and group in peers:
            peers.remove(group)
            if not peers:
                del self._by_scope[scope]

    def events_after(self, revision: int) -> list[Event] | None:
        """Return every event after a revision, None if some of them are no longer here."""
        if revision < self.ring_start:
            return None
        ring = self.ring
        if not ring or ring[-1].revision <= revision:
            return []
        out: list[Event] = []
        for event in reversed(ring):
            if event.revision <= revision:
                break
            out.append(event)
        out.reverse()
        return out

    def sent_in(self, version: str) -> EventSizes:
        """Return where is counted what watchers in a version are sent."""
        found = self.sent.get(version)
        if found is None:
            found = self.sent[version] = EventSizes()
        return found

    @property
    def capacity(self) -> int:
        """How many events the ring has room for now."""
        return max(RING_MINIMUM, len(self.ring))

    # -- reading ---------------------------------------------------------------------------------------------------------
    def decoded(self, cached: CachedObject) -> Object:
        """Return the object as a dict, kept for the next who asks; shared, never to be changed."""
        obj = cached.obj
        if obj is None:
            obj = self.private(cached)
            self._keep(cached, obj)
        return obj

    def _keep(self, cached: CachedObject, obj: Object) -> None:
        """Keep an object decoded, at the expense of those that have been for longest."""
        cached.obj = obj
        memo = self._memo
        memo[cached] = None
        self._memo_bytes += len(cached.item)
        while self._memo_bytes > MEMO_BYTES and len(memo) > 1:
            self._drop(memo.popitem(last=False)[0])

    def _drop(self, cached: CachedObject) -> None:
        """Keep an object, which is in the memo no more, as bytes alone."""
        cached.obj = None
        self._memo_bytes -= len(cached.item)

    def private(self, cached: CachedObject) -> Object:
        """Return the object as a dict of the caller's own, to be changed at will."""
        obj: Object = orjson.loads(self.head + cached.item[1:])
        if cached.version:
            obj["apiVersion"] = cached.version
        return obj

    def range(self, namespace: str, after: str = "") -> tuple[int, int]:
        """Return (start, end) in `keys` of a namespace ("" for all), behind the key `after`."""
        if namespace:
            # "0" is the character behind "/", so this is the first key of any later namespace.
            start, end = bisect_left(self.keys, namespace + "/"), bisect_left(self.keys, namespace + "0")
        else:
            start, end = 0, len(self.keys)
        if after:
            start = max(start, bisect_right(self.keys, after))
        return start, end

    def in_order(self, namespace: str = "") -> list[CachedObject]:
        """Return the objects of a namespace ("" for all) in key order."""
        objects = self.objects
        if not namespace:
            return [objects[key] for key in self.keys]
        start, end = self.range(namespace)
        return [objects[key] for key in self.keys[start:end]]
