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
import socket
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from knarr.cluster.config import ClusterConfig, NodeConfig
from knarr.network import netns
from knarr.network.sysctl import SysctlRecord

MNT_DETACH = 2
CGROUPS = Path("/sys/fs/cgroup")
NETNS_FOLDER = Path("/run/netns")
TERM_SECONDS = 2.0
KILL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Scope:
    """What a clean-up is about: everything below one cgroup and below some folders."""

    cgroup: str
    """Relative to each hierarchy, e.g. "knarr" or "knarr/node-2"."""
    folders: tuple[Path, ...]


def cluster_scope(config: ClusterConfig) -> Scope:
    return Scope(f"knarr{config.suffix}", tuple(dict.fromkeys((config.data, config.data.resolve(), config.state))))


def node_scope(config: ClusterConfig, node: NodeConfig) -> Scope:
    data = config.data / "nodes" / node.name
    return Scope(f"knarr{config.suffix}/{node.name}", tuple(dict.fromkeys((data, data.resolve(), config.state / node.name))))


def clean(config: ClusterConfig, *, grace_seconds: float = TERM_SECONDS) -> None:
    """Remove everything of a stopped cluster from the host; data in its folder stays.

    Args:
      grace_seconds: how long containers may take to end after TERM before they are killed.
    """
    scope = cluster_scope(config)
    stop_processes(scope, grace_seconds)
    for node in config.nodes:
        give_back_attachments(config, node)
    remove_tables(config)
    remove_interfaces(config)
    for node in config.nodes:
        remove_namespace(node)
    remove_mounts(scope)
    remove_cgroups(scope)
    restore_sysctls(config)
    shutil.rmtree(config.state, ignore_errors=True)
    with contextlib.suppress(OSError):
        config.state.parent.rmdir()


def clean_node(config: ClusterConfig, node: NodeConfig, *, grace_seconds: float = TERM_SECONDS) -> None:
    """Remove what one stopped node runs and holds, as if its machine had been switched off; its data stays."""
    scope = node_scope(config, node)
    stop_processes(scope, grace_seconds)
    give_back_attachments(config, node)
    remove_namespace(node)
    remove_mounts(scope)
    remove_cgroups(scope)
    shutil.rmtree(config.state / node.name, ignore_errors=True)


def give_back_attachments(config: ClusterConfig, node: NodeConfig) -> None:
    """Have CNI plugins take down what they made for a stopped node's pods, as long as those pods' namespaces are still there."""
    from knarr.network.plugins import take_down

    take_down(config.state / node.name / "network", str(NETNS_FOLDER / node.netns) if node.netns else None, config.cni_bin_dirs)


def clean_stale(config: ClusterConfig) -> None:
    """After a crash of the whole machine or supervisor: drop what cannot be taken over, keep running containers."""
    socket_path = config.state / "control.sock"
    socket_path.unlink(missing_ok=True)


def cgroup_folders(scope: Scope) -> list[Path]:
    """Existing folders of the scope's cgroup: one in a v2 tree, one per controller in v1."""
    candidates = [CGROUPS / scope.cgroup, *(entry / scope.cgroup for entry in CGROUPS.iterdir())] if CGROUPS.is_dir() else []
    return [path for path in candidates if path.is_dir() and (path / "cgroup.procs").exists()]


def _members(scope: Scope) -> set[int]:
    pids: set[int] = set()
    for folder in cgroup_folders(scope):
        for procs in folder.rglob("cgroup.procs"):
            with contextlib.suppress(OSError):
                pids.update(int(line) for line in procs.read_text().split())
    return pids


def _monitors(scope: Scope) -> set[int]:
    """conmon processes whose command line names one of the scope's folders."""
    found = set()
    for pid, command in _processes():
        if "conmon" in command.split("\0", 1)[0].rsplit("/", 1)[-1] and any(f"{folder}/" in command for folder in scope.folders):
            found.add(pid)
    return found


def _processes() -> Iterator[tuple[int, str]]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                yield int(entry.name), (entry / "cmdline").read_text()


def stop_processes(scope: Scope, grace_seconds: float) -> None:
    """TERM, then KILL, to every container process; the monitors end by themselves or are killed last."""
    members = _members(scope)
    _signal_all(members, signal.SIGTERM)
    _wait_gone(members, grace_seconds)
    while left := _members(scope):  # a fork may have been missed by the pass before
        _signal_all(left, signal.SIGKILL)
        if not _wait_gone(left, KILL_SECONDS):
            break
    monitors = _monitors(scope)
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


def remove_mounts(scope: Scope) -> None:
    """Detach every mount below the scope's folders, deepest first."""
    roots = tuple(f"{folder}/" for folder in scope.folders)
    points = []
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        point = line.split()[4].encode().decode("unicode_escape")
        if point.startswith(roots):
            points.append(point)
    for point in sorted(points, key=len, reverse=True):
        _detach(point)


def _detach(path: str | Path) -> None:
    ctypes.CDLL(None, use_errno=True).umount2(os.fsencode(path), MNT_DETACH)


def remove_namespace(node: NodeConfig) -> None:
    """Remove a further node's network namespace; the interfaces in it go with its last process."""
    path = NETNS_FOLDER / node.netns
    if node.netns and path.exists():
        netns.delete_named(path)


def interface_names(config: ClusterConfig) -> list[str]:
    """Interfaces of this cluster: the pod network's, by the names it was given, and every one that bears the cluster's mark."""
    found = []
    for _, name in socket.if_nameindex():  # the kernel's own answer, since sysfs may show another network namespace
        with contextlib.suppress(OSError):
            own = name == f"knarr{config.slot}" or name.startswith(f"kp{config.slot}-")
            if own or Path("/sys/class/net", name, "ifalias").read_text().strip() == f"knarr:{config.name}":
                found.append(name)
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
    names = {f"knarr{config.suffix}{part}" for part in ("", "-net", "-policy", "-nodes")} | {f"kp{config.slot}-vx"}
    tables = [entry["table"] for entry in json.loads(answer.stdout)["nftables"] if "table" in entry]
    return [(table["family"], table["name"]) for table in tables if table["name"] in names]


def remove_tables(config: ClusterConfig) -> None:
    for family, name in table_names(config):
        subprocess.run(["nft", "delete", "table", family, name], check=False, capture_output=True)


def remove_cgroups(scope: Scope) -> None:
    for folder in cgroup_folders(scope):
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
