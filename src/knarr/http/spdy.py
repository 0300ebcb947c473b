"""SPDY/3.1 framing, the part that Kubernetes streams use: streams in both directions, half close, reset, ping, go away.

Role: `Session` multiplexes streams over a byte connection (raw, or tunnelled in a WebSocket). Callers: remotecommand.py,
portforward.py. Flow control windows are not kept, as in the library that Kubernetes uses: the peers send without asking, so a
stream that is not read pauses the whole connection instead of filling memory.
Source: SPDY protocol draft 3.1; moby/spdystream; apimachinery pkg/util/httpstream/spdy.
"""

from __future__ import annotations

import asyncio
import struct
import zlib
from collections.abc import Callable, Mapping, Sequence

from knarr.aiokits.log import get_logger
from knarr.http.errors import HTTPError
from knarr.http.server import Request
from knarr.http.websocket import Connection

log = get_logger(__name__)
SYN_STREAM, SYN_REPLY, RST_STREAM, SETTINGS, PING, GOAWAY, HEADERS, WINDOW_UPDATE = 1, 2, 3, 4, 6, 7, 8, 9
FIN = 1
RST_PROTOCOL_ERROR, RST_INVALID_STREAM, RST_CANCEL = 1, 2, 5
_MAX_FRAME = 1 << 24
_MAX_HEADERS = 1 << 20
_MAX_STREAMS = 4096
_QUEUE = 64

_WORDS = (
    "options head post put delete trace accept accept-charset accept-encoding accept-language accept-ranges age allow authorization "
    "cache-control connection content-base content-encoding content-language content-length content-location content-md5 "
    "content-range content-type date etag expect expires from host if-match if-modified-since if-none-match if-range "
    "if-unmodified-since last-modified location max-forwards pragma proxy-authenticate proxy-authorization range referer retry-after "
    "server te trailer transfer-encoding upgrade user-agent vary via warning www-authenticate method get status 200_OK version "
    "HTTP/1.1 url public set-cookie keep-alive origin"
).split()
_TAIL = (
    "100101201202205206300302303304305306307402405406407408409410411412413414415416417502504505203 Non-Authoritative Information204 "
    "No Content301 Moved Permanently400 Bad Request401 Unauthorized403 Forbidden404 Not Found500 Internal Server Error501 Not "
    "Implemented503 Service UnavailableJan Feb Mar Apr May Jun Jul Aug Sept Oct Nov Dec 00:00:00 Mon, Tue, Wed, Thu, Fri, Sat, Sun, "
    "GMTchunked,text/html,image/png,image/jpg,image/gif,application/xml,application/xhtml+xml,text/plain,text/javascript,publicprivate"
    "max-age=gzip,deflate,sdchcharset=utf-8charset=iso-8859-1,utf-,*,enq=0."
)
DICTIONARY = b"".join(struct.pack(">I", len(word)) + word.replace("_", " ").encode() for word in _WORDS) + _TAIL.encode()
"""The header compression dictionary that the draft prescribes."""


class SPDYError(HTTPError):
    """The peer broke the protocol."""


class Stream:
    """One stream. `headers` has lower-case names. Reading is bounded; writing waits for the connection."""

    def __init__(self, session: Session, number: int, headers: Mapping[str, str]) -> None:
        self._session, self.id, self.headers = session, number, dict(headers)
        self._incoming: asyncio.Queue[bytes] = asyncio.Queue(_QUEUE)
        self._ended = False
        self._at_end = False
        self._discarding = False
        self.local_closed = False
        self.was_reset = False
        self.refused = False
        """Reset before it was accepted."""
        self.replied: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def read(self) -> bytes:
        """Some bytes; b"" after the peer has finished or the stream was reset."""
        if self._at_end or (self._ended and self._incoming.empty()):
            return b""
        data = await self._incoming.get()
        if not data:
            self._at_end = True
        return data

    async def read_all(self, limit: int = 1 << 20) -> bytes:
        """Everything until the end, bounded."""
        parts, size = [], 0
        while (data := await self.read()) and size < limit:
            parts.append(data)
            size += len(data)
        return b"".join(parts)

    async def write(self, data: bytes) -> None:
        """Send bytes; without effect after close, reset or loss of the connection."""
        for start in range(0, len(data), _MAX_FRAME // 2):
            if self.local_closed or self.was_reset:
                return
            await self._session.send_data(self.id, data[start : start + _MAX_FRAME // 2])

    async def close(self) -> None:
        """Finish our direction. Idempotent."""
        if not self.local_closed and not self.was_reset:
            self.local_closed = True
            await self._session.send_data(self.id, b"", fin=True)

    async def reset(self) -> None:
        """End both directions at once. Idempotent."""
        if not self.was_reset:
            self.was_reset = self.local_closed = True
            self._session.send_control(RST_STREAM, 0, struct.pack(">II", self.id, RST_CANCEL))
            self.discard()
            self.end()

    def end(self) -> None:
        """The peer sends nothing more."""
        if not self._ended:
            self._ended = True
            # A reader may wait on an empty queue; on a full one it finds `_ended` after the last item.
            if not self._incoming.full():
                self._incoming.put_nowait(b"")

    def discard(self) -> None:
        """Drop what has come and what will come: nobody reads any more, and the connection must not wait for that."""
        self._discarding = True
        while not self._incoming.empty():
            self._incoming.get_nowait()

    async def deliver(self, data: bytes) -> None:
        if data and not self._ended and not self._discarding:
            await self._incoming.put(data)


class Session:
    """One SPDY connection.

    Args:
      on_stream: Called for each stream that the peer opens, before the reply; raising HTTPError refuses (resets) it.
    """

    def __init__(self, connection: Connection, on_stream: Callable[[Stream], None] | None = None, *, client: bool = False) -> None:
        self._connection, self._on_stream = connection, on_stream
        self._buffer = bytearray()
        self._streams: dict[int, Stream] = {}
        self._next = 1 if client else 2
        self._client = client
        self._last_peer = 0
        self._inflate = zlib.decompressobj(zdict=DICTIONARY)
        self._deflate = zlib.compressobj(zlib.Z_DEFAULT_COMPRESSION, zdict=DICTIONARY)
        self._going = False
        self.closed = asyncio.Event()

    # Writing

    def send_control(self, kind: int, flags: int, body: bytes) -> None:
        self._connection.write(struct.pack(">HHI", 0x8003, kind, flags << 24 | len(body)) + body)

    async def send_data(self, number: int, data: bytes, *, fin: bool = False) -> None:
        self._connection.write(struct.pack(">II", number, (FIN if fin else 0) << 24 | len(data)) + data)
        await self._connection.drain()

    def _pack(self, headers: Mapping[str, str]) -> bytes:
        parts = [struct.pack(">I", len(headers))]
        for name, value in headers.items():
            raw_name, raw_value = name.lower().encode(), value.encode()
            parts += [struct.pack(">I", len(raw_name)), raw_name, struct.pack(">I", len(raw_value)), raw_value]
        return self._deflate.compress(b"".join(parts)) + self._deflate.flush(zlib.Z_SYNC_FLUSH)

    def _unpack(self, block: bytes) -> dict[str, str]:
        try:
            plain = self._inflate.decompress(block, _MAX_HEADERS)
            if self._inflate.unconsumed_tail:
                raise SPDYError("header block is too large")
            (count,) = struct.unpack_from(">I", plain)
            position, found = 4, {}
            for _ in range(count):
                fields = []
                for _ in range(2):
                    (size,) = struct.unpack_from(">I", plain, position)
                    fields.append(plain[position + 4 : position + 4 + size].decode("utf-8", "replace"))
                    position += 4 + size
                found[fields[0].lower()] = fields[1].partition("\0")[0]
        except (zlib.error, struct.error) as error:
            raise SPDYError(f"malformed header block: {error}") from error
        return found

    async def open(self, headers: Mapping[str, str]) -> Stream:
        """Open a stream and wait for the peer's reply. Raises SPDYError when it is refused."""
        number, self._next = self._next, self._next + 2
        stream = self._streams[number] = Stream(self, number, headers)
        self.send_control(SYN_STREAM, 0, struct.pack(">IIH", number, 0, 0) + self._pack(headers))
        await self._connection.drain()
        await stream.replied
        if stream.refused:
            raise SPDYError("the stream was refused")
        return stream

    def close(self) -> None:
        """Say good-bye and close the connection after what was written. Idempotent."""
        if not self._going:
            self._going = True
            self.send_control(GOAWAY, 0, struct.pack(">II", self._last_peer, 0))
        self._connection.close()

    # Reading

    async def run(self) -> None:
        """Handle frames until the peer ends the connection; then every stream ends. Raises SPDYError."""
        try:
            while await self._fill(8):
                first, second = struct.unpack_from(">II", self._buffer)
                size = second & 0xFFFFFF
                if not await self._fill(8 + size):
                    return
                body = bytes(self._buffer[8 : 8 + size])
                del self._buffer[: 8 + size]
                if first & 0x80000000:
                    await self._control(first & 0xFFFF, second >> 24, body)
                else:
                    await self._data(first, second >> 24, body)
        finally:
            self.closed.set()
            for stream in list(self._streams.values()):
                stream.refused = not stream.replied.done()
                stream.was_reset = True
                stream.end()
                self._reply(stream)

    async def _fill(self, size: int) -> bool:
        while len(self._buffer) < size:
            data = await self._connection.read()
            if not data:
                return False
            self._buffer += data
        return True

    async def _data(self, number: int, flags: int, body: bytes) -> None:
        stream = self._streams.get(number)
        if stream is None:
            self.send_control(RST_STREAM, 0, struct.pack(">II", number, RST_INVALID_STREAM))
            return
        await stream.deliver(body)
        if flags & FIN:
            stream.end()

    async def _control(self, kind: int, flags: int, body: bytes) -> None:
        try:
            if kind == SYN_STREAM:
                self._syn_stream(flags, body)
            elif kind == SYN_REPLY:
                (number,) = struct.unpack_from(">I", body)
                self._unpack(body[4:])
                if (stream := self._streams.get(number & 0x7FFFFFFF)) is not None:
                    self._reply(stream)
                    if flags & FIN:
                        stream.end()
            elif kind == RST_STREAM:
                self._reset(struct.unpack_from(">I", body)[0] & 0x7FFFFFFF)
            elif kind == PING:
                (number,) = struct.unpack_from(">I", body)
                if (number % 2 == 1) != self._client:
                    self.send_control(PING, 0, body[:4])
            elif kind == HEADERS:
                self._unpack(body[4:])  # keeps the compression state in step
            # SETTINGS, WINDOW_UPDATE and GOAWAY ask for nothing: streams that are open go on.
        except struct.error as error:
            raise SPDYError(f"malformed frame of type {kind}") from error

    def _reply(self, stream: Stream) -> None:
        if not stream.replied.done():
            stream.replied.set_result(None)

    def _reset(self, number: int) -> None:
        stream = self._streams.pop(number, None)
        if stream is not None:
            stream.refused = not stream.replied.done()
            stream.was_reset = stream.local_closed = True
            stream.end()
            self._reply(stream)

    def _syn_stream(self, flags: int, body: bytes) -> None:
        (number,) = struct.unpack_from(">I", body)
        number &= 0x7FFFFFFF
        headers = self._unpack(body[10:])
        if number <= self._last_peer or number % 2 == (0 if not self._client else 1) or len(self._streams) >= _MAX_STREAMS:
            self.send_control(RST_STREAM, 0, struct.pack(">II", number, RST_PROTOCOL_ERROR))
            return
        self._last_peer = number
        stream = self._streams[number] = Stream(self, number, headers)
        self._reply(stream)
        try:
            if self._on_stream is None:
                raise SPDYError("no streams are accepted")
            self._on_stream(stream)
        except HTTPError as error:
            log.debug("stream refused", error=error)
            self.send_control(RST_STREAM, 0, struct.pack(">II", number, RST_CANCEL))
            self._reset(number)
            return
        if flags & FIN:
            stream.end()
        self.send_control(SYN_REPLY, 0, struct.pack(">I", number) + self._pack({}))

    def forget(self, *streams: Stream | None) -> None:
        """Drop streams that are done, so that a long connection does not collect them."""
        for stream in streams:
            if stream is not None:
                stream.discard()
                self._streams.pop(stream.id, None)


# The upgrade


def accept(request: Request, supported: Sequence[str]) -> str | None:
    """Negotiate a SPDY upgrade; None when it was refused (and answered). Source: httpstream.Handshake."""
    plain = [("Content-Type", "text/plain; charset=utf-8")]
    if "upgrade" not in request.headers.get("connection", "").lower() or "spdy/3.1" not in request.headers.get("upgrade", "").lower():
        request.respond(400, plain, b"unable to upgrade: missing upgrade headers in request\n")
        return None
    header = request.headers.get("x-stream-protocol-version")
    if header is None:
        request.respond(400, plain, b"unable to upgrade: header X-Stream-Protocol-Version does not exist in request\n")
        return None
    wanted = [item.strip() for item in header.split(",") if item.strip()]
    for item in wanted:
        if item in supported:
            return item
    text = f"unable to upgrade: unable to negotiate protocol: client supports [{' '.join(wanted)}], server accepts [{' '.join(supported)}]\n"
    request.respond(403, [*plain, *(("X-Accepted-Stream-Protocol-Versions", item) for item in supported)], text.encode())
    return None


def start(request: Request, protocol: str) -> Connection:
    """Answer 101 and take the connection over."""
    raw = request.upgrade()
    lines = ["HTTP/1.1 101 Switching Protocols", "Connection: Upgrade", "Upgrade: SPDY/3.1", f"X-Stream-Protocol-Version: {protocol}"]
    raw.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
    return raw
