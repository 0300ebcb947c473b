"""GET /metrics, /metrics/resource, /metrics/cadvisor, /metrics/probes: Prometheus text with upstream's names.

Caller: server.server. Written by hand from the same readings as /stats/summary: nothing is kept between two scrapes but counters.
Source: pkg/kubelet/metrics/collectors/resource_metrics.go, cadvisor metrics/prometheus.go, pkg/kubelet/metrics.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from knarr.http.server import Request
from knarr.kubelet import podutil
from knarr.kubelet.cgroups import shares_to_weight
from knarr.kubelet.pod_worker import Stage
from knarr.kubelet.server import stats
from knarr.runtime.cri import ContainerStats

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_TYPE = [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")]
_started = time.time()


class Page:
    """A page of metrics in the text format."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def add(self, name: str, kind: str, text: str, samples: Iterable[tuple[Mapping[str, str], float]]) -> None:
        """Add one family; labels are escaped."""
        self._lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}")
        for labels, value in samples:
            inner = ",".join(f'{k}="{_escape(v)}"' for k, v in labels.items())
            self._lines.append(f"{name}{{{inner}}} {value:.12g}" if inner else f"{name} {value:.12g}")

    def add_raw(self, name: str, kind: str, text: str, samples: Iterable[tuple[str, int]]) -> None:
        """Add one family whose samples carry their labels in the text already."""
        self._lines.append(f"# HELP {name} {text}\n# TYPE {name} {kind}")
        self._lines += [f"{sample} {value}" for sample, value in samples]

    def encode(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Answer one of the pages."""
    kind = parts[0] if parts and parts[0] else ""
    page = Page()
    if kind == "":
        await _own(kubelet, page)
    elif kind == "resource":
        await _resource(kubelet, page)
    elif kind == "cadvisor":
        await _cadvisor(kubelet, page)
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
    page.add("container_swap_usage_bytes", "gauge", "Current amount of the container swap usage in bytes.", [(_labels(c), 0) for c in containers])
    page.add("node_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the node in core-seconds", [({}, stats.node_cpu_ns() / 1e9)])
    page.add("node_memory_working_set_bytes", "gauge", "Current working set of the node in bytes", [({}, working)])
    page.add("node_swap_usage_bytes", "gauge", "Current swap usage of the node in bytes.", [({}, 0)])
    page.add("pod_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed by the pod in core-seconds", [(labels, cpu) for labels, cpu, _ in pods])
    page.add("pod_memory_working_set_bytes", "gauge", "Current working set of the pod in bytes", [(labels, memory) for labels, _, memory in pods])
    page.add("pod_swap_usage_bytes", "gauge", "Current amount of the pod swap usage in bytes.", [(labels, 0) for labels, _, _ in pods])
    page.add("resource_scrape_error", "gauge", "1 if there was an error while getting container metrics, 0 otherwise", [({}, 0)])


async def _cadvisor(kubelet: Kubelet, page: Page) -> None:
    containers = await kubelet.runtime.list_container_stats()
    statuses = {c.id: c for c in await kubelet.runtime.list_containers()}
    by_pod = {w.uid: w for w in kubelet.workers.workers()}

    def labels(one: ContainerStats) -> dict[str, str]:
        worker = by_pod.get(one.labels.get(podutil.POD_UID_LABEL, ""))
        path = f"{kubelet.node.cgroups.pod_path(worker.pod)}/{one.id}" if worker is not None else f"/{one.id}"
        status = statuses.get(one.id)
        return {
            "container": one.metadata.name,
            "id": path,
            "image": status.image if status else "",
            "name": one.id,
            "namespace": one.labels.get(podutil.POD_NAMESPACE_LABEL, ""),
            "pod": one.labels.get(podutil.POD_NAME_LABEL, ""),
        }

    named = [(labels(c), c) for c in containers]
    page.add("cadvisor_version_info", "gauge", "A metric with a constant '1' value labeled by kernel version, OS version, docker version, cadvisor version & cadvisor revision.", [({"kernelVersion": os.uname().release, "osVersion": "", "dockerVersion": "", "cadvisorVersion": "", "cadvisorRevision": ""}, 1)])
    page.add("container_cpu_usage_seconds_total", "counter", "Cumulative cpu time consumed in seconds.", [({**n, "cpu": "total"}, c.cpu_usage_core_ns / 1e9) for n, c in named])
    page.add("container_memory_usage_bytes", "gauge", "Current memory usage in bytes, including all memory regardless of when it was accessed", [(n, c.memory_usage_bytes) for n, c in named])
    page.add("container_memory_working_set_bytes", "gauge", "Current working set in bytes.", [(n, c.memory_working_set_bytes) for n, c in named])
    page.add("container_memory_rss", "gauge", "Size of RSS in bytes.", [(n, c.memory_rss_bytes) for n, c in named])
    page.add("container_memory_failures_total", "counter", "Cumulative count of memory allocation failures.", [({**n, "failure_type": kind, "scope": "container"}, value) for n, c in named for kind, value in (("pgfault", c.memory_page_faults), ("pgmajfault", c.memory_major_page_faults))])
    page.add("container_fs_usage_bytes", "gauge", "Number of bytes that are consumed by the container on this filesystem.", [({**n, "device": ""}, c.writable_layer_bytes) for n, c in named])
    page.add("container_processes", "gauge", "Number of processes running inside the container.", [(n, c.process_count) for n, c in named])
    page.add("container_last_seen", "gauge", "Last time a container was seen by the exporter", [(n, time.time()) for n, _ in named])
    page.add("container_start_time_seconds", "gauge", "Start time of the container since unix epoch in seconds.", [(n, statuses[c.id].started_at_ns / 1e9) for n, c in named if c.id in statuses])
    limits = [(n, r) for n, c in named if (s := statuses.get(c.id)) is not None and (r := s.resources) is not None]
    page.add("container_spec_cpu_period", "gauge", "CPU period of the container.", [(n, r.cpu_period_us) for n, r in limits])
    page.add("container_spec_cpu_quota", "gauge", "CPU quota of the container.", [(n, r.cpu_quota_us) for n, r in limits if r.cpu_quota_us > 0])
    page.add("container_spec_cpu_shares", "gauge", "CPU share of the container.", [(n, r.cpu_shares) for n, r in limits])
    page.add("container_spec_memory_limit_bytes", "gauge", "Memory limit for the container.", [(n, r.memory_limit_bytes) for n, r in limits])
    networks = []
    for sandbox in await kubelet.runtime.list_pod_sandbox_stats():
        base = {"container": "", "id": "", "image": "", "name": sandbox.id, "namespace": sandbox.metadata.namespace, "pod": sandbox.metadata.name}
        networks += [({**base, "interface": i.name}, i) for i in sandbox.interfaces]
    for direction, word in (("receive", "rx"), ("transmit", "tx")):
        page.add(f"container_network_{direction}_bytes_total", "counter", f"Cumulative count of bytes {direction}d", [(n, getattr(i, f"{word}_bytes")) for n, i in networks])
        page.add(f"container_network_{direction}_errors_total", "counter", f"Cumulative count of errors encountered while {direction}ing", [(n, getattr(i, f"{word}_errors")) for n, i in networks])
    _, _, _, _, total = stats.node_memory()
    page.add("machine_cpu_cores", "gauge", "Number of logical CPU cores.", [({}, os.cpu_count() or 1)])
    page.add("machine_memory_bytes", "gauge", "Amount of memory installed on the machine.", [({}, total)])
    page.add("machine_scrape_error", "gauge", "1 if there was an error while getting machine metrics, 0 otherwise.", [({}, 0)])


async def _own(kubelet: Kubelet, page: Page) -> None:
    workers = kubelet.workers.workers()
    states: dict[str, int] = {}
    for container in await kubelet.runtime.list_containers():
        states[container.state.name.lower()] = states.get(container.state.name.lower(), 0) + 1
    running = sum(1 for s in await kubelet.runtime.list_pod_sandboxes() if s.state.name == "READY")
    page.add("kubelet_node_name", "gauge", "The node's name. The count is always 1.", [({"node": kubelet.config.node_name}, 1)])
    page.add("kubelet_cgroup_version", "gauge", "cgroup version on the hosts.", [({}, 2 if kubelet.node.cgroups.is_v2 else 1)])
    page.add("kubelet_running_pods", "gauge", "Number of pods that have a running pod sandbox", [({}, running)])
    page.add("kubelet_running_containers", "gauge", "Number of containers currently running", [({"container_state": k}, v) for k, v in states.items()])
    page.add("kubelet_desired_pods", "gauge", "The number of pods the kubelet is being instructed to run. static is true if the pod is not from the apiserver.", [({"static": flag}, sum(1 for w in workers if podutil.is_static(w.pod) is (flag == "true"))) for flag in ("", "true")])
    page.add("kubelet_active_pods", "gauge", "The number of pods the kubelet considers active and which are being considered when admitting new pods.", [({"static": ""}, len(kubelet.workers.active_pods()))])
    page.add("kubelet_working_pods", "gauge", "Number of pods the kubelet is actually running, broken down by lifecycle phase.", [({"lifecycle": stage.name.lower()}, sum(1 for w in workers if w.stage is stage)) for stage in Stage])
    page.add("kubelet_best_effort_cpu_weight", "gauge", "Weight of the best effort group.", [({}, shares_to_weight(2))])
    families: dict[str, list[tuple[str, int]]] = {
        name: []
        for name in (
            "kubelet_started_pods_total",
            "kubelet_started_pods_errors_total",
            "kubelet_started_user_namespaced_pods_total",
            "kubelet_started_user_namespaced_pods_errors_total",
        )
    }
    for metric, value in kubelet.node.counters.items():
        families.setdefault(metric.partition("{")[0], []).append((metric, value))
    for name, counts in families.items():
        page.add_raw(name, "counter", "Counted since the kubelet's start.", counts or [(name, 0)])
    claims = list(kubelet.dynamic.metrics().items())
    if claims:
        page.add_raw("kubelet_dra_resource_claims_in_use", "gauge", "Claims that are prepared on this node, by driver.", claims)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    page.add("process_cpu_seconds_total", "counter", "Total user and system CPU time spent in seconds.", [({}, usage.ru_utime + usage.ru_stime)])
    with open("/proc/self/statm", encoding="ascii") as file:
        pages = file.read().split()
    page.add("process_resident_memory_bytes", "gauge", "Resident memory size in bytes.", [({}, int(pages[1]) * resource.getpagesize())])
    page.add("process_open_fds", "gauge", "Number of open file descriptors.", [({}, len(os.listdir("/proc/self/fd")))])
    page.add("process_start_time_seconds", "gauge", "Start time of the process since unix epoch in seconds.", [({}, _started)])
