"""Kernel parameters under /proc/sys that the network needs, with their former values, so that they can be put back.

Role: used by the pod network from its worker thread, inside the node's network namespace. The record is a file, because the process that
restores may not be the one that changed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

_ROOT = Path("/proc/sys")


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


class SysctlRecord:
    """Parameters we changed, with what they were before the first change."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._before: dict[str, str] = json.loads(path.read_text())
        except (OSError, ValueError):
            self._before = {}

    def ensure(self, name: str, value: str) -> None:
        """Set a parameter unless it has the value already; remembers the old one durably first."""
        current = read(name)
        if current is None or current == value:
            return
        if name not in self._before:
            self._before[name] = current
            temporary = self._path.with_suffix(".new")
            temporary.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(self._before))
            os.replace(temporary, self._path)
        write(name, value)

    def restore(self) -> None:
        """Put every remembered value back, newest change first, and forget the record."""
        for name, value in reversed(list(self._before.items())):
            write(name, value)
        self._before = {}
        self._path.unlink(missing_ok=True)
