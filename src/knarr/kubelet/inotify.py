"""Waits for changes of files without polling: a thin asyncio face of inotify(7).

Callers: logs (follow), static_pods. One instance per watch; close it.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import struct
from dataclasses import dataclass

IN_MODIFY = 0x2
IN_CLOSE_WRITE = 0x8
IN_MOVED_FROM = 0x40
IN_MOVED_TO = 0x80
IN_CREATE = 0x100
IN_DELETE = 0x200
_FLAGS = os.O_NONBLOCK | os.O_CLOEXEC
_HEADER = struct.Struct("iIII")

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True, slots=True)
class Change:
    """One event: the name inside of the watched directory ("" for the watched file itself) and what happened."""

    name: str
    mask: int


class Inotify:
    """A set of watched paths; `changed` is set whenever something happened since it was last cleared."""

    def __init__(self) -> None:
        self._fd = _libc.inotify_init1(_FLAGS)
        if self._fd < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        self.changed = asyncio.Event()
        self._changes: list[Change] = []
        asyncio.get_running_loop().add_reader(self._fd, self._read)

    def add(self, path: str, mask: int) -> None:
        """Watch a path. Raises OSError."""
        if _libc.inotify_add_watch(self._fd, os.fsencode(path), ctypes.c_uint32(mask)) < 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), path)

    def _read(self) -> None:
        try:
            data = os.read(self._fd, 65536)
        except (BlockingIOError, OSError):
            return
        offset = 0
        while offset < len(data):
            _, mask, _, length = _HEADER.unpack_from(data, offset)
            offset += _HEADER.size
            name = data[offset : offset + length].rstrip(b"\0")
            offset += length
            if len(self._changes) < 1024:
                self._changes.append(Change(os.fsdecode(name), mask))
        self.changed.set()

    async def wait(self) -> list[Change]:
        """Wait for changes and give them; at most a thousand are kept between two calls."""
        await self.changed.wait()
        self.changed.clear()
        changes, self._changes = self._changes, []
        return changes

    def close(self) -> None:
        if self._fd >= 0:
            asyncio.get_running_loop().remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
