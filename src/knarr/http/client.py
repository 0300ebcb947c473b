"""An HTTP/1.1 client on asyncio and httptools: pooled keep-alive connections, streams, and upgrades to raw bytes.

Callers: knarr.client (REST), the API server (webhooks, kubelet proxy, aggregation), image pulls. Ordinary requests share
up to `max_connections` connections and wait for a free one; streams (watches, logs) and upgrades have their own connection
outside that bound, since they last. A request is sent a second time only when a kept connection turned out to be dead
before one byte of the answer came and the method is idempotent. It knows nothing of Kubernetes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import zlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httptools

from knarr.http.errors import BodyTooLarge, ConnectFailed, ConnectionLost, HTTPError, TimeoutExpired
from knarr.http.raw import HIGH_WATER_BYTES, RawConnection

IDEMPOTENT = frozenset({"GET", "HEAD", "OPTIONS", "PUT", "DELETE"})
_KEPT_BLOCKS = 64
HeaderItems = Mapping[str, str] | list[tuple[str, str]]


@dataclass(slots=True)
class Response:
    """A whole answer."""

    status: int
    headers: dict[str, str]
    """Lower-case names; several lines of one name are joined by ", "."""
    body: bytes = b""
    header_list: list[tuple[str, str]] = field(default_factory=list)

    def header_values(self, name: str) -> list[str]:
        return [value for key, value in self.header_list if key == name]


class StreamResponse:
    """An answer whose body is read while it arrives."""

    def __init__(self, connection: _ClientConnection, status: int, headers: dict[str, str], header_list: list[tuple[str, str]]) -> None:
        self._connection = connection
        self.status = status
        self.headers = headers
        self.header_list = header_list

    async def iter_chunks(self) -> AsyncIterator[bytes]:
        """Yield the body as it arrives; ends at its end.

        Raises:
          ConnectionLost: the peer went away in the middle.
        """
        while True:
            chunk = await self._connection.read_body()
            if not chunk:
                return
            yield chunk

    async def iter_lines(self) -> AsyncIterator[bytes]:
        """Yield lines without their end; a last line without one is yielded too."""
        rest = b""
        async for chunk in self.iter_chunks():
            if b"\n" not in chunk:
                rest += chunk
                continue
            lines = (rest + chunk).split(b"\n")
            rest = lines.pop()
            for line in lines:
                yield line
        if rest:
            yield rest

    def abort(self) -> None:
        """Break the connection; whoever reads the body gets ConnectionLost."""
        self._connection.close()

    async def read(self) -> bytes:
        """Return the rest of the body."""
        return b"".join([chunk async for chunk in self.iter_chunks()])


class _ClientConnection(asyncio.Protocol):
    """One connection and the answer that is arriving on it."""

    def __init__(self, loop: asyncio.AbstractEventLoop, max_body_bytes: int) -> None:
        self.loop = loop
        self.transport: asyncio.Transport | None = None
        self.raw: RawConnection | None = None
        self.reusable = False
        self.got_bytes = False
        self._max_body_bytes = max_body_bytes
        self._expect_head: asyncio.Future[None] | None = None
        self._body_waiter: asyncio.Future[None] | None = None
        self._can_write: asyncio.Future[None] | None = None
        self._error: Exception | None = None
        self._parser: Any = None
        self._timer: asyncio.TimerHandle | None = None
        self._head_request = self._upgrade = False
        self._reset(False, False)

    def _reset(self, head_request: bool, collect: bool) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.header_list: list[tuple[str, str]] = []
        self._chunks: deque[bytes] = deque()
        self._size = 0
        self._complete = False
        self._paused = False
        if self._parser is None or self._head_request or self._upgrade:
            # It goes on from answer to answer, unless the last one ended earlier than it knows.
            self._parser = httptools.HttpResponseParser(self)
        self._head_request = head_request
        self._collect = collect
        self._upgrade = False
        self._upgraded_rest = b""
        self.got_bytes = False

    # -- transport -----------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.reusable = True

    def connection_lost(self, error: Exception | None) -> None:
        self.transport = None
        self.reusable = False
        if self.raw is not None:
            self.raw.connection_lost()
        if not self._complete and self.status and self._until_close():
            self._complete = True
        self._fail(ConnectionLost(f"connection lost: {error}" if error else "connection closed by the peer"))
        self.resume_writing()

    def _until_close(self) -> bool:
        return "content-length" not in self.headers and "chunked" not in self.headers.get("transfer-encoding", "")

    def _fail(self, error: Exception) -> None:
        if not self._complete and self._error is None:
            self._error = error
        self._wake()

    def _wake(self) -> None:
        for waiter in (self._expect_head, self._body_waiter):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)
        self._body_waiter = None

    def eof_received(self) -> bool:
        if self.raw is not None:
            self.raw.feed_eof()
            # TLS knows no half-closed connection, and asking for one is logged each time.
            return self.transport is not None and self.transport.get_extra_info("ssl_object") is None
        return False

    def data_received(self, data: bytes) -> None:
        self.got_bytes = True
        if self.raw is not None:
            self.raw.feed(data)
            return
        if self._upgrade:
            self._upgraded_rest += data
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._upgraded_rest += data[upgrade.args[0]:]
        except httptools.HttpParserError as error:
            if self._upgrade:
                return
            self._fail(ConnectionLost(f"malformed HTTP response: {error.__context__ or error}"))
            if self.transport is not None:
                self.transport.abort()

    def pause_writing(self) -> None:
        if self.raw is not None:
            self.raw.pause_writing()
        elif self._can_write is None:
            self._can_write = self.loop.create_future()

    def resume_writing(self) -> None:
        if self.raw is not None:
            self.raw.resume_writing()
        waiter, self._can_write = self._can_write, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    # -- parser callbacks ------------------------------------------------------------------------------------------------
    def on_header(self, name: bytes, value: bytes) -> None:
        key = name.decode("latin-1").lower()
        text = value.decode("utf-8", "surrogateescape")
        self.header_list.append((key, text))
        self.headers[key] = f"{self.headers[key]}, {text}" if key in self.headers else text

    def on_headers_complete(self) -> None:
        status = self._parser.get_status_code()
        if status == 100 or (100 <= status < 200 and status != 101):
            self.headers, self.header_list = {}, []
            return
        self.status = status
        if status == 101:
            self._upgrade = True
            self.reusable = False
        if not self._parser.should_keep_alive():
            self.reusable = False
        if self._head_request:
            self._complete = True
            # The parser waits for a body that a HEAD answer does not have; a fresh one is made for the next request.
        if self._expect_head is not None and not self._expect_head.done():
            self._expect_head.set_result(None)

    def on_body(self, data: bytes) -> None:
        self._chunks.append(data)
        self._size += len(data)
        if self._collect:
            if self._size > self._max_body_bytes:
                self._fail(BodyTooLarge(self._max_body_bytes))
                if self.transport is not None:
                    self.transport.abort()
            return
        if self._size > HIGH_WATER_BYTES and not self._paused and self.transport is not None:
            self._paused = True
            self.transport.pause_reading()
        if self._body_waiter is not None:
            self._wake()

    def on_message_complete(self) -> None:
        if self.status and not self._upgrade:
            self._complete = True
            self._wake()

    def arm(self, seconds: float, what: str) -> None:
        """Fail the answer under way when it takes longer; a timer is much cheaper than a task's timeout."""
        self._timer = self.loop.call_later(seconds, self._expire, what)

    def disarm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self, what: str) -> None:
        self._timer = None
        self._fail(TimeoutExpired(what))
        if self.transport is not None:
            self.transport.abort()

    # -- one exchange ------------------------------------------------------------------------------------------------------
    async def send(self, head: bytes, body: bytes, *, head_request: bool, collect: bool) -> None:
        """Send a request and wait for the head of its answer."""
        if self.transport is None or self.transport.is_closing():
            raise ConnectionLost("connection closed by the peer")
        self._reset(head_request, collect)
        self._error = None
        self._expect_head = self.loop.create_future()
        self.transport.write(head + body if len(body) < 65536 else head)
        if len(body) >= 65536:
            self.transport.write(body)
        await self._expect_head
        self._expect_head = None
        if not self.status:
            raise self._error or ConnectionLost("connection closed by the peer")

    async def read_body(self) -> bytes:
        """Return the next piece of the body, b"" at its end."""
        while not self._chunks:
            if self._complete:
                return b""
            if self._error is not None:
                raise self._error
            self._body_waiter = self.loop.create_future()
            await self._body_waiter
        data = self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)
        self._chunks.clear()
        self._size = 0
        if self._paused and self.transport is not None:
            self._paused = False
            self.transport.resume_reading()
        return data

    async def whole_body(self) -> bytes:
        while not self._complete:
            if self._error is not None:
                raise self._error
            self._body_waiter = self.loop.create_future()
            await self._body_waiter
        return self._chunks[0] if len(self._chunks) == 1 else b"".join(self._chunks)

    @property
    def complete(self) -> bool:
        return self._complete

    def take_over(self) -> RawConnection:
        if self.transport is None:
            raise ConnectionLost("connection closed by the peer")
        self.raw = RawConnection(self.transport, self._upgraded_rest)
        return self.raw

    def close(self) -> None:
        self.reusable = False
        if self.transport is not None:
            self.transport.abort()


class HTTPClient:
    """Requests to one server.

    Args:
      base_url: "https://host:port", "http://host:port" or "unix:///path"; a path in it is put before every request's.
      headers: Sent with every request unless the request names the same header.
      max_connections: Bound for ordinary requests at the same time; more wait.
      server_hostname: The TLS name expected, if not the host in base_url.
      connect_to: (host, port) to dial instead of those in base_url.
      timeout_seconds: Default bound of a whole ordinary request, and of the wait for a stream's head.
    """

    def __init__(
        self, base_url: str, ssl_context: ssl.SSLContext | None = None, headers: HeaderItems | None = None,
        max_connections: int = 32, *, server_hostname: str | None = None, connect_to: tuple[str, int] | None = None,
        timeout_seconds: float | None = 60.0, connect_timeout_seconds: float = 10.0, max_body_bytes: int = 1 << 30,
    ) -> None:  # fmt: skip
        parts = urlsplit(base_url)
        self.base_url = base_url
        self._unix_path = parts.path if parts.scheme == "unix" else ""
        self._prefix = "" if self._unix_path else parts.path.rstrip("/")
        self._tls = parts.scheme == "https"
        default_port = 443 if self._tls else 80
        self._host = parts.hostname or "localhost"
        self._port = parts.port or default_port
        self._connect_to = connect_to or (self._host, self._port)
        self._server_hostname = server_hostname or self._host
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._host_header = host if self._port == default_port else f"{host}:{self._port}"
        self._ssl = (ssl_context or ssl.create_default_context()) if self._tls else None
        items = list(headers.items()) if isinstance(headers, Mapping) else list(headers or [])
        self.headers: list[tuple[str, str]] = items
        self._timeout = timeout_seconds
        self._connect_timeout = connect_timeout_seconds
        self._max_body_bytes = max_body_bytes
        self._idle: list[_ClientConnection] = []
        self._blocks: dict[tuple[tuple[str, str], ...], str] = {}
        self._slots = asyncio.Semaphore(max_connections)
        self._open: set[_ClientConnection] = set()
        self._closed = False

    async def _connect(self) -> _ClientConnection:
        loop = asyncio.get_running_loop()
        if self._closed:
            raise ConnectFailed("the client is closed")

        def factory() -> _ClientConnection:
            return _ClientConnection(loop, self._max_body_bytes)

        try:
            async with asyncio.timeout(self._connect_timeout):
                if self._unix_path:
                    _, connection = await loop.create_unix_connection(factory, self._unix_path)
                else:
                    _, connection = await loop.create_connection(
                        factory, self._connect_to[0], self._connect_to[1], ssl=self._ssl,
                        server_hostname=self._server_hostname if self._ssl else None,
                    )  # fmt: skip
        except TimeoutError as error:
            raise ConnectFailed(f"dial tcp {self._connect_to[0]}:{self._connect_to[1]}: i/o timeout") from error
        except (OSError, ssl.SSLError, UnicodeError) as error:
            raise ConnectFailed(f"dial tcp {self._connect_to[0]}:{self._connect_to[1]}: {error}") from error
        if connection.transport is not None:
            sock = connection.transport.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                    # A stream may be silent for long: a peer that has gone with its network is found out in 75 s, as the server does.
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
                    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self._open.add(connection)
        return connection

    def _head(self, method: str, path: str, headers: HeaderItems | None, body: bytes | None) -> bytes:
        given = tuple(headers.items()) if isinstance(headers, Mapping) else tuple(headers or ())
        block = self._blocks.get(given)
        if block is None:
            block = self._header_block(given)
            if len(self._blocks) >= _KEPT_BLOCKS:
                self._blocks.clear()
            self._blocks[given] = block
        length = f"Content-Length: {len(body)}\r\n" if body is not None and (body or method in ("POST", "PUT", "PATCH")) else ""
        return f"{method} {self._prefix}{path} HTTP/1.1\r\n{block}{length}\r\n".encode("utf-8", "surrogateescape")

    def _header_block(self, given: tuple[tuple[str, str], ...]) -> str:
        names = {name.lower() for name, _ in given}
        lines = [] if "host" in names else [f"Host: {self._host_header}\r\n"]
        lines += [f"{name}: {value}\r\n" for name, value in self.headers if name.lower() not in names]
        lines += [f"{name}: {value}\r\n" for name, value in given]
        return "".join(lines)

    def _take_idle(self) -> _ClientConnection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.transport is not None and not connection.transport.is_closing():
                return connection
            self._open.discard(connection)
        return None

    def _give_back(self, connection: _ClientConnection) -> None:
        if connection.reusable and connection.complete and not self._closed:
            self._idle.append(connection)
        else:
            self._open.discard(connection)
            connection.close()

    async def _exchange(
        self, method: str, head: bytes, body: bytes, *, collect: bool, limit: float | None = None, what: str = ""
    ) -> _ClientConnection:
        """Send on a kept connection, or a new one; returns the connection with the answer's head read.

        Args:
          limit: Seconds until the whole answer must be there; the connection stays armed with what is left. None leaves that to the caller.
          what: The error's text.
        """
        kept = self._take_idle()
        if kept is not None:
            if limit is not None:
                kept.arm(limit, what)
            try:
                await kept.send(head, body, head_request=method == "HEAD", collect=collect)
                return kept
            except ConnectionLost:
                kept.disarm()
                self._open.discard(kept)
                # The server may close a kept connection at any time; what it has surely not answered may be sent again.
                if kept.got_bytes or method not in IDEMPOTENT:
                    raise
            except BaseException:
                kept.disarm()
                self._open.discard(kept)
                kept.close()
                raise
        if limit is None:
            connection = await self._connect()
        else:
            began = asyncio.get_running_loop().time()
            try:
                async with asyncio.timeout(limit):
                    connection = await self._connect()
            except TimeoutError as error:
                raise TimeoutExpired(what) from error
            connection.arm(max(0.0, began + limit - connection.loop.time()), what)
        try:
            await connection.send(head, body, head_request=method == "HEAD", collect=collect)
        except BaseException:
            connection.disarm()
            self._open.discard(connection)
            connection.close()
            raise
        return connection

    async def request(
        self, method: str, path: str, headers: HeaderItems | None = None, body: bytes | None = None, *,
        timeout_seconds: float | None = None,
    ) -> Response:  # fmt: skip
        """Send one request and return the whole answer.

        Args:
          path: Path and query, already encoded.
          timeout_seconds: For the whole exchange; None means the client's default.

        Raises:
          ConnectFailed: nothing was sent.
          ConnectionLost: the answer did not come; the request may have been carried out.
          TimeoutExpired: likewise, by time.
          BodyTooLarge: the answer is larger than the client allows.

        Cancellation: the connection is dropped.
        """
        head = self._head(method, path, headers, body)
        limit = self._timeout if timeout_seconds is None else timeout_seconds
        connection: _ClientConnection | None = None
        await self._slots.acquire()
        try:
            connection = await self._exchange(method, head, body or b"", collect=True, limit=limit, what=f"{method} {path}: no answer within {limit} s")
            data = await connection.whole_body()
            response = Response(connection.status, connection.headers, data, connection.header_list)
            connection.disarm()
            self._give_back(connection)
        except BaseException:
            if connection is not None:
                connection.disarm()
                self._open.discard(connection)
                connection.close()
            raise
        finally:
            self._slots.release()
        if response.headers.get("content-encoding") == "gzip":
            response.body = _gunzip(response.body, self._max_body_bytes)
        return response

    @contextlib.asynccontextmanager
    async def stream(
        self, method: str, path: str, headers: HeaderItems | None = None, body: bytes | None = None, *,
        timeout_seconds: float | None = None,
    ) -> AsyncIterator[StreamResponse]:  # fmt: skip
        """Send one request; the body of the answer is read inside the context, the connection ends with it.

        Raises: as request.
        """
        head = self._head(method, path, headers, body)
        limit = self._timeout if timeout_seconds is None else timeout_seconds
        try:
            async with asyncio.timeout(limit):
                connection = await self._exchange(method, head, body or b"", collect=False)
        except TimeoutError as error:
            raise TimeoutExpired(f"{method} {path}: no answer within {limit} s") from error
        try:
            yield StreamResponse(connection, connection.status, connection.headers, connection.header_list)
        finally:
            self._give_back(connection)

    async def upgrade(
        self, method: str, path: str, headers: HeaderItems | None = None, body: bytes | None = None, *,
        timeout_seconds: float | None = None,
    ) -> tuple[Response, RawConnection | None]:  # fmt: skip
        """Send a request with Connection: Upgrade (the caller gives the headers).

        Returns:
          (response, raw): raw is None when the server answered other than 101; then the response has its body. The
          caller owns and closes raw.
        """
        head = self._head(method, path, headers, body)
        limit = self._timeout if timeout_seconds is None else timeout_seconds
        try:
            async with asyncio.timeout(limit):
                connection = await self._connect()
                try:
                    await connection.send(head, body or b"", head_request=False, collect=True)
                    if connection.status == 101:
                        self._open.discard(connection)
                        return Response(101, connection.headers, b"", connection.header_list), connection.take_over()
                    data = await connection.whole_body()
                except BaseException:
                    self._open.discard(connection)
                    connection.close()
                    raise
        except TimeoutError as error:
            raise TimeoutExpired(f"{method} {path}: no answer within {limit} s") from error
        response = Response(connection.status, connection.headers, data, connection.header_list)
        self._open.discard(connection)
        connection.close()
        return response, None

    async def close(self) -> None:
        """Drop every connection; streams that are open end with ConnectionLost."""
        self._closed = True
        for connection in list(self._open):
            connection.close()
        self._open.clear()
        self._idle.clear()
        # One turn of the loop, so that the transports are really gone when this returns.
        await asyncio.sleep(0)


def _gunzip(data: bytes, limit_bytes: int) -> bytes:
    """Unpack a gzip body, bounded against a bomb."""
    unpacker = zlib.decompressobj(31)
    out = unpacker.decompress(data, limit_bytes)
    if unpacker.unconsumed_tail:
        raise BodyTooLarge(limit_bytes)
    return out


__all__ = ["HTTPClient", "HTTPError", "Response", "StreamResponse"]
