"""Node-pressure eviction: watches memory, disk, inodes and pids, and ends pods before the kernel has to.

Caller: kubelet (`run` eternal, `pressure` for the node's conditions, `admit` for new pods). Every ten seconds signals are read;
a hard threshold crossed evicts one pod at once, a soft one after its grace period. Also enforced here: size limits of emptyDir
volumes and of ephemeral storage. Source: pkg/kubelet/eviction.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import machine, podutil, resources, sandboxes
from knarr.kubelet.node import Node
from knarr.kubelet.pod_worker import PodWorker, Stage
from knarr.kubelet.pods import PodWorkers

log = get_logger(__name__)

_CONDITION = {
    "memory.available": "MemoryPressure",
    "nodefs.available": "DiskPressure",
    "nodefs.inodesFree": "DiskPressure",
    "imagefs.available": "DiskPressure",
    "imagefs.inodesFree": "DiskPressure",
    "containerfs.available": "DiskPressure",
    "pid.available": "PIDPressure",
}
_RESOURCE = {
    "memory.available": "memory",
    "nodefs.available": "ephemeral-storage",
    "imagefs.available": "ephemeral-storage",
    "nodefs.inodesFree": "inodes",
    "imagefs.inodesFree": "inodes",
    "pid.available": "pids",
}


@dataclass(frozen=True, slots=True)
class Signal:
    """One observation: how much there is and how much is left."""

    available: int
    capacity: int


def threshold(text: str, capacity: int) -> int:
    """A threshold in the signal's unit."""
    return int(capacity * float(text[:-1]) / 100) if text.endswith("%") else quantity.value(text)


class Eviction:
    """Keeps the node from running out of what cannot be shared."""

    def __init__(self, node: Node, workers: PodWorkers, changed: Callable[[], None]) -> None:
        self._node = node
        self._workers = workers
        self._changed = changed
        self._seen_at: dict[str, float] = {}
        """Condition to the last time that it held."""
        self._since: dict[str, float] = {}
        """Soft signal to the time since which it is crossed."""
        self.read: Callable[[], dict[str, Signal]] = self._read
        self.reclaim: Callable[[int], object] | None = None

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
            for toleration in pod["spec"].get("tolerations") or []:
                if toleration.get("key") == "node.kubernetes.io/memory-pressure" and toleration.get("effect") in (None, "", "NoSchedule"):
                    return None
        return "Evicted", f"The node had condition: [{' '.join(held)}]. "

    async def run(self) -> None:
        """Look, and act, for ever."""
        while True:
            await asyncio.sleep(self._node.config.eviction.interval_seconds)
            try:
                await self.look()
            except OSError as e:
                log.warning("eviction signals not read", error=str(e))

    def _read(self) -> dict[str, Signal]:
        memory = machine.memory_info()
        root = machine.disk(self._node.config.root_dir)
        total = memory.get("MemTotal", 0)
        pid_max = int(machine.read_text("/proc/sys/kernel/pid_max") or 32768)
        load = machine.read_text("/proc/loadavg").split()
        running = int(load[3].partition("/")[2]) if len(load) > 3 else 0
        out = {
            "memory.available": Signal(self._memory_available(memory), total),
            "nodefs.available": Signal(root.available, root.capacity),
            "imagefs.available": Signal(root.available, root.capacity),
            "pid.available": Signal(pid_max - running, pid_max),
        }
        if root.inodes:
            out["nodefs.inodesFree"] = Signal(root.inodes_free, root.inodes)
            out["imagefs.inodesFree"] = Signal(root.inodes_free, root.inodes)
        return out

    @staticmethod
    def _memory_available(memory: dict[str, int]) -> int:
        """Capacity less the working set: what the kernel can give without pushing out active pages."""
        return memory.get("MemAvailable", memory.get("MemFree", 0))

    async def look(self) -> None:
        """One round: conditions, at most one eviction for pressure, and size limits. Raises OSError."""
        config, now = self._node.config.eviction, clock.now()
        signals = self.read()
        before = self.pressure()
        crossed: list[tuple[str, bool]] = []
        for name, text in config.hard.items():
            signal = signals.get(name)
            if signal is not None and signal.available < threshold(text, signal.capacity):
                crossed.append((name, True))
        for name, text in config.soft.items():
            signal = signals.get(name)
            if signal is None or signal.available >= threshold(text, signal.capacity):
                self._since.pop(name, None)
                continue
            since = self._since.setdefault(name, now)
            if now - since >= config.soft_grace_period_seconds.get(name, 0):
                crossed.append((name, False))
        for name, _ in crossed:
            self._seen_at[_CONDITION.get(name, "DiskPressure")] = now
        if self.pressure() != before:
            self._changed()
        if not await self._enforce_limits() and crossed:
            await self._evict_one(sorted(crossed, key=lambda c: c[0] != "memory.available")[0], signals)

    async def _evict_one(self, crossed: tuple[str, bool], signals: dict[str, Signal]) -> None:
        name, hard = crossed
        resource = _RESOURCE.get(name, "ephemeral-storage")
        if resource in ("ephemeral-storage", "inodes") and self.reclaim is not None:
            text = self._node.config.eviction.hard.get(name, "0")
            signal = signals[name]
            missing = threshold(text, signal.capacity) - signal.available
            freed = await self.reclaim(missing)  # type: ignore[misc]
            if isinstance(freed, int) and freed >= missing > 0:
                return
        ranked = await asyncio.to_thread(self._ranked, resource)
        for worker, usage in ranked:
            if podutil.is_critical(worker.pod):
                continue
            signal = signals[name]
            text = (self._node.config.eviction.hard if hard else self._node.config.eviction.soft).get(name, "0")
            limit = threshold(text, signal.capacity)
            message = f"The node was low on resource: {resource}. Threshold quantity: {_bytes(limit)}, available: {_bytes(signal.available)}. "
            message += self._usage_message(worker.pod, resource, usage)
            grace = 1 if hard else min(self._node.config.eviction.max_pod_grace_period_seconds, 30)
            self.evict(worker, message, max(1, grace))
            return

    @staticmethod
    def _usage_message(pod: Object, resource: str, usage: int) -> str:
        parts = []
        for container in podutil.containers(pod):
            request = resources.amount(container.get("resources"), "requests", resource) or 0
            if usage > request:
                parts.append(f"Container {container['name']} was using {_bytes(usage)}, request is {_bytes(request) if request else '0'}, has larger consumption of {resource}. ")
        return "".join(parts)

    def evict(self, worker: PodWorker, message: str, grace_seconds: int, *, disruption: bool = True) -> None:
        """Fail a pod with reason Evicted; `disruption` marks it as a victim of the node, not of its own limits."""
        pod = worker.pod
        self._node.event(pod, "Warning", "Evicted", message)
        self._node.count("kubelet_evictions")
        log.info("pod evicted", pod=worker.key, message=message)
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "TerminationByKubelet",
            "message": message,
            "lastTransitionTime": clock.now_rfc3339(),
        }
        worker.terminate(grace_seconds, ("Evicted", message), condition if disruption else None)

    def _ranked(self, resource: str) -> list[tuple[PodWorker, int]]:
        """Running pods in the order of their eviction: over their request first, lowest priority first, biggest first."""
        out = []
        for worker in self._workers.workers():
            if worker.stage is not Stage.SYNC or worker.orphan:
                continue
            usage = self._usage(worker, resource)
            request = resources.pod_totals(worker.pod)[0].get(resource, 0)
            out.append((usage <= request, worker.pod["spec"].get("priority") or 0, request - usage, worker, usage))
        out.sort(key=lambda entry: entry[:3])
        return [(worker, usage) for _, _, _, worker, usage in out]

    def _usage(self, worker: PodWorker, resource: str) -> int:
        if resource == "memory":
            return self._node.cgroups.memory_usage(self._node.cgroups.pod_path(worker.pod))[1]
        if resource == "pids":
            return self._node.cgroups.process_count(self._node.cgroups.pod_path(worker.pod))
        return self.storage(worker)[0]

    def storage(self, worker: PodWorker) -> tuple[int, dict[str, int]]:
        """Bytes on the node's disk of a pod's volumes and logs together, and of each volume. Walks files."""
        volumes = {}
        for volume in worker.pod["spec"].get("volumes") or []:
            path = self._node.volumes.usage_paths(worker.pod).get(volume["name"])
            if path and "emptyDir" in volume:
                volumes[volume["name"]] = tree_bytes(path)
        on_disk = sum(
            size
            for name, size in volumes.items()
            if next((v["emptyDir"] or {} for v in worker.pod["spec"]["volumes"] if v["name"] == name), {}).get("medium", "") == ""
        )
        return on_disk + tree_bytes(sandboxes.log_directory(self._node.config, worker.pod)), volumes

    async def _enforce_limits(self) -> bool:
        """Evict pods over their size limits; True when one was."""
        for worker in self._workers.workers():
            if worker.stage is not Stage.SYNC or worker.orphan or not _has_limits(worker.pod):
                continue
            message = await self._over_limit(worker)
            if message:
                self.evict(worker, message, 1, disruption=False)
                return True
        return False

    async def _over_limit(self, worker: PodWorker) -> str | None:
        pod = worker.pod
        total, volumes = await asyncio.to_thread(self.storage, worker)
        for volume in pod["spec"].get("volumes") or []:
            limit = (volume.get("emptyDir") or {}).get("sizeLimit")
            if limit and volumes.get(volume["name"], 0) > quantity.value(limit) > 0:
                return f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
        layers = {}
        for stats in await self._node.runtime.list_container_stats({podutil.POD_UID_LABEL: worker.uid}):
            layers[stats.metadata.name] = stats.writable_layer_bytes
        for container in podutil.containers(pod):
            limit = ((container.get("resources") or {}).get("limits") or {}).get("ephemeral-storage")
            logs_used = tree_bytes(os.path.join(sandboxes.log_directory(self._node.config, pod), container["name"]))
            if limit and layers.get(container["name"], 0) + logs_used > quantity.value(limit):
                return f'Container {container["name"]} exceeded its local ephemeral storage limit "{limit}". '
        pod_limit = resources.pod_totals(pod)[1]["ephemeral-storage"]
        if pod_limit and total + sum(layers.values()) > pod_limit:
            return f"Pod ephemeral local storage usage exceeds the total limit of containers {_bytes(pod_limit)}. "
        return None


def _has_limits(pod: Object) -> bool:
    if any((v.get("emptyDir") or {}).get("sizeLimit") for v in pod["spec"].get("volumes") or []):
        return True
    return any("ephemeral-storage" in ((c.get("resources") or {}).get("limits") or {}) for c in podutil.containers(pod))


def _bytes(number: int) -> str:
    return quantity.format(number, "BinarySI")


def tree_bytes(path: str) -> int:
    """Disk blocks used below a path; links are not followed."""
    total, stack = 0, [path]
    while stack:
        try:
            with os.scandir(stack.pop()) as entries:
                for entry in entries:
                    try:
                        info = entry.stat(follow_symlinks=False)
                    except OSError:
                        continue
                    total += info.st_blocks * 512
                    if entry.is_dir(follow_symlinks=False):
                        stack.append(entry.path)
        except OSError:
            continue
    return total
