"""The scheduler alone, without any server: decisions per second on the workloads of upstream's scheduler_perf.

Each pod is popped from the queue, filtered, scored and placed in the node table. Upstream's figures (in the notes: its
thresholds on 5,000 nodes, in process with an API server) include the writing of bindings; `schedule-2000-on-1000`
measures that.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from bench.row import Row
from knarr.scheduler.algorithm import Algorithm, Found
from knarr.scheduler.config import ProfileConfig
from knarr.scheduler.handle import Handle
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.queue import SchedulingQueue
from knarr.scheduler.registry import build_profile

Object = dict[str, Any]
ZONE, HOST = "topology.kubernetes.io/zone", "kubernetes.io/hostname"
PODS = 2000
_SELECTOR = {"matchLabels": {"app": "x"}}


def _spread(when: str) -> Object:
    return {"topologySpreadConstraints": [{"maxSkew": 5, "topologyKey": ZONE, "whenUnsatisfiable": when, "labelSelector": _SELECTOR}]}


def _affinity(kind: str, key: str, value: Any = None) -> Object:
    return {
        "affinity": {kind: {"requiredDuringSchedulingIgnoredDuringExecution": value or [{"labelSelector": _SELECTOR, "topologyKey": key}]}}
    }


_ZONES = {"nodeSelectorTerms": [{"matchExpressions": [{"key": ZONE, "operator": "In", "values": ["z0", "z1"]}]}]}


def _on_one_node(number: int) -> Object:
    field = {"matchFields": [{"key": "metadata.name", "operator": "In", "values": [f"n{number}"]}]}
    return _affinity("nodeAffinity", "", {"nodeSelectorTerms": [field]})


@dataclass(frozen=True)
class Workload:
    name: str
    nodes: int
    spec: Callable[[int], Object]
    upstream: str
    unschedulable_first: int = 0


def _same(spec: Object) -> Callable[[int], Object]:
    return lambda _: spec


WORKLOADS = (
    Workload("core-basic-500", 500, _same({}), ""),
    Workload("core-basic-5000", 5000, _same({}), "680 to 810"),
    Workload("core-spreading-5000", 5000, _same(_spread("DoNotSchedule")), "460"),
    Workload("core-preferred-spreading-5000", 5000, _same(_spread("ScheduleAnyway")), "340"),
    Workload("core-affinity-5000", 5000, _same(_affinity("podAffinity", ZONE)), "35"),
    Workload("core-anti-affinity-5000", 5000, _same(_affinity("podAntiAffinity", HOST)), "60"),
    Workload("core-node-affinity-5000", 5000, _same(_affinity("nodeAffinity", "", _ZONES)), "220"),
    Workload("core-daemonset-5000", 5000, _on_one_node, "1,100"),
    Workload("core-unschedulable-5000", 5000, _same({}), "", unschedulable_first=200),
)
ROWS = tuple(workload.name for workload in WORKLOADS)


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    for workload in WORKLOADS:
        if workload.name in names:
            rates = [_run(workload) for _ in range(options.repeat)]
            yield Row(workload.name, "pods/s", rates, note=f"upstream's threshold {workload.upstream}" if workload.upstream else "")


def _node(number: int) -> Object:
    labels = {HOST: f"n{number}", ZONE: f"z{number % 3}"}
    status = {"allocatable": {"cpu": "4", "memory": "32Gi", "pods": "110"}}
    return {"metadata": {"name": f"n{number}", "labels": labels}, "spec": {}, "status": status}


def _pod(number: int, spec: Object, cpu: str = "100m") -> Object:
    container = {"name": "c", "image": "pause", "resources": {"requests": {"cpu": cpu, "memory": "500Mi"}}}
    metadata = {"name": f"p{number}", "namespace": "default", "uid": f"u{number}", "labels": {"app": "x"}}
    return {"metadata": metadata, "spec": {"containers": [container], **spec}}


def _run(workload: Workload) -> float:
    """Pods placed per second."""
    handle = Handle(randomness=random.Random(1))
    profile = build_profile(ProfileConfig(), handle)
    queue = SchedulingQueue({"default-scheduler": profile}, handle.shapes, time.monotonic)
    algorithm = Algorithm(handle, queue.nominator)
    for number in range(workload.nodes):
        handle.table.set_node(_node(number))
    for number in range(workload.unschedulable_first):
        queue.add(PodInfo(_pod(-1 - number, {"priority": 10}, cpu="64"), handle.shapes))
    for number in range(PODS):
        queue.add(PodInfo(_pod(number, workload.spec(number)), handle.shapes))
    placed = 0
    start = time.perf_counter()
    while (popped := queue.pop_nowait()) is not None:
        result = algorithm.schedule(profile, popped.info)
        if isinstance(result, Found):
            handle.table.add_pod(popped.info, result.node_name)
            placed += 1
        queue.done(popped.info.uid)
    elapsed = time.perf_counter() - start
    if placed != PODS:
        raise RuntimeError(f"{workload.name}: {placed} of {PODS} pods were placed")
    return placed / elapsed
