"""Upstream's scheduler_perf workloads, end to end: our API server with its store on disk, our scheduler, 30 connections creating.

Measured as upstream measures (test/integration/scheduler_perf): pods that exist first are in another namespace; the measured
ones are created as fast as 30 connections can while they are scheduled; the scheduler's own informer tells how many are bound;
the rate is the average of samples of one second, the first one left out. What ends before there is a sample (the small sizes)
is counted whole. The creating side is `wrk`, in C, so that on two cores it is the servers that are measured. Upstream runs
everything in one process beside etcd. Gates in the notes: those of 1.35's tree, in brackets those that were published earlier.

All workloads of one size run one after another on the same server and nodes; each cleans up after itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import uvloop

from bench import machine
from bench import scheduler_core_rows as core
from bench.row import Row
from bench.scheduler_rows import client
from bench.schedulers import Counts, counting_scheduler
from bench.servers import Target, ours
from knarr.api.errors import StatusError
from knarr.api.resources import NAMESPACES, NODES, PODS, PRIORITY_CLASSES, SERVICE_ACCOUNTS
from knarr.client.rest import Client

Object = dict[str, Any]
CONNECTIONS = 30
SAMPLE_SECONDS = 1.0
_LIMIT_SECONDS = 600
_HIGH, _LOW = "bench-high", "bench-low"
_NEVER_SCHEDULED = {"cpu": "64"}
_BIG_NODE = "one-for-all"
# Creates the wanted number of pods and ends; what other connections ask for at the end costs next to nothing. The first request is only wrk looking at it.
_CREATE = """
local wanted, asked, made = %d, -1, 0
local body = [==[%s]==]
function request()
  asked = asked + 1
  if asked > wanted then return wrk.format("GET", "/livez") end
  return wrk.format("POST", nil, nil, body)
end
function response(status)
  if status == 201 then made = made + 1 elseif status ~= 200 then io.stdout:write("refused ", status, "\\n"); io.stdout:flush(); wrk.thread:stop() end
  if made == wanted then io.stdout:write("made\\n"); io.stdout:flush(); wrk.thread:stop() end
end
"""


@dataclass(frozen=True)
class Workload:
    """`spec` is added to the measured pods; `before` are pods that exist first, on nodes unless `waiting`."""

    name: str
    nodes: int
    pods: int
    spec: Object = field(default_factory=dict)
    upstream: str = ""
    before: int = 0
    before_spec: Object = field(default_factory=dict)
    before_requests: Object | None = None
    waiting: bool = False
    requests: Object | None = None
    churn: bool = False


def _workloads(nodes: int) -> list[Workload]:
    """Upstream's numbers of pods for 5,000 and for 500 nodes."""
    big = nodes >= 5000
    zones = core._affinity("nodeAffinity", "", core._ZONES)
    one = core._affinity("nodeAffinity", "", {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": [_BIG_NODE]}]}]})
    gates = {"schedulingGates": [{"name": "bench.knarr.dev/closed"}]}
    fills = {"cpu": "900m", "memory": "500Mi"}
    many, some, few = (10_000, 5_000, 5_000) if big else (1_000, 1_000, 500)

    def named(name: str, pods: int, spec: Object, upstream: str = "", **more: Any) -> Workload:
        return Workload(f"perf-{name}-{nodes}", nodes, pods, spec, upstream if big else "", **more)

    return [
        named("basic", many, {}, "270 (680 to 810)", before=1000 if big else 500),
        named("spreading", some, core._spread("DoNotSchedule"), "85 (460)", before=few),
        named("preferred-spreading", some, core._spread("ScheduleAnyway"), "125 (340)", before=few),
        named("affinity", some, core._affinity("podAffinity", core.ZONE), "35", before=few, before_spec=core._affinity("podAffinity", core.ZONE)),
        named("anti-affinity", 2000 if big else 400, core._affinity("podAntiAffinity", core.HOST), "60", before=1000 if big else 100, before_spec=core._affinity("podAntiAffinity", core.HOST)),
        named("node-affinity", many, zones, "220", before=few, before_spec=zones),
        # Upstream's pods for one node ask for nothing.
        named("daemonset", many, one, "390 (1,100)", requests={}),
        named("gated", many, {}, "130", before=10_000 if big else 2_000, before_spec=gates, waiting=True),
        named("unschedulable", many, {}, "140", before=200, before_spec={"priorityClassName": _HIGH}, before_requests=_NEVER_SCHEDULED, waiting=True),
        named("churn", many, {}, "265", churn=True),
        named("preemption", 250, {"priorityClassName": _HIGH}, before=4 * nodes, before_spec={"priorityClassName": _LOW}, before_requests=fills, requests={"cpu": "3", "memory": "500Mi"}),
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
                results = uvloop.run(_run_all(target, size, wanted, options.repeat))
            for workload in wanted:
                found = results[workload.name]
                costs = (sorted(result.costs[part] for result in found)[len(found) // 2] for part in range(3))
                note = "CPU per pod: API server {:.0f}, scheduler {:.0f}, load {:.0f} µs".format(*costs)
                gate = f"upstream's gate {workload.upstream}; " if workload.upstream else ""
                yield Row(workload.name, "pods/s", [result.rate for result in found], note=gate + note)


@dataclass
class Result:
    """Pods per second, and microseconds of CPU per pod of API server, scheduler and load."""

    rate: float
    costs: tuple[float, float, float]


async def _run_all(target: Target, size: int, workloads: list[Workload], repeat: int) -> dict[str, list[Result]]:
    api = client(target)
    try:
        for name, value in ((_HIGH, 1000), (_LOW, 1)):
            await api.create(PRIORITY_CLASSES, {"metadata": {"name": name}, "value": value})
        await _each(range(size), lambda n: _add_node(api, f"n{n}", f"z{n % 3}"))
        results: dict[str, list[Result]] = {}
        for workload in workloads:
            for _ in range(repeat):
                async with counting_scheduler(target) as counts:
                    results.setdefault(workload.name, []).append(await _Run(target, api, workload, counts).measure())
        return results
    finally:
        await api.close()


async def _each(numbers: range, make: Any, at_once: int = 32) -> None:
    """Do something for every number, some at a time."""
    line = iter(numbers)

    async def work() -> None:
        for number in line:
            await make(number)

    await asyncio.gather(*(work() for _ in range(at_once)))


async def _add_node(api: Client, name: str, zone: str, pods: str = "110") -> None:
    resources = {"cpu": "4", "memory": "32Gi", "pods": pods}
    labels = {core.HOST: name, core.ZONE: zone}
    status = {"capacity": resources, "allocatable": resources, "conditions": [{"type": "Ready", "status": "True", "reason": "Bench"}]}
    await api.create(NODES, {"metadata": {"name": name, "labels": labels}, "status": status})
    # Admission marks new nodes as not ready, and no controller runs here that would take it back.
    await api.patch(NODES, name, None, {"spec": {"taints": None}})


def _pod(spec: Object, requests: Object | None) -> Object:
    resources = {"requests": {"cpu": "100m", "memory": "500Mi"} if requests is None else requests}
    container = {"name": "pause", "image": "registry.k8s.io/pause:3.10.1", "ports": [{"containerPort": 80}], "resources": resources}
    metadata = {"generateName": "pod-", "labels": {"app": "x"}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"terminationGracePeriodSeconds": 0, "containers": [container], **spec}}


def average_rate(seen: list[tuple[float, int]], start: float) -> float:
    """Pods per second out of (time, number bound so far), by upstream's way of sampling; see the module."""
    last = seen[-1][1]
    ticks, rates, before, index, skipped = start, [], 0, 0, 0
    while ticks < seen[-1][0]:
        ticks += SAMPLE_SECONDS
        while index + 1 < len(seen) and seen[index + 1][0] <= ticks:
            index += 1
        number = seen[index][1] if seen[index][0] <= ticks else 0
        if ticks > seen[-1][0] or not number:
            continue
        if before and number == before:
            skipped += 1
        elif before:
            rates.extend([(number - before) / (SAMPLE_SECONDS * (skipped + 1))] * (skipped + 1))
            skipped = 0
        before = number
    return sum(rates) / len(rates) if rates else last / (seen[-1][0] - start)


class _Run:
    """One workload in namespaces of its own: one for the pods that exist first, one for the measured ones."""

    def __init__(self, target: Target, api: Client, workload: Workload, counts: Counts) -> None:
        self._target = target
        self._api = api
        self._workload = workload
        self._counts = counts
        self._namespaces = [f"{workload.name}-{which}-{time.monotonic_ns()}" for which in ("before", "measured")]

    async def _create(self, namespace: str, number: int, pod: Object) -> float:
        """Have pods created, wait for it; gives the seconds of CPU that it took."""
        with tempfile.TemporaryDirectory() as folder:
            script = Path(folder) / "create.lua"
            script.write_text(_CREATE % (number, json.dumps(pod)))
            path = f"/api/v1/namespaces/{namespace}/pods"
            before = os.times()
            process = await asyncio.create_subprocess_exec(
                "wrk", "-t", "1", "-c", str(min(CONNECTIONS, number)), "-d", f"{_LIMIT_SECONDS}s", "-s", str(script), "-H", self._target.header,
                "-H", "Content-Type: application/json", self._target.url + path, stdout=asyncio.subprocess.PIPE,
            )  # fmt: skip
            assert process.stdout is not None
            try:
                while (line := await process.stdout.readline()) not in (b"made\n", b"") and not line.startswith(b"refused"):
                    pass
            finally:
                # Its connections have stopped, the program itself would sleep until its time is over.
                process.send_signal(signal.SIGINT)
                await process.communicate()
            after = os.times()
        if line != b"made\n":
            raise RuntimeError(f"creating {number} pods failed: {line.decode()}")
        return after.children_user + after.children_system - before.children_user - before.children_system

    async def measure(self) -> Result:
        api, workload, (first, measured) = self._api, self._workload, self._namespaces
        churn = None
        try:
            for namespace in self._namespaces:
                await api.create(NAMESPACES, {"metadata": {"name": namespace}})
                await api.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": namespace}})
            if "-daemonset-" in workload.name:
                await _add_node(api, _BIG_NODE, "z0", pods="90000")
            if workload.before:
                await self._create(first, workload.before, _pod(workload.before_spec, workload.before_requests))
                if not workload.waiting:
                    await self._counts.until(first, workload.before, _LIMIT_SECONDS)
            await self._counts.quiet()
            if workload.churn:
                churn = asyncio.create_task(self._churn(first))
            return await self._measured(measured)
        finally:
            if churn is not None:
                churn.cancel()
                await asyncio.gather(churn, return_exceptions=True)
            for namespace in self._namespaces:
                await api.delete_collection(PODS, namespace, grace_period_seconds=0)
            if "-daemonset-" in workload.name:
                await api.delete(NODES, _BIG_NODE)

    async def _measured(self, namespace: str) -> Result:
        workload = self._workload
        used = [machine.cpu_seconds([pid]) for pid in (self._target.pid, self._counts.pid)]
        start = time.monotonic()
        load = asyncio.create_task(self._create(namespace, workload.pods, _pod(workload.spec, workload.requests)))
        seen = await self._counts.until(namespace, workload.pods, _LIMIT_SECONDS)
        spent = [machine.cpu_seconds([pid]) - before for pid, before in zip((self._target.pid, self._counts.pid), used, strict=True)]
        spent.append(await load)
        server, scheduler, client = (1e6 * seconds / workload.pods for seconds in spent)
        return Result(average_rate(seen, start), (server, scheduler, client))

    async def _churn(self, namespace: str) -> None:
        """Nodes and pods that fit nowhere come and go, five times a second, oftener than upstream's churn does."""
        for number in range(10**6):
            name = f"churn-{number}"
            pod = _pod({}, _NEVER_SCHEDULED)
            pod["metadata"] = {"name": name, "namespace": namespace, "labels": {"app": "x"}}
            with suppress(StatusError):
                await _add_node(self._api, name, "z0")
                await self._api.create(PODS, pod)
                await asyncio.sleep(0.2)
                await self._api.delete(PODS, name, namespace, grace_period_seconds=0)
                await self._api.delete(NODES, name)
