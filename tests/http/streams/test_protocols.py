"""Every protocol version of exec and port-forward, spoken by a small client, against scripted processes."""

from __future__ import annotations

import asyncio
import base64
import json
import os
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest

from knarr.http import remotecommand, spdy, websocket
from knarr.http.client import HTTPClient
from knarr.http.remotecommand import StreamOptions
from knarr.http.server import HTTPServer, Request


class Script:
    """A process: says what it is told to, echoes its input to stdout, ends with a code."""

    def __init__(self, output: list[tuple[int, bytes]] | None = None, code: int = 0, echo: bool = False) -> None:
        self.output, self.code, self.echo = output or [], code, echo
        self.input: asyncio.Queue[bytes] = asyncio.Queue()
        self.sizes: list[tuple[int, int]] = []
        self.stdin_closed = asyncio.Event()
        self.closed = asyncio.Event()

    async def read(self) -> AsyncIterator[tuple[int, bytes]]:
        for item in self.output:
            yield item
        while self.echo and (data := await self.input.get()):
            yield 1, data

    async def write_stdin(self, data: bytes) -> None:
        await self.input.put(data)

    async def close_stdin(self) -> None:
        self.stdin_closed.set()
        await self.input.put(b"")

    async def resize(self, width: int, height: int) -> None:
        self.sizes.append((width, height))

    async def wait(self) -> int:
        return self.code

    async def close(self) -> None:
        self.closed.set()


Handler = Callable[[Request], Awaitable[None]]


@pytest.fixture
async def serve() -> AsyncIterator[Callable[[Handler], Awaitable[HTTPClient]]]:
    opened: list[Any] = []

    async def start(handler: Handler) -> HTTPClient:
        server = HTTPServer(handler)
        port = await server.listen("127.0.0.1", 0)
        client = HTTPClient(f"http://127.0.0.1:{port}")
        opened.extend([client, server])
        return client

    yield start
    for item in opened:
        await item.close()


def execs(script: Script, options: StreamOptions) -> Handler:
    async def open_stream() -> Script:
        return script

    async def handler(request: Request) -> None:
        await remotecommand.serve_exec(request, open_stream, options, command=["cmd"])

    return handler


async def connect_websocket(client: HTTPClient, protocol: str, path: str = "/") -> websocket.WebSocket:
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": websocket.client_key()}
    if protocol:
        headers["Sec-WebSocket-Protocol"] = protocol
    response, raw = await client.upgrade("GET", path, headers)
    assert response.status == 101
    assert raw is not None
    assert response.headers.get("sec-websocket-protocol", "") == protocol
    return websocket.WebSocket(raw, client=True)


async def everything(socket: websocket.WebSocket) -> dict[int, bytes]:
    found: dict[int, bytes] = {}
    async with asyncio.timeout(10):
        while (message := await socket.receive()) is not None:
            data = message[1]
            if message[0] == websocket.TEXT:
                found[data[0] - 48] = found.get(data[0] - 48, b"") + base64.b64decode(data[1:])
            else:
                found[data[0]] = found.get(data[0], b"") + data[1:]
    return found


@pytest.mark.parametrize("protocol", ["v5.channel.k8s.io", "v4.channel.k8s.io", "v4.base64.channel.k8s.io"])
async def test_newer_websocket_protocols_end_with_a_status(serve: Any, protocol: str) -> None:
    for code in (0, 3):
        client = await serve(execs(Script([(1, b"out"), (2, b"err")], code), StreamOptions(stdout=True, stderr=True)))
        found = await everything(await connect_websocket(client, protocol))
        assert (found[1], found[2]) == (b"out", b"err")
        status = json.loads(found[3])
        if code == 0:
            assert status["status"] == "Success"
        else:
            assert status["reason"] == "NonZeroExitCode"
            assert status["details"]["causes"] == [{"reason": "ExitCode", "message": "3"}]


@pytest.mark.parametrize("protocol", ["", "channel.k8s.io", "base64.channel.k8s.io"])
async def test_the_oldest_protocols_say_nothing_on_success_and_text_on_failure(serve: Any, protocol: str) -> None:
    client = await serve(execs(Script([(1, b"out")]), StreamOptions(stdout=True)))
    assert await everything(await connect_websocket(client, protocol)) == {1: b"out"}
    client = await serve(execs(Script([(1, b"out")], 2), StreamOptions(stdout=True)))
    assert (await everything(await connect_websocket(client, protocol)))[3].startswith(b"command terminated with non-zero exit code")


async def test_the_close_signal_of_v5_ends_stdin(serve: Any) -> None:
    script = Script(echo=True)
    socket = await connect_websocket(await serve(execs(script, StreamOptions(stdin=True, stdout=True))), "v5.channel.k8s.io")
    await socket.send_binary(b"\0hello ")
    await socket.send_binary(b"\0world")
    await socket.send_binary(bytes((255, 0)))
    found = await everything(socket)
    assert found[1] == b"hello world"
    assert script.stdin_closed.is_set()


async def test_sizes_reach_a_terminal_even_in_pieces(serve: Any) -> None:
    script = Script(echo=True)
    socket = await connect_websocket(await serve(execs(script, StreamOptions(stdin=True, stdout=True, tty=True))), "v5.channel.k8s.io")
    for piece in (b'\x04{"Width":10,"Hei', b'\x04ght":20}{"Width":1,"Height":2}', b"\x04garbage}", b'\x04{"Width":3,"Height":4}'):
        await socket.send_binary(piece)
    await socket.send_binary(bytes((255, 0)))
    await everything(socket)
    assert script.sizes == [(10, 20), (1, 2), (3, 4)]


async def test_a_client_that_goes_away_closes_the_process(serve: Any) -> None:
    script = Script(echo=True)
    socket = await connect_websocket(await serve(execs(script, StreamOptions(stdin=True, stdout=True))), "v5.channel.k8s.io")
    socket.close()
    async with asyncio.timeout(5):
        await script.closed.wait()


async def test_pings_are_answered_while_the_process_does_not_read(serve: Any) -> None:
    class Deaf(Script):
        async def write_stdin(self, data: bytes) -> None:
            await asyncio.Event().wait()

    socket = await connect_websocket(await serve(execs(Deaf(echo=True), StreamOptions(stdin=True, stdout=True))), "v5.channel.k8s.io")
    await socket.receive()
    for _ in range(20):
        await socket.send_binary(b"\0data")
    await socket.ping(b"x")
    pong = asyncio.Event()
    original = socket._control
    socket._control = lambda opcode, data: (pong.set() if opcode == websocket.PONG else None, original(opcode, data))[1]  # type: ignore[method-assign,func-returns-value]
    receiving = asyncio.ensure_future(socket.receive())
    async with asyncio.timeout(5):
        await pong.wait()
    receiving.cancel()
    socket.close()


async def test_a_process_that_cannot_start_is_an_internal_error(serve: Any) -> None:
    async def open_stream() -> Script:
        raise RuntimeError("no such container")

    async def handler(request: Request) -> None:
        await remotecommand.serve_exec(request, open_stream, StreamOptions(stdout=True))

    found = await everything(await connect_websocket(await serve(handler), "v5.channel.k8s.io"))
    status = json.loads(found[3])
    assert status["message"] == "Internal error occurred: error executing command in container: no such container"
    assert status["code"] == 500


async def test_broken_frames_end_the_connection_and_the_process(serve: Any) -> None:
    for garbage in (b"\x82\x05hello", b"\xff\x80\0\0\0\0", b"\x82\xff" + b"\xff" * 12, b"\x80\x80\0\0\0\0"):
        script = Script(echo=True)
        socket = await connect_websocket(await serve(execs(script, StreamOptions(stdin=True, stdout=True))), "v5.channel.k8s.io")
        socket._connection.write(garbage)
        async with asyncio.timeout(5):
            await script.closed.wait()


async def test_refused_upgrades_are_answered(serve: Any) -> None:
    client = await serve(execs(Script(), StreamOptions(stdout=True)))
    assert (await client.request("POST", "/")).status == 400
    headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": "v9.channel.k8s.io"}
    response, raw = await client.upgrade("POST", "/", headers)
    assert (response.status, raw) == (403, None)
    assert response.headers["x-accepted-stream-protocol-versions"].startswith("v4.channel.k8s.io")
    headers = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Version": "13", "Sec-WebSocket-Key": "k", "Sec-WebSocket-Protocol": "no"}
    assert (await client.upgrade("GET", "/", headers))[0].status == 403


async def connect_spdy(client: HTTPClient, protocol: str) -> tuple[spdy.Session, asyncio.Future[None]]:
    headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": protocol}
    response, raw = await client.upgrade("POST", "/", headers)
    assert response.status == 101
    assert raw is not None
    session = spdy.Session(raw, client=True)
    return session, asyncio.ensure_future(session.run())


@pytest.mark.parametrize("protocol", ["v4.channel.k8s.io", "v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"])
async def test_every_spdy_version_carries_streams_and_the_end(serve: Any, protocol: str) -> None:
    script = Script(code=4, echo=True)
    session, running = await connect_spdy(await serve(execs(script, StreamOptions(stdin=True, stdout=True))), protocol)
    error, stdin, stdout = [await session.open({"streamType": kind}) for kind in ("error", "stdin", "stdout")]
    payload = os.urandom(300_000)
    reading = asyncio.ensure_future(stdout.read_all())
    await stdin.write(payload)
    await stdin.close()
    async with asyncio.timeout(10):
        assert await reading == payload
        told = await error.read_all()
        await running
    if protocol == "v4.channel.k8s.io":
        assert json.loads(told)["details"]["causes"][0]["message"] == "4"
    else:
        assert told.startswith(b"command terminated with non-zero exit code")


class Echo:
    """A connection inside the pod that sends back what it gets, until the end of input."""

    def __init__(self) -> None:
        self.queue: asyncio.Queue[bytes] = asyncio.Queue()
        self.closed = False

    async def read(self) -> bytes:
        return await self.queue.get()

    async def write(self, data: bytes) -> None:
        await self.queue.put(data)

    async def write_eof(self) -> None:
        await self.queue.put(b"")

    async def close(self) -> None:
        self.closed = True


def forwards(made: list[Echo]) -> Handler:
    async def connect(port: int) -> Echo:
        if port == 9:
            raise RuntimeError("connection refused")
        made.append(Echo())
        return made[-1]

    async def handler(request: Request) -> None:
        await remotecommand.serve_port_forward(request, connect, pod="ns_p", uid="u")

    return handler


@pytest.mark.parametrize("tunnel", [False, True])
async def test_forwarding_over_spdy_plain_and_tunnelled(serve: Any, tunnel: bool) -> None:
    made: list[Echo] = []
    client = await serve(forwards(made))
    if tunnel:
        socket = await connect_websocket(client, "SPDY/3.1+portforward.k8s.io")
        session = spdy.Session(websocket.WebSocketBytes(socket), client=True)
        running = asyncio.ensure_future(session.run())
    else:
        session, running = await connect_spdy(client, "portforward.k8s.io")
    payload = os.urandom(200_000)
    for number in range(3):
        headers = {"port": "80", "requestID": str(number)}
        error = await session.open({**headers, "streamType": "error"})
        data = await session.open({**headers, "streamType": "data"})
        reading = asyncio.ensure_future(data.read_all())
        await data.write(payload)
        await data.close()
        async with asyncio.timeout(10):
            assert await reading == payload
            assert await error.read_all() == b""
    headers = {"port": "9", "requestID": "x"}
    error, data = await session.open({**headers, "streamType": "error"}), await session.open({**headers, "streamType": "data"})
    async with asyncio.timeout(10):
        assert await error.read_all() == b"error forwarding port 9 to pod ns_p, uid u: connection refused"
        assert await data.read_all() == b""
    with pytest.raises(spdy.SPDYError):
        await session.open({"streamType": "data", "port": "99999"})
    session.close()
    async with asyncio.timeout(10):
        await asyncio.gather(running, return_exceptions=True)
    assert all(item.closed for item in made)


async def test_a_stalled_forward_does_not_hold_up_the_others_once_it_is_over(serve: Any) -> None:
    class Stalled(Echo):
        async def write(self, data: bytes) -> None:
            await asyncio.Event().wait()

    made: list[Echo] = []

    async def connect(port: int) -> Echo:
        made.append(Stalled() if port == 1 else Echo())
        return made[-1]

    async def handler(request: Request) -> None:
        await remotecommand.serve_port_forward(request, connect)

    session, running = await connect_spdy(await serve(handler), "portforward.k8s.io")
    pairs = []
    for port in ("1", "2"):
        await session.open({"port": port, "requestID": port, "streamType": "error"})
        pairs.append(await session.open({"port": port, "requestID": port, "streamType": "data"}))
    for _ in range(40):
        await pairs[0].write(b"x" * 1000)
    await made[0].write_eof()  # the pod's side ends; what the client still sends is dropped
    for _ in range(100):
        await pairs[0].write(b"x" * 1000)
    await pairs[1].write(b"hello")
    async with asyncio.timeout(5):
        assert await pairs[1].read() == b"hello"
    session.close()
    await asyncio.gather(running, return_exceptions=True)


async def test_forwarding_over_websocket_channels(serve: Any) -> None:
    client = await serve(forwards([]))
    socket = await connect_websocket(client, "v4.channel.k8s.io", "/?port=80,9")
    await socket.send_binary(b"\0hello")
    found: dict[int, bytes] = {}
    async with asyncio.timeout(5):
        while len(found.get(0, b"")) < 7 or len(found.get(3, b"")) < 3:
            message = await socket.receive()
            assert message is not None
            found[message[1][0]] = found.get(message[1][0], b"") + message[1][1:]
    assert found[0] == struct.pack("<H", 80) + b"hello"
    assert found[1] == struct.pack("<H", 80)
    assert found[3].startswith(struct.pack("<H", 9) + b"error forwarding port 9")
    socket.close()


async def test_a_log_over_websocket_is_plain_frames_and_then_the_end(serve: Any) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        yield b"container is "
        yield b"alive\n"

    async def handler(request: Request) -> None:
        await websocket.serve_reader(request, chunks())

    for protocol in ("binary.k8s.io", "base64.binary.k8s.io", ""):
        socket = await connect_websocket(await serve(handler), protocol)
        text = b""
        while (message := await socket.receive()) is not None:
            text += base64.b64decode(message[1]) if message[0] == websocket.TEXT else message[1]
        assert text == b"container is alive\n"


async def test_fragments_are_joined() -> None:
    class Pipe:
        def __init__(self, data: bytes) -> None:
            self.data = data

        async def read(self) -> bytes:
            data, self.data = self.data[:3], self.data[3:]
            return data

        def write(self, data: bytes) -> None: ...
        async def drain(self) -> None: ...
        def close(self) -> None: ...

    frames = b"\x02\x83\0\0\0\0abc" + websocket.frame(websocket.PING, b"p", masked=True) + b"\x00\x81\0\0\0\0d" + b"\x80\x82\0\0\0\0ef"
    socket = websocket.WebSocket(Pipe(frames))
    assert await socket.receive() == (websocket.BINARY, b"abcdef")
    assert await socket.receive() is None
