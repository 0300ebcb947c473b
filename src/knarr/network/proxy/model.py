"""From one Service and its EndpointSlices to set elements: the pure heart of the proxy.

Role: `render_service` is called by `service_proxy` for each changed Service, and by tests and `why` without any kernel.
What it returns is complete: the difference of two results is the whole change.
Invariants: same input, same output; nothing here knows what the kernel holds. Keys of different Services may collide
(two Services claiming one external address and port); who wins is decided by the caller.
Source: pkg/proxy/nftables/proxier.go (syncProxyRules), pkg/proxy/serviceport.go.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from ipaddress import ip_address
from typing import Any

from knarr.api.addresses import sloppy_network
from knarr.api.types import Object
from knarr.network.direct.services import Offer
from knarr.network.nftables import PROTOCOLS, goto, number_key, packed_address, port_key, protocol_key, value
from knarr.network.proxy.chains import Pick, learn_name, needed
from knarr.network.proxy.topology import Backends, Endpoint, NodeView, categorise, collect

ElementKey = tuple[str, bytes]
"""Set name and key bytes (in `allowed*`: first and last key of the range, one after the other)."""
UdpFlow = tuple[str, int]
"""Frontend of UDP flows: address ("" for node ports) and port."""

SERVICE_PROXY_NAME = "service.kubernetes.io/service-proxy-name"
HEADLESS = "service.kubernetes.io/headless"
HOST_PORTS = "knarr.dev/host-ports"
"""Annotation of a Service: "8080:80,8443:https" publishes its ports 80 and https on every node's 8080 and 8443."""
REFUSE, LOSE = goto("refuse"), goto("lose")
REFUSE_PORT, LOSE_PORT = goto("refuse_port"), goto("lose_port")


@dataclass(slots=True)
class Rendered:
    """What one Service contributes to the table and to its neighbours."""

    elements: dict[ElementKey, bytes] = field(default_factory=dict)
    picks: set[Pick] = field(default_factory=set)
    shared: set[ElementKey] = field(default_factory=set)
    """Elements that other Services may contribute as well (hairpin pairs)."""
    udp: dict[UdpFlow, frozenset[tuple[str, int]]] = field(default_factory=dict)
    """UDP frontends and the endpoints that may answer there."""
    sticky: dict[ElementKey, frozenset[bytes]] = field(default_factory=dict)
    """Frontends with session affinity, by map and key, and the endpoint data that may be remembered."""
    offer: Offer = field(default_factory=Offer)
    """What sockets may be led by without the table."""
    memories: set[tuple[int, int]] = field(default_factory=set)
    """Families and times of the chains that remember clients."""
    health_port: int = 0
    local_endpoints: int = 0
    no_local: frozenset[str] = frozenset()
    """The Local traffic policies ("internal", "external") for which this node has no endpoint."""
    problems: list[str] = field(default_factory=list)


def is_proxied(service: Object) -> bool:
    """Whether this proxy serves the Service at all: it has a cluster IP and nobody else claims it."""
    spec = service.get("spec") or {}
    if spec.get("type") == "ExternalName" or spec.get("clusterIP") in (None, "", "None"):
        return False
    labels = service["metadata"].get("labels") or {}
    return SERVICE_PROXY_NAME not in labels and HEADLESS not in labels


def host_ports(service: Object) -> list[tuple[int, str]]:
    """Ports of the nodes that the Service's annotation asks for, as (host port, Service port name or number)."""
    asked = (service["metadata"].get("annotations") or {}).get(HOST_PORTS)
    if not asked:
        return []
    found = []
    for item in asked.split(","):
        number, _colon, wanted = item.strip().partition(":")
        if number.isdigit() and 0 < int(number) < 65536:
            found.append((int(number), wanted or number))
    return found


def _version(address: str) -> int:
    return 6 if ":" in address else 4


@dataclass(slots=True)
class _Port:
    """One Service port in one family, ready to be written."""

    name: str
    protocol: str
    number: int
    node_port: int
    version: int
    backends: Backends
    internal: tuple[Endpoint, ...]
    external_local: bool
    affinity_seconds: int


def render_service(service: Object, slices: Iterable[Object], node: NodeView) -> Rendered:
    """Everything that one Service needs on one node.

    Args:
      slices: The Service's EndpointSlices, in any order.

    Returns:
      Rendered; empty for a Service without cluster IP. Parts that cannot be served are named in `problems`, the rest is there.
    """
    out = Rendered()
    if not is_proxied(service):
        return out
    spec = service["spec"]
    slices = [obj for obj in slices if HEADLESS not in (obj["metadata"].get("labels") or {})]
    cluster_ips = spec.get("clusterIPs") or [spec["clusterIP"]]
    for address in cluster_ips:
        version = _version(address)
        out.elements[f"cluster_ip{version}", packed_address(address)] = b""
        for port in spec.get("ports") or ():
            ready = _prepare(spec, bool(host_ports(service)), port, slices, version, node, out)
            if ready is not None:
                _write_port(out, service, ready, address)
    local_policy = spec.get("externalTrafficPolicy") == "Local"
    if local_policy and spec.get("healthCheckNodePort"):
        out.health_port = int(spec["healthCheckNodePort"])
    return out


def _prepare(
    spec: dict[str, Any], published: bool, port: dict[str, Any], slices: Sequence[Object], version: int, node: NodeView, out: Rendered
) -> _Port | None:
    protocol = port.get("protocol") or "TCP"
    if protocol not in PROTOCOLS:
        out.problems.append(f"port {port.get('port')}: protocol {protocol} is not supported")
        return None
    internal_local = spec.get("internalTrafficPolicy") == "Local"
    external = bool(port.get("nodePort") or published or spec.get("externalIPs") or spec.get("type") == "LoadBalancer")
    external_local = external and spec.get("externalTrafficPolicy") == "Local"
    uses_cluster = not internal_local or (external and not external_local)
    family = "IPv4" if version == 4 else "IPv6"
    found = collect(slices, port.get("name") or "", protocol, family, node, bool(spec.get("publishNotReadyAddresses")))
    backends = categorise(found, node, uses_cluster=uses_cluster, uses_local=internal_local or external_local)
    seconds = 0
    if spec.get("sessionAffinity") == "ClientIP":
        seconds = ((spec.get("sessionAffinityConfig") or {}).get("clientIP") or {}).get("timeoutSeconds") or 10800
    ready_local = sum(1 for endpoint in backends.local if endpoint.ready)
    if external_local:
        out.local_endpoints = max(out.local_endpoints, ready_local)
    if not backends.local and backends.any_endpoints:
        out.no_local |= {name for name, wanted in (("internal", internal_local), ("external", external_local)) if wanted}
    for endpoint in (*backends.cluster, *backends.local):
        if endpoint.local:
            packed = packed_address(endpoint.ip)
            out.shared.add((f"hairpin{version}", packed + packed))
    return _Port(
        port.get("name") or "", protocol, int(port["port"]), int(port.get("nodePort") or 0), version, backends,
        backends.local if internal_local else backends.cluster, external_local, int(seconds),
    )  # fmt: skip


def _write_port(out: Rendered, service: Object, port: _Port, cluster_ip: str) -> None:
    spec = service["spec"]
    _internal(out, port, cluster_ip)
    externals = [address for address in spec.get("externalIPs") or () if _version(address) == port.version]
    balancers: list[str] = []
    if spec.get("type") == "LoadBalancer":
        for item in ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ():
            address = item.get("ip")
            if address and item.get("ipMode", "VIP") != "Proxy" and _version(address) == port.version:
                balancers.append(address)
    for address in dict.fromkeys([*externals, *balancers]):
        _external(out, port, address, port.number)
    ranges = [text.strip() for text in spec.get("loadBalancerSourceRanges") or ()]
    if ranges:
        for address in balancers:
            _limit_sources(out, port, address, ranges)
    if port.node_port:
        _external(out, port, "", port.node_port)
    for number, wanted in host_ports(service):
        if wanted in (port.name, str(port.number)):
            _external(out, port, "", number)


@lru_cache(maxsize=4096)
def _way(version: int, node_port: bool, cluster: int, local: int | None, masquerade: bool, affinity_seconds: int) -> tuple[bytes, list[Pick]]:
    """What leads to the chain of a `Pick`, and the chains needed for it: few differ among thousands of Services."""
    pick = Pick(version, node_port, cluster, local, masquerade, affinity_seconds)
    return goto(pick.name), needed(pick)


def _key(port: _Port, address: str, number: int) -> bytes:
    head = packed_address(address) if address else b""
    return head + protocol_key(port.protocol) + port_key(number)


def _write_endpoints(out: Rendered, map_name: str, key: bytes, endpoints: Sequence[Endpoint]) -> None:
    elements = out.elements
    for index, endpoint in enumerate(endpoints):
        elements[map_name, key + number_key(index)] = value(packed_address(endpoint.ip) + port_key(endpoint.port))


def _watch_flows(out: Rendered, port: _Port, address: str, number: int, key: bytes, endpoints: Iterable[Endpoint]) -> None:
    if port.protocol != "UDP" and not port.affinity_seconds:
        return
    places = {(endpoint.ip, endpoint.port) for endpoint in endpoints}
    if port.protocol == "UDP":
        out.udp[address, number] = frozenset(places)
    if port.affinity_seconds:
        name = f"{'' if address else 'port_'}sticky{port.version}"
        out.elements[name, key] = goto(learn_name(port.version, port.affinity_seconds))
        out.memories.add((port.version, port.affinity_seconds))
        out.sticky[name, key] = frozenset(packed_address(ip) + port_key(target) for ip, target in places)


def _internal(out: Rendered, port: _Port, address: str) -> None:
    key = _key(port, address, port.number)
    endpoints = port.internal
    _watch_flows(out, port, address, port.number, key, endpoints)
    if not endpoints:
        out.elements[f"service{port.version}", key] = LOSE if port.backends.any_endpoints else REFUSE
        return
    verdict, picks = _way(port.version, False, len(endpoints), None, False, port.affinity_seconds)
    out.picks.update(picks)
    out.elements[f"service{port.version}", key] = verdict
    _write_endpoints(out, f"endpoint{port.version}", key, endpoints)
    _lead(out, port, address, port.number, endpoints)


def _lead(out: Rendered, port: _Port, address: str, number: int, endpoints: Sequence[Endpoint]) -> None:
    if port.protocol == "TCP" and not port.affinity_seconds and endpoints:
        out.offer.direct.setdefault((address, number), tuple((endpoint.ip, endpoint.port) for endpoint in endpoints))


def _external(out: Rendered, port: _Port, address: str, number: int) -> None:
    """One frontend that the world outside may use; no address means all of the node's own.

    What comes to an address reaches the machine, so the Local policy means all of its nodes; a node port is one node's.
    """
    node_port = not address
    key = _key(port, address, number)
    prefix = "port_" if node_port else ""
    table = f"{'port' if node_port else 'service'}{port.version}"
    if (table, key) in out.elements:
        return
    everywhere, here = port.backends.cluster, port.backends.local if node_port else port.backends.near
    _watch_flows(out, port, address, number, key, {*everywhere, *(here if port.external_local else ())})
    if not (everywhere or (here if port.external_local else ())):
        refuse, lose = (REFUSE_PORT, LOSE_PORT) if node_port else (REFUSE, LOSE)
        out.elements[table, key] = lose if port.backends.any_endpoints else refuse
        return
    if port.external_local:
        verdict, picks = _way(port.version, node_port, len(everywhere), len(here), False, port.affinity_seconds)
        _write_endpoints(out, f"{prefix}local{port.version}", key, here)
    else:
        verdict, picks = _way(port.version, node_port, len(everywhere), None, True, port.affinity_seconds)
    _write_endpoints(out, f"{prefix}endpoint{port.version}", key, everywhere)
    out.picks.update(picks)
    out.elements[table, key] = verdict
    out.offer.external |= {(address, number)}
    if node_port:
        _lead(out, port, "", number, everywhere)


def _limit_sources(out: Rendered, port: _Port, address: str, ranges: Sequence[str]) -> None:
    key = _key(port, address, port.number)
    out.elements[f"limited{port.version}", key] = b""
    for text in ranges:
        network = sloppy_network(text.strip())
        if network is None:
            out.problems.append(f"loadBalancerSourceRanges: {text!r} is not a network")
            continue
        if network.version == port.version:
            first, last = network.network_address.packed, network.broadcast_address.packed
            out.elements[f"allowed{port.version}", key + first + key + last] = b""
    # Traffic from the balancer's own address is a node reaching its own Service.
    own = ip_address(address).packed
    out.elements.setdefault((f"allowed{port.version}", key + own + key + own), b"")
