"""A node and its pods in network namespaces of their own, inside the test process; pods have a direct path unless told otherwise.

Sockets belong to the namespace they were opened in, so a pod here is a namespace plus sockets of this process: no
containers, no subprocesses, and nothing of the host is touched. `Server.seen` counts who came.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp

from knarr.network import netns, rtnl
from knarr.network.direct.path import DirectPath
from knarr.network.podnet import BridgeNetwork
from knarr.runtime.cri import PortMapping, SandboxNetwork

_numbers = iter(range(1_000_000))


@dataclass
class Server:
    """Answers every connection or datagram with its name and the client's address."""

    sock: socket.socket
    thread: threading.Thread
    seen: list[str] = field(default_factory=list)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)
        self.sock.close()


class Place:
    """A network namespace to talk from and listen in."""

    def __init__(self, path: str, ips: list[str]) -> None:
        self.path = path
        self.ips = ips
        self.servers: list[Server] = []

    @property
    def ip(self) -> str:
        return self.ips[0]

    def open(self, kind: int, family: int = socket.AF_INET) -> socket.socket:
        with netns.entered(self.path):
            return socket.socket(family, kind)

    def serve(self, name: str, port: int, *, udp: bool = False, family: int = socket.AF_INET, address: str = "") -> Server:
        sock = self.open(socket.SOCK_DGRAM if udp else socket.SOCK_STREAM, family)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        server = Server(sock, threading.Thread(target=lambda: None))

        def tcp() -> None:
            while True:
                try:
                    connection, peer = sock.accept()
                except OSError:
                    return
                server.seen.append(peer[0])
                with connection, contextlib.suppress(OSError):
                    connection.sendall(f"{name} {peer[0]}".encode())

        def datagrams() -> None:
            while True:
                try:
                    data, peer = sock.recvfrom(2048)
                except OSError:
                    return
                if not data:
                    return
                server.seen.append(peer[0])
                with contextlib.suppress(OSError):
                    sock.sendto(f"{name} {peer[0]}".encode(), peer)

        if not udp:
            sock.listen(128)
        server.thread = threading.Thread(target=datagrams if udp else tcp, daemon=True)
        server.thread.start()
        self.servers.append(server)
        return server

    def ask(
        self, address: str, port: int, *, udp: bool = False, seconds: float = 2, source: str = "", source_port: int = 0
    ) -> tuple[str, str]:
        """(server's name, client address as it saw it). Raises OSError (ConnectionRefusedError, TimeoutError)."""
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with self.open(socket.SOCK_DGRAM if udp else socket.SOCK_STREAM, family) as sock:
            sock.settimeout(seconds)
            if source or source_port:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((source, source_port))
            sock.connect((address, port))
            if udp:
                sock.send(b"?")
            name, _space, peer = sock.recv(2048).decode().partition(" ")
            return name, peer

    def close(self) -> None:
        for server in self.servers:
            server.close()
        netns.delete_named(self.path)


class World:
    """One node (its own namespace), a client outside on the node's LAN, and pods."""

    def __init__(self, *, dual_stack: bool = False, direct: bool = True) -> None:
        self.label = f"knt{os.getpid()}-{next(_numbers)}"
        self.dual_stack = dual_stack
        self.directory = Path(mkdtemp(prefix="knarr-net-"))
        self.pods: list[tuple[Place, SandboxNetwork]] = []
        self.further_pods: list[tuple[Place, SandboxNetwork]] = []
        self.further: tuple[Place, BridgeNetwork] | None = None
        cidrs = ["10.77.0.0/24", "fd77::/112"] if dual_stack else ["10.77.0.0/24"]
        self.cluster_cidrs = ["10.77.0.0/16", "fd77::/64"] if dual_stack else ["10.77.0.0/16"]
        self.node = Place(str(netns.create_named(f"{self.label}-node")), ["192.168.77.1", "fd78::1"])
        self.client = Place(str(netns.create_named(f"{self.label}-client")), ["192.168.77.2", "fd78::2"])
        self._wire()
        self.network = BridgeNetwork(
            bridge="knt0", pod_cidrs=cidrs, cluster_cidrs=self.cluster_cidrs, state_dir=self.directory / "state", table="knt-pods",
            netns=self.node.path, mtu=1400, direct=DirectPath(self.node.path) if direct else None,
        )  # fmt: skip

    def _wire(self) -> None:
        target = os.open(self.client.path, os.O_RDONLY)
        try:
            with netns.open_netlink(self.node.path) as netlink:
                netlink.send(rtnl.add_veth("lan0", peer="lan0", peer_netns=target, mtu=1500))
        finally:
            os.close(target)
        for place, other in ((self.node, self.client), (self.client, self.node)):
            with netns.open_netlink(place.path) as netlink:
                index = rtnl.link(netlink, "lan0").index
                netlink.send(
                    rtnl.set_up(index),
                    rtnl.add_address(index, rtnl.IPv4Interface(f"{place.ips[0]}/24")),
                    rtnl.add_address(index, rtnl.IPv6Interface(f"{place.ips[1]}/64")),
                )
                netlink.send(rtnl.add_route(rtnl.IPv4Network("0.0.0.0/0"), index=index, gateway=rtnl.IPv4Address(other.ips[0])))
                netlink.send(rtnl.add_route(rtnl.IPv6Network("::/0"), index=index, gateway=rtnl.IPv6Address(other.ips[1])))

    async def add_further(self) -> None:
        """A second node behind the first, as nodes in namespaces of a machine are: its ways out lead through the first."""
        place = Place(str(netns.create_named(f"{self.label}-further")), ["192.168.79.2", "fd79::2"])
        network = BridgeNetwork(
            bridge="knt0", pod_cidrs=["10.77.1.0/24", "fd77::1:0/112"], cluster_cidrs=["10.77.0.0/16", "fd77::/64"],
            state_dir=self.directory / "further", table="knt-pods", netns=place.path, mtu=1400,
        )  # fmt: skip
        self.further = place, network
        inside, outside = Path(place.path).name, Path(self.node.path).name
        for command in (
            f"link add node1 netns {outside} type veth peer name eth0 netns {inside}",
            f"-n {outside} address add 192.168.79.1/24 dev node1",
            f"-n {outside} address add fd79::1/64 dev node1 nodad",
            f"-n {outside} link set node1 up",
            f"-n {inside} address add 192.168.79.2/24 dev eth0",
            f"-n {inside} address add fd79::2/64 dev eth0 nodad",
            f"-n {inside} link set eth0 up",
            f"-n {inside} route add default via 192.168.79.1",
            f"-n {inside} route add default via fd79::1",
            f"-n {outside} route add 10.77.1.0/24 via 192.168.79.2",
            f"-n {outside} route add fd77::1:0/112 via fd79::2",
        ):
            subprocess.run(["ip", *command.split()], check=True, capture_output=True)
        await network.start()

    async def pod(
        self, name: str, *, ports: list[PortMapping] | None = None, annotations: dict[str, str] | None = None, further: bool = False
    ) -> Place:
        number = next(_numbers)
        path = await asyncio.to_thread(netns.create_named, f"{self.label}-p{number}")
        sandbox = SandboxNetwork(f"{number:08x}{'0' * 56}", str(path), "default", name, f"uid-{name}", ports or [], annotations or {})
        place = Place(str(path), [])
        (self.further_pods if further else self.pods).append((place, sandbox))
        place.ips = (await (self.further[1] if further and self.further else self.network).setup(sandbox)).ips
        return place

    async def __aenter__(self) -> World:
        await self.network.start()
        return self

    async def __aexit__(self, *_exception: object) -> None:
        try:
            for network, pods in ((self.network, self.pods), *([(self.further[1], self.further_pods)] if self.further else [])):
                for _place, sandbox in pods:
                    await network.teardown(sandbox)
                await network.cleanup()
                await network.close()
        finally:
            further = [self.further[0]] if self.further else []
            for place in (*(place for place, _sandbox in (*self.pods, *self.further_pods)), *further, self.node, self.client):
                place.close()
            shutil.rmtree(self.directory, ignore_errors=True)


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """The block must end in a refused connection."""
    try:
        yield
    except ConnectionRefusedError:
        return
    raise AssertionError("the connection was not refused")


def service(name: str, cluster_ip: str, ports: list[tuple[str, str, int]], **spec: object) -> dict[str, object]:
    """A Service; ports are (name, protocol, port), node ports go by spec key node_ports={port: node port}."""
    node_ports: dict[int, int] = spec.pop("node_ports", {})  # type: ignore[assignment]
    status = spec.pop("status", {})
    items = [
        {"name": n, "protocol": p, "port": number, **({"nodePort": node_ports[number]} if number in node_ports else {})}
        for n, p, number in ports
    ]
    families = ["IPv6" if ":" in cluster_ip else "IPv4"]
    body = {"clusterIP": cluster_ip, "clusterIPs": [cluster_ip], "ipFamilies": families, "ports": items, "type": "ClusterIP", **spec}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"namespace": "default", "name": name, "uid": name},
        "spec": body,
        "status": status,
    }


def endpoint_slice(
    name: str, ports: list[tuple[str, str, int]], endpoints: list[dict[str, object]], family: str = "IPv4"
) -> dict[str, object]:
    """A slice of Service `name`; endpoints as on the wire."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {"namespace": "default", "name": f"{name}-x", "labels": {"kubernetes.io/service-name": name}},
        "addressType": family,
        "ports": [{"name": n, "protocol": p, "port": number} for n, p, number in ports],
        "endpoints": endpoints,
    }


def ready(ip: str, node: str = "here", **more: object) -> dict[str, object]:
    """A ready endpoint."""
    return {"addresses": [ip], "conditions": {"ready": True}, "nodeName": node, **more}


def free_ports(count: int) -> list[int]:
    """TCP ports of the loopback that nobody holds now."""
    socks = [socket.socket() for _ in range(count)]
    for sock in socks:
        sock.bind(("127.0.0.1", 0))
    ports = [sock.getsockname()[1] for sock in socks]
    for sock in socks:
        sock.close()
    return ports
