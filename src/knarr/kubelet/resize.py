"""In-place resize of running containers: allocates what fits, updates cgroups, reports conditions.

Callers: pods (allocated: which resources of a changed spec are in force), pod_sync (pending, apply, fill). Invariants: what is
allocated is on disk beside the pod; what a container's cgroup has is read from the runtime, so a restart of the kubelet in the
middle changes nothing. Source: KEP-1287, pkg/kubelet/allocation, pkg/kubelet/kuberuntime doPodResizeAction.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Literal

import orjson

from knarr.aiokits.log import get_logger
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil, resources
from knarr.kubelet.node import Node
from knarr.kubelet.observed import Observed
from knarr.kubelet.status import StatusInput
from knarr.runtime.cri import ContainerState, ContainerStatus, LinuxResources, RuntimeFault

if TYPE_CHECKING:
    from knarr.kubelet.pod_worker import PodWorker

log = get_logger(__name__)

_RETRY_SECONDS = 10.0
_RESIZE_BUCKETS = (10, 50, 100, 500, 1000, 2000, 5000, 10000, 20000, 30000, 60000, 120000, 300000, 600000)
_QOS_ORDER = ("Guaranteed", "Burstable", "BestEffort")
RESOURCES_ANNOTATION = "io.kubernetes.container.resources"
"""What a container asked for when it was made."""


class Resizes:
    """In-place changes of resources on this node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._errors: dict[str, str] = {}
        """Pod uid to why its last resize could not be carried out."""
        self._running: dict[str, float] = {}
        """Pod uid to when (monotonic) its resize began to be carried out."""
        self._allocated: dict[str, dict[str, Object]] = {}
        """Pod uid to container name to the resources in force."""
        self._waiting: dict[str, tuple[str, str, Object]] = {}
        """Pod uid to (reason, message, pod) of a resize that was not granted."""
        self.trigger = ""
        """Why resizes that wait are looked at again, for the metrics."""
        self._given: dict[str, Object] = {}
        """Container id to the resources that it was given since it was made."""

    # --- allocation ---

    def _file(self, uid: str) -> str:
        return os.path.join(self._node.config.pods_dir, uid, "allocated.json")

    def _load(self, uid: str) -> dict[str, Object] | None:
        if uid not in self._allocated:
            try:
                with open(self._file(uid), "rb") as file:
                    self._allocated[uid] = orjson.loads(file.read())
            except (OSError, ValueError):
                return None
        return self._allocated[uid]

    def _store(self, pod: Object) -> None:
        uid = podutil.uid(pod)
        self._allocated[uid] = _resources_of(pod)
        path = self._file(uid)
        try:
            os.makedirs(os.path.dirname(path), 0o750, exist_ok=True)
            with open(path + ".new", "wb") as file:
                file.write(orjson.dumps(self._allocated[uid]))
            os.replace(path + ".new", path)
        except OSError as e:
            log.warning("allocated resources not recorded", pod=podutil.key(pod), error=str(e))

    def allocated(self, pod: Object, others: Iterable[Object], admit: Callable[[Object, Iterable[Object]], tuple[str, str] | None]) -> Object:
        """The pod as it is in force: its own spec, with the resources of before when the new ones do not fit.

        Args:
          admit: the node's resource check, asked with the wanted pod and the others.
        """
        uid = podutil.uid(pod)
        held = self._load(uid)
        if held is None:
            if _may_resize(pod):
                self._allocated[uid] = _resources_of(pod)
            return pod
        if held == _resources_of(pod):
            self._waiting.pop(uid, None)
            return pod
        refusal = self._refusal(pod, [p for p in others if podutil.uid(p) != uid], admit)
        self._count(uid, held, _resources_of(pod), refusal)
        if refusal is None:
            self._waiting.pop(uid, None)
            self._store(pod)
            return pod
        self._waiting[uid] = (*refusal, pod)
        return _with_resources(pod, held)

    def _count(self, uid: str, held: dict[str, Object], asked: dict[str, Object], refusal: tuple[str, str] | None) -> None:
        """Note in the metrics what was asked for and what became of it, once."""
        node, waited = self._node, self._waiting.get(uid)
        if waited is not None:
            if refusal is None and waited[0] == "Deferred":
                node.count(f'kubelet_pod_deferred_accepted_resizes_total{{retry_trigger="{self.trigger}"}}')
            return
        if refusal is not None and refusal[0] == "Infeasible":
            node.count('kubelet_pod_infeasible_resizes_total{reason_detail="insufficient_node_allocatable"}')
        for name, new in asked.items():
            for kind in ("requests", "limits"):
                for resource in ("cpu", "memory"):
                    before, after = resources.amount(held.get(name), kind, resource), resources.amount(new, kind, resource)
                    if before != after:
                        change = "add" if before is None else "remove" if after is None else "increase" if after > before else "decrease"
                        labels = f'operation_type="{change}",requirement="{kind}",resource="{resource}"'
                        node.count(f"kubelet_container_requested_resizes_total{{{labels}}}")

    def _refusal(
        self, pod: Object, others: list[Object], admit: Callable[[Object, Iterable[Object]], tuple[str, str] | None]
    ) -> tuple[str, str] | None:
        if podutil.is_static(pod):
            return "Infeasible", "In-place resize of static-pods is not supported"
        held, asked = self._allocated.get(podutil.uid(pod), {}), _resources_of(pod)
        changed = {
            kind for kind in ("cpu", "memory") for name, new in asked.items() if resources.amount(new, "requests", kind) != resources.amount(held.get(name), "requests", kind)
        }
        if (fixed := self._node.affinity.fixed(pod, changed)) is not None:
            return "Infeasible", fixed
        requests, _ = resources.pod_totals(pod)
        allocatable = self._node.capacity.allocatable
        room = {"memory": quantity.value(allocatable["memory"]), "cpu": quantity.cpu_millicores(allocatable["cpu"])}
        for name in ("memory", "cpu"):
            if requests[name] > room[name]:
                return "Infeasible", f"Node didn't have enough capacity: {name}, requested: {requests[name]}, capacity: {room[name]}"
        refused = admit(pod, others)
        return ("Deferred", refused[1]) if refused is not None else None

    def in_progress(self) -> int:
        """Pods whose resize is granted and not yet carried out."""
        return len(self._running)

    def deferred(self) -> list[Object]:
        """Pods whose resize waits for room, in the order in which room is to be given; look at them again when there is some."""
        waiting = [pod for reason, _, pod in self._waiting.values() if reason == "Deferred"]
        # Of equal ones the first to wait is first: the order of the entries.
        return sorted(waiting, key=lambda pod: (-(pod["spec"].get("priority") or 0), _QOS_ORDER.index(podutil.qos_class(pod))))

    def forget(self, uid: str) -> None:
        """The pod is gone."""
        for store in (self._allocated, self._waiting, self._errors):
            store.pop(uid, None)
        self._running.pop(uid, None)

    def forget_container(self, container_id: str) -> None:
        """The container is gone."""
        self._given.pop(container_id, None)

    # --- actuation ---

    def _wanted(self, pod: Object, spec: Object) -> LinuxResources:
        node = self._node
        enforce_cpu = node.config.enforce_cpu_limits and not node.affinity.exclusive(podutil.uid(pod), spec["name"])
        wanted = resources.container_limits(
            pod, spec, node.capacity.memory_bytes, enforce_cpu=enforce_cpu, group_oom=node.cgroups.is_v2
        )
        if wanted.memory_limit_bytes and node.cgroups.swap_accounting():
            # Memory and swap together may never be less than memory alone.
            wanted.memory_swap_limit_bytes = wanted.memory_limit_bytes
        return wanted

    def _differs(self, pod: Object, spec: Object, status: ContainerStatus) -> bool:
        cpu, memory = self._changes(spec, status)
        return cpu or memory or resources.differs(self._wanted(pod, spec), status.resources)

    def _changes(self, spec: Object, status: ContainerStatus) -> tuple[bool, bool]:
        """Whether (cpu, memory) are asked for differently than this container was given them."""
        held = self._given.get(status.id)
        if held is None:
            text = status.annotations.get(RESOURCES_ANNOTATION)
            if text is None:
                return False, False
            held = orjson.loads(text)
        wanted = spec.get("resources") or {}
        cpu, memory = (
            any(resources.amount(wanted, kind, name) != resources.amount(held, kind, name) for kind in ("requests", "limits"))
            for name in ("cpu", "memory")
        )
        return cpu, memory

    def pending(self, pod: Object, observed: Observed) -> dict[str, Literal["update", "restart"]]:
        """Containers that are out of step with the spec, and how to bring them there."""
        out: dict[str, Literal["update", "restart"]] = {}
        for spec in _resizable(pod):
            status = observed.latest(spec["name"])
            if status is None or status.state is not ContainerState.RUNNING:
                continue
            cpu, memory = self._changes(spec, status)
            drifted = resources.differs(self._wanted(pod, spec), status.resources)
            policies = {p["resourceName"]: p.get("restartPolicy") for p in spec.get("resizePolicy") or []}
            if (cpu and policies.get("cpu") == "RestartContainer") or (memory and policies.get("memory") == "RestartContainer"):
                out[spec["name"]] = "restart"
            elif cpu or memory or drifted:
                out[spec["name"]] = "update"
        uid = podutil.uid(pod)
        if out:
            self._running.setdefault(uid, time.monotonic())
        elif uid in self._running:
            took = (time.monotonic() - self._running.pop(uid)) * 1000
            self._node.meters.observe("kubelet_pod_resize_duration_milliseconds", took, 'success="true"', _RESIZE_BUCKETS)
            self._errors.pop(uid, None)
            self._node.event(pod, "Normal", "ResizeCompleted", f"Pod resize completed: {_summary(pod)}")
        return out

    async def apply(self, worker: PodWorker, names: Sequence[str], observed: Observed) -> bool:
        """Write new limits to the pod's own group and to its containers'; True when a container was changed."""
        from knarr.kubelet import pod_sync

        node, pod, done = self._node, worker.pod, False
        try:
            await self._hold_above_usage(pod, names, observed)
            if node.config.cgroups_per_qos:
                node.cgroups.update_pod(pod)
            for name in names:
                status, spec = observed.latest(name), podutil.container(pod, name)
                if status is None or spec is None:
                    continue
                wanted = self._wanted(pod, spec)
                wanted.oom_score_adj = None
                await node.runtime.update_container_resources(status.id, wanted)
                self._given[status.id] = spec.get("resources") or {}
                done = True
            if node.config.cgroups_per_qos:
                # Once more: a group cannot shrink below what its children had.
                node.cgroups.update_pod(pod)
            self._errors.pop(podutil.uid(pod), None)
        except (RuntimeFault, OSError) as e:
            self._errors[podutil.uid(pod)] = str(e)
            log.warning("resize failed", pod=podutil.key(pod), error=str(e))
            pod_sync.publish(worker, observed)
            worker.wake_after(_RETRY_SECONDS)
        return done

    async def _hold_above_usage(self, pod: Object, names: Sequence[str], observed: Observed) -> None:
        """Refuse to take memory away that is in use: the kernel would kill for it. Raises RuntimeFault."""
        lowered = {}
        for name in names:
            status, spec = observed.latest(name), podutil.container(pod, name)
            if status is None or spec is None or status.resources is None:
                continue
            wanted, held = self._wanted(pod, spec).memory_limit_bytes, status.resources.memory_limit_bytes
            if wanted and (held <= 0 or wanted < held):
                lowered[status.id] = (name, wanted)
        if not lowered:
            return
        for stats in await self._node.runtime.list_container_stats({podutil.POD_UID_LABEL: podutil.uid(pod)}):
            if stats.id in lowered and stats.memory_usage_bytes >= lowered[stats.id][1]:
                name, wanted = lowered[stats.id]
                why = f'attempting to set container "{name}" memory limit ({wanted}) below current usage ({stats.memory_usage_bytes})'
                raise RuntimeFault(f"cannot decrease memory limits: {why}")

    def fill(self, pod: Object, observed: Observed, given: StatusInput) -> None:
        """Add to a status what running containers really have, and the resize conditions."""
        generation = pod["metadata"].get("generation") or 0
        waiting = False
        actuated: dict[str, Object] = {}
        for spec in _resizable(pod):
            status = observed.latest(spec["name"])
            if status is None or status.state is not ContainerState.RUNNING or status.resources is None:
                continue
            if self._differs(pod, spec, status):
                waiting = True
                actuated[spec["name"]] = _shown(spec, status.resources)
        given.actuated = actuated
        if given.terminal:
            return
        held = self._waiting.get(podutil.uid(pod))
        if held is not None:
            pending: Object = {"type": "PodResizePending", "status": "True", "reason": held[0], "message": held[1]}
            pending["observedGeneration"] = held[2]["metadata"].get("generation") or generation
            given.resize_conditions = [pending]
        if waiting:
            error = self._errors.get(podutil.uid(pod))
            condition: Object = {"type": "PodResizeInProgress", "status": "True", "observedGeneration": generation}
            if error:
                condition.update(reason="Error", message=error)
            given.resize_conditions = [*given.resize_conditions, condition]


def _shown(spec: Object, actual: LinuxResources) -> Object:
    """The container's resources in wire form with what its cgroup has."""
    out: Object = {k: dict(v) for k, v in (spec.get("resources") or {}).items() if isinstance(v, dict)}
    limits, requests = out.get("limits") or {}, out.get("requests") or {}
    if "cpu" in limits and actual.cpu_quota_us > 0:
        millis = actual.cpu_quota_us * 1000 // (actual.cpu_period_us or resources.PERIOD_US)
        limits["cpu"] = f"{millis}m" if millis % 1000 else str(millis // 1000)
    if "memory" in limits and actual.memory_limit_bytes > 0:
        limits["memory"] = quantity.format(actual.memory_limit_bytes, "BinarySI")
    if "cpu" in requests and actual.cpu_shares > 2:
        millis = -(-actual.cpu_shares * 1000 // 1024)
        requests["cpu"] = f"{millis}m" if millis % 1000 else str(millis // 1000)
    return out


def _resizable(pod: Object) -> list[Object]:
    return [*podutil.containers(pod), *(c for c in podutil.init_containers(pod) if podutil.is_sidecar(c))]


def _may_resize(pod: Object) -> bool:
    return not podutil.is_terminal_phase(podutil.phase(pod))


def _resources_of(pod: Object) -> dict[str, Object]:
    specs = (*podutil.containers(pod), *podutil.init_containers(pod))
    out = {c["name"]: c.get("resources") or {} for c in specs}
    if pod["spec"].get("resources"):
        out[""] = pod["spec"]["resources"]
    return out


def _with_resources(pod: Object, held: dict[str, Object]) -> Object:
    spec = dict(pod["spec"])
    for kind in ("containers", "initContainers"):
        if spec.get(kind):
            spec[kind] = [{**c, "resources": held.get(c["name"], c.get("resources") or {})} for c in spec[kind]]
    if "" in held:
        spec["resources"] = held[""]
    return {**pod, "spec": spec}


def _summary(pod: Object) -> str:
    containers = [{"name": c["name"], "resources": c.get("resources") or {}} for c in podutil.containers(pod)]
    return orjson.dumps({"containers": containers, "generation": pod["metadata"].get("generation", 0)}).decode()
