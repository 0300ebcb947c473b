"""Node-pressure eviction: watches memory, disk, inodes and pids, and ends pods before the kernel has to.

Caller: kubelet (`run` eternal, `pressure` for the node's conditions, `admit` for new pods). Every ten seconds signals are read and
compared with the thresholds; one pod at most is evicted for pressure in a round, after what nobody uses was thrown away. A threshold
once acted upon holds until its minimum reclaim is free as well. Also enforced here: limits of local storage.
Source: pkg/kubelet/eviction.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import admission, machine, podutil, usage
from knarr.kubelet.config import EvictionConfig
from knarr.kubelet.node import Node
from knarr.kubelet.pod_worker import PodWorker, Stage
from knarr.kubelet.pods import PodWorkers
from knarr.kubelet.usage import PodUsage
from knarr.runtime.cri import ContainerStats, RuntimeFault

log = get_logger(__name__)

ALLOCATABLE = "allocatableMemory.available"
_CONDITION = {
    "memory.available": "MemoryPressure",
    ALLOCATABLE: "MemoryPressure",
    "nodefs.available": "DiskPressure",
    "nodefs.inodesFree": "DiskPressure",
    "imagefs.available": "DiskPressure",
    "imagefs.inodesFree": "DiskPressure",
    "containerfs.available": "DiskPressure",
    "containerfs.inodesFree": "DiskPressure",
    "pid.available": "PIDPressure",
}
_RESOURCE = {
    "memory.available": "memory",
    ALLOCATABLE: "memory",
    "nodefs.available": "ephemeral-storage",
    "imagefs.available": "ephemeral-storage",
    "containerfs.available": "ephemeral-storage",
    "nodefs.inodesFree": "inodes",
    "imagefs.inodesFree": "inodes",
    "containerfs.inodesFree": "inodes",
    "pid.available": "pids",
}
_IMMEDIATE_SECONDS = 1


@dataclass(frozen=True, slots=True)
class Signal:
    """One observation: how much there is and how much is left."""

    available: int
    capacity: int


@dataclass(frozen=True, slots=True)
class Threshold:
    """How much must be left at least, as an amount or a share."""

    signal: str
    value: str
    grace_seconds: float | None = None
    """How long it must be crossed before anything is done; None for a hard threshold."""
    reclaim: str = "0"
    """How much more must be free once it was acted upon."""

    def limit(self, capacity: int) -> int:
        """In the signal's unit."""
        return threshold(self.value, capacity)

    def crossed(self, signals: dict[str, Signal], *, reclaimed: bool = False) -> bool:
        """`reclaimed` asks for the minimum reclaim too."""
        seen = signals.get(self.signal)
        if seen is None:
            return False
        more = threshold(self.reclaim, seen.capacity) if reclaimed else 0
        return seen.available < self.limit(seen.capacity) + more


def threshold(text: str, capacity: int) -> int:
    """A threshold in the signal's unit."""
    return int(capacity * float(text[:-1]) / 100) if text.endswith("%") else quantity.value(text)


def thresholds(config: EvictionConfig, *, allocatable: bool) -> list[Threshold]:
    """All of a configuration; with `allocatable`, pods together are watched as the node is."""
    reclaim = config.minimum_reclaim
    out = [Threshold(name, value, reclaim=reclaim.get(name, "0")) for name, value in config.hard.items()]
    out += [Threshold(name, value, config.soft_grace_period_seconds.get(name, 0.0), reclaim.get(name, "0")) for name, value in config.soft.items()]
    if allocatable:
        out += [Threshold(ALLOCATABLE, t.value, reclaim=t.reclaim) for t in out if t.signal == "memory.available" and t.grace_seconds is None]
    return out


async def _nothing() -> None:
    return


class Eviction:
    """Keeps the node from running out of what cannot be shared."""

    def __init__(self, node: Node, workers: PodWorkers, changed: Callable[[], None], tell: Callable[[str, str, str], None] = lambda kind, reason, text: None) -> None:
        """`changed` is called when a condition of the node became another; `tell` records an event about the node."""
        self._node = node
        self._workers = workers
        self._changed = changed
        self._tell = tell
        self._thresholds = thresholds(node.config.eviction, allocatable="pods" in node.config.enforce_node_allocatable and node.config.cgroups_per_qos)
        self._image_path = ""
        self._held: list[Threshold] = []
        """Crossed for their grace period in the last round; they hold until the minimum reclaim is free."""
        self._since: dict[Threshold, float] = {}
        """Crossed threshold to when that was first seen."""
        self._told: dict[str, bool] = {}
        """The conditions when they changed last."""
        self._seen_at: dict[str, float] = {}
        """Condition to the last time that it held."""
        self.read: Callable[[], dict[str, Signal]] = self._read
        self.reclaim: Callable[[], Awaitable[None]] = _nothing
        """Throws away containers and images that nobody uses."""

    def pressure(self) -> dict[str, bool]:
        """Which pressure conditions hold; each stays for a while after its signal is gone."""
        now, keep = clock.now(), self._node.config.eviction.pressure_transition_period_seconds
        return {kind: kind in self._seen_at and now - self._seen_at[kind] < keep for kind in ("MemoryPressure", "DiskPressure", "PIDPressure")}

    def admit(self, pod: Object) -> tuple[str, str] | None:
        """Refuse pods that would make the pressure worse."""
        held = [kind for kind, holds in self.pressure().items() if holds]
        if not held or podutil.is_critical(pod):
            return None
        if held == ["MemoryPressure"]:
            if podutil.qos_class(pod) != "BestEffort":
                return None
            if admission.tolerates(pod, {"key": "node.kubernetes.io/memory-pressure", "effect": "NoSchedule"}):
                return None
        return "Evicted", f"The node had condition: [{' '.join(held)}]. "

    async def run(self) -> None:
        """Look, and act, for ever."""
        while True:
            await asyncio.sleep(self._node.config.eviction.interval_seconds)
            try:
                await self.look()
            except (OSError, RuntimeFault) as e:
                log.warning("eviction signals not read", error=str(e))

    # --- signals ---

    def _read(self) -> dict[str, Signal]:
        config, cgroups = self._node.config, self._node.cgroups
        memory = machine.memory_info()
        root = machine.disk(config.root_dir)
        images = machine.disk(self._image_path) if self._image_path else root
        pids, running = machine.most_processes(), machine.process_count()
        out = {
            "memory.available": Signal(memory.get("MemAvailable", memory.get("MemFree", 0)), memory.get("MemTotal", 0)),
            "nodefs.available": Signal(root.available, root.capacity),
            "imagefs.available": Signal(images.available, images.capacity),
            "containerfs.available": Signal(images.available, images.capacity),
            "pid.available": Signal(pids - running, pids),
        }
        for name, disk in (("nodefs", root), ("imagefs", images), ("containerfs", images)):
            if disk.inodes:
                out[f"{name}.inodesFree"] = Signal(disk.inodes_free, disk.inodes)
        if limit := cgroups.memory_limit(cgroups.kubepods()):
            working = cgroups.memory_usage(cgroups.kubepods())[1]
            out[ALLOCATABLE] = Signal(max(0, limit - working), limit)
        return out

    async def _find_images(self) -> None:
        """Where images and writable layers are, once."""
        if not self._image_path:
            self._image_path = (await self._node.image_service.image_fs_info()).mountpoint or self._node.config.root_dir

    def _images_apart(self) -> bool:
        """Whether images are on a disk of their own."""
        try:
            return os.stat(self._image_path or "/").st_dev != os.stat(self._node.config.root_dir).st_dev
        except OSError:
            return False

    # --- one round ---

    async def look(self) -> None:
        """One round: conditions, limits of local storage, at most one eviction for pressure. Raises OSError, RuntimeFault."""
        await self._find_images()
        signals, now = self.read(), clock.now()
        crossed = [t for t in self._thresholds if t.crossed(signals)]
        crossed += [t for t in self._held if t not in crossed and t.crossed(signals, reclaimed=True)]
        self._since = {t: self._since.get(t, now) for t in crossed}
        for one in crossed:
            self._seen_at[_CONDITION[one.signal]] = now
        if (pressure := self.pressure()) != self._told:
            self._told = pressure
            self._changed()
        self._held = [t for t, since in self._since.items() if now - since >= (t.grace_seconds or 0.0)]
        if await self._enforce_limits() or not self._held:
            return
        # Memory first: nothing else can end the whole machine so quickly.
        await self._relieve(min(self._held, key=lambda t: _RESOURCE[t.signal] != "memory"), signals)

    async def _relieve(self, worst: Threshold, signals: dict[str, Signal]) -> None:
        resource = _RESOURCE[worst.signal]
        self._tell("Warning", "EvictionThresholdMet", f"Attempting to reclaim {resource}")
        if self._unused_counts(worst.signal):
            await self.reclaim()
            signals = self.read()
            if not any(t.crossed(signals, reclaimed=True) for t in self._thresholds):
                return
        measured = await self._measure([w for w in self._workers.workers() if w.stage is Stage.SYNC and not w.orphan])
        seen = signals.get(worst.signal, Signal(0, 0))
        for worker, used in sorted(measured, key=lambda pair: usage.order(pair[0].pod, pair[1], resource)):
            if podutil.is_critical(worker.pod):
                continue
            text, annotations = usage.low_message(worker.pod, used, resource, worst.limit(seen.capacity), seen.available)
            grace = _IMMEDIATE_SECONDS
            if worst.grace_seconds is not None:
                own = worker.pod["spec"].get("terminationGracePeriodSeconds")
                most = self._node.config.eviction.max_pod_grace_period_seconds
                grace = most if own is None else min(most, int(own))
            self.evict(worker, worst.signal, text, max(1, grace), annotations=annotations, disruption=True)
            return

    def _unused_counts(self, signal: str) -> bool:
        """Whether this signal gets better when unused images and containers go."""
        kind = signal.partition(".")[0]
        return kind in ("imagefs", "containerfs") or (kind == "nodefs" and not self._images_apart())

    async def _measure(self, workers: list[PodWorker]) -> list[tuple[PodWorker, PodUsage]]:
        by_pod: dict[str, list[ContainerStats]] = {}
        for one in await self._node.runtime.list_container_stats():
            by_pod.setdefault(one.labels.get(podutil.POD_UID_LABEL, ""), []).append(one)
        return await asyncio.to_thread(lambda: [(w, usage.measure(self._node, w.pod, by_pod.get(w.uid, []))) for w in workers])

    async def _enforce_limits(self) -> bool:
        """Evict every pod over its limits of local storage; True when there was one."""
        limited = [w for w in self._workers.workers() if w.stage is Stage.SYNC and not w.orphan and usage.has_limits(w.pod)]
        if not limited:
            return False
        any_evicted = False
        for worker, used in await self._measure(limited):
            found = usage.over_limit(worker.pod, used)
            if found is not None and not podutil.is_critical(worker.pod):
                self.evict(worker, *found, _IMMEDIATE_SECONDS)
                any_evicted = True
        return any_evicted

    def evict(
        self, worker: PodWorker, signal: str, message: str, grace_seconds: int, *, annotations: dict[str, str] | None = None, disruption: bool = False
    ) -> None:
        """Fail a pod with reason Evicted; `disruption` marks it as a victim of the node, not of its own limits."""
        pod = worker.pod
        self._node.record(pod, "Warning", "Evicted", message, annotations=annotations)
        self._node.count(f'kubelet_evictions{{eviction_signal="{signal}"}}')
        log.info("pod evicted", pod=worker.key, signal=signal, message=message)
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "TerminationByKubelet",
            "message": message,
            "lastTransitionTime": clock.now_rfc3339(),
        }
        worker.terminate(grace_seconds, ("Evicted", message), condition if disruption else None)
