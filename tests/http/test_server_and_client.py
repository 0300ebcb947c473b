"""The HTTP server against our client and against raw sockets that misbehave."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from knarr.http.client import HTTPClient
from knarr.http.errors import BodyTooLarge, ConnectFailed, ConnectionLost, TimeoutExpired
from knarr.http.server import HTTPServer, Request


async def echo(request: Request) -> None:
    if request.path == "/slow":
        await asyncio.sleep(30)
    if request.path == "/stream":
        stream = await request.start_stream(200, [])
        for i in range(3):
            stream.write(b"line %d\n" % i)
        stream.close()
        return
    if request.path == "/upgrade":
        raw = request.upgrade()
        raw.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: echo\r\nConnection: Upgrade\r\n\r\n")
        while data := await raw.read():
            raw.write(data.upper())
        raw.close()
        return
    if request.path == "/fail":
        raise ValueError("no")
    try:
        body = await request.body()
    except BodyTooLarge:
        request.respond(413, [], b"too large")
        return
    request.respond(200, [("X-Method", request.method), ("X-Query", repr(request.query))], request.path.encode() + body)


def fast(request: Request) -> bool:
    if request.path != "/fast":
        return False
    request.respond(200, [], b"fast")
    return True


@contextlib.asynccontextmanager
async def serving(**options: float) -> AsyncIterator[tuple[HTTPServer, HTTPClient, int]]:
    server = HTTPServer(echo, fast=fast, max_body_bytes=100_000, **options)  # type: ignore[arg-type]
    port = await server.listen("127.0.0.1", 0)
    client = HTTPClient(f"http://127.0.0.1:{port}")
    try:
        yield server, client, port
    finally:
        await client.close()
        await server.close()


async def raw_exchange(port: int, data: bytes, wait: float = 1.0) -> bytes:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(data)
    out = b""
    with contextlib.suppress(TimeoutError, ConnectionError):
        async with asyncio.timeout(wait):
            while chunk := await reader.read(65536):
                out += chunk
    writer.close()
    return out


async def test_request_carries_method_path_query_and_body() -> None:
    async with serving() as (_, client, _):
        response = await client.request("POST", "/a%20b?x=1&x=2&e=", None, b"body")
        assert response.status == 200
        assert response.body == b"/a bbody"
        assert response.headers["x-query"] == "{'x': ['1', '2'], 'e': ['']}"


async def test_connections_are_kept_and_reused() -> None:
    async with serving() as (server, client, _):
        for _ in range(5):
            await client.request("GET", "/fast")
        assert len(server.connections) == 1


async def test_head_has_a_length_and_no_body() -> None:
    async with serving() as (_, client, _):
        response = await client.request("HEAD", "/abc")
        assert (response.status, response.headers["content-length"], response.body) == (200, "4", b"")
        assert (await client.request("GET", "/abc")).body == b"/abc"


async def test_pipelined_requests_are_answered_in_order() -> None:
    async with serving() as (_, _, port):
        requests = b"".join(b"GET /%d HTTP/1.1\r\nHost: x\r\n\r\n" % i for i in range(100))
        out = await raw_exchange(port, requests + b"GET /last HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 5)
        bodies = [part.partition(b"\r\n\r\n")[2] for part in out.split(b"HTTP/1.1 200 OK")[1:]]
        assert bodies == [b"/%d" % i for i in range(100)] + [b"/last"]


async def test_too_large_a_body_gets_an_answer_and_the_connection_ends() -> None:
    async with serving() as (_, client, port):
        response = await client.request("POST", "/", None, b"x" * 100_001)
        assert response.status == 413
        chunked = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n" + b"ffff\r\n" + b"y" * 0xFFFF + b"\r\n"
        out = await raw_exchange(port, chunked + b"ffff\r\n" + b"y" * 0xFFFF + b"\r\n")
        assert out.startswith(b"HTTP/1.1 413 ")


async def test_malformed_requests_get_400_and_huge_headers_431() -> None:
    async with serving(max_header_bytes=1000) as (_, _, port):
        assert (await raw_exchange(port, b"GARBAGE\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
        huge = b"GET / HTTP/1.1\r\nHost: x\r\nX: " + b"a" * 2000 + b"\r\n\r\n"
        assert (await raw_exchange(port, huge)).startswith(b"HTTP/1.1 431 ")


async def test_expect_100_continue_is_answered_before_the_body() -> None:
    async with serving() as (_, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /e HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n")
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(b"ok")
        head = await reader.readuntil(b"\r\n\r\n")
        assert head.startswith(b"HTTP/1.1 200")
        writer.close()


async def test_slow_loris_is_cut_off() -> None:
    async with serving(header_timeout_seconds=0.01) as (server, _, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET / HT")
        await asyncio.sleep(0.05)
        server._sweep()
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(reader.read(), 2) == b""
        writer.close()


async def test_stream_is_read_by_lines_and_the_connection_is_kept() -> None:
    async with serving() as (server, client, _):
        async with client.stream("GET", "/stream") as stream:
            assert [line async for line in stream.iter_lines()] == [b"line 0", b"line 1", b"line 2"]
        await client.request("GET", "/fast")
        assert len(server.connections) == 1


async def test_upgrade_hands_over_raw_bytes() -> None:
    async with serving() as (_, client, _):
        response, raw = await client.upgrade("GET", "/upgrade", {"Connection": "Upgrade", "Upgrade": "echo"})
        assert response.status == 101
        assert raw is not None
        raw.write(b"hello")
        assert await raw.read() == b"HELLO"
        raw.close()


async def test_failing_handler_is_a_500_and_a_late_one_a_timeout() -> None:
    async with serving() as (_, client, _):
        assert (await client.request("GET", "/fail")).status == 500
        with pytest.raises(TimeoutExpired):
            await client.request("GET", "/slow", timeout_seconds=0.05)


async def test_refused_connection_is_told_apart() -> None:
    client = HTTPClient("http://127.0.0.1:1")
    with pytest.raises(ConnectFailed):
        await client.request("GET", "/")


async def test_dead_kept_connection_is_replaced_for_idempotent_requests() -> None:
    async with serving() as (server, client, port):
        await client.request("GET", "/fast")
        for connection in list(server.connections):
            assert connection.transport is not None
            connection.transport.abort()
        assert (await client.request("GET", "/fast")).body == b"fast"
        async with client.stream("GET", "/stream") as stream:
            await stream.read()
        await server.close()
        with pytest.raises((ConnectFailed, ConnectionLost)):
            await client.request("GET", "/fast")
        assert port
