"""Which addresses this machine has, without asking anybody outside."""

from __future__ import annotations

import fcntl
import socket
import struct

SIOCGIFADDR = 0x8915


def primary_address() -> str:
    """The IPv4 address from which this machine reaches others; its first own one without a default route; "" if it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # documentation range: routes are looked up, nothing is sent
            address = str(probe.getsockname()[0])
            if not address.startswith("127."):
                return address
        except OSError:
            pass
    for _, name in socket.if_nameindex():
        address = interface_address(name)
        if address and not address.startswith("127.") and not name.startswith("knarr"):
            return address
    return ""


def primary_address6() -> str:
    """The IPv6 address from which this machine reaches others; "" without a way out by IPv6."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("2001:db8::1", 9))  # documentation range: routes are looked up, nothing is sent
            address = str(probe.getsockname()[0])
        except OSError:
            return ""
    return "" if address == "::1" or address.startswith("fe80:") else address


def interface_address(name: str) -> str:
    """First IPv4 address of an interface, "" when it has none."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
        except OSError:
            return ""
    return socket.inet_ntoa(answer[20:24])
