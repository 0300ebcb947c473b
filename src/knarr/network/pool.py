"""Pools of addresses for LoadBalancer Services: networks and ranges. Pure.

Role: the load balancer controller takes addresses from a `Pool`, the pod network routes its `networks`, the command line
checks what a user wrote with `parse`.
Invariants: of a network the first and last address are never given out, as some clients take them for broadcasts; of a
range "FIRST-LAST" every address is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network, summarize_address_range

from knarr.network.rtnl import Address

_LONGEST = 65_536


@dataclass(frozen=True, slots=True)
class Range:
    """Addresses of one family from `first` to `last`."""

    version: int
    first: int
    last: int

    def __contains__(self, address: Address) -> bool:
        return address.version == self.version and self.first <= int(address) <= self.last

    def address(self, number: int) -> Address:
        """A number of the range as an address."""
        return IPv4Address(number) if self.version == 4 else IPv6Address(number)


@dataclass(frozen=True, slots=True)
class Pool:
    """Several ranges, in the order in which they are used up."""

    ranges: tuple[Range, ...]

    def __contains__(self, address: object) -> bool:
        return isinstance(address, (IPv4Address, IPv6Address)) and any(address in part for part in self.ranges)

    def candidates(self, version: int) -> Iterator[str]:
        """Addresses of a family in turn, at most 65,536 of each range."""
        for part in self.ranges:
            if part.version == version:
                for number in range(part.first, min(part.last, part.first + _LONGEST - 1) + 1):
                    yield str(part.address(number))

    def has(self, version: int) -> bool:
        """Whether there are addresses of a family at all."""
        return any(part.version == version for part in self.ranges)


def _ends(text: str) -> tuple[Address, Address]:
    first, dash, last = text.partition("-")
    if dash:
        ends = ip_address(first.strip()), ip_address(last.strip())
        if ends[0].version != ends[1].version or int(ends[0]) > int(ends[1]):
            raise ValueError(f"{text!r} is not a range of addresses")
        return ends
    network = ip_network(text.strip())
    return network[0], network[-1]


def parse(texts: Iterable[str]) -> Pool:
    """Networks ("192.0.2.0/24") and ranges ("192.0.2.240-192.0.2.250"). Raises ValueError."""
    found = []
    for text in texts:
        first, last = _ends(text)
        edge = 0 if "-" in text or int(last) - int(first) < 2 else 1
        found.append(Range(first.version, int(first) + edge, int(last) - edge))
    return Pool(tuple(found))


def networks(texts: Iterable[str]) -> list[str]:
    """The networks that together are the pool, for routes."""
    out: list[str] = []
    for text in texts:
        first, last = _ends(text)
        if isinstance(first, IPv4Address) and isinstance(last, IPv4Address):
            out.extend(map(str, summarize_address_range(first, last)))
        elif isinstance(first, IPv6Address) and isinstance(last, IPv6Address):
            out.extend(map(str, summarize_address_range(first, last)))
    return out
