"""Addresses of the pods of one node: handed out from its pod CIDRs, remembered in files that survive a killed process.

Role: used by `podnet` alone, from its worker thread. One small file per sandbox, written beside and renamed, so that a
crash leaves either the whole lease or none. The directory lies on a tmpfs (/run): leases end with the boot, as the
namespaces they belong to do.
Invariants: an address belongs to one sandbox at most; a freed address is the last to be used again, because peers may
still hold connections to its former owner.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from ipaddress import IPv4Network, ip_address, ip_network
from pathlib import Path

from knarr.network.rtnl import Address, Network


class PoolExhausted(Exception):
    """Every address of a pod CIDR is in use; the text names the CIDR."""


@dataclass(slots=True)
class Lease:
    """What one sandbox holds: its addresses, the node-side link, and its host ports."""

    sandbox_id: str
    ips: list[str]
    link: str
    pod: str = ""
    ports: list[list[str | int]] = field(default_factory=list)
    """[protocol, host ip, host port, pod ip, container port] each."""
    netns: str = ""
    shaped: bool = False
    """Whether its link limits what the pod receives."""


def gateway_of(network: Network) -> Address:
    """The node's own address in a pod CIDR: the first one."""
    return network.network_address + 1


class Pool:
    """The free addresses of one network, next-fit."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self.used: set[int] = set()
        base = int(network.network_address)
        # The first is the network's name, the second the node's own; IPv4's last is broadcast.
        self._first = base + 2
        self._last = int(network.broadcast_address) - (1 if isinstance(network, IPv4Network) else 0)
        self._next = self._first

    def take(self) -> Address:
        """The next free address. Raises PoolExhausted."""
        size = self._last - self._first + 1
        if size <= 0 or len(self.used) >= size:
            raise PoolExhausted(f"no address left in {self.network}")
        candidate = self._next
        while candidate in self.used:
            candidate = candidate + 1 if candidate < self._last else self._first
        self._next = candidate + 1 if candidate < self._last else self._first
        self.used.add(candidate)
        return ip_address(candidate) if self.network.version == 4 else ip_address(candidate.to_bytes(16, "big"))

    def mark(self, address: Address) -> bool:
        """Note an address as used; False when it is not of this network."""
        if address.version != self.network.version or address not in self.network:
            return False
        self.used.add(int(address))
        self._next = max(self._next, int(address) + 1) if int(address) < self._last else self._first
        return True

    def free(self, address: Address) -> None:
        """Give an address back; unknown ones are ignored."""
        if address.version == self.network.version:
            self.used.discard(int(address))


class AddressManager:
    """Leases of one node, kept in memory and in `directory`."""

    def __init__(self, directory: Path, networks: Sequence[str]) -> None:
        self._directory = directory
        self.leases: dict[str, Lease] = {}
        self.pools = [Pool(ip_network(network)) for network in networks]
        directory.mkdir(parents=True, exist_ok=True)
        self._load()

    def _load(self) -> None:
        for path in self._directory.iterdir():
            if path.name.startswith("."):
                path.unlink(missing_ok=True)
                continue
            try:
                lease = Lease(**json.loads(path.read_text()))
            except (ValueError, TypeError):
                # Not written by us in this form: an address nobody can name protects nobody.
                path.unlink(missing_ok=True)
                continue
            self.leases[lease.sandbox_id] = lease
            for text in lease.ips:
                any(pool.mark(ip_address(text)) for pool in self.pools)

    def set_networks(self, networks: Sequence[str]) -> None:
        """Change the CIDRs; leases outside the new ones stay until they are released."""
        if [str(pool.network) for pool in self.pools] == [str(ip_network(network)) for network in networks]:
            return
        self.pools = [Pool(ip_network(network)) for network in networks]
        for lease in self.leases.values():
            for text in lease.ips:
                any(pool.mark(ip_address(text)) for pool in self.pools)

    def acquire(self, sandbox_id: str, link: str, pod: str, netns: str = "", *, shaped: bool = False) -> Lease:
        """One address per family for a sandbox, durable on return; the same again for a known sandbox.

        Raises:
          PoolExhausted: some family has none left; nothing was taken.
        """
        known = self.leases.get(sandbox_id)
        if known is not None:
            return known
        taken: list[tuple[Pool, Address]] = []
        try:
            for pool in self.pools:
                taken.append((pool, pool.take()))
        except PoolExhausted:
            for pool, address in taken:
                pool.free(address)
            raise
        lease = Lease(sandbox_id, [str(address) for _pool, address in taken], link, pod, [], netns, shaped)
        self.leases[sandbox_id] = lease
        self.save(lease)
        return lease

    def save(self, lease: Lease) -> None:
        """Write a lease, replacing its former state at once."""
        temporary = self._directory / f".{lease.sandbox_id}"
        temporary.write_text(json.dumps(asdict(lease)))
        os.replace(temporary, self._directory / lease.sandbox_id)

    def release(self, sandbox_id: str) -> Lease | None:
        """Forget a sandbox; returns what it held, or None when it was unknown."""
        lease = self.leases.pop(sandbox_id, None)
        (self._directory / sandbox_id).unlink(missing_ok=True)
        if lease is not None:
            for text in lease.ips:
                for pool in self.pools:
                    pool.free(ip_address(text))
        return lease

    def strangers(self, living: Collection[str]) -> list[str]:
        """Sandboxes that hold a lease and are not among the living."""
        return [sandbox_id for sandbox_id in self.leases if sandbox_id not in living]
