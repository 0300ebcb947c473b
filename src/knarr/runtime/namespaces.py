"""Kernel namespaces of a sandbox, kept alive by bind mounts instead of a pause process.

Role: makes and drops them, below sandbox.py. A thread of its own unshares, pins /proc/thread-self/ns/* on files in the state
folder and ends; no process is forked. Only a user namespace needs one (the kernel refuses it to a process with threads): the
program `unshare` holds it for the moment in which its maps are written.
Invariants: on failure nothing stays mounted; `drop` is idempotent.
"""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knarr.runtime import disk, syscalls
from knarr.runtime.cri import IDMapping, RuntimeFault

_FLAGS = {"net": syscalls.CLONE_NEWNET, "ipc": syscalls.CLONE_NEWIPC, "uts": syscalls.CLONE_NEWUTS, "user": syscalls.CLONE_NEWUSER}
_SYSCTL = re.compile(r"[a-z0-9_]([-_a-z0-9]*[a-z0-9_])?([./][a-z0-9_*]([-_a-zA-Z0-9:@]*[a-z0-9_])?)*\Z")


@dataclass(frozen=True, slots=True)
class NamespacePlan:
    """What to make: kinds among net, ipc, uts; the host name; sysctls; maps when a user namespace owns the others."""

    directory: str
    kinds: Sequence[str]
    hostname: str = ""
    sysctls: Mapping[str, str] | None = None
    user_mappings: Sequence[IDMapping] | None = None


def sysctl_path(name: str) -> str:
    """The file below /proc/sys: dots separate, or slashes if they come first. Raises RuntimeFault for anything else."""
    if not _SYSCTL.match(name):
        raise RuntimeFault(f'invalid sysctl "{name}"')
    first = re.search(r"[./]", name)
    if first is not None and first.group() == ".":
        name = name.translate(str.maketrans("./", "/."))
    return f"/proc/sys/{name}"


def create(plan: NamespacePlan) -> None:
    """Make and pin the namespaces. Must run in a thread of its own: it leaves the thread inside them.

    Raises RuntimeFault; nothing is left then.
    """
    os.makedirs(plan.directory, mode=0o700, exist_ok=True)
    try:
        if plan.user_mappings is not None:
            _with_user_namespace(plan)
        else:
            flags = 0
            for kind in plan.kinds:
                flags |= _FLAGS[kind]
            if flags:
                syscalls.unshare(flags)
            _pin("/proc/thread-self/ns", plan.directory, plan.kinds)
        _configure(plan)
    except OSError as error:
        drop(plan.directory)
        raise RuntimeFault(f"failed to create namespaces: {error.strerror or error}") from error
    except BaseException:
        drop(plan.directory)
        raise


def _pin(source: str, directory: str, kinds: Sequence[str]) -> None:
    for kind in kinds:
        target = os.path.join(directory, kind)
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
        syscalls.bind(f"{source}/{kind}", target)


def _configure(plan: NamespacePlan) -> None:
    """Name the host, raise lo and set sysctls, inside the namespaces (this thread is in them)."""
    if "uts" in plan.kinds and plan.hostname:
        with open("/proc/sys/kernel/hostname", "w") as file:
            file.write(plan.hostname)
    if "net" in plan.kinds:
        syscalls.loopback_up()
    for name, value in (plan.sysctls or {}).items():
        path = sysctl_path(name)
        try:
            with open(path, "w") as file:
                file.write(value)
        except OSError as error:
            raise RuntimeFault(f'failed to set sysctl "{name}" to "{value}": {error.strerror}') from error


def _with_user_namespace(plan: NamespacePlan) -> None:
    kinds = ["user", *plan.kinds]
    options = {"user": "--user", "net": "--net", "ipc": "--ipc", "uts": "--uts"}
    argv = ["unshare", *(options[kind] for kind in kinds), "sh", "-c", "echo; read x"]
    child = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, start_new_session=True)
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        if child.stdout.readline() != b"\n":
            raise RuntimeFault("the kernel does not allow user namespaces here")
        lines = "".join(f"{item.container_id} {item.host_id} {item.length}\n" for item in plan.user_mappings or ())
        for name in ("uid_map", "gid_map"):
            with open(f"/proc/{child.pid}/{name}", "w") as file:
                file.write(lines)
        _pin(f"/proc/{child.pid}/ns", plan.directory, kinds)
    finally:
        child.kill()
        child.stdin.close()
        child.stdout.close()
        child.wait()
    for kind in plan.kinds:
        enter(os.path.join(plan.directory, kind))


def enter(path: str) -> None:
    """Move the calling thread into a pinned namespace."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        syscalls.setns(fd)
    finally:
        os.close(fd)


def drop(directory: str) -> None:
    """Unpin and remove; namespaces vanish when their last process ends. Idempotent."""
    for kind in ("net", "ipc", "uts", "user"):
        path = os.path.join(directory, kind)
        with contextlib.suppress(FileNotFoundError):
            while syscalls.unmount(path):
                pass
    disk.remove_tree(directory)


def pinned(directory: str, kind: str) -> bool:
    """Whether a namespace is still held there (it is not after the machine was restarted)."""
    try:
        return os.stat(os.path.join(directory, kind)).st_dev != os.stat(directory).st_dev
    except OSError:
        return False
