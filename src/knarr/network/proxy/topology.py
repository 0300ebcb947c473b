"""Which endpoints serve a Service port on this node: pure functions from EndpointSlices.

Role: called by `model` for every changed Service. Knows conditions, hints and locality; knows nothing of nftables.
Source: pkg/proxy/topology.go, pkg/proxy/endpointslicecache.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from knarr.api.types import Object


class Endpoint(NamedTuple):
    """One address and port behind a Service port."""

    ip: str
    port: int
    ready: bool
    serving: bool
    terminating: bool
    local: bool
    near: bool
    """On this node or on another of its machine."""
    zones: frozenset[str]
    nodes: frozenset[str]


@dataclass(frozen=True, slots=True)
class NodeView:
    """What the proxy knows of its own node."""

    name: str
    zone: str = ""
    siblings: frozenset[str] = frozenset()
    """On the node that is the machine itself: further nodes in namespaces of the machine, for which it stands towards the outside."""


@dataclass(frozen=True, slots=True)
class Backends:
    """Result for one Service port.

    any_endpoints tells whether the cluster has usable ones anywhere (then an empty local list means drop, not refuse).
    near are those that serve the machine's external addresses under the Local policy; without sibling nodes the local ones.
    """

    cluster: tuple[Endpoint, ...] = ()
    local: tuple[Endpoint, ...] = ()
    near: tuple[Endpoint, ...] = ()
    any_endpoints: bool = False


_NOTHING: frozenset[str] = frozenset()


def collect(
    slices: Iterable[Object], port_name: str, protocol: str, family: str, node: NodeView, publish_not_ready: bool
) -> list[Endpoint]:
    """Endpoints of all slices of one Service for one of its ports and one family, sorted, each address and port once.

    Args:
      family: "IPv4" or "IPv6", the slices' addressType.
    """
    found: dict[tuple[str, int], Endpoint] = {}
    for obj in slices:
        if obj.get("addressType") != family:
            continue
        for port in obj.get("ports") or ():
            number = port.get("port")
            if not number or (port.get("name") or "") != port_name or (port.get("protocol") or "TCP") != protocol:
                continue
            for item in obj.get("endpoints") or ():
                endpoint = _endpoint(item, number, node, publish_not_ready)
                if endpoint is None:
                    continue
                known = found.get((endpoint.ip, endpoint.port))
                # While a pod moves between slices it may be in two for a moment; the better report counts.
                if known is None or (endpoint.ready, endpoint.serving) > (known.ready, known.serving):
                    found[endpoint.ip, endpoint.port] = endpoint
    return [found[key] for key in sorted(found)]


def _endpoint(item: dict[str, Any], port: int, node: NodeView, publish_not_ready: bool) -> Endpoint | None:
    addresses = item.get("addresses")
    if not addresses:
        return None
    conditions = item.get("conditions") or {}
    ready = conditions.get("ready")
    ready = True if ready is None else bool(ready)
    serving = conditions.get("serving")
    serving = True if serving is None else bool(serving)
    hints = item.get("hints")
    zones = nodes = _NOTHING
    if hints:
        zones = frozenset(hint["name"] for hint in hints.get("forZones") or ())
        nodes = frozenset(hint["name"] for hint in hints.get("forNodes") or ())
    place = item.get("nodeName")
    local = place == node.name
    near = local or place in node.siblings
    return Endpoint(addresses[0], port, ready or publish_not_ready, serving, bool(conditions.get("terminating")), local, near, zones, nodes)


def _topology(endpoints: Sequence[Endpoint], node: NodeView) -> str:
    """ "node", "zone" or "" after the hints; hints count only when every ready endpoint has one and one names us."""
    ready = [endpoint for endpoint in endpoints if endpoint.ready]
    if not ready:
        return ""
    if all(endpoint.nodes for endpoint in ready) and any(node.name in endpoint.nodes for endpoint in ready):
        return "node"
    if node.zone and all(endpoint.zones for endpoint in ready) and any(node.zone in endpoint.zones for endpoint in ready):
        return "zone"
    return ""


def categorise(endpoints: Sequence[Endpoint], node: NodeView, *, uses_cluster: bool, uses_local: bool) -> Backends:
    """Choose the endpoints for cluster-wide and for node-local traffic policy.

    Ready ones are used; where there are none at all, those that terminate but still serve.
    """
    cluster: list[Endpoint] = []
    local: tuple[Endpoint, ...] = ()
    near: tuple[Endpoint, ...] = ()
    any_endpoints = False
    if uses_cluster:
        mode = _topology(endpoints, node)
        for endpoint in endpoints:
            if endpoint.ready and (not mode or (node.name in endpoint.nodes if mode == "node" else node.zone in endpoint.zones)):
                cluster.append(endpoint)
        if not cluster:
            cluster = [endpoint for endpoint in endpoints if endpoint.serving and endpoint.terminating]
        any_endpoints = bool(cluster)
    if uses_local:
        any_endpoints = any_endpoints or any(e.ready or (e.serving and e.terminating) for e in endpoints)
        local = _usable(endpoint for endpoint in endpoints if endpoint.local)
        near = _usable(endpoint for endpoint in endpoints if endpoint.near) if node.siblings else local
    return Backends(tuple(cluster), local, near, any_endpoints)


def _usable(endpoints: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    held = tuple(endpoints)
    return tuple(e for e in held if e.ready) or tuple(e for e in held if e.serving and e.terminating)
