"""The DNS row: questions at a steady rate from a process of its own, each answer's time taken.

An open loop: questions go out on time whether or not answers came, so a server that falls behind shows it in the times.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import select
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator

from tests.network.fed import FedInformers
from tests.network.world import endpoint_slice, ready, service

from bench.row import Row
from knarr.api.resources import ENDPOINT_SLICES, NAMESPACES, SERVICES
from knarr.api.types import Object
from knarr.network.dns import DNSServer
from knarr.network.dns.wire import A, build_query

ROWS = ("network-dns-rate", "network-dns-p99", "network-dns-p99-churn")
RATE, NAMES, BATCH_SECONDS = 20_000, 1_000, 0.0005


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    if not names:
        return
    for churn in (False, True):
        wanted = [name for name in names if name.endswith("churn") == churn]
        if not wanted:
            continue
        runs = [asyncio.run(_serve(options.seconds, churn=churn)) for _ in range(options.repeat)]
        if churn:
            yield Row(ROWS[2], "ms", [p99 for _rate, p99, _lost in runs], note=f"{RATE:,} questions/s while a Service changes 20 times a second")
        else:
            yield Row(ROWS[0], "1/s", [rate for rate, _p99, _lost in runs], note=f"answers to {RATE:,} questions a second, {sum(r[2] for r in runs)} lost")
            yield Row(ROWS[1], "ms", [p99 for _rate, p99, _lost in runs], note=f"at {RATE:,} questions/s")


def _objects() -> list[tuple[Object, Object]]:
    ports = [("http", "TCP", 80)]
    return [
        (
            service(f"s{n}", f"10.99.{n // 250}.{n % 250 + 1}", ports),
            endpoint_slice(f"s{n}", ports, [ready(f"10.199.{n // 250}.{n % 250 + 1}")]),
        )
        for n in range(NAMES)
    ]


async def _serve(seconds: float, *, churn: bool) -> tuple[float, float, int]:
    """(answers a second, 99th percentile in ms, unanswered) of one run."""
    informers = FedInformers()
    server = DNSServer(informers, listen=["127.0.0.1"], port=0, upstreams=[], metrics_port=0)
    objects = _objects()
    informers.put(NAMESPACES, {"metadata": {"name": "default"}})
    informers.put(SERVICES, *(item for item, _part in objects))
    informers.put(ENDPOINT_SLICES, *(part for _item, part in objects))
    await server.start()
    try:
        command = [sys.executable, "-m", "bench.dns_load", str(server.port), str(seconds)]
        asker = await asyncio.create_subprocess_exec(*command, stdout=subprocess.PIPE)
        changer = asyncio.ensure_future(_change(informers)) if churn else None
        output, _none = await asker.communicate()
        if changer is not None:
            changer.cancel()
        found = json.loads(output)
        return found["rate"], found["p99"], found["lost"]
    finally:
        await server.close()


async def _change(informers: FedInformers) -> None:
    ports = [("http", "TCP", 80)]
    number = 0
    while True:
        number += 1
        informers.put(ENDPOINT_SLICES, endpoint_slice("s1", ports, [ready(f"10.199.0.{number % 200 + 1}")]))
        await asyncio.sleep(0.05)


def _ask(port: int, seconds: float) -> dict[str, float]:
    """Put RATE questions a second and take the time of every answer; the first second warms up."""
    questions = [build_query(0, f"s{number}.default.svc.cluster.local", A)[2:] for number in range(NAMES)]
    order = [random.Random(7).randrange(NAMES) for _ in range(4096)]
    socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in range(8)]
    poll = select.epoll()
    for sock in socks:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.connect(("127.0.0.1", port))
        poll.register(sock.fileno(), select.EPOLLIN)
    by_number = {sock.fileno(): sock for sock in socks}
    sent: list[dict[int, float]] = [{} for _ in socks]
    index = {sock.fileno(): number for number, sock in enumerate(socks)}
    times: list[float] = []
    count, clock = 0, time.perf_counter
    start = clock()
    warm, end = start + 1.0, start + 1.0 + seconds
    while (present := clock()) < end:
        due = int((present - start) * RATE)
        while count < due:
            which = count % len(socks)
            identity = (count // len(socks)) & 0xFFFF
            sent[which][identity] = clock()
            socks[which].send(struct.pack(">H", identity) + questions[order[count % 4096]])
            count += 1
        for descriptor, _event in poll.poll(BATCH_SECONDS):
            sock, waiting = by_number[descriptor], sent[index[descriptor]]
            try:
                while True:
                    answer = sock.recv(2048)
                    moment = clock()
                    asked = waiting.pop(int.from_bytes(answer[:2], "big"), None)
                    if asked is not None and asked >= warm:
                        times.append(moment - asked)
            except BlockingIOError:
                continue
    lost = sum(1 for waiting in sent for moment in waiting.values() if warm <= moment < end - 0.1)
    times.sort()
    return {"rate": len(times) / seconds, "p99": 1000 * times[int(len(times) * 0.99)], "lost": lost}


if __name__ == "__main__":
    print(json.dumps(_ask(int(sys.argv[1]), float(sys.argv[2]))))
