"""Connection tracking entries: list flows, delete single ones, add living connections, over netlink.

Role: the proxy calls `forget_stale` after it has taken UDP endpoints away: UDP has no end of connection, so an entry
would send a client's packets to an address that nobody, or somebody else, answers at, for as long as the client keeps
sending. Blocking; called from a worker thread.
Source: pkg/proxy/conntrack/cleanup.go; linux/netfilter/nfnetlink_conntrack.h.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Callable, Iterable
from ipaddress import ip_address

from knarr.network.direct.adoption import Connection
from knarr.network.netlink import NLM_F_CREATE, NLM_F_EXCL, Message, NetlinkError, NetlinkSocket, attribute, attributes, be32, nested, u8

_SUBSYSTEM = 1 << 8
_NEW, _GET, _DELETE = _SUBSYSTEM, _SUBSYSTEM | 1, _SUBSYSTEM | 2
_TUPLE_ORIGINAL, _TUPLE_REPLY, _STATUS, _ZONE, _STATUS_MASK = 1, 2, 3, 18, 26
TCP, UDP = 6, 17
_SEEN_REPLY, _ASSURED, _CONFIRMED, _SOURCE_TRANSLATED, _TARGET_TRANSLATED = 2, 4, 8, 0x10, 0x20
_ESTABLISHED, _BE_LIBERAL = 3, 8
_ADOPTED_SECONDS = 86400


class Flow:
    """One tracked flow: the original direction's target, the reply's source, and what is needed to delete it."""

    __slots__ = (
        "family",
        "original",
        "reply_address",
        "reply_port",
        "source_address",
        "target_address",
        "target_port",
        "zone",
    )

    def __init__(self, family: int, original: bytes, zone: bytes | None) -> None:
        self.family = family
        self.original = original
        self.zone = zone
        self.source_address = self.target_address = self.reply_address = ""
        self.target_port = self.reply_port = 0


def _tuple(data: memoryview) -> tuple[str, str, int, int, int]:
    """source, target, protocol, source port, target port."""
    source = target = ""
    protocol = source_port = target_port = 0
    for kind, content in attributes(data):
        if kind == 1:
            for inner, packed in attributes(content):
                if inner in (1, 3):
                    source = str(ip_address(bytes(packed)))
                elif inner in (2, 4):
                    target = str(ip_address(bytes(packed)))
        elif kind == 2:
            for inner, packed in attributes(content):
                if inner == 1:
                    protocol = packed[0]
                elif inner == 2:
                    source_port = struct.unpack(">H", packed)[0]
                elif inner == 3:
                    target_port = struct.unpack(">H", packed)[0]
    return source, target, protocol, source_port, target_port


def udp_flows(netlink: NetlinkSocket) -> list[Flow]:
    """All UDP flows of both families in the socket's namespace."""
    return _flows(netlink, lambda original: _protocol(original) == UDP)


def _flows(netlink: NetlinkSocket, wanted: Callable[[memoryview], bool], status: int = 0) -> list[Flow]:
    """Flows whose original tuple is wanted and that have one of the status bits, if any are given."""
    found: list[Flow] = []
    # Kernels before 5.15 do not choose by status, but send everything.
    chosen = be32(_STATUS, status) + be32(_STATUS_MASK, status) if status.bit_count() == 1 else b""
    for family in (socket.AF_INET, socket.AF_INET6):
        for body in netlink.dump(_GET, struct.pack("=BBH", family, 0, 0) + chosen, "listing tracked flows"):
            fields = dict(attributes(body, 4))
            if status and not int.from_bytes(fields.get(_STATUS, b""), "big") & status:
                continue
            original = fields.get(_TUPLE_ORIGINAL)
            reply = fields.get(_TUPLE_REPLY)
            if original is None or reply is None or not wanted(original):
                continue
            flow = Flow(family, bytes(original), bytes(fields[_ZONE]) if _ZONE in fields else None)
            flow.source_address, flow.target_address, _kind, _port, flow.target_port = _tuple(original)
            flow.reply_address, _target, _kind, flow.reply_port, _port = _tuple(reply)
            found.append(flow)
    return found


def _protocol(data: memoryview) -> int:
    for kind, content in attributes(data):
        if kind == 2:
            return next((packed[0] for inner, packed in attributes(content) if inner == 1), 0)
    return 0


def delete(netlink: NetlinkSocket, flow: Flow) -> None:
    """Delete one flow; one that has gone meanwhile is fine."""
    body = struct.pack("=BBH", flow.family, 0, 0) + nested(_TUPLE_ORIGINAL, flow.original)
    if flow.zone is not None:
        body += attribute(_ZONE, flow.zone)
    try:
        netlink.send(Message(_DELETE, 0, body, "deleting a tracked flow"))
    except NetlinkError as error:
        if error.errno != errno.ENOENT:
            raise


def forget_stale(netlink: NetlinkSocket, is_stale: Callable[[Flow], bool]) -> int:
    """Delete the UDP flows that a predicate calls stale; returns how many."""
    stale = [flow for flow in udp_flows(netlink) if is_stale(flow)]
    for flow in stale:
        delete(netlink, flow)
    return len(stale)


def forget_translated(netlink: NetlinkSocket, address: str) -> int:
    """Delete flows of any protocol that were led to an address that is gone, so that their ends notice; returns how many."""
    stale = [flow for flow in _flows(netlink, lambda _original: True) if flow.reply_address == address != flow.target_address]
    for flow in stale:
        delete(netlink, flow)
    return len(stale)


def translated_tcp_sources(netlink: NetlinkSocket) -> set[str]:
    """Who began TCP connections whose other end, or whose own address, is another on the way."""
    found: set[str] = set()
    for translated in (_SOURCE_TRANSLATED, _TARGET_TRANSLATED):
        found |= {flow.source_address for flow in _flows(netlink, lambda original: _protocol(original) == TCP, translated)}
    return found


def adopt(netlink: NetlinkSocket, connections: Iterable[Connection]) -> None:
    """Track living TCP connections that were not tracked so far; those that are stay as they are."""
    messages = []
    for connection in connections:
        family = socket.AF_INET6 if ":" in connection.source else socket.AF_INET
        there = _tcp_tuple(connection.source, connection.source_port, connection.target, connection.target_port)
        back = _tcp_tuple(connection.target, connection.target_port, connection.source, connection.source_port)
        liberal = struct.pack("=BB", _BE_LIBERAL, _BE_LIBERAL)
        state = nested(1, u8(1, _ESTABLISHED), attribute(4, liberal), attribute(5, liberal))
        body = struct.pack("=BBH", family, 0, 0) + nested(_TUPLE_ORIGINAL, *there) + nested(_TUPLE_REPLY, *back)
        body += be32(_STATUS, _SEEN_REPLY | _ASSURED | _CONFIRMED) + nested(4, state) + be32(7, _ADOPTED_SECONDS)
        messages.append(Message(_NEW, NLM_F_CREATE | NLM_F_EXCL, body, "tracking a living connection"))
    for start in range(0, len(messages), 100):
        netlink.send(*messages[start : start + 100], ignore=(errno.EEXIST,))


def _tcp_tuple(source: str, source_port: int, target: str, target_port: int) -> tuple[bytes, bytes]:
    kinds = (3, 4) if ":" in source else (1, 2)
    addresses = (attribute(kind, ip_address(text).packed) for kind, text in zip(kinds, (source, target), strict=True))
    ports = (attribute(kind, struct.pack(">H", port)) for kind, port in ((2, source_port), (3, target_port)))
    return nested(1, *addresses), nested(2, u8(1, TCP), *ports)
