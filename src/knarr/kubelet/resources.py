"""Kernel limits computed from resource requests and limits. Pure.

Callers: cgroups (pod and QoS groups), containers (each container), resize. Units: CPU in millicores, memory in bytes.
Source: pkg/kubelet/cm/helpers_linux.go, pkg/kubelet/qos/policy.go, kuberuntime_container_linux.go.
"""

from __future__ import annotations

from collections.abc import Mapping

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.runtime.cri import LinuxResources

PERIOD_US = 100_000
_MIN_QUOTA_US = 1000
_MIN_SHARES = 2
_MAX_SHARES = 262_144


def cpu_shares(millicores: int) -> int:
    """Weight of a CPU request in the cgroup v1 scale."""
    if millicores == 0:
        return _MIN_SHARES
    return max(_MIN_SHARES, min(_MAX_SHARES, millicores * 1024 // 1000))


def cpu_quota(millicores: int) -> int:
    """CPU time per period in microseconds; 0 for no limit."""
    return max(_MIN_QUOTA_US, millicores * PERIOD_US // 1000) if millicores else 0


def amount(resources: Object | None, kind: str, name: str) -> int | None:
    """One request or limit in its unit; None when it is not set."""
    raw = ((resources or {}).get(kind) or {}).get(name)
    if raw is None:
        return None
    return quantity.cpu_millicores(raw) if name == "cpu" else quantity.value(raw)


def oom_score_adj(pod: Object, container: Object, memory_capacity_bytes: int) -> int:
    """How readily the kernel kills this container when memory runs out."""
    if podutil.is_critical(pod) and (pod["spec"].get("priority") or 0) >= 2_000_001_000:
        return -997
    qos = podutil.qos_class(pod)
    if qos == "Guaranteed":
        return -997
    if qos == "BestEffort":
        return 1000
    request = amount(container.get("resources"), "requests", "memory") or 0
    if pod["spec"].get("resources"):
        pod_request = amount(pod["spec"]["resources"], "requests", "memory") or 0
        spread = max(0, pod_request - sum(amount(c.get("resources"), "requests", "memory") or 0 for c in podutil.containers(pod)))
        request += spread // max(1, len(podutil.containers(pod)))
    score = 1000 - (1000 * request) // max(1, memory_capacity_bytes)
    score = min(max(score, 1000 - 997), 999)
    if container.get("restartPolicy") == "Always" and container in podutil.init_containers(pod):
        lowest = min((amount(c.get("resources"), "requests", "memory") or 0 for c in podutil.containers(pod)), default=0)
        score = min(score, min(max(1000 - 1000 * lowest // max(1, memory_capacity_bytes), 3), 999))
    return score


def container_limits(
    pod: Object, container: Object, memory_capacity_bytes: int, *, enforce_cpu: bool = True, group_oom: bool = False
) -> LinuxResources:
    """What the runtime sets on one container's cgroup.

    Args:
      group_oom: cgroup v2: an out-of-memory kill takes the whole container.
    """
    resources = container.get("resources") or {}
    cpu_request = amount(resources, "requests", "cpu")
    cpu_limit = amount(resources, "limits", "cpu")
    if cpu_limit is None:
        cpu_limit = amount(pod["spec"].get("resources"), "limits", "cpu")
    memory_limit = amount(resources, "limits", "memory")
    if memory_limit is None:
        memory_limit = amount(pod["spec"].get("resources"), "limits", "memory")
    out = LinuxResources(
        cpu_shares=cpu_shares(cpu_request if cpu_request is not None else (cpu_limit or 0)),
        memory_limit_bytes=memory_limit or 0,
        oom_score_adj=oom_score_adj(pod, container, memory_capacity_bytes),
    )
    if enforce_cpu:
        out.cpu_period_us = PERIOD_US
        out.cpu_quota_us = cpu_quota(cpu_limit or 0)
    for name, raw in (resources.get("limits") or {}).items():
        if name.startswith("hugepages-"):
            out.hugepage_limits[page_size(name)] = quantity.value(raw)
    if group_oom:
        out.unified["memory.oom.group"] = "1"
    return out


def page_size(resource: str) -> str:
    """A resource such as hugepages-2Mi as groups' files name the size: 2MB."""
    size = quantity.value(resource.removeprefix("hugepages-"))
    for unit, name in ((1 << 30, "GB"), (1 << 20, "MB"), (1 << 10, "KB")):
        if size % unit == 0:
            return f"{size // unit}{name}"
    return f"{size}B"


def pod_totals(pod: Object) -> tuple[dict[str, int], dict[str, int | None]]:
    """(requests, limits) of a whole pod for cpu, memory and ephemeral-storage; a limit of None is none.

    Init containers count by their maximum beside the sidecars started before them; sidecars add to the main ones.
    Source: component-helpers/resource PodRequests, PodLimits.
    """
    requests: dict[str, int] = {}
    limits: dict[str, int | None] = {}
    overhead = pod["spec"].get("overhead") or {}
    for name in ("cpu", "memory", "ephemeral-storage"):
        requests[name] = _total(pod, "requests", name) or 0
        limit = _total(pod, "limits", name)
        pod_request = amount(pod["spec"].get("resources"), "requests", name)
        pod_limit = amount(pod["spec"].get("resources"), "limits", name)
        requests[name] = pod_request if pod_request is not None else requests[name]
        limits[name] = pod_limit if pod_limit is not None else limit
        if name in overhead:
            extra = quantity.cpu_millicores(overhead[name]) if name == "cpu" else quantity.value(overhead[name])
            requests[name] += extra
            if limits[name] is not None:
                limits[name] = (limits[name] or 0) + extra
    return requests, limits


def _total(pod: Object, kind: str, name: str) -> int | None:
    """Sum over the containers; None when kind is limits and one that counts has none."""
    total, complete = 0, True
    for spec in podutil.containers(pod):
        value = amount(spec.get("resources"), kind, name)
        complete = complete and bool(value)
        total += value or 0
    sidecars, peak = 0, 0
    for spec in podutil.init_containers(pod):
        value = amount(spec.get("resources"), kind, name)
        if podutil.is_sidecar(spec):
            complete = complete and bool(value)
            sidecars += value or 0
            peak = max(peak, sidecars)
        else:
            peak = max(peak, sidecars + (value or 0))
    result = max(total + sidecars, peak)
    return None if kind == "limits" and not complete else result


def extended_requests(pod: Object) -> dict[str, int]:
    """Requests of everything but cpu, memory and ephemeral-storage (devices, hugepages), by resource name."""
    names = {
        n
        for c in (*podutil.containers(pod), *podutil.init_containers(pod))
        for n in ((c.get("resources") or {}).get("requests") or {})
        if n not in ("cpu", "memory", "ephemeral-storage")
    }
    return {n: _total(pod, "requests", n) or 0 for n in names}


def pod_cgroup_limits(pod: Object, *, enforce_cpu: bool = True, pids_limit: int = 0) -> LinuxResources:
    """What the kubelet sets on the pod's own cgroup. Source: cm.ResourceConfigForPod."""
    requests, limits = pod_totals(pod)
    qos = podutil.qos_class(pod)
    out = LinuxResources(pids_limit=pids_limit)
    out.cpu_shares = _MIN_SHARES if qos == "BestEffort" else cpu_shares(requests["cpu"])
    if qos != "BestEffort":
        if enforce_cpu and limits["cpu"]:
            out.cpu_period_us, out.cpu_quota_us = PERIOD_US, cpu_quota(limits["cpu"])
        if limits["memory"]:
            out.memory_limit_bytes = limits["memory"]
    out.hugepage_limits = {page_size(name): count for name, count in extended_requests(pod).items() if name.startswith("hugepages-")}
    return out


def differs(wanted: LinuxResources, actual: LinuxResources | None) -> bool:
    """Whether a running container's cgroup is out of step in what can be resized."""
    if actual is None:
        return False
    return (
        (wanted.cpu_shares != actual.cpu_shares and actual.cpu_shares != 0)
        or wanted.cpu_quota_us != max(actual.cpu_quota_us, 0)
        or wanted.memory_limit_bytes != max(actual.memory_limit_bytes, 0)
    )


def total_usage(requests: list[Mapping[str, int]]) -> dict[str, int]:
    """Add up requests of several pods."""
    out: dict[str, int] = {}
    for one in requests:
        for name, value in one.items():
            out[name] = out.get(name, 0) + value
    return out
