"""Rows of many simulated nodes and pods: a whole cluster named `bench`, deleted at the end. BENCH_SCALE_PODS says how many pods."""

from __future__ import annotations

import argparse
import asyncio
import os
import tempfile
import time
from collections.abc import Iterator

import orjson
import uvloop

from bench import machine
from bench.cluster_rows import knarr
from bench.row import Row
from knarr.api.resources import DEPLOYMENTS, PODS
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.simulate import workload

ROWS = ("scale-deployments", "scale-pods")
NODES = int(os.environ.get("BENCH_SCALE_NODES", "1000"))
PODS_IN_ALL = int(os.environ.get("BENCH_SCALE_PODS", "20000"))
DEPLOYMENTS_AT_ONCE, PODS_EACH = 1000, 10
WRITERS = 32
# Events of so many bindings are still being written when the last pod is ready.
SETTLE_SECONDS, STEADY_SECONDS = 60, 30
# Nothing new for so long: the cluster does not get there.
STUCK_SECONDS = 120


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KUBECONFIG": f"{folder}/kubeconfig"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as ./run does
        for name in names:
            each, count = (PODS_EACH, DEPLOYMENTS_AT_ONCE) if name == "scale-deployments" else (500, -(-PODS_IN_ALL // 500))
            knarr(environment, "delete", check=False)
            try:
                knarr(environment, "up")
                knarr(environment, "simulate", f"nodes={NODES}")
                pids = {part["name"]: part["pid"] for part in orjson.loads(knarr(environment, "status", "-o", "json"))["supervisor"]["components"]}
                yield from uvloop.run(filled(name, f"{environment['KUBECONFIG']}", pids, count, each))
            finally:
                knarr(environment, "delete", check=False)


async def filled(name: str, kubeconfig: str, pids: dict[str, int], count: int, each: int) -> list[Row]:
    """Make the Deployments, wait until all their pods are ready, then watch what the full cluster costs."""
    parts = [part for part in ("apiserver", "control", "simulator") if part in pids]
    client = Client(ClientConfig.from_kubeconfig(kubeconfig))
    try:
        used, start = [machine.cpu_seconds([pids[part]]) for part in parts], time.monotonic()
        limit = asyncio.Semaphore(WRITERS)

        async def create(number: int) -> None:
            async with limit:
                await client.create(DEPLOYMENTS, workload.make_deployment(f"scale-{number:04d}", each), "default")

        await asyncio.gather(*(create(number) for number in range(count)))
        await until_ready(client, count * each)
        seconds = time.monotonic() - start
        busy = [machine.cpu_seconds([pids[part]]) - before for part, before in zip(parts, used, strict=True)]
        filling = ", ".join(f"{part} {spent:.1f} s" for part, spent in zip(parts, busy, strict=True))
        await asyncio.sleep(SETTLE_SECONDS)
        used, start = [machine.cpu_seconds([pids[part]]) for part in parts], time.monotonic()
        await asyncio.sleep(STEADY_SECONDS)
        passed = time.monotonic() - start
        idle = [100 * (machine.cpu_seconds([pids[part]]) - before) / passed for part, before in zip(parts, used, strict=True)]
    finally:
        await client.close()
    what = f"{count} Deployments of {each} pods on {NODES} simulated nodes"
    rows = [Row(name, "s", [seconds], note=f"{what}, until all are ready; CPU {filling}")]
    rows.extend(Row(f"{name}-memory-{part}", "MB", [machine.pss_bytes([pids[part]]) / 1e6]) for part in parts)
    rows.extend(Row(f"{name}-cpu-{part}", "% of a core", [share], note="steady") for part, share in zip(parts, idle, strict=True))
    return rows


async def until_ready(client: Client, pods: int) -> None:
    """Wait for so many ready pods of all Deployments; counted once a second from their statuses, which costs few objects."""
    best, changed = -1, time.monotonic()
    while True:
        listed = await client.list(DEPLOYMENTS, "default")
        ready = sum((item.get("status") or {}).get("readyReplicas", 0) for item in listed["items"])
        if ready >= pods:
            return
        if ready != best:
            best, changed = ready, time.monotonic()
        elif time.monotonic() - changed > STUCK_SECONDS:
            present = len((await client.list(PODS, "default"))["items"])
            raise RuntimeError(f"{ready} of {pods} pods ready, {present} present, and nothing has changed for {STUCK_SECONDS} s")
        await asyncio.sleep(1)
