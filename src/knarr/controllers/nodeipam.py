"""Node IPAM: every node gets its own piece of the cluster's pod range.

Nodes that have a podCIDR keep it; it is marked as taken before the first allocation.
Source: pkg/controller/nodeipam/ipam/range_allocator.go, cidrset.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from knarr.aiokits.log import get_logger
from knarr.api.resources import NODES
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context

log = get_logger(__name__)

_IPV6_NODE_MASK = 64
Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class _Range:
    """One cluster range cut into equal pieces; pieces are handed out in turn."""

    def __init__(self, cluster: Network, node_mask: int, reserved: list[Network]) -> None:
        if node_mask < cluster.prefixlen:
            node_mask = cluster.prefixlen
        self.cluster = cluster
        self._mask = node_mask
        self._size = 1 << (cluster.max_prefixlen - node_mask)
        self._count = 1 << min(node_mask - cluster.prefixlen, 16)
        self._taken: set[int] = set()
        self._next = 0
        for network in reserved:
            self.occupy(network)

    def _pieces(self, network: Network) -> Iterator[int]:
        if network.version != self.cluster.version or not network.overlaps(self.cluster):
            return
        start = max(0, int(network.network_address) - int(self.cluster.network_address)) // self._size
        end = min(int(network.broadcast_address) - int(self.cluster.network_address), self._count * self._size - 1) // self._size
        yield from range(start, end + 1)

    def occupy(self, network: Network) -> None:
        self._taken.update(self._pieces(network))

    def release(self, network: Network) -> None:
        self._taken.difference_update(self._pieces(network))

    def allocate(self) -> str | None:
        """Take the next free piece; None when all are taken."""
        for offset in range(self._count):
            piece = (self._next + offset) % self._count
            if piece not in self._taken:
                self._taken.add(piece)
                self._next = piece + 1
                address = ipaddress.ip_address(int(self.cluster.network_address) + piece * self._size)
                return f"{address}/{self._mask}"
        return None


class NodeIPAMController:
    """Allocates spec.podCIDRs."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._nodes = ctx.nodes
        self._recorder = ctx.recorder("cidrAllocator")
        reserved = [ipaddress.ip_network(part) for part in ctx.config.service_cidr.split(",") if part]
        self._ranges = []
        for part in ctx.config.cluster_cidr.split(","):
            if part:
                network = ipaddress.ip_network(part)
                mask = ctx.config.node_cidr_mask_size if network.version == 4 else _IPV6_NODE_MASK
                self._ranges.append(_Range(network, mask, reserved))
        # One worker: two at once could take the same piece from a stale cache.
        self.controller = Controller("node-ipam-controller", self._reconcile, workers=1)
        self._nodes.add_handler(self._added, lambda old, new: self._updated(new), self._deleted)
        self._allocated: dict[str, list[str]] = {}

    async def run(self) -> None:
        await self.controller.run()

    def _added(self, node: Object) -> None:
        for cidr in (node.get("spec") or {}).get("podCIDRs") or ():
            for pool in self._ranges:
                pool.occupy(ipaddress.ip_network(cidr, strict=False))
        self._updated(node)

    def _updated(self, node: Object) -> None:
        if not (node.get("spec") or {}).get("podCIDR"):
            self.controller.queue.add(node["metadata"]["name"])

    def _deleted(self, node: Object) -> None:
        cidrs = (node.get("spec") or {}).get("podCIDRs") or self._allocated.get(node["metadata"]["name"], [])
        self._allocated.pop(node["metadata"]["name"], None)
        for cidr in cidrs:
            for pool in self._ranges:
                pool.release(ipaddress.ip_network(cidr, strict=False))
        # A piece became free: nodes that got none try again.
        for other in self._nodes:
            self._updated(other)

    async def _reconcile(self, name: str) -> None:
        node = self._nodes.get(None, name)
        if node is None or not self._ranges or (node.get("spec") or {}).get("podCIDR"):
            return
        cidrs = self._allocated.get(name)
        if cidrs is None:
            cidrs = []
            for pool in self._ranges:
                cidr = pool.allocate()
                if cidr is None:
                    for other, given in zip(self._ranges, cidrs, strict=False):
                        other.release(ipaddress.ip_network(given))
                    self._recorder.event(node, "Normal", "CIDRNotAvailable", f"Node {name} status is now: CIDRNotAvailable")
                    log.warning("no pod range left for node", node=name)
                    return
                cidrs.append(cidr)
            self._allocated[name] = cidrs
        await self._client.patch(NODES, name, None, {"spec": {"podCIDR": cidrs[0], "podCIDRs": cidrs}}, type="strategic")
