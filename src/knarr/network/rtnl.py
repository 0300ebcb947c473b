"""Links, addresses, routes, neighbours and queueing disciplines as netlink messages.

Role: pure constructors for `netlink.Message` plus a few reads, used by the pod network, the overlay and tests.
Callers send several messages in one datagram. Addresses are `ipaddress` objects.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network, ip_address

from knarr.network.netlink import (
    NLM_F_CREATE,
    NLM_F_EXCL,
    NLM_F_REPLACE,
    Message,
    NetlinkSocket,
    attribute,
    attributes,
    cstring,
    nested,
    text,
    u8,
    u32,
)

Address = IPv4Address | IPv6Address
Interface = IPv4Interface | IPv6Interface
Network = IPv4Network | IPv6Network

RTM_NEWLINK, RTM_DELLINK, RTM_GETLINK, RTM_SETLINK = 16, 17, 18, 19
RTM_NEWADDR, RTM_DELADDR, RTM_GETADDR = 20, 21, 22
RTM_NEWROUTE, RTM_DELROUTE, RTM_GETROUTE = 24, 25, 26
RTM_NEWNEIGH, RTM_DELNEIGH, RTM_GETNEIGH = 28, 29, 30
RTM_NEWQDISC, RTM_DELQDISC = 36, 37
RTM_NEWTFILTER = 44
_CLSACT, _CLSACT_INGRESS, _CLSACT_HANDLE, _ETH_P_ALL = 0xFFFFFFF1, 0xFFFFFFF2, 0xFFFF0000, 3
RTM_NEWTFILTER = 44
GROUP_LINK, GROUP_IPV4_ADDR, GROUP_IPV4_ROUTE, GROUP_IPV6_ADDR, GROUP_IPV6_ROUTE = 1, 5, 7, 9, 11

IFF_UP = 0x1
IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_MASTER, IFLA_LINKINFO, IFLA_NET_NS_FD, IFLA_AF_SPEC = 1, 3, 4, 10, 18, 28, 26
_IFLA_PROTINFO = 12
_IFLA_STATS64 = 23
_IFLA_GROUP = 27
_INFO_KIND, _INFO_DATA = 1, 2
_VETH_INFO_PEER = 1
_BRPORT_MODE, _BRPORT_LEARNING, _BRPORT_UNICAST_FLOOD, _BRPORT_ISOLATED = 4, 8, 9, 33
_INET_CONF = 1
_DEVCONF_ROUTE_LOCALNET = 26
_SCOPE_LINK = 253
_PROTO_STATIC = 4
_TABLE_MAIN = 254
_ONLINK = 4


def _ifinfo(index: int = 0, *, flags: int = 0, change: int = 0, family: int = 0) -> bytes:
    return struct.pack("=BxHiII", family, 0, index, flags, change)


def mac_bytes(mac: str) -> bytes:
    """Six bytes of "aa:bb:…"."""
    return bytes.fromhex(mac.replace(":", ""))


def family_of(address: Address | Network | Interface) -> int:
    """AF_INET or AF_INET6."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


def add_bridge(name: str, *, mac: str, mtu: int) -> Message:
    """Make a bridge that is up, without spanning tree (a pod's port forwards at once)."""
    data = nested(_INFO_DATA, u32(5, 0))
    body = _ifinfo(flags=IFF_UP, change=IFF_UP) + text(IFLA_IFNAME, name) + attribute(IFLA_ADDRESS, mac_bytes(mac)) + u32(IFLA_MTU, mtu)
    body += nested(IFLA_LINKINFO, text(_INFO_KIND, "bridge"), data)
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"adding bridge {name}")


def add_dummy(name: str) -> Message:
    """Make a dummy link that is up."""
    body = _ifinfo(flags=IFF_UP, change=IFF_UP) + text(IFLA_IFNAME, name) + nested(IFLA_LINKINFO, text(_INFO_KIND, "dummy"))
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"adding dummy {name}")


def add_veth(
    name: str,
    *,
    peer: str,
    peer_netns: int,
    mtu: int,
    peer_mac: str = "",
    master: int = 0,
    mac: str = "",
) -> Message:
    """Make a pair: `name` here, up and enslaved to `master`; `peer` in the namespace behind a descriptor, down.

    The kernel opens the peer before it knows its partner, so that one must be set up afterwards.
    """
    inner = _ifinfo() + text(IFLA_IFNAME, peer) + u32(IFLA_MTU, mtu) + u32(IFLA_NET_NS_FD, peer_netns)
    if peer_mac:
        inner += attribute(IFLA_ADDRESS, mac_bytes(peer_mac))
    body = _ifinfo(flags=IFF_UP, change=IFF_UP) + text(IFLA_IFNAME, name) + u32(IFLA_MTU, mtu)
    if mac:
        body += attribute(IFLA_ADDRESS, mac_bytes(mac))
    if master:
        body += u32(IFLA_MASTER, master)
    body += nested(IFLA_LINKINFO, text(_INFO_KIND, "veth"), nested(_INFO_DATA, nested(_VETH_INFO_PEER, inner)))
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"adding veth {name}")


def add_vxlan(name: str, *, vni: int, port: int, mtu: int, mac: str, local: Address) -> Message:
    """Make a VXLAN device without learning (all entries are ours), up."""
    data = [u32(1, vni), attribute(15, struct.pack(">H", port)), u8(7, 0)]
    data.append(attribute(4 if local.version == 4 else 17, local.packed))
    if local.version == 6:
        # The kernel wants checksums refused both ways to accept zero-checksum UDP over IPv6; leave them on: always valid.
        data.append(u8(18, 1))
    body = _ifinfo(flags=IFF_UP, change=IFF_UP) + text(IFLA_IFNAME, name) + u32(IFLA_MTU, mtu) + attribute(IFLA_ADDRESS, mac_bytes(mac))
    body += nested(IFLA_LINKINFO, text(_INFO_KIND, "vxlan"), nested(_INFO_DATA, *data))
    return Message(RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, body, f"adding vxlan {name}")


def set_up(index: int) -> Message:
    """Set a link up."""
    return Message(RTM_NEWLINK, 0, _ifinfo(index, flags=IFF_UP, change=IFF_UP), f"setting link {index} up")


def allow_localnet(index: int) -> Message:
    """Let 127.0.0.0/8 be routed through a link (host ports and node ports on the node's loopback)."""
    settings = nested(_INET_CONF, u32(_DEVCONF_ROUTE_LOCALNET, 1))
    body = _ifinfo(index) + nested(IFLA_AF_SPEC, nested(socket.AF_INET, settings))
    return Message(RTM_SETLINK, 0, body, f"allowing the loopback network on link {index}")


def host_network(address: Address) -> Network:
    """The network that holds one address alone."""
    return IPv4Network(address) if isinstance(address, IPv4Address) else IPv6Network(address)


def set_mtu(index: int, mtu: int) -> Message:
    """Change a link's MTU."""
    return Message(RTM_NEWLINK, 0, _ifinfo(index) + u32(IFLA_MTU, mtu), f"setting the MTU of link {index}")


def isolate_port(index: int) -> Message:
    """Bridge port options of a pod: isolated (pods reach each other through the node's IP stack only), no flooding to it."""
    protinfo = nested(_IFLA_PROTINFO, u8(_BRPORT_ISOLATED, 1), u8(_BRPORT_LEARNING, 1))
    return Message(RTM_SETLINK, 0, _ifinfo(index, family=socket.AF_BRIDGE) + protinfo, f"isolating port {index}")


def delete_link(name: str) -> Message:
    """Delete a link by name (a veth takes its peer along)."""
    return Message(RTM_DELLINK, 0, _ifinfo() + text(IFLA_IFNAME, name), f"deleting link {name}")


def delete_link_index(index: int) -> Message:
    """Delete a link by index."""
    return Message(RTM_DELLINK, 0, _ifinfo(index), f"deleting link {index}")


def set_group(name: str, group: int) -> Message:
    """Put a link into a numbered group."""
    return Message(RTM_SETLINK, 0, _ifinfo() + text(IFLA_IFNAME, name) + u32(_IFLA_GROUP, group), f"grouping link {name}")


def delete_group(group: int) -> Message:
    """Delete all links of a group together."""
    return Message(RTM_DELLINK, 0, _ifinfo() + u32(_IFLA_GROUP, group), "deleting a group of links")


def _address_message(kind: int, flags: int, index: int, interface: Interface, what: str) -> Message:
    # IFA_F_NODAD: duplicate address detection would keep the address unusable for a second.
    nodad = 0x02 if interface.version == 6 else 0
    scope = 0
    body = struct.pack("=BBBBi", family_of(interface), interface.network.prefixlen, nodad, scope, index)
    packed = interface.ip.packed
    body += attribute(2, packed) + attribute(1, packed)
    return Message(kind, flags, body, f"{what} address {interface} on link {index}")


def add_address(index: int, interface: Interface) -> Message:
    """Give a link an address; replaces one that is there already."""
    return _address_message(RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, index, interface, "adding")


def delete_address(index: int, interface: Interface) -> Message:
    """Take an address from a link."""
    return _address_message(RTM_DELADDR, 0, index, interface, "deleting")


def _route(kind: int, flags: int, destination: Network, what: str, *extra: bytes, scope: int = 0, onlink: bool = False) -> Message:
    body = struct.pack(
        "=BBBBBBBBI", family_of(destination), destination.prefixlen, 0, 0, _TABLE_MAIN, _PROTO_STATIC, scope, 1, _ONLINK if onlink else 0
    )
    if destination.prefixlen:
        body += attribute(1, destination.network_address.packed)
    return Message(kind, flags, body + b"".join(extra), f"{what} route {destination}")


def add_route(
    destination: Network,
    *,
    index: int,
    gateway: Address | None = None,
    onlink: bool = False,
    source: Address | None = None,
    mtu: int = 0,
) -> Message:
    """Add or replace a route in the main table, marked as static."""
    extra = [u32(4, index)]
    if gateway is not None:
        extra.append(attribute(5, gateway.packed))
    if source is not None:
        extra.append(attribute(7, source.packed))
    if mtu:
        extra.append(nested(8, u32(2, mtu)))
    scope = _SCOPE_LINK if gateway is None and destination.version == 4 else 0
    return _route(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, destination, "adding", *extra, scope=scope, onlink=onlink)


def delete_route(destination: Network, *, index: int = 0) -> Message:
    """Remove a route of the main table."""
    extra = [u32(4, index)] if index else []
    return _route(RTM_DELROUTE, 0, destination, "deleting", *extra)


def add_neighbour(index: int, address: Address, mac: str) -> Message:
    """Pin an address to a hardware address, so that nobody has to ask."""
    body = struct.pack("=BxHiHBB", family_of(address), 0, index, 0x80, 0, 0) + attribute(1, address.packed) + attribute(2, mac_bytes(mac))
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, body, f"adding neighbour {address}")


def delete_neighbour(index: int, address: Address) -> Message:
    """Forget a pinned neighbour."""
    body = struct.pack("=BxHiHBB", family_of(address), 0, index, 0, 0, 0) + attribute(1, address.packed)
    return Message(RTM_DELNEIGH, 0, body, f"deleting neighbour {address}")


def _fdb_body(index: int, mac: str, remote: Address) -> bytes:
    return struct.pack("=BxHiHBB", socket.AF_BRIDGE, 0, index, 0xC0, 0x02, 0) + attribute(2, mac_bytes(mac)) + attribute(1, remote.packed)


def add_fdb(index: int, mac: str, remote: Address) -> Message:
    """Tell a VXLAN device behind which host a hardware address is."""
    return Message(RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, _fdb_body(index, mac, remote), f"adding forwarding entry {mac} to {remote}")


def delete_fdb(index: int, mac: str, remote: Address) -> Message:
    """Remove a forwarding entry."""
    return Message(RTM_DELNEIGH, 0, _fdb_body(index, mac, remote), f"deleting forwarding entry {mac}")


def add_tbf(index: int, *, rate_bytes: int, burst_bytes: int, latency_seconds: float = 0.025) -> Message:
    """Shape what a link sends with a token bucket."""
    # struct tc_tbf_qopt: two rate specifications, limit, buffer, mtu; times in the kernel's 64 ns psched ticks.
    buffer_ticks = min(0xFFFFFFFF, burst_bytes * 1_000_000_000 // rate_bytes // 64)
    limit = int(rate_bytes * latency_seconds) + burst_bytes
    ratespec = struct.pack("=BBHhHI", 0, 1, 0, -1, 0, min(rate_bytes, 0xFFFFFFFF))
    parms = ratespec + struct.pack("=BBHhHI", 0, 0, 0, 0, 0, 0) + struct.pack("=III", min(limit, 0xFFFFFFFF), buffer_ticks, 0)
    options = [attribute(1, parms), u32(6, burst_bytes)]
    if rate_bytes > 0xFFFFFFFF:
        options.append(attribute(4, struct.pack("=Q", rate_bytes)))
    body = struct.pack("=BxHiIII", 0, 0, index, 0x10000, 0xFFFFFFFF, 0) + text(1, "tbf") + nested(2, *options)
    return Message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, body, f"shaping link {index}")


def classify(index: int, program: int, name: str) -> tuple[Message, Message]:
    """Let an eBPF program see, and say what becomes of, every packet that a link receives; replaces an earlier one."""
    place = struct.pack("=BxHiIII", 0, 0, index, _CLSACT_HANDLE, _CLSACT, 0) + text(1, "clsact")
    options = nested(2, u32(6, program), text(7, name), u32(8, 1))
    info = 1 << 16 | socket.htons(_ETH_P_ALL)
    entry = struct.pack("=BxHiIII", 0, 0, index, 1, _CLSACT_INGRESS, info) + text(1, "bpf") + options
    what = f"placing program {name} at link {index}"
    return (
        Message(RTM_NEWQDISC, NLM_F_CREATE | NLM_F_REPLACE, place, what),
        Message(RTM_NEWTFILTER, NLM_F_CREATE | NLM_F_REPLACE, entry, what),
    )


@dataclass(slots=True)
class Link:
    """One interface as the kernel lists it."""

    index: int
    name: str
    mac: str = ""
    mtu: int = 0
    up: bool = False
    master: int = 0
    kind: str = ""
    counters: tuple[int, ...] = field(default=())
    """rx packets, tx packets, rx bytes, tx bytes, rx errors, tx errors."""


def _link(body: memoryview) -> Link:
    _family, _type, index, flags, _change = struct.unpack_from("=BxHiII", body)
    link = Link(index, "", up=bool(flags & IFF_UP))
    for kind, value in attributes(body, 16):
        if kind == IFLA_IFNAME:
            link.name = cstring(value)
        elif kind == IFLA_ADDRESS:
            link.mac = bytes(value).hex(":")
        elif kind == IFLA_MTU:
            link.mtu = struct.unpack("=I", value)[0]
        elif kind == IFLA_MASTER:
            link.master = struct.unpack("=I", value)[0]
        elif kind == _IFLA_STATS64:
            link.counters = struct.unpack_from("=6Q", value)
        elif kind == IFLA_LINKINFO:
            link.kind = next((cstring(v) for k, v in attributes(value) if k == _INFO_KIND), "")
    return link


def links(netlink: NetlinkSocket) -> list[Link]:
    """All links of the socket's namespace."""
    return [_link(body) for body in netlink.dump(RTM_GETLINK, _ifinfo(), "listing links")]


def link(netlink: NetlinkSocket, name: str) -> Link:
    """One link by name. Raises NetlinkError (ENODEV) when there is none."""
    return _link(netlink.dump(RTM_GETLINK, _ifinfo() + text(IFLA_IFNAME, name), f"reading link {name}", flags=0)[0])


def addresses(netlink: NetlinkSocket) -> list[tuple[int, Interface, int]]:
    """All addresses as (link index, address with prefix, scope)."""
    found: list[tuple[int, Interface, int]] = []
    for body in netlink.dump(RTM_GETADDR, struct.pack("=BBBBi", 0, 0, 0, 0, 0), "listing addresses"):
        _family, prefix, _flags, scope, index = struct.unpack_from("=BBBBi", body)
        values = dict(attributes(body, 8))
        packed = values.get(2) or values.get(1)
        if packed is None:
            continue
        address = ip_address(bytes(packed))
        interface: Interface = IPv4Interface((address, prefix)) if isinstance(address, IPv4Address) else IPv6Interface((address, prefix))
        found.append((index, interface, scope))
    return found


@dataclass(slots=True)
class Route:
    """One unicast route of the main table."""

    destination: Network
    index: int
    gateway: Address | None = None
    source: Address | None = None
    protocol: int = 0
    priority: int = 0


def routes(netlink: NetlinkSocket, family: int = 0) -> list[Route]:
    """Routes of the main table."""
    found: list[Route] = []
    for body in netlink.dump(RTM_GETROUTE, struct.pack("=BBBBBBBBI", family, 0, 0, 0, 0, 0, 0, 0, 0), "listing routes"):
        route_family, length, _src, _tos, table, protocol, _scope, kind, _flags = struct.unpack_from("=BBBBBBBBI", body)
        if table != _TABLE_MAIN or kind != 1:
            continue
        values = dict(attributes(body, 12))
        raw = bytes(values[1]) if 1 in values else bytes(4 if route_family == socket.AF_INET else 16)
        base = ip_address(raw)
        destination: Network = IPv4Network((base, length)) if isinstance(base, IPv4Address) else IPv6Network((base, length))
        found.append(
            Route(
                destination,
                struct.unpack("=i", values[4])[0] if 4 in values else 0,
                ip_address(bytes(values[5])) if 5 in values else None,
                ip_address(bytes(values[7])) if 7 in values else None,
                protocol,
                struct.unpack("=I", values[6])[0] if 6 in values else 0,
            )
        )
    return found


def neighbours(netlink: NetlinkSocket, index: int) -> list[tuple[Address, str]]:
    """Pinned (permanent) neighbours of one link as (address, hardware address)."""
    found: list[tuple[Address, str]] = []
    for body in netlink.dump(RTM_GETNEIGH, struct.pack("=BxHiHBB", 0, 0, 0, 0, 0, 0), "listing neighbours"):
        _family, _pad, link_index, state, _flags, _type = struct.unpack_from("=BxHiHBB", body)
        if link_index != index or not state & 0x80:
            continue
        values = dict(attributes(body, 12))
        if 1 in values and 2 in values:
            found.append((ip_address(bytes(values[1])), bytes(values[2]).hex(":")))
    return found


def apply(netlink: NetlinkSocket, messages: Sequence[Message], *, ignore: tuple[int, ...] = ()) -> None:
    """Send a list of messages; see NetlinkSocket.send."""
    netlink.send(*messages, ignore=ignore)
