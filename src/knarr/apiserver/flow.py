"""Priority and fairness: which requests may run at once, and whose turn it is when not all may.

Requests are classified by the FlowSchemas, lowest matchingPrecedence first, into a priority level and, within it, a flow.
A level has seats in proportion to its shares, and lends what it does not use (flowlevels.py); who finds none waits in one of its queues, which
are bounded, dealt to flows by shuffle sharding, and served fairly (flowqueues.py).
Reads answered from memory do not wait for anything and are only classified. Long-running requests take no seat.

Owner: APIServer. Input: the FlowSchema and PriorityLevelConfiguration stores. Full: 429 with Retry-After.

Source: apiserver util/flowcontrol, server/filters/priority-and-fairness.go; KEP-1040.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.apply import manager_for
from knarr.api.resources import FLOW_SCHEMAS
from knarr.api.types import Object
from knarr.apiserver import flowdebug
from knarr.apiserver.attributes import Attributes, UserInfo
from knarr.apiserver.flowlevels import ADJUSTMENT_SECONDS, Place, PriorityLevel, adjust, shares_of
from knarr.apiserver.flowqueues import ESTIMATED_SECONDS, Queue, QueueSet
from knarr.apiserver.instruments import Histograms
from knarr.apiserver.metrics import family
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

GROUP = "flowcontrol.apiserver.k8s.io"
STATUS_MANAGER = "api-priority-and-fairness-config-consumer-v1"
LONG_SUBRESOURCES = frozenset({"exec", "attach", "portforward", "log", "proxy"})
MOST_CLASSIFIED = 4096
WAIT_BOUNDS = (0, 0.005, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 15, 30)
LENGTH_BOUNDS = (0, 10, 25, 50, 100, 250, 500, 1000)


FlowKey = tuple[UserInfo, str, str, str, str, str, str]
"""What a request is classified by: user, verb, group, resource, subresource, namespace, and for paths the path."""


def is_long_running(request: Request, info: RequestInfo) -> bool:
    """Whether a request may last for ever, so that neither seats nor time limits are for it."""
    return info.verb == "watch" or info.subresource in LONG_SUBRESOURCES or request.upgrade_wanted


class Classified:
    """Where a request belongs, and what is counted for all that belong there."""

    __slots__ = ("counts", "flow", "headers", "level")

    def __init__(self, level: PriorityLevel, flow: str, headers: bytes, counts: _Counts) -> None:
        self.level = level
        self.flow = flow
        """"schema/distinguisher"."""
        self.headers = headers
        """The two headers by which clients see it."""
        self.counts = counts


class _Counts:
    """Of one FlowSchema in one level."""

    __slots__ = ("dispatched", "executing", "lengths", "rejected", "seconds", "served", "turned_away", "waiting")

    def __init__(self, waits: Histograms, lengths: Histograms, seconds: Histograms, schema: str, level: str) -> None:
        self.dispatched = self.executing = self.waiting = 0
        self.lengths = lengths.at(schema, level)
        self.seconds = seconds.at(schema, level, "regular")
        self.rejected: dict[str, int] = {}
        self.served = waits.at("true", schema, level)
        self.turned_away = waits.at("false", schema, level)


class Seat:
    """One request's place: enter before, leave in the end."""

    __slots__ = ("_counts", "_place", "arrived", "attributes", "classified", "path", "started", "waits_in")

    def __init__(self, classified: Classified, attributes: Attributes, path: str, arrived: float) -> None:
        self.classified = classified
        self.attributes = attributes
        self.path = path
        self.arrived = arrived
        self.started = 0.0
        """By the loop's clock; 0 while it waits."""
        self._counts = classified.counts
        self._place: Place | None = None
        self.waits_in: Queue | None = None

    def enter_nowait(self) -> bool:
        """Take a seat if one is free."""
        level = self.classified.level
        self._place = level.enter_nowait(self.classified.flow)
        if self._place is None:
            return False
        counts = self._counts
        counts.dispatched += 1
        counts.executing += 1
        served = counts.served
        served.count += 1
        served.buckets[0] += 1
        self.started = self.arrived
        level.present.add(self)
        return True

    async def enter(self) -> None:
        """Take a seat, waiting for it if need be. Raises 429."""
        level, counts, loop = self.classified.level, self._counts, asyncio.get_running_loop()
        begin = loop.time()
        full = level.timed_out
        level.present.add(self)
        counts.waiting += 1
        try:
            self._place = await level.enter(self.classified.flow, self._queued)
        except BaseException as error:
            level.present.discard(self)
            reason = "cancelled"
            if isinstance(error, errors.StatusError):
                reason = "time-out" if level.timed_out > full else "queue-full" if level.queuing else "concurrency-limit"
            counts.rejected[reason] = counts.rejected.get(reason, 0) + 1
            counts.turned_away.observe(loop.time() - begin)
            raise
        finally:
            counts.waiting -= 1
            self.waits_in = None
        self.started = loop.time()
        counts.dispatched += 1
        counts.executing += 1
        counts.served.observe(self.started - begin)

    def _queued(self, queue: Queue) -> None:
        self.waits_in = queue
        self._counts.lengths.observe(len(queue.waiting))

    def leave(self, now: float) -> None:
        level = self.classified.level
        counts = self._counts
        counts.executing -= 1
        counts.seconds.observe(now - self.started)
        level.present.discard(self)
        place, self._place = self._place, None
        if place is not None:
            level.leave(place)


class FlowControl:
    """See the module's docstring."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        config = server.config
        self._enabled = config.priority_and_fairness
        self._total = config.max_requests_inflight + config.max_mutating_requests_inflight
        self._levels: dict[str, PriorityLevel] = {}
        self._schemas: list[Object] = []
        self._classified: dict[FlowKey, Classified] = {}
        self._dirty = True
        self._waits = Histograms(
            "apiserver_flowcontrol_request_wait_duration_seconds", "[BETA] Length of time a request spent waiting in its queue",
            ("execute", "flow_schema", "priority_level"), WAIT_BOUNDS,
        )  # fmt: skip
        self._lengths = Histograms(
            "apiserver_flowcontrol_request_queue_length_after_enqueue",
            "[ALPHA] Length of queue in the API Priority and Fairness subsystem, as seen by each request after it is enqueued",
            ("flow_schema", "priority_level"), LENGTH_BOUNDS,
        )  # fmt: skip
        self._seconds = Histograms(
            "apiserver_flowcontrol_request_execution_seconds",
            "[ALPHA] Duration of initial stage (for a WATCH) or any (for a non-WATCH) stage of request execution in the API Priority and Fairness "
            "subsystem", ("flow_schema", "priority_level", "type"), WAIT_BOUNDS,
        )  # fmt: skip
        self._counts: dict[tuple[str, str], _Counts] = {}
        """(FlowSchema, level) -> its counts."""
        self._fair = 0.0
        self._configured: frozenset[str] = frozenset()
        self._fallback = PriorityLevel("catch-all")
        self._fallback.seats = 5
        self._wakeup = asyncio.Event()

    async def start(self) -> None:
        """Follow the configuration, and tell of each FlowSchema whether its level exists."""
        for plural in ("flowschemas", "prioritylevelconfigurations"):
            self._server.store(GROUP, plural).add_handler(self._changed)
        await self._mark_all()
        self._server.tasks.spawn_eternal(self._mark_forever(), "flow-schema-status")
        if self._enabled:
            self._server.tasks.spawn_eternal(self._adjust_forever(), "flow-lending")

    async def _adjust_forever(self) -> None:
        while True:
            await asyncio.sleep(ADJUSTMENT_SECONDS)
            if self._dirty:
                self._reload()
            self._fair = adjust(list(self._levels.values()))

    def _changed(self, type: str, obj: Object, old: Object | None) -> None:
        if old is not None and old.get("spec") == obj.get("spec") and type == "MODIFIED":
            return
        self._dirty = True
        self._wakeup.set()

    def _reload(self) -> None:
        self._dirty = False
        self._classified.clear()
        configured = self._server.store(GROUP, "prioritylevelconfigurations").list_nowait()
        shares = sum(map(shares_of, configured))
        names = set()
        for obj in configured:
            name = obj["metadata"]["name"]
            names.add(name)
            self._levels.setdefault(name, PriorityLevel(name)).configure(obj, self._total, shares)
        self._configured = frozenset(names)
        for name in self._levels.keys() - names:
            if not self._levels[name].inside:
                del self._levels[name]
        schemas = self._server.store(GROUP, "flowschemas").list_nowait()
        self._schemas = sorted(schemas, key=lambda obj: (obj["spec"].get("matchingPrecedence") or 1000, obj["metadata"]["name"]))

    def classify(self, attributes: Attributes) -> Classified:
        """Return the level and flow of a request."""
        if self._dirty:
            self._reload()
        key = (
            attributes.user, attributes.verb, attributes.group, attributes.resource, attributes.subresource, attributes.namespace, attributes.path,
        )  # fmt: skip
        found = self._classified.get(key)
        if found is None:
            found = self._classify(attributes)
            if len(self._classified) >= MOST_CLASSIFIED:
                self._classified.clear()
            self._classified[key] = found
        return found

    def _classify(self, attributes: Attributes) -> Classified:
        for schema in self._schemas:
            spec = schema["spec"]
            level = self._levels.get(spec["priorityLevelConfiguration"]["name"])
            if level is None or not any(_rule_matches(rule, attributes) for rule in spec.get("rules") or ()):
                continue
            method = (spec.get("distinguisherMethod") or {}).get("type")
            distinguisher = attributes.user.name if method == "ByUser" else attributes.namespace if method == "ByNamespace" else ""
            uid = schema["metadata"].get("uid") or ""
            headers = f"X-Kubernetes-Pf-Flowschema-Uid: {uid}\r\nX-Kubernetes-Pf-Prioritylevel-Uid: {level.uid}\r\n"
            name = schema["metadata"]["name"]
            return Classified(level, f"{name}/{distinguisher}", headers.encode(), self._counts_of(name, level.name))
        return Classified(self._fallback, "", b"", self._counts_of("catch-all", "catch-all"))

    def _counts_of(self, schema: str, level: str) -> _Counts:
        found = self._counts.get((schema, level))
        if found is None:
            found = self._counts[schema, level] = _Counts(self._waits, self._lengths, self._seconds, schema, level)
        return found

    def admit(self, request: Request, info: RequestInfo, attributes: Attributes) -> Seat | None:
        """Say in whose line a request stands, and put that into its headers; None when it needs no seat.

        The caller enters, and leaves in the end. Plain calls instead of a context manager: every write comes this way.
        """
        if not self._enabled:
            return None
        classified = self.classify(attributes)
        request.answer_headers = classified.headers
        return None if is_long_running(request, info) else Seat(classified, attributes, request.path, request.received_at)

    def headers_for(self, attributes: Attributes) -> bytes:
        """Return the headers of a read that takes no seat."""
        return self.classify(attributes).headers if self._enabled else b""

    # -- status ----------------------------------------------------------------------------------------------------------------
    async def _mark_forever(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            with contextlib.suppress(errors.StatusError):
                await self._mark_all()

    async def _mark_all(self) -> None:
        levels = self._server.store(GROUP, "prioritylevelconfigurations")
        schemas = self._server.store(GROUP, "flowschemas")
        waiting = []
        for schema in schemas.list_nowait():
            name = schema["spec"]["priorityLevelConfiguration"]["name"]
            exists = levels.get_nowait("", name) is not None
            current = next((c for c in (schema.get("status") or {}).get("conditions") or () if c.get("type") == "Dangling"), None)
            wanted = "False" if exists else "True"
            if current is None or current.get("status") != wanted:
                waiting.append(schemas.update("", schema["metadata"]["name"], lambda obj, n=name, e=exists: _with_dangling(obj, n, e)))  # type: ignore[misc]
        await asyncio.gather(*waiting)

    # -- for people and machines that look on --------------------------------------------------------------------------------
    def debug(self, name: str, *, details: bool) -> bytes | None:
        """Return one of the dumps below flowdebug.PATH, None if there is none of this name."""
        levels = list(self._levels.values())
        if name == "dump_priority_levels":
            return flowdebug.levels(levels, frozenset(self._levels) - self._configured)
        if name == "dump_queues":
            return flowdebug.queues(levels)
        return flowdebug.requests(levels, details=details) if name == "dump_requests" else None

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        prefix = "apiserver_flowcontrol_"
        flows = [(f'flow_schema="{schema}",priority_level="{level}"', counts) for (schema, level), counts in self._counts.items()]
        in_system = "in the API Priority and Fairness subsystem"
        lines = [
            *family(prefix + "current_executing_requests", "gauge",
                    f"[BETA] Number of requests in initial (for a WATCH) or any (for a non-WATCH) execution stage {in_system}",
                    [(labels, counts.executing) for labels, counts in flows]),
            *family(prefix + "current_executing_seats", "gauge",
                    "[BETA] Concurrency (number of seats) occupied by the currently executing (initial stage for a WATCH, any stage otherwise) "
                    f"requests {in_system}", [(labels, counts.executing) for labels, counts in flows]),
            *family(prefix + "current_inqueue_requests", "gauge", f"[BETA] Number of requests currently pending in queues of {in_system[3:]}",
                    [(labels, counts.waiting) for labels, counts in flows]),
            *family(prefix + "dispatched_requests_total", "counter",
                    "[BETA] Number of requests executed by API Priority and Fairness subsystem", [(labels, counts.dispatched) for labels, counts in flows]),
            *family(prefix + "rejected_requests_total", "counter", "[BETA] Number of requests rejected by API Priority and Fairness subsystem",
                    [(f'{labels},reason="{reason}"', count) for labels, counts in flows for reason, count in counts.rejected.items()]),
            *family(prefix + "current_inqueue_seats", "gauge", f"[ALPHA] Number of seats currently pending in queues of {in_system[3:]}",
                    [(labels, counts.waiting) for labels, counts in flows]),
            *self._waits.lines(), *self._lengths.lines(), *self._seconds.lines(),
        ]  # fmt: skip
        levels = [(f'priority_level="{level.name}"', level) for level in self._levels.values()]
        by_level: tuple[tuple[str, str, Callable[[PriorityLevel], float]], ...] = (
            ("nominal_limit_seats", "[BETA] Nominal number of execution seats configured for each priority level", lambda one: one.nominal),
            ("lower_limit_seats", "[ALPHA] Configured lower bound on number of execution seats available to each priority level", lambda one: one.least),
            ("upper_limit_seats", "[ALPHA] Configured upper bound on number of execution seats available to each priority level", lambda one: one.most),
            ("current_limit_seats", "[ALPHA] current derived number of execution seats available to each priority level", lambda one: one.seats),
            ("demand_seats_high_watermark", "[ALPHA] High watermark, over last adjustment period, of demand_seats", lambda one: one.demand.high_watermark),
            ("demand_seats_average", "[ALPHA] Time-weighted average, over last adjustment period, of demand_seats", lambda one: one.demand.average),
            ("demand_seats_stdev", "[ALPHA] Time-weighted standard deviation, over last adjustment period, of demand_seats", lambda one: one.demand.deviation),
            ("demand_seats_smoothed", "[ALPHA] Smoothed seat demands", lambda one: one.demand.smoothed),
            ("target_seats", "[ALPHA] Seat allocation targets", lambda one: one.target),
            ("request_concurrency_limit", "[ALPHA] Nominal number of execution seats configured for each priority level", lambda one: one.nominal),
        )
        for name, text, value in by_level:
            lines += family(prefix + name, "gauge", text, [(labels, value(level)) for labels, level in levels])
        lines += self._meters(prefix)
        text = "[ALPHA] Fair fraction of server's concurrency to allocate to each priority level that can use it"
        return [*lines, *family(prefix + "seat_fair_frac", "gauge", text, [("", self._fair)])]


    def _meters(self, prefix: str) -> list[str]:
        """Return how far the queues of each level have got."""
        queued = [(f'priority_level="{level.name}"', level.set) for level in self._levels.values() if level.set is not None]
        lines: list[str] = []
        readings: tuple[tuple[str, str, Callable[[QueueSet], float]], ...] = (
            ("current_r", "R(time of last change)", lambda one: one.meter),
            ("dispatch_r", "R(time of last dispatch)", lambda one: one.dispatched_at),
            ("latest_s", "S(most recently dispatched request)", lambda one: one.latest),
        )
        for name, text, value in readings:
            lines += family(prefix + name, "gauge", f"[ALPHA] {text}", [(labels, value(one)) for labels, one in queued])
        oldest = "S(oldest waiting request in queue)"
        for name, text, discount in (("next_s_bounds", oldest, 0.0), ("next_discounted_s_bounds", f"{oldest} - estimated work in progress", ESTIMATED_SECONDS)):
            samples = [
                (f'bound="{bound}",{labels}', place) for labels, one in queued if one.waiting
                for bound, place in zip(("min", "max"), one.bounds(discount), strict=True)
            ]  # fmt: skip
            lines += family(prefix + name, "gauge", f"[ALPHA] min and max, over queues, of {text}", samples)
        return lines


def _with_dangling(schema: Object, level: str, exists: bool) -> Object:
    status = dict(schema.get("status") or {})
    others = [c for c in status.get("conditions") or [] if c.get("type") != "Dangling"]
    text = "and it exists" if exists else "but there is no such object"
    condition = {
        "type": "Dangling", "status": "False" if exists else "True", "lastTransitionTime": clock.now_rfc3339(),
        "reason": "Found" if exists else "NotFound",
        "message": f'This FlowSchema references the PriorityLevelConfiguration object named "{level}" {text}',
    }
    status["conditions"] = [condition, *others]
    marked = {**schema, "status": status}
    tracked = schema["metadata"].get("managedFields")
    if tracked:
        name = {key: schema[key] for key in ("apiVersion", "kind")} | {"metadata": {"name": schema["metadata"]["name"]}}
        applied = manager_for(FLOW_SCHEMAS, "status").apply(schema, {**name, "status": {"conditions": [condition]}}, STATUS_MANAGER, force=True)
        marked["metadata"] = {**schema["metadata"], "managedFields": applied["metadata"]["managedFields"]}
    return marked


def _rule_matches(rule: Object, attributes: Attributes) -> bool:
    if not any(_subject_matches(subject, attributes.user) for subject in rule.get("subjects") or ()):
        return False
    if not attributes.is_resource:
        return any(
            _among(attributes.verb, part.get("verbs")) and any(_path_matches(pattern, attributes.path) for pattern in part.get("nonResourceURLs") or ())
            for part in rule.get("nonResourceRules") or ()
        )
    return any(_resource_matches(part, attributes) for part in rule.get("resourceRules") or ())


def _subject_matches(subject: Object, user: UserInfo) -> bool:
    kind = subject.get("kind")
    if kind == "User":
        return bool(subject["user"]["name"] in ("*", user.name))
    if kind == "Group":
        name = subject["group"]["name"]
        return name == "*" or name in user.groups
    if kind == "ServiceAccount":
        account = subject["serviceAccount"]
        prefix = f"system:serviceaccount:{account.get('namespace')}:"
        return user.name.startswith(prefix) if account.get("name") == "*" else user.name == prefix + (account.get("name") or "")
    return False


def _among(value: str, allowed: list[str] | None) -> bool:
    return bool(allowed) and ("*" in (allowed or ()) or value in (allowed or ()))


def _path_matches(pattern: str, path: str) -> bool:
    return pattern in ("*", path) or (pattern.endswith("/*") and path.startswith(pattern[:-1]))


def _resource_matches(rule: Object, attributes: Attributes) -> bool:
    resource = f"{attributes.resource}/{attributes.subresource}" if attributes.subresource else attributes.resource
    if not (_among(attributes.verb, rule.get("verbs")) and _among(attributes.group, rule.get("apiGroups")) and _among(resource, rule.get("resources"))):
        return False
    if not attributes.namespace:
        return bool(rule.get("clusterScope"))
    return _among(attributes.namespace, rule.get("namespaces"))
