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
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress import tlsannotations
from knarr.network.ingress.alternatives import Action, Alternative, Place
from knarr.network.ingress.annotations import HTTPS_BACKEND, Behaviour, annotation, read
from knarr.network.ingress.routes import ENDPOINTS, Addresses, Routes
from knarr.network.objects import object_key

CLASS_ANNOTATION = "kubernetes.io/ingress.class"


def is_ours(ingress: Object, class_name: str, *, is_default: bool) -> bool:
    """Whether an Ingress belongs to the class."""
    wanted = (ingress.get("spec") or {}).get("ingressClassName")
    if wanted is None:
        wanted = (ingress["metadata"].get("annotations") or {}).get(CLASS_ANNOTATION)
    return wanted == class_name or (wanted is None and is_default)


def build(ingresses: Iterable[Object], addresses: Addresses, secret: tlsannotations.FindSecret = lambda _key: None) -> Routes:
    """The routing table of some Ingresses (all of our class)."""
    routes = Routes()
    for ingress in sorted(ingresses, key=_age):
        _Builder(routes, ingress, addresses, secret).add()
    return routes


def _age(ingress: Object) -> tuple[str, str]:
    return ingress["metadata"].get("creationTimestamp") or "", object_key(ingress)


class _Builder:
    def __init__(self, routes: Routes, ingress: Object, addresses: Addresses, secret: tlsannotations.FindSecret) -> None:
        self._secret = secret
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
        self._read_tls(behaviour)
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

    def _read_tls(self, behaviour: Behaviour) -> None:
        ask = lambda name: annotation(self._ingress, name)
        hosts = {(rule.get("host") or "*").lower() for rule in self._spec.get("rules") or ()} | set(behaviour.aliases)
        checks = tlsannotations.of_clients(ask, self._namespace, sorted(hosts), self._secret, self._routes, behaviour.problems)
        behaviour.actions[:0] = checks
        if HTTPS_BACKEND in behaviour.flags:
            behaviour.actions.extend(tlsannotations.of_backend(ask, self._namespace, self._secret, self._routes, behaviour.problems))

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
