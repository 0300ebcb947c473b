"""Reads container logs in CRI format: tail, since, timestamps, byte limit, follow over rotations. Also the log files' rotation.

Callers: server (containerLogs), termination (fallback messages). Lines look like
`2016-10-06T00:17:09.669794202Z stdout F text`, tag P marking a part of a longer line.
Follow waits on inotify and on the container's end, never on a clock. Source: staging cri-client/pkg/logs/logs.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.kubelet.inotify import IN_CREATE, IN_MODIFY, IN_MOVED_TO, Inotify
from knarr.runtime import syscalls

log = get_logger(__name__)

_BLOCK = 64 * 1024
_END_GRACE_SECONDS = 0.02
"""How long a follower waits for the last lines after a container's end."""


@dataclass(slots=True)
class LogOptions:
    """What of a log is wanted. Source: PodLogOptions."""

    follow: bool = False
    previous: bool = False
    timestamps: bool = False
    tail_lines: int | None = None
    limit_bytes: int | None = None
    since_ns: int = 0
    """Epoch nanoseconds; lines before are left out."""
    stream: str = "All"
    """All, Stdout or Stderr."""


def timestamp_ns(text: bytes) -> int:
    """Epoch nanoseconds of an RFC 3339 time with up to nine digits of fraction. Raises ValueError."""
    whole, dot, rest = text.partition(b".")
    if not dot:
        return round(clock.parse_rfc3339(text.decode())) * 1_000_000_000
    digits = 0
    while digits < len(rest) and 48 <= rest[digits] <= 57:
        digits += 1
    seconds = clock.parse_rfc3339((whole + rest[digits:]).decode())
    return round(seconds) * 1_000_000_000 + int(rest[:digits].ljust(9, b"0")[:9])


def _shown(stamp: bytes) -> bytes:
    """The time as kubectl prints it: nine digits and Z."""
    whole, _, rest = stamp.partition(b".")
    if rest.endswith(b"+00:00"):
        rest = rest[:-6] + b"Z"
    digits = rest.rstrip(b"Z")
    if rest.endswith(b"Z") and digits.isdigit():
        return whole + b"." + digits.ljust(9, b"0")[:9] + b"Z"
    return stamp


class _Selector:
    """Turns raw log lines into output, honouring the options."""

    def __init__(self, options: LogOptions) -> None:
        self._options = options
        self._left = options.limit_bytes
        self._wanted = {"Stdout": b"stdout", "Stderr": b"stderr"}.get(options.stream)
        self._fresh = {b"stdout": True, b"stderr": True}
        self.full = options.limit_bytes is not None and options.limit_bytes <= 0

    def feed(self, data: bytes) -> bytes:
        """Select from whole lines."""
        options, out = self._options, []
        for line in data.splitlines(keepends=True):
            parts = line.split(b" ", 3)
            if len(parts) < 4:
                continue
            stamp, stream, tag, text = parts
            fresh = self._fresh.get(stream, True)
            partial = tag.startswith(b"P")
            if options.since_ns:
                try:
                    if timestamp_ns(stamp) < options.since_ns:
                        continue
                except ValueError:
                    continue
            if self._wanted is not None and stream != self._wanted:
                continue
            if partial and text.endswith(b"\n"):
                text = text[:-1]
            if options.timestamps and fresh:
                text = _shown(stamp) + b" " + text
            self._fresh[stream] = not partial
            if self._left is not None:
                text = text[: self._left]
                self._left -= len(text)
            out.append(text)
            if self._left is not None and self._left <= 0:
                self.full = True
                break
        return b"".join(out)


def tail_offset(fd: int, lines: int) -> int:
    """Where the last `lines` lines of a file begin."""
    end = os.fstat(fd).st_size
    if lines <= 0:
        return end
    position, found, first = end, 0, True
    while position > 0:
        start = max(0, position - _BLOCK)
        block = os.pread(fd, position - start, start)
        stop = len(block)
        if first and block.endswith(b"\n"):
            stop -= 1
        first = False
        while (index := block.rfind(b"\n", 0, stop)) >= 0:
            found += 1
            if found == lines:
                return start + index + 1
            stop = index
        position = start
    return 0


def _open_below(path: str, flags: int) -> int:
    # <pod>/<container>/<file>: a pod with a hostPath to the logs can put links there, which could lead to any file of the host.
    head, *parts = path.rsplit("/", 3)
    base = os.open(head or "/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        return syscalls.open_without_links(base, "/".join(parts), flags)
    finally:
        os.close(base)


def open_log(path: str) -> int:
    """Open a container's log to read it; the caller closes it.

    Raises:
      FileNotFoundError: there is none.
      OSError: it, or one of its two folders, is no longer what the kubelet and the runtime made, but a link or a device.
    """
    fd = _open_below(path, os.O_RDONLY | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file", path)
    return fd


async def read(path: str, options: LogOptions, ended: Callable[[], Awaitable[bool]], changed: asyncio.Event | None = None) -> AsyncIterator[bytes]:
    """Yield the selected log as chunks of bytes.

    Args:
      ended: whether the container will write no more.
      changed: set when `ended` may have become true; needed to follow.

    Raises:
      OSError: there is no such log, or no file in its place.
    """
    selector = _Selector(options)
    watch: Inotify | None = None
    fd = open_log(path)
    try:
        if options.follow:
            watch = Inotify()
            watch.add(os.path.dirname(path), IN_MODIFY | IN_CREATE | IN_MOVED_TO)
        if options.tail_lines is not None:
            os.lseek(fd, tail_offset(fd, options.tail_lines), os.SEEK_SET)
        rest = b""
        over = False
        while not selector.full:
            data = os.read(fd, _BLOCK)
            if data:
                rest += data
                cut = rest.rfind(b"\n") + 1
                chunk, rest = rest[:cut], rest[cut:]
                out = selector.feed(chunk) if chunk else b""
                if out:
                    yield out
                continue
            if watch is None:
                break
            replaced = _reopen(path, fd)
            if replaced is not None:
                os.close(fd)
                fd, rest = replaced, b""
                continue
            if over:
                break
            over = await _wait_more(watch, ended, changed)
        if rest and not selector.full and watch is None:
            out = selector.feed(rest + b"\n")
            if out:
                yield out
    finally:
        os.close(fd)
        if watch is not None:
            watch.close()


def _reopen(path: str, fd: int) -> int | None:
    """The new file after a rotation, None when it is still the same."""
    try:
        info, mine = os.lstat(path), os.fstat(fd)
        if (info.st_ino, info.st_dev) == (mine.st_ino, mine.st_dev):
            return None
        return open_log(path)
    except OSError:
        return None


async def _wait_more(watch: Inotify, ended: Callable[[], Awaitable[bool]], changed: asyncio.Event | None) -> bool:
    """Wait until there is more to read; True when the container has ended and this was the last wait."""
    if await ended():
        # What was written before the end is in the file; conmon's last write may be under way.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_END_GRACE_SECONDS):
                await watch.wait()
        return True
    waits: list[asyncio.Future[object]] = [asyncio.ensure_future(_wait_event(watch.changed))]
    if changed is not None:
        changed.clear()
        if await ended():
            waits[0].cancel()
            return False
        waits.append(asyncio.ensure_future(_wait_event(changed)))
    try:
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
    watch.changed.clear()
    return False


async def _wait_event(event: asyncio.Event) -> object:
    await event.wait()
    return None


async def tail_text(path: str, lines: int, limit_bytes: int) -> str:
    """The end of an ended container's log as text, at most so many lines and bytes."""
    async def over() -> bool:
        return True

    out = b""
    try:
        async for chunk in read(path, LogOptions(tail_lines=lines), over):
            out += chunk
    except OSError:
        return ""
    return out[-limit_bytes:].decode(errors="replace")


async def rotate(path: str, reopen: Callable[[], Awaitable[None]], max_files: int) -> None:
    """Rename a full log away and let the runtime open a new one; old ones beyond max_files are removed.

    Raises:
      OSError, RuntimeFault: the log stays as it is.
    """
    os.close(open_log(path))
    name = os.path.basename(path)
    folder = _open_below(path.rpartition("/")[0] + "/.", os.O_RDONLY | os.O_DIRECTORY)
    try:
        old = sorted(n for n in os.listdir(folder) if n.startswith(name + "."))
        for victim in old[: max(0, len(old) - (max_files - 2))]:
            os.unlink(victim, dir_fd=folder)
        stamp = clock.rfc3339(clock.now()).replace("-", "").replace(":", "").replace("T", "-").rstrip("Z")
        os.rename(name, f"{name}.{stamp}", src_dir_fd=folder, dst_dir_fd=folder)
        try:
            await reopen()
        except BaseException:
            os.rename(f"{name}.{stamp}", name, src_dir_fd=folder, dst_dir_fd=folder)
            raise
    finally:
        os.close(folder)
