"""Kernel parameters under /proc/sys that the network needs, with their former values, so that they can be put back.

Role: used by the pod network from its worker thread, inside the node's network namespace, and by cluster when it takes
a node down. Several clusters share one machine: the register in /run says who needs a parameter, and only the last one
to leave puts it back. Each user has a record file of its own, so that another process than the one that changed
something can restore, and a user whose record is gone counts no more.
Invariants: a value that was right already, and that no cluster set, is nobody's to restore.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_ROOT = Path("/proc/sys")
_TRACKING_SECONDS = {"established": 86400, "close_wait": 3600}
"""Source: pkg/proxy/apis/config/v1alpha1/defaults.go."""
REGISTER = Path("/run/knarr-sysctls.json")


def read(name: str) -> str | None:
    """The value of a parameter such as "net/ipv4/ip_forward"; None where the kernel has none."""
    try:
        return (_ROOT / name).read_text().strip()
    except OSError:
        return None


def write(name: str, value: str) -> bool:
    """Set a parameter; False where the kernel lacks or refuses it."""
    try:
        (_ROOT / name).write_text(value)
    except OSError:
        return False
    return True


def _namespace() -> str:
    # A register entry belongs to one network namespace: nodes of one machine may be namespaces.
    return str(os.stat("/proc/thread-self/ns/net").st_ino)


class SysctlRecord:
    """Parameters that one user (a cluster's node) needs. `path` is its record file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def ensure(self, name: str, value: str) -> None:
        """Set a parameter; remembers, durably and before the change, what it was and that we need it."""
        with self._register() as register:
            key = f"{_namespace()}:{name}"
            entry = register.get(key)
            current = read(name)
            if current is None or (entry is None and current == value):
                return
            if entry is None:
                entry = register[key] = {"before": current, "users": []}
            if str(self._path) not in entry["users"]:
                entry["users"].append(str(self._path))
            self._remember(name)
        if current != value:
            write(name, value)

    def ensure_tracking(self) -> None:
        """How long connections that nobody ends are remembered, as kube-proxy has it. The kernel has these once something tracks."""
        for name, seconds in _TRACKING_SECONDS.items():
            self.ensure(f"net/netfilter/nf_conntrack_tcp_timeout_{name}", str(seconds))

    def restore(self) -> None:
        """Give up what we needed; puts back what nobody needs any more, newest change first. Forgets the record."""
        names = self._names()
        with self._register() as register:
            for name in reversed(names):
                key = f"{_namespace()}:{name}"
                entry = register.get(key)
                if entry is None:
                    continue
                others = [user for user in entry["users"] if user != str(self._path) and os.path.exists(user)]
                if others:
                    entry["users"] = others
                    continue
                write(name, entry["before"])
                del register[key]
        self._path.unlink(missing_ok=True)

    def _names(self) -> list[str]:
        try:
            return [str(name) for name in json.loads(self._path.read_text())]
        except (OSError, ValueError):
            return []

    def _remember(self, name: str) -> None:
        names = self._names()
        if name not in names:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            _replace(self._path, [*names, name])

    @contextmanager
    def _register(self) -> Iterator[dict[str, Any]]:
        lock = os.open(REGISTER.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            try:
                register: dict[str, Any] = json.loads(REGISTER.read_text())
            except (OSError, ValueError):
                register = {}
            yield register
            if register:
                _replace(REGISTER, register)
            else:
                REGISTER.unlink(missing_ok=True)
        finally:
            os.close(lock)


def _replace(path: Path, content: object) -> None:
    temporary = path.with_name(path.name + ".new")
    temporary.write_text(json.dumps(content))
    os.replace(temporary, path)
