"""GET /stats/summary: what the node, its pods and containers use. Also the numbers behind the metrics.

Callers: server.server, server.metrics. Read from cgroups and the runtime on demand; CPU rates come from the previous reading.
Source: staging kubelet/pkg/apis/stats/v1alpha1, pkg/kubelet/server/stats.
"""

from __future__ import annotations

import asyncio
import os
from typing import TYPE_CHECKING, Any

import orjson

from knarr.aiokits import clock
from knarr.http.server import Request
from knarr.kubelet import machine, podutil, usage
from knarr.kubelet.pod_worker import PodWorker, Stage
from knarr.kubelet.server import groups
from knarr.kubelet.server.groups import Group, Pressure
from knarr.kubelet.usage import PodUsage, Space
from knarr.runtime.cri import ContainerStats, RuntimeFault

if TYPE_CHECKING:
    from knarr.kubelet.kubelet import Kubelet

Summary = dict[str, Any]
_rates: dict[str, tuple[float, int, int]] = {}
"""Key to (time, CPU nanoseconds then, last rate): bounded by the containers seen in the last reading."""


async def serve(kubelet: Kubelet, request: Request, parts: list[str]) -> None:
    """Answer /stats/summary."""
    if parts[:1] != ["summary"]:
        request.respond(404, [("Content-Type", "text/plain")], b"404 page not found\n")
        return
    only = (request.query.get("only_cpu_and_memory") or ["false"])[0] == "true"
    body = await summary(kubelet, only_cpu_and_memory=only)
    request.respond(200, [("Content-Type", "application/json")], orjson.dumps(body))


def rate(key: str, now: float, used_ns: int) -> int:
    """CPU nanoseconds per second since the last reading."""
    before = _rates.get(key)
    if before is not None and now - before[0] < 1.0:
        return before[2]
    value = max(0, int((used_ns - before[1]) / (now - before[0]))) if before else 0
    _rates[key] = (now, used_ns, value)
    return value


def swap() -> tuple[int, int]:
    """(swap in use on the machine, all of it) in bytes."""
    info = machine.memory_info()
    total = info.get("SwapTotal", 0)
    return total - info.get("SwapFree", 0), total


def swap_allowed(group: Group, total: int, *, v2: bool) -> int:
    """Swap that a group may use; in version 1 its limit counts memory and swap together."""
    if v2:
        return min(group.swap_limit or total, total)
    return min(max(0, group.swap_limit - group.memory_limit), total) if group.swap_limit else total


def _psi(found: Pressure | None) -> Summary:
    """Pressure in the shape of the summary; what the kernel does not tell is 0."""
    out: Summary = {}
    for name, line in (("full", found.full if found else {}), ("some", found.some if found else {})):
        # The kernel counts in microseconds, the summary in nanoseconds.
        out[name] = {"total": int(line.get("total", 0)) * 1000, **{key: line.get(key, 0) for key in ("avg10", "avg60", "avg300")}}
    return out


def _group(key: str, now: float, group: Group) -> Summary:
    """CPU, memory, input and output, and swap of a group."""
    stamp = clock.rfc3339(now)
    memory: Summary = {
        "time": stamp,
        "usageBytes": group.memory,
        "workingSetBytes": group.working_set,
        "rssBytes": group.rss,
        "pageFaults": group.faults,
        "majorPageFaults": group.major_faults,
        "psi": _psi(group.pressure.get("memory")),
    }
    if group.memory_limit:
        memory["availableBytes"] = max(0, group.memory_limit - group.working_set)
    return {
        "cpu": {**_cpu(key, now, group.cpu_ns), "psi": _psi(group.pressure.get("cpu"))},
        "memory": memory,
        "io": {"time": stamp, "psi": _psi(group.pressure.get("io"))},
        "swap": {"time": stamp, "swapUsageBytes": group.swap},
    }


def _cpu(key: str, now: float, used_ns: int) -> Summary:
    return {"time": clock.rfc3339(now), "usageNanoCores": rate(key, now, used_ns), "usageCoreNanoSeconds": used_ns}


def node_cpu_ns() -> int:
    """CPU time used by everything on the machine."""
    fields = machine.read_text("/proc/stat").split("\n", 1)[0].split()[1:]
    numbers = [int(f) for f in fields]
    busy = sum(numbers[:8]) - numbers[3] - (numbers[4] if len(numbers) > 4 else 0)
    return busy * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))


def node_memory() -> tuple[int, int, int, int, int]:
    """(usage, working set, rss, available, total) in bytes."""
    info = machine.memory_info()
    total, available = info.get("MemTotal", 0), info.get("MemAvailable", 0)
    usage = total - info.get("MemFree", 0)
    return usage, total - available, info.get("AnonPages", 0), available, total


def interfaces() -> list[Summary]:
    """Traffic of the host's interfaces."""
    out = []
    for line in machine.read_text("/proc/net/dev").splitlines()[2:]:
        name, _, rest = line.partition(":")
        numbers = rest.split()
        if name.strip() != "lo" and len(numbers) >= 11:
            out.append(
                {
                    "name": name.strip(),
                    "rxBytes": int(numbers[0]),
                    "rxErrors": int(numbers[2]),
                    "txBytes": int(numbers[8]),
                    "txErrors": int(numbers[10]),
                }
            )
    return out


async def summary(kubelet: Kubelet, *, only_cpu_and_memory: bool = False) -> Summary:
    """The whole Summary object."""
    now = clock.now()
    stats: dict[str, list[ContainerStats]] = {}
    try:
        for one in await kubelet.runtime.list_container_stats():
            stats.setdefault(one.labels.get(podutil.POD_UID_LABEL, ""), []).append(one)
        networks = {s.metadata.uid: s for s in await kubelet.runtime.list_pod_sandbox_stats()}
    except RuntimeFault:
        networks = {}
    pods = []
    seen = {"node", "pods"}
    for worker in kubelet.workers.workers():
        if worker.stage >= Stage.TERMINATED or worker.orphan:
            continue
        seen.add(worker.uid)
        seen.update(s.id for s in stats.get(worker.uid, []))
        pods.append(await _pod(kubelet, worker, stats.get(worker.uid, []), networks.get(worker.uid), now, only=only_cpu_and_memory))
    for key in [k for k in _rates if k not in seen]:
        del _rates[key]
    return {"node": _node(kubelet, now, only=only_cpu_and_memory), "pods": pods}


def _filesystem(path: str, stamp: str, used: Space | None = None) -> Summary:
    """The file system that holds a path; `used` is what its owner has of it, else all that is taken counts."""
    d = machine.disk(path)
    return {
        "time": stamp,
        "availableBytes": d.available,
        "capacityBytes": d.capacity,
        "usedBytes": d.used if used is None else used.size,
        "inodesFree": d.inodes_free,
        "inodes": d.inodes,
        "inodesUsed": d.inodes - d.inodes_free if used is None else used.inodes,
    }


def _node(kubelet: Kubelet, now: float, *, only: bool) -> Summary:
    stamp = clock.rfc3339(now)
    usage, working, rss, available, _ = node_memory()
    counted = groups.pairs(machine.read_text("/proc/vmstat"))
    stalled = {name: groups.pressure(machine.read_text(f"/proc/pressure/{name}")) for name in ("cpu", "memory", "io")}
    used_swap, all_swap = swap()
    out: Summary = {
        "nodeName": kubelet.config.node_name,
        "startTime": clock.rfc3339(machine.booted_at()),
        "cpu": {**_cpu("node", now, node_cpu_ns()), "psi": _psi(stalled["cpu"])},
        "memory": {
            "time": stamp,
            "availableBytes": available,
            "usageBytes": usage,
            "workingSetBytes": working,
            "rssBytes": rss,
            "pageFaults": counted.get("pgfault", 0),
            "majorPageFaults": counted.get("pgmajfault", 0),
            "psi": _psi(stalled["memory"]),
        },
        "systemContainers": _system(kubelet, now),
    }
    if only:
        return out
    links = interfaces()
    first = links[0] if links else {"name": ""}
    out["io"] = {"time": stamp, "psi": _psi(stalled["io"])}
    out["swap"] = {"time": stamp, "swapUsageBytes": used_swap, "swapAvailableBytes": all_swap - used_swap}
    out["network"] = {"time": stamp, **first, "interfaces": links}
    out["fs"] = _filesystem(kubelet.config.root_dir, stamp)
    out["runtime"] = {"imageFs": _filesystem(kubelet.config.root_dir, stamp), "containerFs": _filesystem(kubelet.config.root_dir, stamp)}
    out["rlimit"] = {"time": stamp, "maxpid": machine.most_processes(), "curproc": machine.process_count()}
    return out


def _system(kubelet: Kubelet, now: float) -> list[Summary]:
    """All pods together, as the one group of the system that is always there."""
    found = groups.read(kubelet.node.cgroups.hierarchies, kubelet.node.cgroups.kubepods()) if kubelet.config.cgroups_per_qos else None
    if found is None:
        return []
    one = {"name": "pods", "startTime": clock.rfc3339(kubelet.started_at), **_group("pods", now, found)}
    if "availableBytes" not in one["memory"]:
        one["memory"]["availableBytes"] = max(0, kubelet.capacity.memory_allocatable_bytes - found.working_set)
    return [one]


async def _pod(kubelet: Kubelet, worker: PodWorker, stats: list[ContainerStats], network: Any, now: float, *, only: bool) -> Summary:
    cgroups, meta, stamp = kubelet.node.cgroups, worker.pod["metadata"], clock.rfc3339(now)
    path = cgroups.pod_path(worker.pod)
    group = groups.read(cgroups.hierarchies, path) or Group()
    used = None if only else await asyncio.to_thread(usage.measure, kubelet.node, worker.pod, stats)
    out: Summary = {
        "podRef": {"name": meta["name"], "namespace": meta.get("namespace", ""), "uid": worker.uid},
        "startTime": (kubelet.node.status.get(worker.uid) or {}).get("startTime"),
        "containers": [_container(s, worker, now, kubelet, used) for s in stats],
        **_group(worker.uid, now, group),
    }
    if used is None:
        return out
    if network is not None and network.interfaces:
        links = [
            {"name": i.name, "rxBytes": i.rx_bytes, "rxErrors": i.rx_errors, "txBytes": i.tx_bytes, "txErrors": i.tx_errors}
            for i in network.interfaces
        ]
        first = next((link for link in links if link["name"] == "eth0"), links[0])
        out["network"] = {"time": stamp, **first, "interfaces": links}
    out["volume"] = await asyncio.to_thread(_volumes, kubelet, worker, used, stamp)
    out["ephemeral-storage"] = _filesystem(kubelet.config.root_dir, stamp, used.disk())
    out["process_stats"] = {"process_count": cgroups.process_count(path)}
    return out


def _volumes(kubelet: Kubelet, worker: PodWorker, used: PodUsage, stamp: str) -> list[Summary]:
    """Every volume of a pod: local ones by what is in them, those of claims by their file system. Walks files."""
    claims = {v["name"]: (v.get("persistentVolumeClaim") or {}).get("claimName") or f"{worker.pod['metadata']['name']}-{v['name']}" for v in worker.pod["spec"].get("volumes") or [] if "persistentVolumeClaim" in v or "ephemeral" in v}
    out = []
    for name, volume in kubelet.node.volumes.of(worker.uid).volumes.items():
        if name in claims and os.path.isdir(volume.path):
            reference = {"name": claims[name], "namespace": worker.pod["metadata"].get("namespace", "")}
            out.append({**_filesystem(volume.path, stamp), "name": name, "pvcRef": reference})
        elif name in used.volumes:
            out.append({**_filesystem(volume.path, stamp, used.volumes[name]), "name": name})
    return out


def _container(stats: ContainerStats, worker: PodWorker, now: float, kubelet: Kubelet, used: PodUsage | None) -> Summary:
    stamp = clock.rfc3339(now)
    status = kubelet.node.status.get(worker.uid) or {}
    entry = podutil.status_of(status.get("containerStatuses"), stats.metadata.name) or {}
    out: Summary = {
        "name": stats.metadata.name,
        "startTime": ((entry.get("state") or {}).get("running") or {}).get("startedAt") or stamp,
        "cpu": _cpu(stats.id, now, stats.cpu_usage_core_ns),
        "memory": {
            "time": stamp,
            "usageBytes": stats.memory_usage_bytes,
            "workingSetBytes": stats.memory_working_set_bytes,
            "rssBytes": stats.memory_rss_bytes,
            "pageFaults": stats.memory_page_faults,
            "majorPageFaults": stats.memory_major_page_faults,
        },
    }
    if used is not None:
        cgroups = kubelet.node.cgroups
        group = groups.read(cgroups.hierarchies, f"{cgroups.pod_path(worker.pod)}/{stats.id}") or Group()
        allowed = swap_allowed(group, swap()[1], v2=cgroups.is_v2)
        out["io"] = {"time": stamp}
        out["swap"] = {"time": stamp, "swapUsageBytes": group.swap, "swapAvailableBytes": max(0, allowed - group.swap)}
        out["rootfs"] = _filesystem(kubelet.config.root_dir, stamp, used.layers[stats.metadata.name])
        out["logs"] = _filesystem(kubelet.config.logs_dir, stamp, used.logs.get(stats.metadata.name, Space()))
    return out
