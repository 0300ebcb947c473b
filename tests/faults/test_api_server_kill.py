"""The API server dies by SIGKILL at random moments under 32 writers: nothing acknowledged is lost, no event missed or repeated."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
import pytest
from bench.servers import TOKEN

from tests.faults.server import Server, request

KILLS = 50
WRITERS = 32
PATH = "/api/v1/namespaces/default/configmaps"


@dataclass
class Writer:
    """One object that only this writer changes: its counter goes up by one with each write."""

    name: str
    acknowledged: int = -1
    revision: int = 0
    attempted: int = -1
    faults: list[str] = field(default_factory=list)

    def saw(self, obj: dict[str, Any]) -> None:
        stored, revision = int(obj["data"]["n"]), int(obj["metadata"]["resourceVersion"])
        if not self.acknowledged <= stored <= self.attempted:
            self.faults.append(f"{self.name}: acknowledged {self.acknowledged}, attempted {self.attempted}, stored {stored}")
        if revision < self.revision:
            self.faults.append(f"{self.name}: revision went back from {self.revision} to {revision}")
        self.acknowledged, self.revision = stored, revision

    async def run(self, server: Server, stop: asyncio.Event) -> None:
        while not stop.is_set():
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
                streams = await server.connect()
                status, obj = await request(streams, "GET", f"{PATH}/{self.name}")
                if status == 200:
                    self.saw(obj)
                elif self.acknowledged >= 0:
                    self.faults.append(f"{self.name}: acknowledged {self.acknowledged}, now answered {status}")
                    return
                while not stop.is_set():
                    await self.write(streams)
                streams[1].close()
            await asyncio.sleep(0.01)

    async def write(self, streams: tuple[asyncio.StreamReader, asyncio.StreamWriter]) -> None:
        self.attempted = self.acknowledged + 1
        body: dict[str, Any] = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": self.name}, "data": {"n": str(self.attempted)}}
        if self.acknowledged < 0:
            status, obj = await request(streams, "POST", PATH, body)
        else:
            body["metadata"]["resourceVersion"] = str(self.revision)
            status, obj = await request(streams, "PUT", f"{PATH}/{self.name}", body)
        if status not in (200, 201):
            self.faults.append(f"{self.name}: {status} {obj}")
            return
        self.saw(obj)


async def watch(server: Server, events: list[tuple[str, int, int]], stop: asyncio.Event) -> None:
    """Collect (name, counter, revision) of every event, resuming after the last one seen."""
    since = 0
    while not stop.is_set():
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, ssl.SSLError):
            reader, writer = await server.connect()
            writer.write(f"GET {PATH}?watch=1&resourceVersion={since or 1} HTTP/1.1\r\nHost: test\r\nAuthorization: Bearer {TOKEN}\r\n\r\n".encode())
            async for line in chunks(reader):
                event = orjson.loads(line)
                assert event["type"] in ("ADDED", "MODIFIED", "BOOKMARK"), event
                obj = event["object"]
                since = int(obj["metadata"]["resourceVersion"])
                if event["type"] != "BOOKMARK" and obj["metadata"]["name"].startswith("writer-"):
                    events.append((obj["metadata"]["name"], int(obj["data"]["n"]), since))
        await asyncio.sleep(0.01)


async def chunks(reader: asyncio.StreamReader) -> AsyncIterator[bytes]:
    """Whole lines of a chunked body."""
    assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
    rest = b""
    while True:
        size = int(await reader.readline() or b"0", 16)
        if size == 0:
            return
        data = await reader.readexactly(size + 2)
        *lines, rest = (rest + data[:-2]).split(b"\n")
        for line in lines:
            yield line


@pytest.mark.slow
async def test_every_acknowledged_write_survives_fifty_kills_and_no_watcher_misses_or_repeats_an_event(tmp_path: Path) -> None:
    server = Server(tmp_path)
    seed = random.randrange(1 << 30)
    chance = random.Random(seed)
    stop, events = asyncio.Event(), list[tuple[str, int, int]]()
    writers = [Writer(f"writer-{number:02}") for number in range(WRITERS)]
    await server.start()
    tasks = [asyncio.ensure_future(writer.run(server, stop)) for writer in writers]
    tasks.append(asyncio.ensure_future(watch(server, events, stop)))
    try:
        for _ in range(KILLS):
            await asyncio.sleep(chance.uniform(0.02, 0.4))
            server.kill()
            await server.start()
        await asyncio.sleep(0.5)
        stop.set()
        await asyncio.gather(*tasks[:-1])
        await asyncio.sleep(0.5)
        assert not tasks[-1].done(), f"the watch ended: {tasks[-1]}"
    finally:
        stop.set()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        server.kill()
    assert [fault for writer in writers for fault in writer.faults] == [], f"seed {seed}"
    assert all(writer.acknowledged > 0 for writer in writers)
    revisions = [revision for _, _, revision in events]
    assert revisions == sorted(set(revisions)), f"seed {seed}: revisions repeat or go back"
    for writer in writers:
        seen = [counter for name, counter, _ in events if name == writer.name]
        assert seen == list(range(writer.acknowledged + 1)), f"seed {seed}: {writer.name} wrote {writer.acknowledged + 1}, the watcher saw {len(seen)}"
