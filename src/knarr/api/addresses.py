"""IP addresses and CIDRs as Go took them before 1.17, which most fields still accept. Pure; used by validation and warnings.

Source: k8s.io/utils/net (ParseIPSloppy, ParseCIDRSloppy), internal/third_party/forked/golang/net.
"""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def sloppy_ip(text: str) -> Address | None:
    """Parse an address; leading zeros are decimal, IPv4-mapped addresses are IPv4 addresses. None if it is none."""
    head, colon, tail = text.rpartition(":")
    if "." in tail:
        tail = ".".join(part.lstrip("0") or "0" if part.isdecimal() else part for part in tail.split("."))
    try:
        address = ipaddress.ip_address(head + colon + tail)
    except ValueError:
        return None
    if isinstance(address, ipaddress.IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


def sloppy_network(text: str) -> Network | None:
    """Parse a CIDR, whose address may have bits beyond the prefix; as sloppy_ip. None if it is none."""
    head, _, length_text = text.partition("/")
    address = sloppy_ip(head)
    if address is None or not length_text.isdecimal() or not length_text.isascii():
        return None
    length = int(length_text) - (96 if ":" in head and address.version == 4 else 0)
    if not 0 <= length <= address.max_prefixlen:
        return None
    return ipaddress.ip_network(f"{address}/{length}", strict=False)
