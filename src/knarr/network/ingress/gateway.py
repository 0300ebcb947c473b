"""Gateway API on the same proxy: GatewayClass, Gateway, HTTPRoute, GRPCRoute and TLSRoute to routes and statuses. Pure functions.

Role: the controller calls `add_routes` when the resources are served (their CRDs are installed by whoever wants them)
and writes the statuses that come back.
Supported: HTTP, HTTPS and TLS listeners of any port, listener and route host names, attachment by namespace and kind, all
matches, weighted Services, also of other namespaces that grant it, timeouts, copies of requests, CORS and the other filters of
`filters`, BackendTLSPolicy. What is not is told by the condition that the specification has for it, and routes nothing.
Invariants: a Gateway with addresses of its own is served there by itself, each listener by its own routes (`doors`); through
the machine's own address all Gateways are reached together, by host name, on the proxy's own two ports.
Source: gateway-api v1 (apis/v1 types, conformance conditions).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress.alternatives import ONLY_PLAIN, ONLY_TLS
from knarr.network.ingress.backendtls import Policies
from knarr.network.ingress.doors import Doors
from knarr.network.ingress.gatewayapi import (
    CONTROLLER,
    GATEWAY_CLASSES,
    GATEWAYS,
    GROUP,
    GRPC_ROUTES,
    HTTP_ROUTES,
    REFERENCE_GRANTS,
    TLS_ROUTES,
    condition,
)
from knarr.network.ingress.gatewaybackends import Finder, Grants, Problem, Protocols
from knarr.network.ingress.gatewayrules import Settled, as_http, settle_rules, settle_streams, writable
from knarr.network.ingress.listeners import Listener, gateway_status, read_listeners
from knarr.network.ingress.routes import ANY_NAME, PASS, TERMINATE, Addresses, Routes
from knarr.network.objects import object_key

__all__ = [
    "CONTROLLER", "GATEWAYS", "GATEWAY_CLASSES", "GRPC_ROUTES", "HTTP_ROUTES", "REFERENCE_GRANTS", "TLS_ROUTES", "Outcome", "Published", "World", "add_routes", "intersect",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Published:
    """Where a Gateway is reached, or why not yet.

    Attributes:
      addresses: Shown in its status.
      inside: Further addresses that lead to it.
      own: The addresses are nobody else's: what comes there is for this Gateway.
    """

    addresses: tuple[str, ...] = ()
    inside: tuple[str, ...] = ()
    pending: Problem | None = None
    own: bool = False


@dataclass(frozen=True, slots=True)
class World:
    """What routes are made with.

    Attributes:
      has_secret: Which "namespace/name" Secrets hold a usable certificate.
      published: Where a Gateway is reached.
    """

    addresses: Addresses
    has_secret: Mapping[str, bool]
    namespace_labels: Mapping[str, Mapping[str, str]]
    published: Callable[[Object], Published]
    grants: Sequence[Object] = ()
    protocols: Protocols = lambda _namespace, _name, _port: ""
    policies: Policies = field(default_factory=Policies)


@dataclass(slots=True)
class Outcome:
    """Statuses to be written: kind of object and its key to the status; and all listeners, by Gateway."""

    gateways: dict[str, dict[str, Any]] = field(default_factory=dict)
    routes: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    listeners: dict[str, list[Listener]] = field(default_factory=dict)
    policies: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Making:
    """What making routes of one kind needs."""

    routes: Routes
    kind: str
    listeners: list[Listener]
    world: World
    finder: Finder
    doors: Mapping[str, Doors]


def add_routes(routes: Routes, gateways: Iterable[Object], by_kind: Mapping[str, Iterable[Object]], world: World) -> Outcome:
    """Add what the routes of our Gateways ask for to a routing table.

    Args:
      gateways: Those of our classes.
      by_kind: Routes by kind: "HTTPRoute", "GRPCRoute", "TLSRoute".
    """
    gateways, grants = sorted(gateways, key=_age), Grants(world.grants)
    outcome = Outcome(listeners={object_key(obj): read_listeners(obj, world.has_secret, grants) for obj in gateways})
    published = {object_key(obj): world.published(obj) for obj in gateways}
    doors = {key: Doors(routes, key, mine, (*published[key].addresses, *published[key].inside)) for key, mine in outcome.listeners.items() if published[key].own}
    listeners = [listener for mine in outcome.listeners.values() for listener in mine]
    finder = Finder(routes, world.addresses, grants, world.protocols, world.policies.of)
    for kind, found in by_kind.items():
        making = _Making(routes, kind, listeners, world, finder, doors)
        outcome.routes[kind] = {}
        for route in sorted(found, key=_age):
            if parents := _attach_all(making, route):
                outcome.routes[kind][object_key(route)] = {"parents": parents}
    for door in doors.values():
        door.close()
    for listener in listeners:
        if listener.secret and listener.works:
            routes.certificates.setdefault(listener.hostname or f"{ANY_NAME}{listener.secret}", listener.secret)
    for obj in gateways:
        key = object_key(obj)
        outcome.gateways[key] = gateway_status(obj, outcome.listeners[key], published[key].addresses, published[key].pending)
    outcome.policies = world.policies.statuses()
    return outcome


def _age(obj: Object) -> tuple[str, str]:
    return obj["metadata"].get("creationTimestamp") or "", object_key(obj)


def intersect(listener: str, route: str) -> str | None:
    """The host name that serves both, the more special of the two; None when they have nothing in common. "" is any."""
    if not listener or listener == route:
        return route
    if not route:
        return listener
    if listener.startswith("*.") and route.endswith(listener[1:]):
        return route
    if route.startswith("*.") and listener.endswith(route[1:]):
        return listener
    return None


def _is_gateway(parent: Mapping[str, Any]) -> bool:
    return bool(parent.get("group", GROUP) == GROUP and parent.get("kind", "Gateway") == "Gateway")


def _attach_all(making: _Making, route: Object) -> list[dict[str, Any]]:
    """Serve a route through all its parents that are ours; returns their statuses."""
    keys = {listener.key for listener in making.listeners}
    source = as_http(route) if making.kind == "GRPCRoute" else route
    found: list[dict[str, Any]] = []
    settled: tuple[Settled, Problem | None] | None = None
    for parent in (route.get("spec") or {}).get("parentRefs") or ():
        key = f"{parent.get('namespace') or route['metadata']['namespace']}/{parent['name']}"
        if not _is_gateway(parent) or key not in keys:
            continue
        good = writable(source)
        if settled is None and good[0] == "Accepted":
            settled = _settle(making, source)
        making.world.policies.used_by(route, key)
        found.append(_attach(making, source, parent, key, good, settled or ([], None)))
    return found


def _settle(making: _Making, route: Object) -> tuple[Settled, Problem | None]:
    if making.kind != "TLSRoute":
        return settle_rules(making.finder, making.kind, route)
    return settle_streams(making.finder, route)


def _attach(
    making: _Making, route: Object, parent: Mapping[str, Any], key: str, accepted: tuple[str, str], settled: tuple[Settled, Problem | None]
) -> dict[str, Any]:
    """Serve a route through one of its parents; returns the parent's status."""
    generation = route["metadata"].get("generation") or 0
    mine = [listener for listener in making.listeners if listener.key == key]
    named = [
        listener
        for listener in mine
        if (not parent.get("sectionName") or listener.name == parent["sectionName"]) and (not parent.get("port") or listener.port == parent["port"])
    ]
    allowed = [listener for listener in named if listener.takes(route, making.kind, making.world.namespace_labels)]
    hostnames = [name.lower() for name in (route.get("spec") or {}).get("hostnames") or ()] or [""]
    pairs = [(listener, host) for listener in allowed for name in hostnames if (host := intersect(listener.hostname, name)) is not None]
    if not named:
        accepted = ("NoMatchingParent", "no such listener")
    elif not allowed:
        accepted = ("NotAllowedByListeners", "no listener takes routes of this kind from this namespace")
    elif not pairs:
        accepted = ("NoMatchingListenerHostname", "no listener has a host name in common")
    written, problem = settled
    if accepted[0] == "Accepted":
        for listener in {id(listener): listener for listener, _host in pairs}.values():
            listener.attached += 1
        for listener, host in pairs:
            if listener.works:
                _write(making, listener, host, written)
    return {
        "parentRef": dict(parent),
        "controllerName": CONTROLLER,
        "conditions": [
            condition("Accepted", accepted[0] == "Accepted", accepted[0], accepted[1], generation),
            condition("ResolvedRefs", problem is None, *(problem or ("ResolvedRefs", "")), generation),
        ],
    }


def _write(making: _Making, listener: Listener, host: str, written: Settled) -> None:
    doors = making.doors.get(listener.key)
    site = doors.site(listener, host) if doors else None
    if making.kind == "TLSRoute":
        if site is not None and written:
            making.routes.streams.setdefault(site, f"{PASS if listener.passthrough else TERMINATE}|{written[0][2].target}")
        return
    only = ONLY_TLS if listener.protocol == "HTTPS" else ONLY_PLAIN
    for kind, path, way in written:
        if site is not None:
            making.routes.alternatives.setdefault((kind, site, path), []).append(way)
        making.routes.alternatives.setdefault((kind, host or "*", path), []).append(replace(way, only=only))
    if host:
        making.routes.hosts[host] = host
