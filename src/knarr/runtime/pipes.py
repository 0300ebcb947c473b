"""Byte streams over file descriptors: pipes, terminals, packet and stream sockets, without transports.

Role: below execs.py, attach.py and forward.py. One `Source` per descriptor; several can feed one bounded queue (`Merged`), so
that a slow consumer slows the producer down and nothing is lost.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator, Callable, Sequence

from knarr.aiokits.tasks import Tasks
from knarr.runtime.process import resolve, wait_readable

CHUNK = 65536


async def wait_writable(fd: int) -> None:
    """Return when fd can be written. Cancellation leaves nothing registered."""
    loop = asyncio.get_running_loop()
    ready: asyncio.Future[None] = loop.create_future()
    loop.add_writer(fd, resolve, ready)
    try:
        await ready
    finally:
        loop.remove_writer(fd)


async def read_some(fd: int, size: int = CHUNK) -> bytes:
    """One read from a non-blocking descriptor; b"" at its end (a hung-up terminal and a reset connection end too)."""
    while True:
        try:
            return os.read(fd, size)
        except BlockingIOError:
            await wait_readable(fd)
        except OSError as error:
            if error.errno in (errno.EIO, errno.ECONNRESET, errno.EPIPE):
                return b""
            raise


async def write_all(fd: int, data: bytes, packet: int = 0) -> None:
    """Write everything to a non-blocking descriptor; `packet` bounds one write (packet sockets). Raises OSError."""
    view = memoryview(data)
    while view:
        try:
            sent = os.write(fd, view[:packet] if packet else view)
        except BlockingIOError:
            await wait_writable(fd)
            continue
        view = view[sent:]


class Merged:
    """Several descriptors read into one bounded queue of (channel, data).

    Args:
      sources: (channel, descriptor) pairs; the descriptors are closed at their end or by `close`.
      split: Turns one read into (channel, data) for sources that carry both, given (channel, raw data).
    """

    def __init__(
        self, sources: Sequence[tuple[int, int]], *, chunks: int = 16, split: Callable[[int, bytes], tuple[int, bytes]] | None = None
    ) -> None:
        self._queue: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(chunks)
        self._tasks = Tasks()
        self._split = split
        self._open = len(sources)
        for channel, fd in sources:
            os.set_blocking(fd, False)
            self._tasks.spawn(self._pump(channel, fd), f"read channel {channel}")

    async def _pump(self, channel: int, fd: int) -> None:
        try:
            while data := await read_some(fd):
                await self._queue.put(self._split(channel, data) if self._split else (channel, data))
        finally:
            os.close(fd)
        self._open -= 1
        if self._open == 0:
            await self._queue.put(None)

    async def read(self) -> AsyncIterator[tuple[int, bytes]]:
        """Yield (channel, data) until every source has ended."""
        while (item := await self._queue.get()) is not None:
            yield item

    async def close(self) -> None:
        """Stop reading and close what is open; a reader sees the end."""
        await self._tasks.close()
        with contextlib.suppress(asyncio.QueueFull):
            self._queue.put_nowait(None)
