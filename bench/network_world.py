"""Where the network rows are measured: our pod network beside a bare bridge and a bare VXLAN, each in namespaces of its own.

Role: `network_rows` asks for a `Pair` (a client's and a server's namespace with the server's address) and measures between
them. Both kinds are made in one run and measured in turn, so that a busy machine is busy for both.
Invariants: nothing of the machine itself is touched; leaving the context removes every namespace and process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.network.world import Place

from knarr.network import netns, rtnl

PORT, WEB_PORT, NODE_PORT = 17701, 17702, 30701
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
    """Who asks, who answers, and under which address."""

    client: Place
    server: Place
    address: str
    port: int = PORT
    web_port: int = WEB_PORT


def inside(place: Place, *command: str) -> list[str]:
    """A command line that runs in a place's namespace."""
    return ["nsenter", f"--net={place.path}", *command]


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
    server = subprocess.Popen(inside(pair.server, "iperf3", "-s", "-1", "-p", str(PORT), "--forceflush"), stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        for line in server.stdout:
            if "listening" in line:
                break
        command = inside(pair.client, "iperf3", "-c", pair.address, "-p", str(pair.port), "-t", str(seconds), "-J")
        answer = json.loads(subprocess.run(command, capture_output=True, text=True, timeout=seconds + 20, check=False).stdout)
        if "error" in answer:
            raise RuntimeError(f"iperf3: {answer['error']}")
        return float(answer["end"]["sum_received"]["bits_per_second"]) / 1e9
    finally:
        server.kill()
        server.wait()


@contextmanager
def web_server(place: Place) -> Iterator[None]:
    """An HTTP server that answers with five letters.

    It keeps no ended connections: a client that comes by several addresses in turn would meet them with other timestamps, and wait.
    """
    netns.run_inside(place.path, lambda: Path("/proc/sys/net/ipv4/tcp_max_tw_buckets").write_text("0"))
    with tempfile.TemporaryDirectory(prefix="knb-") as folder:
        config = Path(folder) / "haproxy.cfg"
        config.write_text(_ANSWER.format(port=WEB_PORT))
        process = subprocess.Popen(inside(place, "haproxy", "-db", "-f", str(config)), stderr=subprocess.DEVNULL)
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
            yield
        finally:
            process.kill()
            process.wait()


def connections(pair: Pair, seconds: float, *, keep: bool = False) -> float:
    """New connections a second, each for one request; with `keep` requests a second over kept ones."""
    header = [] if keep else ["-H", "Connection: close"]
    target = f"http://{pair.address}:{pair.web_port}/"
    command = inside(pair.client, "wrk", "-t1", f"-c{_CONNECTIONS}", f"-d{seconds:g}s", *header, target)
    output = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 20, check=True).stdout
    found = re.search(r"Requests/sec:\s*([\d.]+)", output)
    failed = re.search(r"Socket errors: connect (\d+), read (\d+), write (\d+), timeout (\d+)", output)
    if found is None or (failed is not None and int(failed[1]) + int(failed[4])):
        raise RuntimeError(output)
    return float(found[1])


def alternately(ours: Callable[[], float], theirs: Callable[[], float], repeat: int) -> tuple[list[float], list[float]]:
    """Measure both in turn, so that whatever else the machine does meets both; the order changes each time."""
    mine: list[float] = []
    other: list[float] = []
    for number in range(repeat):
        steps = [(ours, mine), (theirs, other)]
        for function, values in steps if number % 2 else reversed(steps):
            values.append(function())
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


@contextmanager
def bare_vxlan() -> Iterator[tuple[Place, Place]]:
    """A guest on each of two hosts, whose bridges a VXLAN joins."""
    with places("vx1", "vx2", "vx-a", "vx-b") as (one, two, a, b):
        link(one, "wire", two, "wire")
        for host, number, guest in ((one, 1, a), (two, 2, b)):
            ip(host, "address", "add", f"192.168.80.{number}/24", "dev", "wire")
            remote = f"192.168.80.{3 - number}"
            ip(host, "link", "add", "vx", "type", "vxlan", "id", "7", "dstport", "8472", "local", f"192.168.80.{number}", "remote", remote)
            bridge(host, f"10.81.0.{number}/24")
            ip(host, "link", "set", "dev", "vx", "master", "br0", "up")
            plug(host, "g", guest, f"10.81.0.{10 + number}/24", 1450)
        yield a, b
