"""The scheduling queue: active, back-off and unschedulable pods, and the nominated ones.

A pod waits in exactly one place: the active heap (by priority, then age), the back-off heap
(until its time, or until nothing else is to do), the error back-off heap (until its time), or
the unschedulable map (until an event that a plugin which refused it finds promising). Gated
pods stay in the unschedulable map until their plugin lets them go.

Everything is synchronous and in one thread; `wait` alone waits. Bound: the number of pods in the
cluster. Events that happen between a cycle's start and its end cannot exist, since a cycle never
awaits; what happens while a binding runs leads to the back-off, which tries again anyway.

Source: pkg/scheduler/backend/queue.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from knarr.scheduler.events import FORCE_ACTIVATE, TIMEOUT, ClusterEvent, pod_changes
from knarr.scheduler.framework import Hint, Profile, Refusal
from knarr.scheduler.podinfo import Pod, PodInfo, Shapes

INITIAL_BACKOFF_SECONDS = 1.0
MAXIMUM_BACKOFF_SECONDS = 10.0
UNSCHEDULABLE_SECONDS = 300.0
FLUSH_SECONDS = 30.0

ACTIVE, BACKOFF, ERROR_BACKOFF, UNSCHEDULABLE, RUNNING = "active", "backoff", "error-backoff", "unschedulable", "running"


class QueuedPod:
    """A pod that waits, and what its last attempts gave."""

    __slots__ = (
        "added", "attempts", "backoff_until", "errors", "first_attempt", "gated_by", "info", "pending_plugins", "place", "plugins",
        "serial", "since", "unschedulable_count",
    )  # fmt: skip

    def __init__(self, info: PodInfo, now: float) -> None:
        self.info = info
        self.added = now
        self.since = now
        self.first_attempt = 0.0
        self.attempts = 0
        self.unschedulable_count = 0
        self.errors = 0
        self.backoff_until = 0.0
        self.plugins: set[str] = set()
        self.pending_plugins: set[str] = set()
        self.gated_by: Refusal | None = None
        self.place = ""
        self.serial = 0


class Nominator:
    """Which pods count on a place that is being freed for them on which node."""

    def __init__(self) -> None:
        self._by_node: dict[str, dict[str, PodInfo]] = {}
        self._node_of: dict[str, str] = {}

    def set(self, info: PodInfo, node_name: str) -> None:
        self.remove(info.uid)
        if node_name:
            self._by_node.setdefault(node_name, {})[info.uid] = info
            self._node_of[info.uid] = node_name

    def remove(self, uid: str) -> None:
        node = self._node_of.pop(uid, None)
        if node is not None:
            pods = self._by_node[node]
            del pods[uid]
            if not pods:
                del self._by_node[node]

    def node_of(self, uid: str) -> str:
        return self._node_of.get(uid, "")

    def pods_for(self, node_name: str) -> list[PodInfo]:
        return list(self._by_node.get(node_name, {}).values())

    @property
    def nodes(self) -> Iterable[str]:
        return self._by_node.keys()

    def __len__(self) -> int:
        return len(self._node_of)


class SchedulingQueue:
    """See the module.

    Args:
      clock: seconds; the event loop's time, so that virtual time works.
      profiles: by scheduler name; their plugins gate pods and judge events.
    """

    def __init__(
        self,
        profiles: dict[str, Profile],
        shapes: Shapes,
        clock: Callable[[], float],
        *,
        initial_backoff_seconds: float = INITIAL_BACKOFF_SECONDS,
        maximum_backoff_seconds: float = MAXIMUM_BACKOFF_SECONDS,
        pop_from_backoff: bool = True,
    ) -> None:
        self._profiles = profiles
        self._shapes = shapes
        self._clock = clock
        self._initial = initial_backoff_seconds
        self._maximum = maximum_backoff_seconds
        self._pop_from_backoff = pop_from_backoff
        self.pods: dict[str, QueuedPod] = {}
        self.nominator = Nominator()
        self._serial = 0
        # Heap entries carry the pod's serial; an entry whose serial is outdated is skipped when popped.
        self._active: list[tuple[int, float, int, QueuedPod]] = []
        self._backoff: list[tuple[float, int, float, int, QueuedPod]] = []
        self._error_backoff: list[tuple[float, int, float, int, QueuedPod]] = []
        self._unschedulable: dict[str, QueuedPod] = {}
        self.incoming: Counter[tuple[str, str]] = Counter()
        """Pods that entered a place, by (place, what happened)."""
        self._happened = ""
        self._counts = {ACTIVE: 0, BACKOFF: 0, ERROR_BACKOFF: 0, UNSCHEDULABLE: 0, RUNNING: 0}
        self._interested: dict[tuple[str, ClusterEvent], list[tuple[str, Hint | None]]] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._last_flush = clock()

    # Places.

    def counts(self) -> dict[str, int]:
        """Pods per place, by name."""
        return dict(self._counts)

    def _leave(self, queued: QueuedPod) -> None:
        if queued.place:
            self._counts[queued.place] -= 1
        if queued.place == UNSCHEDULABLE:
            del self._unschedulable[queued.info.uid]
        queued.place = ""
        self._serial += 1
        queued.serial = self._serial

    def _enter(self, queued: QueuedPod, place: str) -> None:
        self._leave(queued)
        queued.place = place
        self._counts[place] += 1
        if place != RUNNING:
            self.incoming[place, self._happened] += 1
        age = queued.since
        if place == ACTIVE:
            heapq.heappush(self._active, (-queued.info.priority, age, queued.serial, queued))
            self._wake()
        elif place in (BACKOFF, ERROR_BACKOFF):
            heap = self._backoff if place == BACKOFF else self._error_backoff
            heapq.heappush(heap, (self._backoff_until(queued), -queued.info.priority, age, queued.serial, queued))
            self._wake()
        elif place == UNSCHEDULABLE:
            self._unschedulable[queued.info.uid] = queued

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _backoff_until(self, queued: QueuedPod) -> float:
        count = queued.errors or queued.unschedulable_count
        if not count or not self._maximum:
            return 0.0
        if not queued.backoff_until:
            seconds = min(self._initial * 2.0 ** min(count - 1, 30), self._maximum)
            # Whole seconds: pods of one second are popped by priority, not by fractions.
            queued.backoff_until = float(int(queued.since + seconds))
        return queued.backoff_until

    def _gate(self, queued: QueuedPod) -> Refusal | None:
        profile = self._profiles.get(queued.info.shape.scheduler_name)
        if profile is None:
            return None
        for plugin in profile.pre_enqueue:
            refusal = plugin.pre_enqueue(queued.info)
            if refusal is not None:
                return refusal
        return None

    def _activate(self, queued: QueuedPod) -> None:
        queued.gated_by = self._gate(queued)
        if queued.gated_by is not None:
            queued.plugins.add(queued.gated_by.plugin)
            if queued.place != UNSCHEDULABLE:
                self._enter(queued, UNSCHEDULABLE)
            return
        self._enter(queued, ACTIVE)

    # Pods come and go.

    def add(self, info: PodInfo) -> None:
        """Take a new pending pod."""
        if info.uid in self.pods:
            self.update(info, info.pod)
            return
        queued = self.pods[info.uid] = QueuedPod(info, self._clock())
        self._happened = "PodAdd"
        self._activate(queued)
        if info.nominated_node:
            self.nominator.set(info, info.nominated_node)

    def update(self, info: PodInfo, old: Pod) -> None:
        """Take a newer object of a pending pod; what of it changed may make it worth another try."""
        queued = self.pods.get(info.uid)
        if queued is None:
            self.add(info)
            return
        before = queued.info
        queued.info = info
        self._happened = "PodUpdate"
        nominated = self.nominator.node_of(info.uid)
        if info.nominated_node and info.nominated_node != nominated:
            self.nominator.set(info, info.nominated_node)
        elif nominated:
            gone = bool((old.get("status") or {}).get("nominatedNodeName")) and not info.nominated_node
            self.nominator.set(info, "" if gone else nominated)
        if queued.place == ACTIVE and before.priority != info.priority:
            self._enter(queued, ACTIVE)
        if queued.place != UNSCHEDULABLE:
            return
        for event in pod_changes(old, info.pod):
            if self._worth(queued, ClusterEvent("TargetPod", event.action), old, info.pod):
                self._requeue(queued)
                return
        if queued.gated_by is not None and self._gate(queued) is None:
            self._activate(queued)

    def delete(self, uid: str) -> None:
        self.nominator.remove(uid)
        queued = self.pods.pop(uid, None)
        if queued is not None:
            self._leave(queued)

    def done(self, uid: str) -> None:
        """The popped pod found its place (or its end) and leaves the queue."""
        queued = self.pods.get(uid)
        if queued is not None and queued.place == RUNNING:
            self._leave(queued)
            del self.pods[uid]

    # Popping.

    def pop_nowait(self) -> QueuedPod | None:
        """Take the pod to schedule next, or None when there is nothing to do now."""
        if self._backoff or self._error_backoff:
            self._flush_backoff()
        heaps: list[Any] = [self._active]
        if self._pop_from_backoff:
            heaps.append(self._backoff)
        for heap in heaps:
            while heap:
                entry = heapq.heappop(heap)
                queued: QueuedPod = entry[-1]
                if entry[-2] != queued.serial:
                    continue
                if heap is self._backoff and (refusal := self._gate(queued)) is not None:
                    queued.gated_by = refusal
                    queued.plugins.add(refusal.plugin)
                    self._enter(queued, UNSCHEDULABLE)
                    continue
                self._enter(queued, RUNNING)
                queued.attempts += 1
                queued.backoff_until = 0.0
                queued.plugins, queued.pending_plugins = set(), set()
                if not queued.first_attempt:
                    queued.first_attempt = self._clock()
                return queued
        return None

    async def wait(self) -> None:
        """Wait until `pop_nowait` may have something."""
        now = self._clock()
        self._flush_leftovers(now)
        if self._has_ready():
            return
        timeout = self._last_flush + FLUSH_SECONDS - now
        if self._error_backoff or (self._backoff and not self._pop_from_backoff):
            due = min(heap[0][0] for heap in (self._backoff, self._error_backoff) if heap)
            timeout = min(timeout, max(due + 1.0 - now, 0.0) + 0.001)
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            # Not wait_for: in Python 3.11 it loses a cancellation that comes in the same moment as what it waits for.
            async with asyncio.timeout(max(timeout, 0.001)):
                await self._waiter
        except TimeoutError:
            pass
        finally:
            self._waiter = None

    def _has_ready(self) -> bool:
        if self._backoff or self._error_backoff:
            self._flush_backoff()
        return bool(self._active) or (self._pop_from_backoff and bool(self._backoff))

    def _flush_backoff(self) -> None:
        now = float(int(self._clock()))
        self._happened = "BackoffComplete"
        for heap in (self._backoff, self._error_backoff):
            while heap and (heap[0][0] < now or heap[0][-2] != heap[0][-1].serial):
                entry = heapq.heappop(heap)
                if entry[-2] == entry[-1].serial:
                    self._activate(entry[-1])

    def _flush_leftovers(self, now: float) -> None:
        """Pods that no event woke up for long get another try: a hint may have been wrong."""
        if now - self._last_flush < FLUSH_SECONDS:
            return
        self._last_flush = now
        self._happened = TIMEOUT.label
        for queued in list(self._unschedulable.values()):
            if now - queued.since > UNSCHEDULABLE_SECONDS and queued.gated_by is None:
                self._requeue(queued)

    # After an attempt.

    def add_unschedulable(self, queued: QueuedPod, *, is_error: bool) -> None:
        """Put back a popped pod that found no node (`plugins` says who refused it), or whose cycle failed."""
        if self.pods.get(queued.info.uid) is not queued:
            return
        queued.since = self._clock()
        queued.gated_by = None
        self._happened = "ScheduleAttemptFailure"
        if is_error:
            queued.errors += 1
        else:
            queued.unschedulable_count += 1
            queued.errors = 0
        if queued.plugins or queued.pending_plugins:
            self._enter(queued, UNSCHEDULABLE)
        else:
            self._enter(queued, ERROR_BACKOFF)

    def activate(self, uid: str) -> None:
        """Move a waiting pod to the active heap at once."""
        queued = self.pods.get(uid)
        if queued is not None and queued.place not in (ACTIVE, RUNNING):
            self._happened = FORCE_ACTIVATE.label
            self._activate(queued)

    def _requeue(self, queued: QueuedPod, *, at_once: bool = False) -> None:
        if at_once or self._backoff_until(queued) < float(int(self._clock())):
            self._activate(queued)
            return
        queued.gated_by = self._gate(queued)
        if queued.gated_by is None:
            self._enter(queued, BACKOFF)

    # Events.

    def move(self, event: ClusterEvent, old: Pod | None, new: Pod | None, *, only: Callable[[PodInfo], bool] | None = None) -> None:
        """Wake the unschedulable pods that this event may help."""
        if not self._unschedulable:
            return
        self._happened = event.text
        wakes: dict[tuple[str, str], bool] = {}
        for queued in list(self._unschedulable.values()):
            gate = queued.gated_by
            if gate is not None and len(queued.plugins) == 1 and not queued.pending_plugins:
                # Nothing but its gate refuses it. There may be thousands of these: asked as the others below they would cost too much.
                key = queued.info.shape.scheduler_name, gate.plugin
                if key not in wakes:
                    wakes[key] = any(name == gate.plugin for name, _ in self._hints(key[0], event))
                if not wakes[key]:
                    continue
            if only is not None and not only(queued.info):
                continue
            verdict = self._worth(queued, event, old, new)
            if verdict:
                self._requeue(queued, at_once=verdict == 2)

    def _hints(self, scheduler_name: str, event: ClusterEvent) -> list[tuple[str, Hint | None]]:
        key = (scheduler_name, event)
        found = self._interested.get(key)
        if found is None:
            profile = self._profiles.get(scheduler_name)
            plugins = profile.plugins if profile is not None else ()
            found = [(p.name, hint) for p in plugins for registered, hint in p.events() if registered.covers(event)]
            self._interested[key] = found
        return found

    def _worth(self, queued: QueuedPod, event: ClusterEvent, old: Pod | None, new: Pod | None) -> int:
        """0: leave it, 1: after its back-off, 2: at once."""
        if event in (TIMEOUT, FORCE_ACTIVATE):
            return 1
        refused_by = queued.plugins | queued.pending_plugins
        if not refused_by or "Extender" in refused_by:
            return 1
        result = 0
        for plugin, hint in self._hints(queued.info.shape.scheduler_name, event):
            if plugin not in refused_by:
                continue
            if hint is None or hint(queued.info, old, new):
                if plugin in queued.pending_plugins:
                    return 2
                result = 1
        return result

    def waiting(self) -> list[QueuedPod]:
        """All pods in the queue, for `why` and metrics."""
        return list(self.pods.values())
