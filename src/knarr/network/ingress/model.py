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
from knarr.network.ingress.routes import ENDPOINTS, FIRST, PASS, Addresses, Routes
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
        behaviour.actions = [self._placed(action, behaviour, backend) for action in behaviour.actions]
        target = self._target(backend, sticky=behaviour.sticky, stand_in=behaviour.stand_in)
        if target is None:
            return
        for text in behaviour.problems:
            self._problem(text)
        if any(char in path for char in "\r\n ") or "|" in host or ("|" in path and not behaviour.regex):
            self._problem(f"path {path!r} has characters that cannot be matched")
            return
        if behaviour.passes_tls and path == "/":
            if host == "*":
                self._problem("ssl-passthrough needs a host name")
            else:
                self._routes.streams.setdefault(host, f"{PASS}|{target}")
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
        if behaviour.trusted:
            open_to = tuple(action for action in actions if action[0] not in ("password", "judge"))
            self._add(place, Alternative(target, behaviour.flags, behaviour.argument, behaviour.trusted, open_to))
        for conditions in behaviour.conditions or [()]:
            self._add(place, Alternative(target, behaviour.flags, behaviour.argument, conditions, actions))
        if behaviour.refused_others:
            self._add(place, Alternative(target, actions=(("reply", "403"),)))

    def _placed(self, action: Action, behaviour: Behaviour, backend: Mapping[str, Any]) -> Action:
        """An action with the addresses of the servers that it names: the proxy does not ask the cluster's DNS."""
        if action[0] == "judge":
            found = self._address("auth-url", action[1])
            return ("judge", found, *action[2:]) if found else ("reply", "503")
        if action[0] == "mirror-url":
            scheme, _slashes, rest = action[1].partition("://")
            place, mark = re.match(r"([^/?$]*)(.*)", rest).groups()  # type: ignore[union-attr]
            found = self._address("mirror-target", f"{scheme}://{place}")
            return ("mirror-url", found + mark, *action[2:]) if found else ("once",)
        if action[0] == "errors":
            service = backend.get("service") or {}
            port = service.get("port") or {}
            target = self._stand_in_target(behaviour.stand_in)
            return ("errors", action[1], target, *action[3:], service.get("name") or "", str(port.get("number") or port.get("name") or ""))
        return action

    def _address(self, name: str, url: str) -> str:
        """An address for "scheme://host:port", if the host is a Service's name; "" (told) when it has none."""
        scheme, _slashes, place = url.partition("://")
        host, _colon, port = place.partition(":")
        service = re.fullmatch(r"([a-z0-9-]+)\.([a-z0-9-]+)\.svc(\..*)?", host)
        if service is None:
            return url
        number = int(port) if port.isdigit() else (443 if scheme == "https" else 80)
        found = self._addresses(service[2], service[1], {"number": number})
        if isinstance(found, str) or not found:
            self._problem(f"{name}: {found or 'the service has no endpoints'}")
            return ""
        address = f"[{found[0][0]}]" if ":" in found[0][0] else found[0][0]
        return f"{scheme}://{address}:{found[0][1]}"

    def _stand_in_target(self, name: str) -> str:
        """The target of a Service that stands in, by its first port."""
        target = f"{self._namespace}/{name}:"
        if target not in self._routes.targets:
            found = self._addresses(self._namespace, name, {FIRST: True})
            if isinstance(found, str):
                self._problem(f"default-backend: {found}")
                found = []
            self._write(target, found, sticky=False)
        return target

    def _target(self, backend: Mapping[str, Any], *, sticky: bool, stand_in: str) -> str | None:
        service = backend.get("service")
        if not service:
            self._problem("resource backends are not supported")
            return None
        port = service.get("port") or {}
        name = f"{self._namespace}/{service['name']}:{port.get('name') or port.get('number') or ''}" + ("!" if sticky else "")
        # Whether others have to stand in is known of endpoints only.
        name += f"?{stand_in}" if stand_in else ""
        if name in self._routes.targets:
            return name
        found = self._addresses(self._namespace, service["name"], {**port, ENDPOINTS: True} if sticky or stand_in else port)
        if isinstance(found, str):
            # The path stays known and answers 503 until the Service can be reached.
            self._problem(found)
            found = []
        if not found and stand_in:
            return self._stand_in_target(stand_in)
        self._write(name, found, sticky=sticky)
        return name

    def _write(self, name: str, places: list[tuple[str, int]], *, sticky: bool) -> None:
        self._routes.targets[name] = str(len(places))
        for index, (address, number) in enumerate(places):
            # What a client's cookie says of where it was: it must not tell the address itself.
            mark = hashlib.blake2b(f"{name} {address} {number}".encode(), digest_size=12).hexdigest() if sticky else ""
            self._routes.targets[f"{name}#{index}"] = f"{address}|{number}" + (f"|{mark}" if mark else "")
            if mark:
                self._routes.targets[f"{name}@{mark}"] = f"{address}|{number}"
