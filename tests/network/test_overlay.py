"""Pods of two nodes reach each other."""

from __future__ import annotations

import asyncio
import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.resources import NODES
from knarr.network import netns, nftables, rtnl
from knarr.network.direct.path import DirectPath
from knarr.network.overlay import NodeRoutes
from knarr.network.podnet import BridgeNetwork
from knarr.runtime.cri import SandboxNetwork

from .fed import FedInformers
from .world import Place

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


class Node:
    """One of two hosts on a wire."""

    def __init__(self, number: int, label: str, folder: Any) -> None:
        self.number, self.label = number, label
        self.place = Place(str(netns.create_named(f"{label}-{number}")), [f"192.168.79.{number}"])
        self.network = BridgeNetwork(
            bridge="knt0", pod_cidrs=[f"10.79.{number}.0/24", f"fd79:{number}::/112"], cluster_cidrs=["10.79.0.0/16", "fd79::/16"], state_dir=folder / str(number),
            table="knt-pods", netns=self.place.path, direct=DirectPath(self.place.path),
        )  # fmt: skip
        self.informers = FedInformers()

    def wire(self) -> None:
        with netns.open_netlink(self.place.path) as netlink:
            index = rtnl.link(netlink, "lan0").index
            netlink.send(rtnl.set_up(index), rtnl.add_address(index, rtnl.IPv4Interface(f"{self.place.ip}/24")))

    def routes(self, mode: Any) -> NodeRoutes:
        return NodeRoutes(self.informers, self.network, node_name=f"node-{self.number}", mode=mode, device="knt-vx")

    def object(self) -> dict[str, Any]:
        return {
            "metadata": {"name": f"node-{self.number}"},
            "spec": {"podCIDRs": self.network.pod_cidrs},
            "status": {"addresses": [{"type": "InternalIP", "address": self.place.ip}]},
        }

    async def pod(self) -> Place:
        path = netns.create_named(f"{self.label}-{self.number}-pod")
        self.sandbox = SandboxNetwork(f"{self.number:08x}" * 8, str(path), "default", "pod", "uid")
        self.pod_place = Place(str(path), (await self.network.setup(self.sandbox)).ips)
        return self.pod_place

    async def close(self) -> None:
        await self.network.cleanup()
        await self.network.close()
        self.pod_place.close()
        self.place.close()


async def wired(folder: Path) -> list[Node]:
    """Two hosts on a wire, without pods or ways yet."""
    label = f"kno{os.getpid()}"
    nodes = [Node(number, label, folder) for number in (1, 2)]
    target = os.open(nodes[1].place.path, os.O_RDONLY)
    with netns.open_netlink(nodes[0].place.path) as netlink:
        netlink.send(rtnl.add_veth("lan0", peer="lan0", peer_netns=target, mtu=1500))
    os.close(target)
    for node in nodes:
        node.wire()
    return nodes


@asynccontextmanager
async def wired_pair(folder: Path, mode: Any) -> AsyncIterator[list[Node]]:
    """Two hosts on a wire whose pods, one each, reach each other."""
    nodes = await wired(folder)
    routes = [node.routes(mode) for node in nodes]
    try:
        async with Tasks() as tasks:
            for number, node in enumerate(nodes):
                await node.network.start()
                await node.pod()
                tasks.spawn(routes[number].run(), f"routes {number}")
            await asyncio.sleep(0.05)
            for node in nodes:
                node.informers.put(NODES, *(other.object() for other in nodes))
            async with asyncio.timeout(10):
                while not all(len(way._applied) == 1 for way in routes):
                    await asyncio.sleep(0.02)
            yield nodes
        for way in routes:
            await way.cleanup()
    finally:
        for node in nodes:
            await node.close()


@pytest.fixture
async def pair(tmp_path):
    nodes = await wired(tmp_path)
    yield nodes
    for node in nodes:
        await node.close()


@pytest.mark.parametrize("mode", ["auto", "vxlan"])
async def test_pods_of_two_nodes_talk_with_their_own_addresses_and_ways_go_with_the_node(pair, mode):
    one, two = pair
    routes = [node.routes(mode) for node in pair]
    async with Tasks() as tasks:
        for number, node in enumerate(pair):
            await node.network.start()
            await node.pod()
            tasks.spawn(routes[number].run(), f"routes {number}")
        await asyncio.sleep(0.05)
        for node in pair:
            node.informers.put(NODES, one.object(), two.object())
        one.pod_place.serve("one", 80)
        one.pod_place.serve("one", 81, family=socket.AF_INET6)
        for _ in range(50):
            await asyncio.sleep(0.02)
            if all(len(way._applied) == 1 for way in routes):
                break
        assert await asyncio.to_thread(two.pod_place.ask, one.pod_place.ip, 80) == ("one", two.pod_place.ip)
        # The other node itself asks with its address in the pod network.
        assert await asyncio.to_thread(two.place.ask, one.pod_place.ip, 80) == ("one", two.network.gateways[0])
        # The nodes have no IPv6 address, so that family always takes the tunnel.
        assert await asyncio.to_thread(two.pod_place.ask, one.pod_place.ips[1], 81) == ("one", two.pod_place.ips[1])
        with netns.open_netlink(two.place.path) as netlink:
            way = next(route for route in rtnl.routes(netlink) if str(route.destination) == one.network.pod_cidrs[0])
            assert (way.index == rtnl.link(netlink, "knt-vx").index) == (mode == "vxlan")
        assert "notrack" in nftables.list_table("knt-vx", two.place.path)
        two.informers.drop(NODES, "", "node-1")
        await asyncio.sleep(0.1)
        with pytest.raises(OSError):
            await asyncio.to_thread(lambda: two.pod_place.ask(one.pod_place.ip, 80, seconds=0.5))
    for way in routes:
        await way.cleanup()
    assert nftables.list_table("knt-vx", two.place.path) == ""


async def test_a_node_that_gets_another_address_keeps_its_ways(pair):
    one, two = pair
    routes = [node.routes("vxlan") for node in pair]
    async with Tasks() as tasks:
        for number, node in enumerate(pair):
            await node.network.start()
            await node.pod()
            tasks.spawn(routes[number].run(), f"routes {number}")
        await asyncio.sleep(0.05)
        one.pod_place.serve("one", 80)
        for address in ("192.168.79.1", "192.168.79.101"):
            with netns.open_netlink(one.place.path) as netlink:
                index = rtnl.link(netlink, "lan0").index
                netlink.send(rtnl.delete_address(index, rtnl.IPv4Interface("192.168.79.1/24")), ignore=(99,))
                netlink.send(rtnl.add_address(index, rtnl.IPv4Interface(f"{address}/24")))
            one.place.ips = [address]
            for node in pair:
                node.informers.put(NODES, one.object(), two.object())
            for _ in range(50):
                await asyncio.sleep(0.02)
                if all(way._applied and not way._wake.is_set() for way in routes):
                    break
            await asyncio.sleep(0.1)
            assert (await asyncio.to_thread(two.pod_place.ask, one.pod_place.ip, 80))[0] == "one"
    for way in routes:
        await way.cleanup()
