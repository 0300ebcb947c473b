"""2,000 pods onto 1,000 bare nodes: our API server and scheduler, 8 clients creating."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvloop

from bench.row import Row
from bench.servers import TOKEN, Target, ours
from knarr.api.resources import NAMESPACES, NODES, PODS, SERVICE_ACCOUNTS
from knarr.client.config import ClientConfig
from knarr.client.rest import Client

ROWS = ("schedule-2000-on-1000", "schedule-p99")
NODE_COUNT, POD_COUNT, CLIENTS = 1000, 2000, 8


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    rates, waits = [], []
    for _ in range(options.repeat):
        with ours() as target:
            rate, wait = uvloop.run(_drive(target))
            rates.append(rate)
            waits.append(wait)
    yield Row("schedule-2000-on-1000", "pods/s", rates, note="8 clients creating")
    yield Row("schedule-p99", "ms", waits)


def client(target: Target) -> Client:
    return Client(ClientConfig(server=target.url, ca_data=(target.folder / "ca.crt").read_bytes(), token=TOKEN))


def node(number: int) -> dict[str, Any]:
    resources = {"cpu": "32", "memory": "64Gi", "pods": "110"}
    return {
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": f"bare-{number}", "labels": {"kubernetes.io/hostname": f"bare-{number}"}},
        "status": {"capacity": resources, "allocatable": resources, "conditions": [{"type": "Ready", "status": "True", "reason": "Bench"}]},
    }  # fmt: skip


def pod(number: int) -> dict[str, Any]:
    container = {"name": "pause", "image": "pause", "resources": {"requests": {"cpu": "100m", "memory": "100Mi"}}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": f"pod-{number}", "namespace": "bench", "labels": {"app": "bench"}},
        "spec": {"containers": [container]},
    }


async def _add_node(api: Client, number: int) -> None:
    await api.create(NODES, node(number))
    await api.patch(
        NODES, f"bare-{number}", None, {"spec": {"taints": None}}
    )  # admission marks new nodes as not ready; no controller runs here


async def _drive(target: Target) -> tuple[float, float]:
    api = client(target)
    await api.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}})
    await api.create(
        SERVICE_ACCOUNTS, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "bench"}}
    )
    for first in range(0, NODE_COUNT, 32):
        await asyncio.gather(*(_add_node(api, number) for number in range(first, min(first + 32, NODE_COUNT))))
    scheduler = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "bench.scheduler", target.url, str(target.folder), stdout=subprocess.PIPE
    )
    assert scheduler.stdout is not None
    await scheduler.stdout.readline()
    created: dict[str, float] = {}
    bound: dict[str, float] = {}
    listed = await api.list(PODS, "bench")
    all_bound = asyncio.Event()

    async def watch() -> None:
        async for _, obj in api.watch(PODS, "bench", resource_version=listed["metadata"]["resourceVersion"]):
            if obj.get("spec", {}).get("nodeName") and obj["metadata"]["name"] not in bound:
                bound[obj["metadata"]["name"]] = time.monotonic()
                if len(bound) == POD_COUNT:
                    all_bound.set()

    async def create(which: int) -> None:
        for number in range(which, POD_COUNT, CLIENTS):
            created[f"pod-{number}"] = time.monotonic()
            await api.create(PODS, pod(number))

    watcher = asyncio.ensure_future(watch())
    start = time.monotonic()
    await asyncio.gather(*(create(which) for which in range(CLIENTS)))
    await asyncio.wait_for(all_bound.wait(), 120)
    elapsed = max(bound.values()) - start
    watcher.cancel()
    scheduler.terminate()
    await scheduler.wait()
    await api.close()
    waits = sorted(bound[name] - created[name] for name in bound)
    return POD_COUNT / elapsed, 1000 * statistics.quantiles(waits, n=100)[98]
