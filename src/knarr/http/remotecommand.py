"""Exec and attach for clients: WebSocket channels (channel.k8s.io to v5) and SPDY streams (v1 to v4).

Role: `serve_exec` takes an upgrade request and pumps a runtime's interactive stream until the process ends or the client goes.
Callers: the kubelet's server; the API server passes the connection through. Invariants: output is sent in order and complete
before the status; a client that goes away closes the stream; nothing is buffered without bound.
Every protocol version differs only in how streams are opened and how the end is told, so one pump serves them all behind the
`Session` class. WebSocket channel 255 of v5 closes another channel (end of stdin).
Source: kubelet pkg/cri/streaming/remotecommand, apimachinery pkg/util/httpstream/wsstream, KEP-4006.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from knarr.aiokits.log import get_logger
from knarr.http import spdy, websocket
from knarr.http.errors import HTTPError
from knarr.http.portforward import serve_port_forward
from knarr.http.server import Request

log = get_logger(__name__)
STDIN, STDOUT, STDERR, ERROR, RESIZE, CLOSE = 0, 1, 2, 3, 4, 255
V5, V4, V3, V2, V1 = "v5.channel.k8s.io", "v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"
WEBSOCKET_PROTOCOLS = ("", V5, V4, V1, "v4.base64.channel.k8s.io", "base64.channel.k8s.io")
SPDY_PROTOCOLS = (V4, V3, V2, V1)
_STREAM_TYPES = {"stdin": STDIN, "stdout": STDOUT, "stderr": STDERR, "error": ERROR, "resize": RESIZE}
_CREATION_SECONDS = 30.0
_PENDING_INPUT = 64


class Stream(Protocol):
    """One interactive process; the runtime's Stream (runtime.cri) fits."""

    def read(self) -> AsyncIterator[tuple[int, bytes]]: ...
    async def write_stdin(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...
    async def resize(self, width: int, height: int) -> None: ...
    async def wait(self) -> int: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """Which streams the client wants. With a terminal there is no stderr."""

    stdin: bool = False
    stdout: bool = False
    stderr: bool = False
    tty: bool = False


def parse_options(query: Mapping[str, Sequence[str]]) -> StreamOptions:
    """Read the query of the API (stdin, stdout, stderr, tty) or of the kubelet (input, output, error, tty).

    Raises ValueError when no stream is asked for.
    """

    def flag(*names: str) -> bool:
        return any((query.get(name) or [""])[0] in ("1", "true", "True", "TRUE", "t", "T") for name in names)

    tty = flag("tty")
    options = StreamOptions(flag("stdin", "input"), flag("stdout", "output"), flag("stderr", "error") and not tty, tty)
    if not (options.stdin or options.stdout or options.stderr):
        raise ValueError("you must specify at least 1 of stdin, stdout, stderr")
    return options


# The status at the end


def success() -> dict[str, Any]:
    return {"metadata": {}, "status": "Success"}


def exit_status(code: int, command: Sequence[str]) -> dict[str, Any]:
    """The Status for a process that ended with a code other than 0."""
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"command terminated with non-zero exit code: error executing command [{' '.join(command)}], exit code {code}",
        "reason": "NonZeroExitCode",
        "details": {"causes": [{"reason": "ExitCode", "message": str(code)}]},
    }


def failure(text: str) -> dict[str, Any]:
    """The Status for a process that could not be run or attached to."""
    return {
        "metadata": {},
        "status": "Failure",
        "message": f"Internal error occurred: {text}",
        "reason": "InternalError",
        "details": {"causes": [{"message": text}]},
        "code": 500,
    }


# One client


class Session(Protocol):
    """A client's streams, whatever the protocol."""

    async def send(self, channel: int, data: bytes) -> None:
        """Send output (or the status) on a channel."""

    async def finish(self, status: Mapping[str, Any]) -> None:
        """Tell the end as this protocol version does, then close."""

    async def input(self) -> AsyncIterator[tuple[int, bytes | None]]:
        """Yield (channel, data) from the client; None data is the end of that channel; ends when the client is gone."""
        yield 0, None


class WebSocketSession:
    """Channels in the first byte of each message."""

    def __init__(self, socket: websocket.WebSocket, options: StreamOptions) -> None:
        self._socket, self._options = socket, options
        self._base64 = "base64" in socket.subprotocol
        self._json_status = socket.subprotocol.startswith(("v4.", "v5."))

    async def greet(self) -> None:
        """An empty message on the lowest channel tells the client that the connection stands."""
        options = self._options
        await self.send(STDOUT if options.stdout else STDERR if options.stderr else ERROR, b"")

    async def send(self, channel: int, data: bytes) -> None:
        if self._base64:
            await self._socket.send_text(b"%d%b" % (channel, base64.b64encode(data)))
        else:
            await self._socket.send_binary(bytes((channel,)) + data)

    async def finish(self, status: Mapping[str, Any]) -> None:
        if self._json_status:
            await self.send(ERROR, orjson.dumps(status))
        elif status["status"] != "Success":
            await self.send(ERROR, status["message"].encode())
        self._socket.close()

    async def input(self) -> AsyncIterator[tuple[int, bytes | None]]:
        while (message := await self._socket.receive()) is not None:
            data = message[1]
            if not data:
                continue
            channel = data[0]
            if channel == CLOSE and self._socket.subprotocol == V5:
                if len(data) != 2:
                    return
                yield data[1], None
            elif self._base64:
                with contextlib.suppress(ValueError):
                    yield channel - 48, base64.b64decode(data[1:], validate=True)
            else:
                yield channel, data[1:]


class SPDYSession:
    """One SPDY stream per channel, named by its streamtype header."""

    def __init__(self, session: spdy.Session, streams: Mapping[int, spdy.Stream], protocol: str) -> None:
        self._session, self._streams, self._protocol = session, dict(streams), protocol
        self._queue: asyncio.Queue[tuple[int, bytes | None] | None] = asyncio.Queue(_PENDING_INPUT)

    async def send(self, channel: int, data: bytes) -> None:
        if data and (stream := self._streams.get(channel)) is not None:
            await stream.write(data)

    async def finish(self, status: Mapping[str, Any]) -> None:
        if (stream := self._streams.get(ERROR)) is not None:
            if self._protocol == V4:
                await stream.write(orjson.dumps(status))
            elif status["status"] != "Success":
                await stream.write(status["message"].encode())
        for stream in self._streams.values():
            await stream.close()
        self._session.close()

    async def input(self) -> AsyncIterator[tuple[int, bytes | None]]:
        tasks = [asyncio.ensure_future(self._until_closed())]
        for channel in (STDIN, RESIZE):
            if channel in self._streams:
                tasks.append(asyncio.ensure_future(self._read(channel, self._streams[channel])))
        try:
            while (item := await self._queue.get()) is not None:
                yield item
        finally:
            for task in tasks:
                task.cancel()

    async def _read(self, channel: int, stream: spdy.Stream) -> None:
        while data := await stream.read():
            await self._queue.put((channel, data))
        await self._queue.put((channel, None))

    async def _until_closed(self) -> None:
        await self._session.closed.wait()
        await self._queue.put(None)


# Serving


async def serve_exec(
    request: Request, open_stream: Callable[[], Awaitable[Stream]], options: StreamOptions, *, command: Sequence[str] = (), attach: bool = False
) -> None:
    """Serve one exec or attach: negotiate, open the runtime's stream, pump, tell the end.

    Args:
      open_stream: Called once the client's streams stand; its failure reaches the client as a Status.
      attach: The process is the container's own: its exit code is not reported.

    Refused upgrades are answered here (400, 403). Cancellation closes the runtime's stream and the connection.
    """
    if websocket.is_upgrade(request):
        socket = websocket.accept(request, WEBSOCKET_PROTOCOLS)
        if socket is None:
            return
        session = WebSocketSession(socket, options)
        await session.greet()
        try:
            await _serve(session, open_stream, options, command, attach)
        finally:
            socket.close()
        return
    protocol = spdy.accept(request, SPDY_PROTOCOLS)
    if protocol is not None:
        await _serve_spdy(request, protocol, open_stream, options, command, attach)


async def _serve_spdy(
    request: Request, protocol: str, open_stream: Callable[[], Awaitable[Stream]], options: StreamOptions, command: Sequence[str], attach: bool
) -> None:
    arrived: asyncio.Queue[spdy.Stream] = asyncio.Queue()
    connection = spdy.Session(spdy.start(request, protocol), arrived.put_nowait)
    running = asyncio.ensure_future(connection.run())
    try:
        streams: dict[int, spdy.Stream] = {}
        expected = 1 + options.stdin + options.stdout + options.stderr + (options.tty and protocol in (V4, V3))
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CREATION_SECONDS):
                while len(streams) < expected:
                    stream = await arrived.get()
                    kind = _STREAM_TYPES.get(stream.headers.get("streamtype", ""))
                    if kind is not None:
                        streams[kind] = stream
        if len(streams) == expected:
            await _serve(SPDYSession(connection, streams, protocol), open_stream, options, command, attach)
    finally:
        connection.close()
        running.cancel()
        with contextlib.suppress(asyncio.CancelledError, HTTPError):
            await running


async def _serve(
    session: WebSocketSession | SPDYSession,
    open_stream: Callable[[], Awaitable[Stream]],
    options: StreamOptions,
    command: Sequence[str],
    attach: bool,
) -> None:
    verb = "attaching to container" if attach else "executing command in container"
    try:
        stream = await open_stream()
    except Exception as error:
        await session.finish(failure(f"error {verb}: {error}"))
        return
    client = asyncio.ensure_future(_pump_input(session, stream, options))
    output = asyncio.ensure_future(_pump_output(session, stream, options))
    try:
        await asyncio.wait({client, output}, return_when=asyncio.FIRST_COMPLETED)
        if not output.done():
            return  # the client is gone
        output.result()
        try:
            code = await stream.wait()
        except Exception as error:
            await session.finish(failure(f"error {verb}: {error}"))
            return
        await session.finish(success() if code == 0 or attach else exit_status(code, command))
    finally:
        client.cancel()
        output.cancel()
        await asyncio.gather(client, output, return_exceptions=True)
        await asyncio.shield(stream.close())


async def _pump_output(session: WebSocketSession | SPDYSession, stream: Stream, options: StreamOptions) -> None:
    async for channel, data in stream.read():
        if (options.stdout if channel == STDOUT else options.stderr) and data:
            await session.send(channel, data)


async def _pump_input(session: WebSocketSession | SPDYSession, stream: Stream, options: StreamOptions) -> None:
    """Carry input until the client is gone. A process that does not read must not stop resizes and pings, so its input waits apart."""
    pending: asyncio.Queue[bytes | None] = asyncio.Queue(_PENDING_INPUT)
    feeding = asyncio.ensure_future(_feed(pending, stream))
    sizes = b""
    try:
        async for channel, data in session.input():
            if channel == STDIN and options.stdin:
                await pending.put(data)
            elif channel == RESIZE and data and options.tty:
                sizes = await _resize(stream, sizes + data)
    except HTTPError as error:
        log.debug("client broke the protocol", error=error)
    finally:
        feeding.cancel()
        await asyncio.gather(feeding, return_exceptions=True)


async def _feed(pending: asyncio.Queue[bytes | None], stream: Stream) -> None:
    while (data := await pending.get()) is not None:
        if data:
            await stream.write_stdin(data)
    await stream.close_stdin()
    while True:
        await pending.get()  # what comes after the end is dropped, so the client is not held up


async def _resize(stream: Stream, text: bytes) -> bytes:
    """Apply each {"Width", "Height"} object; returns an incomplete rest."""
    while (end := text.find(b"}")) >= 0:
        part, text = text[: end + 1], text[end + 1 :]
        with contextlib.suppress(orjson.JSONDecodeError, KeyError, TypeError, ValueError):
            size = orjson.loads(part)
            await stream.resize(int(size["Width"]), int(size["Height"]))
    return text if len(text) < 1024 else b""


__all__ = [
    "Stream", "StreamOptions", "exit_status", "failure", "parse_options", "serve_exec", "serve_port_forward", "success",
]  # fmt: skip
