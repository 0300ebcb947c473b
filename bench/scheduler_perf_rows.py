"""Upstream's scheduler_perf workloads, end to end: our API server with its store on disk, our scheduler, 8 clients creating.

Upstream's figures in the notes are the thresholds of its own gates, on 5,000 nodes, with everything in one process and an etcd in
memory. All workloads of one size run one after another on the same server and nodes; each cleans up after itself.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import uvloop

from bench import scheduler_core_rows as core
from bench.row import Row
from bench.scheduler_rows import CLIENTS, changes, client
from bench.schedulers import scheduler
from bench.servers import Target, ours
from knarr.api.errors import StatusError
from knarr.api.resources import NAMESPACES, NODES, PODS, PRIORITY_CLASSES, SERVICE_ACCOUNTS
from knarr.client.rest import Client

Object = dict[str, Any]
PODS_MEASURED = 1000
_LIMIT_SECONDS = 600.0
_HIGH, _LOW = "bench-high", "bench-low"
_NEVER_SCHEDULED = {"cpu": "64"}


@dataclass(frozen=True)
class Workload:
    """`spec` is added to the measured pod number n; `before` are pods that exist first, `bound_before` of them on nodes."""

    name: str
    nodes: int
    spec: Callable[[int], Object]
    upstream: str = ""
    pods: int = PODS_MEASURED
    before: int = 0
    before_spec: Object | None = None
    before_requests: Object | None = None
    bound_before: bool = False
    requests: Object | None = None
    churn: bool = False


def _workloads(nodes: int) -> list[Workload]:
    zones = core._affinity("nodeAffinity", "", core._ZONES)
    gates = {"schedulingGates": [{"name": "bench.knarr.dev/closed"}]}
    fills = {"cpu": "900m", "memory": "500Mi"}
    return [
        Workload(f"perf-basic-{nodes}", nodes, core._same({}), "680 to 810"),
        Workload(f"perf-spreading-{nodes}", nodes, core._same(core._spread("DoNotSchedule")), "460"),
        Workload(f"perf-preferred-spreading-{nodes}", nodes, core._same(core._spread("ScheduleAnyway")), "340"),
        Workload(f"perf-affinity-{nodes}", nodes, core._same(core._affinity("podAffinity", core.ZONE)), "35"),
        Workload(f"perf-anti-affinity-{nodes}", nodes, core._same(core._affinity("podAntiAffinity", core.HOST)), "60", pods=min(PODS_MEASURED, nodes - 100)),
        Workload(f"perf-node-affinity-{nodes}", nodes, core._same(zones), "220"),
        Workload(f"perf-daemonset-{nodes}", nodes, lambda n: core._on_one_node(n % nodes), "1,100"),
        Workload(f"perf-gated-{nodes}", nodes, core._same({}), before=2000, before_spec=gates),
        Workload(f"perf-unschedulable-{nodes}", nodes, core._same({}), before=200, before_spec={"priorityClassName": _HIGH}, before_requests=_NEVER_SCHEDULED),
        Workload(f"perf-churn-{nodes}", nodes, core._same({}), churn=True),
        Workload(
            f"perf-preemption-{nodes}", nodes, core._same({"priorityClassName": _HIGH}), pods=min(500, nodes // 2), before=4 * nodes, before_spec={"priorityClassName": _LOW},
            before_requests=fills, bound_before=True, requests={"cpu": "3", "memory": "500Mi"},
        ),
    ]  # fmt: skip


SIZES = (500, 5000)
# Filling 5,000 nodes with 20,000 pods first would take longer than all the rest.
WORKLOADS = [w for size in SIZES for w in _workloads(size) if not (w.name.startswith("perf-preemption") and size > 500)]
ROWS = tuple(workload.name for workload in WORKLOADS)


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    for size in SIZES:
        wanted = [w for w in WORKLOADS if w.nodes == size and w.name in names]
        if wanted:
            with ours() as target:
                rates = uvloop.run(_run_all(target, size, wanted, options.repeat))
            for workload in wanted:
                note = f"upstream's threshold {workload.upstream}" if workload.upstream and size == 5000 else ""
                yield Row(workload.name, "pods/s", rates[workload.name], note=note)


async def _run_all(target: Target, size: int, workloads: list[Workload], repeat: int) -> dict[str, list[float]]:
    api = client(target)
    try:
        for name, value in ((_HIGH, 1000), (_LOW, 1)):
            await api.create(PRIORITY_CLASSES, {"metadata": {"name": name}, "value": value})
        await _each(range(size), lambda n: _add_node(api, f"n{n}", f"z{n % 3}"))
        rates: dict[str, list[float]] = {}
        for workload in workloads:
            for run in range(repeat):
                async with scheduler(target):
                    rates.setdefault(workload.name, []).append(await _Run(api, workload, f"{workload.name}-{run}").measure())
        return rates
    finally:
        await api.close()


async def _each(numbers: range, make: Callable[[int], Any], at_once: int = 32) -> None:
    """Do something for every number, some at a time."""
    line = iter(numbers)

    async def work() -> None:
        for number in line:
            await make(number)

    await asyncio.gather(*(work() for _ in range(at_once)))


async def _add_node(api: Client, name: str, zone: str) -> None:
    resources = {"cpu": "4", "memory": "32Gi", "pods": "110"}
    labels = {core.HOST: name, core.ZONE: zone}
    status = {"capacity": resources, "allocatable": resources, "conditions": [{"type": "Ready", "status": "True", "reason": "Bench"}]}
    await api.create(NODES, {"metadata": {"name": name, "labels": labels}, "status": status})
    # Admission marks new nodes as not ready, and no controller runs here that would take it back.
    await api.patch(NODES, name, None, {"spec": {"taints": None}})


class _Run:
    """One workload in a namespace of its own."""

    def __init__(self, api: Client, workload: Workload, namespace: str) -> None:
        self._api = api
        self._workload = workload
        self._namespace = namespace
        self._bound: set[str] = set()
        self._changed = asyncio.Event()

    def _pod(self, name: str, spec: Object, requests: Object | None) -> Object:
        resources = {"requests": requests or {"cpu": "100m", "memory": "500Mi"}}
        container = {"name": "c", "image": "pause", "resources": resources}
        metadata = {"name": name, "namespace": self._namespace, "labels": {"app": "x"}}
        return {"metadata": metadata, "spec": {"terminationGracePeriodSeconds": 0, "containers": [container], **spec}}

    async def _watch(self, version: str) -> None:
        async for pod in changes(self._api, self._namespace, version):
            if pod.get("spec", {}).get("nodeName"):
                self._bound.add(pod["metadata"]["name"])
                self._changed.set()

    async def _until_bound(self, prefix: str, number: int) -> None:
        async with asyncio.timeout(_LIMIT_SECONDS):
            while sum(name.startswith(prefix) for name in self._bound) < number:
                self._changed.clear()
                await self._changed.wait()

    async def measure(self) -> float:
        """Pods bound per second."""
        api, workload, namespace = self._api, self._workload, self._namespace
        await api.create(NAMESPACES, {"metadata": {"name": namespace}})
        await api.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": namespace}})
        listed = await api.list(PODS, namespace)
        tasks = [asyncio.create_task(self._watch(listed["metadata"]["resourceVersion"]))]
        try:
            await _each(range(workload.before), lambda n: api.create(PODS, self._pod(f"before-{n}", workload.before_spec or {}, workload.before_requests)))
            if workload.bound_before:
                await self._until_bound("before-", workload.before)
            if workload.churn:
                tasks.append(asyncio.create_task(self._churn()))
            start = time.monotonic()
            await _each(range(workload.pods), lambda n: api.create(PODS, self._pod(f"pod-{n}", workload.spec(n), workload.requests)), CLIENTS)
            await self._until_bound("pod-", workload.pods)
            return workload.pods / (time.monotonic() - start)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await api.delete_collection(PODS, namespace, grace_period_seconds=0)

    async def _churn(self) -> None:
        """Nodes, pods that fit nowhere and Services of theirs come and go, five times a second, as upstream's churn does."""
        for number in range(10**6):
            name = f"churn-{number}"
            with suppress(StatusError):
                await _add_node(self._api, name, "z0")
                await self._api.create(PODS, self._pod(name, {}, _NEVER_SCHEDULED))
                await asyncio.sleep(0.2)
                await self._api.delete(PODS, name, self._namespace, grace_period_seconds=0)
                await self._api.delete(NODES, name)
