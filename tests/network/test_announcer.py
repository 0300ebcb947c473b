"""LoadBalancer addresses on a local network: who answers for them, and that neighbours reach them."""

from __future__ import annotations

import asyncio
import subprocess
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, NODES, SERVICES
from knarr.network import announce, rtnl
from knarr.network.announcer import LABEL, Announcer, announcing_node, leading_interface
from knarr.network.machine import Machine
from knarr.network.proxy import ServiceProxy

from .fed import FedInformers
from .test_service_proxy import Recorder
from .world import Place, World, endpoint_slice, ready, service

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]
HTTP, BACK = [("http", "TCP", 80)], [("http", "TCP", 8080)]


def node(name: str, *, takes_part: bool = True, is_ready: bool = True) -> dict[str, Any]:
    conditions = [{"type": "Ready", "status": "True" if is_ready else "Unknown"}]
    return {"kind": "Node", "metadata": {"name": name, "labels": {LABEL: "lan"} if takes_part else {}}, "status": {"conditions": conditions}}


def balancer(address: str, **spec: Any) -> dict[str, Any]:
    return service("web", "10.96.1.1", HTTP, type="LoadBalancer", status={"loadBalancer": {"ingress": [{"ip": address}]}}, **spec)


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def reached(place: Place, address: str) -> str:
    """The server's name; new IPv6 addresses of both ends cannot be used for about a second."""
    async with asyncio.timeout(10):
        while True:
            try:
                return (await asyncio.to_thread(lambda: place.ask(address, 80, seconds=0.5)))[0]
            except TimeoutError:
                continue


def neighbour(place: Place, address: str) -> str:
    """The hardware address that a place believes an address to have."""
    shown = subprocess.run(["ip", "-n", Path(place.path).name, "neigh", "show", address], capture_output=True, text=True, check=True).stdout
    return shown.partition("lladdr ")[2].partition(" ")[0]


@pytest.mark.parametrize(("family", "address"), [(0, "192.168.77.240"), (1, "fd78::240")])
async def test_a_neighbour_reaches_an_announced_address_until_it_is_withdrawn(family: int, address: str) -> None:
    async with World(dual_stack=True) as world, Tasks() as tasks:
        informers = FedInformers()
        proxy = ServiceProxy(None, informers, node_name="here", table="knt", pod_cidrs=world.cluster_cidrs, netns=world.node.path)  # type: ignore[arg-type]
        announcer = Announcer(None, informers, node_name="here", own_prefixes=("knt", "knp"), netns=world.node.path)  # type: ignore[arg-type]
        proxy._recorder = announcer._recorder = recorder = Recorder()  # type: ignore[assignment]
        running = [tasks.spawn(proxy.run(), "proxy"), tasks.spawn(announcer.run(), "announcer")]
        await proxy.wait_synced()
        try:
            pod = await world.pod("web")
            pod.serve("web", 8080, family=10 if family else 2)
            informers.put(NODES, node("here"))
            web = balancer(address)
            web["spec"].update(clusterIP="fd96::1" if family else "10.96.1.1", clusterIPs=["fd96::1" if family else "10.96.1.1"], ipFamilies=["IPv6" if family else "IPv4"])
            informers.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(pod.ips[family])], "IPv6" if family else "IPv4"))
            informers.put(SERVICES, web)
            await until(lambda: announcer.announced == {address: "lan0"} and proxy.idle)
            assert await reached(world.client, address) == "web"
            with pytest.raises(OSError):
                await asyncio.to_thread(world.client.ask, address[:-3] + "241", 80, seconds=0.3)
            # A neighbour that believes another to have the address is corrected by the announcement itself.
            lan = subprocess.run(["ip", "-n", Path(world.node.path).name, "-br", "link", "show", "lan0"], capture_output=True, text=True, check=True).stdout.split()[2]
            assert neighbour(world.client, address) == lan
            informers.put(NODES, node("here", is_ready=False))
            await until(lambda: not announcer.announced)
            subprocess.run(["ip", "-n", Path(world.client.path).name, "neigh", "replace", address, "lladdr", "02:00:00:00:00:01", "dev", "lan0", "nud", "stale"], check=True)
            informers.put(NODES, node("here"))
            await until(lambda: neighbour(world.client, address) == lan)
            informers.drop(SERVICES, "default", "web")
            await until(lambda: not announcer.announced)
            answered = announcer.answered
            subprocess.run(["ip", "-n", Path(world.client.path).name, "neigh", "flush", "all"], check=True)
            with pytest.raises(OSError):
                await asyncio.to_thread(world.client.ask, address, 80, seconds=0.3)
            assert announcer.answered == answered
            assert any("announcing" in message for _name, message in recorder.events)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await proxy.cleanup()


async def test_the_machines_node_announces_for_its_further_nodes_under_the_local_policy() -> None:
    address = "192.168.77.240"
    async with World() as world, Tasks() as tasks:
        await world.add_further()
        informers, machine = FedInformers(), Machine("here", ip_network("192.168.79.0/24"))
        proxy = ServiceProxy(
            None, informers, node_name="here", table="knt", pod_cidrs=world.cluster_cidrs, netns=world.node.path, machine=machine  # type: ignore[arg-type]
        )  # fmt: skip
        announcer = Announcer(None, informers, node_name="here", own_prefixes=("knt", "knp"), netns=world.node.path, machine=machine)  # type: ignore[arg-type]
        proxy._recorder = announcer._recorder = Recorder()  # type: ignore[assignment]
        running = [tasks.spawn(proxy.run(), "proxy"), tasks.spawn(announcer.run(), "announcer")]
        await proxy.wait_synced()
        try:
            pod = await world.pod("web", further=True)
            pod.serve("web", 8080)
            informers.put(ENDPOINT_SLICES, endpoint_slice("web", BACK, [ready(pod.ip, "further")]))
            informers.put(NODES, node("here"), node("further", takes_part=False))
            informers.put(SERVICES, balancer(address, externalTrafficPolicy="Local"))
            await until(lambda: proxy.idle)
            assert announcer.announced == {}
            known = node("further", takes_part=False)
            known["status"]["addresses"] = [{"type": "InternalIP", "address": "192.168.79.2"}]
            informers.put(NODES, known)
            await until(lambda: announcer.announced == {address: "lan0"} and proxy.idle)
            assert await asyncio.to_thread(world.client.ask, address, 80) == ("web", world.client.ip)
            informers.drop(NODES, "", "further")
            await until(lambda: announcer.announced == {} and proxy.idle)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await proxy.cleanup()


def test_one_node_answers_for_an_address_and_another_takes_over() -> None:
    nodes = [node(f"n{number}") for number in range(5)]
    web = balancer("192.0.2.1")
    first = announcing_node(web, [], nodes)
    assert first is not None
    rest = [obj for obj in nodes if obj["metadata"]["name"] != first]
    second = announcing_node(web, [], [*rest, node(first, is_ready=False)])
    assert second not in (None, first)
    # That a third one goes moves nothing.
    assert announcing_node(web, [], [obj for obj in nodes if obj["metadata"]["name"] != second]) == first
    assert announcing_node(web, [], [node("x", takes_part=False)]) is None
    local = balancer("192.0.2.1", externalTrafficPolicy="Local")
    slices = [endpoint_slice("web", BACK, [ready("10.0.0.1", "n3"), {"addresses": ["10.0.0.2"], "conditions": {"ready": False}, "nodeName": "n4"}])]
    assert announcing_node(local, slices, nodes) == "n3"
    assert announcing_node(local, [], nodes) is None
    # The machine n1 has a further node in a namespace, which takes no part itself.
    machine = Machine("n1", ip_network("172.29.0.0/24"))
    further = node("further", takes_part=False)
    further["status"]["addresses"] = [{"type": "InternalIP", "address": "172.29.0.2"}]
    behind = [endpoint_slice("web", BACK, [ready("10.0.1.1", "further")])]
    assert announcing_node(local, behind, [*nodes, further], machine) == "n1"
    assert announcing_node(local, behind, [*nodes, further]) is None
    assert announcing_node(local, [*behind, *slices], [*nodes, further], machine) in ("n1", "n3")
    assert announcing_node(local, slices, [*nodes, further], machine) == "n3"
    assert announcing_node(local, behind, [*(obj for obj in nodes if obj["metadata"]["name"] != "n1"), further], machine) is None
    spread = {announcing_node({**web, "metadata": {"namespace": "default", "name": f"s{number}"}}, [], nodes) for number in range(60)}
    assert len(spread) == 5


def test_the_interface_is_the_one_that_leads_to_the_address() -> None:
    addresses = [(1, ip_interface("127.0.0.1/8"), 254), (7, ip_interface("10.0.0.1/8"), 0), (2, ip_interface("192.0.2.5/24"), 0)]
    routes = [rtnl.Route(ip_network("0.0.0.0/0"), 3, priority=600), rtnl.Route(ip_network("0.0.0.0/0"), 2, priority=100)]
    assert leading_interface(ip_address("192.0.2.77"), addresses, routes, {1, 7}) == 2
    assert leading_interface(ip_address("10.1.1.1"), addresses, routes, {1, 7}) == 2
    assert leading_interface(ip_address("fd00::1"), addresses, routes, {1, 7}) is None


def test_questions_are_told_from_announcements_and_garbage() -> None:
    mac, asker = bytes.fromhex("020000000001"), bytes.fromhex("020000000002")
    for text in ("192.0.2.1", "fd00::1"):
        for frame in announce.announcements(ip_address(text), mac):
            assert announce.asked_for(frame) is None
    question = announce._arp(b"\xff" * 6, 1, asker, ip_address("192.0.2.9"), bytes(6), ip_address("192.0.2.1"))  # type: ignore[arg-type]
    assert announce.asked_for(question) == ip_address("192.0.2.1")
    assert announce.answer(question, ip_address("192.0.2.1"), mac)[:12] == asker + mac
    for length in range(len(question)):
        announce.asked_for(question[:length])
