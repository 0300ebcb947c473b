"""Ingresses as a routing table: pure functions from API objects to what the proxy looks up.

Role: `build` is called by the controller after every change, and by tests. The result is plain mappings, the same input
giving the same output, so that the difference to what the proxy holds is the whole change.
Invariants: a host's rules are chosen first (exact name, then one-label wildcard, then rules without host), then the
path: Exact before Prefix, the longest Prefix first, by whole path elements. Where two Ingresses claim one host and path
the older wins. What cannot be served is named in `problems`; the rest works.
Source: networking/v1 Ingress API documentation; behaviour and annotations of ingress-nginx.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.api.types import Object
from knarr.network.objects import object_key

CLASS_ANNOTATION = "kubernetes.io/ingress.class"
ANNOTATION_PREFIXES = ("knarr.dev/", "nginx.ingress.kubernetes.io/")
HTTPS_BACKEND, HTTP2_BACKEND, TO_HTTPS, MOVED, ONLY_PLAIN, ONLY_TLS = "S", "G", "R", "M", "P", "T"
TO_HTTPS_301, TO_HTTPS_302 = "1", "2"
_PROTOCOL_FLAGS = {"": "", "HTTP": "", "HTTPS": HTTPS_BACKEND, "GRPC": HTTP2_BACKEND, "GRPCS": HTTPS_BACKEND}


@dataclass(slots=True)
class Routes:
    """The routing table.

    Attributes:
      hosts: Host name or "*.domain" (lower case) that has rules; itself as value.
      exact, prefix: "host|path" to "target|flags|argument"; prefixes end in "/".
      targets: Target to its number of addresses, and "target#index" to "address|port".
      certificates: Host name to the Secret ("namespace/name") whose certificate serves it; "" holds none.
      problems: (Ingress key, text) of what cannot be served.
    """

    hosts: dict[str, str] = field(default_factory=dict)
    exact: dict[str, str] = field(default_factory=dict)
    prefix: dict[str, str] = field(default_factory=dict)
    targets: dict[str, str] = field(default_factory=dict)
    certificates: dict[str, str] = field(default_factory=dict)
    problems: list[tuple[str, str]] = field(default_factory=list)


Addresses = Callable[[str, str, Mapping[str, Any]], list[tuple[str, int]] | str]
"""(namespace, Service, backend port) to the addresses to send to, or why there are none."""


def annotation(obj: Object, name: str) -> str:
    """One of the known annotations, under any of its prefixes; "" when absent."""
    annotations = obj["metadata"].get("annotations") or {}
    return next((annotations[prefix + name] for prefix in ANNOTATION_PREFIXES if prefix + name in annotations), "")


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
        if any(char in path for char in "|\r\n ") or "|" in host:
            self._problem(f"path {path!r} has characters that cannot be matched")
            return
        target = self._target(backend)
        if target is None:
            return
        flags, argument = self._behaviour(host)
        value = f"{target}|{flags}|{argument}"
        if host != "*":
            self._routes.hosts[host] = host
        if kind == "Exact":
            self._routes.exact.setdefault(f"{host}|{path}", value)
            return
        self._routes.prefix.setdefault(f"{host}|{path.rstrip('/')}/", value)

    def _behaviour(self, host: str) -> tuple[str, str]:
        flags, argument = "", ""
        protocol = annotation(self._ingress, "backend-protocol").upper()
        if protocol in _PROTOCOL_FLAGS:
            flags += _PROTOCOL_FLAGS[protocol]
        else:
            self._problem(f"backend-protocol {protocol} is not supported")
        redirect = annotation(self._ingress, "ssl-redirect") != "false" and host in self._tls_hosts
        if redirect or annotation(self._ingress, "force-ssl-redirect") == "true":
            flags += TO_HTTPS
        moved, rewrite = annotation(self._ingress, "permanent-redirect"), annotation(self._ingress, "rewrite-target")
        if moved:
            return flags + MOVED, moved.replace("|", "%7C")
        if "$" in rewrite:
            self._problem("rewrite-target with captures is not supported; the path is passed on unchanged")
        elif rewrite:
            argument = rewrite.replace("|", "%7C")
        return flags, argument

    def _target(self, backend: Mapping[str, Any]) -> str | None:
        service = backend.get("service")
        if not service:
            self._problem("resource backends are not supported")
            return None
        port = service.get("port") or {}
        name = f"{self._namespace}/{service['name']}:{port.get('name') or port.get('number') or ''}"
        if name in self._routes.targets:
            return name
        found = self._addresses(self._namespace, service["name"], port)
        if isinstance(found, str):
            # The path stays known and answers 503 until the Service can be reached.
            self._problem(found)
            found = []
        self._routes.targets[name] = str(len(found))
        for index, (address, number) in enumerate(found):
            self._routes.targets[f"{name}#{index}"] = f"{address}|{number}"
        return name
