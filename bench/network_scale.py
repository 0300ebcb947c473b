"""Rows of the network's sizes: many Services, many policies, DNS answers under a steady rate."""

from __future__ import annotations

import argparse
import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager

from tests.network.fed import FedInformers
from tests.network.test_service_proxy import Recorder
from tests.network.world import Place, World, endpoint_slice, ready, service

from bench import dns_load
from bench.network_world import PORT, WEB_PORT, Pair, alternately, connections_per_cpu, forget_connections, gigabits, web_server
from bench.row import Row
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, SERVICES
from knarr.api.types import Object
from knarr.network.direct.services import available
from knarr.network.policy.model import compile_policy, read_pod
from knarr.network.policy.state import PolicyState
from knarr.network.policy.table import PolicyTable
from knarr.network.proxy import ServiceProxy

SERVICE_COUNT, ENDPOINTS_EACH = 10_000, 5
POLICY_COUNT = 1_000
CHANGES = 20
_SERVICES = ("network-services-load", "network-services-change", "network-services-lookup")
_POLICIES = ("network-policies", "network-policies-connect", "network-policies-change")
ROWS = (*_SERVICES, *_POLICIES, *dns_load.ROWS)
WEB = [("web", "TCP", WEB_PORT)]


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    if any(name in _SERVICES for name in names):
        yield from asyncio.run(_services(names, options))
    if any(name in _POLICIES for name in names):
        yield from asyncio.run(_policies(names, options))
    yield from dns_load.measure([name for name in names if name in dns_load.ROWS], options)


def many(count: int) -> list[tuple[Object, Object]]:
    """Services 10.100.x.y with their slices, endpoints spread over pod addresses that nobody has."""
    made = []
    for number in range(count):
        high, low = divmod(number, 250)
        name = f"s{number}"
        places = [ready(f"10.{180 + index}.{high}.{low + 1}", "elsewhere") for index in range(ENDPOINTS_EACH)]
        made.append((service(name, f"10.100.{high}.{low + 1}", WEB), endpoint_slice(name, WEB, places)))
    return made


@asynccontextmanager
async def _proxied(world: World, table: str, objects: list[tuple[Object, Object]]) -> AsyncIterator[tuple[ServiceProxy, FedInformers, float]]:
    """A proxy that has loaded these Services, and how long that took it."""
    informers = FedInformers()
    direct = available(world.network.direct, world.cluster_cidrs) if world.network.direct is not None else None
    proxy = ServiceProxy(
        None, informers, node_name="here", table=table, pod_cidrs=world.cluster_cidrs, netns=world.node.path, direct=direct,  # type: ignore[arg-type]
    )  # fmt: skip
    proxy._recorder = Recorder()  # type: ignore[assignment]
    informers.put(SERVICES, *(item for item, _part in objects))
    informers.put(ENDPOINT_SLICES, *(part for _item, part in objects))
    async with Tasks() as tasks:
        started = time.perf_counter()
        task = tasks.spawn(proxy.run(), "proxy")
        await proxy.wait_synced()
        elapsed = time.perf_counter() - started
        try:
            yield proxy, informers, elapsed
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await proxy.cleanup()


async def _services(names: list[str], options: argparse.Namespace) -> list[Row]:
    async with World() as world:
        client, server = await world.pod("client"), await world.pod("server")
        objects = many(SERVICE_COUNT)
        objects[7] = (objects[7][0], endpoint_slice("s7", WEB, [ready(server.ip)]))
        rows, loads = [], []
        for _ in range(options.repeat - 1):
            async with _proxied(world, "knt", objects) as (_proxy, _informers, elapsed):
                loads.append(elapsed)
        async with _proxied(world, "knt", objects) as (proxy, informers, elapsed):
            loads.append(elapsed)
            rows.append(Row("network-services-load", "s", loads, note=f"{SERVICE_COUNT:,} Services, {SERVICE_COUNT * ENDPOINTS_EACH:,} endpoints"))
            rows.append(Row("network-services-change", "s", [await _one_change(proxy, informers, number) for number in range(CHANGES)], note="until the kernel has it"))
            if "network-services-lookup" in names:
                full = await asyncio.to_thread(_lookups, world, client, server, options)
        if "network-services-lookup" in names:
            async with _proxied(world, "knt", objects[:10]):
                few = await asyncio.to_thread(_lookups, world, client, server, options)
            rows.append(Row("network-services-lookup", "1/CPU s", full, few, note="new connections through one of all Services; reference: of ten"))
        return rows


async def _one_change(proxy: ServiceProxy, informers: FedInformers, number: int) -> float:
    name = f"s{1000 + number}"
    commits = proxy.commits
    started = time.perf_counter()
    informers.put(ENDPOINT_SLICES, endpoint_slice(name, WEB, [ready(f"10.190.0.{number + 1}", "elsewhere")]))
    async with asyncio.timeout(10):
        while proxy.commits == commits:
            await asyncio.sleep(0.0005)
    return time.perf_counter() - started


def _lookups(world: World, client: Place, server: Place, options: argparse.Namespace) -> list[float]:
    with web_server(server) as process:
        values = []
        for _ in range(max(3, options.repeat)):
            forget_connections(world.node)
            pair = Pair(client, server, "10.100.0.8", server_pid=process)
            values.append(connections_per_cpu(pair, max(1, int(options.seconds / 2)), process))
        return values


def _pod(number: int, address: str) -> Object:
    return {
        "metadata": {"namespace": "default", "name": f"p{number}", "labels": {"app": f"a{number}", "group": f"g{number % 10}"}},
        "spec": {"nodeName": "here", "containers": []},
        "status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]},
    }


def policed(client: str, server: str) -> PolicyState:
    """A thousand pods of this node, each selected by a policy of its own that lets a tenth of them in; two of them are real."""
    state = PolicyState("here")
    state.set_namespace("default", {})
    addresses = [client, server, *(f"10.77.{8 + number // 250}.{number % 250 + 1}" for number in range(POLICY_COUNT - 2))]
    for number, address in enumerate(addresses):
        pod = read_pod(_pod(number, address))
        assert pod is not None
        state.set_pod(pod)
    for number in range(POLICY_COUNT):
        peers = [{"podSelector": {"matchLabels": {"group": f"g{(number + 9) % 10}"}}}]
        ports = [{"port": 1, "endPort": 65535}]
        spec = {
            "podSelector": {"matchLabels": {"app": f"a{number}"}},
            "policyTypes": ["Ingress", "Egress"],
            "ingress": [{"from": peers, "ports": ports}],
            "egress": [{"to": [{"podSelector": {"matchLabels": {"group": f"g{(number + 1) % 10}"}}}], "ports": ports}],
        }
        state.set_policy(compile_policy({"metadata": {"namespace": "default", "name": f"n{number}"}, "spec": spec}))
    return state


async def _policies(names: list[str], options: argparse.Namespace) -> list[Row]:
    async with World() as world:
        client, server = await world.pod("client"), await world.pod("server")
        state = policed(client.ip, server.ip)
        table = PolicyTable("knt-policy", netns=world.node.path, on_isolate=world.network.direct.isolate)
        rows: list[Row] = []
        try:
            rows += await asyncio.to_thread(_policy_rows, world, Pair(client, server, server.ip, PORT), state, table, names, options)
        finally:
            table.remove()
            table.close()
        return rows


def _policy_rows(world: World, pair: Pair, state: PolicyState, table: PolicyTable, names: list[str], options: argparse.Namespace) -> list[Row]:
    rows, seconds, repeat = [], 1, max(3, int(options.repeat * options.seconds / 2))
    full, empty = state.wanted(), PolicyState("here").wanted()

    def under(wanted: object, work: object) -> float:
        forget_connections(world.node)
        table.load(wanted)  # type: ignore[arg-type]
        return work()  # type: ignore[operator, no-any-return]

    note = f"{POLICY_COUNT:,} policies on {POLICY_COUNT:,} pods; reference: none"
    with web_server(pair.server) as process:
        for name, unit, work in (
            ("network-policies", "Gbit/s", lambda: gigabits(pair, seconds)),
            ("network-policies-connect", "1/CPU s", lambda: connections_per_cpu(pair, seconds, process)),
        ):
            if name in names:
                mine, theirs = alternately(lambda: under(full, work), lambda: under(empty, work), repeat)  # noqa: B023
                rows.append(Row(name, unit, mine, theirs, note=note))
    if "network-policies-change" in names:
        table.load(full)
        rows.append(Row("network-policies-change", "s", [_policy_change(state, table, number) for number in range(CHANGES)], note="a pod changes its labels"))
    return rows


def _policy_change(state: PolicyState, table: PolicyTable, number: int) -> float:
    obj = _pod(500 + number, f"10.77.9.{240 + number % 10}")
    obj["metadata"]["labels"]["group"] = f"g{(number + 3) % 10}"
    pod = read_pod(obj)
    assert pod is not None
    started = time.perf_counter()
    state.set_pod(pod)
    table.change(state.wanted())
    return time.perf_counter() - started
