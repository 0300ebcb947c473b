"""Priority and fairness: which requests may run at once, and whose turn it is when not all may.

Requests are classified by the FlowSchemas, lowest matchingPrecedence first, into a priority level and, within it, a flow.
A level has seats in proportion to its shares; who finds none waits in a bounded queue per flow, and flows take turns.
Reads answered from memory do not wait for anything and are only classified. Long-running requests take no seat.

Owner: APIServer. Input: the FlowSchema and PriorityLevelConfiguration stores. Full: 429 with Retry-After.

Source: apiserver util/flowcontrol, server/filters/priority-and-fairness.go; KEP-1040.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections import deque
from typing import TYPE_CHECKING, NamedTuple

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.apply import manager_for
from knarr.api.resources import FLOW_SCHEMAS
from knarr.api.types import Object
from knarr.apiserver.attributes import Attributes, UserInfo
from knarr.apiserver.metrics import family
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

GROUP = "flowcontrol.apiserver.k8s.io"
STATUS_MANAGER = "api-priority-and-fairness-config-consumer-v1"
LONG_SUBRESOURCES = frozenset({"exec", "attach", "portforward", "log", "proxy"})
MOST_CLASSIFIED = 4096
QUEUE_WAIT_SECONDS = 15.0
FULL = "too many requests, please try again later"


FlowKey = tuple[UserInfo, str, str, str, str, str, str]
"""What a request is classified by: user, verb, group, resource, subresource, namespace, and for paths the path."""


def is_long_running(request: Request, info: RequestInfo) -> bool:
    """Whether a request may last for ever, so that neither seats nor time limits are for it."""
    return info.verb == "watch" or info.subresource in LONG_SUBRESOURCES or request.upgrade_wanted


class Classified(NamedTuple):
    """Where a request belongs."""

    level: PriorityLevel
    flow: str
    headers: bytes
    """The two headers by which clients see it."""


class PriorityLevel:
    """Seats, and the queues before them."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.uid = ""
        self.exempt = False
        self.seats = 0
        self.inside = 0
        self.waiting = 0
        self.rejected = 0
        self.dispatched = 0
        self._flow_limit = 0
        self._total_limit = 0
        self._queues: dict[str, deque[asyncio.Future[None]]] = {}
        """Flows with somebody waiting, in the order of their next turn."""

    def configure(self, obj: Object, total_seats: int, total_shares: int) -> None:
        """Take the settings of a PriorityLevelConfiguration."""
        spec = obj.get("spec") or {}
        self.uid = obj["metadata"].get("uid") or ""
        self.exempt = spec.get("type") == "Exempt"
        limited = spec.get("limited") or {}
        shares = limited.get("nominalConcurrencyShares")
        self.seats = max(1, math.ceil(total_seats * (30 if shares is None else shares) / max(1, total_shares)))
        response = limited.get("limitResponse") or {}
        queuing = response.get("queuing") or {}
        if response.get("type") == "Queue":
            length = queuing.get("queueLengthLimit") or 50
            self._flow_limit = length * (queuing.get("handSize") or 8)
            self._total_limit = length * (queuing.get("queues") or 64)
        else:
            self._flow_limit = self._total_limit = 0
        while self.inside < self.seats and self._queues:
            self._next()

    def enter_nowait(self) -> bool:
        """Take a seat if one is free."""
        if self.exempt or (self.inside < self.seats and not self._queues):
            self.inside += 1
            self.dispatched += 1
            return True
        return False

    async def enter(self, flow: str) -> None:
        """Take a seat, waiting for it if need be. Raises 429."""
        if self.enter_nowait():
            return
        queue = self._queues.get(flow)
        if self.waiting >= self._total_limit or (queue is not None and len(queue) >= self._flow_limit):
            self.rejected += 1
            raise errors.too_many_requests(FULL, 1)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queues.setdefault(flow, deque()).append(waiter)
        self.waiting += 1
        try:
            async with asyncio.timeout(QUEUE_WAIT_SECONDS):
                await waiter
        except BaseException as error:
            if waiter.done() and not waiter.cancelled():
                self.leave()
            else:
                self._forget(flow, waiter)
            if isinstance(error, TimeoutError):
                self.rejected += 1
                raise errors.too_many_requests(FULL, 1) from None
            raise

    def _forget(self, flow: str, waiter: asyncio.Future[None]) -> None:
        queue = self._queues.get(flow)
        if queue is not None and waiter in queue:
            queue.remove(waiter)
            self.waiting -= 1
            if not queue:
                del self._queues[flow]

    def leave(self) -> None:
        """Give a seat back; the next flow's first gets it."""
        self.inside -= 1
        if self._queues and self.inside < self.seats:
            self._next()

    def _next(self) -> None:
        flow = next(iter(self._queues))
        queue = self._queues.pop(flow)
        waiter = queue.popleft()
        self.waiting -= 1
        if queue:
            # Back to the end of the line: each flow one at a time.
            self._queues[flow] = queue
        self.inside += 1
        self.dispatched += 1
        if not waiter.done():
            waiter.set_result(None)


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
        self._fallback = PriorityLevel("catch-all")
        self._fallback.seats = 5
        self._wakeup = asyncio.Event()

    async def start(self) -> None:
        """Follow the configuration, and tell of each FlowSchema whether its level exists."""
        for plural in ("flowschemas", "prioritylevelconfigurations"):
            self._server.store(GROUP, plural).add_handler(self._changed)
        await self._mark_all()
        self._server.tasks.spawn_eternal(self._mark_forever(), "flow-schema-status")

    def _changed(self, type: str, obj: Object, old: Object | None) -> None:
        if old is not None and old.get("spec") == obj.get("spec") and type == "MODIFIED":
            return
        self._dirty = True
        self._wakeup.set()

    def _reload(self) -> None:
        self._dirty = False
        self._classified.clear()
        configured = self._server.store(GROUP, "prioritylevelconfigurations").list_nowait()
        shares = sum(
            30 if (share := ((obj["spec"].get("limited") or {}).get("nominalConcurrencyShares"))) is None else share
            for obj in configured if obj["spec"].get("type") == "Limited"
        )  # fmt: skip
        names = set()
        for obj in configured:
            name = obj["metadata"]["name"]
            names.add(name)
            self._levels.setdefault(name, PriorityLevel(name)).configure(obj, self._total, shares)
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
            return Classified(level, f"{schema['metadata']['name']}/{distinguisher}", headers.encode())
        return Classified(self._fallback, "", b"")

    def admit(self, request: Request, info: RequestInfo, attributes: Attributes) -> Classified | None:
        """Say in whose line a request stands, and put that into its headers; None when it needs no seat.

        The caller enters the level, and leaves it in the end. Plain calls instead of a context manager: every write comes this way.
        """
        if not self._enabled:
            return None
        classified = self.classify(attributes)
        request.answer_headers = classified.headers
        return None if is_long_running(request, info) else classified

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

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        levels = list(self._levels.values())
        by_level = [(f'priority_level="{level.name}"', level) for level in levels]
        by_flow = [(f'flow_schema="",priority_level="{level.name}"', level) for level in levels]
        prefix = "apiserver_flowcontrol_"
        return [
            *family(prefix + "current_executing_requests", "gauge",
                    "[BETA] Number of requests in initial (for a WATCH) or any (for a non-WATCH) execution stage in the API Priority and Fairness "
                    "subsystem", [(labels, level.inside) for labels, level in by_flow]),
            *family(prefix + "current_executing_seats", "gauge",
                    "[BETA] Concurrency (number of seats) occupied by the currently executing requests in the API Priority and Fairness subsystem",
                    [(labels, level.inside) for labels, level in by_flow]),
            *family(prefix + "current_inqueue_requests", "gauge",
                    "[BETA] Number of requests currently pending in queues of the API Priority and Fairness subsystem",
                    [(labels, level.waiting) for labels, level in by_flow]),
            *family(prefix + "nominal_limit_seats", "gauge", "[BETA] Nominal number of execution seats configured for each priority level",
                    [(labels, level.seats) for labels, level in by_level]),
            *family(prefix + "current_limit_seats", "gauge", "[ALPHA] current derived number of execution seats available to each priority level",
                    [(labels, level.seats) for labels, level in by_level]),
            *family(prefix + "dispatched_requests_total", "counter",
                    "[BETA] Number of requests executed by API Priority and Fairness subsystem", [(labels, level.dispatched) for labels, level in by_flow]),
            *family(prefix + "rejected_requests_total", "counter", "[BETA] Number of requests rejected by API Priority and Fairness subsystem",
                    [(f'{labels},reason="queue-full"', level.rejected) for labels, level in by_flow if level.rejected]),
        ]  # fmt: skip


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
