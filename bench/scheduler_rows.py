"""2,000 pods onto 1,000 bare nodes: our API server and scheduler, 8 clients creating."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import uvloop

from bench.row import Row
from bench.schedulers import scheduler
from bench.servers import TOKEN, Target, ours, reference
from knarr.api.resources import NAMESPACES, NODES, PODS, SERVICE_ACCOUNTS
from knarr.client.config import ClientConfig
from knarr.client.rest import Client

ROWS = ("schedule-2000-on-1000", "schedule-p99")
NODE_COUNT, POD_COUNT, CLIENTS = 1000, 2000, 8


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    rates, waits = _measure(options.repeat, ours, "")
    their_rates: list[float] = []
    their_waits: list[float] = []
    if options.reference_apiserver and options.reference_scheduler:
        their_rates, their_waits = _measure(
            options.repeat, lambda: reference(options.reference_apiserver, options.reference_etcd), options.reference_scheduler
        )
    yield Row("schedule-2000-on-1000", "pods/s", rates, their_rates, note="8 clients creating")
    yield Row("schedule-p99", "ms", waits, their_waits)


def _measure(repeat: int, server: Callable[[], AbstractContextManager[Target]], program: str) -> tuple[list[float], list[float]]:
    rates, waits = [], []
    for _ in range(repeat):
        with server() as target:
            rate, wait = uvloop.run(_drive(target, program))
            rates.append(rate)
            waits.append(wait)
    return rates, waits


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


async def _drive(target: Target, program: str) -> tuple[float, float]:
    api = client(target)
    try:
        await _prepare(api)
        async with scheduler(target, program):
            return await _burst(api)
    finally:
        await api.close()


async def changes(api: Client, namespace: str, version: str) -> AsyncIterator[dict[str, Any]]:
    """Give the pods of a namespace as they change; goes on where a server cut off a reader that it found too slow."""
    while True:
        async for _, obj in api.watch(PODS, namespace, resource_version=version):
            version = obj["metadata"]["resourceVersion"]
            yield obj


async def _prepare(api: Client) -> None:
    await api.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "bench"}})
    await api.create(
        SERVICE_ACCOUNTS, {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": "bench"}}
    )
    for first in range(0, NODE_COUNT, 32):
        await asyncio.gather(*(_add_node(api, number) for number in range(first, min(first + 32, NODE_COUNT))))


async def _burst(api: Client) -> tuple[float, float]:
    """Give pods bound per second, and the 99th percentile of the milliseconds from a pod's creation to its binding seen."""
    created: dict[str, float] = {}
    bound: dict[str, float] = {}
    listed = await api.list(PODS, "bench")
    all_bound = asyncio.Event()

    async def watch() -> None:
        async for obj in changes(api, "bench", listed["metadata"]["resourceVersion"]):
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
    waiting = asyncio.ensure_future(all_bound.wait())
    done, _ = await asyncio.wait((waiting, watcher), timeout=120, return_when=asyncio.FIRST_COMPLETED)
    if waiting not in done:
        waiting.cancel()
        why = repr(watcher.exception() or "it ended") if watcher in done else "it still runs"
        watcher.cancel()
        raise RuntimeError(f"only {len(bound)} of {POD_COUNT} pods were seen bound; the watch: {why}")
    elapsed = max(bound.values()) - start
    watcher.cancel()
    waits = sorted(bound[name] - created[name] for name in bound)
    return POD_COUNT / elapsed, 1000 * statistics.quantiles(waits, n=100)[98]
