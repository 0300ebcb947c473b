"""WebSocket framing (RFC 6455) over a raw connection, server and client side.

Role: frames, fragments, control frames, the opening handshake. Callers: remotecommand.py and portforward.py (exec, attach,
port-forward), the API server and kubelet (watches and logs over WebSocket). Extensions are not offered. Reading answers pings
and assembles fragments; a message is bounded. It knows no Kubernetes protocol beyond subprotocol names given by callers.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import os
from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from knarr.http.errors import HTTPError
from knarr.http.raw import RawConnection
from knarr.http.server import Request

CONTINUATION, TEXT, BINARY, CLOSE, PING, PONG = 0x0, 0x1, 0x2, 0x8, 0x9, 0xA
NORMAL, PROTOCOL_ERROR, TOO_BIG = 1000, 1002, 1009
_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
MAX_MESSAGE_BYTES = 32 << 20


class Connection(Protocol):
    """What framing needs from the connection below; RawConnection has it."""

    async def read(self) -> bytes: ...
    def write(self, data: bytes) -> None: ...
    async def drain(self) -> None: ...
    def close(self) -> None: ...


class WebSocketError(HTTPError):
    """The peer broke the protocol; the connection is of no further use."""


def accept_key(key: str) -> str:
    return base64.b64encode(hashlib.sha1(key.encode("latin-1") + _GUID).digest()).decode()


def _mask(data: bytes, key: bytes) -> bytes:
    size = len(data)
    if not size:
        return b""
    pad = (key * (size // 4 + 1))[:size]
    return (int.from_bytes(data, "little") ^ int.from_bytes(pad, "little")).to_bytes(size, "little")


def frame(opcode: int, data: bytes, *, masked: bool = False) -> bytes:
    """One final frame."""
    size = len(data)
    bit = 0x80 if masked else 0
    if size < 126:
        head = bytes((0x80 | opcode, bit | size))
    elif size < 65536:
        head = bytes((0x80 | opcode, bit | 126)) + size.to_bytes(2, "big")
    else:
        head = bytes((0x80 | opcode, bit | 127)) + size.to_bytes(8, "big")
    if masked:
        key = os.urandom(4)
        return head + key + _mask(data, key)
    return head + data


class WebSocket:
    """One WebSocket; one reader, any number of writers.

    Args:
      client: Whether we are the client (and mask what we send).
    """

    def __init__(self, connection: Connection, *, client: bool = False, max_message_bytes: int = MAX_MESSAGE_BYTES) -> None:
        self._connection, self._client, self._limit = connection, client, max_message_bytes
        self._buffer = bytearray()
        self._closing = False
        self.subprotocol = ""

    # Reading

    async def receive(self) -> tuple[int, bytes] | None:
        """Return (TEXT or BINARY, message), None at the end. Raises WebSocketError when the peer breaks the protocol."""
        parts: list[bytes] = []
        kind, size = 0, 0
        while True:
            head = await self._frame()
            if head is None:
                return None
            final, opcode, data = head
            if opcode in (CLOSE, PING, PONG):
                if not self._control(opcode, data):
                    return None
                continue
            if (opcode == CONTINUATION) != bool(kind) or opcode not in (CONTINUATION, TEXT, BINARY):
                raise self._broken("unexpected frame")
            kind = kind or opcode
            size += len(data)
            if size > self._limit:
                raise self._broken("message too big", TOO_BIG)
            parts.append(data)
            if final:
                return kind, parts[0] if len(parts) == 1 else b"".join(parts)

    def _control(self, opcode: int, data: bytes) -> bool:
        if opcode == PING:
            self._send(PONG, data)
        elif opcode == CLOSE:
            if not self._closing:
                self._closing = True
                self._send(CLOSE, data[:2])
            return False
        return True

    async def _frame(self) -> tuple[bool, int, bytes] | None:
        if not await self._fill(2):
            return None
        first, second = self._buffer[0], self._buffer[1]
        masked, size, position = bool(second & 0x80), second & 0x7F, 2
        opcode = first & 0x0F
        if first & 0x70:
            raise self._broken("reserved bits are set")
        if opcode >= 8 and (size > 125 or not first & 0x80):
            raise self._broken("malformed control frame")
        if masked == self._client:
            raise self._broken("frame is masked the wrong way")
        if size >= 126:
            extra = 2 if size == 126 else 8
            if not await self._fill(2 + extra):
                return None
            size, position = int.from_bytes(self._buffer[2 : 2 + extra], "big"), 2 + extra
        if size > self._limit:
            raise self._broken("frame too big", TOO_BIG)
        total = position + (4 if masked else 0) + size
        if not await self._fill(total):
            return None
        key = bytes(self._buffer[position : position + 4]) if masked else b""
        data = bytes(self._buffer[total - size : total])
        del self._buffer[:total]
        return bool(first & 0x80), opcode, _mask(data, key) if masked else data

    async def _fill(self, size: int) -> bool:
        while len(self._buffer) < size:
            data = await self._connection.read()
            if not data:
                return False
            self._buffer += data
        return True

    def _broken(self, why: str, code: int = PROTOCOL_ERROR) -> WebSocketError:
        self.close(code)
        return WebSocketError(why)

    # Writing

    def _send(self, opcode: int, data: bytes) -> None:
        self._connection.write(frame(opcode, data, masked=self._client))

    async def send_binary(self, data: bytes) -> None:
        """Send a message and wait until the peer keeps up."""
        self._send(BINARY, data)
        await self._connection.drain()

    def send_nowait(self, data: bytes) -> None:
        """Queue a binary message; pair with `drain`."""
        self._send(BINARY, data)

    async def drain(self) -> None:
        await self._connection.drain()

    def send_text_nowait(self, data: bytes) -> None:
        """Queue a text message; pair with `drain`."""
        self._send(TEXT, data)

    async def send_text(self, data: bytes) -> None:
        self._send(TEXT, data)
        await self._connection.drain()

    async def ping(self, data: bytes = b"") -> None:
        self._send(PING, data)
        await self._connection.drain()

    def close(self, code: int = NORMAL) -> None:
        """Send a close frame and close the connection after what was written. Idempotent."""
        if not self._closing:
            self._closing = True
            self._send(CLOSE, code.to_bytes(2, "big"))
        self._connection.close()


class WebSocketBytes:
    """A byte connection inside the binary messages of a WebSocket (SPDY tunnelled for kubectl)."""

    def __init__(self, socket: WebSocket) -> None:
        self._socket = socket

    async def read(self) -> bytes:
        while (message := await self._socket.receive()) is not None:
            if message[1]:
                return message[1]
        return b""

    def write(self, data: bytes) -> None:
        self._socket.send_nowait(data)

    async def drain(self) -> None:
        await self._socket.drain()

    def close(self) -> None:
        self._socket.close()


# The opening handshake


def is_upgrade(request: Request) -> bool:
    """Whether a request asks for a WebSocket."""
    return request.headers.get("upgrade", "").lower() == "websocket" and "upgrade" in request.headers.get("connection", "").lower()


def offered(request: Request) -> list[str]:
    """Subprotocols that the client offers, in its order."""
    return [item.strip() for item in request.headers.get("sec-websocket-protocol", "").split(",") if item.strip()]


def choose(request: Request, supported: Sequence[str]) -> str | None:
    """The first offered subprotocol that is supported; "" stands for none offered; None is no match."""
    wanted = offered(request) or [""]
    return next((item for item in wanted if item in supported), None)


def accept(request: Request, supported: Sequence[str]) -> WebSocket | None:
    """Answer the handshake and take the connection over; None when it was refused (and answered)."""
    taken = accept_connection(request, supported)
    return None if taken is None else taken[0]


def accept_connection(request: Request, supported: Sequence[str]) -> tuple[WebSocket, RawConnection] | None:
    """Like accept, with the connection below, for those who look at what has not been sent yet.

    Source: golang.org/x/net/websocket Server with wsstream's handshake: 400 for a malformed request, 403 for no common protocol.
    """
    key = request.headers.get("sec-websocket-key", "")
    if request.method != "GET" or request.headers.get("sec-websocket-version") != "13" or not key:
        request.respond(400, [("Content-Type", "text/plain"), ("Sec-WebSocket-Version", "13")], b"bad websocket handshake\n")
        return None
    subprotocol = choose(request, supported)
    if subprotocol is None:
        request.respond(403, [("Content-Type", "text/plain")], b"requested protocol(s) are not supported\n")
        return None
    raw = request.upgrade()
    lines = ["HTTP/1.1 101 Switching Protocols", "Upgrade: websocket", "Connection: Upgrade", f"Sec-WebSocket-Accept: {accept_key(key)}"]
    if subprotocol:
        lines.append(f"Sec-WebSocket-Protocol: {subprotocol}")
    raw.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    socket = WebSocket(raw)
    socket.subprotocol = subprotocol
    return socket, raw


READER_PROTOCOLS = ("", "binary.k8s.io", "base64.binary.k8s.io")


async def serve_reader(request: Request, chunks: AsyncIterator[bytes]) -> None:
    """Serve a plain byte stream (a log) over a WebSocket: no channels; closes at its end or when the client closes.

    Source: apimachinery pkg/util/httpstream/wsstream/stream.go.
    """
    import asyncio

    socket = accept(request, READER_PROTOCOLS)
    if socket is None:
        return
    encode = socket.subprotocol.startswith("base64")

    async def ignore_input() -> None:
        with contextlib.suppress(WebSocketError):
            while await socket.receive() is not None:
                pass

    async def copy() -> None:
        await (socket.send_text(b"") if encode else socket.send_binary(b""))
        async for chunk in chunks:
            if chunk:
                await (socket.send_text(base64.b64encode(chunk)) if encode else socket.send_binary(chunk))

    tasks = [asyncio.ensure_future(ignore_input()), asyncio.ensure_future(copy())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        socket.close()


def client_key() -> str:
    """A fresh Sec-WebSocket-Key."""
    return base64.b64encode(os.urandom(16)).decode()
