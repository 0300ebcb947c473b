"""Warnings about IP addresses and CIDRs older versions took and newer ones will not. Pure; used by this package.

Values here passed validation, which in the older fields takes leading zeros and IPv4-mapped IPv6 addresses.

Source: apimachinery util/validation/ip.go (GetWarningsForIP, GetWarningsForCIDR).
"""

import ipaddress

from knarr.api.addresses import Address, sloppy_ip, sloppy_network


def _strict(value: str) -> Address | None:
    """Return the address if it is written as newer fields demand, though maybe not canonically."""
    try:
        address = ipaddress.ip_address(value)
    except ValueError:
        return None
    return None if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None else address


def of_ip(path: str, value: str) -> list[str]:
    """Return the warnings for one address."""
    address = sloppy_ip(value)
    if address is None:
        return []
    strict = _strict(value)
    if strict is None:
        return [f'{path}: non-standard IP address "{value}" will be considered invalid in a future Kubernetes release: use "{address}"']
    if strict.version == 6 and str(strict) != value:
        return [f'{path}: IPv6 address "{value}" should be in RFC 5952 canonical format ("{strict}")']
    return []


def of_cidr(path: str, value: str) -> list[str]:
    """Return the warnings for one CIDR."""
    network = sloppy_network(value)
    head, _, length = value.partition("/")
    address = sloppy_ip(head)
    if network is None or address is None:
        return []
    warnings: list[str] = []
    if network.network_address != address:
        single = f"{address}/{128 if ':' in head else 32}"
        warnings.append(f'{path}: CIDR value "{value}" is ambiguous in this context (should be "{network}" or "{single}"?)')
    strict = _strict(head)
    if strict is None or length != str(int(length)):
        warnings.append(
            f'{path}: non-standard CIDR value "{value}" will be considered invalid in a future Kubernetes release: use "{network}"'
        )
    elif not warnings and strict.version == 6 and f"{strict}/{length}" != value:
        warnings.append(f'{path}: IPv6 CIDR value "{value}" should be in RFC 5952 canonical format ("{strict}/{length}")')
    return warnings
