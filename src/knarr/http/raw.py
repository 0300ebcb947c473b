"""A raw byte connection: what is left of an HTTP connection after an upgrade, on the server as on the client.

Callers: websocket, spdy and the API server's proxies. The protocol object that owned the transport feeds it. Reading is
bounded: above HIGH_WATER unread bytes the transport is paused until the reader has caught up.
"""

from __future__ import annotations

import asyncio
import contextlib

from knarr.http.transports import close_once

HIGH_WATER_BYTES = 256 * 1024


class RawConnection:
    """Bytes in, bytes out, over a transport whose HTTP part is over."""

    __slots__ = ("_buffer", "_can_write", "_eof", "_paused", "_reader", "_size", "_transport", "closed")

    def __init__(self, transport: asyncio.Transport, first: bytes = b"") -> None:
        self._transport = transport
        self._buffer: list[bytes] = [first] if first else []
        self._size = len(first)
        self._eof = False
        self._paused = False
        self._reader: asyncio.Future[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the transport is gone."""

    # -- fed by the owning protocol ---------------------------------------------------------------------------------
    def feed(self, data: bytes) -> None:
        self._buffer.append(data)
        self._size += len(data)
        if self._size > HIGH_WATER_BYTES and not self._paused:
            self._paused = True
            with contextlib.suppress(RuntimeError, AttributeError):
                self._transport.pause_reading()
        self._wake_reader()

    def feed_eof(self) -> None:
        self._eof = True
        self._wake_reader()

    def connection_lost(self) -> None:
        self._eof = True
        self._wake_reader()
        self.resume_writing()
        if not self.closed.done():
            self.closed.set_result(None)

    def pause_writing(self) -> None:
        if self._can_write is None:
            self._can_write = asyncio.get_running_loop().create_future()

    def resume_writing(self) -> None:
        waiter, self._can_write = self._can_write, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _wake_reader(self) -> None:
        reader, self._reader = self._reader, None
        if reader is not None and not reader.done():
            reader.set_result(None)

    # -- used by the owner of the stream ----------------------------------------------------------------------------
    async def read(self) -> bytes:
        """Return everything that has arrived, waiting for at least one byte; b"" means the peer has finished."""
        while not self._buffer:
            if self._eof:
                return b""
            if self._reader is None:
                self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._size = 0
        if self._paused:
            self._paused = False
            with contextlib.suppress(RuntimeError, AttributeError):
                self._transport.resume_reading()
        return data

    @property
    def buffered_bytes(self) -> int:
        """Bytes written that the kernel has not taken yet."""
        return self._transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Queue bytes for the peer; without effect once the connection is gone."""
        if data and not self._transport.is_closing():
            self._transport.write(data)

    async def drain(self) -> None:
        """Wait until the peer has taken enough of what was written."""
        if self._can_write is not None:
            await asyncio.shield(self._can_write)

    def write_eof(self) -> None:
        """Finish our direction; over TLS, which has no half close in asyncio, this closes the connection."""
        if self._transport.is_closing():
            return
        if self._transport.can_write_eof():
            self._transport.write_eof()
        else:
            close_once(self._transport)

    def close(self) -> None:
        """Close after what was written has been sent."""
        close_once(self._transport)

    def abort(self) -> None:
        """Drop the connection at once."""
        self._transport.abort()
