"""Where the routes of the Gateway API lead: Services with weights, and who permits references across namespaces. Pure.

Role: `gatewayrules` asks for the ways of each rule. Source: gateway-api BackendRef, HTTPBackendRef, ReferenceGrant.
Invariants: backends that are treated alike share one target, drawn by weight; those with filters, a protocol or TLS of their
own become ways of their own, each with its share. A reference that leads nowhere keeps its share and answers 500.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from math import gcd
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress import filters
from knarr.network.ingress.alternatives import Action, Condition
from knarr.network.ingress.annotations import HTTP2_BACKEND
from knarr.network.ingress.gatewayapi import GROUP
from knarr.network.ingress.routes import NOWHERE, Addresses, Routes

_MAXIMUM_WEIGHTS = 100
_PROTOCOLS = {"kubernetes.io/h2c": HTTP2_BACKEND}

Problem = tuple[str, str]
"""Reason and message of a condition."""
Place = tuple[str, int]
"""Address and port."""
Protocols = Callable[[str, str, Mapping[str, Any]], str]
"""(namespace, Service, backend port) to the application protocol that the Service's port declares."""
TLSOf = Callable[[str, str, Mapping[str, Any]], "tuple[str, tuple[Action, ...]] | None"]
"""(namespace, Service, backend port) to flags and actions of a BackendTLSPolicy; None without one."""


class Grants:
    """What ReferenceGrants permit."""

    def __init__(self, objects: Iterable[Object] = ()) -> None:
        self._objects = list(objects)

    def permit(self, from_kind: str, from_namespace: str, kind: str, namespace: str, name: str) -> bool:
        """Whether objects of our API group may refer to a core object; those of one namespace always may."""
        return from_namespace == namespace or any(
            grant["metadata"]["namespace"] == namespace
            and _lists(grant, "from", {"group": GROUP, "kind": from_kind, "namespace": from_namespace})
            and (_lists(grant, "to", {"group": "", "kind": kind, "name": name}) or _lists(grant, "to", {"group": "", "kind": kind, "name": None}))
            for grant in self._objects
        )


def _lists(grant: Object, side: str, wanted: Mapping[str, Any]) -> bool:
    return any(all((item.get(name) or None) == (value or None) for name, value in wanted.items()) for item in (grant.get("spec") or {}).get(side) or ())


@dataclass(frozen=True, slots=True)
class Finder:
    """What finding backends needs of the world."""

    routes: Routes
    addresses: Addresses
    grants: Grants
    protocols: Protocols = lambda _namespace, _name, _port: ""
    tls: TLSOf = lambda _namespace, _name, _port: None


@dataclass(frozen=True, slots=True)
class Backend:
    """One backend of a rule: where it is, its share, and what is special about it."""

    places: tuple[Place, ...]
    weight: int
    flags: str = ""
    actions: tuple[Action, ...] = ()


@dataclass(frozen=True, slots=True)
class Way:
    """A target and what applies to requests that go there.

    Attributes:
      draw: The condition that gives it its share; none for the last.
    """

    target: str
    flags: str = ""
    actions: tuple[Action, ...] = ()
    draw: tuple[Condition, ...] = ()


def find_ways(finder: Finder, kind: str, route: Object, refs: Sequence[Mapping[str, Any]]) -> tuple[list[Way], Problem | None]:
    """The ways to the weighted backends of a rule of some kind of route, and what is wrong with the references."""
    problem: Problem | None = None
    found: list[Backend] = []
    for ref in refs:
        backend, wrong = _backend(finder, kind, route, ref)
        problem = problem or wrong
        if backend.weight > 0:
            found.append(backend)
    if not found:
        # Told to clients as a server's fault, as a reference that leads nowhere.
        found = [Backend((NOWHERE,), 1)]
    groups: dict[tuple[str, tuple[Action, ...]], list[Backend]] = {}
    for backend in found:
        groups.setdefault((backend.flags, backend.actions), []).append(backend)
    rest, ways = sum(backend.weight for backend in found), []
    for (flags, actions), members in groups.items():
        share = sum(member.weight for member in members)
        draw: tuple[Condition, ...] = (("d", "", f"{100 * share / rest:.4g}"),) if share < rest else ()
        ways.append(Way(_target(finder.routes, members), flags, actions, draw))
        rest -= share
    return ways, problem


def _backend(finder: Finder, kind: str, route: Object, ref: Mapping[str, Any]) -> tuple[Backend, Problem | None]:
    own = route["metadata"]["namespace"]
    namespace, name, weight = ref.get("namespace") or own, ref["name"], int(ref.get("weight", 1))
    nowhere = Backend((NOWHERE,), weight)
    if ref.get("group", "") != "" or ref.get("kind", "Service") != "Service":
        return nowhere, ("InvalidKind", f"backend of kind {ref.get('kind')} is not supported")
    if not finder.grants.permit(kind, own, "Service", namespace, name):
        return nowhere, ("RefNotPermitted", f"no ReferenceGrant in namespace {namespace} permits to use service {name}")
    port = {"number": ref.get("port")}
    places = finder.addresses(namespace, name, port)
    if isinstance(places, str):
        return nowhere, ("BackendNotFound", places)
    effect = filters.combine(filters.read(item, "/") for item in ref.get("filters") or ())
    flags, actions = _PROTOCOLS.get(finder.protocols(namespace, name, port), ""), effect.actions
    if (secure := finder.tls(namespace, name, port)) is not None:
        flags, actions = secure[0], (*actions, *secure[1])
    return Backend(tuple(places), weight, flags, actions), None


def _target(routes: Routes, backends: Sequence[Backend]) -> str:
    weighted = [(backend.weight, list(backend.places)) for backend in backends]
    name = "gw/" + hashlib.blake2b(json.dumps(weighted).encode(), digest_size=9).hexdigest()
    if name not in routes.targets:
        places = _spread(weighted)
        routes.targets[name] = str(len(places))
        routes.targets.update({f"{name}#{index}": f"{address}|{port}" for index, (address, port) in enumerate(places)})
    return name


def _spread(weighted: Sequence[tuple[int, list[Place]]]) -> list[Place]:
    """A list in which each backend appears as often as its weight asks, so that drawing evenly keeps the proportions."""
    weighted = [item for item in weighted if item[1]]
    if not weighted:
        return []
    divisor = reduce(gcd, (weight for weight, _places in weighted))
    total = sum(weight // divisor for weight, _places in weighted)
    scale = min(1.0, _MAXIMUM_WEIGHTS / total)
    out: list[Place] = []
    for weight, places in weighted:
        count = max(1, round(weight // divisor * scale))
        out.extend(places[index % len(places)] for index in range(count))
    return out
