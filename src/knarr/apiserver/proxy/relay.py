"""Carries bytes between a client of the API server and another server: upgraded connections and plain HTTP.

After an upgrade nothing is looked at: WebSocket and SPDY go through untouched, each direction with its own task and
back-pressure. Plain requests are sent on with forwarding headers; answers are streamed, HTML has its links rewritten.

Loops: two pumps per upgraded connection (bound: the high-water marks of both connections).
Source: apimachinery pkg/util/proxy/upgradeaware.go, transport.go; net/http/httputil ReverseProxy.
"""

from __future__ import annotations

import asyncio
import gzip
import zlib
from collections.abc import Callable

from knarr.api import errors
from knarr.apiserver.proxy.locations import Location
from knarr.apiserver.proxy.rewrite import rewrite_html, rewrite_url
from knarr.http.client import HTTPClient, StreamResponse
from knarr.http.errors import ConnectFailed, HTTPError
from knarr.http.raw import RawConnection
from knarr.http.server import Request, render_head

HeaderItems = list[tuple[str, str]]
_HOP_BY_HOP = frozenset({
    "connection", "proxy-connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "te", "trailer", "transfer-encoding",
    "upgrade",
})  # fmt: skip
# The identity that was shown to us is not the backend's business.
_CREDENTIALS = ("authorization", "impersonate-", "x-remote-")
_MOST_HTML_BYTES = 16 << 20
UPGRADE_TIMEOUT_SECONDS = 30.0


def forwarded_headers(request: Request, *, upgrade: bool) -> HeaderItems:
    """Headers for the backend: without hop-by-hop ones and credentials, with X-Forwarded-For."""
    named = {token.strip().lower() for token in request.headers.get("connection", "").split(",")} if not upgrade else set()
    headers: HeaderItems = []
    before = ""
    for name, value in request.header_list:
        if name == "x-forwarded-for":
            before = f"{before}, {value}" if before else value
        elif name in ("content-length", "expect") or name.startswith(_CREDENTIALS):
            continue
        elif upgrade or (name not in _HOP_BY_HOP and name not in named):
            headers.append((name.title(), value))
    peer = request.peer[0]
    if peer:
        headers.append(("X-Forwarded-For", f"{before}, {peer}" if before else peer))
    return headers


async def relay_upgrade(request: Request, client: HTTPClient, path: str) -> None:
    """Make the same upgrade at the backend and join both connections until one side ends.

    Raises:
      StatusError: the backend could not be reached.
    """
    headers = forwarded_headers(request, upgrade=True)
    body = await request.body()
    try:
        response, backend = await client.upgrade(request.method, path, headers, body or None, timeout_seconds=UPGRADE_TIMEOUT_SECONDS)
    except HTTPError as error:
        raise errors.StatusError(500, "", f"error dialing backend: {error}") from error
    if backend is None:
        if response.status < 400:
            raise errors.StatusError(500, "", f"invalid upgrade response: status code {response.status}")
        answer = [(name.title(), value) for name, value in response.header_list if name not in _HOP_BY_HOP and name not in ("content-length", "date")]
        request.respond(response.status, answer, response.body)
        return
    front = request.upgrade()
    front.write(render_head(101, [(name.title(), value) for name, value in response.header_list if name != "date"]) + b"\r\n")
    await join(front, backend)


async def join(front: RawConnection, backend: RawConnection) -> None:
    """Pump both ways; when one direction ends its end is passed on, and when the backend has finished all is closed."""
    upward = asyncio.ensure_future(_pump(front, backend))
    downward = asyncio.ensure_future(_pump(backend, front))
    try:
        done, _ = await asyncio.wait((upward, downward), return_when=asyncio.FIRST_COMPLETED)
        if upward in done and downward not in done:
            # The client said all it had to say; a backend that answers still may, but not for ever.
            await asyncio.wait((downward,), timeout=UPGRADE_TIMEOUT_SECONDS)
        else:
            await front.drain()
    finally:
        for task in (upward, downward):
            task.cancel()
        await asyncio.gather(upward, downward, return_exceptions=True)
        front.close()
        backend.close()


async def _pump(source: RawConnection, target: RawConnection) -> None:
    while True:
        data = await source.read()
        if not data:
            target.write_eof()
            return
        target.write(data)
        await target.drain()


def _answer_headers(response: StreamResponse, keep: Callable[[str], bool]) -> HeaderItems:
    return [(name.title(), value) for name, value in response.header_list if name not in _HOP_BY_HOP and name != "date" and keep(name)]


async def relay_http(request: Request, client: HTTPClient, location: Location, path: str, prefix: str) -> None:
    """Send a request on and its answer back.

    Args:
      path: Path and query at the backend.
      prefix: Path under which the client sees the backend, without a slash at the end.

    Raises:
      StatusError: 503, the backend could not be reached.
    """
    headers = forwarded_headers(request, upgrade=False)
    bare = path.partition("?")[0]
    headers = [(name, value) for name, value in headers if not name.lower().startswith("x-forwarded-") or name == "X-Forwarded-For"]
    headers += [("X-Forwarded-Uri", prefix + bare), ("X-Forwarded-Host", request.headers.get("host", "")), ("X-Forwarded-Proto", "https" if request.is_tls else "http")]
    body = await request.body()
    if "content-length" not in request.headers and "transfer-encoding" not in request.headers:
        sent: bytes | None = None
    else:
        sent = body
    try:
        async with client.stream(request.method, path, headers, sent) as response:
            await _return(request, response, location, prefix)
    except ConnectFailed as error:
        raise errors.service_unavailable(f"error trying to reach service: {error}") from error
    except HTTPError as error:
        if request.done:
            return
        raise errors.service_unavailable(f"error trying to reach service: {error}") from error


async def _return(request: Request, response: StreamResponse, location: Location, prefix: str) -> None:
    host = request.headers.get("host", "")
    headers = _answer_headers(response, lambda name: name != "content-length")

    def moved(url: str) -> str:
        return rewrite_url(url, prefix=prefix, backend=location.authority, request_host=host)

    redirect = "location" in response.headers
    headers = [(name, moved(value) if name == "Location" else value) for name, value in headers]
    kind = response.headers.get("content-type", "").split(";")[0].strip()
    length = response.headers.get("content-length")
    if kind == "text/html" and not redirect and request.method != "HEAD" and (not length or int(length) <= _MOST_HTML_BYTES):
        page = _rewritten(await response.read(), response.headers.get("content-encoding", ""), prefix, location.authority, host)
        request.respond(response.status, headers, page)
        return
    if request.method == "HEAD" or response.status in (204, 304):
        request.respond(response.status, headers, b"")
        return
    if length is not None and int(length) <= 1 << 20:
        request.respond(response.status, headers, await response.read())
        return
    await stream_body(request, response, headers)


async def stream_body(request: Request, response: StreamResponse, headers: HeaderItems) -> None:
    """Pass an answer's body on as it arrives; ends when either side goes away."""
    stream = await request.start_stream(response.status, headers)

    def reader_left(_: object) -> None:
        # A followed log or a watch ends with its reader, not with the next piece that nobody reads.
        response.abort()

    stream.closed.add_done_callback(reader_left)
    try:
        async for chunk in response.iter_chunks():
            stream.write(chunk)
            await stream.drain()
    except HTTPError:
        stream.abort()
        return
    finally:
        # The connection to the backend is used again by others after this.
        stream.closed.remove_done_callback(reader_left)
    stream.close()


def _rewritten(body: bytes, encoding: str, prefix: str, backend: str, host: str) -> bytes:
    try:
        if encoding == "gzip":
            text = gzip.decompress(body)
        elif encoding == "deflate":
            text = zlib.decompress(body, -15)
        elif encoding == "":
            text = body
        else:
            return body
    except (OSError, EOFError, zlib.error):
        return body
    page = rewrite_html(text.decode("utf-8", "surrogateescape"), prefix=prefix, backend=backend, request_host=host)
    changed = page.encode("utf-8", "surrogateescape")
    if encoding == "gzip":
        return gzip.compress(changed)
    if encoding == "deflate":
        return zlib.compress(changed)[2:-4]
    return changed
