"""Takes from the host whatever a cluster left on it: processes, mounts, namespaces, interfaces, tables, cgroups.

Role: the last step of `down` and `delete`, and the first of `up` after a crash of the machine or of `down` itself. It finds
things by the cluster's own names and folders, never by asking components, so it works whatever state they are in. Nothing
that does not carry the cluster's name is touched.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from knarr.cluster.config import ClusterConfig
from knarr.network.sysctl import SysctlRecord

MNT_DETACH = 2
CGROUPS = Path("/sys/fs/cgroup")
TERM_SECONDS = 5.0
KILL_SECONDS = 5.0


def clean(config: ClusterConfig, *, grace_seconds: float = TERM_SECONDS) -> None:
    """Remove everything of a stopped cluster from the host; data in its folder stays.

    Args:
      grace_seconds: how long containers may take to end after TERM before they are killed.
    """
    stop_processes(config, grace_seconds)
    remove_tables(config)
    remove_interfaces(config)
    remove_mounts(config)
    remove_cgroups(config)
    restore_sysctls(config)
    shutil.rmtree(config.state, ignore_errors=True)
    with contextlib.suppress(OSError):
        config.state.parent.rmdir()


def clean_stale(config: ClusterConfig) -> None:
    """After a crash of the whole machine or supervisor: drop what cannot be taken over, keep running containers."""
    socket_path = config.state / "control.sock"
    socket_path.unlink(missing_ok=True)


def cgroup_name(config: ClusterConfig) -> str:
    """The cgroup under which every container of the cluster lives, in each hierarchy."""
    return f"knarr{config.suffix}"


def cgroup_folders(config: ClusterConfig) -> list[Path]:
    """Existing folders of the cluster's cgroup: one in a v2 tree, one per controller in v1."""
    name = cgroup_name(config)
    candidates = [CGROUPS / name, *(entry / name for entry in CGROUPS.iterdir())] if CGROUPS.is_dir() else []
    return [path for path in candidates if path.is_dir() and (path / "cgroup.procs").exists()]


def _members(config: ClusterConfig) -> set[int]:
    pids: set[int] = set()
    for folder in cgroup_folders(config):
        for procs in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                pids.update(int(line) for line in procs.read_text().split())
    return pids


def _monitors(config: ClusterConfig) -> set[int]:
    """conmon processes whose command line names one of the cluster's folders."""
    roots = (str(config.data), str(config.state))
    found = set()
    for pid, command in _processes():
        if "conmon" in command.split("\0", 1)[0].rsplit("/", 1)[-1] and any(root + "/" in command for root in roots):
            found.add(pid)
    return found


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_text()


def stop_processes(config: ClusterConfig, grace_seconds: float) -> None:
    """TERM, then KILL, to every container process; the monitors end by themselves or are killed last."""
    members = _members(config)
    _signal_all(members, signal.SIGTERM)
    if _wait_gone(members, grace_seconds):
        members = _members(config)
    _signal_all(members | _members(config), signal.SIGKILL)
    _wait_gone(members, KILL_SECONDS)
    monitors = _monitors(config)
    if not _wait_gone(monitors, 1.0):
        _signal_all(monitors, signal.SIGKILL)
        _wait_gone(monitors, KILL_SECONDS)


def _signal_all(pids: set[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_gone(pids: set[int], limit_seconds: float) -> bool:
    """True when all have ended within the limit; waits on pidfds, in turn, under one deadline."""
    import select

    deadline = time.monotonic() + limit_seconds
    for pid in pids:
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            ready, _, _ = select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))
        finally:
            os.close(descriptor)
        if not ready:
            return False
    return True


def remove_mounts(config: ClusterConfig) -> None:
    """Detach every mount below the cluster's folders, deepest first."""
    libc = ctypes.CDLL(None, use_errno=True)
    roots = tuple(str(root) + "/" for root in (config.data.resolve(), config.state, config.data))
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(roots):
            points.append(point)
    for point in sorted(points, key=len, reverse=True):
        libc.umount2(os.fsencode(point), MNT_DETACH)
    for node in config.nodes:
        if node.netns:
            path = Path("/run/netns") / node.netns
            if path.exists():
                libc.umount2(os.fsencode(path), MNT_DETACH)
                path.unlink(missing_ok=True)


def interface_names(config: ClusterConfig) -> list[str]:
    """Interfaces of this cluster: the pod network's, by the names it was given, and every one that bears the cluster's mark."""
    found = []
    for entry in Path("/sys/class/net").iterdir():
        with contextlib.suppress(OSError):
            own = entry.name == f"knarr{config.slot}" or entry.name.startswith(f"kp{config.slot}-")
            if own or (entry / "ifalias").read_text().strip() == f"knarr:{config.name}":
                found.append(entry.name)
    return found


def remove_interfaces(config: ClusterConfig) -> None:
    for name in interface_names(config):
        subprocess.run(["ip", "link", "delete", name], check=False, capture_output=True)


def table_names(config: ClusterConfig) -> list[tuple[str, str]]:
    """(family, table) of every nft table that carries the cluster's name."""
    program = shutil.which("nft", path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    if program is None:
        return []
    answer = subprocess.run([program, "-j", "list", "tables"], check=False, capture_output=True)
    if answer.returncode != 0:
        return []
    names = {f"knarr{config.suffix}{part}" for part in ("", "-net", "-policy", "-nodes")}
    tables = [entry["table"] for entry in json.loads(answer.stdout)["nftables"] if "table" in entry]
    return [(table["family"], table["name"]) for table in tables if table["name"] in names]


def remove_tables(config: ClusterConfig) -> None:
    for family, name in table_names(config):
        subprocess.run(["nft", "delete", "table", family, name], check=False, capture_output=True)


def remove_cgroups(config: ClusterConfig) -> None:
    for folder in cgroup_folders(config):
        for child in sorted((path for path in folder.rglob("*") if path.is_dir()), key=lambda path: len(path.parts), reverse=True):
            with contextlib.suppress(OSError):
                child.rmdir()
        with contextlib.suppress(OSError):
            folder.rmdir()


def restore_sysctls(config: ClusterConfig) -> None:
    """Give back the kernel settings that the cluster changed on this machine (a further node's go with its namespace)."""
    records = [config.data / "sysctls.json", *(config.state / node.name / "network" / "sysctls.json" for node in config.nodes if not node.netns)]
    for record in records:
        SysctlRecord(record).restore()
