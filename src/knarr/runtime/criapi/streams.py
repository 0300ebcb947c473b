"""Client side of a runtime's streaming server: exec, attach and port-forward of containerd or CRI-O.

Role: the CRI answers such a call with a URL, served over SPDY; here it becomes the same `Stream` and `ByteStream` that the
embedded runtime gives. Callers: client.py. Source: kubelet pkg/cri/streaming, client-go tools/remotecommand/v4.go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import orjson

from knarr.http import spdy
from knarr.http.client import HTTPClient
from knarr.http.errors import HTTPError
from knarr.runtime.cri import RuntimeFault

_EXEC_PROTOCOL, _FORWARD_PROTOCOL = "v4.channel.k8s.io", "portforward.k8s.io"


async def _connect(url: str, protocol: str) -> tuple[HTTPClient, spdy.Session, asyncio.Task[None]]:
    parts = urlsplit(url)
    client = HTTPClient(f"{parts.scheme}://{parts.netloc}")
    headers = {"Connection": "Upgrade", "Upgrade": "SPDY/3.1", "X-Stream-Protocol-Version": protocol}
    try:
        response, raw = await client.upgrade("POST", parts.path + (f"?{parts.query}" if parts.query else ""), headers)
    except HTTPError as error:
        await client.close()
        raise RuntimeFault(f"cannot reach the runtime's streaming server: {error}") from error
    if raw is None:
        await client.close()
        raise RuntimeFault(f"the runtime's streaming server answered {response.status}: {response.body.decode(errors='replace')[:500]}")
    session = spdy.Session(raw, client=True)
    return client, session, asyncio.ensure_future(session.run())


async def _end(client: HTTPClient, session: spdy.Session, running: asyncio.Task[None]) -> None:
    session.close()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await client.close()


class RemoteStream:
    """One exec or attach; implements cri.Stream."""

    def __init__(self, client: HTTPClient, session: spdy.Session, running: asyncio.Task[None], streams: dict[str, spdy.Stream]) -> None:
        self._client, self._session, self._running, self._streams = client, session, running, streams

    async def read(self) -> AsyncIterator[tuple[int, bytes]]:
        queue: asyncio.Queue[tuple[int, bytes] | None] = asyncio.Queue(16)
        channels = [(channel, self._streams[kind]) for channel, kind in ((1, "stdout"), (2, "stderr")) if kind in self._streams]

        async def pump(channel: int, stream: spdy.Stream) -> None:
            while data := await stream.read():
                await queue.put((channel, data))
            await queue.put(None)

        tasks = [asyncio.ensure_future(pump(*item)) for item in channels]
        try:
            ended = 0
            while ended < len(tasks):
                item = await queue.get()
                if item is None:
                    ended += 1
                else:
                    yield item
        finally:
            for task in tasks:
                task.cancel()

    async def write_stdin(self, data: bytes) -> None:
        if (stream := self._streams.get("stdin")) is not None:
            await stream.write(data)

    async def close_stdin(self) -> None:
        if (stream := self._streams.get("stdin")) is not None:
            await stream.close()

    async def resize(self, width: int, height: int) -> None:
        if (stream := self._streams.get("resize")) is not None:
            await stream.write(orjson.dumps({"Width": width, "Height": height}))

    async def wait(self) -> int:
        """Exit code as the status on the error stream tells it. Raises RuntimeFault for a process that did not run."""
        text = await self._streams["error"].read_all()
        if not text:
            raise RuntimeFault("the runtime ended the stream without a status")
        status = orjson.loads(text)
        if status.get("status") == "Success":
            return 0
        for cause in (status.get("details") or {}).get("causes") or []:
            if cause.get("reason") == "ExitCode":
                return int(cause["message"])
        raise RuntimeFault(str(status.get("message", "unknown failure")))

    async def close(self) -> None:
        await _end(self._client, self._session, self._running)


async def open_process(url: str, *, tty: bool, stdin: bool) -> RemoteStream:
    """Connect to the URL of an exec or attach. Raises RuntimeFault."""
    client, session, running = await _connect(url, _EXEC_PROTOCOL)
    streams: dict[str, spdy.Stream] = {}
    try:
        for kind in ("error", *(["stdin"] if stdin else []), "stdout", *(["resize"] if tty else ["stderr"])):
            streams[kind] = await session.open({"streamtype": kind})
    except (HTTPError, asyncio.CancelledError) as error:
        await _end(client, session, running)
        if isinstance(error, HTTPError):
            raise RuntimeFault(f"the runtime's streaming server refused a stream: {error}") from error
        raise
    return RemoteStream(client, session, running, streams)


class RemoteConnection:
    """One forwarded connection; implements cri.ByteStream."""

    def __init__(self, client: HTTPClient, session: spdy.Session, running: asyncio.Task[None], data: spdy.Stream, error: spdy.Stream) -> None:
        self._client, self._session, self._running, self._data, self._error = client, session, running, data, error

    async def read(self) -> bytes:
        """Some bytes; b"" at the end. Raises RuntimeFault when the runtime could not connect."""
        data = await self._data.read()
        if not data:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(1):
                    if text := await self._error.read_all():
                        raise RuntimeFault(text.decode(errors="replace"))
        return data

    async def write(self, data: bytes) -> None:
        await self._data.write(data)

    async def write_eof(self) -> None:
        await self._data.close()

    async def close(self) -> None:
        await _end(self._client, self._session, self._running)


async def open_connection(url: str, port: int) -> RemoteConnection:
    """Connect to the URL of a port-forward, one connection to one port. Raises RuntimeFault."""
    client, session, running = await _connect(url, _FORWARD_PROTOCOL)
    try:
        headers = {"port": str(port), "requestid": "0"}
        error = await session.open({**headers, "streamtype": "error"})
        data = await session.open({**headers, "streamtype": "data"})
    except HTTPError as problem:
        await _end(client, session, running)
        raise RuntimeFault(f"the runtime's streaming server refused a stream: {problem}") from problem
    await error.close()
    return RemoteConnection(client, session, running, data, error)
