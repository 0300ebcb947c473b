"""One HTTP request and the ways to answer it: whole, piece by piece, or by handing over the connection.

Made by the connection (server.py) once the head has been read, and given to the handler when the body has arrived too. Knows nothing
of Kubernetes.
"""

from __future__ import annotations

import asyncio
import time
from email.utils import formatdate
from http import HTTPStatus
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from knarr.http.errors import BodyTooLarge
from knarr.http.raw import RawConnection

if TYPE_CHECKING:
    from knarr.http.server import Connection

Headers = list[tuple[str, str]]

STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}\r\n".encode() for s in HTTPStatus}
NO_BODY = frozenset({204, 304})
_date_second = 0
_date_header = b""


def _date() -> bytes:
    global _date_second, _date_header
    second = int(time.time())
    if second != _date_second:
        _date_second = second
        _date_header = b"Date: " + formatdate(second, usegmt=True).encode() + b"\r\n"
    return _date_header


def render_head(status: int, headers: Headers) -> bytes:
    """Return status line and header lines with Date, without the blank line at the end."""
    line = STATUS_LINES.get(status) or f"HTTP/1.1 {status} Unknown\r\n".encode()
    if not headers:
        return line + _date()
    text = "".join([f"{name}: {value}\r\n" for name, value in headers])
    return line + _date() + text.encode("utf-8", "surrogateescape")


class ResponseStream:
    """A chunked answer that is written piece by piece (watches, logs)."""

    __slots__ = ("_chunked", "_connection", "_ended", "closed")

    def __init__(self, connection: Connection, chunked: bool) -> None:
        self._connection = connection
        self._chunked = chunked
        self._ended = False
        self.closed: asyncio.Future[None] = connection.loop.create_future()
        """Done when the peer has gone away."""

    @property
    def buffered_bytes(self) -> int:
        """Bytes written that the kernel has not taken yet."""
        transport = self._connection.transport
        return 0 if transport is None else transport.get_write_buffer_size()

    def write(self, data: bytes) -> None:
        """Send one piece; without effect when the peer has gone."""
        transport = self._connection.transport
        if not data or self._ended or transport is None or transport.is_closing():
            return
        if self._chunked:
            transport.write(b"%x\r\n%b\r\n" % (len(data), data))
        else:
            transport.write(data)

    def write_rendered(self, chunk: bytes) -> None:
        """Send bytes that are already one chunk (rendered once, shared by many watchers)."""
        transport = self._connection.transport
        if not self._ended and transport is not None and not transport.is_closing():
            transport.write(chunk)

    async def drain(self) -> None:
        """Wait until the peer takes data again."""
        await self._connection.drain()

    def close(self) -> None:
        """End the answer; the connection is kept for further requests."""
        if self._ended:
            return
        self._ended = True
        connection = self._connection
        transport = connection.transport
        if transport is not None and not transport.is_closing() and self._chunked:
            transport.write(b"0\r\n\r\n")
        connection.answered(keep=self._chunked)

    def abort(self) -> None:
        """Break the connection, so that the peer sees a truncated answer."""
        self._ended = True
        if self._connection.transport is not None:
            self._connection.transport.abort()


class Request:
    """One request; exactly one of respond, start_stream or upgrade ends it."""

    __slots__ = (
        "_body", "_connection", "_query", "_too_large", "answer_headers", "aside_seconds", "context", "done", "header_list", "headers", "keep_alive",
        "lasting", "later", "method", "path", "query_string", "raw_path", "received_at", "sent_bytes", "status", "upgrade_wanted", "version",
    )  # fmt: skip

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._body: list[bytes] = []
        self._too_large = False
        self._query: dict[str, list[str]] | None = None
        self.method = ""
        self.path = ""
        self.raw_path = ""
        """The request target without the query, still percent-encoded."""
        self.query_string = ""
        self.lasting = False
        """The answer goes on when the handler is done with it; who ends it tells whoever counts requests."""
        self.aside_seconds = 0.0
        """How long it waited for others: for its turn, for webhooks."""
        self.headers: dict[str, str] = {}
        """Lower-case names; several lines of one name are joined by ", "."""
        self.header_list: list[tuple[str, str]] = []
        self.version = "1.1"
        self.keep_alive = True
        self.upgrade_wanted = False
        self.done = False
        self.later: asyncio.Task[None] | None = None
        """What will answer after the handler has returned."""
        self.status = 0
        """The status answered; 0 before."""
        self.answer_headers = b""
        """Header lines that every answer carries, rendered ("Name: value\\r\\n" each)."""
        self.sent_bytes = 0
        """Length of a body sent whole."""
        self.received_at = 0.0
        self.context: Any = None
        """Whatever the handler wants to keep with the request (user, request info)."""

    @property
    def query(self) -> dict[str, list[str]]:
        if self._query is None:
            self._query = parse_qs(self.query_string, keep_blank_values=True, errors="surrogateescape") if self.query_string else {}
        return self._query

    def header_values(self, name: str) -> list[str]:
        """Return the values of every line of a header (lower-case name), in order."""
        return [value for key, value in self.header_list if key == name]

    @property
    def peer(self) -> tuple[str, int]:
        return self._connection.peer

    @property
    def local(self) -> tuple[str, int]:
        transport = self._connection.transport
        address = transport.get_extra_info("sockname") if transport is not None else None
        return (address[0], address[1]) if isinstance(address, tuple) else ("", 0)

    @property
    def is_tls(self) -> bool:
        return self._connection.server.ssl_context is not None

    @property
    def connection_state(self) -> dict[str, Any]:
        """A dict that lives as long as the connection: a place to remember who the client certificate is."""
        return self._connection.state

    @property
    def disconnected(self) -> asyncio.Future[None]:
        """Done when the connection is gone."""
        return self._connection.gone

    def peer_certificate_der(self) -> bytes | None:
        """Return the client certificate in DER form, None without one; verified by the TLS layer unless its context only asks (anycertificate)."""
        return self._connection.peer_certificate_der()

    def presented_certificates(self) -> tuple[bytes, ...]:
        """Return what the client showed, in DER form, its own certificate first; nobody has verified it where the context only asks."""
        return self._connection.presented_certificates()

    async def body(self) -> bytes:
        """Return the whole body; see whole_body."""
        return self.whole_body()

    def whole_body(self) -> bytes:
        """Return the body, which has arrived before the handler is called.

        Raises:
          BodyTooLarge: it is longer than the server allows.
        """
        if self._too_large:
            raise BodyTooLarge(self._connection.server.max_body_bytes)
        body = self._body
        return body[0] if len(body) == 1 else b"".join(body)

    def respond(self, status: int, headers: Headers, body: bytes) -> None:
        """Send the whole answer in one write; Content-Length and Date are added."""
        head = render_head(status, headers)
        self._finish(status, head, body)

    def respond_rendered(self, status: int, header_lines: bytes, body: bytes) -> None:
        """Like respond with header lines already rendered ("Name: value\\r\\n" each): the hot path's form."""
        self._finish(status, STATUS_LINES[status] + _date() + header_lines, body)

    def _finish(self, status: int, head: bytes, body: bytes) -> None:
        if self.done:
            return
        self.done = True
        self.status = status
        self.sent_bytes = len(body)
        connection = self._connection
        transport = connection.transport
        # What remains of a refused body is not read: the connection is of no further use.
        keep = self.keep_alive and not self._too_large and not connection.server.closing
        if transport is not None and not transport.is_closing():
            head += self.answer_headers
            if not keep:
                head += b"Connection: close\r\n"
            elif self.version == "1.0":
                head += b"Connection: keep-alive\r\n"
            if status in NO_BODY:
                transport.write(head + b"\r\n")
            elif self.method == "HEAD":
                transport.write(b"%bContent-Length: %d\r\n\r\n" % (head, len(body)))
            else:
                transport.write(b"%bContent-Length: %d\r\n\r\n%b" % (head, len(body), body))
        connection.answered(keep=keep)

    async def start_stream(self, status: int, headers: Headers) -> ResponseStream:
        """Send the head of an answer whose body follows piece by piece."""
        return self.start_stream_nowait(status, headers)

    def start_stream_nowait(self, status: int, headers: Headers) -> ResponseStream:
        self.done = True
        self.status = status
        connection = self._connection
        chunked = self.version != "1.0"
        head = render_head(status, headers) + self.answer_headers
        head += b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"Connection: close\r\n\r\n"
        stream = ResponseStream(connection, chunked)
        if connection.transport is None or connection.transport.is_closing():
            stream.closed.set_result(None)
        else:
            connection.transport.write(head)
            connection.stream = stream
        return stream

    def upgrade(self) -> RawConnection:
        """Take over the raw connection, with the bytes that came after the head; the caller writes the 101 itself."""
        self.done = True
        self.status = 101
        return self._connection.take_over()
