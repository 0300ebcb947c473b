"""Watches over WebSocket: each event is a message of its own, text for JSON and binary for protobuf.

`WebSocketStream` stands in for the chunked answer that other watchers write to, so that the same watcher serves both. What the
client sends is read and dropped; its close ends the watch. Caller: the watch verb.

Source: apiserver endpoints/handlers/watch.go HandleWS, apimachinery httpstream/wsstream, golang.org/x/net/websocket Handler (which
demands an Origin, takes at most one subprotocol and repeats it).
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from typing import Any
from urllib.parse import urlsplit

from knarr.http import websocket
from knarr.http.errors import HTTPError
from knarr.http.raw import RawConnection
from knarr.http.server import Request
from knarr.http.websocket import WebSocket

_LENGTH_BYTES = 4
Spawn = Callable[[Coroutine[Any, Any, None], str], "asyncio.Task[None]"]


class WebSocketStream:
    """The part of a ResponseStream that a Watcher uses."""

    def __init__(self, socket: WebSocket, connection: RawConnection, *, binary: bool, spawn: Spawn) -> None:
        self._socket = socket
        self._connection = connection
        self._binary = binary
        self.closed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        """Done when the peer has gone away."""
        spawn(self._ignore_input(), "websocket-watch")

    @property
    def buffered_bytes(self) -> int:
        """Bytes written that the kernel has not taken yet."""
        return self._connection.buffered_bytes

    def write(self, data: bytes) -> None:
        """Send the events of data, each as one message."""
        if self.closed.done():
            return
        if self._binary:
            for event in _protobuf_events(data):
                self._socket.send_nowait(event)
        else:
            for event in data.splitlines(keepends=True):
                self._socket.send_text_nowait(event)

    def write_rendered(self, chunk: bytes) -> None:
        """Send what is already one chunk of a chunked answer: length line, data, line end."""
        self.write(chunk[chunk.index(b"\r\n") + 2 : -2])

    def close(self) -> None:
        """Say good-bye and close."""
        self._socket.close()

    def abort(self) -> None:
        """Break the connection."""
        self._connection.abort()

    async def _ignore_input(self) -> None:
        try:
            while await self._socket.receive() is not None:
                pass
        except (HTTPError, ConnectionError):
            pass
        finally:
            if not self.closed.done():
                self.closed.set_result(None)
            self._connection.close()


def _protobuf_events(data: bytes) -> Iterator[bytes]:
    """Take frames apart: on a WebSocket the length before each is not needed."""
    position = 0
    while position < len(data):
        size = int.from_bytes(data[position : position + _LENGTH_BYTES], "big")
        position += _LENGTH_BYTES
        yield data[position : position + size]
        position += size


def start(request: Request, *, binary: bool, spawn: Spawn) -> WebSocketStream | None:
    """Answer the handshake; None when it was refused (and answered)."""
    if not urlsplit(request.headers.get("origin", "")).scheme:
        request.respond(403, [], b"")
        return None
    offered = websocket.offered(request)
    if len(offered) > 1:
        request.respond(400, [], b"")
        return None
    taken = websocket.accept_connection(request, ("", *offered))
    if taken is None:
        return None
    return WebSocketStream(*taken, binary=binary, spawn=spawn)
