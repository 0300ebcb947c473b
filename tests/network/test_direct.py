"""Pods that reach each other past the node's IP stack, and what must not."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest

from knarr.network import conntrack, netns
from knarr.network.direct.path import DirectPath
from knarr.network.direct.services import DirectServices, Offer
from knarr.network.firewalls import look
from knarr.network.netlink import NETLINK_NETFILTER, NetlinkError
from knarr.network.podnet import BridgeNetwork
from knarr.network.policy.model import compile_policy, read_pod
from knarr.network.policy.state import PolicyState
from knarr.network.policy.table import PolicyTable

from .test_overlay import wired_pair
from .test_policy import pod_object
from .test_proxy_traffic import BACK, HTTP, Proxied
from .world import Place, World, endpoint_slice, ready, refused, service

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


@pytest.fixture
async def world() -> AsyncIterator[World]:
    async with World(dual_stack=True) as made:
        yield made


def tracked(place: Place) -> set[tuple[str, str]]:
    """Who asked whom, of all connections that a node tracks."""
    with netns.open_netlink(place.path, NETLINK_NETFILTER) as netlink:
        flows = {(flow.source_address, flow.target_address) for flow in conntrack._flows(netlink, lambda _original: True)}
        return {(source, target) for source, target in flows if not ip_address(target).is_multicast}


def listening(place: Place, port: int, family: int = socket.AF_INET) -> socket.socket:
    sock = place.open(socket.SOCK_STREAM, family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("", port))
    sock.listen()
    sock.settimeout(3)
    return sock


@contextmanager
def connected(client: Place, address: str, server: Place, port: int, asked_port: int = 0) -> Iterator[tuple[socket.socket, socket.socket]]:
    """A living connection: the client's end and the server's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with listening(server, port, family) as door, client.open(socket.SOCK_STREAM, family) as mine:
        mine.settimeout(3)
        mine.connect((address, asked_port or port))
        theirs, _peer = door.accept()
        theirs.settimeout(3)
        with theirs:
            yield mine, theirs


def talk(one: socket.socket, other: socket.socket, text: bytes = b"?") -> None:
    one.sendall(text)
    assert other.recv(100) == text
    other.sendall(text + b"!")
    assert one.recv(100) == text + b"!"


async def ask(place: Place, address: str, port: int, **options: Any) -> tuple[str, str]:
    return await asyncio.to_thread(lambda: place.ask(address, port, **options))


@pytest.mark.parametrize("number", [0, 1])
async def test_what_two_pods_say_is_not_tracked(world: World, number: int) -> None:
    a, b = await world.pod("a"), await world.pod("b")
    b.serve("b", 80, family=socket.AF_INET6 if number else socket.AF_INET)
    assert await ask(a, b.ips[number], 80) == ("b", a.ips[number])
    assert tracked(world.node) == set()
    # Datagrams may have to be translated one by one, so they take the stack.
    b.serve("b", 81, udp=True)
    assert await ask(a, b.ip, 81, udp=True) == ("b", a.ip)
    assert tracked(world.node) == {(a.ip, b.ip)}


async def test_large_answers_arrive_whole(world: World) -> None:
    a, b = await world.pod("a"), await world.pod("b")

    def send() -> None:
        with connected(a, b.ip, b, 80) as (mine, theirs):
            data = bytes(range(256)) * 40_000
            got = bytearray()

            def take() -> None:
                while len(got) < len(data):
                    got.extend(mine.recv(1 << 16))

            reader = threading.Thread(target=take)
            reader.start()
            theirs.sendall(data)
            reader.join(5)
            assert got == data

    await asyncio.to_thread(send)
    assert tracked(world.node) == set()


async def test_a_pod_that_meets_a_translated_service_takes_the_stack_from_then_on(world: World) -> None:
    proxied = Proxied(world.node.path, world.cluster_cidrs)
    client, server = await world.pod("client"), await world.pod("server")
    proxied.put(service("web", "10.96.0.9", HTTP), endpoint_slice("web", BACK, [ready(server.ip)]))
    direct = world.network.direct
    assert direct.is_direct(client.ip)
    assert direct.is_direct(server.ip)

    def both() -> None:
        with connected(client, server.ip, server, 9000) as straight, connected(client, "10.96.0.9", server, 8080, 80) as led:
            talk(*straight)
            talk(*led)
            assert not direct.is_direct(client.ip)
            assert direct.is_direct(server.ip)
            # The living connection moves to the stack and back without noticing.
            talk(*straight)
            direct.hold("a test")
            talk(*straight), talk(*led)
            direct.release("a test")
            talk(*straight), talk(*led)

    await asyncio.to_thread(both)
    proxied.table.remove(), proxied.table.close()


async def test_another_process_of_the_node_finds_living_connections_as_they_are(world: World) -> None:
    proxied = Proxied(world.node.path, world.cluster_cidrs)
    client, server, other = [await world.pod(name) for name in ("client", "server", "other")]
    proxied.put(service("web", "10.96.0.9", HTTP), endpoint_slice("web", BACK, [ready(server.ip)]))
    with connected(client, "10.96.0.9", server, 8080, 80) as led, connected(other, server.ip, server, 9000) as straight:
        talk(*led), talk(*straight)
        follower = BridgeNetwork(
            bridge="knt0", pod_cidrs=world.network.pod_cidrs, cluster_cidrs=world.cluster_cidrs, state_dir=world.directory / "state",
            table="knt-pods", netns=world.node.path, mtu=1400, direct=DirectPath(world.node.path, ["not looked yet"]),
        )  # fmt: skip
        await follower.start()
        talk(*led), talk(*straight)
        follower.direct.release("not looked yet")
        assert not follower.direct.is_direct(client.ip)
        assert follower.direct.is_direct(other.ip)
        assert follower.direct.is_direct(server.ip)
        talk(*led), talk(*straight)
        await follower.close()
    proxied.table.remove(), proxied.table.close()


@pytest.mark.parametrize("number", [0, 1])
async def test_a_new_policy_judges_living_connections_by_who_began_them(world: World, number: int) -> None:
    closed, other = await world.pod("closed"), await world.pod("other")
    state, table = PolicyState("here"), PolicyTable("knt-policy", netns=world.node.path, on_isolate=world.network.direct.isolate)
    state.set_namespace("x", {"ns": "x"})
    for name, place in (("closed", closed), ("other", other)):
        state.set_pod(read_pod(pod_object(place, "x", name)))
    table.load(state.wanted())
    spec = {"podSelector": {"matchLabels": {"pod": "closed"}}, "policyTypes": ["Ingress"]}
    with (
        connected(closed, other.ips[number], other, 9000) as (out, out_end),
        connected(closed, other.ips[number], other, 9001) as (silent, silent_end),
        connected(other, closed.ips[number], closed, 9002) as (into, into_end),
    ):
        talk(out, out_end)
        state.set_policy(compile_policy({"metadata": {"namespace": "x", "name": "p"}, "spec": spec}))
        table.change(state.wanted())
        assert not world.network.direct.is_direct(closed.ip)
        assert world.network.direct.is_direct(other.ip)
        # It asked, so it is answered, and the other end may be the first to speak.
        talk(out, out_end)
        talk(silent_end, silent)
        into.sendall(b"?")
        into_end.settimeout(0.4)
        with pytest.raises(TimeoutError):
            into_end.recv(10)
        state.drop_policy("x/p")
        table.change(state.wanted())
        into_end.settimeout(5)
        assert into_end.recv(10) == b"?"
    table.remove(), table.close()


async def test_a_pod_cannot_send_in_anothers_name(world: World) -> None:
    a, b, victim = [await world.pod(name) for name in ("a", "b", "victim")]
    with listening(b, 80):
        heard = socket_for_everything(b)
        with netns.entered(a.path):
            wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
            wire.bind(("eth0", 0))
        with heard, wire:
            wire.send(request(victim.ip, b.ip, 80))
            wire.send(request(a.ip, b.ip, 80))
            heard.settimeout(2)
            # What is honest arrives, what was sent before it did not.
            while (frame := heard.recv(200))[23:24] != b"\x06" or frame[30:34] != socket.inet_aton(b.ip):
                pass
            assert frame[26:30] == socket.inet_aton(a.ip)


def socket_for_everything(place: Place) -> socket.socket:
    with netns.entered(place.path):
        return socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))


def request(source: str, target: str, port: int) -> bytes:
    """A TCP connection request in a frame to the node."""
    ends = socket.inet_aton(source) + socket.inet_aton(target)
    tcp = struct.pack(">HHIIBBHHH", 4200, port, 1, 0, 0x50, 2, 1000, 0, 0)
    tcp = tcp[:16] + checksum(ends + struct.pack(">HH", 6, len(tcp)) + tcp) + tcp[18:]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(tcp), 0, 0, 64, 6, 0) + ends
    return bytes.fromhex("eeeeeeeeeeee 020000000001 0800") + head[:10] + checksum(head) + head[12:] + tcp


def checksum(data: bytes) -> bytes:
    return struct.pack(">H", 0xFFFF - sum(struct.unpack(f">{len(data) // 2}H", data)) % 0xFFFF)


async def test_a_pod_whose_bandwidth_is_limited_is_never_passed_by(world: World) -> None:
    limited, other = await world.pod("limited", annotations={"kubernetes.io/ingress-bandwidth": "1M"}), await world.pod("other")
    limited.serve("limited", 80)
    assert not world.network.direct.is_direct(limited.ip)
    assert (await ask(other, limited.ip, 80))[0] == "limited"
    assert tracked(world.node) == {(other.ip, limited.ip)}


async def test_an_address_that_another_pod_has_now_leads_there(world: World) -> None:
    client, former = await world.pod("client"), await world.pod("former")
    former.serve("former", 80)
    assert (await ask(client, former.ip, 80))[0] == "former"
    await world.network.teardown(world.pods[1][1])
    for pool in world.network._addresses.pools:
        pool._next = pool._first + 1
    latter = await world.pod("latter")
    assert latter.ips == former.ips
    latter.serve("latter", 80)
    assert (await ask(client, latter.ip, 80))[0] == "latter"
    assert world.network.direct.is_direct(latter.ip)
    assert tracked(world.node) == set()


def test_rules_of_others_on_the_way_are_found(tmp_path: Path) -> None:
    path = netns.create_named(f"kntw{tmp_path.name[-6:]}")
    try:
        run = lambda command: subprocess.run(["ip", "netns", "exec", path.name, "sh", "-c", command], check=True, capture_output=True)
        # Chains without a rule, as listing with iptables leaves them, see nothing.
        run(
            "iptables -t nat -L; iptables -L; nft add table inet knt-own; nft 'add chain inet knt-own f { type filter hook forward priority 0; }'"
        )
        run("nft add rule inet knt-own f accept; iptables -A INPUT -j ACCEPT")
        assert look(("knt",), str(path))[1] == {"ip filter INPUT": {1}}
        run("iptables -t nat -A POSTROUTING -s 192.0.2.0/24 -j MASQUERADE")
        assert look(("knt",), str(path))[1] == {"ip filter INPUT": {1}, "ip nat POSTROUTING": {4}}
        run("iptables -t nat -F; iptables -F; iptables -P FORWARD DROP")
        assert look(("knt",), str(path))[1] == {"ip filter FORWARD": {2}}
    finally:
        netns.delete_named(path)


async def test_a_tunnel_between_nodes_is_reached_directly_and_tracks_nothing_inside(tmp_path: Path) -> None:
    async with wired_pair(tmp_path, "vxlan") as (one, two):
        for number, family in ((0, socket.AF_INET), (1, socket.AF_INET6)):
            two.pod_place.serve("two", 80 + number, family=family)
            asked = await ask(one.pod_place, two.pod_place.ips[number], 80 + number)
            assert asked == ("two", one.pod_place.ips[number])
        assert tracked(one.place) == tracked(two.place) == set()
        # Who is translated at home is led back there, whatever the other node does.
        proxied = Proxied(one.place.path, ["10.79.0.0/16"])
        proxied.put(service("web", "10.96.0.9", HTTP), endpoint_slice("web", [("http", "TCP", 80)], [ready(two.pod_place.ip)]))
        assert await ask(one.pod_place, "10.96.0.9", 80) == ("two", one.pod_place.ip)
        assert not one.network.direct.is_direct(one.pod_place.ip)
        proxied.table.remove(), proxied.table.close()


# Services


@pytest.fixture
async def led(world: World) -> AsyncIterator[DirectServices]:
    services = DirectServices(world.network.direct, world.cluster_cidrs)
    services.set_node_addresses([world.node.ip])
    services.attach()
    yield services
    services.close()


async def test_a_socket_is_led_to_an_endpoint_and_told_what_it_asked_for(world: World, led: DirectServices) -> None:
    client, one, two = [await world.pod(name) for name in ("client", "one", "two")]
    for name, place in (("one", one), ("two", two)):
        place.serve(name, 8080)
    led.change({"x/web": Offer({("10.96.0.9", 80): ((one.ip, 8080), (two.ip, 8080))})})
    seen = {await ask(client, "10.96.0.9", 80) for _ in range(40)}
    assert seen == {("one", client.ip), ("two", client.ip)}
    assert tracked(world.node) == set()
    assert world.network.direct.is_direct(client.ip)
    with client.open(socket.SOCK_STREAM) as sock:
        sock.connect(("10.96.0.9", 80))
        assert sock.getpeername() == ("10.96.0.9", 80)
    with client.open(socket.SOCK_STREAM, socket.AF_INET6) as sock:
        sock.connect(("::ffff:10.96.0.9", 80))
        assert sock.getpeername()[:2] == ("::ffff:10.96.0.9", 80)
    with client.open(socket.SOCK_STREAM) as sock:
        sock.connect((one.ip, 8080))
        assert sock.getpeername() == (one.ip, 8080)
    led.change({"x/web": Offer({("10.96.0.9", 80): ((two.ip, 8080),)})})
    assert {(await ask(client, "10.96.0.9", 80))[0] for _ in range(20)} == {"two"}
    # The pod itself, by its own Service.
    assert await ask(two, "10.96.0.9", 80) == ("two", two.ip)


async def test_the_second_family_is_led_alike(world: World, led: DirectServices) -> None:
    client, server = await world.pod("client"), await world.pod("server")
    server.serve("server", 8080, family=socket.AF_INET6)
    led.change({"x/web": Offer({("fd96::9", 80): ((server.ips[1], 8080),)})})
    assert await ask(client, "fd96::9", 80) == ("server", client.ips[1])
    assert tracked(world.node) == set()
    with client.open(socket.SOCK_STREAM, socket.AF_INET6) as sock:
        sock.connect(("fd96::9", 80))
        assert sock.getpeername()[:2] == ("fd96::9", 80)


async def test_node_ports_are_for_the_nodes_own_processes_and_strangers_are_let_be(world: World, led: DirectServices) -> None:
    server, pod = await world.pod("server"), await world.pod("pod")
    server.serve("server", 8080)
    led.change({"x/web": Offer({("", 30080): ((server.ip, 8080),), ("10.96.0.9", 80): ((server.ip, 8080),)})})
    for address in (world.node.ip, "127.0.0.1"):
        assert (await ask(world.node, address, 30080))[0] == "server"
    assert (await ask(world.node, "10.96.0.9", 80))[0] == "server"
    for stranger, address in ((pod, world.node.ip), (world.client, world.node.ip)):
        with refused():
            await ask(stranger, address, 30080)
    led.set_node_addresses(["192.0.2.1"])
    with refused():
        await ask(world.node, world.node.ip, 30080)
    assert (await ask(world.node, "192.0.2.1", 30080))[0] == "server"
    led.close()
    with refused():
        await ask(world.node, "127.0.0.1", 30080)


async def test_what_the_host_asks_of_a_service_is_not_tracked_unless_somebody_may_want_it(world: World, led: DirectServices) -> None:
    server = await world.pod("server")
    server.serve("server", 8080)
    server.serve("server", 8081, family=socket.AF_INET6)
    led.change({"x/web": Offer({("", 30080): ((server.ip, 8080),), ("fd96::9", 80): ((server.ips[1], 8081),)})})
    gateway = world.network.gateways[0]
    assert await ask(world.node, world.node.ip, 30080) == ("server", gateway)
    assert (await ask(world.node, "fd96::9", 80))[0] == "server"
    assert tracked(world.node) == set()
    with world.node.open(socket.SOCK_STREAM) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
        sock.connect((world.node.ip, 30080))
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 7
    assert tracked(world.node) == {(gateway, server.ip)}
    world.network.direct.hold_host("a firewall")
    assert await ask(world.node, "fd96::9", 80) == ("server", world.network.gateways[1])
    assert (world.network.gateways[1], server.ips[1]) in tracked(world.node)


async def test_endpoints_outside_of_the_pod_network_make_nobody_slow_unless_they_are_translated_again(
    world: World, led: DirectServices
) -> None:
    pods = [await world.pod(name) for name in ("a", "b", "c")]
    world.node.serve("node", 6443)
    led.change({"x/api": Offer({("10.96.0.1", 443): ((world.node.ip, 6443),)})})
    assert (await ask(pods[0], "10.96.0.1", 443))[0] == "node"
    assert world.network.direct.is_direct(pods[0].ip)
    led.change({"x/more": Offer({}, frozenset({(world.node.ip, 6443)}))})
    assert (await ask(pods[1], "10.96.0.1", 443))[0] == "node"
    assert not world.network.direct.is_direct(pods[1].ip)
    led.load({"x/api": Offer({("10.96.0.1", 443): ((world.node.ip, 6443),)})})
    assert (await ask(pods[2], "10.96.0.1", 443))[0] == "node"
    assert world.network.direct.is_direct(pods[2].ip)


async def test_a_kernel_that_takes_no_programs_at_links_costs_only_the_direct_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_arguments: object) -> None:
        raise NetlinkError(errno.EOPNOTSUPP, "placing a program")

    monkeypatch.setattr(DirectPath, "watch", refuse)
    monkeypatch.setattr(DirectPath, "watch_tunnel", refuse)
    async with World() as world:
        direct, a, b = world.network.direct, await world.pod("a"), await world.pod("b")
        assert world.network.direct is None
        b.serve("b", 80)
        assert await ask(a, b.ip, 80) == ("b", a.ip)
        # Policies and firewalls go on telling what they know.
        direct.isolate([a.ip])
        direct.hold("a firewall"), direct.release("a firewall"), direct.hold_host("a firewall"), direct.release_host("a firewall")
        assert not direct.is_direct(b.ip)
        await world.network.start()
    async with wired_pair(tmp_path, "vxlan") as (one, two):
        two.pod_place.serve("two", 80)
        assert await ask(one.pod_place, two.pod_place.ip, 80) == ("two", one.pod_place.ip)
