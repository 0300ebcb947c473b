"""In-place resize of running containers: notices a changed spec, updates cgroups, reports conditions.

Callers: pod_sync (pending, apply, fill). Invariant: what a container's cgroup has is read from the runtime, so a restart of the
kubelet in the middle changes nothing. Source: KEP-1287, pkg/kubelet/kuberuntime doPodResizeAction, pkg/kubelet/allocation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil, resources
from knarr.kubelet.node import Node
from knarr.kubelet.observed import Observed
from knarr.kubelet.status import StatusInput
from knarr.runtime.cri import ContainerState, ContainerStatus, LinuxResources, RuntimeFault

log = get_logger(__name__)


class Resizes:
    """In-place changes of resources on this node."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._errors: dict[str, str] = {}
        """Pod uid to why its last resize could not be carried out."""
        self._running: set[str] = set()

    def _wanted(self, pod: Object, spec: Object) -> LinuxResources:
        node = self._node
        return resources.container_limits(
            pod, spec, node.capacity.memory_bytes, enforce_cpu=node.config.enforce_cpu_limits, group_oom=node.cgroups.is_v2
        )

    def _differs(self, pod: Object, spec: Object, status: ContainerStatus) -> bool:
        return resources.differs(self._wanted(pod, spec), status.resources)

    def pending(self, pod: Object, observed: Observed) -> dict[str, Literal["update", "restart"]]:
        """Containers whose cgroup is out of step with the spec, and how to bring it there."""
        out: dict[str, Literal["update", "restart"]] = {}
        for spec in (*podutil.containers(pod), *(c for c in podutil.init_containers(pod) if podutil.is_sidecar(c))):
            status = observed.latest(spec["name"])
            if status is None or status.state is not ContainerState.RUNNING or not self._differs(pod, spec, status):
                continue
            actual = status.resources
            assert actual is not None
            wanted = self._wanted(pod, spec)
            policies = {p["resourceName"]: p.get("restartPolicy") for p in spec.get("resizePolicy") or []}
            cpu = wanted.cpu_shares != actual.cpu_shares or wanted.cpu_quota_us != max(actual.cpu_quota_us, 0)
            memory = wanted.memory_limit_bytes != max(actual.memory_limit_bytes, 0)
            restart = (cpu and policies.get("cpu") == "RestartContainer") or (memory and policies.get("memory") == "RestartContainer")
            out[spec["name"]] = "restart" if restart else "update"
        uid = podutil.uid(pod)
        if out:
            self._running.add(uid)
        elif uid in self._running:
            self._running.discard(uid)
            self._errors.pop(uid, None)
            self._node.event(pod, "Normal", "ResizeCompleted", f"Pod resize completed: {_summary(pod)}")
        return out

    async def apply(self, worker: object, names: Sequence[str], observed: Observed) -> bool:
        """Write new limits; the pod's own group first when it grows, last when it shrinks."""
        pod: Object = worker.pod  # type: ignore[attr-defined]
        node, done = self._node, False
        try:
            if node.config.cgroups_per_qos:
                node.cgroups.update_pod(pod)
            for name in names:
                status, spec = observed.latest(name), podutil.container(pod, name)
                if status is None or spec is None:
                    continue
                wanted = self._wanted(pod, spec)
                wanted.oom_score_adj = None
                await node.runtime.update_container_resources(status.id, wanted)
                done = True
            self._errors.pop(podutil.uid(pod), None)
        except (RuntimeFault, OSError) as e:
            self._errors[podutil.uid(pod)] = str(e)
            log.warning("resize failed", pod=podutil.key(pod), error=str(e))
            worker.wake_after(10.0)  # type: ignore[attr-defined]
        return done

    def fill(self, pod: Object, observed: Observed, given: StatusInput) -> None:
        """Add to a status what running containers really have, and the resize conditions."""
        generation = pod["metadata"].get("generation") or 0
        waiting = False
        actuated: dict[str, Object] = {}
        for spec in podutil.containers(pod):
            status = observed.latest(spec["name"])
            if status is None or status.state is not ContainerState.RUNNING or status.resources is None:
                continue
            if self._differs(pod, spec, status):
                waiting = True
                actuated[spec["name"]] = _shown(spec, status.resources)
        given.actuated = actuated
        if waiting and not given.terminal:
            error = self._errors.get(podutil.uid(pod))
            condition: Object = {"type": "PodResizeInProgress", "status": "True", "observedGeneration": generation}
            if error:
                condition.update(reason="Error", message=error)
            given.resize_conditions = [condition]


def _shown(spec: Object, actual: LinuxResources) -> Object:
    """The container's resources in wire form with what its cgroup has."""
    out: Object = {k: dict(v) for k, v in (spec.get("resources") or {}).items() if isinstance(v, dict)}
    limits, requests = out.get("limits") or {}, out.get("requests") or {}
    if "cpu" in limits and actual.cpu_quota_us > 0:
        millis = actual.cpu_quota_us * 1000 // (actual.cpu_period_us or resources.PERIOD_US)
        limits["cpu"] = f"{millis}m" if millis % 1000 else str(millis // 1000)
    if "memory" in limits and actual.memory_limit_bytes > 0:
        limits["memory"] = str(actual.memory_limit_bytes)
    if "cpu" in requests and actual.cpu_shares > 2:
        millis = -(-actual.cpu_shares * 1000 // 1024)
        requests["cpu"] = f"{millis}m" if millis % 1000 else str(millis // 1000)
    return out


def _summary(pod: Object) -> str:
    import orjson

    containers = [{"name": c["name"], "resources": c.get("resources") or {}} for c in podutil.containers(pod)]
    return orjson.dumps({"containers": containers, "generation": pod["metadata"].get("generation", 0)}).decode()
