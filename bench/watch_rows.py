"""Watch fan-out: 100 watchers and 4 writers, against our own API server (and the reference, when given)."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import multiprocessing
import statistics
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import orjson
import uvloop

from bench.row import Row
from bench.servers import TOKEN, Target, beside

ROWS = ("fan-out",)
WATCHERS, WRITERS = 100, 4


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    with contextlib.ExitStack() as stack:
        targets = [stack.enter_context(each) for each in beside(options)]
        rates: list[list[float]] = [[] for _ in targets]
        waits: list[list[float]] = [[] for _ in targets]
        for run in range(options.repeat):
            for number, target in enumerate(targets):
                rate, wait = load(target, options.seconds, run)
                rates[number].append(rate)
                waits[number].append(wait)
        yield Row("fan-out", "deliveries/s", rates[0], rates[1] if len(rates) > 1 else [], f"{WATCHERS} watchers, {WRITERS} writers")
        yield Row("fan-out-p50", "ms", waits[0], waits[1] if len(waits) > 1 else [])


def load(target: Target, seconds: float, run: int) -> tuple[float, float]:
    """(deliveries a second, median milliseconds from just before the write to its arrival), from a process of its own."""
    ours_end, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_client, args=(theirs, target, seconds, run))
    process.start()
    deliveries, median = ours_end.recv()
    process.join()
    return deliveries, median


def _client(pipe: Connection, target: Target, seconds: float, run: int) -> None:
    pipe.send(uvloop.run(_drive(target, seconds, run)))


async def _open(target: Target) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = target.url.removeprefix("https://").split(":")
    return await asyncio.open_connection(host, int(port), ssl=target.context(), limit=1 << 22)


async def _drive(target: Target, seconds: float, run: int) -> tuple[float, float]:
    counts = [0] * WATCHERS
    waits: list[float] = []
    ready = asyncio.Semaphore(0)
    head = f"Host: bench\r\nAuthorization: Bearer {TOKEN}\r\n"

    async def watch(number: int) -> None:
        reader, writer = await _open(target)
        # From the watch cache, as every informer: without a version a reference with an old etcd asks that for each watcher, and then
        # each event waits for the next one.
        writer.write(f"GET /api/v1/namespaces/default/configmaps?watch=1&resourceVersion=0 HTTP/1.1\r\n{head}\r\n".encode())
        await reader.readuntil(b"\r\n\r\n")
        ready.release()
        while data := await reader.read(1 << 18):
            counts[number] += data.count(b'{"type":"')
            if number == 0 and (at := data.rfind(b'"sent":"')) >= 0:
                end = data.find(b'"', at + 8)
                if end > 0:
                    waits.append(time.monotonic() - float(data[at + 8 : end]))
        writer.close()

    async def write(number: int, until: float) -> None:
        reader, writer = await _open(target)
        name = f"w{run}-{number}"
        base = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": {"sent": "0"}}
        await _send(reader, writer, head, "POST", "/api/v1/namespaces/default/configmaps", base)
        while time.monotonic() < until:
            base["data"] = {"sent": repr(time.monotonic())}
            await _send(reader, writer, head, "PUT", f"/api/v1/namespaces/default/configmaps/{name}", base)
        writer.close()

    watchers = [asyncio.ensure_future(watch(number)) for number in range(WATCHERS)]
    for _ in range(WATCHERS):
        await ready.acquire()
    start = time.monotonic()
    await asyncio.gather(*(write(number, start + seconds) for number in range(WRITERS)))
    elapsed = time.monotonic() - start
    for task in watchers:
        task.cancel()
    await asyncio.gather(*watchers, return_exceptions=True)
    return sum(counts) / elapsed, 1000 * statistics.median(waits or [0.0])


async def _send(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, head: str, method: str, path: str, body: object) -> None:
    data = orjson.dumps(body)
    writer.write(f"{method} {path} HTTP/1.1\r\n{head}Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = await reader.readuntil(b"\r\n\r\n")
    if not answer.startswith(b"HTTP/1.1 20"):
        raise RuntimeError(answer.decode())
    lower = answer.lower()
    length = int(lower.split(b"content-length:")[1].split(b"\r\n")[0])
    await reader.readexactly(length)
