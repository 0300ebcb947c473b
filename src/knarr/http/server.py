"""An HTTP/1.1 server on a bare asyncio.Protocol and httptools; used by the API server, the kubelet and the dashboard.

An own server instead of ASGI because exec, attach and port-forward need the raw connection, and because one answer must
cost one `transport.write`. Requests of one connection are answered in order; further pipelined ones wait, bounded by
PIPELINE_LIMIT, after which the connection is not read any more. Memory per connection is bounded: headers by
`max_header_bytes`, the body by `max_body_bytes`. Slow peers: one sweep per server closes connections whose header, body
or idle deadline has passed, so there is no timer per request.

`fast` is a plain function tried first: answering from memory must not pay for a task. It returns False when the request
needs the asynchronous handler. It knows nothing of Kubernetes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote

import httptools

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.http.anycertificate import presented
from knarr.http.errors import BadRequest
from knarr.http.raw import RawConnection
from knarr.http.request import Headers, Request, ResponseStream, render_head
from knarr.http.transports import close_once

__all__ = ["HTTPServer", "Headers", "Request", "ResponseStream", "render_head"]

log = get_logger(__name__)

Handler = Callable[["Request"], Awaitable[None]]
FastHandler = Callable[["Request"], bool]

PIPELINE_LIMIT = 32
MOST_NAMES = 512
SWEEP_SECONDS = 5.0
_names: dict[bytes, str] = {}
"""Header names as clients write them, in lower case."""


class Connection(asyncio.Protocol):
    """One connection: parser callbacks on top, order of answers below."""

    def __init__(self, server: HTTPServer) -> None:
        self.server = server
        self.loop = server.loop
        self.transport: asyncio.Transport | None = None
        self.peer: tuple[str, int] = ("", 0)
        self.state: dict[str, Any] = {}
        self.deadline = 0.0
        self.current: Request | None = None
        self.stream: ResponseStream | None = None
        self.raw: RawConnection | None = None
        self.gone: asyncio.Future[None] = self.loop.create_future()
        self._parser: Any = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._request = Request(self)
        self._url = b""
        self._header_bytes = 0
        self._body_bytes = 0
        self._after_upgrade = b""
        self._paused = False
        self._can_write: asyncio.Future[None] | None = None
        self._certificate: bytes | bool | None = False
        self._closing = False

    # -- transport ---------------------------------------------------------------------------------------------------
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport) or hasattr(transport, "write")
        self.transport = transport  # type: ignore[assignment]
        address = transport.get_extra_info("peername")
        if isinstance(address, tuple):
            self.peer = (address[0], address[1])
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family != socket.AF_UNIX:
            # Half-open connections: the kernel finds out, so a watcher of a vanished machine does not stay for ever.
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 30)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 15)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        self.server.connections.add(self)
        self.deadline = self.loop.time() + self.server.header_timeout_seconds

    def connection_lost(self, error: Exception | None) -> None:
        self.server.connections.discard(self)
        self.transport = None
        self.resume_writing()
        if not self.gone.done():
            self.gone.set_result(None)
        if self.stream is not None and not self.stream.closed.done():
            self.stream.closed.set_result(None)
        if self.raw is not None:
            self.raw.connection_lost()
        self._waiting.clear()

    def eof_received(self) -> bool:
        if self.raw is not None:
            self.raw.feed_eof()
            return not self.server.ssl_context  # TLS knows no half-closed connection
        # A client that has sent its request and closed its direction still wants the answer, but a stream's reader has gone.
        return self.current is not None and self.stream is None and not self.server.ssl_context

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

    async def drain(self) -> None:
        if self._can_write is not None:
            await asyncio.shield(self._can_write)

    def data_received(self, data: bytes) -> None:
        if self.raw is not None:
            self.raw.feed(data)
            return
        if self._closing:
            return
        if self.current is not None and self.current.upgrade_wanted:
            self._after_upgrade += data
            if len(self._after_upgrade) > self.server.max_body_bytes:
                self._drop()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._after_upgrade = data[upgrade.args[0]:]
            self._start_upgrade()
        except httptools.HttpParserCallbackError as error:
            cause = error.__context__
            if isinstance(cause, BadRequest):
                self._refuse(431 if "header" in str(cause) else 400, str(cause))
            else:
                log.error("request parsing failed", error=repr(cause))
                self._drop()
        except httptools.HttpParserError as error:
            self._refuse(400, f"bad request: {error}")

    def _refuse(self, status: int, text: str) -> None:
        """Answer bytes that are not a request (as Go's server does: plain text) and close."""
        self._closing = True
        if self.transport is not None and self.current is None:
            phrase = HTTPStatus(status).phrase
            body = f"{status} {phrase}".encode() if status != 400 else b"400 Bad Request"
            self.transport.write(
                render_head(status, [("Content-Type", "text/plain; charset=utf-8"), ("Connection", "close")])
                + b"Content-Length: %d\r\n\r\n" % len(body) + body
            )
            close_once(self.transport)
        elif self.transport is not None and self.stream is not None:
            close_once(self.transport)

    def _drop(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    # -- parser callbacks --------------------------------------------------------------------------------------------
    def on_message_begin(self) -> None:
        self._request = Request(self)
        self._url = b""
        self._header_bytes = 0
        self._body_bytes = 0
        self.deadline = self.loop.time() + self.server.header_timeout_seconds if self.current is None else 0.0

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > self.server.max_header_bytes:
            raise BadRequest("header: the request line is too long")

    def on_header(self, name: bytes, value: bytes) -> None:
        self._header_bytes += len(name) + len(value) + 4
        if self._header_bytes > self.server.max_header_bytes:
            raise BadRequest("header fields are too large")
        request = self._request
        key = _names.get(name)
        if key is None:
            key = name.decode("latin-1").lower()
            if len(_names) < MOST_NAMES and len(name) < 64:
                _names[name] = key
        text = value.decode("utf-8", "surrogateescape")
        request.header_list.append((key, text))
        headers = request.headers
        if key in headers:
            if key in ("content-length", "host"):
                raise BadRequest(f"several {key} lines")
            headers[key] = f"{headers[key]}, {text}"
        else:
            headers[key] = text

    def on_headers_complete(self) -> None:
        request = self._request
        parser = self._parser
        request.method = parser.get_method().decode("latin-1")
        request.version = parser.get_http_version()
        request.keep_alive = parser.should_keep_alive()
        request.received_at = self.loop.time()
        raw, _, query = self._url.decode("utf-8", "surrogateescape").partition("?")
        if not raw.startswith("/") and raw != "*":
            # Absolute form, as proxies send it.
            rest = raw.split("://", 1)[-1]
            raw = "/" + rest.partition("/")[2]
        request.raw_path = raw
        request.path = unquote(raw, errors="surrogateescape") if "%" in raw else raw
        request.query_string = query.partition("#")[0]
        headers = request.headers
        length = headers.get("content-length")
        if length is not None and length.isdigit() and int(length) > self.server.max_body_bytes:
            request._too_large = True
        elif headers.get("expect", "").lower() == "100-continue" and self.transport is not None and self.current is None:
            self.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self.current is None:
            self.deadline = request.received_at + self.server.body_timeout_seconds
        if request._too_large:
            self._body_refused()

    def _body_refused(self) -> None:
        """Hand the request over without its body; what follows on the connection is thrown away."""
        self._closing = True
        self._enqueue(self._request)

    def on_body(self, data: bytes) -> None:
        request = self._request
        if request._too_large:
            return
        self._body_bytes += len(data)
        if self._body_bytes > self.server.max_body_bytes:
            request._too_large = True
            request._body.clear()
            self._body_refused()
            return
        request._body.append(data)

    def on_message_complete(self) -> None:
        request = self._request
        if request._too_large:
            return
        if self._parser.should_upgrade():
            request.upgrade_wanted = True
            return  # data_received gets HttpParserUpgrade next, with the place where the raw bytes begin
        self._enqueue(request)

    def _start_upgrade(self) -> None:
        request = self._request
        request.upgrade_wanted = True
        self._enqueue(request)

    # -- order of answers --------------------------------------------------------------------------------------------
    def _enqueue(self, request: Request) -> None:
        if self.current is not None:
            self._waiting.append(request)
            if len(self._waiting) >= PIPELINE_LIMIT and not self._paused and self.transport is not None:
                self._paused = True
                self.transport.pause_reading()
            return
        self._begin(request)

    def _begin(self, request: Request) -> None:
        self.current = request
        self.deadline = 0.0
        server = self.server
        fast = server.fast
        if fast is not None:
            try:
                if fast(request):
                    return
            except Exception as error:
                server.fault(request, error)
                return
        server.tasks.spawn(server.run(request), "http-request")

    def answered(self, *, keep: bool) -> None:
        """The current request has its answer: go on with the next, or close."""
        self.current = None
        self.stream = None
        transport = self.transport
        if transport is None:
            return
        if not keep or self._closing:
            close_once(transport)
            return
        if self._waiting:
            # Through the loop, not by recursion: hundreds of pipelined requests must not nest.
            self.loop.call_soon(self._next)
            return
        if self._paused:
            self._paused = False
            transport.resume_reading()
        self.deadline = self.loop.time() + self.server.idle_timeout_seconds

    def _next(self) -> None:
        if self.current is None and self._waiting and self.transport is not None:
            self._begin(self._waiting.popleft())
            if self._paused and len(self._waiting) < PIPELINE_LIMIT // 2 and self.transport is not None:
                self._paused = False
                self.transport.resume_reading()

    def take_over(self) -> RawConnection:
        assert self.transport is not None or self.gone.done()
        if self.transport is None:
            raise ConnectionError("the peer has gone")
        self.raw = RawConnection(self.transport, self._after_upgrade)
        self._after_upgrade = b""
        self.current = None
        return self.raw

    def peer_certificate_der(self) -> bytes | None:
        if self._certificate is False:
            tls = self.transport.get_extra_info("ssl_object") if self.transport is not None else None
            self._certificate = tls.getpeercert(True) if tls is not None else None
        return self._certificate if isinstance(self._certificate, bytes) else None

    def presented_certificates(self) -> tuple[bytes, ...]:
        tls = self.transport.get_extra_info("ssl_object") if self.transport is not None else None
        return presented(tls) if tls is not None else ()


class HTTPServer:
    """Listens and owns every connection.

    Args:
      handler: Coroutine function called with each Request not answered by `fast`. An exception that escapes is logged
        and answered with a plain 500.
      fast: Plain function tried first; True means the request has been (or will be) answered.
      ssl_context: Server context; client certificates are wanted when it has CERT_OPTIONAL.
    """

    def __init__(
        self, handler: Handler, *, fast: FastHandler | None = None, ssl_context: ssl.SSLContext | None = None,
        max_body_bytes: int = 3 << 20, max_header_bytes: int = 1 << 20, header_timeout_seconds: float = 32.0,
        body_timeout_seconds: float = 60.0, idle_timeout_seconds: float = 90.0,
    ) -> None:  # fmt: skip
        self.handler = handler
        self.fast = fast
        self.ssl_context = ssl_context
        self.max_body_bytes = max_body_bytes
        self.max_header_bytes = max_header_bytes
        self.header_timeout_seconds = header_timeout_seconds
        self.body_timeout_seconds = body_timeout_seconds
        self.idle_timeout_seconds = idle_timeout_seconds
        self.loop = asyncio.get_running_loop()
        self.connections: set[Connection] = set()
        self.tasks = Tasks()
        self.closing = False
        self._servers: list[asyncio.AbstractServer] = []
        self._sweeper: asyncio.TimerHandle | None = None

    async def listen(self, host: str | None, port: int, *, reuse_port: bool = False) -> int:
        """Listen on an address; returns the port (useful when asked for 0)."""
        server = await self.loop.create_server(
            lambda: Connection(self), host, port, ssl=self.ssl_context, backlog=1024, reuse_port=reuse_port or None,
            ssl_handshake_timeout=15.0 if self.ssl_context else None,
        )  # fmt: skip
        self._added(server)
        return int(server.sockets[0].getsockname()[1])

    async def listen_socket(self, sock: socket.socket) -> None:
        """Serve a socket that is already bound (inherited from the supervisor)."""
        server = await self.loop.create_server(
            lambda: Connection(self), sock=sock, ssl=self.ssl_context, backlog=1024,
            ssl_handshake_timeout=15.0 if self.ssl_context else None,
        )  # fmt: skip
        self._added(server)

    async def listen_unix(self, path: str) -> None:
        """Listen on a Unix socket."""
        self._added(await self.loop.create_unix_server(lambda: Connection(self), path, backlog=1024))

    def _added(self, server: asyncio.AbstractServer) -> None:
        self._servers.append(server)
        if self._sweeper is None:
            self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    def _sweep(self) -> None:
        """Close what has passed its deadline; one pass for all connections instead of a timer each."""
        now = self.loop.time()
        for connection in list(self.connections):
            if connection.deadline and now > connection.deadline and connection.transport is not None:
                connection.transport.abort()
        self._sweeper = self.loop.call_later(SWEEP_SECONDS, self._sweep)

    async def run(self, request: Request) -> None:
        """Run the handler for one request; nothing escapes but cancellation."""
        try:
            await self.handler(request)
            if request.later is not None:
                await request.later
        except Exception as error:
            self.fault(request, error)
        if not request.done:
            self.fault(request, RuntimeError("the handler gave no answer"))
        # It mostly knows the request, too: together they would wait for the cycle collector, with all that was read and written.
        request.context = None

    def fault(self, request: Request, error: Exception) -> None:
        if request._connection.transport is None:
            return
        log.error("request failed", method=request.method, path=request.path, error=repr(error), exc_info=error)
        if not request.done:
            request.respond(500, [("Content-Type", "text/plain; charset=utf-8")], b"Internal Server Error\n")
        else:
            request._connection._drop()

    async def stop_listening(self) -> None:
        """Accept no further connection; the present ones go on, each closing after its current answer."""
        self.closing = True
        for server in self._servers:
            server.close()

    async def close(self, *, grace_seconds: float = 0.0) -> None:
        """Stop listening, wait up to `grace_seconds` for running requests, close every connection."""
        await self.stop_listening()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
        for connection in list(self.connections):
            if connection.current is None and connection.raw is None and connection.transport is not None:
                close_once(connection.transport)
        busy = [c.gone for c in self.connections if c.current is not None]
        if busy and grace_seconds > 0:
            await asyncio.wait(busy, timeout=grace_seconds)
        for connection in list(self.connections):
            if connection.transport is not None:
                connection.transport.abort()
        await self.tasks.close()
        left = [c.gone for c in self.connections]
        if left:
            await asyncio.wait(left, timeout=1.0)
