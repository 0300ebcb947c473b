"""The pod network: what pods can reach, what survives a crash, what is left behind."""

from __future__ import annotations

import asyncio
import socket
import struct
import subprocess
from pathlib import Path

import pytest

from knarr.network import netns, rtnl, sysctl
from knarr.network.ipam import AddressManager, PoolExhausted
from knarr.network.podnet import BridgeNetwork
from knarr.runtime.cri import PortMapping, RuntimeFault, SandboxNetwork

from .world import World

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


@pytest.fixture
async def world():
    async with World(dual_stack=True) as made:
        yield made


def node_state(world: World) -> str:
    """Everything of the node's namespace that the network could leave behind."""
    name = Path(world.node.path).name
    commands = [
        "ip -o link",
        "ip -o addr",
        "ip route",
        "ip -6 route",
        "nft list ruleset",
        "sysctl -a -r '^net.ipv[46].(ip_forward|conf.(all|lan0).)' -N",
    ]
    values = ["sysctl -a -r '^net.ipv[46].(ip_forward|conf.(all|lan0)[.](forwarding|accept_ra))'"]
    run = lambda command: (
        subprocess.run(["ip", "netns", "exec", name, "sh", "-c", command], capture_output=True, text=True, check=False).stdout
    )
    text = "\n".join(run(command) for command in (*commands[:5], *values))
    # Link-local addresses settle on their own.
    return "\n".join(line for line in text.splitlines() if "fe80" not in line and "ff00" not in line)


async def ask(place, *arguments, **options):
    return await asyncio.to_thread(lambda: place.ask(*arguments, **options))


async def test_pods_talk_in_both_families_and_the_world_outside_sees_the_node(world):
    a, b = await world.pod("a"), await world.pod("b")
    for family, index in ((2, 0), (10, 1)):
        a.serve("a", 8080 + family, family=family)
        assert await ask(b, a.ips[index], 8080 + family) == ("a", b.ips[index])
        world.client.serve("outside", 9000 + family, family=family)
        assert await ask(b, world.client.ips[index], 9000 + family) == ("outside", world.node.ips[index])
        world.node.serve("node", 9100 + family, family=family)
        assert await ask(b, world.network.gateways[index], 9100 + family) == ("node", b.ips[index])
        assert (await ask(world.node, a.ips[index], 8080 + family))[0] == "a"


async def test_host_ports_side_by_side_on_addresses_and_protocols(world):
    address = world.node.ip
    one = await world.pod("one", ports=[PortMapping("TCP", 8080, 54323, "127.0.0.1")])
    two = await world.pod("two", ports=[PortMapping("TCP", 8080, 54323, address)])
    three = await world.pod("three", ports=[PortMapping("UDP", 8081, 54323, address)])
    every = await world.pod("every", ports=[PortMapping("TCP", 8080, 8088)])
    one.serve("one", 8080), two.serve("two", 8080), three.serve("three", 8081, udp=True), every.serve("every", 8080)
    assert (await ask(world.node, "127.0.0.1", 54323, source=address))[0] == "one"
    assert (await ask(world.node, "127.0.0.1", 54323))[0] == "one"
    for place in (world.client, world.node, one, two):
        assert (await ask(place, address, 54323))[0] == "two"
        assert (await ask(place, address, 54323, udp=True))[0] == "three"
    # The client's address is kept, as upstream's port mapping keeps it.
    assert await ask(world.client, address, 8088) == ("every", world.client.ip)
    assert (await ask(world.node, "127.0.0.1", 8088))[0] == "every"
    assert (await ask(every, address, 8088))[0] == "every"


async def test_a_taken_host_port_fails_the_pod_and_leaves_nothing(world):
    await world.pod("one", ports=[PortMapping("TCP", 80, 7000)])
    before = node_state(world)
    with pytest.raises(RuntimeFault, match="host port 7000/TCP is held"):
        await world.pod("two", ports=[PortMapping("TCP", 80, 7000)])
    await asyncio.sleep(0.2)
    assert node_state(world) == before


async def test_teardown_frees_address_and_host_port_and_is_idempotent(world):
    pod = await world.pod("one", ports=[PortMapping("TCP", 80, 7000)])
    _place, sandbox = world.pods[-1]
    again = await world.network.setup(sandbox)
    assert again.ips == pod.ips
    for _ in range(2):
        await world.network.teardown(sandbox)
    other = await world.pod("two", ports=[PortMapping("TCP", 80, 7000)])
    other.serve("two", 80)
    assert (await ask(world.client, world.node.ip, 7000))[0] == "two"
    assert other.ip != pod.ip


async def test_a_killed_node_process_finds_its_pods_again_and_frees_the_dead(world):
    living, dead = await world.pod("living", ports=[PortMapping("TCP", 80, 7000)]), await world.pod("dead")
    living.serve("living", 80)
    sandboxes = [sandbox for _place, sandbox in world.pods]
    # Without any goodbye, a new process with the same folder takes over.
    successor = BridgeNetwork(
        bridge="knt0", pod_cidrs=world.network.pod_cidrs, cluster_cidrs=world.cluster_cidrs, state_dir=world.directory / "state", table="knt-pods",
        netns=world.node.path, mtu=1400,
    )  # fmt: skip
    await successor.start()
    assert await successor.recover([sandboxes[0].sandbox_id]) == [sandboxes[1].sandbox_id]
    assert (await ask(world.client, world.node.ip, 7000))[0] == "living"
    assert successor.lease(sandboxes[0].sandbox_id).ips == living.ips
    third = SandboxNetwork("f" * 64, dead.path, "default", "third", "uid")
    await asyncio.sleep(0.3)
    assert (await successor.setup(third)).ips[0] not in (living.ip,)
    await successor.teardown(third)
    await successor.close()


async def test_cleanup_leaves_the_node_as_it_was(world):
    await world.network.cleanup()
    before = node_state(world)
    await world.network.start()
    for number in range(3):
        await world.pod(f"p{number}", ports=[PortMapping("TCP", 80, 7000 + number)])
    await world.network.cleanup()
    assert node_state(world) == before
    assert not (world.directory / "state").exists()
    world.network.pod_cidrs = list(world.network.pod_cidrs)


async def test_bandwidth_annotations_limit_what_a_pod_receives_and_sends(world):
    limits = {"kubernetes.io/ingress-bandwidth": "10M", "kubernetes.io/egress-bandwidth": "20M"}
    pod = await world.pod("slow", annotations=limits)
    name = world.network.lease(world.pods[-1][1].sandbox_id).link
    show = lambda path, link: (
        subprocess.run(
            ["ip", "netns", "exec", Path(path).name, "tc", "qdisc", "show", "dev", link], capture_output=True, text=True, check=False
        ).stdout
    )
    assert "tbf" in show(world.node.path, name)
    assert "rate 10Mbit" in show(world.node.path, name)
    assert "rate 20Mbit" in show(pod.path, "eth0")


async def test_without_a_pod_cidr_the_network_says_so(tmp_path):
    network = BridgeNetwork(state_dir=tmp_path / "state")
    try:
        assert "no pod CIDR" in (await network.ready() or "")
        with pytest.raises(RuntimeFault, match="no pod CIDR"):
            await network.setup(SandboxNetwork("a", "/nowhere", "default", "a", "a"))
    finally:
        await network.close()


def test_addresses_are_used_up_before_one_is_used_again(tmp_path):
    manager = AddressManager(tmp_path, ["10.1.0.0/29"])
    first = [manager.acquire(f"s{n}", "link", "pod").ips[0] for n in range(5)]
    assert first == [f"10.1.0.{n}" for n in range(2, 7)]
    with pytest.raises(PoolExhausted):
        manager.acquire("more", "link", "pod")
    manager.release("s1")
    assert manager.acquire("more", "link", "pod").ips == ["10.1.0.3"]
    manager.release("s0")
    again = AddressManager(tmp_path, ["10.1.0.0/29"])
    assert {lease.ips[0] for lease in again.leases.values()} == {"10.1.0.3", "10.1.0.4", "10.1.0.5", "10.1.0.6"}
    assert again.acquire("new", "link", "pod").ips == ["10.1.0.2"]


def test_a_torn_lease_file_does_not_stop_the_start(tmp_path):
    manager = AddressManager(tmp_path, ["10.1.0.0/29"])
    manager.acquire("good", "link", "pod")
    (tmp_path / "torn").write_text('{"sandbox_id": "to')
    (tmp_path / ".half").write_text("x")
    assert set(AddressManager(tmp_path, ["10.1.0.0/29"]).leases) == {"good"}
    assert not (tmp_path / "torn").exists()


def test_links_are_deleted_only_by_their_prefix():
    assert rtnl.host_network(rtnl.IPv4Address("10.0.0.1")).prefixlen == 32


def test_a_sysctl_is_put_back_by_the_last_cluster_that_needs_it(tmp_path, monkeypatch):
    monkeypatch.setattr("knarr.network.sysctl.REGISTER", tmp_path / "register.json")
    path = netns.create_named("knt-sysctl")
    try:
        with netns.entered(path):
            one, two, lost = (sysctl.SysctlRecord(tmp_path / name) for name in ("one", "two", "lost"))
            sysctl.write("net/ipv4/ip_forward", "0")
            for record in (one, two, lost):
                record.ensure("net/ipv4/ip_forward", "1")
            (tmp_path / "lost").unlink()
            one.restore()
            assert sysctl.read("net/ipv4/ip_forward") == "1"
            sysctl.SysctlRecord(tmp_path / "two").restore()
            assert sysctl.read("net/ipv4/ip_forward") == "0"
            # What was set before by the machine's owner stays.
            sysctl.write("net/ipv4/ip_forward", "1")
            one.ensure("net/ipv4/ip_forward", "1")
            one.restore()
            assert sysctl.read("net/ipv4/ip_forward") == "1"
    finally:
        netns.delete_named(path)
    assert not (tmp_path / "register.json").exists()


async def test_a_pod_cannot_send_in_anothers_name(world):
    a, b = await world.pod("a"), await world.pod("b")
    server = b.serve("b", 5000, udp=True)
    subprocess.run(["ip", "-n", Path(a.path).name, "addr", "add", "10.77.0.250/32", "dev", "eth0"], check=True)
    with pytest.raises(TimeoutError):
        await ask(a, b.ip, 5000, udp=True, seconds=0.3, source="10.77.0.250")
    assert server.seen == []
    assert (await ask(a, b.ip, 5000, udp=True))[0] == "b"


def datagram(source: str, target: str, port: int) -> bytes:
    """A UDP datagram over IPv4 as a pod's link carries it to its node."""
    body = struct.pack(">HHHH", 4200, port, 9, 0) + b"!"
    head = struct.pack(">BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0) + socket.inet_aton(source) + socket.inet_aton(target)
    total = sum(struct.unpack(">10H", head))
    checksum = struct.pack(">H", 0xFFFF - total % 0xFFFF)
    return bytes.fromhex("eeeeeeeeeeee 020000000001 0800") + head[:10] + checksum + head[12:] + body


async def test_a_pod_cannot_reach_what_listens_on_the_nodes_loopback(world):
    pod = await world.pod("a")
    with world.node.open(socket.SOCK_DGRAM) as listener, netns.entered(pod.path):
        wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
        listener.bind(("0.0.0.0", 5300))
        listener.settimeout(2)
        with wire:
            wire.bind(("eth0", 0))
            for source in (pod.ip, "127.0.0.1", "10.77.0.250"):
                wire.send(datagram(source, "127.0.0.1", 5300))
            wire.send(datagram(pod.ip, "10.77.0.1", 5300))
        assert (await asyncio.to_thread(listener.recvfrom, 16))[1] == (pod.ip, 4200)
        listener.setblocking(False)
        with pytest.raises(BlockingIOError):
            listener.recvfrom(16)


async def test_half_closed_connections_are_remembered_as_long_as_by_kube_proxy():
    name = "net/netfilter/nf_conntrack_tcp_timeout_close_wait"
    async with World() as world:
        before = netns.run_inside(world.client.path, lambda: sysctl.read(name))
        assert netns.run_inside(world.node.path, lambda: sysctl.read(name)) == "3600"
        await world.network.cleanup()
        assert netns.run_inside(world.node.path, lambda: sysctl.read(name)) == before


async def test_udp_flows_to_a_host_port_follow_its_next_pod(world):
    address = world.node.ip
    flow = {"udp": True, "source_port": 4100}
    with pytest.raises(OSError):
        await ask(world.client, address, 7070, seconds=0.3, **flow)
    for name in ("first", "second"):
        pod = await world.pod(name, ports=[PortMapping("UDP", 53, 7070)])
        pod.serve(name, 53, udp=True)
        assert (await ask(world.client, address, 7070, **flow))[0] == name
        await world.network.teardown(world.pods[-1][1])


async def test_connections_to_an_address_that_the_node_has_left_end_at_once(world):
    pod = await world.pod("a")
    world.node.serve("node", 6443)
    with world.node.open(socket.SOCK_STREAM) as door, pod.open(socket.SOCK_STREAM) as sock:
        door.bind((world.node.ip, 6444))
        door.listen()
        sock.settimeout(3)
        await asyncio.to_thread(sock.connect, (world.node.ip, 6444))
        await world.network.change_address(world.node.ip, "192.168.77.9")
        sock.send(b"?")
        with pytest.raises(ConnectionResetError):
            await asyncio.to_thread(sock.recv, 1)
    # Back again, as a laptop at home.
    await world.network.change_address("192.168.77.9", world.node.ip)
    assert (await ask(pod, world.node.ip, 6443))[0] == "node"
