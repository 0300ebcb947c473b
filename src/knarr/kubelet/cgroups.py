"""The kubelet's part of the cgroup tree: kubepods, its QoS groups, one group per pod. Containers' groups are the runtime's.

Callers: pod_sync (ensure, remove), node start, eviction (memory in use). Works on cgroup v1, v2 and hybrid hosts: in a hybrid
host the v1 controllers count. Every path is <mount>/<cgroup_root>/kubepods[/<qos>]/pod<uid>. All calls are short file writes.
Invariant: only groups below our own kubepods are ever changed or removed.
Source: pkg/kubelet/cm (cgroup_manager_linux.go, pod_container_manager_linux.go, qos_container_manager_linux.go).
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass, field

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.machine import huge_pages
from knarr.kubelet.resources import cpu_shares, page_size, pod_cgroup_limits, pod_totals
from knarr.runtime.cri import LinuxResources

log = get_logger(__name__)

_CONTROLLERS = ("cpu", "cpuacct", "memory", "pids", "cpuset", "hugetlb", "blkio", "devices", "freezer", "net_cls", "net_prio", "perf_event", "systemd")
_WANTED_V2 = ("cpu", "memory", "pids", "cpuset", "hugetlb", "io")


@dataclass(slots=True)
class Hierarchies:
    """Where the host's cgroup controllers are mounted."""

    v2: str = ""
    """Mount point of the unified hierarchy, "" when the v1 controllers count."""
    v1: dict[str, str] = field(default_factory=dict)
    """Controller to mount point."""
    beside: str = ""
    """A unified hierarchy beside v1 controllers: it limits nothing, but runc makes groups there too, which must go with the pod."""

    @classmethod
    def of_host(cls, mountinfo: str = "/proc/self/mountinfo") -> Hierarchies:
        """Read them; v1 wins when it has the memory or cpu controller."""
        out = cls()
        with open(mountinfo, encoding="utf-8", errors="replace") as file:
            for line in file:
                left, _, right = line.partition(" - ")
                point, kind = left.split()[4], right.split()
                if kind[0] == "cgroup2":
                    out.v2 = out.v2 or point
                elif kind[0] == "cgroup":
                    for option in kind[2].split(","):
                        option = option.removeprefix("name=")
                        if option in _CONTROLLERS:
                            out.v1.setdefault(option, point)
        if "memory" in out.v1 or "cpu" in out.v1:
            out.beside, out.v2 = out.v2, ""
        elif out.v2:
            out.v1 = {}
        return out


def _write(path: str, value: str) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, value.encode())
    finally:
        os.close(fd)


def _writes_v1(limits: LinuxResources) -> list[tuple[str, str, str]]:
    """(controller, file, value) of every limit that is set."""
    writes = []
    if limits.cpu_shares:
        writes.append(("cpu", "cpu.shares", str(limits.cpu_shares)))
    if limits.cpu_quota_us:
        writes.append(("cpu", "cpu.cfs_period_us", str(limits.cpu_period_us)))
        writes.append(("cpu", "cpu.cfs_quota_us", str(limits.cpu_quota_us)))
    if limits.memory_limit_bytes:
        writes.append(("memory", "memory.limit_in_bytes", str(limits.memory_limit_bytes)))
    if limits.pids_limit:
        writes.append(("pids", "pids.max", str(limits.pids_limit)))
    writes += [("hugetlb", f"hugetlb.{size}.limit_in_bytes", str(count)) for size, count in limits.hugepage_limits.items()]
    return writes


def shares_to_weight(shares: int) -> int:
    """cgroup v1 shares (2..262144) in the v2 scale (1..10000)."""
    return 1 + ((shares - 2) * 9999) // 262142


class LimitsNotSet(Exception):
    """Some limits of a group are not in force; the text names each with its reason."""


class Cgroups:
    """The tree of one kubelet."""

    def __init__(self, config: KubeletConfig, hierarchies: Hierarchies | None = None, unlimited: Callable[[str], bool] = lambda uid: False) -> None:
        """`unlimited` tells of a pod by its uid whether it has CPUs of its own and thus no quota."""
        self._config = config
        self._unlimited = unlimited
        self.hierarchies = hierarchies or Hierarchies.of_host()
        self._root = config.cgroup_root.rstrip("/")
        self._ready: set[str] = set()
        self._no_huge_pages = {page_size(name): 0 for name in huge_pages()}

    @property
    def is_v2(self) -> bool:
        return bool(self.hierarchies.v2)

    def swap_accounting(self) -> bool:
        """Whether a memory limit can also bound swap."""
        if self.is_v2:
            return True
        return os.path.exists(os.path.join(self.hierarchies.v1.get("memory", "/nonexistent"), "memory.memsw.limit_in_bytes"))

    def kubepods(self) -> str:
        return f"{self._root}/kubepods"

    def qos_parent(self, qos: str) -> str:
        return self.kubepods() if qos == "Guaranteed" else f"{self.kubepods()}/{qos.lower()}"

    def pod_path(self, pod: Object) -> str:
        """The pod's group relative to each hierarchy; what a sandbox's cgroup_parent is."""
        return f"{self.qos_parent(podutil.qos_class(pod))}/pod{podutil.uid(pod)}"

    def _mounts(self) -> list[str]:
        if self.is_v2:
            return [self.hierarchies.v2]
        limited = [self.hierarchies.v1[c] for c in ("cpu", "cpuacct", "memory", "pids", "hugetlb") if c in self.hierarchies.v1]
        return list(dict.fromkeys(limited))

    def _all_mounts(self) -> list[str]:
        if self.is_v2:
            return [self.hierarchies.v2]
        return list(dict.fromkeys([*self.hierarchies.v1.values(), *([self.hierarchies.beside] if self.hierarchies.beside else [])]))

    def ensure_tree(self) -> None:
        """Make kubepods and the QoS groups. Raises OSError."""
        for qos in ("Guaranteed", "Burstable", "BestEffort"):
            path = self.qos_parent(qos)
            self._make(path)
            if qos == "BestEffort":
                self._apply(path, LinuxResources(cpu_shares=2))

    def limit_kubepods(self, limits: LinuxResources) -> None:
        """Limit all pods together. Raises LimitsNotSet."""
        self._must_apply(self.kubepods(), limits)

    def limit_existing(self, path: str, limits: LinuxResources) -> None:
        """Limit a group that is not ours. Raises FileNotFoundError when there is none, LimitsNotSet."""
        for mount in self._mounts():
            if not os.path.isdir(mount + path):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), mount + path)
        self._must_apply(path, limits)

    def _must_apply(self, path: str, limits: LinuxResources) -> None:
        if failures := self._apply(path, limits):
            raise LimitsNotSet("; ".join(f"{name}: {reason}" for name, reason in failures.items()))

    def _make(self, path: str) -> None:
        for mount in self._mounts():
            if self.is_v2:
                self._make_v2(path)
            else:
                os.makedirs(mount + path, 0o755, exist_ok=True)
        self._ready.add(path)

    def _make_v2(self, path: str) -> None:
        """Make the group and pass the controllers down to it."""
        current = self.hierarchies.v2
        for part in path.strip("/").split("/"):
            try:
                with open(os.path.join(current, "cgroup.controllers"), encoding="ascii") as file:
                    available = file.read().split()
                for controller in _WANTED_V2:
                    if controller in available:
                        _write(os.path.join(current, "cgroup.subtree_control"), f"+{controller}")
            except OSError as e:
                log.debug("cgroup controllers not passed down", path=current, error=str(e))
            current = os.path.join(current, part)
            os.makedirs(current, 0o755, exist_ok=True)

    def exists(self, pod: Object) -> bool:
        return all(os.path.isdir(m + self.pod_path(pod)) for m in self._mounts())

    def ensure_pod(self, pod: Object) -> str:
        """Make the pod's group with its limits; returns its path. Raises OSError."""
        path = self.pod_path(pod)
        parent = os.path.dirname(path)
        if parent not in self._ready:
            self.ensure_tree()
        try:
            self._make(path)
        except FileNotFoundError:
            self.ensure_tree()
            self._make(path)
        self._ready.discard(path)
        self.update_pod(pod)
        return path

    def update_pod(self, pod: Object) -> None:
        """Write the pod's limits anew. Raises OSError."""
        config = self._config
        enforce_cpu = config.enforce_cpu_limits and not self._unlimited(podutil.uid(pod))
        limits = pod_cgroup_limits(pod, enforce_cpu=enforce_cpu, pids_limit=config.pod_pids_limit)
        # Pages of a size that the pod does not ask for are none of its.
        limits.hugepage_limits = {**self._no_huge_pages, **limits.hugepage_limits}
        self._apply(self.pod_path(pod), limits)

    def _apply(self, path: str, limits: LinuxResources) -> dict[str, str]:
        """Write limits; returns the names of files that could not be written, each with the reason."""
        failures = {}
        for controller, name, value in self._writes_v2(limits) if self.is_v2 else _writes_v1(limits):
            mount = self.hierarchies.v2 if self.is_v2 else self.hierarchies.v1.get(controller)
            if mount is None and controller == "hugetlb":
                continue  # a kernel without it has no pages to limit, or no way to
            try:
                if mount is None:
                    raise OSError(errno.ENODEV, f"the host has no {controller} controller")
                _write(os.path.join(mount + path, name), value)
            except OSError as e:
                # A controller that this host does not pass down: the container's own limits still hold.
                log.debug("cgroup limit not set", path=path, name=name, error=str(e))
                failures[name] = e.strerror or str(e)
        return failures

    def _writes_v2(self, limits: LinuxResources) -> list[tuple[str, str, str]]:
        writes = []
        if limits.cpu_shares:
            writes.append(("cpu", "cpu.weight", str(shares_to_weight(limits.cpu_shares))))
        if limits.cpu_period_us:
            quota = str(limits.cpu_quota_us) if limits.cpu_quota_us > 0 else "max"
            writes.append(("cpu", "cpu.max", f"{quota} {limits.cpu_period_us}"))
        writes.append(("memory", "memory.max", str(limits.memory_limit_bytes or "max")))
        if limits.pids_limit:
            writes.append(("pids", "pids.max", str(limits.pids_limit)))
        if limits.hugepage_limits and "hugetlb" in self._controllers_v2():
            writes += [("hugetlb", f"hugetlb.{size}.max", str(count)) for size, count in limits.hugepage_limits.items()]
        return writes

    def _controllers_v2(self) -> list[str]:
        try:
            return _read(os.path.join(self.hierarchies.v2, "cgroup.controllers")).split()
        except OSError:
            return []

    def update_qos(self, pods: list[Object]) -> None:
        """Give the Burstable group the CPU share of its pods together."""
        total = sum(pod_totals(p)[0]["cpu"] for p in pods if podutil.qos_class(p) == "Burstable")
        self._apply(self.qos_parent("Burstable"), LinuxResources(cpu_shares=cpu_shares(total)))

    async def remove_path(self, path: str) -> None:
        """Remove one group below kubepods with all its children; processes still in it are killed."""
        if not path.startswith(self.kubepods() + "/"):
            raise ValueError(f"not ours: {path}")
        for mount in self._all_mounts():
            root = mount + path
            for attempt in range(20):
                if not os.path.isdir(root) or self._remove_tree(root):
                    break
                # The kernel reaps killed processes a moment later; there is nothing to wait on for an empty group in v1.
                await asyncio.sleep(0.01 * (attempt + 1))

    def _remove_tree(self, root: str) -> bool:
        for folder, _, _ in os.walk(root, topdown=False):
            try:
                os.rmdir(folder)
            except FileNotFoundError:
                continue
            except OSError as e:
                if e.errno != errno.EBUSY:
                    raise
                self._kill_all(folder)
                return False
        return True

    @staticmethod
    def _kill_all(folder: str) -> None:
        for name in ("cgroup.procs",):
            try:
                with open(os.path.join(folder, name), encoding="ascii") as file:
                    pids = [int(line) for line in file if line.strip()]
            except OSError:
                continue
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue

    def pod_groups(self) -> dict[str, str]:
        """uid to path of every pod group found on the host, ours only."""
        out: dict[str, str] = {}
        for mount in self._all_mounts():
            for qos in ("Guaranteed", "Burstable", "BestEffort"):
                parent = self.qos_parent(qos)
                try:
                    names = os.listdir(mount + parent)
                except OSError:
                    continue
                for name in names:
                    if name.startswith("pod"):
                        out[name.removeprefix("pod")] = f"{parent}/{name}"
        return out

    def memory_usage(self, path: str) -> tuple[int, int]:
        """(usage, working set) in bytes of one group; zeros when it is gone."""
        try:
            if self.is_v2:
                base = self.hierarchies.v2 + path
                usage, key = int(_read(base + "/memory.current")), "inactive_file"
            else:
                base = self.hierarchies.v1["memory"] + path
                usage, key = int(_read(base + "/memory.usage_in_bytes")), "total_inactive_file"
            inactive = next((int(v) for k, v in (line.split() for line in _read(base + "/memory.stat").splitlines()) if k == key), 0)
        except (OSError, ValueError, KeyError):
            return 0, 0
        return usage, max(0, usage - inactive)

    def memory_limit(self, path: str) -> int:
        """The memory limit of one group in bytes; 0 when it has none or is gone."""
        try:
            value = _read(self.hierarchies.v2 + path + "/memory.max" if self.is_v2 else self.hierarchies.v1["memory"] + path + "/memory.limit_in_bytes")
        except (OSError, KeyError):
            return 0
        return int(value) if value.isdigit() and int(value) < 1 << 62 else 0

    def cpu_usage_ns(self, path: str) -> int:
        """CPU time used by one group since it was made."""
        try:
            if self.is_v2:
                for line in _read(self.hierarchies.v2 + path + "/cpu.stat").splitlines():
                    if line.startswith("usage_usec"):
                        return int(line.split()[1]) * 1000
                return 0
            return int(_read(self.hierarchies.v1["cpuacct"] + path + "/cpuacct.usage"))
        except (OSError, ValueError, KeyError):
            return 0

    def process_count(self, path: str) -> int:
        """Processes in one group and below it."""
        mount = self.hierarchies.v2 if self.is_v2 else self.hierarchies.v1.get("pids", "")
        try:
            return int(_read(mount + path + "/pids.current"))
        except (OSError, ValueError):
            return 0


def _read(path: str) -> str:
    with open(path, encoding="ascii") as file:
        return file.read().strip()
