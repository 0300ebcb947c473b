"""A server that was cut off from etcd while etcd compacted what it had not seen."""

from __future__ import annotations

import asyncio
import contextlib
import uuid

import pytest

from knarr.storage import ANY, UnavailableError, open_store


class Line:
    """A TCP relay in front of etcd that can be cut."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = host, int(port)
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self.port = 0

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    async def cut(self) -> None:
        assert self._server is not None
        self._server.close()
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back_reader, back_writer = await asyncio.open_connection(*self._target)
        self._writers |= {writer, back_writer}
        await asyncio.gather(self._pump(reader, back_writer), self._pump(back_reader, writer))

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        writer.close()
        self._writers.discard(writer)


@pytest.mark.timeout(30)
async def test_a_store_that_missed_compacted_events_says_that_it_is_lost(etcd: str) -> None:
    prefix = uuid.uuid4().hex
    line = Line(etcd)
    await line.open()
    here, there = open_store(f"etcd3://127.0.0.1:{line.port}/{prefix}"), open_store(f"etcd3://{etcd}/{prefix}")
    await here.start()
    await there.start()
    lost = asyncio.ensure_future(here.wait_lost())
    try:
        await there.put("/a", b"1", expected=0)
        await line.cut()
        await asyncio.sleep(0.2)
        for _ in range(5):
            last = await there.put("/a", b"2", expected=ANY)
        await there.compact(last.revision)
        assert not lost.done()
        await line.open()
        await asyncio.wait_for(lost, 20)
        with pytest.raises(UnavailableError):
            await here.get("/a")
    finally:
        lost.cancel()
        await here.close()
        await there.close()
        await line.cut()


@pytest.mark.timeout(30)
async def test_a_cut_without_compaction_loses_nothing(etcd: str) -> None:
    prefix = uuid.uuid4().hex
    line = Line(etcd)
    await line.open()
    here, there = open_store(f"etcd3://127.0.0.1:{line.port}/{prefix}"), open_store(f"etcd3://{etcd}/{prefix}")
    await here.start()
    await there.start()
    seen: list[bytes | None] = []
    here.subscribe(lambda events: seen.extend(event.value for event in events))
    try:
        await line.cut()
        for n in range(5):
            await there.put("/a", b"%d" % n, expected=ANY)
        await line.open()
        async with asyncio.timeout(20):
            while len(seen) < 5:
                await asyncio.sleep(0.05)
        assert seen == [b"0", b"1", b"2", b"3", b"4"]
        stored = await here.get("/a")
        assert stored is not None
        assert stored.value == b"4"
    finally:
        await here.close()
        await there.close()
        await line.cut()
