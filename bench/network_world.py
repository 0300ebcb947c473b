"""Where the network rows are measured: our pod network beside a bare bridge and a bare VXLAN, each in namespaces of its own.

Role: `network_rows` asks for a `Pair` (a client's and a server's namespace with the server's address) and measures between
them. Both kinds are made in one run and measured in turn, so that a busy machine is busy for both.
Invariants: nothing of the machine itself is touched; leaving the context removes every namespace and process.
"""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.network.world import Place

from knarr.network import netns, rtnl
from knarr.network.nftables import run_script

PORT, WEB_PORT, NODE_PORT = 17701, 17702, 30701
_CPUS = sorted(os.sched_getaffinity(0))
SERVER_CPU, CLIENT_CPU = _CPUS[0], _CPUS[-1]
"""Where the two ends run: a scheduler that moves them about is measured else."""
_CONNECTIONS = 16
_ANSWER = """global
  nbthread 1
  maxconn 4000
defaults
  mode http
  timeout client 10s
  timeout server 10s
  timeout connect 1s
  timeout http-request 10s
frontend web
  bind :::{port} v4v6
  http-request return status 200 content-type text/plain string hello
"""


@dataclass(frozen=True, slots=True)
class Pair:
    """Who asks, who answers (and by which process), and under which address."""

    client: Place
    server: Place
    address: str
    port: int = PORT
    web_port: int = WEB_PORT
    server_pid: int = 0


def inside(place: Place, *command: str, cpu: int | None = None) -> list[str]:
    """A command line that runs in a place's namespace, on one processor if wanted."""
    return [*(["taskset", "-c", str(cpu)] if cpu is not None else []), "nsenter", f"--net={place.path}", *command]


def ip(place: Place, *words: str) -> None:
    done = subprocess.run(inside(place, "ip", *words), check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


def forget_connections(place: Place) -> None:
    """Empty a namespace's connection tracking, where ended connections wait for minutes."""
    from knarr.network.netlink import NETLINK_NETFILTER, NLM_F_ACK, NLM_F_REQUEST, frame

    with netns.open_netlink(place.path, NETLINK_NETFILTER) as netlink:
        sequence = netlink.next_sequences(1)
        netlink.send_raw(frame(1 << 8 | 2, NLM_F_REQUEST | NLM_F_ACK, sequence, b"\0\0\0\0"))
        netlink.receive()


def gigabits(pair: Pair, seconds: float) -> float:
    """TCP throughput of one stream."""
    listen = inside(pair.server, "iperf3", "-s", "-1", "-p", str(PORT), "--forceflush", cpu=SERVER_CPU)
    server = subprocess.Popen(listen, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        command = inside(pair.client, "iperf3", "-c", pair.address, "-p", str(pair.port), "-t", str(seconds), "-J", cpu=CLIENT_CPU)
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=seconds + 20, check=False).stdout)
        if "error" in answer:
            raise RuntimeError(f"iperf3: {answer['error']}")
        return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9
    finally:
        server.kill()
        server.wait()


@contextmanager
def web_server(place: Place) -> Iterator[int]:
    """An HTTP server that answers with five letters; gives its process number.

    It keeps no ended connections: a client that comes by several addresses in turn would meet them with other timestamps, and wait.
    """
    netns.run_inside(place.path, lambda: Path("/proc/sys/net/ipv4/tcp_max_tw_buckets").write_text("0"))
    with tempfile.TemporaryDirectory(prefix="knb-") as folder:
        config = Path(folder) / "haproxy.cfg"
        config.write_text(_ANSWER.format(port=WEB_PORT))
        process = subprocess.Popen(inside(place, "haproxy", "-db", "-f", str(config), cpu=SERVER_CPU), stderr=subprocess.DEVNULL)
        try:
            for _ in range(200):
                try:
                    with place.open(1) as sock:
                        sock.connect(("127.0.0.1", WEB_PORT))
                    break
                except ConnectionRefusedError:
                    process.poll()
                    os.sched_yield()
                    subprocess.run(["sleep", "0.02"], check=True)
            yield process.pid
        finally:
            process.kill()
            process.wait()


def connections_per_cpu(pair: Pair, seconds: float, server_pid: int) -> float:
    """New connections, each for one request, that a second of one processor carries, both ends and all between them counted.

    Packets between namespaces are handled in the sender's own time, so the two processes' time is all of it, and what else the machine does
    does not matter.
    """

    def server_seconds() -> float:
        return int(Path(f"/proc/{server_pid}/schedstat").read_text().split()[0]) / 1e9

    before = server_seconds()
    count, client_seconds = _load(pair, seconds)
    return count / (server_seconds() - before + client_seconds)


def _load(pair: Pair, seconds: float) -> tuple[int, float]:
    """(requests, the client's processor seconds)."""
    target = f"http://{pair.address}:{pair.web_port}/"
    command = inside(pair.client, "wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{seconds:g}s", "-H", "Connection: close", target, cpu=CLIENT_CPU)
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    output = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 20, check=True).stdout
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    count = re.search(r"(\d+) requests in", output)
    failed = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output)
    if count is None or (failed is not None and int(failed[1]) + int(failed[4])):
        raise RuntimeError(output)
    return int(count[1]), after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def in_turn(works: Sequence[Callable[[], float]], repeat: int) -> list[list[float]]:
    """Measure all in turn, so that whatever else the machine does meets each; the order changes each time."""
    values: list[list[float]] = [[] for _ in works]
    for number in range(repeat):
        order = range(len(works)) if number % 2 else reversed(range(len(works)))
        for which in order:
            values[which].append(works[which]())
    return values


def alternately(ours: Callable[[], float], theirs: Callable[[], float], repeat: int) -> tuple[list[float], list[float]]:
    """Two of `in_turn`."""
    mine, other = in_turn([ours, theirs], repeat)
    return mine, other


@contextmanager
def places(*names: str) -> Iterator[list[Place]]:
    """Empty namespaces."""
    label = f"knb{os.getpid()}-"
    made: list[Place] = []
    try:
        for name in names:
            made.append(Place(str(netns.create_named(label + name)), []))
        yield made
    finally:
        for place in made:
            place.close()


def link(one: Place, one_name: str, two: Place, two_name: str, mtu: int = 1500) -> None:
    """A veth pair between two namespaces, both ends up."""
    target = os.open(two.path, os.O_RDONLY)
    try:
        with netns.open_netlink(one.path) as netlink:
            netlink.send(rtnl.add_veth(one_name, peer=two_name, peer_netns=target, mtu=mtu))
    finally:
        os.close(target)
    ip(one, "link", "set", "dev", one_name, "up")
    ip(two, "link", "set", "dev", two_name, "up")


def bridge(host: Place, address: str) -> None:
    ip(host, "link", "add", "br0", "type", "bridge")
    ip(host, "link", "set", "dev", "br0", "up")
    ip(host, "address", "add", address, "dev", "br0")


def plug(host: Place, name: str, guest: Place, address: str, mtu: int) -> None:
    """A guest on a host's bridge."""
    link(host, name, guest, "eth0", mtu)
    ip(host, "link", "set", "dev", name, "master", "br0")
    ip(guest, "address", "add", address, "dev", "eth0")
    guest.ips = [address.split("/")[0]]


@contextmanager
def bare_bridge(mtu: int) -> Iterator[tuple[Place, Place, Place]]:
    """(host, guest, guest): nothing but a bridge, no packet filter, no tracking."""
    with places("bare", "bare-a", "bare-b") as (host, a, b):
        bridge(host, "10.78.0.1/24")
        plug(host, "a", a, "10.78.0.2/24", mtu)
        plug(host, "b", b, "10.78.0.3/24", mtu)
        yield host, a, b


_ONE_RULE = """table inet least {
 chain come {
  type nat hook prerouting priority dstnat
  RULE
 }
 chain go {
  type nat hook output priority -100
  RULE
 }
 chain leave {
  type nat hook postrouting priority srcnat
  ip saddr 10.78.0.1 masquerade
 }
}
"""


_TRACKED_INSIDE = """table inet least {
 chain come {
  type filter hook prerouting priority raw
  udp dport 8472 notrack
 }
 chain go {
  type filter hook output priority raw
  udp dport 8472 notrack
 }
 chain nat {
  type nat hook prerouting priority dstnat
  ct state new accept
 }
}
"""


@contextmanager
def least_tracked(address: str, mtu: int) -> Iterator[tuple[Place, Place, Place]]:
    """(host, guest, guest), routed by a host whose one rule, by hand, sends `address` to the second guest: what tracking itself costs."""
    with places("lt", "lt-a", "lt-b") as (host, a, b):
        bridge(host, "10.78.0.1/32")
        netns.run_inside(host.path, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
        for name, guest, number in (("a", a, 2), ("b", b, 3)):
            link(host, name, guest, "eth0", mtu)
            guest.ips = [f"10.78.0.{number}"]
            ip(guest, "address", "add", f"{guest.ip}/32", "dev", "eth0")
            ip(guest, "route", "add", "10.78.0.1", "dev", "eth0")
            ip(guest, "route", "add", "default", "via", "10.78.0.1")
            ip(host, "route", "add", guest.ip, "dev", name, "src", "10.78.0.1")
        ip(host, "route", "add", f"{address}/32", "dev", "br0", "src", "10.78.0.1")
        run_script(_ONE_RULE.replace("RULE", f"ip daddr {address} dnat ip to {b.ip}"), host.path)
        yield host, a, b


def _wired_by_vxlan(one: Place, two: Place) -> None:
    """A device `vx` on each of two hosts on one wire, that leads to the other's."""
    link(one, "wire", two, "wire")
    for host, number in ((one, 1), (two, 2)):
        ip(host, "address", "add", f"192.168.80.{number}/24", "dev", "wire")
        remote = f"192.168.80.{3 - number}"
        ip(host, "link", "add", "vx", "type", "vxlan", "id", "7", "dstport", "8472", "local", f"192.168.80.{number}", "remote", remote)


@contextmanager
def bare_vxlan() -> Iterator[tuple[Place, Place]]:
    """A guest on each of two hosts, whose bridges a VXLAN joins."""
    with places("vx1", "vx2", "vx-a", "vx-b") as (one, two, a, b):
        _wired_by_vxlan(one, two)
        for host, number, guest in ((one, 1, a), (two, 2, b)):
            bridge(host, f"10.81.0.{number}/24")
            ip(host, "link", "set", "dev", "vx", "master", "br0", "up")
            plug(host, "g", guest, f"10.81.0.{10 + number}/24", 1450)
        yield a, b


@contextmanager
def tracked_vxlan() -> Iterator[tuple[Place, Place]]:
    """The same by routes, with hosts that track what is inside of the tunnel and have no rule: what tracking itself costs."""
    with places("tv1", "tv2", "tv-a", "tv-b") as (one, two, a, b):
        _wired_by_vxlan(one, two)
        for host, number, guest in ((one, 1, a), (two, 2, b)):
            other = 3 - number
            netns.run_inside(host.path, lambda: Path("/proc/sys/net/ipv4/ip_forward").write_text("1"))
            ip(host, "link", "set", "dev", "vx", "up")
            ip(host, "address", "add", f"10.81.{number}.1/32", "dev", "vx")
            ip(host, "route", "add", f"10.81.{other}.0/24", "via", f"10.81.{other}.1", "dev", "vx", "onlink")
            link(host, "g", guest, "eth0", 1450)
            guest.ips = [f"10.81.{number}.10"]
            ip(guest, "address", "add", f"{guest.ip}/32", "dev", "eth0")
            ip(guest, "route", "add", f"10.81.{number}.1", "dev", "eth0")
            ip(guest, "route", "add", "default", "via", f"10.81.{number}.1")
            ip(host, "route", "add", guest.ip, "dev", "g")
            run_script(_TRACKED_INSIDE, host.path)
        yield a, b
