"""Service addresses and node ports: what is free is derived from the objects themselves.

An address is claimed by creating its IPAddress object (the store's compare-and-swap decides between two claimants, also
between two API servers); node ports are claimed in memory over what the Services in the cache hold, or where servers share a store in that
(sharedports.py). Dynamic claims leave
the lower band of each range to people who choose by hand, while there is room above.

Source: pkg/registry/core/service/ipallocator, portallocator; KEP-1880, KEP-3070, KEP-3668.
"""

from __future__ import annotations

import ipaddress
import random
from collections.abc import Iterable

from knarr.api import errors
from knarr.api.types import Object
from knarr.apiserver.store import ResourceStore

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
TRIES = 64


class AllocationError(Exception):
    """The claim cannot be granted; the text is upstream's."""


def band(size: int) -> int:
    """How many addresses at the start are kept for static assignment."""
    return 0 if size < 16 else min(max(16, size // 16), 256)


class AddressAllocator:
    """Claims service addresses of one family."""

    def __init__(self, family: str, addresses: ResourceStore, ranges: list[Network]) -> None:
        self.family = family
        self._addresses = addresses
        self._ranges = ranges
        """Ranges of the flags; ServiceCIDR objects add to them."""

    def ranges(self, service_cidrs: ResourceStore) -> list[Network]:
        found = list(self._ranges)
        for obj in service_cidrs.list_nowait():
            if obj["metadata"].get("deletionTimestamp"):
                continue
            for text in (obj.get("spec") or {}).get("cidrs") or []:
                network = ipaddress.ip_network(text)
                if (network.version == 6) == (self.family == "IPv6") and network not in found:
                    found.append(network)
        return found

    async def claim(self, address: str, service: Object, ranges: list[Network], *, dry_run: bool) -> None:
        """Claim a given address. Raises AllocationError."""
        ip = ipaddress.ip_address(address)
        if not any(ip in network for network in ranges):
            names = ", ".join(str(network) for network in ranges)
            raise AllocationError(f"the provided IP ({address}) is not in the valid range. The range of valid IPs is {names}")
        if any(ip in network and _reserved(ip, network) for network in ranges):
            raise AllocationError(f"the provided IP ({address}) is not in the valid range. The range of valid IPs is {ranges[0]}")
        if not await self._try(str(ip), service, dry_run=dry_run):
            raise AllocationError("provided IP is already allocated")

    async def claim_next(self, service: Object, ranges: list[Network], *, dry_run: bool) -> str:
        """Claim any free address. Raises AllocationError when there is none."""
        taken = self._addresses.cache.objects
        for network in ranges:
            first, last = 1, network.num_addresses - 1 - (1 if network.version == 4 and network.num_addresses > 2 else 0)
            lower = band(network.num_addresses)
            for low, high in ((first + lower, last), (first, min(first + lower - 1, last))):
                if high < low:
                    continue
                for candidate in _candidates(low, high):
                    address = str(network[candidate])
                    if address not in taken and await self._try(address, service, dry_run=dry_run):
                        return address
        raise AllocationError("range is full")

    async def _try(self, address: str, service: Object, *, dry_run: bool) -> bool:
        if address in self._addresses.cache.objects:
            return False
        if dry_run:
            return True
        try:
            await self._addresses.create(address_object(address, self.family, service))
        except errors.StatusError as error:
            if errors.is_already_exists(error):
                return False
            raise
        return True

    async def release(self, address: str) -> None:
        """Give an address back."""
        await self._addresses.delete("", address)


def _reserved(ip: ipaddress.IPv4Address | ipaddress.IPv6Address, network: Network) -> bool:
    """The network's own address and, in IPv4, its broadcast address are not given away."""
    return ip == network.network_address or (network.version == 4 and ip == network.broadcast_address)


def _candidates(low: int, high: int) -> Iterable[int]:
    """A few random places first, then everything in order from a random start."""
    size = high - low + 1
    for _ in range(min(TRIES, size)):
        yield random.randint(low, high)
    start = random.randrange(size)
    for step in range(min(size, 1 << 20)):
        yield low + (start + step) % size


def address_object(address: str, family: str, service: Object) -> Object:
    metadata = service["metadata"]
    return {
        "metadata": {
            "name": address,
            "labels": {"ipaddress.kubernetes.io/ip-family": family, "ipaddress.kubernetes.io/managed-by": "ipallocator.k8s.io"},
        },
        "spec": {"parentRef": {"resource": "services", "namespace": metadata["namespace"], "name": metadata["name"]}},
    }  # fmt: skip


class PortAllocator:
    """Claims node ports, for one server alone: Services in the cache plus what is being claimed right now."""

    def __init__(self, first: int, last: int, services: ResourceStore) -> None:
        self.first, self.last = first, last
        self._claimed: dict[int, int] = {}
        for service in services.list_nowait():
            for port in node_ports_of(service):
                self.hold(port)

    def hold(self, port: int) -> None:
        self._claimed[port] = self._claimed.get(port, 0) + 1

    async def claim(self, port: int, *, dry_run: bool = False) -> None:
        """Claim a given port; a dry run, as upstream's, does not look at the range. Raises AllocationError."""
        if not dry_run and not self.first <= port <= self.last:
            raise self.outside()
        if port in self._claimed:
            raise AllocationError("provided port is already allocated")
        self.hold(port)

    def outside(self) -> AllocationError:
        """The refusal of a port outside of the range."""
        return AllocationError(f"provided port is not in the valid range. The range of valid ports is {self.first}-{self.last}")

    async def claim_next(self, *, dry_run: bool = False) -> int:
        """Claim any free port. Raises AllocationError."""
        for port in self.candidates():
            if port not in self._claimed:
                self.hold(port)
                return port
        raise AllocationError("range is full")

    def candidates(self) -> Iterable[int]:
        """Every port, in the order in which to try: the lower band is for people who choose by hand, while there is room above."""
        size = self.last - self.first + 1
        lower = min(max(16, size // 32), 128) if size >= 16 else 0
        for low, high in ((self.first + lower, self.last), (self.first, self.first + lower - 1)):
            if high >= low:
                yield from _candidates(low, high)

    def undo(self, port: int) -> None:
        """Give back a claim whose Service was not written."""
        self.release(port)

    def release(self, port: int) -> None:
        """Give back the port of a Service that is no more."""
        left = self._claimed.get(port, 0) - 1
        if left > 0:
            self._claimed[port] = left
        else:
            self._claimed.pop(port, None)


def node_ports_of(service: Object) -> set[int]:
    spec = service.get("spec") or {}
    ports = {port["nodePort"] for port in spec.get("ports") or [] if port.get("nodePort")}
    if spec.get("healthCheckNodePort"):
        ports.add(spec["healthCheckNodePort"])
    return ports
