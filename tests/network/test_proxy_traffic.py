"""Connections through Services in a real kernel."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections import Counter
from typing import Any

import pytest

from knarr.network import netns
from knarr.network.proxy.model import render_service
from knarr.network.proxy.table import ProxyTable
from knarr.network.proxy.topology import NodeView, categorise, collect

from .world import Place, World, endpoint_slice, ready, refused, service

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]
HERE = NodeView("here", "zone-a")
HTTP = [("http", "TCP", 80)]
BACK = [("http", "TCP", 8080)]


class Proxied:
    """A node with a proxy table that tests write Services into."""

    def __init__(self, node: str, cluster_cidrs: list[str]) -> None:
        self.table = ProxyTable("knt", cluster_cidrs, netns=node)
        self.table.load({})

    def put(self, svc: dict[str, Any], *slices: dict[str, Any], view: NodeView = HERE) -> None:
        rendered = render_service(svc, slices, view)
        assert not rendered.problems
        assert self.table.change({svc["metadata"]["name"]: rendered}) == {}


@pytest.fixture
async def world():
    async with World() as made:
        proxied = Proxied(made.node.path, made.cluster_cidrs)
        made.proxy = proxied
        yield made
        proxied.table.remove()
        proxied.table.close()


async def ask(place: Place, address: str, port: int, **options: Any) -> tuple[str, str]:
    return await asyncio.to_thread(lambda: place.ask(address, port, **options))


async def test_a_cluster_ip_spreads_over_its_endpoints_and_keeps_the_pods_address(world):
    a, b, client = await world.pod("a"), await world.pod("b"), await world.pod("client")
    a.serve("a", 8080), b.serve("b", 8080)
    world.proxy.put(service("web", "10.96.0.10", HTTP), endpoint_slice("web", BACK, [ready(a.ip), ready(b.ip)]))
    answers = [await ask(client, "10.96.0.10", 80) for _ in range(30)]
    assert {name for name, _peer in answers} == {"a", "b"}
    assert {peer for _name, peer in answers} == {client.ip}


async def test_a_pod_reaches_itself_through_its_own_service(world):
    a = await world.pod("a")
    a.serve("a", 8080)
    world.proxy.put(service("web", "10.96.0.10", HTTP), endpoint_slice("web", BACK, [ready(a.ip)]))
    assert (await ask(a, "10.96.0.10", 80))[0] == "a"


async def test_the_node_itself_reaches_a_cluster_ip(world):
    a = await world.pod("a")
    a.serve("a", 8080)
    world.proxy.put(service("web", "10.96.0.10", HTTP), endpoint_slice("web", BACK, [ready(a.ip)]))
    assert (await ask(world.node, "10.96.0.10", 80))[0] == "a"


async def test_a_service_without_endpoints_refuses_at_once_from_pod_and_node(world):
    client = await world.pod("client")
    world.proxy.put(service("web", "10.96.0.10", HTTP, node_ports={80: 30080}, type="NodePort"), endpoint_slice("web", BACK, []))
    for place in (client, world.node):
        with refused():
            await ask(place, "10.96.0.10", 80)
        with refused():
            await ask(place, world.node.ip, 30080)


async def test_a_port_that_a_cluster_ip_lacks_is_refused(world):
    a, client = await world.pod("a"), await world.pod("client")
    world.proxy.put(service("web", "10.96.0.10", HTTP), endpoint_slice("web", BACK, [ready(a.ip)]))
    for place in (client, world.node):
        with refused():
            await ask(place, "10.96.0.10", 81)


async def test_a_node_port_answers_from_outside_from_the_node_its_loopback_and_pods(world):
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("a", 8080)
    world.proxy.put(service("web", "10.96.0.10", HTTP, type="NodePort", node_ports={80: 30080}), endpoint_slice("web", BACK, [ready(a.ip)]))
    for place, address in (
        (world.client, world.node.ip),
        (world.node, world.node.ip),
        (world.node, "127.0.0.1"),
        (client, world.node.ip),
        (a, world.node.ip),
    ):
        assert (await ask(place, address, 30080))[0] == "a"


async def test_the_local_policy_keeps_the_clients_address_and_drops_without_local_endpoints(world):
    a = await world.pod("a")
    a.serve("a", 8080)
    svc = service("web", "10.96.0.10", HTTP, type="NodePort", node_ports={80: 30080}, externalTrafficPolicy="Local")
    world.proxy.put(svc, endpoint_slice("web", BACK, [ready(a.ip), ready("10.77.9.9", node="elsewhere")]))
    answers = [await ask(world.client, world.node.ip, 30080) for _ in range(8)]
    assert set(answers) == {("a", world.client.ip)}
    world.proxy.put(svc, endpoint_slice("web", BACK, [ready(a.ip, node="elsewhere")]))
    with pytest.raises(TimeoutError):
        await ask(world.client, world.node.ip, 30080, seconds=0.5)
    # Pods and the node may go through all endpoints.
    assert (await ask(world.node, world.node.ip, 30080))[0] == "a"
    assert (await ask(await world.pod("client"), world.node.ip, 30080))[0] == "a"


@pytest.mark.parametrize("version", [4, 6])
async def test_the_local_policy_counts_other_nodes_of_the_machine_for_balancer_addresses_and_keeps_the_client(version):
    async with World(dual_stack=True) as world:
        await world.add_further()
        proxied, which = Proxied(world.node.path, world.cluster_cidrs), 0 if version == 4 else 1
        family, cluster_ip, external, balancer = (
            (socket.AF_INET, "10.96.0.10", "172.31.0.1", "172.31.0.2") if version == 4 else (socket.AF_INET6, "fd96::10", "fd99::1", "fd99::2")
        )
        near, far = await world.pod("near"), await world.pod("far", further=True)
        for name, pod in (("near", near), ("far", far)):
            pod.serve(name, 8080, family=family), pod.serve(name, 8080, udp=True, family=family)
        svc = service(
            "web", cluster_ip, [("http", "TCP", 80), ("datagrams", "UDP", 80)], type="LoadBalancer", node_ports={80: 30080},
            externalTrafficPolicy="Local", externalIPs=[external], status={"loadBalancer": {"ingress": [{"ip": balancer}]}},
        )  # fmt: skip

        def part(*endpoints: dict[str, Any]) -> dict[str, Any]:
            return endpoint_slice("web", [("http", "TCP", 8080), ("datagrams", "UDP", 8080)], list(endpoints), f"IPv{version}")

        machine = NodeView("here", "zone-a", frozenset({"further"}))
        only_far = part(ready(far.ips[which], "further"), ready("fd77::9:9" if version == 6 else "10.77.9.9", "another machine's"))
        proxied.put(svc, only_far, view=machine)
        client = world.client.ips[which]
        await ready_to_talk(world.client, balancer)
        for address in (balancer, external):
            for udp in (False, True):
                assert {await ask(world.client, address, 80, udp=udp) for _ in range(4)} == {("far", client)}
        # A node port is the node's own.
        with pytest.raises(TimeoutError):
            await ask(world.client, world.node.ips[which], 30080, seconds=0.3)
        both = part(ready(near.ips[which]), ready(far.ips[which], "further"))
        proxied.put(svc, both, view=machine)
        assert {await ask(world.client, balancer, 80) for _ in range(30)} == {("near", client), ("far", client)}
        assert {await ask(world.client, world.node.ips[which], 30080) for _ in range(8)} == {("near", client)}
        proxied.put({**svc, "spec": {**svc["spec"], "sessionAffinity": "ClientIP"}}, both, view=machine)
        assert len({await ask(world.client, balancer, 80) for _ in range(12)}) == 1
        # Without further nodes of its own the node serves none but its own.
        proxied.put(svc, only_far)
        with pytest.raises(TimeoutError):
            await ask(world.client, balancer, 80, seconds=0.3)
        proxied.table.remove()
        proxied.table.close()


async def ready_to_talk(place: Place, address: str) -> None:
    """New IPv6 addresses of a LAN cannot be used for about a second."""
    async with asyncio.timeout(10):
        while True:
            try:
                await ask(place, address, 80, seconds=0.3)
                return
            except OSError:
                await asyncio.sleep(0.02)


def test_what_terminates_serves_a_balancer_address_when_the_whole_machine_has_nothing_else():
    def ending(ip: str, node: str) -> dict[str, Any]:
        return {"addresses": [ip], "conditions": {"ready": False, "serving": True, "terminating": True}, "nodeName": node}

    def near(*endpoints: dict[str, Any]) -> list[str]:
        found = collect([endpoint_slice("web", BACK, list(endpoints))], "http", "TCP", "IPv4", machine, False)
        chosen = categorise(found, machine, uses_cluster=True, uses_local=True)
        assert all(endpoint.local for endpoint in chosen.local)
        return [endpoint.ip for endpoint in chosen.near]

    machine = NodeView("here", siblings=frozenset({"further"}))
    assert near(ending("10.0.0.1", "here"), ready("10.0.0.2", "further"), ready("10.0.0.3", "joined")) == ["10.0.0.2"]
    assert near(ending("10.0.0.1", "here"), ending("10.0.0.2", "further"), ready("10.0.0.3", "joined")) == ["10.0.0.1", "10.0.0.2"]
    assert near(ready("10.0.0.3", "joined")) == []


async def test_external_and_balancer_addresses_answer_and_source_ranges_hold(world):
    a = await world.pod("a")
    a.serve("a", 8080)
    svc = service(
        "web", "10.96.0.10", HTTP, type="LoadBalancer", externalIPs=["172.31.0.1"], loadBalancerSourceRanges=["203.0.113.0/24"],
        status={"loadBalancer": {"ingress": [{"ip": "172.31.0.2"}]}},
    )  # fmt: skip
    world.proxy.put(svc, endpoint_slice("web", BACK, [ready(a.ip)]))
    assert (await ask(world.client, "172.31.0.1", 80))[0] == "a"
    with pytest.raises(TimeoutError):
        await ask(world.client, "172.31.0.2", 80, seconds=0.5)
    svc["spec"]["loadBalancerSourceRanges"] = ["203.0.113.0/24", "192.168.77.0/24"]
    world.proxy.put(svc, endpoint_slice("web", BACK, [ready(a.ip)]))
    assert (await ask(world.client, "172.31.0.2", 80))[0] == "a"


@pytest.mark.parametrize("through", ["cluster_ip", "node_port"])
async def test_session_affinity_holds_a_client_and_lets_go_when_switched_off(world, through):
    pods = [await world.pod(f"p{number}") for number in range(4)]
    for number, pod in enumerate(pods):
        pod.serve(f"p{number}", 8080)
    client = await world.pod("client")
    address, port = ("10.96.0.10", 80) if through == "cluster_ip" else (world.node.ip, 30080)
    plain = service("web", "10.96.0.10", HTTP, type="NodePort", node_ports={80: 30080})
    sticky = service("web", "10.96.0.10", HTTP, type="NodePort", node_ports={80: 30080}, sessionAffinity="ClientIP")
    part = endpoint_slice("web", BACK, [ready(pod.ip) for pod in pods])
    for _round in range(2):
        world.proxy.put(sticky, part)
        assert len({await ask(client, address, port) for _ in range(15)}) == 1
        world.proxy.put(plain, part)
        assert len(Counter([(await ask(client, address, port))[0] for _ in range(30)])) > 1


async def test_internal_traffic_policy_local_uses_only_this_nodes_endpoints(world):
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("a", 8080)
    svc = service("web", "10.96.0.10", HTTP, internalTrafficPolicy="Local")
    world.proxy.put(svc, endpoint_slice("web", BACK, [ready(a.ip), ready("10.77.9.9", node="elsewhere")]))
    assert {(await ask(client, "10.96.0.10", 80))[0] for _ in range(8)} == {"a"}


async def test_the_table_is_adopted_by_a_restarted_proxy_without_a_gap(world):
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("a", 8080)
    svc, part = service("web", "10.96.0.10", HTTP), endpoint_slice("web", BACK, [ready(a.ip)])
    world.proxy.put(svc, part)
    again = ProxyTable("knt", world.cluster_cidrs, netns=world.node.path)
    again.load({"web": render_service(svc, [part], HERE)})
    assert (await ask(client, "10.96.0.10", 80))[0] == "a"
    assert len(again.elements("service4")) == 1
    again.change({"web": render_service(svc, [], HERE)})
    with refused():
        await ask(client, "10.96.0.10", 80)
    again.close()


async def test_two_services_claiming_one_address_are_settled_first_come_and_handed_on(world):
    a, b = await world.pod("a"), await world.pod("b")
    a.serve("a", 8080), b.serve("b", 8080)
    one, two = (service(name, f"10.96.0.{i}", HTTP, externalIPs=["172.31.0.1"]) for i, name in ((1, "one"), (2, "two")))
    world.proxy.put(one, endpoint_slice("one", BACK, [ready(a.ip)]))
    world.proxy.put(two, endpoint_slice("two", BACK, [ready(b.ip)]))
    assert (await ask(world.client, "172.31.0.1", 80))[0] == "a"
    world.proxy.table.change({"one": render_service({**one, "spec": {"clusterIP": "None"}}, [], HERE)})
    assert (await ask(world.client, "172.31.0.1", 80))[0] == "b"


async def test_two_clusters_in_one_namespace_do_not_take_each_others_marks(world):
    pods = [await world.pod(f"p{number}") for number in range(4)]
    for number, pod in enumerate(pods):
        pod.serve(f"p{number}", 8080)
    client = await world.pod("client")
    neighbours = [ProxyTable(f"knt-{number}", ["10.99.0.0/16"], netns=world.node.path) for number in range(2)]
    neighbours[0].load({})
    sticky = service("web", "10.96.0.10", HTTP, sessionAffinity="ClientIP")
    other = service("other", "10.96.9.9", HTTP, sessionAffinity="ClientIP")
    world.proxy.put(sticky, endpoint_slice("web", BACK, [ready(pod.ip) for pod in pods]))
    neighbours[1].load({"other": render_service(other, [endpoint_slice("other", BACK, [ready(pods[0].ip)])], HERE)})
    assert len({await ask(client, "10.96.0.10", 80) for _ in range(15)}) == 1
    assert len({await ask(client, "10.96.9.9", 80) for _ in range(5)}) == 1
    for neighbour in neighbours:
        neighbour.remove()
        neighbour.close()


async def test_services_of_the_second_family_work_alike():
    async with World(dual_stack=True) as world:
        proxied = Proxied(world.node.path, world.cluster_cidrs)
        pods = [await world.pod(f"p{number}") for number in range(3)]
        for number, pod in enumerate(pods):
            pod.serve(f"p{number}", 8080, family=10)
        client = await world.pod("client")
        part = endpoint_slice("web", BACK, [ready(pod.ips[1]) for pod in pods], family="IPv6")
        plain = service("web", "fd96::10", HTTP, type="NodePort", node_ports={80: 30080}, externalIPs=["fd99::1"])
        proxied.put(plain, part)
        assert {name for name, _peer in [await ask(client, "fd96::10", 80) for _ in range(20)]} == {"p0", "p1", "p2"}
        assert {peer for _name, peer in [await ask(client, "fd96::10", 80) for _ in range(3)]} == {client.ips[1]}
        for place, address, port in (
            (world.node, "fd96::10", 80), (world.client, world.node.ips[1], 30080), (world.client, "fd99::1", 80), (pods[0], "fd96::10", 80),
        ):  # fmt: skip
            assert (await ask(place, address, port))[0].startswith("p")
        proxied.put({**plain, "spec": {**plain["spec"], "sessionAffinity": "ClientIP"}}, part)
        for address, port in (("fd96::10", 80), (world.node.ips[1], 30080)):
            assert len({await ask(client, address, port) for _ in range(10)}) == 1
        proxied.put(plain, endpoint_slice("web", BACK, [], family="IPv6"))
        with refused():
            await ask(client, "fd96::10", 80)
        limited = service(
            "web", "fd96::10", HTTP, type="LoadBalancer", loadBalancerSourceRanges=["fd00:1::/64"], status={"loadBalancer": {"ingress": [{"ip": "fd99::2"}]}}
        )  # fmt: skip
        proxied.put(limited, part)
        with pytest.raises(TimeoutError):
            await ask(world.client, "fd99::2", 80, seconds=0.4)
        proxied.table.remove()
        proxied.table.close()


async def test_sctp_services_carry_where_the_kernel_has_the_protocol(world):
    """Elsewhere no program can open such a socket; the rules are there all the same, and the ports beside them work."""
    a, client = await world.pod("a"), await world.pod("client")
    a.serve("one", 8081)
    ports = [("s", "SCTP", 80), ("t", "TCP", 81)]
    world.proxy.put(service("web", "10.96.0.10", ports), endpoint_slice("web", [("s", "SCTP", 8080), ("t", "TCP", 8081)], [ready(a.ip)]))
    assert (await ask(client, "10.96.0.10", 81))[0] == "one"
    assert len(world.proxy.table.elements("service4")) == 2
    try:
        with netns.entered(a.path):
            server = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    except OSError as error:
        if error.errno == errno.EPROTONOSUPPORT:
            return
        raise
    server.bind(("", 8080)), server.listen(), server.settimeout(3)
    with netns.entered(client.path):
        sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP)
    sock.settimeout(3)
    await asyncio.to_thread(sock.connect, ("10.96.0.10", 80))
    server.close(), sock.close()


async def test_a_service_of_any_protocol_can_be_written(world):
    proxy = world.proxy
    ports = [("a", "TCP", 80), ("b", "UDP", 80), ("c", "SCTP", 80)]
    proxy.put(service("web", "10.96.0.10", ports), endpoint_slice("web", ports, [ready("10.77.0.9")]))
    assert len(proxy.table.elements("service4")) == 3
