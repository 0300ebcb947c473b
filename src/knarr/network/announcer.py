"""Tells the local network where LoadBalancer addresses are: one node answers ARP and NDP for each.

Role: cluster runs one per node that is a host of that network, when asked to. Nodes that announce carry a label; each
computes by itself which of them answers for an address, so nothing is elected or written: the Ready one with the highest
hash of its name and the Service's, under the Local traffic policy among those with an endpoint (a machine's own node has
those of the further nodes in the machine's namespaces, too). When it goes, the next one announces.
Invariants: an address is announced only on the interface that leads to its network (or the one named); no address is
ever set on an interface, so nothing is left behind when the process dies. Costs nothing while nobody asks: the sockets'
filters let only questions through.
Source: behaviour of MetalLB's layer 2 mode.
"""

from __future__ import annotations

import asyncio
import ctypes
import errno
import hashlib
import socket
import struct
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address, ip_address

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, NODES, SERVICES
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.network import rtnl
from knarr.network.announce import ARP_FILTER, ETHERTYPE_ARP, ETHERTYPE_IPV6, NDP_FILTER, announcements, answer, asked_for, solicited_node
from knarr.network.hostwatch import HostWatch
from knarr.network.loadbalancer import ingress_addresses, is_ours
from knarr.network.machine import Machine, internal_addresses
from knarr.network.netns import entered, open_netlink
from knarr.network.objects import object_key, slice_service
from knarr.network.rtnl import Address

log = get_logger(__name__)

LABEL = "knarr.dev/announces"
"""Label of nodes that take part."""
_SO_ATTACH_FILTER = 26
_BURST = 64
_IPV6 = ETHERTYPE_IPV6.to_bytes(2, "big")
_AGAIN_SECONDS = 1.0
"""Announcements are told twice, as frames may be lost."""


def announcing_node(service: Object, slices: Iterable[Object], nodes: Sequence[Object], machine: Machine | None = None) -> str | None:
    """Name of the node that answers for a Service's addresses; None when no node may.

    Args:
      machine: The machine whose further nodes have their endpoints served by its own node.
    """
    candidates = {node["metadata"]["name"] for node in nodes if _takes_part(node)}
    if (service.get("spec") or {}).get("externalTrafficPolicy") == "Local":
        serving = {
            endpoint.get("nodeName") for part in slices for endpoint in part.get("endpoints") or () if (endpoint.get("conditions") or {}).get("ready") is not False
        }
        if machine is not None and any(machine.holds(node) for node in nodes if node["metadata"]["name"] in serving):
            serving.add(machine.node)
        candidates &= serving
    key = object_key(service)
    return max(candidates, key=lambda name: hashlib.blake2b(f"{name} {key}".encode(), digest_size=8).digest(), default=None)


def _takes_part(node: Object) -> bool:
    if LABEL not in (node["metadata"].get("labels") or {}):
        return False
    return any(item.get("type") == "Ready" and item.get("status") == "True" for item in (node.get("status") or {}).get("conditions") or ())


def leading_interface(address: Address, addresses: Iterable[tuple[int, rtnl.Interface, int]], routes: Iterable[rtnl.Route], ours: set[int]) -> int | None:
    """Index of the interface to whose network an address belongs: a directly attached one, else the default route's."""
    for index, interface, _scope in addresses:
        if index not in ours and address in interface.network and interface.network.prefixlen < address.max_prefixlen:
            return index
    defaults = [route for route in routes if route.destination.prefixlen == 0 and route.destination.version == address.version and route.index not in ours]
    return min(defaults, key=lambda route: route.priority).index if defaults else None


class _Port:
    """One interface of the network: its sockets and the addresses announced there."""

    def __init__(self, index: int, name: str, netns: str | None) -> None:
        self.index, self.name = index, name
        self.addresses: dict[Address, str] = {}
        self.groups: dict[IPv6Address, int] = {}
        with entered(netns):
            self.arp = _packet_socket(name, ETHERTYPE_ARP, ARP_FILTER)
            self.ndp = _packet_socket(name, ETHERTYPE_IPV6, NDP_FILTER)
            # What joins multicast groups, so that the card and switches let questions through.
            self.member = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
        self.mac = bytes(self.arp.getsockname()[4])

    def send(self, frame: bytes) -> None:
        try:
            (self.ndp if frame[12:14] == _IPV6 else self.arp).send(frame)
        except OSError as error:
            log.debug("an announcement could not be sent", interface=self.name, error=str(error))

    def join(self, address: Address) -> None:
        if isinstance(address, IPv6Address):
            group = solicited_node(address)
            self.groups[group] = self.groups.get(group, 0) + 1
            if self.groups[group] == 1:
                self._membership(socket.IPV6_JOIN_GROUP, group)

    def leave(self, address: Address) -> None:
        if isinstance(address, IPv6Address):
            group = solicited_node(address)
            self.groups[group] -= 1
            if not self.groups[group]:
                del self.groups[group]
                self._membership(socket.IPV6_LEAVE_GROUP, group)

    def _membership(self, option: int, group: IPv6Address) -> None:
        try:
            self.member.setsockopt(socket.IPPROTO_IPV6, option, group.packed + struct.pack("=I", self.index))
        except OSError as error:
            log.warning("questions for an address may not come through", interface=self.name, group=str(group), error=str(error))

    def close(self) -> None:
        for sock in (self.arp, self.ndp, self.member):
            sock.close()


def _packet_socket(interface: str, kind: int, program: list[tuple[int, int, int, int]]) -> socket.socket:
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC, 0)
    try:
        code = b"".join(struct.pack("=HBBI", *line) for line in program)
        buffer = ctypes.create_string_buffer(code, len(code))
        sock.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HP", len(program), ctypes.addressof(buffer)))
        # Only now does it receive: nothing comes in past the filter.
        sock.bind((interface, kind))
    except OSError:
        sock.close()
        raise
    return sock


class Announcer:
    """See the module.

    Args:
      interface: Name of the interface to announce on; "auto" finds it for each address.
      own_prefixes: Interfaces whose names begin so are the cluster's own, never the local network's.
      machine: The machine of the cluster that has further nodes in namespaces; every node that announces must be told the same.
      netns: Path of the node's network namespace; None is the process's.
    """

    def __init__(
        self,
        client: Client,
        informers: Informers,
        *,
        node_name: str,
        interface: str = "auto",
        own_prefixes: tuple[str, ...] = ("knarr", "kp", "knn"),
        machine: Machine | None = None,
        netns: str | None = None,
    ) -> None:
        self._informers = informers
        self._machine = machine
        self._services = informers.get(SERVICES)
        self._slices = informers.get(ENDPOINT_SLICES)
        self._slices.add_index("service", slice_service)
        self._nodes = informers.get(NODES)
        self._recorder = EventRecorder(client, "knarr-announcer", node_name)
        self._node_name = node_name
        self._interface = interface
        self._own = own_prefixes
        self._netns = netns
        self._ports: dict[int, _Port] = {}
        self._wake = asyncio.Event()
        self._watch = HostWatch(self._wake.set, netns=netns)
        self._tasks = Tasks()
        self.answered = 0

    @property
    def announced(self) -> dict[str, str]:
        """Addresses announced now, and on which interface."""
        return {str(address): port.name for port in self._ports.values() for address in port.addresses}

    async def run(self) -> None:
        """Announce until cancelled."""
        for informer in (self._services, self._nodes, self._slices):
            informer.add_handler(self._changed, self._updated, self._changed)
        await self._informers.start()
        for informer in (self._services, self._nodes, self._slices):
            await informer.wait_synced()
        self._watch.start()
        self._wake.set()
        try:
            while True:
                await self._wake.wait()
                self._wake.clear()
                try:
                    self._apply(self._wanted())
                except OSError as error:
                    log.warning("load balancer addresses are not announced", error=str(error))
        finally:
            self._watch.close()
            for index in list(self._ports):
                self._close_port(index)
            await self._tasks.close()
            await self._recorder.close()

    def _changed(self, _obj: Object) -> None:
        self._wake.set()

    def _updated(self, old: Object, new: Object) -> None:
        if old.get("kind") == "Node" or "nodeInfo" in (old.get("status") or {}):
            # Heartbeats change a node's status all the time.
            if _takes_part(old) != _takes_part(new) or internal_addresses(old) != internal_addresses(new):
                self._wake.set()
        elif any(old.get(part) != new.get(part) for part in ("spec", "status", "endpoints")):
            self._wake.set()

    def _wanted(self) -> dict[Address, Object]:
        """Addresses that this node answers for, and their Services."""
        found: dict[Address, Object] = {}
        nodes = self._nodes.list()
        for service in self._services.list():
            if is_ours(service) and (addresses := ingress_addresses(service)):
                if announcing_node(service, self._slices.by_index("service", object_key(service)), nodes, self._machine) == self._node_name:
                    found.update((ip_address(address), service) for address in addresses)
        return found

    def _apply(self, wanted: dict[Address, Object]) -> None:
        with open_netlink(self._netns) as netlink:
            links = {link.index: link for link in rtnl.links(netlink)}
            addresses, routes = rtnl.addresses(netlink), rtnl.routes(netlink)
        ours = {index for index, link in links.items() if link.name.startswith(self._own) or link.name == "lo"}
        for index in list(self._ports):
            # An interface that went and came back is another one, though it may have the same number.
            if index not in links or links[index].name != self._ports[index].name or bytes.fromhex(links[index].mac.replace(":", "")) != self._ports[index].mac:
                self._close_port(index)
        places: dict[Address, int] = {}
        for address in wanted:
            named = next((index for index, link in links.items() if link.name == self._interface), None)
            found = named if self._interface != "auto" else leading_interface(address, addresses, routes, ours)
            if found is not None and links[found].up:
                places[address] = found
        for index, port in list(self._ports.items()):
            for address in [address for address in port.addresses if places.get(address) != index]:
                port.leave(address)
                del port.addresses[address]
            if not port.addresses:
                self._close_port(index)
        fresh: list[tuple[_Port, Address]] = []
        for address, index in places.items():
            port = self._ports.get(index) or self._open_port(index, links[index].name)
            if address not in port.addresses:
                port.join(address)
                port.addresses[address] = object_key(wanted[address])
                fresh.append((port, address))
                self._recorder.event(wanted[address], "Normal", "nodeAssigned", f'announcing {address} from node "{self._node_name}" on {port.name}')
        if fresh:
            self._tasks.spawn(self._tell(fresh), "announce addresses")

    async def _tell(self, fresh: list[tuple[_Port, Address]]) -> None:
        for attempt in range(2):
            if attempt:
                await asyncio.sleep(_AGAIN_SECONDS)
            for port, address in fresh:
                if address in port.addresses:
                    for frame in announcements(address, port.mac):
                        port.send(frame)

    def _open_port(self, index: int, name: str) -> _Port:
        port = self._ports[index] = _Port(index, name, self._netns)
        for sock in (port.arp, port.ndp):
            asyncio.get_running_loop().add_reader(sock.fileno(), self._readable, port, sock)
        return port

    def _close_port(self, index: int) -> None:
        port = self._ports.pop(index)
        for sock in (port.arp, port.ndp):
            asyncio.get_running_loop().remove_reader(sock.fileno())
        port.addresses.clear()
        port.close()

    def _readable(self, port: _Port, sock: socket.socket) -> None:
        for _ in range(_BURST):
            try:
                frame, source = sock.recvfrom(2048)
            except OSError as error:
                if error.errno not in (errno.EAGAIN, errno.EINTR):
                    log.debug("reading questions for addresses failed", interface=port.name, error=str(error))
                return
            if source[2] == socket.PACKET_OUTGOING:
                continue
            address = asked_for(frame)
            if address is not None and address in port.addresses:
                self.answered += 1
                port.send(answer(frame, address, port.mac))
