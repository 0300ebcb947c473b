"""Port-forward for clients: SPDY, SPDY tunnelled in a WebSocket (kubectl since 1.31), and plain WebSocket channels.

Role: `serve_port_forward` takes an upgrade request and joins each forwarded connection to one made inside the pod. Callers: the
kubelet's server, by way of remotecommand. Invariants: each direction ends on its own (half close); one broken connection does
not disturb the others; a stream pair that stays incomplete is dropped.
Source: kubelet pkg/cri/streaming/portforward, apiserver pkg/util/proxy/streamtunnel.go, KEP-4006.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import struct
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Protocol

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.http import spdy, websocket
from knarr.http.errors import HTTPError
from knarr.http.server import Request

log = get_logger(__name__)
PROTOCOL = "portforward.k8s.io"
TUNNEL = f"SPDY/3.1+{PROTOCOL}"
_CHANNEL_PROTOCOLS = ("", "v4.channel.k8s.io", "v4.base64.channel.k8s.io")
_CREATION_SECONDS = 30.0
_PENDING = 64


class ByteStream(Protocol):
    """One connection inside a pod; the runtime's ByteStream (runtime.cri) fits."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def write_eof(self) -> None: ...
    async def close(self) -> None: ...


Connect = Callable[[int], Awaitable[ByteStream]]


async def serve_port_forward(request: Request, connect: Connect, *, pod: str = "", uid: str = "") -> None:
    """Serve one port-forward request until the client goes away.

    Args:
      connect: Makes a connection to a port inside the pod; its failure reaches the client as text on the error stream.
      pod: Name for error texts, namespace_name.

    Refused upgrades are answered here. Cancellation closes every connection.
    """
    what = f"to pod {pod}, uid {uid}"
    if not websocket.is_upgrade(request):
        protocol = spdy.accept(request, (PROTOCOL,))
        if protocol is not None:
            await _serve_spdy(spdy.start(request, protocol), connect, what)
        return
    if TUNNEL in websocket.offered(request):
        socket = websocket.accept(request, (TUNNEL,))
        if socket is not None:
            await _serve_spdy(websocket.WebSocketBytes(socket), connect, what)
        return
    try:
        ports = parse_ports(request.query)
    except ValueError as error:
        request.respond(400, [("Content-Type", "text/plain; charset=utf-8")], f"{error}\n".encode())
        return
    socket = websocket.accept(request, _CHANNEL_PROTOCOLS)
    if socket is not None:
        await _Channels(socket, ports, connect, what).serve()


def parse_ports(query: Mapping[str, Sequence[str]]) -> list[int]:
    """Ports of the query, comma separated or repeated ("port" as the kubelet, "ports" as the API). Raises ValueError."""
    values = [*query.get("port", ()), *query.get("ports", ())]
    if not values:
        raise ValueError('query parameter "port" is required')
    ports = []
    for value in values:
        if not value:
            raise ValueError('query parameter "port" cannot be empty')
        for item in value.split(","):
            ports.append(parse_port(item))
    return ports


def parse_port(text: str) -> int:
    """One port. Raises ValueError in upstream's words."""
    if not text.isdigit() or int(text) > 65535:
        raise ValueError(f'unable to parse "{text}" as a port')
    if int(text) < 1:
        raise ValueError(f'port "{text}" must be > 0')
    return int(text)


# SPDY: a pair of streams (error, data) per connection


class _Pair:
    def __init__(self) -> None:
        self.streams: dict[str, spdy.Stream] = {}
        self.timer: asyncio.TimerHandle | None = None


class _Pairs:
    """Collects streams into pairs by request id and serves each complete pair."""

    def __init__(self, connect: Connect, what: str, tasks: Tasks) -> None:
        self._connect, self._what, self._tasks = connect, what, tasks
        self._pairs: dict[str, _Pair] = {}
        self.session: spdy.Session | None = None

    def add(self, stream: spdy.Stream) -> None:
        """Take a new stream. Raises SPDYError for one without a valid port or type."""
        kind = stream.headers.get("streamtype", "")
        if kind not in ("error", "data"):
            raise spdy.SPDYError(f'invalid stream type "{kind}"')
        try:
            port = parse_port(stream.headers.get("port", ""))
        except ValueError as error:
            raise spdy.SPDYError(str(error)) from error
        # Clients before request ids opened the error stream first and the data stream right after it.
        key = stream.headers.get("requestid") or str(stream.id if kind == "error" else stream.id - 2)
        pair = self._pairs.get(key)
        if pair is None:
            pair = self._pairs[key] = _Pair()
            pair.timer = asyncio.get_running_loop().call_later(_CREATION_SECONDS, self._expire, key)
        if kind in pair.streams:
            raise spdy.SPDYError(f"{kind} stream already assigned")
        pair.streams[kind] = stream
        if len(pair.streams) == 2:
            self._drop(key)
            self._tasks.spawn(self._forward(port, pair.streams["data"], pair.streams["error"]), f"forward port {port}")

    def _drop(self, key: str) -> _Pair | None:
        pair = self._pairs.pop(key, None)
        if pair is not None and pair.timer is not None:
            pair.timer.cancel()
        return pair

    def _expire(self, key: str) -> None:
        pair = self._drop(key)
        if pair is not None:
            for stream in pair.streams.values():
                self._tasks.spawn(stream.reset(), "reset an incomplete pair")

    async def _forward(self, port: int, data: spdy.Stream, error: spdy.Stream) -> None:
        try:
            connection = await self._connect(port)
        except Exception as problem:
            await error.write(f"error forwarding port {port} {self._what}: {problem}".encode())
            await error.close()
            await data.reset()
        else:
            try:
                await _join(data, connection)
            finally:
                await connection.close()
            await data.close()
            await error.close()
        if self.session is not None:
            self.session.forget(data, error)


async def _serve_spdy(connection: websocket.Connection, connect: Connect, what: str) -> None:
    async with Tasks() as tasks:
        pairs = _Pairs(connect, what, tasks)
        session = pairs.session = spdy.Session(connection, pairs.add)
        try:
            await session.run()
        except HTTPError as error:
            log.debug("port-forward client broke the protocol", error=error)
        finally:
            session.close()


async def _join(data: spdy.Stream, connection: ByteStream) -> None:
    """Carry bytes both ways until both directions have ended, or the client reset the stream."""

    async def inward() -> None:
        while chunk := await data.read():
            await connection.write(chunk)
        if data.was_reset:
            await connection.close()
        else:
            await connection.write_eof()

    async def outward() -> None:
        while chunk := await connection.read():
            await data.write(chunk)
        await data.close()

    tasks = [asyncio.ensure_future(inward()), asyncio.ensure_future(outward())]
    try:
        # Once the pod's side has ended there is nobody left to read what the client may still send.
        await asyncio.wait({tasks[1]})
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


# WebSocket channels: 2n data, 2n + 1 error


class _Channels:
    def __init__(self, socket: websocket.WebSocket, ports: Sequence[int], connect: Connect, what: str) -> None:
        self._socket, self._ports, self._connect, self._what = socket, ports, connect, what
        self._base64 = "base64" in socket.subprotocol
        self._incoming: list[asyncio.Queue[bytes]] = [asyncio.Queue(_PENDING) for _ in ports]

    async def _send(self, channel: int, data: bytes) -> None:
        if self._base64:
            await self._socket.send_text(chr(48 + channel).encode("latin-1") + base64.b64encode(data))
        else:
            await self._socket.send_binary(bytes((channel,)) + data)

    async def serve(self) -> None:
        async with Tasks() as tasks:
            try:
                forwards = []
                for position, port in enumerate(self._ports):
                    for channel in (2 * position, 2 * position + 1):
                        await self._send(channel, struct.pack("<H", port))
                    forwards.append(tasks.spawn(self._forward(position, port), f"forward port {port}"))
                reading = tasks.spawn(self._read(), "read channels")
                everything = tasks.spawn(self._all(forwards), "all forwards")
                await asyncio.wait({reading, everything}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                self._socket.close()

    async def _all(self, forwards: Sequence[asyncio.Task[None]]) -> None:
        await asyncio.gather(*forwards, return_exceptions=True)

    async def _read(self) -> None:
        with contextlib.suppress(HTTPError):
            while (message := await self._socket.receive()) is not None:
                data = message[1]
                if not data:
                    continue
                channel, body = (data[0] - 48, base64.b64decode(data[1:])) if self._base64 else (data[0], data[1:])
                if channel % 2 == 0 and 0 <= channel // 2 < len(self._incoming) and body:
                    await self._incoming[channel // 2].put(body)

    async def _forward(self, position: int, port: int) -> None:
        try:
            connection = await self._connect(port)
        except Exception as problem:
            await self._send(2 * position + 1, f"error forwarding port {port} {self._what}: {problem}".encode())
            return

        async def inward() -> None:
            while True:
                await connection.write(await self._incoming[position].get())

        feeding = asyncio.ensure_future(inward())
        try:
            while chunk := await connection.read():
                await self._send(2 * position, chunk)
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            await connection.close()
