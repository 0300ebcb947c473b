"""Ingresses as a routing table: pure functions from API objects to what the proxy looks up.

Role: `build` is called by the controller after every change, and by tests. The result is plain mappings, the same input
giving the same output, so that the difference to what the proxy holds is the whole change.
Invariants: a host's rules are chosen first (exact name, then one-label wildcard, then rules without host), then the
path: Exact before Prefix, the longest Prefix first, by whole path elements. Where two Ingresses claim one host and path
the older wins. What cannot be served is named in `problems`; the rest works.
Source: networking/v1 Ingress API documentation; behaviour and annotations of ingress-nginx.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress.alternatives import Action, Alternative, Place
from knarr.network.ingress.annotations import Behaviour, read
from knarr.network.objects import object_key

CLASS_ANNOTATION = "kubernetes.io/ingress.class"
ANY_NAME = "*:"
"""In front of a Secret, among host names with certificates: it serves all names that no other serves."""
TO_HTTPS_301, TO_HTTPS_302 = "1", "2"
NOWHERE = ("nowhere", 0)
"""The place of a backend that does not exist: the proxy answers 500 for it."""
PASS, TERMINATE = "P", "T"
"""What is done with the TLS of a stream."""


@dataclass(frozen=True, slots=True)
class Server:
    """How the proxy speaks TLS to backends.

    Attributes:
      sni: The name asked for; "" is the request's host.
      authority: File name of the authorities that must have signed the backend's certificate; "" takes any certificate, "@system-ca"
        the machine's own authorities.
      name: The name that the certificate must have.
      certificate: File name of our own certificate.
    """

    sni: str = ""
    authority: str = ""
    name: str = ""
    certificate: str = ""


@dataclass(slots=True)
class Routes:
    """The routing table.

    Attributes:
      hosts: Host name or "*.domain" (lower case) that has rules; itself as value. Behind a door (`doors`) the door's name is in front.
      doors: "address:port" of a Gateway to its name, which ends in "/".
      patterns: Regular expression of a door with a host name to what stands in place of the host name in the maps below.
      streams: As hosts, to "PASS|target" or "TERMINATE|target" of what goes on as a stream of bytes.
      exact, prefix: "host|path" to "target|flags|argument"; prefixes end in "/".
      regex: Regular expression of "host|path" to the same.
      rules: Lists of alternatives by name, for the proxy's script.
      alternatives, lists: What `alternatives.settle` makes regex, rules and some of exact and prefix from.
      servers: Ways to speak TLS to backends, by name.
      authorities: Certificates of authorities (PEM), by the file name that servers and certificates refer to.
      targets: Target to its number of addresses, and "target#index" to "address|port".
      certificates: Host name to the Secret ("namespace/name") whose certificate serves it; "" holds none.
      problems: (Ingress key, text) of what cannot be served.
    """

    hosts: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    prefix: dict[str, str] = field(default_factory=dict)
    regex: dict[str, str] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    doors: dict[str, str] = field(default_factory=dict)
    patterns: dict[str, str] = field(default_factory=dict)
    streams: dict[str, str] = field(default_factory=dict)
    servers: dict[str, Server] = field(default_factory=dict)
    authorities: dict[str, str] = field(default_factory=dict)
    alternatives: dict[Place, list[Alternative]] = field(default_factory=dict)
    lists: dict[Place, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    certificates: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


Addresses = Callable[[str, str, Mapping[str, Any]], list[tuple[str, int]] | str]
"""(namespace, Service, backend port) to the addresses to send to, or why there are none."""
ENDPOINTS = "endpoints"
"""In a backend port: the addresses of the endpoints are wanted, not the Service's own."""


def is_ours(ingress: Object, class_name: str, *, is_default: bool) -> bool:
    """Whether an Ingress belongs to the class."""
    wanted = (ingress.get("spec") or {}).get("ingressClassName")
    if wanted is None:
        wanted = (ingress["metadata"].get("annotations") or {}).get(CLASS_ANNOTATION)
    return wanted == class_name or (wanted is None and is_default)


def build(ingresses: Iterable[Object], addresses: Addresses) -> Routes:
    """The routing table of some Ingresses (all of our class)."""
    routes = Routes()
    for ingress in sorted(ingresses, key=_age):
        _Builder(routes, ingress, addresses).add()
    return routes


def _age(ingress: Object) -> tuple[str, str]:
    return ingress["metadata"].get("creationTimestamp") or "", object_key(ingress)


class _Builder:
    def __init__(self, routes: Routes, ingress: Object, addresses: Addresses) -> None:
        self._routes = routes
        self._ingress = ingress
        self._addresses = addresses
        self._namespace = ingress["metadata"]["namespace"]
        self._spec = ingress.get("spec") or {}
        self._tls_hosts: set[str] = set()

    def _problem(self, text: str) -> None:
        self._routes.problems.append((object_key(self._ingress), text))

    def add(self) -> None:
        for item in self._spec.get("tls") or ():
            secret = item.get("secretName") or ""
            for host in item.get("hosts") or ():
                self._tls_hosts.add(host.lower())
                self._routes.certificates.setdefault(host.lower(), f"{self._namespace}/{secret}" if secret else "")
        backend = self._spec.get("defaultBackend")
        if backend:
            self._put("*", "/", "Prefix", backend)
        for rule in self._spec.get("rules") or ():
            host = (rule.get("host") or "*").lower()
            for path in (rule.get("http") or {}).get("paths") or ():
                self._put(host, path.get("path") or "/", path.get("pathType") or "ImplementationSpecific", path.get("backend") or {})

    def _put(self, host: str, path: str, kind: str, backend: Mapping[str, Any]) -> None:
        behaviour = read(self._ingress, tls=host in self._tls_hosts)
        behaviour.actions = [self._found(action) if action[0] == "judge" else action for action in behaviour.actions]
        target = self._target(backend, sticky=behaviour.sticky)
        if target is None:
            return
        for text in behaviour.problems:
            self._problem(text)
        if any(char in path for char in "\r\n ") or "|" in host or ("|" in path and not behaviour.regex):
            self._problem(f"path {path!r} has characters that cannot be matched")
            return
        if host != "*":
            self._routes.hosts[host] = host
            for alias in behaviour.aliases:
                self._routes.hosts.setdefault(alias, host)
            if behaviour.other_name and path == "/":
                twin = host.removeprefix("www.") if host.startswith("www.") else f"www.{host}"
                if twin not in self._routes.hosts:
                    self._routes.hosts[twin] = twin
                    lead = ("redirect", behaviour.other_name, "", host, "", "keep", "", "")
                    self._add(("prefix", twin, "/"), Alternative(target, actions=(lead,)))
        place = self._place(host, path, kind, behaviour)
        if behaviour.app_root and path == "/":
            leave = ("redirect", "302", "", "", "", "full", "", behaviour.app_root)
            self._add(("exact", host, "/"), Alternative(target, actions=(leave,)))
        table = self._routes.exact if place[0] == "exact" else self._routes.prefix
        if place[0] == "regex" or behaviour.conditions or behaviour.actions or behaviour.before:
            self._add_ways(place, target, path, behaviour)
        else:
            table.setdefault(f"{place[1]}|{place[2]}", f"{target}|{behaviour.flags}|{behaviour.argument}")

    @staticmethod
    def _place(host: str, path: str, kind: str, behaviour: Behaviour) -> Place:
        if behaviour.regex:
            return "regex", host, f"(?i){path}"
        return ("exact", host, path) if kind == "Exact" else ("prefix", host, path.rstrip("/") + "/")

    def _add(self, place: Place, way: Alternative) -> None:
        found = self._routes.alternatives.setdefault(place, [])
        found.append(replace(way, rank=(len(found),)))

    def _add_ways(self, place: Place, target: str, path: str, behaviour: Behaviour) -> None:
        """Several ways in order: what comes before, the Ingress's own, and a refusal for those whom it keeps out."""
        actions = tuple(behaviour.actions)
        if behaviour.rewrite:
            actions = (*actions, ("capture", f"(?i){path}", behaviour.rewrite.replace("$", "\\")))
        for conditions, instead in behaviour.before:
            self._add(place, Alternative(target, conditions=conditions, actions=instead))
        for conditions in behaviour.conditions or [()]:
            self._add(place, Alternative(target, behaviour.flags, behaviour.argument, conditions, actions))
        if behaviour.refused_others:
            self._add(place, Alternative(target, actions=(("reply", "403"),)))

    def _found(self, action: Action) -> Action:
        """The server that judges requests, if it is a Service, at its address: the proxy does not ask the cluster's DNS."""
        scheme, _slashes, place = action[1].partition("://")
        name, _colon, port = place.rpartition(":")
        service = re.fullmatch(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(\..*)?", name)
        if service is None:
            return action
        found = self._addresses(service[2], service[1], {"number": int(port)})
        if isinstance(found, str) or not found:
            self._problem(f"auth-url: {found or 'the service has no endpoints'}")
            return ("reply", "503")
        address = f"[{found[0][0]}]" if ":" in found[0][0] else found[0][0]
        return ("judge", f"{scheme}://{address}:{found[0][1]}", *action[2:])

    def _target(self, backend: Mapping[str, Any], *, sticky: bool) -> str | None:
        service = backend.get("service")
        if not service:
            self._problem("resource backends are not supported")
            return None
        port = service.get("port") or {}
        name = f"{self._namespace}/{service['name']}:{port.get('name') or port.get('number') or ''}"
        if sticky:
            name += "!"
        if name in self._routes.targets:
            return name
        found = self._addresses(self._namespace, service["name"], {**port, ENDPOINTS: True} if sticky else port)
        if isinstance(found, str):
            # The path stays known and answers 503 until the Service can be reached.
            self._problem(found)
            found = []
        self._routes.targets[name] = str(len(found))
        for index, (address, number) in enumerate(found):
            # What a client's cookie says of where it was: it must not tell the address itself.
            mark = hashlib.blake2b(f"{name} {address} {number}".encode(), digest_size=12).hexdigest() if sticky else ""
            self._routes.targets[f"{name}#{index}"] = f"{address}|{number}" + (f"|{mark}" if mark else "")
            if mark:
                self._routes.targets[f"{name}@{mark}"] = f"{address}|{number}"
        return name
