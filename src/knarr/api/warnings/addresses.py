"""Warnings about IP addresses and CIDRs older versions took and newer ones will not. Pure; used by this package.

Values here passed validation, which in the older fields takes leading zeros and IPv4-mapped IPv6 addresses.

Source: apimachinery util/validation/ip.go (GetWarningsForIP, GetWarningsForCIDR).
"""

import ipaddress

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _strict(value: str) -> Address | None:
    try:
        return ipaddress.ip_address(value)
    except ValueError:
        return None


def _sloppy(value: str) -> Address | None:
    """Parse as Go did before 1.17: leading zeros are decimal; mapped addresses are IPv4 addresses."""
    head, colon, tail = value.rpartition(":")
    if "." in tail:
        tail = ".".join(part.lstrip("0") or "0" if part.isdigit() else part for part in tail.split("."))
    address = _strict(head + colon + tail)
    if isinstance(address, ipaddress.IPv6Address):
        return None if address.scope_id else address.ipv4_mapped or address
    return address


def of_ip(path: str, value: str) -> list[str]:
    """Return the warnings for one address."""
    address = _sloppy(value)
    if address is None:
        return []
    strict = _strict(value)
    if strict is None or (isinstance(strict, ipaddress.IPv6Address) and strict.ipv4_mapped is not None):
        return [f'{path}: non-standard IP address "{value}" will be considered invalid in a future Kubernetes release: use "{address}"']
    if strict.version == 6 and str(strict) != value:
        return [f'{path}: IPv6 address "{value}" should be in RFC 5952 canonical format ("{strict}")']
    return []


def of_cidr(path: str, value: str) -> list[str]:
    """Return the warnings for one CIDR."""
    head, slash, length_text = value.partition("/")
    address = _sloppy(head)
    if address is None or not slash or not length_text.isdigit():
        return []
    strict = _strict(head)
    mapped = isinstance(strict, ipaddress.IPv6Address) and strict.ipv4_mapped is not None
    length = int(length_text) - (96 if ":" in head and address.version == 4 else 0)
    if not 0 <= length <= address.max_prefixlen:
        return []
    network = ipaddress.ip_network(f"{address}/{length}", strict=False)
    warnings: list[str] = []
    if network.network_address != address:
        single = f"{address}/{128 if ':' in head else 32}"
        warnings.append(f'{path}: CIDR value "{value}" is ambiguous in this context (should be "{network}" or "{single}"?)')
    if strict is None or mapped or length_text != str(int(length_text)):
        warnings.append(
            f'{path}: non-standard CIDR value "{value}" will be considered invalid in a future Kubernetes release: use "{network}"'
        )
    if not warnings and strict is not None and strict.version == 6 and f"{strict}/{length_text}" != value:
        warnings.append(f'{path}: IPv6 CIDR value "{value}" should be in RFC 5952 canonical format ("{strict}/{length_text}")')
    return warnings
