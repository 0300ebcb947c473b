"""Control groups: where a container's groups are, what they say, and their removal; version 1, version 2 and both at once.

Role: reads files for stats and out-of-memory detection, cleans up leftovers. The OCI runtime makes a container's group; the
kubelet makes the pod's. On a hybrid host (version 1 controllers beside an empty version 2 tree) the version 1 tree counts, as
runc decides. `root` is a parameter, so tests use faked trees.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import time
from dataclasses import dataclass
from functools import cache

_KILL_MILLISECONDS = 2000
_REMOVE_TRIES = 20


@dataclass(frozen=True, slots=True)
class Usage:
    """One group's figures; memory in bytes, CPU in nanoseconds since the group was made."""

    cpu_ns: int = 0
    memory_bytes: int = 0
    working_set_bytes: int = 0
    rss_bytes: int = 0
    page_faults: int = 0
    major_page_faults: int = 0
    processes: int = 0


class Cgroups:
    """The host's group tree. Paths are relative to each controller's root, as in cgroupsPath. Methods block (briefly)."""

    def __init__(self, root: str = "/sys/fs/cgroup", version: int | None = None) -> None:
        self.root = root
        self.version = version or (2 if os.path.exists(os.path.join(root, "cgroup.controllers")) else 1)

    @property
    def controllers(self) -> list[str]:
        """Mounted version 1 controllers, or [""] for the one tree of version 2."""
        return _v1_controllers(self.root) if self.version == 1 else [""]

    @property
    def hierarchies(self) -> list[str]:
        """Like controllers, with those that control nothing."""
        return _v1_hierarchies(self.root) if self.version == 1 else [""]

    def path(self, group: str, controller: str) -> str:
        """Directory of a group, for a controller where version 1 is in use."""
        base = self.root if self.version == 2 else os.path.join(self.root, controller)
        return os.path.join(base, group.lstrip("/"))

    def _read(self, group: str, controller: str, name: str) -> str:
        try:
            with open(os.path.join(self.path(group, controller), name)) as file:
                return file.read()
        except OSError:
            return ""

    def _pairs(self, group: str, controller: str, name: str) -> dict[str, int]:
        pairs = (line.split() for line in self._read(group, controller, name).splitlines())
        return {pair[0]: int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()}

    def _number(self, group: str, controller: str, name: str) -> int:
        text = self._read(group, controller, name).strip()
        return int(text) if text.isdigit() else 0

    def oom_kills(self, group: str) -> int:
        """How many processes the kernel killed in a group for lack of memory; 0 when the group is gone."""
        if self.version == 2:
            return self._pairs(group, "", "memory.events").get("oom_kill", 0)
        return self._pairs(group, "memory", "memory.oom_control").get("oom_kill", 0)

    def usage(self, group: str) -> Usage:
        """Figures of a group as the kubelet reports them: the working set is usage without inactive file pages."""
        if self.version == 2:
            stat = self._pairs(group, "", "memory.stat")
            used = self._number(group, "", "memory.current")
            cpu = self._pairs(group, "", "cpu.stat").get("usage_usec", 0) * 1000
            inactive, rss = stat.get("inactive_file", 0), stat.get("anon", 0)
            faults, major = stat.get("pgfault", 0), stat.get("pgmajfault", 0)
        else:
            stat = self._pairs(group, "memory", "memory.stat")
            used = self._number(group, "memory", "memory.usage_in_bytes")
            cpu = self._number(group, "cpuacct", "cpuacct.usage")
            inactive, rss = stat.get("total_inactive_file", 0), stat.get("total_rss", stat.get("rss", 0))
            faults, major = stat.get("total_pgfault", stat.get("pgfault", 0)), stat.get("total_pgmajfault", stat.get("pgmajfault", 0))
        processes = self._number(group, "pids", "pids.current")
        return Usage(cpu, used, max(used - inactive, 0), rss, faults, major, processes)

    def pids(self, group: str) -> set[int]:
        """Processes of a group and the groups below it."""
        found: set[int] = set()
        for controller in self.controllers:
            for base, _, files in os.walk(self.path(group, controller)):
                if "cgroup.procs" in files:
                    with contextlib.suppress(OSError), open(os.path.join(base, "cgroup.procs")) as file:
                        found.update(int(line) for line in file.read().split())
        return found

    def exists(self, group: str) -> bool:
        """Whether any controller knows the group."""
        return any(os.path.isdir(self.path(group, controller)) for controller in self.hierarchies)

    def kill(self, group: str) -> int:
        """Kill every process of a group, newcomers of a fork bomb included, and wait for their end; returns how many there were."""
        killed: set[int] = set()
        for _ in range(64):
            present = self.pids(group) - {os.getpid()}
            if not present:
                break
            waiting = select.poll()
            pidfds = []
            for pid in present:
                with contextlib.suppress(OSError):
                    pidfds.append(os.pidfd_open(pid))
                    waiting.register(pidfds[-1], select.POLLIN)
                    os.kill(pid, signal.SIGKILL)
            if self.version == 2:
                with contextlib.suppress(OSError), open(os.path.join(self.path(group, ""), "cgroup.kill"), "w") as file:
                    file.write("1")
            waiting.poll(_KILL_MILLISECONDS)
            for pidfd in pidfds:
                os.close(pidfd)
            killed |= present
        return len(killed)

    def remove(self, group: str) -> None:
        """Remove a group and those below it in every hierarchy; groups with processes stay.

        That includes hierarchies without controllers (the named one of systemd, an empty version 2 tree): runc makes groups there too.
        """
        if not group.strip("/"):
            return
        for controller in self.hierarchies:
            for base, _, _ in os.walk(self.path(group, controller), topdown=False):
                _remove_one(base)


def _remove_one(path: str) -> None:
    for attempt in range(_REMOVE_TRIES):
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError as error:
            # The kernel lets go of a group a moment after its last process; there is no event for that.
            if error.errno != errno.EBUSY or _has_processes(path):
                return
            time.sleep(0.005 * attempt)
        else:
            return


def _has_processes(path: str) -> bool:
    try:
        with open(os.path.join(path, "cgroup.procs")) as file:
            return bool(file.read(1))
    except OSError:
        return False


@cache
def _v1_controllers(root: str) -> list[str]:
    return [name for name in _v1_hierarchies(root) if name not in ("unified", "systemd")]


@cache
def _v1_hierarchies(root: str) -> list[str]:
    try:
        return sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not entry.is_symlink())
    except OSError:
        return []
