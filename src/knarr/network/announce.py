"""Frames that tell a local network where an address is: ARP and NDP, and the filters that let only questions through. Pure.

Role: used by `announcer`. Source: RFC 826, RFC 5227 (announcements), RFC 4861 (neighbour discovery).
"""

from __future__ import annotations

import struct
from ipaddress import IPv4Address, IPv6Address, ip_address

from knarr.network.rtnl import Address

ETHERTYPE_ARP, ETHERTYPE_IPV6 = 0x0806, 0x86DD
_ALL_NODES = IPv6Address("ff02::1")
_BROADCAST = b"\xff" * 6
_REQUEST, _REPLY = 1, 2
_ICMPV6, _SOLICITATION, _ADVERTISEMENT = 58, 135, 136
_SOLICITED, _OVERRIDE, _ROUTER = 0x40000000, 0x20000000, 0x80000000
_TARGET_LINK_ADDRESS = 2

ARP_FILTER = [(0x28, 0, 0, 20), (0x15, 0, 1, _REQUEST), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0)]
"""Classic BPF on a whole Ethernet frame: ARP requests only."""
NDP_FILTER = [(0x30, 0, 0, 20), (0x15, 0, 3, _ICMPV6), (0x30, 0, 0, 54), (0x15, 0, 1, _SOLICITATION), (0x06, 0, 0, 0xFFFF), (0x06, 0, 0, 0)]
"""As above: neighbour solicitations only."""


def solicited_node(address: IPv6Address) -> IPv6Address:
    """The group on which a host is asked for an address."""
    return IPv6Address(b"\xff\x02" + bytes(9) + b"\x01\xff" + address.packed[-3:])


def _group_mac(group: IPv6Address) -> bytes:
    return b"\x33\x33" + group.packed[-4:]


def _arp(target_mac: bytes, operation: int, mac: bytes, sender: IPv4Address, to_mac: bytes, to: IPv4Address) -> bytes:
    head = target_mac + mac + struct.pack(">H", ETHERTYPE_ARP)
    body = struct.pack(">HHBBH", 1, 0x0800, 6, 4, operation) + mac + sender.packed + to_mac + to.packed
    return (head + body).ljust(60, b"\0")


def _checksum(data: bytes) -> int:
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _advertisement(to_mac: bytes, to: IPv6Address, mac: bytes, address: IPv6Address, flags: int) -> bytes:
    body = struct.pack(">I", flags | _ROUTER) + address.packed + struct.pack(">BB", _TARGET_LINK_ADDRESS, 1) + mac
    pseudo = address.packed + to.packed + struct.pack(">II", len(body) + 4, _ICMPV6)
    checksum = _checksum(pseudo + struct.pack(">BBH", _ADVERTISEMENT, 0, 0) + body)
    message = struct.pack(">BBH", _ADVERTISEMENT, 0, checksum) + body
    packet = struct.pack(">IHBB", 6 << 28, len(message), _ICMPV6, 255) + address.packed + to.packed + message
    return to_mac + mac + struct.pack(">H", ETHERTYPE_IPV6) + packet


def announcements(address: Address, mac: bytes) -> list[bytes]:
    """What tells everybody, unasked, that an address is ours now."""
    if isinstance(address, IPv4Address):
        # Some hosts learn from requests only, some from replies only.
        return [_arp(_BROADCAST, operation, mac, address, _BROADCAST if operation == _REPLY else bytes(6), address) for operation in (_REQUEST, _REPLY)]
    return [_advertisement(_group_mac(_ALL_NODES), _ALL_NODES, mac, address, _OVERRIDE)]


def asked_for(frame: bytes) -> Address | None:
    """The address that a question is about; None when it is no question that is to be answered."""
    kind = struct.unpack_from(">H", frame, 12)[0] if len(frame) >= 14 else 0
    if kind == ETHERTYPE_ARP and len(frame) >= 42 and struct.unpack_from(">H", frame, 20)[0] == _REQUEST:
        # Announcements of others have the form of questions.
        return None if frame[28:32] == frame[38:42] else ip_address(frame[38:42])
    if kind == ETHERTYPE_IPV6 and len(frame) >= 78 and frame[20] == _ICMPV6 and frame[21] == 255 and frame[54] == _SOLICITATION:
        return ip_address(frame[62:78])
    return None


def answer(frame: bytes, address: Address, mac: bytes) -> bytes:
    """The answer to a question that `asked_for` understood."""
    if isinstance(address, IPv4Address):
        asker_mac, asker = frame[22:28], IPv4Address(frame[28:32])
        return _arp(asker_mac, _REPLY, mac, address, asker_mac, asker)
    source = IPv6Address(frame[22:38])
    if source.is_unspecified:
        # Somebody looks whether the address is free: everybody is told that it is not.
        return _advertisement(_group_mac(_ALL_NODES), _ALL_NODES, mac, address, _OVERRIDE)
    return _advertisement(frame[6:12], source, mac, address, _SOLICITED | _OVERRIDE)
