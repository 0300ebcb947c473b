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
from typing import Any, Generic, TypeVar

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

_last_name = 0  # nanoseconds in the name of the newest event of this process

V = TypeVar("V")


class _Recent(Generic[V]):
    """The most recently used entries. Kept by the 64 bit hash of their keys, whose many texts would be most of the memory."""

    __slots__ = ("_entries",)

    def __init__(self) -> None:
        self._entries: OrderedDict[int, V] = OrderedDict()

    def get(self, key: tuple[str, ...]) -> V | None:
        number = hash(key)
        value = self._entries.get(number)
        if value is not None:
            self._entries.move_to_end(number)
        return value

    def put(self, key: tuple[str, ...], value: V) -> None:
        number = hash(key)
        self._entries[number] = value
        self._entries.move_to_end(number)
        if len(self._entries) > _CACHE_ENTRIES:
            self._entries.popitem(last=False)

    def drop(self, key: tuple[str, ...]) -> None:
        self._entries.pop(hash(key), None)


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
        self._limits: _Recent[RateLimit] = _Recent()
        self._similar: _Recent[tuple[float, set[str]]] = _Recent()
        self._observed: _Recent[Object] = _Recent()
        """What must be known of events already told: thousands are kept, so never whole ones."""
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
        reference = event.get("involvedObject") or event.get("regarding") or {}
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
            if self._new_api:
                await self._send_new(event)
            else:
                await self._send_core(event)

    async def _send_core(self, event: Object) -> None:
        reference, source = event["involvedObject"], event["source"]
        about = tuple(str(reference.get(name, "")) for name in ("kind", "namespace", "name", "uid", "apiVersion"))
        who = (source["component"], source.get("host", ""))
        spam_key = (*who, *about, event["type"])
        limit = self._limits.get(spam_key)
        if limit is None:
            limit = RateLimit(_SPAM_PER_SECOND, _SPAM_BURST)
            self._limits.put(spam_key, limit)
        if not limit.try_take():
            return
        event, key = self._aggregate(event, (*who, *about, reference.get("fieldPath", ""), event["type"], event["reason"]))
        known = self._observed.get(key)
        if known is not None:
            event["count"] = known["count"] + 1
            event["firstTimestamp"] = known["firstTimestamp"]
            event["metadata"]["name"] = known["name"]
        sent = await self._deliver(event, known is not None) or event
        told = {"count": sent["count"], "firstTimestamp": sent["firstTimestamp"], "name": sent["metadata"]["name"]}
        self._observed.put(key, told)

    def _aggregate(self, event: Object, key: tuple[str, ...]) -> tuple[Object, tuple[str, ...]]:
        # The field path is no part of upstream's aggregate key, only of the exact one.
        aggregate_key = (*key[:7], *key[8:])
        now = clock.now()
        record = self._similar.get(aggregate_key)
        messages = record[1] if record is not None and now - record[0] <= _AGGREGATE_SECONDS else set()
        messages.add(event["message"])
        self._similar.put(aggregate_key, (now, messages))
        if len(messages) < _AGGREGATE_EVENTS:
            return event, (*key, event["message"])
        messages.pop()
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
        parts: tuple[Any, ...] = (event["type"], event["action"], event["reason"], event["reportingController"], event["reportingInstance"])
        related = event.get("related") or {}
        key = tuple(str(part) for part in (*parts, *reference.values(), *related.values()))
        known = self._observed.get(key)
        if known is not None and clock.now() - known["seen"] < _SERIES_SECONDS:
            await self._continue_series(known, event)
            return
        meta = event["metadata"]
        self._observed.put(key, {"name": meta["name"], "namespace": meta["namespace"], "count": 1, "seen": clock.now(), "written": clock.now()})
        await self._try(lambda: self._client.create(EVENTS_V1, event, event["metadata"]["namespace"]), event)

    async def _continue_series(self, known: Object, event: Object) -> None:
        known["count"] += 1
        known["seen"] = clock.now()
        # The second occurrence is written at once, later ones with the refresh interval of upstream.
        if known["count"] > 2 and clock.now() - known["written"] < _SERIES_SECONDS / 2:
            return
        known["written"] = clock.now()
        series = {"count": known["count"], "lastObservedTime": event["eventTime"]}
        await self._try(
            lambda: self._client.patch(EVENTS_V1, known["name"], known["namespace"], {"series": series}, type="strategic"), event
        )

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
