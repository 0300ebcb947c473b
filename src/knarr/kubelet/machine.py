"""What this machine is and has: CPUs, memory, disk, kernel, identifiers. Reads /proc, /sys and /etc; no state.

Callers: node_status, eviction, stats. Source: cadvisor machine info, pkg/kubelet/nodestatus.
"""

from __future__ import annotations

import os
import platform
import socket
import time
from dataclasses import dataclass, field

from knarr.api import quantity
from knarr.kubelet.affinity.machine import parse_cpus
from knarr.kubelet.config import KubeletConfig

_ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "ppc64le": "ppc64le", "s390x": "s390x", "riscv64": "riscv64"}


@dataclass(slots=True)
class Capacity:
    """What this machine has and what pods may use of it, in the wire's quantities."""

    capacity: dict[str, str] = field(default_factory=dict)
    allocatable: dict[str, str] = field(default_factory=dict)
    memory_bytes: int = 1
    memory_allocatable_bytes: int = 1


@dataclass(frozen=True, slots=True)
class DiskUsage:
    """One file system, in bytes and inodes."""

    capacity: int
    available: int
    used: int
    inodes: int
    inodes_free: int


def read_text(path: str) -> str:
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read().strip()
    except OSError:
        return ""


def architecture() -> str:
    machine = platform.machine()
    return _ARCHITECTURES.get(machine, machine)


def memory_info() -> dict[str, int]:
    """/proc/meminfo in bytes."""
    out = {}
    for line in read_text("/proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        number = rest.split()
        if number and number[0].isdigit():
            out[name] = int(number[0]) * (1024 if len(number) > 1 else 1)
    return out


def disk(path: str) -> DiskUsage:
    """The file system that holds a path (its nearest existing parent)."""
    while not os.path.exists(path):
        path = os.path.dirname(path) or "/"
    info = os.statvfs(path)
    return DiskUsage(
        info.f_blocks * info.f_frsize,
        info.f_bavail * info.f_frsize,
        (info.f_blocks - info.f_bfree) * info.f_frsize,
        info.f_files,
        info.f_favail,
    )


def huge_pages() -> dict[str, int]:
    """Resource name to bytes of every huge page size that the kernel knows."""
    out = {}
    folder = "/sys/kernel/mm/hugepages"
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        kilobytes = name.removeprefix("hugepages-").removesuffix("kB")
        if kilobytes.isdigit():
            size = int(kilobytes) * 1024
            count = int(read_text(f"{folder}/{name}/nr_hugepages") or 0)
            out[f"hugepages-{quantity.format(size, 'BinarySI')}"] = count * size
    return out


def most_processes() -> int:
    """How many processes and threads the kernel allows in all; 0 when it does not tell."""
    limits = [read_text(f"/proc/sys/kernel/{name}") for name in ("pid_max", "threads-max")]
    return min((int(text) for text in limits if text.isdigit()), default=0)


def process_count() -> int:
    """Processes and threads of the machine now."""
    load = read_text("/proc/loadavg").split()
    return int(load[3].partition("/")[2]) if len(load) > 3 else 0


def os_image() -> str:
    for line in read_text("/etc/os-release").splitlines():
        if line.startswith("PRETTY_NAME="):
            return line.partition("=")[2].strip('"')
    return "Linux"


def identity() -> dict[str, str]:
    """machineID, systemUUID, bootID."""
    boot = read_text("/proc/sys/kernel/random/boot_id")
    machine_id = read_text("/etc/machine-id") or boot.replace("-", "")
    return {"machineID": machine_id, "systemUUID": read_text("/sys/class/dmi/id/product_uuid") or machine_id, "bootID": boot}


def processors() -> tuple[int, int]:
    """(CPU cores, sockets) of the machine; threads of one core count once."""
    cores, sockets, folder = set(), set(), "/sys/devices/system/cpu"
    for name in os.listdir(folder) if os.path.isdir(folder) else []:
        topology = f"{folder}/{name}/topology"
        if name.startswith("cpu") and name[3:].isdigit() and os.path.isdir(topology):
            socket_id = read_text(f"{topology}/physical_package_id")
            sockets.add(socket_id)
            cores.add((socket_id, read_text(f"{topology}/core_id")))
    return len(cores) or os.cpu_count() or 1, len(sockets) or 1


def node_info(config: KubeletConfig, runtime_version: str) -> dict[str, object]:
    """status.nodeInfo."""
    swap = memory_info().get("SwapTotal", 0)
    out: dict[str, object] = {
        **identity(),
        "kernelVersion": platform.release(),
        "osImage": os_image(),
        "containerRuntimeVersion": runtime_version,
        "kubeletVersion": config.kubelet_version,
        "kubeProxyVersion": "",
        "operatingSystem": "linux",
        "architecture": architecture(),
    }
    if swap:
        out["swap"] = {"capacity": swap}
    return out


def booted_at() -> float:
    """When the machine was started, epoch seconds."""
    return time.time() - float((read_text("/proc/uptime") or "0").split()[0])


def host_name() -> str:
    return socket.gethostname().lower()


def _threshold(text: str, total: int) -> int:
    if text.endswith("%"):
        return int(total * float(text[:-1]) / 100)
    return quantity.value(text)


def measure(config: KubeletConfig, devices: dict[str, tuple[int, int]] | None = None) -> Capacity:
    """Capacity and allocatable of this node. `devices` gives (all, healthy) by resource name."""
    memory = memory_info().get("MemTotal", 1 << 30)
    storage = disk(config.root_dir)
    capacity = {
        "cpu": str(len(os.sched_getaffinity(0))),
        "memory": f"{memory // 1024}Ki",
        "ephemeral-storage": f"{storage.capacity // 1024}Ki",
        "pods": str(config.max_pods),
    }
    huge = huge_pages()
    capacity.update({name: quantity.format(size, "BinarySI") for name, size in huge.items()})
    allocatable = dict(capacity)
    reserved_memory = sum(quantity.value(r["memory"]) for r in (config.system_reserved, config.kube_reserved) if "memory" in r)
    reserved_memory += _threshold(config.eviction.hard.get("memory.available", "0"), memory)
    reserved_cpu = sum(quantity.cpu_millicores(r["cpu"]) for r in (config.system_reserved, config.kube_reserved) if "cpu" in r)
    allocatable_memory = max(0, memory - reserved_memory - sum(huge.values()))
    allocatable["memory"] = f"{allocatable_memory // 1024}Ki"
    if config.reserved_system_cpus:
        reserved_cpu = 1000 * len(parse_cpus(config.reserved_system_cpus))
    if reserved_cpu:
        millis = int(capacity["cpu"]) * 1000 - reserved_cpu
        allocatable["cpu"] = f"{millis}m" if millis % 1000 else str(millis // 1000)
    reserved_disk = _threshold(config.eviction.hard.get("nodefs.available", "0"), storage.capacity)
    reserved_disk += sum(quantity.value(r["ephemeral-storage"]) for r in (config.system_reserved, config.kube_reserved) if "ephemeral-storage" in r)
    allocatable["ephemeral-storage"] = str(max(0, storage.capacity // 1024 * 1024 - reserved_disk))
    for name, (total, healthy) in (devices or {}).items():
        capacity[name], allocatable[name] = str(total), str(healthy)
    return Capacity(capacity, allocatable, memory, allocatable_memory)
