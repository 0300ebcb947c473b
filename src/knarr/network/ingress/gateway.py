"""Gateway API on the same proxy: GatewayClass, Gateway, HTTPRoute and GRPCRoute to routes and statuses. Pure functions.

Role: the controller calls `add_routes` when the resources are served (their CRDs are installed by whoever wants them)
and writes the statuses that come back.
Supported: HTTP and HTTPS (Terminate) listeners with certificates, listener and route host names, attachment by
namespace, all matches (path, headers, query parameters, method), weighted Services, also of other namespaces that grant
it, timeouts, copies of requests, and the filters of `filters`. What is not is told by the condition that the specification has for it, and routes nothing.
Source: gateway-api v1 (apis/v1 types, conformance conditions).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knarr.api.scheme import Resource
from knarr.api.selectors import from_label_selector
from knarr.api.types import Object
from knarr.network.ingress import filters
from knarr.network.ingress.alternatives import ONLY_PLAIN, ONLY_TLS, Action, Alternative, Condition, Kind
from knarr.network.ingress.annotations import HTTP2_BACKEND
from knarr.network.ingress.gatewaybackends import GROUP, Grants, find_target
from knarr.network.ingress.model import Addresses, Routes
from knarr.network.objects import object_key

CONTROLLER = "knarr.dev/gateway"
GATEWAY_CLASSES = Resource(GROUP, "v1", "gatewayclasses", "gatewayclass", "GatewayClass", False, custom=True)
GATEWAYS = Resource(GROUP, "v1", "gateways", "gateway", "Gateway", True, custom=True)
HTTP_ROUTES = Resource(GROUP, "v1", "httproutes", "httproute", "HTTPRoute", True, custom=True)
GRPC_ROUTES = Resource(GROUP, "v1", "grpcroutes", "grpcroute", "GRPCRoute", True, custom=True)
REFERENCE_GRANTS = Resource(GROUP, "v1beta1", "referencegrants", "referencegrant", "ReferenceGrant", True, custom=True)
_DURATION_UNITS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}


@dataclass(slots=True)
class Listener:
    """One listener of one of our Gateways, and why it does not work, if so."""

    gateway: Object
    name: str
    protocol: str
    hostname: str
    secret: str = ""
    problem: tuple[str, str] | None = None
    """(reason, message) of Programmed=False."""
    attached: int = 0

    @property
    def key(self) -> str:
        """Its Gateway as "namespace/name"."""
        return object_key(self.gateway)


@dataclass(slots=True)
class Outcome:
    """Statuses to be written: keys of Gateways, HTTPRoutes and GRPCRoutes to their status."""

    gateways: dict[str, dict[str, Any]] = field(default_factory=dict)
    routes: dict[str, dict[str, Any]] = field(default_factory=dict)
    grpc_routes: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Making:
    """What making routes of one kind needs."""

    routes: Routes
    kind: str
    listeners: list[Listener]
    addresses: Addresses
    namespace_labels: Mapping[str, Mapping[str, str]]
    grants: Grants


def condition(kind: str, true: bool, reason: str, message: str, generation: int) -> dict[str, Any]:
    """A condition without its time, which the writer fills in when it changes."""
    return {"type": kind, "status": "True" if true else "False", "reason": reason, "message": message, "observedGeneration": generation}


def add_routes(
    routes: Routes,
    gateways: Iterable[Object],
    http_routes: Iterable[Object],
    addresses: Addresses,
    *,
    has_secret: Mapping[str, bool],
    namespace_labels: Mapping[str, Mapping[str, str]],
    shown: Sequence[Mapping[str, str]],
    grpc_routes: Iterable[Object] = (),
    grants: Iterable[Object] = (),
) -> Outcome:
    """Add what the HTTPRoutes and GRPCRoutes of our Gateways ask for to a routing table.

    Args:
      gateways: Those of our classes.
      has_secret: Which "namespace/name" Secrets hold a usable certificate.
      shown: Gateway status addresses.
    """
    granted = Grants(grants)
    listeners = [listener for gateway in gateways for listener in _listeners(gateway, has_secret, granted)]
    outcome = Outcome()
    for kind, found, statuses in (
        ("HTTPRoute", http_routes, outcome.routes),
        ("GRPCRoute", map(_as_http, grpc_routes), outcome.grpc_routes),
    ):
        making = _Making(routes, kind, listeners, addresses, namespace_labels, granted)
        for route in sorted(found, key=lambda obj: (obj["metadata"].get("creationTimestamp") or "", object_key(obj))):
            parents = [_attach(making, route, parent) for parent in (route.get("spec") or {}).get("parentRefs") or ()]
            ours = [parent for parent in parents if parent is not None]
            if ours:
                statuses[object_key(route)] = {"parents": ours}
    for listener in listeners:
        if listener.secret and listener.problem is None:
            routes.certificates.setdefault(listener.hostname or "*", listener.secret)
    by_gateway: dict[str, list[Listener]] = {}
    for listener in listeners:
        by_gateway.setdefault(listener.key, []).append(listener)
    outcome.gateways = {key: _gateway_status(own, shown) for key, own in by_gateway.items()}
    return outcome


def _listeners(gateway: Object, has_secret: Mapping[str, bool], grants: Grants) -> list[Listener]:
    found = []
    namespace = gateway["metadata"]["namespace"]
    for item in (gateway.get("spec") or {}).get("listeners") or ():
        listener = Listener(gateway, item["name"], item.get("protocol") or "", (item.get("hostname") or "").lower())
        if listener.protocol not in ("HTTP", "HTTPS"):
            listener.problem = ("UnsupportedProtocol", f"protocol {listener.protocol} is not supported")
        elif listener.protocol == "HTTPS":
            tls = item.get("tls") or {}
            refs = tls.get("certificateRefs") or ()
            if tls.get("mode", "Terminate") != "Terminate" or not refs:
                listener.problem = ("Invalid", "only TLS mode Terminate with a certificate is supported")
            elif not grants.permit("Gateway", namespace, "Secret", refs[0].get("namespace") or namespace, refs[0]["name"]):
                listener.problem = ("RefNotPermitted", f"no ReferenceGrant in namespace {refs[0]['namespace']} permits to use its certificate")
            else:
                listener.secret = f"{refs[0].get('namespace') or namespace}/{refs[0]['name']}"
                if not has_secret.get(listener.secret):
                    listener.problem = ("InvalidCertificateRef", f"secret {listener.secret} has no usable certificate")
        found.append(listener)
    return found


def _gateway_status(listeners: list[Listener], shown: Sequence[Mapping[str, str]]) -> dict[str, Any]:
    generation = listeners[0].gateway["metadata"].get("generation") or 0
    states = []
    for listener in listeners:
        good, problem = listener.problem is None, listener.problem or ("", "")
        unsupported = problem[0] == "UnsupportedProtocol"
        resolved = problem[0] not in ("InvalidCertificateRef", "RefNotPermitted")
        kinds = [] if unsupported else [{"group": GROUP, "kind": kind} for kind in ("HTTPRoute", "GRPCRoute")]
        states.append(
            {
                "name": listener.name,
                "attachedRoutes": listener.attached,
                "supportedKinds": kinds,
                "conditions": [
                    condition(
                        "Accepted",
                        not unsupported,
                        problem[0] if unsupported else "Accepted",
                        problem[1] if unsupported else "",
                        generation,
                    ),
                    condition("Programmed", good, "Programmed" if good else "Invalid", problem[1], generation),
                    condition(
                        "ResolvedRefs", resolved, "ResolvedRefs" if resolved else problem[0], "" if resolved else problem[1], generation
                    ),
                ],
            }
        )
    any_good = any(listener.problem is None for listener in listeners)
    all_good = all(listener.problem is None for listener in listeners)
    return {
        "addresses": [{"type": "IPAddress", "value": item["ip"]} for item in shown],
        "conditions": [
            condition("Accepted", any_good, "Accepted" if all_good else "ListenersNotValid", "", generation),
            condition("Programmed", any_good, "Programmed" if any_good else "Invalid", "", generation),
        ],
        "listeners": states,
    }


def _allowed(listener: Listener, route: Object, namespace_labels: Mapping[str, Mapping[str, str]]) -> bool:
    spec = next(item for item in listener.gateway["spec"]["listeners"] if item["name"] == listener.name)
    wanted = ((spec.get("allowedRoutes") or {}).get("namespaces")) or {}
    source = wanted.get("from", "Same")
    namespace = route["metadata"]["namespace"]
    if source == "All":
        return True
    if source == "Selector":
        return from_label_selector(wanted.get("selector") or {}).matches(namespace_labels.get(namespace, {}))
    return bool(source == "Same" and namespace == listener.gateway["metadata"]["namespace"])


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


def _attach(making: _Making, route: Object, parent: Mapping[str, Any]) -> dict[str, Any] | None:
    """Serve a route through one of its parents; returns the parent's status, or None when the parent is not ours."""
    if parent.get("group", GROUP) != GROUP or parent.get("kind", "Gateway") != "Gateway":
        return None
    key = f"{parent.get('namespace') or route['metadata']['namespace']}/{parent['name']}"
    mine = [listener for listener in making.listeners if listener.key == key]
    if not mine:
        return None
    generation = route["metadata"].get("generation") or 0
    named = [listener for listener in mine if not parent.get("sectionName") or listener.name == parent["sectionName"]]
    allowed = [listener for listener in named if listener.problem is None and _allowed(listener, route, making.namespace_labels)]
    hostnames = [name.lower() for name in (route.get("spec") or {}).get("hostnames") or ()] or [""]
    pairs = [(listener, host) for listener in allowed for name in hostnames if (host := intersect(listener.hostname, name)) is not None]
    accepted, refs = _writable(route), ("ResolvedRefs", "")
    if not named:
        accepted = ("NoMatchingParent", "no such listener")
    elif not allowed:
        accepted = ("NotAllowedByListeners", "no listener takes routes from this namespace")
    elif not pairs:
        accepted = ("NoMatchingListenerHostname", "no listener has a host name in common")
    if accepted[0] == "Accepted":
        for listener in {id(listener): listener for listener, _host in pairs}.values():
            listener.attached += 1
        for listener, host in pairs:
            refs = _write(making, route, host, ONLY_TLS if listener.protocol == "HTTPS" else ONLY_PLAIN)
    status = {
        "parentRef": dict(parent),
        "controllerName": CONTROLLER,
        "conditions": [
            condition("Accepted", accepted[0] == "Accepted", accepted[0], accepted[1], generation),
            condition("ResolvedRefs", refs[0] == "ResolvedRefs", refs[0], refs[1], generation),
        ],
    }
    return status


def _writable(route: Object) -> tuple[str, str]:
    """("Accepted", "") or why the route asks for something that is not supported."""
    for rule in (route.get("spec") or {}).get("rules") or ():
        try:
            for match in rule.get("matches") or ():
                _conditions(match)
                _path(match)
            for item in rule.get("filters") or ():
                if item.get("type") != "RequestMirror":
                    filters.read(item, "/")
                elif not (item.get("requestMirror") or {}).get("backendRef"):
                    raise filters.Unsupported("a copy of a request needs a backend")
            _timeout(rule)
        except filters.Unsupported as error:
            return "UnsupportedValue", str(error)
        if any(ref.get("filters") for ref in rule.get("backendRefs") or ()):
            return "UnsupportedValue", "filters of single backends are not supported"
        if rule.get("retry") or rule.get("sessionPersistence"):
            return "UnsupportedValue", "retries and session persistence of rules are not supported"
    return "Accepted", ""


def _conditions(match: Mapping[str, Any]) -> tuple[Condition, ...]:
    """What a match asks for beside the path. Raises Unsupported."""
    found: list[Condition] = []
    if match.get("method"):
        found.append(("m", "", match["method"]))
    for field_name, exact, pattern in (("headers", "h", "H"), ("queryParams", "q", "Q")):
        seen = set()
        for item in match.get(field_name) or ():
            kind = item.get("type", "Exact")
            if kind not in ("Exact", "RegularExpression"):
                raise filters.Unsupported(f"matches of type {kind} are not supported")
            # Of entries for one name the first counts.
            name = item["name"].lower() if field_name == "headers" else item["name"]
            if name not in seen:
                found.append((exact if kind == "Exact" else pattern, item["name"], item["value"]))
            seen.add(name)
    return tuple(found)


def _path(match: Mapping[str, Any]) -> tuple[Kind, str]:
    """Kind and text of a match's path, as in a place. Raises Unsupported."""
    path = match.get("path") or {}
    kind, value = path.get("type", "PathPrefix"), path.get("value") or "/"
    if any(char.isspace() for char in value):
        raise filters.Unsupported("paths with blanks are not supported")
    if kind == "RegularExpression":
        return "regex", f"(?:{value})$"
    if kind not in ("Exact", "PathPrefix") or "|" in value:
        raise filters.Unsupported(f"path {value!r} of type {kind} is not supported")
    return ("exact", value) if kind == "Exact" else ("prefix", value.rstrip("/") + "/")


def _timeout(rule: Mapping[str, Any]) -> list[Action]:
    """The shorter of a rule's two times, as an action; none for those that are "0s". Raises Unsupported."""
    times = []
    for name in ("request", "backendRequest"):
        text = (rule.get("timeouts") or {}).get(name) or ""
        parts = re.findall(r"(\d+)(ms|h|m|s)", text)
        if "".join(number + unit for number, unit in parts) != text:
            raise filters.Unsupported(f"timeout {text!r} is not a duration")
        if total := sum(int(number) * _DURATION_UNITS[unit] for number, unit in parts):
            times.append(total)
    return [("timeout", str(min(times)))] if times else []


def _as_http(route: Object) -> Object:
    """A GRPCRoute as the HTTPRoute that means the same."""
    spec = route.get("spec") or {}
    rules = [{**rule, "matches": [_method_path(match) for match in rule.get("matches") or ()]} for rule in spec.get("rules") or ()]
    return {**route, "spec": {**spec, "rules": rules}}


def _method_path(match: Mapping[str, Any]) -> dict[str, Any]:
    asked = match.get("method") or {}
    service, method, exact = asked.get("service") or "", asked.get("method") or "", asked.get("type", "Exact") == "Exact"
    path: dict[str, Any] = {}
    if exact and service:
        path = {"type": "Exact" if method else "PathPrefix", "value": f"/{service}/{method}".rstrip("/")}
    elif service or method:
        escape = re.escape if exact else str
        path = {"type": "RegularExpression", "value": f"/{escape(service) or '[^/]+'}/{escape(method) or '[^/]+'}"}
    return {"headers": match.get("headers") or [], **({"path": path} if path else {})}


def _mirrors(making: _Making, route: Object, rule: Mapping[str, Any]) -> tuple[list[Action], tuple[str, str] | None]:
    """Copies of requests as actions, and what is wrong with their backends."""
    found: list[Action] = []
    problem: tuple[str, str] | None = None
    for item in rule.get("filters") or ():
        if item.get("type") != "RequestMirror":
            continue
        mirror = item["requestMirror"]
        target, wrong = find_target(making.routes, making.kind, route, [mirror["backendRef"]], making.addresses, making.grants)
        problem = problem or wrong
        fraction = mirror.get("fraction") or {}
        percent = mirror.get("percent", 100) if not fraction else 100 * fraction.get("numerator", 0) // (fraction.get("denominator") or 100)
        found.append(("mirror", str(percent), target))
    return found, problem


def _write(making: _Making, route: Object, host: str, only: str) -> tuple[str, str]:
    routes = making.routes
    refs = ("ResolvedRefs", "")
    protocol = HTTP2_BACKEND if making.kind == "GRPCRoute" else ""
    site = host or "*"
    if host:
        routes.hosts[host] = host
    age = (route["metadata"].get("creationTimestamp") or "", object_key(route))
    for number, rule in enumerate((route.get("spec") or {}).get("rules") or ()):
        target, problem = find_target(routes, making.kind, route, rule.get("backendRefs") or (), making.addresses, making.grants)
        mirrors, unreachable = _mirrors(making, route, rule)
        refs = problem or unreachable or refs
        matches: Sequence[Mapping[str, Any]] = rule.get("matches") or ({},)
        for index, match in enumerate(matches):
            kind, path = _path(match)
            prefix = (match.get("path") or {}).get("value") or "/"
            effect = filters.combine(filters.read(item, prefix) for item in rule.get("filters") or () if item.get("type") != "RequestMirror")
            actions = (*_timeout(rule), *mirrors, *effect.actions)
            if problem is not None and routes.targets[target] == "0":
                # A reference that leads nowhere is told to clients as a server's fault.
                actions = (*actions, ("reply", "500"))
            way = Alternative(target, effect.flags + protocol, effect.argument, _conditions(match), actions, only, (*age, number, index))
            routes.alternatives.setdefault((kind, site, path), []).append(way)
    return refs
