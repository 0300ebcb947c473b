"""Readings of the nodes' kubelets, and the rates between them.

Caller: usage.server, per request. A reading is taken when the last one is older than RESOLUTION_SECONDS; who asks first, or after a
long pause, waits FIRST_WINDOW_SECONDS for a second one, since a rate needs two. So an idle cluster costs nothing, unlike
metrics-server's scraping every 15 s. Kept: two readings per node.
Source: kubernetes-sigs/metrics-server pkg/storage (windows, restarts, what is left out), pkg/scraper.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)

RESOLUTION_SECONDS = 5.0
FIRST_WINDOW_SECONDS = 1.0
WINDOW_MAXIMUM_SECONDS = 60.0
"""Older readings say too little about now."""
_TIMEOUT_SECONDS = 10.0

PodKey = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Counter:
    """One container, or the node itself, at one time."""

    cpu_ns: int
    memory_bytes: int
    started: float = 0.0


@dataclass(frozen=True, slots=True)
class Reading:
    """What one node said."""

    time: float
    node: Counter
    pods: dict[PodKey, dict[str, Counter]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Usage:
    """What is used now."""

    time: float
    window_seconds: float
    cpu_ns: int
    """Nanoseconds of CPU time a second."""
    memory_bytes: int


@dataclass(slots=True)
class _Node:
    older: Reading | None = None
    newer: Reading | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


def read_summary(summary: dict[str, Any], now: float) -> Reading:
    """A kubelet's /stats/summary as a Reading; containers that it has no numbers for are left out. Pure."""
    pods: dict[PodKey, dict[str, Counter]] = {}
    for pod in summary.get("pods") or []:
        reference = pod["podRef"]
        pods[reference["namespace"], reference["name"]] = {c["name"]: counter for c in pod.get("containers") or [] if (counter := _counter(c)) is not None}
    return Reading(now, _counter(summary["node"]) or Counter(0, 0), pods)


def _counter(entry: dict[str, Any]) -> Counter | None:
    cpu, memory = (entry.get("cpu") or {}).get("usageCoreNanoSeconds"), (entry.get("memory") or {}).get("workingSetBytes")
    if cpu is None or memory is None:
        return None
    start = entry.get("startTime")
    return Counter(cpu, memory, clock.parse_rfc3339(start) if start else 0.0)


def usage(older: Counter | None, newer: Counter, older_time: float, newer_time: float) -> Usage | None:
    """The rate between two readings; of what started between them, since its start; None when that is too short to tell. Pure."""
    if older is None or newer.cpu_ns < older.cpu_ns or newer.started > older.started:
        window, used = newer_time - max(newer.started, older_time), newer.cpu_ns
        if window < FIRST_WINDOW_SECONDS:
            return None
    else:
        window, used = newer_time - older_time, newer.cpu_ns - older.cpu_ns
    return Usage(newer_time, window, round(used / window), newer.memory_bytes)


class Collector:
    """See the module."""

    def __init__(self, read: Callable[[str], Awaitable[Reading]]) -> None:
        """`read` takes a reading of a node by its name, or raises StatusError, HTTPError or TimeoutError."""
        self._read = read
        self._nodes: dict[str, _Node] = {}

    async def refresh(self, names: Iterable[str], *, all_nodes: bool = False) -> None:
        """Have recent readings of these nodes; a node that does not answer keeps its last ones until they are too old.

        Args:
          all_nodes: the names are all there are; what is known of others is dropped.
        """
        wanted = list(names)
        if all_nodes:
            self._nodes = {name: node for name, node in self._nodes.items() if name in wanted}
        await asyncio.gather(*(self._refresh(name) for name in wanted))

    async def _refresh(self, name: str) -> None:
        node = self._nodes.setdefault(name, _Node())
        async with node.lock:
            age = clock.now() - node.newer.time if node.newer is not None else None
            if node.older is not None and age is not None and age < RESOLUTION_SECONDS:
                return
            try:
                if age is None or not FIRST_WINDOW_SECONDS <= age <= WINDOW_MAXIMUM_SECONDS:
                    node.older, node.newer = None, await self._read(name)
                    await asyncio.sleep(FIRST_WINDOW_SECONDS)
                node.older, node.newer = node.newer, await self._read(name)
            except (StatusError, HTTPError, TimeoutError, ValueError, KeyError) as error:
                log.warning("node not measured", node=name, error=str(error))
                if node.newer is not None and clock.now() - node.newer.time > WINDOW_MAXIMUM_SECONDS:
                    node.older = node.newer = None

    def node(self, name: str) -> Usage | None:
        """What a node uses; None when that is not known."""
        found = self._nodes.get(name)
        if found is None or found.older is None or found.newer is None:
            return None
        return usage(found.older.node, found.newer.node, found.older.time, found.newer.time)

    def pod(self, node_name: str, key: PodKey) -> dict[str, Usage] | None:
        """What a pod's containers use; None while that is not known of each of them."""
        found = self._nodes.get(node_name)
        if found is None or found.older is None or found.newer is None or not found.newer.pods.get(key):
            return None
        before = found.older.pods.get(key, {})
        out = {}
        for name, counter in found.newer.pods[key].items():
            one = usage(before.get(name), counter, found.older.time, found.newer.time)
            if one is None:
                return None
            out[name] = one
        return out


def kubelet_reader(client: Client) -> Callable[[str], Awaitable[Reading]]:
    """Readings through the API server's way to the kubelets."""

    async def read(name: str) -> Reading:
        async with asyncio.timeout(_TIMEOUT_SECONDS):
            answer = await client.request("GET", f"/api/v1/nodes/{name}/proxy/stats/summary", {"only_cpu_and_memory": "true"})
        return read_summary(orjson.loads(answer.body), clock.now())

    return read
