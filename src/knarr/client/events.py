"""Recording events without ever waiting for them.

Callers: kubelet and controllers (core/v1 Event), scheduler (events.k8s.io/v1). `event()` only
notes the event; one task sends. Bound: a thousand unsent events, more are dropped and logged.
Equal events become one with a count, similar ones are combined, and a source that floods one
object is cut off, each as upstream does.
Source: client-go tools/record (event.go, events_cache.go), tools/events (event_broadcaster.go).
"""

from __future__ import annotations

import asyncio
import socket
from collections import OrderedDict, deque
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.ratelimit import RateLimit
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import EVENTS, EVENTS_V1
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)

_CACHE_ENTRIES = 4096
_UNSENT_EVENTS = 1000
# Events of one object go through one lane, in order; lanes send at the same time.
_LANES = 8
_SPAM_BURST = 25
_SPAM_PER_SECOND = 1 / 300
_AGGREGATE_EVENTS = 10
_AGGREGATE_SECONDS = 600.0
_SERIES_SECONDS = 360.0
_TRIES = 12
_RETRY_SECONDS = 10.0
_MESSAGE_CHARACTERS = 1024
_FORGET = "forget"  # stands in a lane for the end of an object

_last_name = 0  # nanoseconds in the name of the newest event of this process


class _About:
    """What must be known of the events told about one object: by hashes of their keys, whose many texts would be most of the memory."""

    __slots__ = ("limits", "similar", "told")

    def __init__(self) -> None:
        self.limits: dict[int, RateLimit] = {}
        self.similar: dict[int, tuple[float, tuple[int, ...]]] = {}
        """When the last of a kind was told, and the hashes of its messages."""
        self.told: dict[int, _Told] = {}

    def __len__(self) -> int:
        return len(self.told)


class _Told:
    """One event that exists, and how often it happened."""

    __slots__ = ("count", "first", "name", "seen", "written")

    def __init__(self, name: str, count: int = 1, first: str = "", now: float = 0.0) -> None:
        self.name, self.count, self.first = name, count, first
        self.seen = self.written = now


class _Memory:
    """The objects that events were told about most recently, at most _CACHE_ENTRIES events in all."""

    __slots__ = ("_objects", "_size")

    def __init__(self) -> None:
        self._objects: OrderedDict[int, _About] = OrderedDict()
        self._size = 0

    def __len__(self) -> int:
        """How many events."""
        return self._size

    def about(self, reference: Object) -> _About:
        number = _identity(reference)
        about = self._objects.get(number)
        if about is None:
            about = self._objects[number] = _About()
        else:
            self._objects.move_to_end(number)
        return about

    def tell(self, reference: Object, key: int, told: _Told) -> None:
        about = self.about(reference)  # again: it may have been dropped while the event was sent
        self._size += key not in about.told
        about.told[key] = told
        while self._size > _CACHE_ENTRIES and len(self._objects) > 1:
            self._size -= len(self._objects.popitem(last=False)[1])

    def forget(self, reference: Object) -> None:
        gone = self._objects.pop(_identity(reference), None)
        if gone is not None:
            self._size -= len(gone)


def _identity(reference: Object) -> int:
    return hash(tuple(reference.get(name) or "" for name in ("kind", "namespace", "name", "uid", "apiVersion")))


def object_reference(obj: Object, field_path: str = "") -> Object:
    """Make the reference that an event holds of an object (or of another reference)."""
    if "metadata" not in obj:
        reference = dict(obj)
    else:
        meta = obj["metadata"]
        reference = {"kind": obj.get("kind", ""), "apiVersion": obj.get("apiVersion", ""), "name": meta.get("name", "")}
        for source, target in (("namespace", "namespace"), ("uid", "uid"), ("resourceVersion", "resourceVersion")):
            if meta.get(source):
                reference[target] = meta[source]
    if field_path:
        reference["fieldPath"] = field_path
    return reference


class EventRecorder:
    """Records events of one component.

    Args:
      component: upstream's component name, e.g. "deployment-controller".
      host: the node, for kubelet and proxy.
      api: "v1" for core events, "events.k8s.io/v1" for the scheduler's kind.
    """

    def __init__(self, client: Client, component: str, host: str = "", *, api: str = "v1") -> None:
        self._client = client
        self._component = component
        self._host = host
        self._new_api = api == "events.k8s.io/v1"
        self._tasks = Tasks()
        self._lanes: list[deque[Object]] = [deque() for _ in range(_LANES)]
        self._senders: list[asyncio.Task[None] | None] = [None] * _LANES
        self._memory = _Memory()
        self._dropped = 0
        self._closed = False

    def event(
        self,
        obj: Object,
        type: str,
        reason: str,
        message: str,
        field_path: str = "",
        related: Object | None = None,
        action: str = "",
        *,
        annotations: dict[str, str] | None = None,
    ) -> None:
        """Note an event about an object; never blocks, never raises.

        Args:
          type: "Normal" or "Warning".
          field_path: the part of the object, e.g. "spec.containers{web}".
          related, action: only events.k8s.io/v1 carries them always.
        """
        if self._closed:
            return
        if self._new_api:
            event = self._make_new(obj, type, reason, message, field_path, related, action)
        else:
            event = self._make_core(obj, type, reason, message, field_path, related, action)
        if annotations:
            event["metadata"]["annotations"] = annotations
        if sum(map(len, self._lanes)) >= _UNSENT_EVENTS:
            self._dropped += 1
            if self._dropped.bit_count() == 1:  # 1, 2, 4, 8 …: a flood of events must not become a flood of lines
                log.warning("events dropped, too many unsent", reason=reason, dropped=self._dropped)
            return
        self._enqueue(event, event.get("involvedObject") or event.get("regarding") or {})

    def forget(self, obj: Object) -> None:
        """An object is gone for good: what is remembered of its events goes with it, once they are sent."""
        if not self._closed:
            reference = object_reference(obj)
            self._enqueue({_FORGET: reference}, reference)

    def _enqueue(self, event: Object, reference: Object) -> None:
        number = hash((reference.get("uid"), reference.get("name"))) % _LANES
        self._lanes[number].append(event)
        sender = self._senders[number]
        if sender is None or sender.done():
            self._senders[number] = self._tasks.spawn(self._send_all(self._lanes[number]), f"events-{self._component}")

    def _meta(self, reference: Object, now: float) -> Object:
        global _last_name
        # Two events of one moment have two names.
        _last_name = max(int(now * 1e9), _last_name + 1)
        return {"name": f"{reference.get('name', '')}.{_last_name:x}", "namespace": reference.get("namespace") or "default"}

    def _make_core(
        self, obj: Object, type: str, reason: str, message: str, field_path: str, related: Object | None, action: str
    ) -> Object:
        now = clock.now()
        reference = object_reference(obj, field_path)
        stamp = clock.rfc3339(now)
        source = {"component": self._component, **({"host": self._host} if self._host else {})}
        event: Object = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": self._meta(reference, now),
            "involvedObject": reference,
            "reason": reason,
            "message": message,
            "source": source,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
            "type": type,
            "eventTime": None,
            "reportingComponent": self._component,
            "reportingInstance": self._host,
        }
        if related is not None:
            event["related"] = object_reference(related)
        if action:
            event["action"] = action
        return event

    def _make_new(
        self, obj: Object, type: str, reason: str, message: str, field_path: str, related: Object | None, action: str
    ) -> Object:
        now = clock.now()
        reference = object_reference(obj, field_path)
        event: Object = {
            "apiVersion": "events.k8s.io/v1",
            "kind": "Event",
            "metadata": self._meta(reference, now),
            "eventTime": clock.micro(now),
            "reportingController": self._component,
            "reportingInstance": f"{self._component}-{self._host or socket.gethostname()}",
            "action": action,
            "reason": reason,
            "regarding": reference,
            "note": message[:_MESSAGE_CHARACTERS],
            "type": type,
        }
        if related is not None:
            event["related"] = object_reference(related)
        return event

    async def flush(self) -> None:
        """Wait until all noted events were sent or given up."""
        await self._tasks.wait_idle()

    async def close(self) -> None:
        """Send nothing more; unsent events are lost."""
        self._closed = True
        await self._tasks.close()

    # Sending

    async def _send_all(self, lane: deque[Object]) -> None:
        # The task ends when nothing is left, so an idle recorder costs nothing.
        while lane:
            event = lane.popleft()
            if _FORGET in event:
                self._memory.forget(event[_FORGET])
            elif self._new_api:
                await self._send_new(event)
            else:
                await self._send_core(event)

    async def _send_core(self, event: Object) -> None:
        reference, source = event["involvedObject"], event["source"]
        about = self._memory.about(reference)
        who = (source["component"], source.get("host", ""))
        spam_key = hash((*who, event["type"]))
        limit = about.limits.get(spam_key)
        if limit is None:
            limit = about.limits[spam_key] = RateLimit(_SPAM_PER_SECOND, _SPAM_BURST)
        if not limit.try_take():
            return
        event, key = self._aggregate(about, event, (*who, event["type"], event["reason"]), reference.get("fieldPath", ""))
        known = about.told.get(key)
        if known is not None:
            event["count"] = known.count + 1
            event["firstTimestamp"] = known.first
            event["metadata"]["name"] = known.name
        sent = await self._deliver(event, known is not None) or event
        self._memory.tell(reference, key, _Told(sent["metadata"]["name"], sent["count"], sent["firstTimestamp"]))

    def _aggregate(self, about: _About, event: Object, kind: tuple[str, ...], field_path: str) -> tuple[Object, int]:
        # The field path is no part of upstream's aggregate key, only of the exact one.
        aggregate_key = hash(kind)
        now = clock.now()
        last, messages = about.similar.get(aggregate_key, (now, ()))
        message = hash(event["message"])
        if now - last > _AGGREGATE_SECONDS:
            messages = ()
        if message not in messages:
            messages = (*messages, message)
        if len(messages) < _AGGREGATE_EVENTS:
            about.similar[aggregate_key] = (now, messages)
            return event, hash((kind, field_path, event["message"]))
        about.similar[aggregate_key] = (now, messages[1:])
        combined = dict(event)
        combined["message"] = "(combined from similar events): " + event["message"]
        return combined, aggregate_key

    async def _deliver(self, event: Object, exists: bool) -> Object | None:
        namespace, name = event["metadata"]["namespace"], event["metadata"]["name"]
        for _ in range(_TRIES):
            try:
                if exists:
                    patch = {field: event[field] for field in ("count", "lastTimestamp", "message")}
                    return await self._client.patch(EVENTS, name, namespace, patch, type="strategic")
                return await self._client.create(EVENTS, event, namespace)
            except StatusError as error:
                if exists and errors.is_not_found(error):
                    # Events expire; the series goes on under a new name.
                    exists = False
                    event["metadata"] = self._meta(event["involvedObject"], clock.now())
                    name = event["metadata"]["name"]
                    continue
                if errors.is_already_exists(error):
                    return None
                level = log.debug if error.code in (403, 404) else log.warning
                level("event rejected, will not retry", event=f"{namespace}/{name}", reason=event["reason"], error=error)
                return None
            except (HTTPError, OSError):
                await asyncio.sleep(_RETRY_SECONDS)
        log.warning("event given up", event=f"{namespace}/{name}", reason=event["reason"])
        return None

    async def _send_new(self, event: Object) -> None:
        reference = event["regarding"]
        about = self._memory.about(reference)
        related = event.get("related") or {}
        parts = (event["type"], event["action"], event["reason"], event["reportingController"], event["reportingInstance"])
        key = hash((*parts, *reference.values(), *related.values()))
        known = about.told.get(key)
        if known is not None and clock.now() - known.seen < _SERIES_SECONDS:
            await self._continue_series(known, event)
            return
        meta = event["metadata"]
        self._memory.tell(reference, key, _Told(meta["name"], now=clock.now()))
        await self._try(lambda: self._client.create(EVENTS_V1, event, meta["namespace"]), event)

    async def _continue_series(self, known: _Told, event: Object) -> None:
        known.count += 1
        known.seen = clock.now()
        # The second occurrence is written at once, later ones with the refresh interval of upstream.
        if known.count > 2 and known.seen - known.written < _SERIES_SECONDS / 2:
            return
        known.written = known.seen
        series = {"count": known.count, "lastObservedTime": event["eventTime"]}
        namespace = event["metadata"]["namespace"]
        await self._try(lambda: self._client.patch(EVENTS_V1, known.name, namespace, {"series": series}, type="strategic"), event)

    async def _try(self, send: Any, event: Object) -> None:
        for _ in range(_TRIES):
            try:
                await send()
                return
            except StatusError as error:
                log.debug("event rejected, will not retry", reason=event["reason"], error=error)
                return
            except (HTTPError, OSError):
                await asyncio.sleep(_RETRY_SECONDS)
