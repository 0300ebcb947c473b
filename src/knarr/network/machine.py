"""Which nodes share a machine: the first is the machine itself, further ones are network namespaces of it.

Role: what comes from outside to a LoadBalancer or external address always reaches the machine's own node. Under the Local
traffic policy the service proxy there, and whoever decides which node announces an address, count the endpoints of the
further nodes as that node's: ways lead there and back through the machine, so the client's address can be kept.
Invariants: told by addresses alone, so that every node of the cluster judges alike, and at once when a node comes or goes.
"""

from __future__ import annotations

from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_address

from knarr.api.types import Object


@dataclass(frozen=True, slots=True)
class Machine:
    """A machine that runs several nodes.

    Attributes:
      node: Name of the node that is the machine itself.
      network: The addresses of its further nodes.
    """

    node: str
    network: IPv4Network | IPv6Network

    def holds(self, node: Object) -> bool:
        """Whether a Node is one of the further nodes."""
        if node["metadata"]["name"] == self.node:
            return False
        return any(self._covers(address) for address in internal_addresses(node))

    def _covers(self, address: str) -> bool:
        try:
            return ip_address(address) in self.network
        except ValueError:  # statuses are written by others and may hold anything
            return False


def internal_addresses(node: Object) -> tuple[str, ...]:
    """The addresses by which a Node's status says other nodes reach it, as they are written there."""
    listed = (node.get("status") or {}).get("addresses") or ()
    return tuple(item["address"] for item in listed if item.get("type") == "InternalIP" and item.get("address"))
