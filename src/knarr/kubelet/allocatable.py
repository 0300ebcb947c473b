"""Limits of what all pods together, and if asked the system's own groups, may use of this machine.

Caller: kubelet (one task). The limits are the machine's capacity less what is reserved; the eviction thresholds are not taken
off, so that pods are evicted before the kernel has to kill. A limit that cannot be set, because pods use more at the moment or
the host lacks a controller, is told by a Warning and tried again every minute.
Source: pkg/kubelet/cm/node_container_manager_linux.go, pkg/kubelet/stats/pidlimit.
"""

from __future__ import annotations

import asyncio

from knarr.aiokits.log import get_logger
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import machine
from knarr.kubelet.affinity.machine import parse_cpus
from knarr.kubelet.cgroups import Cgroups, LimitsNotSet
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.node import RecordEvent
from knarr.kubelet.resources import cpu_shares, page_size
from knarr.runtime.cri import LinuxResources

log = get_logger(__name__)

_RETRY_SECONDS = 60.0
_PIDS = "pid"


def group_limits(amounts: dict[str, int], *, compressible_only: bool = False) -> LinuxResources:
    """Amounts (cpu in millicores, memory and huge pages in bytes, pid as a count) as limits of a group."""
    out = LinuxResources(cpu_shares=cpu_shares(amounts["cpu"]) if "cpu" in amounts else 0)
    if not compressible_only:
        out.memory_limit_bytes = amounts.get("memory", 0)
        out.pids_limit = amounts.get(_PIDS, 0)
        out.hugepage_limits = {page_size(name): value for name, value in amounts.items() if name.startswith("hugepages-")}
    return out


def _amounts(reserved: dict[str, str]) -> dict[str, int]:
    return {name: quantity.cpu_millicores(raw) if name == "cpu" else quantity.value(raw) for name, raw in reserved.items()}


def for_pods(config: KubeletConfig, capacity: dict[str, str], most_processes: int) -> LinuxResources:
    """What kubepods is limited to; all there is when enforcement for pods is off, as the kernel's default CPU share is too low."""
    amounts = {**_amounts({n: raw for n, raw in capacity.items() if n in ("cpu", "memory") or n.startswith("hugepages-")}), _PIDS: most_processes}
    if "pods" in config.enforce_node_allocatable:
        taken = [_amounts(config.system_reserved), _amounts(config.kube_reserved)]
        if config.reserved_system_cpus:
            taken = [{**taken[0], "cpu": 1000 * len(parse_cpus(config.reserved_system_cpus))}, {n: v for n, v in taken[1].items() if n != "cpu"}]
        amounts = {name: max(0, total - sum(one.get(name, 0) for one in taken)) for name, total in amounts.items()}
    return group_limits(amounts)


def for_system(config: KubeletConfig) -> list[tuple[str, str, LinuxResources]]:
    """(what it is called, group, limits) of the system's and the daemons' own groups, as far as they are to be limited."""
    found = []
    for key, name, group, reserved in (
        ("system-reserved", "system reserved", config.system_reserved_cgroup, config.system_reserved),
        ("kube-reserved", "kube reserved", config.kube_reserved_cgroup, config.kube_reserved),
    ):
        for suffix in ("", "-compressible"):
            if key + suffix in config.enforce_node_allocatable:
                found.append((name, group, group_limits(_amounts(reserved), compressible_only=bool(suffix))))
    return found


async def enforce(config: KubeletConfig, cgroups: Cgroups, capacity: dict[str, str], record: RecordEvent, node: Object) -> None:
    """Set the limits and say so; tried again until it worked. `node` is what events refer to."""

    def failed(message: str) -> None:
        log.warning("node allocatable not enforced", error=message)
        record(node, "Warning", "FailedNodeAllocatableEnforcement", message)

    for name, group, limits in for_system(config):
        try:
            cgroups.limit_existing(group, limits)
        except (OSError, LimitsNotSet) as e:
            failed(f'Failed to enforce {name.title()} Cgroup Limits on "{group}": {e}')
        else:
            record(node, "Normal", "NodeAllocatableEnforced", f"Updated limits on {name} cgroup {group}")
    while True:
        try:
            cgroups.ensure_tree()
            cgroups.limit_kubepods(for_pods(config, capacity, machine.most_processes()))
        except (OSError, LimitsNotSet) as e:
            failed(f'Failed to update Node Allocatable Limits "{cgroups.kubepods()}": {e}')
            await asyncio.sleep(_RETRY_SECONDS)
        else:
            record(node, "Normal", "NodeAllocatableEnforced", "Updated Node Allocatable limit across pods")
            return
