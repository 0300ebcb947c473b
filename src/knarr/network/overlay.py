"""Ways to the pods of other nodes: plain routes where the other node is a neighbour, VXLAN where routers lie between.

Role: cluster runs one `NodeRoutes` per node beside the pod network. Every other Node's pod CIDRs lead to its
InternalIP; nothing is published, because the tunnel's hardware address of a node follows from its pod CIDR. Event
driven: a Node that comes, changes or goes moves routes at once.
Invariants: only routes through our tunnel device and routes to pod CIDRs that we made are touched; both sides decide
alike, as the tunnel device receives on every node that has one for anybody. Stopping leaves the routes (traffic goes on
during a restart); `cleanup` removes them.
Source: behaviour of flannel's vxlan backend with DirectRouting.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import ip_address, ip_network
from typing import Literal, TypeVar

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.api.resources import NODES
from knarr.api.types import Object
from knarr.client.informer import Informers
from knarr.network import rtnl
from knarr.network.netlink import GONE, Message, NetlinkError, NetlinkSocket
from knarr.network.netns import open_netlink, run_inside
from knarr.network.nftables import NftError, delete_table, run_script
from knarr.network.objects import is_address
from knarr.network.podnet import BridgeNetwork
from knarr.network.sysctl import write

log = get_logger(__name__)
T = TypeVar("T")

Mode = Literal["auto", "vxlan", "routes"]
OVERHEAD_BYTES = {4: 50, 6: 70}
_UNTRACKED = """table inet {table} {{}}
delete table inet {table}
table inet {table} {{
 chain come {{
  type filter hook prerouting priority raw; policy accept;
  udp dport {port} notrack
 }}
 chain go {{
  type filter hook output priority raw; policy accept;
  udp dport {port} notrack
 }}
}}
"""


@dataclass(frozen=True, slots=True)
class Peer:
    """Another node: its name, address and pod CIDRs."""

    name: str
    addresses: tuple[str, ...]
    pod_cidrs: tuple[str, ...]

    @property
    def address(self) -> str:
        """The primary address: the tunnel's other end."""
        return self.addresses[0]

    def address_of(self, version: int) -> str | None:
        """The first address of a family."""
        return next((address for address in self.addresses if (":" in address) == (version == 6)), None)


def read_peer(node: Object) -> Peer | None:
    """A Node as a peer; None while it lacks an address or pod CIDRs."""
    spec = node.get("spec") or {}
    cidrs = tuple(spec.get("podCIDRs") or ([spec["podCIDR"]] if spec.get("podCIDR") else []))
    listed = (node.get("status") or {}).get("addresses") or ()
    found = tuple(item["address"] for item in listed if item.get("type") == "InternalIP" and is_address(item.get("address")))
    return Peer(node["metadata"]["name"], found, cidrs) if found and cidrs else None


def tunnel_mac(pod_cidr: str) -> str:
    """Hardware address of a node's tunnel device."""
    network = ip_network(pod_cidr)
    raw = network.network_address.packed
    tail = raw[:4] if network.version == 4 else bytes(a ^ b for a, b in zip(raw[4:8], raw[10:14], strict=True))
    return "0e:6b:" + tail.hex(":")


class NodeRoutes:
    """See the module.

    Args:
      network: This node's pod network (its CIDRs, gateways, namespace).
      mode: "routes" never tunnels, "vxlan" always, "auto" tunnels to peers that are not on a directly attached network.
      next_hops: Node name to the neighbour (one, or one of each family) that leads there without a tunnel, for nodes that share this machine.
      device: Name of the tunnel device, and of the nf_tables table beside it.
      behind: Name of the node through whose tunnel a peer is reached that has no address of its own out there; "" for all others.
    """

    def __init__(
        self,
        informers: Informers,
        network: BridgeNetwork,
        *,
        node_name: str,
        mode: Mode = "auto",
        next_hops: Mapping[str, str | Sequence[str]] | None = None,
        device: str = "knp-vx",
        vni: int = 4040,
        port: int = 8472,
        behind: Callable[[Peer], str] = lambda peer: "",
    ) -> None:
        self._informers = informers
        self._nodes = informers.get(NODES)
        self._network = network
        self._node_name = node_name
        self._mode: Mode = mode
        self._next_hops = {name: (hop,) if isinstance(hop, str) else tuple(hop) for name, hop in (next_hops or {}).items()}
        self._device, self._vni, self._port = device, vni, port
        self._behind = behind
        self._peers: dict[str, Peer] = {}
        self._applied: dict[str, Peer] = {}
        self._own: Peer | None = None
        self._moved = False
        """Our own address changed: tunnel and routes have to be made anew."""
        self._wake = asyncio.Event()
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="routes")

    async def run(self) -> None:
        """Keep the routes until cancelled; the pod network must have its CIDRs."""
        self._nodes.add_handler(self._seen, lambda _old, new: self._seen(new), self._gone)
        await self._informers.start()
        await self._nodes.wait_synced()
        backoff = Backoff(0.2, 30.0)
        self._wake.set()
        while True:
            await self._wake.wait()
            self._wake.clear()
            try:
                await self._in_worker(self._apply)
                backoff.reset()
            except OSError as error:
                delay = backoff.next_seconds()
                log.warning("routes to other nodes are incomplete, will retry", delay_seconds=delay, error=str(error))
                await asyncio.sleep(delay)
                self._wake.set()

    async def cleanup(self) -> None:
        """Remove our routes and the tunnel device."""
        self._peers = {}
        await self._in_worker(self._apply)
        await self._in_worker(self._remove_device)

    async def _in_worker(self, function: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, function))

    def _seen(self, node: Object) -> None:
        name = node["metadata"]["name"]
        peer = read_peer(node)
        if name == self._node_name:
            self._moved = self._moved or (self._own is not None and peer is not None and peer.addresses != self._own.addresses)
            self._own = peer or self._own
            if self._moved:
                self._wake.set()
            return
        if peer is None or self._peers.get(name) == peer:
            return
        self._peers[name] = peer
        self._wake.set()

    def _gone(self, node: Object) -> None:
        if self._peers.pop(node["metadata"]["name"], None) is not None:
            self._wake.set()

    # In the worker thread

    def _apply(self) -> None:
        if self._moved:
            self._moved = False
            self._remove_device()
            self._applied = {}
        with open_netlink(self._network.netns) as netlink:
            self._drop_stale_device(netlink)
            # A peer behind another comes after it and moves with it.
            wanted = dict(sorted(self._peers.items(), key=lambda item: bool(self._behind(item[1]))))
            for name, peer in list(self._applied.items()):
                end = self._behind(peer)
                if end and wanted.get(end) != self._applied.get(end):
                    self._remove(netlink, peer)
                    del self._applied[name]
            for name, peer in list(self._applied.items()):
                if wanted.get(name) != peer:
                    self._remove(netlink, peer)
                    del self._applied[name]
            failure: OSError | None = None
            for name, peer in wanted.items():
                if name in self._applied:
                    continue
                try:
                    self._add(netlink, peer)
                    self._applied[name] = peer
                except OSError as error:
                    failure = failure or error
            if failure is not None:
                raise failure

    def _next_hop(self, netlink: NetlinkSocket, peer: Peer, version: int) -> tuple[int, rtnl.Address] | None:
        """(link, neighbour) that leads to a peer without a tunnel; None when there is no such way."""
        known = (hop for hop in self._next_hops.get(peer.name, ()) if (":" in hop) == (version == 6))
        address = next(known, None) or peer.address_of(version)
        if self._mode == "vxlan" or address is None or (":" in address) != (version == 6):
            return None
        target = ip_address(address)
        best: rtnl.Route | None = None
        for route in rtnl.routes(netlink):
            if route.destination.version == target.version and target in route.destination:
                if best is None or (route.destination.prefixlen, -route.priority) > (best.destination.prefixlen, -best.priority):
                    best = route
        if best is None or (best.gateway is not None and self._mode != "routes"):
            return None
        return best.index, best.gateway or target

    def _add(self, netlink: NetlinkSocket, peer: Peer) -> None:
        gateways = {4 if "." in text else 6: ip_address(text) for text in self._network.gateways}
        messages: list[Message] = []
        for cidr in peer.pod_cidrs:
            network = ip_network(cidr)
            source = gateways.get(network.version)
            if source is None:
                continue
            hop = self._next_hop(netlink, peer, network.version)
            if hop is None and self._mode == "routes":
                raise NetlinkError(errno.EHOSTUNREACH, f"no way to node {peer.name} at {peer.address}")
            if hop is not None:
                messages.append(rtnl.add_route(network, index=hop[0], gateway=hop[1], source=source, onlink=True))
                self._tell_direct(cidr)
            else:
                messages += self._tunnel(netlink, peer, network, source)
        netlink.send(*messages)

    def _tell_direct(self, cidr: str, mac: str = "", device: rtnl.Link | None = None) -> None:
        if (direct := self._network.direct) is None:
            return
        if device is None:
            direct.set_peer(cidr)
        else:
            direct.set_peer(cidr, device.index, mac, device.mac, device.mtu)

    def _drop_stale_device(self, netlink: NetlinkSocket) -> None:
        """A device of an earlier life of this node, whose pod CIDR was another, would refuse what is sent to this one."""
        try:
            found = rtnl.link(netlink, self._device)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise
            return
        if found.mac != tunnel_mac(self._network.pod_cidrs[0]):
            netlink.send(rtnl.delete_link(self._device), ignore=GONE)
            self._applied = {}

    def _tunnel(self, netlink: NetlinkSocket, peer: Peer, network: rtnl.Network, source: rtnl.Address) -> list[Message]:
        end = self._peers.get(self._behind(peer)) or peer
        index = self._ensure_device(netlink, end)
        mac = tunnel_mac(end.pod_cidrs[0])
        self._tell_direct(str(network), mac, rtnl.link(netlink, self._device))
        # The peer's own address in its pod CIDR serves as the neighbour behind the tunnel.
        neighbour = network.network_address + 1
        return [
            rtnl.add_fdb(index, mac, ip_address(end.address)),
            rtnl.add_neighbour(index, neighbour, mac),
            rtnl.add_route(network, index=index, gateway=neighbour, source=source, onlink=True),
        ]

    def _ensure_device(self, netlink: NetlinkSocket, peer: Peer) -> int:
        try:
            return self._watched(netlink, rtnl.link(netlink, self._device).index)
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise
        local = self._own_address(netlink, ip_address(peer.address))
        mtu = self._network.uplink_mtu(netlink) - OVERHEAD_BYTES[local.version]
        mac = tunnel_mac(self._network.pod_cidrs[0])
        netlink.send(rtnl.add_vxlan(self._device, vni=self._vni, port=self._port, mtu=mtu, mac=mac, local=local))
        run_inside(self._network.netns, lambda: write(f"net/ipv6/conf/{self._device}/disable_ipv6", "0"))
        self._leave_untracked()
        return self._watched(netlink, rtnl.link(netlink, self._device).index)

    def _watched(self, netlink: NetlinkSocket, index: int) -> int:
        if (direct := self._network.direct) is not None:
            try:
                direct.watch_tunnel(netlink, index)
            except NetlinkError as error:
                # What comes by the tunnel takes the IP stack then.
                log.warning("the kernel takes no program at the tunnel", device=self._device, error=str(error))
        return index

    def _leave_untracked(self) -> None:
        """Keep the tunnel's own packets out of connection tracking: each flow inside would be a connection of its own outside, too.

        Only speed depends on it, so a kernel or a firewall that takes the table away takes nothing else.
        """
        try:
            run_script(_UNTRACKED.format(table=self._device, port=self._port), self._network.netns)
        except NftError as error:
            log.warning("the tunnel's packets are tracked as connections", device=self._device, error=str(error))

    def _own_address(self, netlink: NetlinkSocket, towards: rtnl.Address) -> rtnl.Address:
        own = self._nodes.get(None, self._node_name)
        peer = read_peer(own) if own is not None else None
        if peer is not None and ip_address(peer.address).version == towards.version:
            return ip_address(peer.address)
        links = {route.index for route in rtnl.routes(netlink) if route.destination.prefixlen == 0}
        for index, interface, scope in rtnl.addresses(netlink):
            if index in links and scope == 0 and interface.version == towards.version:
                return interface.ip
        raise NetlinkError(errno.EADDRNOTAVAIL, "no address of this node for the tunnel")

    def _remove(self, netlink: NetlinkSocket, peer: Peer) -> None:
        messages = [rtnl.delete_route(ip_network(cidr)) for cidr in peer.pod_cidrs]
        if (direct := self._network.direct) is not None:
            for cidr in peer.pod_cidrs:
                direct.drop_peer(cidr)
        try:
            index = rtnl.link(netlink, self._device).index
            messages.append(rtnl.delete_fdb(index, tunnel_mac(peer.pod_cidrs[0]), ip_address(peer.address)))
            messages += [rtnl.delete_neighbour(index, ip_network(cidr).network_address + 1) for cidr in peer.pod_cidrs]
        except NetlinkError as error:
            if error.errno != errno.ENODEV:
                raise
        netlink.send(*messages, ignore=GONE)

    def _remove_device(self) -> None:
        with open_netlink(self._network.netns) as netlink:
            netlink.send(rtnl.delete_link(self._device), ignore=GONE)
        delete_table(self._device, self._network.netns)
