"""Rules of HTTPRoutes and GRPCRoutes: what they match, change and lead to, as ways of places. Pure.

Role: `gateway` writes the rules of a route to each site that it is served at.
Source: gateway-api HTTPRouteRule, GRPCRouteRule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress import filters
from knarr.network.ingress.alternatives import Action, Alternative, Condition, Kind
from knarr.network.ingress.annotations import HTTP2_BACKEND
from knarr.network.ingress.gatewaybackends import Finder, Problem, Way, find_ways
from knarr.network.objects import object_key

_DURATION_UNITS = {"h": 3_600_000, "m": 60_000, "s": 1000, "ms": 1}
Settled = list[tuple[Kind, str, Alternative]]
"""Kind of path, path, and a way to serve it."""


def as_http(route: Object) -> Object:
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


def writable(route: Object) -> tuple[str, str]:
    """("Accepted", "") or why the route asks for something that is not supported."""
    for rule in (route.get("spec") or {}).get("rules") or ():
        try:
            for match in rule.get("matches") or ():
                _conditions(match)
                _path(match)
            for item in (*(rule.get("filters") or ()), *(item for ref in rule.get("backendRefs") or () for item in ref.get("filters") or ())):
                if item.get("type") != "RequestMirror":
                    filters.read(item, "/")
                elif not (item.get("requestMirror") or {}).get("backendRef"):
                    raise filters.Unsupported("a copy of a request needs a backend")
            if any(item.get("type") in filters.OF_RULES for ref in rule.get("backendRefs") or () for item in ref.get("filters") or ()):
                raise filters.Unsupported("redirects, rewrites and copies of single backends are not supported")
            _timeout(rule)
        except filters.Unsupported as error:
            return "UnsupportedValue", str(error)
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


def settle_rules(finder: Finder, kind: str, route: Object) -> tuple[Settled, Problem | None]:
    """All ways of a route that can be written, and what is wrong with its references."""
    age = (route["metadata"].get("creationTimestamp") or "", object_key(route))
    found: Settled = []
    problem: Problem | None = None
    protocol = HTTP2_BACKEND if kind == "GRPCRoute" else ""
    for number, rule in enumerate((route.get("spec") or {}).get("rules") or ()):
        ways, wrong = _ways(finder, kind, route, rule)
        mirrors, unreachable = _mirrors(finder, kind, route, rule)
        problem = problem or wrong or unreachable
        matches: Sequence[Mapping[str, Any]] = rule.get("matches") or ({},)
        for index, match in enumerate(matches):
            path_kind, path = _path(match)
            prefix = (match.get("path") or {}).get("value") or "/"
            effects = [filters.read(item, prefix) for item in rule.get("filters") or () if item.get("type") != "RequestMirror"]
            effect = filters.combine(effects)
            actions, conditions = (*_timeout(rule), *mirrors, *effect.actions), _conditions(match)
            rank = (*age, number, index)
            for place, way in enumerate(ways):
                flags = effect.flags + (way.flags or protocol)
                made = Alternative(way.target, flags, effect.argument, (*conditions, *way.draw), (*actions, *way.actions), "", (*rank, place))
                found.append((path_kind, path, made))
    return found, problem


def _ways(finder: Finder, kind: str, route: Object, rule: Mapping[str, Any]) -> tuple[list[Way], Problem | None]:
    ways, problem = find_ways(finder, kind, route, rule.get("backendRefs") or ())
    if any(item.get("type") == "RequestRedirect" for item in rule.get("filters") or ()):
        return ways[:1], problem
    return ways, problem


def _mirrors(finder: Finder, kind: str, route: Object, rule: Mapping[str, Any]) -> tuple[list[Action], Problem | None]:
    """Copies of requests as actions, and what is wrong with their backends."""
    found: list[Action] = []
    problem: Problem | None = None
    for item in rule.get("filters") or ():
        if item.get("type") != "RequestMirror":
            continue
        mirror = item["requestMirror"]
        ways, wrong = find_ways(finder, kind, route, [mirror["backendRef"]])
        problem = problem or wrong
        fraction = mirror.get("fraction") or {}
        percent = mirror.get("percent", 100) if not fraction else 100 * fraction.get("numerator", 0) / (fraction.get("denominator") or 100)
        found.append(("mirror", f"{percent:g}", ways[0].target))
    return found, problem


def settle_streams(finder: Finder, route: Object) -> tuple[Settled, Problem | None]:
    """The target of a TLSRoute, and what is wrong with its references. There is one rule; nothing but the name decides."""
    found: Settled = []
    problem: Problem | None = None
    for rule in (route.get("spec") or {}).get("rules") or ():
        ways, wrong = find_ways(finder, "TLSRoute", route, rule.get("backendRefs") or ())
        problem = problem or wrong
        found.append(("prefix", "/", Alternative(ways[0].target)))
    return found[:1], problem
