"""Rows of the network: throughput and new connections against a bare bridge and a bare VXLAN, and what size costs.

They need root and iperf3, wrk and HAProxy. Services, policies and pod rules are all in place on our side, as on a node of a
cluster; the reference has nothing in the way of a packet but the kernel.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from tests.network.test_overlay import wired_pair
from tests.network.world import Place, World, endpoint_slice, ready, service

from bench import network_scale
from bench.network_world import (
    NODE_PORT,
    PORT,
    WEB_PORT,
    Pair,
    bare_bridge,
    bare_vxlan,
    connections_per_cpu,
    forget_connections,
    gigabits,
    in_turn,
    least_tracked,
    tracked_vxlan,
    web_server,
)
from bench.row import Row
from knarr.network.direct.services import DirectServices
from knarr.network.policy.state import PolicyState
from knarr.network.policy.table import PolicyTable
from knarr.network.proxy.model import Rendered, render_service
from knarr.network.proxy.table import ProxyTable
from knarr.network.proxy.topology import NodeView

_ONE_NODE = ("network-pod-pod", "network-pod-service", "network-host-nodeport")
_CONNECT = tuple(name.replace("network-", "network-connect-") for name in _ONE_NODE)
_TRACKED = tuple(f"{name}-tracked" for name in _CONNECT)
ROWS = (*_ONE_NODE, *_CONNECT, *_TRACKED, "network-vxlan", "network-connect-vxlan", "network-connect-vxlan-tracked", *network_scale.ROWS)
CLUSTER_IP = "10.96.0.70"


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    if any(name in (*_ONE_NODE, *_CONNECT, *_TRACKED) for name in names):
        yield from asyncio.run(_in_world(lambda world: _one_node(world, names, options)))
    if any("vxlan" in name for name in names):
        yield from asyncio.run(_two_nodes(names, options))
    yield from network_scale.measure([name for name in names if name in network_scale.ROWS], options)


async def _in_world(work: Callable[[World], Awaitable[list[Row]]]) -> list[Row]:
    async with World() as world:
        return await work(world)


async def _one_node(world: World, names: list[str], options: argparse.Namespace) -> list[Row]:
    client, server = await world.pod("client"), await world.pod("server")
    proxy, policy = ProxyTable("knt", world.cluster_cidrs, netns=world.node.path), PolicyTable("knt-policy", netns=world.node.path)
    published = {"web": _published(server)}
    proxy.load(published)
    policy.load(PolicyState("here").wanted())
    direct = DirectServices(world.network.direct, world.cluster_cidrs) if world.network.direct is not None else None
    try:
        if direct is not None:
            direct.set_node_addresses([world.node.ip])
            direct.load({key: rendered.offer for key, rendered in published.items()})
            direct.attach()
        return await asyncio.to_thread(_against_bridge, world, client, server, names, options)
    finally:
        if direct is not None:
            direct.close()
        for table in (proxy, policy):
            table.remove()
            table.close()


def _published(server: Place) -> Rendered:
    ports = [("load", "TCP", PORT), ("web", "TCP", WEB_PORT)]
    svc = service("web", CLUSTER_IP, ports, type="NodePort", node_ports={PORT: NODE_PORT, WEB_PORT: NODE_PORT + 1})
    return render_service(svc, [endpoint_slice("web", ports, [ready(server.ip)])], NodeView("here"))


def _against_bridge(world: World, client: Place, server: Place, names: list[str], options: argparse.Namespace) -> list[Row]:
    rows = []
    mtu = world.network.mtu
    with bare_bridge(mtu) as (host, a, b), least_tracked(CLUSTER_IP, mtu) as (other, c, d), web_server(server) as mine, web_server(b) as theirs, web_server(d) as third:
        plain, least = Pair(a, b, b.ip, server_pid=theirs), Pair(c, d, CLUSTER_IP, server_pid=third)
        ways = {
            "pod-pod": (Pair(client, server, server.ip, server_pid=mine), plain, replace(least, address=d.ip)),
            "pod-service": (Pair(client, server, CLUSTER_IP, server_pid=mine), plain, least),
            "host-nodeport": (
                Pair(world.node, server, world.node.ip, NODE_PORT, NODE_PORT + 1, mine), replace(plain, client=host), replace(least, client=other),
            ),
        }
        for way, (ours, bare, tracked) in ways.items():
            rows += _compare(way, ours, bare, (world.node, other), names, options, "a bare bridge", tracked)
    return rows


def _compare(
    way: str, ours: Pair, bare: Pair, nodes: Sequence[Place], names: list[str], options: argparse.Namespace, against: str, tracked: Pair | None = None
) -> list[Row]:
    rows, seconds, repeat = [], 1, max(3, int(options.repeat * options.seconds / 2))
    if f"network-{way}" in names:
        mine, theirs = in_turn([lambda: gigabits(ours, seconds), lambda: gigabits(bare, seconds)], repeat)
        rows.append(Row(f"network-{way}", "Gbit/s", mine, theirs, note=f"one TCP stream; reference: {against}"))
    name = f"network-connect-{way}"
    if name in names or f"{name}-tracked" in names:

        def fresh(pair: Pair) -> float:
            for node in nodes:
                forget_connections(node)
            return connections_per_cpu(pair, seconds, pair.server_pid)

        pairs = [ours, bare, *([tracked] if tracked else [])]
        measured = in_turn([partial(fresh, pair) for pair in pairs], repeat)
        note = "connection, request, answer, end; reference:"
        rows.append(Row(name, "1/CPU s", measured[0], measured[1], note=f"{note} {against}"))
        if tracked:
            rows.append(Row(f"{name}-tracked", "1/CPU s", measured[0], measured[2], note=f"{note} routers by hand, which track as well, with one rule at most"))
    return rows


async def _two_nodes(names: list[str], options: argparse.Namespace) -> list[Row]:
    with tempfile.TemporaryDirectory(prefix="knb-") as folder:
        async with wired_pair(Path(folder), "vxlan") as (one, two):
            policies = [PolicyTable("knt-policy", netns=node.place.path) for node in (one, two)]
            proxies = [ProxyTable("knt", ["10.79.0.0/16"], netns=node.place.path) for node in (one, two)]
            for policy, proxy in zip(policies, proxies, strict=True):
                policy.load(PolicyState("here").wanted())
                proxy.load({})
            try:
                return await asyncio.to_thread(_against_vxlan, [one.place, two.place], Pair(one.pod_place, two.pod_place, two.pod_place.ip), names, options)
            finally:
                for policy, proxy in zip(policies, proxies, strict=True):
                    policy.close()
                    proxy.close()


def _against_vxlan(nodes: Sequence[Place], ours: Pair, names: list[str], options: argparse.Namespace) -> list[Row]:
    with (
        bare_vxlan() as (a, b), tracked_vxlan() as (c, d), web_server(ours.server) as mine, web_server(b) as theirs, web_server(d) as third
    ):  # fmt: skip
        ours = replace(ours, server_pid=mine)
        bare, least = Pair(a, b, b.ip, server_pid=theirs), Pair(c, d, d.ip, server_pid=third)
        return _compare("vxlan", ours, bare, nodes, names, options, "bridges joined by a bare VXLAN", least)
