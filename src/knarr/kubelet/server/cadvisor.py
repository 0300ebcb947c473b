"""GET /metrics/cadvisor: figures of every group of this node, of the machine and of pods' networks, with cadvisor's names.

Caller: metrics. Groups: the machine, all pods, the QoS groups, each pod, each container; files are read in a thread at each scrape.
Source: cadvisor metrics/prometheus.go and prometheus_machine.go, pkg/kubelet/server (containerPrometheusLabelsFunc).
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from knarr.kubelet import machine, podutil
from knarr.kubelet.pod_worker import Stage
from knarr.kubelet.server import groups
from knarr.kubelet.server.groups import Group
from knarr.kubelet.server.page import Page
from knarr.runtime.cri import ContainerStats, ContainerStatus

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

_TASK_STATES = ("iowaiting", "running", "sleeping", "stopped", "uninterruptible")

Labels = dict[str, str]
Value = Callable[[Group], float]

_FAMILIES: tuple[tuple[str, str, str, Value], ...] = (
    ("container_cpu_user_seconds_total", "counter", "CPU time used in user mode.", lambda g: g.cpu_user_ns / 1e9),
    ("container_cpu_system_seconds_total", "counter", "CPU time used in the kernel.", lambda g: g.cpu_system_ns / 1e9),
    ("container_memory_cache", "gauge", "Bytes of page cache.", lambda g: g.cache),
    ("container_memory_rss", "gauge", "Bytes of anonymous memory.", lambda g: g.rss),
    ("container_memory_kernel_usage", "gauge", "Bytes that the kernel holds for the group.", lambda g: g.kernel),
    ("container_memory_mapped_file", "gauge", "Bytes of mapped files.", lambda g: g.mapped_file),
    ("container_memory_swap", "gauge", "Bytes of swap in use.", lambda g: g.swap),
    ("container_memory_failcnt", "counter", "How often memory reached its limit.", lambda g: g.fail_count),
    ("container_memory_usage_bytes", "gauge", "Bytes in use, whenever they were last touched.", lambda g: g.memory),
    ("container_memory_max_usage_bytes", "gauge", "Most bytes ever in use.", lambda g: g.memory_most),
    ("container_memory_working_set_bytes", "gauge", "Bytes in use without inactive file pages.", lambda g: g.working_set),
    ("container_memory_total_active_file_bytes", "gauge", "Bytes of active file pages.", lambda g: g.active_file),
    ("container_memory_total_inactive_file_bytes", "gauge", "Bytes of inactive file pages.", lambda g: g.inactive_file),
    ("container_oom_events_total", "counter", "Processes killed for lack of memory.", lambda g: g.oom_kills),
    ("container_threads", "gauge", "Threads and processes of the group.", lambda g: g.threads),
    ("container_threads_max", "gauge", "Most threads and processes allowed, 0 for any number.", lambda g: g.threads_most),
    ("container_spec_cpu_period", "gauge", "Period of the CPU quota in microseconds.", lambda g: g.cpu_period_us),
    ("container_spec_cpu_shares", "gauge", "Share of CPU time against others.", lambda g: g.cpu_shares),
    ("container_spec_memory_limit_bytes", "gauge", "Memory limit, 0 for none.", lambda g: g.memory_limit),
    ("container_spec_memory_swap_limit_bytes", "gauge", "Limit of memory and swap, 0 for none.", lambda g: g.swap_limit),
    ("container_spec_memory_reservation_limit_bytes", "gauge", "Memory that is kept for the group, 0 for none.", lambda g: g.reservation),
    # As with upstream's kubelet, whose reader of task states is off.
    ("container_cpu_load_average_10s", "gauge", "Load of the group; not read.", lambda g: 0),
    ("container_cpu_load_d_average_10s", "gauge", "Uninterruptible load of the group; not read.", lambda g: 0),
)
_LIMITED: tuple[tuple[str, str, str, Value], ...] = (
    ("container_spec_cpu_quota", "gauge", "CPU quota in microseconds per period.", lambda g: g.cpu_quota_us),
    ("container_cpu_cfs_periods_total", "counter", "Periods of the CPU quota that have passed.", lambda g: g.periods),
    ("container_cpu_cfs_throttled_periods_total", "counter", "Periods in which the group had to wait for CPU.", lambda g: g.throttled_periods),
    ("container_cpu_cfs_throttled_seconds_total", "counter", "Time that the group had to wait for CPU.", lambda g: g.throttled_ns / 1e9),
)
"""Only of groups with a CPU quota."""
_DEVICE: tuple[tuple[str, str, str], ...] = (
    ("container_fs_reads_total", "counter", "reads"),
    ("container_fs_reads_merged_total", "counter", "reads_merged"),
    ("container_fs_sector_reads_total", "counter", "sectors_read"),
    ("container_fs_read_seconds_total", "counter", "read_ms"),
    ("container_fs_writes_total", "counter", "writes"),
    ("container_fs_writes_merged_total", "counter", "writes_merged"),
    ("container_fs_sector_writes_total", "counter", "sectors_written"),
    ("container_fs_write_seconds_total", "counter", "write_ms"),
    ("container_fs_io_current", "gauge", "in_progress"),
    ("container_fs_io_time_seconds_total", "counter", "io_ms"),
    ("container_fs_io_time_weighted_seconds_total", "counter", "weighted_ms"),
)


@dataclass(slots=True)
class _Seen:
    """One group with what the page says of it."""

    labels: Labels
    group: Group
    started: float
    layer_bytes: int | None = None
    processes: list[int] = field(default_factory=list)


async def fill(kubelet: Kubelet, page: Page) -> None:
    """Add everything to the page."""
    containers = await kubelet.runtime.list_container_stats()
    statuses = {c.id: c for c in await kubelet.runtime.list_containers()}
    seen = await asyncio.to_thread(_read, kubelet, containers, statuses)
    page.add("cadvisor_version_info", "gauge", "Always 1.", [({"kernelVersion": os.uname().release, "osVersion": machine.os_image(), "dockerVersion": "", "cadvisorVersion": "", "cadvisorRevision": ""}, 1)])
    page.add("container_last_seen", "gauge", "When the group was last seen.", [(s.labels, time.time()) for s in seen])
    page.add("container_start_time_seconds", "gauge", "When the group was made.", [(s.labels, s.started) for s in seen])
    page.add("container_cpu_usage_seconds_total", "counter", "CPU time used.", [({**s.labels, "cpu": "total"}, s.group.cpu_ns / 1e9) for s in seen])
    for name, kind, text, value in _FAMILIES:
        page.add(name, kind, text, [(s.labels, value(s.group)) for s in seen])
    for name, kind, text, value in _LIMITED:
        page.add(name, kind, text, [(s.labels, value(s.group)) for s in seen if s.group.cpu_quota_us])
    faults = [({**s.labels, "failure_type": kind, "scope": scope}, number) for s in seen for scope in ("container", "hierarchy") for kind, number in (("pgfault", s.group.faults), ("pgmajfault", s.group.major_faults))]
    page.add("container_memory_failures_total", "counter", "Page faults.", faults)
    page.add("container_tasks_state", "gauge", "Tasks by state; not read.", [({**s.labels, "state": state}, 0) for s in seen for state in _TASK_STATES])
    for resource in ("cpu", "memory", "io"):
        for word, line in (("waiting", "some"), ("stalled", "full")):
            stalled = [(s.labels, _stalled(s.group, resource, line)) for s in seen]
            page.add(f"container_pressure_{resource}_{word}_seconds_total", "counter", f"Time in which tasks waited for {resource}.", stalled)
    _processes(page, seen)
    _disks(kubelet, page, seen)
    await _network(kubelet, page)
    _machine(page)


def _stalled(group: Group, resource: str, line: str) -> float:
    found = group.pressure.get(resource)
    return float(getattr(found, line).get("total", 0.0)) / 1e6 if found is not None else 0.0


def _read(kubelet: Kubelet, containers: list[ContainerStats], statuses: dict[str, ContainerStatus]) -> list[_Seen]:
    cgroups, now = kubelet.node.cgroups, time.time()
    hierarchies, out = cgroups.hierarchies, []

    def add(path: str, labels: Labels, started: float, layer: int | None = None) -> None:
        group = groups.read(hierarchies, path)
        if group is not None:
            empty = {"container": "", "id": path, "image": "", "name": "", "namespace": "", "pod": ""}
            out.append(_Seen({**empty, **labels}, group, started, layer, group.processes))

    add("/", {}, machine.booted_at())
    for path in dict.fromkeys((cgroups.kubepods(), cgroups.qos_parent("Burstable"), cgroups.qos_parent("BestEffort"))):
        add(path, {}, kubelet.started_at)
    paths: dict[str, tuple[str, Labels]] = {}
    for worker in kubelet.workers.workers():
        if worker.orphan or worker.stage >= Stage.TERMINATED:
            continue
        meta = worker.pod["metadata"]
        labels = {"namespace": meta.get("namespace", ""), "pod": meta["name"]}
        paths[worker.uid] = (cgroups.pod_path(worker.pod), labels)
        add(paths[worker.uid][0], labels, worker.admitted_at)
    for one in containers:
        if (known := paths.get(one.labels.get(podutil.POD_UID_LABEL, ""))) is None:
            continue
        status = statuses.get(one.id)
        labels = {**known[1], "container": one.metadata.name, "name": one.id, "image": status.image if status else ""}
        add(f"{known[0]}/{one.id}", labels, status.started_at_ns / 1e9 if status else now, one.writable_layer_bytes)
    return out


def _processes(page: Page, seen: list[_Seen]) -> None:
    """Processes, open files and their limit: of containers, whose processes are in their own group."""
    counted = [(s, *groups.open_files(s.processes)) for s in seen if s.labels["container"]]
    page.add("container_processes", "gauge", "Processes in the group.", [(s.labels, len(s.processes)) for s in seen])
    page.add("container_file_descriptors", "gauge", "Open files.", [(s.labels, files) for s, files, _ in counted])
    page.add("container_sockets", "gauge", "Open sockets.", [(s.labels, sockets) for s, _, sockets in counted])
    limits = [(s, groups.open_file_limit(s.processes[0])) for s in seen if s.labels["container"] and s.processes]
    page.add("container_ulimits_soft", "gauge", "Soft limits of the first process, -1 for none.", [({**s.labels, "ulimit": "max_open_files"}, limit) for s, limit in limits if limit is not None])


def _disks(kubelet: Kubelet, page: Page, seen: list[_Seen]) -> None:
    """The node's file system and disks, and what containers wrote and read."""
    space, root = machine.disk(kubelet.config.root_dir), seen[0].labels if seen else {}
    device = _device_of(kubelet.config.root_dir)
    whole = {**root, "device": device}
    page.add("container_fs_inodes_free", "gauge", "Inodes that are left.", [(whole, space.inodes_free)])
    page.add("container_fs_inodes_total", "gauge", "Inodes in all.", [(whole, space.inodes)])
    page.add("container_fs_limit_bytes", "gauge", "Size of the file system.", [(whole, space.capacity)])
    layers = [({**s.labels, "device": device}, s.layer_bytes) for s in seen if s.layer_bytes is not None]
    page.add("container_fs_usage_bytes", "gauge", "Bytes taken: of the machine, and of a container's own layer.", [(whole, space.used), *layers])
    disks = _disk_stats()
    for name, kind, key in _DEVICE:
        scale = 1000 if key.endswith("_ms") else 1
        page.add(name, kind, "Counted by the kernel for each disk.", [({**root, "device": disk}, values[key] / scale) for disk, values in disks.items()])
    for name, key in (("container_fs_reads_bytes_total", "rbytes"), ("container_fs_writes_bytes_total", "wbytes")):
        moved = [({**s.labels, "device": _name_of(number)}, values.get(key, 0)) for s in seen for number, values in s.group.io.items()]
        page.add(name, "counter", "Bytes moved between the group and a disk.", moved)
    usage = [
        ({**s.labels, "device": _name_of(number), "major": number.partition(":")[0], "minor": number.partition(":")[2], "operation": operation}, values.get(key, 0))
        for s in seen
        for number, values in s.group.io.items()
        for operation, key in (("Read", "rbytes"), ("Write", "wbytes"))
    ]
    page.add("container_blkio_device_usage_total", "counter", "Bytes moved between the group and a disk.", usage)


def _device_of(path: str) -> str:
    """The device of the file system that holds a path, as mountinfo names it."""
    best, device = "", ""
    for line in machine.read_text("/proc/self/mountinfo").splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4]
        if (path == point or path.startswith(point.rstrip("/") + "/")) and len(point) >= len(best):
            best, device = point, right.split()[1]
    return device


def _name_of(number: str) -> str:
    """The device file of a disk by its number."""
    name = os.path.basename(os.path.realpath(f"/sys/dev/block/{number}"))
    return f"/dev/{name}" if name and name != number else number


def _disk_stats() -> dict[str, dict[str, int]]:
    """Device file to the kernel's counts; disks that were never used are left out."""
    names = ("reads", "reads_merged", "sectors_read", "read_ms", "writes", "writes_merged", "sectors_written", "write_ms", "in_progress", "io_ms", "weighted_ms")
    out = {}
    for line in machine.read_text("/proc/diskstats").splitlines():
        fields = line.split()
        values = dict(zip(names, (int(f) for f in fields[3:14]), strict=False))
        if len(values) == len(names) and (values["reads"] or values["writes"]):
            out[f"/dev/{fields[2]}"] = values
    return out


async def _network(kubelet: Kubelet, page: Page) -> None:
    found = []
    for sandbox in await kubelet.runtime.list_pod_sandbox_stats():
        worker = kubelet.workers.get(sandbox.metadata.uid)
        path = kubelet.node.cgroups.pod_path(worker.pod) if worker is not None and not worker.orphan else ""
        base = {"container": "", "id": path, "image": "", "name": sandbox.id, "namespace": sandbox.metadata.namespace, "pod": sandbox.metadata.name}
        found += [({**base, "interface": i.name}, i) for i in sandbox.interfaces]
    for direction, word in (("receive", "rx"), ("transmit", "tx")):
        for what, text in (("bytes", "Bytes"), ("errors", "Errors"), ("packets", "Packets"), ("dropped", "Packets lost")):
            name = "packets_dropped" if what == "dropped" else what
            samples = [(labels, getattr(i, f"{word}_{what}")) for labels, i in found]
            page.add(f"container_network_{direction}_{name}_total", "counter", f"{text}, {direction} side.", samples)


def _machine(page: Page) -> None:
    info = machine.identity()
    labels = {"boot_id": info["bootID"], "machine_id": info["machineID"], "system_uuid": info["systemUUID"]}
    cores, sockets = machine.processors()
    memory = machine.memory_info()
    for name, text, value in (
        ("machine_cpu_cores", "Logical CPUs.", os.cpu_count() or 1),
        ("machine_cpu_physical_cores", "CPU cores.", cores),
        ("machine_cpu_sockets", "CPU sockets.", sockets),
        ("machine_memory_bytes", "Memory of the machine.", memory.get("MemTotal", 0)),
        ("machine_swap_bytes", "Swap of the machine.", memory.get("SwapTotal", 0)),
    ):
        page.add(name, "gauge", text, [(labels, value)])
    for name in ("machine", "container"):
        page.add(f"{name}_scrape_error", "gauge", "1 if reading failed, else 0.", [({}, 0)])
