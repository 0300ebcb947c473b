"""GET /metrics, /metrics/resource, /metrics/cadvisor, /metrics/probes: Prometheus text with upstream's names.

Caller: server.server. From the same readings as /stats/summary; nothing is kept between two scrapes but what `meters` counts.
Source: pkg/kubelet/metrics/collectors/resource_metrics.go, pkg/kubelet/metrics.
"""

from __future__ import annotations

import asyncio
import os
import resource
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING

from knarr.api.types import Object
from knarr.http.server import Request
from knarr.kubelet import podutil
from knarr.kubelet.cgroups import shares_to_weight
from knarr.kubelet.pod_worker import Stage
from knarr.kubelet.server import cadvisor, groups, stats, volumes
from knarr.kubelet.server.page import Page
from knarr.runtime.cri import ContainerStats

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_TYPE = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")]
_started = time.time()


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Answer one of the pages."""
    kind = parts[0] if parts and parts[0] else ""
    page = Page()
    if kind == "":
        await _own(kubelet, page)
    elif kind == "resource":
        await _resource(kubelet, page)
    elif kind == "cadvisor":
        await cadvisor.fill(kubelet, page)
    elif kind == "probes":
        page.add("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", [({}, _started)])
    else:
        request.respond(404, [("Content-Type", "text/plain")], b"404 page not found\n")
        return
    request.respond(200, _TYPE, page.encode())


def _labels(one: ContainerStats) -> dict[str, str]:
    return {
        "container": one.metadata.name,
        "namespace": one.labels.get(podutil.POD_NAMESPACE_LABEL, ""),
        "pod": one.labels.get(podutil.POD_NAME_LABEL, ""),
    }


def _swap(kubelet: Kubelet, containers: list[ContainerStats]) -> list[tuple[dict[str, str], int, int]]:
    """(labels, swap in use, swap allowed) of each container."""
    out, total = [], stats.swap()[1]
    for one in containers:
        worker = kubelet.workers.get(one.labels.get(podutil.POD_UID_LABEL, ""))
        found = groups.read(kubelet.node.cgroups.hierarchies, f"{kubelet.node.cgroups.pod_path(worker.pod)}/{one.id}") if worker is not None else None
        if found is not None:
            out.append((_labels(one), found.swap, stats.swap_allowed(found, total, v2=kubelet.node.cgroups.is_v2)))
    return out


async def _resource(kubelet: Kubelet, page: Page) -> None:
    containers = await kubelet.runtime.list_container_stats()
    statuses = {c.id: c for c in await kubelet.runtime.list_containers()}
    pods = []
    for worker in kubelet.workers.workers():
        if worker.stage < Stage.TERMINATED and not worker.orphan:
            path, meta = kubelet.node.cgroups.pod_path(worker.pod), worker.pod["metadata"]
            labels = {"namespace": meta.get("namespace", ""), "pod": meta["name"]}
            pods.append((labels, kubelet.node.cgroups.cpu_usage_ns(path) / 1e9, kubelet.node.cgroups.memory_usage(path)[1]))
    _, working, _, _, _ = stats.node_memory()
    page.add("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the container in core-seconds", [(_labels(c), c.cpu_usage_core_ns / 1e9) for c in containers])
    page.add("container_memory_working_set_bytes", "gauge", "Current working set of the container in bytes", [(_labels(c), c.memory_working_set_bytes) for c in containers])
    page.add("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds", [(_labels(c), statuses[c.id].started_at_ns / 1e9) for c in containers if c.id in statuses])
    swap = await asyncio.to_thread(_swap, kubelet, containers)
    page.add("container_swap_usage_bytes", "gauge", "Swap that the container uses now.", [(labels, used) for labels, used, _ in swap])
    page.add("container_swap_limit_bytes", "gauge", "Swap that the container may use.", [(labels, most) for labels, _, most in swap])
    page.add("node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node in core-seconds", [({}, stats.node_cpu_ns() / 1e9)])
    page.add("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes", [({}, working)])
    page.add("node_swap_usage_bytes", "gauge", "Swap that the node uses now.", [({}, stats.swap()[0])])
    page.add("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds", [(labels, cpu) for labels, cpu, _ in pods])
    page.add("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes", [(labels, memory) for labels, _, memory in pods])
    by_pod: dict[tuple[str, str], int] = {}
    for labels, used, _ in swap:
        by_pod[labels["namespace"], labels["pod"]] = by_pod.get((labels["namespace"], labels["pod"]), 0) + used
    page.add("pod_swap_usage_bytes", "gauge", "Swap that the pod uses now.", [(labels, by_pod.get((labels["namespace"], labels["pod"]), 0)) for labels, _, _ in pods])
    page.add("resource_scrape_error", "gauge", "1 if there was an error while getting container metrics, 0 otherwise", [({}, 0)])


_COUNTERS = {
    "kubelet_admission_rejections_total": "Pods that were refused when they arrived.",
    "kubelet_evictions": "Pods that were evicted, by the signal that was crossed.",
    "kubelet_started_pods_total": "Pod sandboxes that were to be made.",
    "kubelet_started_pods_errors_total": "Pod sandboxes that could not be made.",
    "kubelet_started_containers_total": "Containers that were to be started.",
    "kubelet_started_containers_errors_total": "Containers that could not be started.",
    "kubelet_started_user_namespaced_pods_total": "Pods with a user namespace of their own that were to be started.",
    "kubelet_started_user_namespaced_pods_errors_total": "Pods with a user namespace of their own that could not be started.",
    "kubelet_orphaned_runtime_pods_total": "Pods found in the runtime that nobody asked for.",
    "kubelet_http_requests_total": "Requests to this server.",
    "kubelet_runtime_operations_total": "Calls of the container runtime.",
    "kubelet_runtime_operations_errors_total": "Calls of the container runtime that failed.",
    "kubelet_topology_manager_admission_requests_total": "Pods that were to be placed on CPUs and memory nodes.",
    "kubelet_topology_manager_admission_errors_total": "Pods that could not be placed on CPUs and memory nodes.",
    "kubelet_cpu_manager_pinning_requests_total": "Containers that were to be given CPUs of their own.",
    "kubelet_cpu_manager_pinning_errors_total": "Containers that could not be given CPUs of their own.",
    "kubelet_memory_manager_pinning_requests_total": "Containers that were to be bound to memory nodes.",
    "kubelet_memory_manager_pinning_errors_total": "Containers that could not be bound to memory nodes.",
    "kubelet_container_requested_resizes_total": "Changes of running containers' resources that were asked for.",
    "kubelet_pod_infeasible_resizes_total": "Resizes that this node can never grant.",
    "kubelet_pod_deferred_accepted_resizes_total": "Resizes that had to wait and were granted then.",
    "kubelet_sleep_action_terminated_early_total": "Sleep hooks that the end of the grace period cut short.",
    "kubelet_lifecycle_handler_http_fallbacks_total": "HTTPS hooks that were answered by plain HTTP.",
}
_UNLABELLED = (
    "kubelet_started_pods_total",
    "kubelet_started_pods_errors_total",
    "kubelet_started_user_namespaced_pods_total",
    "kubelet_started_user_namespaced_pods_errors_total",
    "kubelet_orphaned_runtime_pods_total",
    "kubelet_topology_manager_admission_requests_total",
    "kubelet_topology_manager_admission_errors_total",
    "kubelet_cpu_manager_pinning_requests_total",
    "kubelet_cpu_manager_pinning_errors_total",
    "kubelet_memory_manager_pinning_requests_total",
    "kubelet_memory_manager_pinning_errors_total",
    "kubelet_sleep_action_terminated_early_total",
    "kubelet_lifecycle_handler_http_fallbacks_total",
)
"""Counters that are shown from the start."""


async def _own(kubelet: Kubelet, page: Page) -> None:
    """What the kubelet knows and did itself."""
    await _pods(kubelet, page)
    meters, affinity = kubelet.meters, kubelet.node.affinity
    families: dict[str, list[tuple[str, float]]] = {name: [] for name in _COUNTERS}
    for sample, value in meters.counters.items():
        families.setdefault(sample.partition("{")[0], []).append((sample, value))
    for name, counts in families.items():
        shown = counts or ([(name, 0.0)] if name in _UNLABELLED else [])
        page.add_raw(name, "counter", _COUNTERS.get(name, "Counted since the kubelet's start."), shown)
    for name, gauge in {"kubelet_graceful_shutdown_start_time_seconds": 0.0, "kubelet_graceful_shutdown_end_time_seconds": 0.0, **meters.gauges}.items():
        page.add(name, "gauge", "Set when it happens.", [({}, gauge)])
    for name, series in meters.histograms.items():
        page.add_raw(name, "histogram", "Times and sizes since the kubelet's start.", [sample for labels, one in series.items() for sample in one.samples(name, labels)])
    exclusive, shared = affinity.pool()
    page.add("kubelet_cpu_manager_exclusive_cpu_allocation_count", "gauge", "CPUs that containers have for themselves.", [({}, exclusive)])
    page.add("kubelet_cpu_manager_shared_pool_size_millicores", "gauge", "CPUs that the other containers share.", [({}, shared * 1000)])
    if (resizes := kubelet.node.resize) is not None:
        page.add("kubelet_pod_in_progress_resizes", "gauge", "Resizes that are granted and not yet carried out.", [({}, resizes.in_progress())])
    page.add_raw("kubelet_http_inflight_requests", "gauge", "Requests that are being answered.", kubelet.server.inflight())
    claims = list(kubelet.dynamic.metrics().items())
    if claims:
        page.add_raw("kubelet_dra_resource_claims_in_use", "gauge", "Claims that are prepared on this node, by driver.", claims)
    await volumes.fill(kubelet, page)
    _process(page)


async def _pods(kubelet: Kubelet, page: Page) -> None:
    workers, api = kubelet.workers.workers(), kubelet.api_pods()
    states: dict[str, int] = {}
    for container in await kubelet.runtime.list_containers():
        states[container.state.name.lower()] = states.get(container.state.name.lower(), 0) + 1
    running = sum(1 for s in await kubelet.runtime.list_pod_sandboxes() if s.state.name == "READY")
    active = kubelet.workers.active_pods()
    page.add("kubelet_node_name", "gauge", "The node's name. The count is always 1.", [({"node": kubelet.config.node_name}, 1)])
    page.add("kubelet_cgroup_version", "gauge", "Version of the host's control groups.", [({}, 2 if kubelet.node.cgroups.is_v2 else 1)])
    page.add("kubelet_running_pods", "gauge", "Pods that have a running sandbox.", [({}, running)])
    page.add("kubelet_running_containers", "gauge", "Containers by their state.", [({"container_state": k}, v) for k, v in states.items()])
    page.add("kubelet_desired_pods", "gauge", "Pods that this node is told to run.", [({"static": flag}, _static(flag, (w.pod for w in workers))) for flag in ("", "true")])
    page.add("kubelet_active_pods", "gauge", "Pods that count when a new one arrives.", [({"static": flag}, _static(flag, active)) for flag in ("", "true")])
    page.add("kubelet_mirror_pods", "gauge", "Mirrors of static pods.", [({}, sum(1 for p in api if podutil.is_mirror(p)))])
    ephemeral = sum(len(p["spec"].get("ephemeralContainers") or []) for p in active)
    page.add("kubelet_managed_ephemeral_containers", "gauge", "Ephemeral containers of this node's pods.", [({}, ephemeral)])
    stages = [({"lifecycle": stage.name.lower()}, sum(1 for w in workers if w.stage is stage)) for stage in Stage]
    page.add("kubelet_working_pods", "gauge", "Pods by where they are in their life here.", stages)
    page.add("kubelet_best_effort_cpu_weight", "gauge", "Weight of the best effort group.", [({}, shares_to_weight(2))])


def _static(flag: str, pods: Iterable[Object]) -> int:
    return sum(1 for pod in pods if podutil.is_static(pod) is (flag == "true"))


def _process(page: Page) -> None:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    page.add("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", [({}, usage.ru_utime + usage.ru_stime)])
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = file.read().split()
    page.add("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", [({}, int(pages[1]) * resource.getpagesize())])
    page.add("process_open_fds", "gauge", "Number of open file descriptors.", [({}, len(os.listdir("/proc/self/fd")))])
    page.add("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", [({}, _started)])
