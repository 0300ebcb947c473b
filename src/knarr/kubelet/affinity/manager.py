"""Places the containers of a pod on CPUs and memory nodes when the pod is admitted, and keeps the shared pool true.

Callers: kubelet (admission, end of pods, the loop), pod_start and resize (what a container may use). What was given is in
`affinity.json` in the kubelet's folder; a restarted kubelet goes on with it. Invariant: a container starts only with what was
recorded first. When the pool of shared CPUs changes, running containers of it are moved at once.
Source: pkg/kubelet/cm/topologymanager (scope_container.go, scope_pod.go), cpumanager (cpu_manager.go reconcileState).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping

import orjson

from knarr.aiokits.log import get_logger
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.affinity import hints as topology
from knarr.kubelet.affinity import machine as machines
from knarr.kubelet.affinity import memory as memories
from knarr.kubelet.affinity.cpus import CPUManager, NotEnough, exclusive_count
from knarr.kubelet.affinity.hints import Hint, Hints
from knarr.kubelet.affinity.memory import Block, MemoryManager
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.meters import Meters
from knarr.kubelet.plugins.devices import DeviceManager, NotEnoughDevices
from knarr.runtime.cri import ContainerState, LinuxResources, RuntimeFault, RuntimeService

log = get_logger(__name__)

_FILE = "affinity.json"
_RETRY_SECONDS = 10.0
_ADMISSION_BUCKETS = tuple(0.05 * 2**i for i in range(15))


class Affinity:
    """All of it for one node; does nothing while every policy is "none"."""

    def __init__(self, config: KubeletConfig, runtime: RuntimeService, machine: machines.Machine | None = None, meters: Meters | None = None, devices: DeviceManager | None = None) -> None:
        """Raises ValueError when the configuration does not fit the machine."""
        self._meters = meters or Meters()
        self._devices = devices
        self._config = config
        self._runtime = runtime
        self._path = os.path.join(config.root_dir, _FILE)
        self.cpus: CPUManager | None = None
        self.memory: MemoryManager | None = None
        self._moved = asyncio.Event()
        """The shared pool changed, or containers appeared that do not know it."""
        self._nodes: tuple[int, ...] = ()
        if config.cpu_manager_policy == "none" and config.memory_manager_policy == "None":
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._path)
            if config.topology_manager_policy != "none":
                self._nodes = (machine or machines.read()).nodes
            return
        found = machine or machines.read()
        self._nodes = found.nodes
        cpus, blocks = self._load()
        if config.cpu_manager_policy == "static":
            self.cpus = CPUManager(found, _reserved_cpus(config, found), config.cpu_manager_options, cpus)
            self._moved.set()
        if config.memory_manager_policy == "Static":
            self.memory = MemoryManager(found, config.reserved_memory, blocks)

    # --- what was given ---

    def _load(self) -> tuple[dict[str, dict[str, frozenset[int]]], dict[str, dict[str, Block]]]:
        try:
            with open(self._path, "rb") as file:
                stored = orjson.loads(file.read())
            cpus = {uid: {name: machines.parse_cpus(text) for name, text in given.items()} for uid, given in stored["cpus"].items()}
            blocks = {
                uid: {name: Block(frozenset(one["nodes"]), dict(one["amounts"])) for name, one in given.items()} for uid, given in stored["memory"].items()
            }
        except FileNotFoundError:
            return {}, {}
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.error("record of given CPUs and memory not readable, starting without", file=self._path, error=str(error))
            return {}, {}
        return cpus, blocks

    def _save(self) -> None:
        cpus = self.cpus.assigned if self.cpus is not None else {}
        blocks = self.memory.assigned if self.memory is not None else {}
        document = {
            "cpus": {uid: {name: machines.format_cpus(own) for name, own in given.items()} for uid, given in cpus.items()},
            "memory": {uid: {name: {"nodes": sorted(b.nodes), "amounts": b.amounts} for name, b in given.items()} for uid, given in blocks.items()},
        }
        with open(self._path + ".new", "wb") as file:
            file.write(orjson.dumps(document))
        os.replace(self._path + ".new", self._path)

    def cpuset(self, uid: str, name: str) -> str:
        """CPUs that a container may use, as a list; "" when that is nobody's business."""
        if self.cpus is None:
            return ""
        own = self.cpus.of(uid, name)
        return machines.format_cpus(own if own is not None else self.cpus.shared)

    def mems(self, uid: str, name: str) -> str:
        """Memory nodes that a container may use; "" for all."""
        own = self.memory.of(uid, name) if self.memory is not None else None
        return machines.format_cpus(own) if own is not None else ""

    def pool(self) -> tuple[int, int]:
        """(CPUs that containers have for themselves, CPUs that the others share); zeros without the static policy."""
        if self.cpus is None:
            return 0, 0
        own = {cpu for given in self.cpus.assigned.values() for cpus in given.values() for cpu in cpus}
        return len(own), len(self.cpus.shared)

    def exclusive(self, uid: str, name: str = "") -> bool:
        """Whether a container (or any of the pod) has CPUs of its own; a quota would only throttle it there."""
        if self.cpus is None:
            return False
        return self.cpus.of(uid, name) is not None if name else bool(self.cpus.assigned.get(uid))

    def fixed(self, pod: Object, kinds: Iterable[str]) -> str | None:
        """Why these kinds of a pod's resources ("cpu", "memory") cannot be changed in place; None when they can."""
        changed = set(kinds) if podutil.qos_class(pod) == "Guaranteed" else set()
        if self.cpus is not None and "cpu" in changed:
            return 'Resize is infeasible for Guaranteed Pods alongside CPU Manager policy "static"'
        if self.memory is not None and "memory" in changed:
            return 'Resize is infeasible for Guaranteed Pods alongside Memory Manager policy "Static"'
        return None

    # --- admission ---

    def admit(self, pod: Object) -> tuple[str, str] | None:
        """Give a pod's containers their places; (reason, message) when that is not possible."""
        wants_devices = self._devices is not None and any(self._devices.wanted(pod, c) for c in _all(pod))
        if self.cpus is None and self.memory is None and not wants_devices:
            return None
        uid, begun = podutil.uid(pod), time.monotonic()
        before = self._given(uid)
        had_devices = self._devices is not None and self._devices.holds(uid)
        self._meters.count("kubelet_topology_manager_admission_requests_total")
        try:
            if self._config.topology_manager_scope == "pod":
                self._place_pod(pod)
            else:
                self._place_containers(pod)
        except (NotEnough, NotEnoughDevices) as error:
            self._meters.count("kubelet_topology_manager_admission_errors_total")
            if not before:
                self.release(uid)
            if self._devices is not None and not had_devices:
                self._devices.release(uid)
            reason = error.reason if isinstance(error, NotEnough) else "UnexpectedAdmissionError"
            return reason, str(error) if reason != "UnexpectedAdmissionError" else f"Allocate failed due to {error}, which is unexpected"
        finally:
            self._meters.observe("kubelet_topology_manager_admission_duration_ms", (time.monotonic() - begun) * 1000, bounds=_ADMISSION_BUCKETS)
        if self._given(uid) != before:
            self._save()
            self._moved.set()
        return None

    def _given(self, uid: str) -> tuple[dict[str, frozenset[int]], list[str]]:
        cpus = dict(self.cpus.assigned.get(uid, {})) if self.cpus is not None else {}
        return cpus, sorted(self.memory.assigned.get(uid, {})) if self.memory is not None else []

    def _place_containers(self, pod: Object) -> None:
        uid, walk = podutil.uid(pod), _Walk(pod)
        for container in walk:
            given: list[Hints] = []
            if self.cpus is not None:
                given.append(self.cpus.hints(uid, container["name"], exclusive_count(pod, container), walk.reusable))
            if self.memory is not None:
                given.append(self.memory.hints(uid, container["name"], memories.wanted(pod, container), walk.held))
            if self._devices is not None:
                given += self._devices.hints(pod, container, self._nodes)
            self._allocate(pod, container, walk, self._choose(given))
        walk.finish(self.memory)

    def _place_pod(self, pod: Object) -> None:
        """All containers by one hint, made for the pod's sum."""
        uid, walk = podutil.uid(pod), _Walk(pod)
        given: list[Hints] = []
        if self.cpus is not None:
            given.append(self.cpus.hints(uid, "", _peak({c["name"]: exclusive_count(pod, c) for c in _all(pod)}, pod), frozenset()))
        if self.memory is not None:
            kinds = {kind for c in _all(pod) for kind in memories.wanted(pod, c)}
            total = {kind: _peak({c["name"]: memories.wanted(pod, c).get(kind, 0) for c in _all(pod)}, pod) for kind in kinds}
            given.append(self.memory.hints(uid, "", total, {}))
        if self._devices is not None:
            given += [hints for container in _all(pod) for hints in self._devices.hints(pod, container, self._nodes)]
        if self._given(uid) != ({}, []):
            given = []  # placed before this kubelet started
        hint = self._choose(given)
        for container in walk:
            self._allocate(pod, container, walk, hint)
        walk.finish(self.memory)

    def _choose(self, given: list[Hints]) -> Hint:
        hint, admitted = topology.choose(self._config.topology_manager_policy, self._nodes, given)
        if not admitted:
            raise NotEnough("Resources cannot be allocated with Topology locality", "TopologyAffinityError")
        return hint

    def _allocate(self, pod: Object, container: Object, walk: _Walk, hint: Hint) -> None:
        uid, name = podutil.uid(pod), container["name"]
        if self._devices is not None:
            self._devices.place(pod, container, hint.nodes)
        if self.cpus is not None and (count := exclusive_count(pod, container)):
            with self._pinning("cpu"):
                walk.took(container, self.cpus.allocate(uid, name, count, hint.nodes, walk.reusable))
        if self.memory is not None and (amounts := memories.wanted(pod, container)):
            with self._pinning("memory"):
                self.memory.allocate(uid, name, amounts, hint.nodes, walk.held)
            walk.filled(container, amounts)

    @contextlib.contextmanager
    def _pinning(self, kind: str) -> Iterator[None]:
        """Count one container that is to be bound to places."""
        self._meters.count(f"kubelet_{kind}_manager_pinning_requests_total")
        try:
            yield
        except NotEnough:
            self._meters.count(f"kubelet_{kind}_manager_pinning_errors_total")
            raise

    def release(self, uid: str) -> None:
        """The pod has ended: its places are free."""
        had_cpus = self.cpus is not None and self.cpus.release(uid)
        had_memory = self.memory is not None and self.memory.release(uid)
        if had_cpus or had_memory:
            self._save()
        if had_cpus:
            self._moved.set()

    def keep(self, uids: Iterable[str]) -> None:
        """At start: what belongs to none of these pods is free."""
        known = set(uids)
        given = {*(self.cpus.assigned if self.cpus is not None else ()), *(self.memory.assigned if self.memory is not None else ())}
        for uid in given - known:
            self.release(uid)

    # --- the shared pool ---

    async def run(self) -> None:
        """Move running containers when the shared pool changes. Eternal."""
        while True:
            await self._moved.wait()
            self._moved.clear()
            if self.cpus is not None and not await self._reconcile():
                await asyncio.sleep(_RETRY_SECONDS)
                self._moved.set()

    async def _reconcile(self) -> bool:
        """Whether every running container has the CPUs that it should."""
        good = True
        try:
            running = [c for c in await self._runtime.list_containers() if c.state is ContainerState.RUNNING]
        except RuntimeFault as error:
            log.warning("containers not listed", error=str(error))
            return False
        for container in running:
            uid = container.labels.get(podutil.POD_UID_LABEL, "")
            wanted = self.cpuset(uid, container.labels.get(podutil.CONTAINER_NAME_LABEL, ""))
            if not uid or not wanted or (container.resources is not None and container.resources.cpuset_cpus == wanted):
                continue
            try:
                await self._runtime.update_container_resources(container.id, LinuxResources(cpuset_cpus=wanted, oom_score_adj=None))
            except RuntimeFault as error:
                good = False
                log.warning("container not moved to other CPUs", container=container.id, cpus=wanted, error=str(error))
        return good


class _Walk:
    """A pod's containers in the order in which they start, and what those before leave to those after."""

    def __init__(self, pod: Object) -> None:
        self._pod = pod
        self._ordinary = {c["name"] for c in podutil.init_containers(pod) if not podutil.is_sidecar(c)}
        self.reusable: frozenset[int] = frozenset()
        """CPUs of init containers that will have ended."""
        self.held: dict[str, int] = {}
        """Bytes by kind of containers that go on beside the next one."""

    def __iter__(self):  # type: ignore[no-untyped-def]
        return iter(_all(self._pod))

    def took(self, container: Object, cpus: frozenset[int]) -> None:
        if container["name"] in self._ordinary:
            self.reusable |= cpus
        else:
            self.reusable -= cpus

    def filled(self, container: Object, amounts: Mapping[str, int]) -> None:
        if container["name"] not in self._ordinary:
            for kind, amount in amounts.items():
                self.held[kind] = self.held.get(kind, 0) + amount

    def finish(self, memory: MemoryManager | None) -> None:
        """Count of init containers only what the others together do not have anyway."""
        if memory is None:
            return
        given = memory.assigned.get(podutil.uid(self._pod), {})
        kinds = {kind for block in given.values() for kind in block.amounts}
        for kind in kinds:
            blocks = sorted((given[name] for name in self._ordinary if name in given), key=lambda b: -b.amounts.get(kind, 0))
            for index, block in enumerate(blocks):
                block.amounts[kind] = max(0, block.amounts.get(kind, 0) - self.held.get(kind, 0)) if index == 0 else 0


def _all(pod: Object) -> list[Object]:
    return [*podutil.init_containers(pod), *podutil.containers(pod)]


def _peak(amounts: Mapping[str, int], pod: Object) -> int:
    """The most that a pod's containers need at one time."""
    beside = peak = 0
    for container in podutil.init_containers(pod):
        need = amounts[container["name"]]
        peak = max(peak, beside + need)
        beside += need if podutil.is_sidecar(container) else 0
    return max(peak, beside + sum(amounts[c["name"]] for c in podutil.containers(pod)))


def _reserved_cpus(config: KubeletConfig, machine: machines.Machine) -> frozenset[int]:
    """The CPUs that stay shared. Raises ValueError when none are."""
    from knarr.kubelet.affinity.cpus import take

    if config.reserved_system_cpus:
        chosen = machines.parse_cpus(config.reserved_system_cpus)
        if not chosen <= set(machine.cpus):
            raise ValueError(f"reservedSystemCPUs {config.reserved_system_cpus!r} are not all CPUs of this machine ({machines.format_cpus(machine.cpus)})")
        return chosen
    millis = sum(quantity.cpu_millicores(r["cpu"]) for r in (config.system_reserved, config.kube_reserved) if "cpu" in r)
    if not millis:
        raise ValueError("the static CPU manager policy needs CPUs reserved for the system: kubeReserved, systemReserved or reservedSystemCPUs")
    return take(machine, frozenset(machine.cpus), min(len(machine.cpus), -(-millis // 1000)))
