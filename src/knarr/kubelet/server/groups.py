"""Everything that the kernel tells about one control group, in the units of the metrics; version 1, version 2 and the machine itself.

Callers: stats (summary), cadvisor (metrics). Pure reading; a file that is missing reads as nothing, because groups end at any moment
and hosts differ in their controllers. Source: cadvisor container/libcontainer, info/v1/container.go.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from knarr.kubelet.cgroups import Hierarchies

_TICK_NS = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
_NO_LIMIT = 1 << 62
"""Version 1 tells a number near the largest when there is no limit."""


@dataclass(slots=True)
class Pressure:
    """Stall information of one resource: per line (some, full) averages in percent and the total in microseconds."""

    some: dict[str, float] = field(default_factory=dict)
    full: dict[str, float] = field(default_factory=dict)


@dataclass(slots=True)
class Group:
    """One group's figures: times in nanoseconds, sizes in bytes; a limit of 0 is none."""

    cpu_ns: int = 0
    cpu_user_ns: int = 0
    cpu_system_ns: int = 0
    cpu_shares: int = 0
    cpu_period_us: int = 0
    cpu_quota_us: int = 0
    periods: int = 0
    throttled_periods: int = 0
    throttled_ns: int = 0
    memory: int = 0
    memory_most: int = 0
    working_set: int = 0
    cache: int = 0
    rss: int = 0
    kernel: int = 0
    mapped_file: int = 0
    swap: int = 0
    fail_count: int = 0
    active_file: int = 0
    inactive_file: int = 0
    faults: int = 0
    major_faults: int = 0
    memory_limit: int = 0
    swap_limit: int = 0
    reservation: int = 0
    oom_kills: int = 0
    threads: int = 0
    threads_most: int = 0
    io: dict[str, dict[str, int]] = field(default_factory=dict)
    """Device "major:minor" to rbytes, wbytes, rios, wios."""
    pressure: dict[str, Pressure] = field(default_factory=dict)
    """cpu, memory, io."""
    processes: list[int] = field(default_factory=list)
    """Those directly in the group."""


def text(path: str) -> str:
    """A small file; "" when it cannot be read."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read()
    except OSError:
        return ""


def number(path: str) -> int:
    """A file of one number; 0 for "max" and what cannot be read."""
    found = text(path).strip()
    value = int(found) if found.lstrip("-").isdigit() else 0
    return 0 if value >= _NO_LIMIT else value


def pairs(content: str) -> dict[str, int]:
    """Lines of a name and a number."""
    fields = (line.split() for line in content.splitlines())
    return {f[0]: int(f[1]) for f in fields if len(f) == 2 and f[1].isdigit()}


def pressure(content: str) -> Pressure:
    """A pressure file."""
    out = Pressure()
    for line in content.splitlines():
        kind, *fields = line.split()
        values = {name: float(value) for name, _, value in (f.partition("=") for f in fields)}
        if kind == "some":
            out.some = values
        elif kind == "full":
            out.full = values
    return out


def read(hierarchies: Hierarchies, path: str) -> Group | None:
    """The figures of a group, None when it is gone."""
    if hierarchies.v2:
        return _version2(hierarchies.v2 + path) if os.path.isdir(hierarchies.v2 + path) else None
    base = hierarchies.v1.get("memory") or hierarchies.v1.get("cpu", "")
    return _version1(hierarchies, path) if os.path.isdir(base + path) else None


def _version2(base: str) -> Group:
    cpu, memory = pairs(text(base + "/cpu.stat")), pairs(text(base + "/memory.stat"))
    quota, _, period = text(base + "/cpu.max").strip().partition(" ")
    weight = number(base + "/cpu.weight")
    usage, inactive = number(base + "/memory.current"), memory.get("inactive_file", 0)
    out = Group(
        cpu_ns=cpu.get("usage_usec", 0) * 1000,
        cpu_user_ns=cpu.get("user_usec", 0) * 1000,
        cpu_system_ns=cpu.get("system_usec", 0) * 1000,
        cpu_shares=2 + (weight - 1) * 262142 // 9999 if weight else 0,
        cpu_period_us=int(period or 0),
        cpu_quota_us=int(quota) if quota.isdigit() else 0,
        periods=cpu.get("nr_periods", 0),
        throttled_periods=cpu.get("nr_throttled", 0),
        throttled_ns=cpu.get("throttled_usec", 0) * 1000,
        memory=usage,
        memory_most=number(base + "/memory.peak"),
        working_set=max(0, usage - inactive),
        cache=memory.get("file", 0),
        rss=memory.get("anon", 0),
        kernel=memory.get("kernel", 0),
        mapped_file=memory.get("file_mapped", 0),
        swap=number(base + "/memory.swap.current"),
        fail_count=pairs(text(base + "/memory.events")).get("max", 0),
        active_file=memory.get("active_file", 0),
        inactive_file=inactive,
        faults=memory.get("pgfault", 0),
        major_faults=memory.get("pgmajfault", 0),
        memory_limit=number(base + "/memory.max"),
        swap_limit=number(base + "/memory.swap.max"),
        reservation=number(base + "/memory.low"),
        oom_kills=pairs(text(base + "/memory.events")).get("oom_kill", 0),
        threads=number(base + "/pids.current"),
        threads_most=number(base + "/pids.max"),
        processes=_processes(base),
    )
    for line in text(base + "/io.stat").splitlines():
        device, *fields = line.split()
        out.io[device] = {name: int(value) for name, _, value in (f.partition("=") for f in fields) if value.isdigit()}
    for resource in ("cpu", "memory", "io"):
        out.pressure[resource] = pressure(text(f"{base}/{resource}.pressure"))
    return out


def _version1(hierarchies: Hierarchies, path: str) -> Group:
    def base(controller: str) -> str:
        return hierarchies.v1.get(controller, "/nonexistent") + path

    memory, ticks, cpu = pairs(text(base("memory") + "/memory.stat")), pairs(text(base("cpuacct") + "/cpuacct.stat")), pairs(text(base("cpu") + "/cpu.stat"))
    usage, inactive = number(base("memory") + "/memory.usage_in_bytes"), memory.get("total_inactive_file", 0)
    out = Group(
        cpu_ns=number(base("cpuacct") + "/cpuacct.usage"),
        cpu_user_ns=ticks.get("user", 0) * _TICK_NS,
        cpu_system_ns=ticks.get("system", 0) * _TICK_NS,
        cpu_shares=number(base("cpu") + "/cpu.shares"),
        cpu_period_us=number(base("cpu") + "/cpu.cfs_period_us"),
        cpu_quota_us=max(0, number(base("cpu") + "/cpu.cfs_quota_us")),
        periods=cpu.get("nr_periods", 0),
        throttled_periods=cpu.get("nr_throttled", 0),
        throttled_ns=cpu.get("throttled_time", 0),
        memory=usage,
        memory_most=number(base("memory") + "/memory.max_usage_in_bytes"),
        working_set=max(0, usage - inactive),
        cache=memory.get("total_cache", 0),
        rss=memory.get("total_rss", 0),
        kernel=number(base("memory") + "/memory.kmem.usage_in_bytes"),
        mapped_file=memory.get("total_mapped_file", 0),
        swap=memory.get("total_swap", 0),
        fail_count=number(base("memory") + "/memory.failcnt"),
        active_file=memory.get("total_active_file", 0),
        inactive_file=inactive,
        faults=memory.get("total_pgfault", 0),
        major_faults=memory.get("total_pgmajfault", 0),
        memory_limit=number(base("memory") + "/memory.limit_in_bytes"),
        swap_limit=number(base("memory") + "/memory.memsw.limit_in_bytes"),
        reservation=number(base("memory") + "/memory.soft_limit_in_bytes"),
        oom_kills=pairs(text(base("memory") + "/memory.oom_control")).get("oom_kill", 0),
        threads=number(base("pids") + "/pids.current"),
        threads_most=number(base("pids") + "/pids.max"),
        processes=_processes(base("memory")),
    )
    for name, kinds in (("io_service_bytes", ("rbytes", "wbytes")), ("io_serviced", ("rios", "wios"))):
        for line in text(f"{base('blkio')}/blkio.throttle.{name}").splitlines():
            fields = line.split()
            if len(fields) == 3 and fields[1] in ("Read", "Write"):
                out.io.setdefault(fields[0], {})[kinds[fields[1] == "Write"]] = int(fields[2])
    if path == "/":
        # Groups of version 1 know no pressure, the machine as a whole does.
        for resource in ("cpu", "memory", "io"):
            out.pressure[resource] = pressure(text(f"/proc/pressure/{resource}"))
    return out


def _processes(base: str) -> list[int]:
    return [int(line) for line in text(base + "/cgroup.procs").split()]


def open_files(pids: list[int]) -> tuple[int, int]:
    """(file descriptors, sockets among them) that processes hold open."""
    files = sockets = 0
    for pid in pids:
        folder = f"/proc/{pid}/fd"
        try:
            names = os.listdir(folder)
        except OSError:
            continue
        files += len(names)
        for name in names:
            try:
                sockets += os.readlink(f"{folder}/{name}").startswith("socket:")
            except OSError:
                continue
    return files, sockets


def open_file_limit(pid: int) -> int | None:
    """The soft limit of a process's open files; -1 is none; None when it has ended."""
    for line in text(f"/proc/{pid}/limits").splitlines():
        if line.startswith("Max open files"):
            soft = line.removeprefix("Max open files").split()[0]
            return int(soft) if soft.isdigit() else -1
    return None
