"""Listeners of Gateways: what they take, what is wrong with them, and their part of the status. Pure.

Role: `gateway` reads the listeners of its Gateways, attaches routes, and asks for the status at the end.
Invariants: a listener that is wrong costs itself only; routes attach to it all the same and are counted, as the
specification wants, but nothing is served through it. Of listeners of one port that exclude each other none works.
Source: gateway-api ListenerStatus, GatewayStatus.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from knarr.api.selectors import from_label_selector
from knarr.api.types import Object
from knarr.network.ingress.gatewayapi import GROUP, condition
from knarr.network.ingress.gatewaybackends import Grants, Problem
from knarr.network.objects import is_address, object_key

_KINDS = {"HTTP": ("HTTPRoute", "GRPCRoute"), "HTTPS": ("HTTPRoute", "GRPCRoute"), "TLS": ("TLSRoute",)}
_NAMES_OF_GATEWAYS = ("IPAddress",)


@dataclass(slots=True)
class Listener:
    """One listener of one of our Gateways, and why it does not work, if so.

    Attributes:
      passthrough: TLS goes through untouched; its name decides alone.
      refused: Reason and message of Accepted=False.
      unresolved: Reason and message of ResolvedRefs=False.
      conflict: Reason and message of Conflicted=True.
      broken: Nothing can be served through it, whatever the conditions above say.
    """

    gateway: Object
    name: str
    protocol: str
    hostname: str
    port: int = 0
    passthrough: bool = False
    kinds: tuple[str, ...] = ()
    namespaces: Mapping[str, Any] = field(default_factory=dict)
    secret: str = ""
    refused: Problem | None = None
    unresolved: Problem | None = None
    conflict: Problem | None = None
    broken: bool = False
    attached: int = 0

    @property
    def key(self) -> str:
        """Its Gateway as "namespace/name"."""
        return object_key(self.gateway)

    @property
    def works(self) -> bool:
        """Whether requests are served through it."""
        return not (self.refused or self.conflict or self.broken)

    def takes(self, route: Object, kind: str, namespace_labels: Mapping[str, Mapping[str, str]]) -> bool:
        """Whether it lets a route of some kind attach."""
        if kind not in self.kinds:
            return False
        source, namespace = self.namespaces.get("from", "Same"), route["metadata"]["namespace"]
        if source == "Selector":
            return from_label_selector(self.namespaces.get("selector") or {}).matches(namespace_labels.get(namespace, {}))
        return bool(source == "All" or (source == "Same" and namespace == self.gateway["metadata"]["namespace"]))

    def status(self) -> dict[str, Any]:
        """Its part of the Gateway's status."""
        generation = self.gateway["metadata"].get("generation") or 0
        refused = self.refused or self.conflict
        conditions = [
            condition("Accepted", refused is None, *(refused or ("Accepted", "")), generation),
            condition("Programmed", self.works, "Programmed" if self.works else "Invalid", "", generation),
            condition("ResolvedRefs", self.unresolved is None, *(self.unresolved or ("ResolvedRefs", "")), generation),
            condition("Conflicted", self.conflict is not None, *(self.conflict or ("NoConflicts", "")), generation),
        ]
        kinds = [{"group": GROUP, "kind": kind} for kind in self.kinds]
        return {"name": self.name, "attachedRoutes": self.attached, "supportedKinds": kinds, "conditions": conditions}


def read_listeners(gateway: Object, has_secret: Mapping[str, bool], grants: Grants) -> list[Listener]:
    """All listeners of a Gateway."""
    found = [_read(gateway, item, has_secret, grants) for item in (gateway.get("spec") or {}).get("listeners") or ()]
    by_port: dict[int, list[Listener]] = {}
    for listener in found:
        by_port.setdefault(listener.port, []).append(listener)
    for mine in by_port.values():
        _find_conflicts(mine)
    return found


def _read(gateway: Object, item: Mapping[str, Any], has_secret: Mapping[str, bool], grants: Grants) -> Listener:
    allowed = item.get("allowedRoutes") or {}
    listener = Listener(gateway, item["name"], item.get("protocol") or "", (item.get("hostname") or "").lower(), int(item.get("port") or 0))
    listener.namespaces = allowed.get("namespaces") or {}
    if listener.protocol not in _KINDS:
        listener.refused = ("UnsupportedProtocol", f"protocol {listener.protocol} is not supported")
        return listener
    asked = allowed.get("kinds") or ()
    listener.kinds = _KINDS[listener.protocol]
    if asked:
        wanted = [kind["kind"] for kind in asked if kind.get("group", GROUP) == GROUP]
        wrong = [kind["kind"] for kind in asked if kind.get("group", GROUP) != GROUP or kind["kind"] not in listener.kinds]
        listener.kinds = tuple(kind for kind in listener.kinds if kind in wanted)
        if wrong:
            listener.unresolved = ("InvalidRouteKinds", f"routes of kind {', '.join(wrong)} are not supported with protocol {listener.protocol}")
            listener.broken = not listener.kinds
    if listener.protocol != "HTTP":
        _read_tls(listener, item.get("tls") or {}, has_secret, grants)
    return listener


def _read_tls(listener: Listener, tls: Mapping[str, Any], has_secret: Mapping[str, bool], grants: Grants) -> None:
    mode = tls.get("mode") or "Terminate"
    if mode == "Passthrough" and listener.protocol == "TLS":
        listener.passthrough = True
        return
    if mode != "Terminate":
        listener.refused = ("UnsupportedValue", f"TLS mode {mode} is not supported with protocol {listener.protocol}")
        return
    namespace = listener.gateway["metadata"]["namespace"]
    problem: Problem | None = None if tls.get("certificateRefs") else ("InvalidCertificateRef", "there is no certificate")
    for ref in tls.get("certificateRefs") or ():
        owner, key = ref.get("namespace") or namespace, f"{ref.get('namespace') or namespace}/{ref['name']}"
        if ref.get("group", "") != "" or ref.get("kind", "Secret") != "Secret":
            problem = ("InvalidCertificateRef", f"certificates of kind {ref.get('kind')} are not supported")
        elif not grants.permit("Gateway", namespace, "Secret", owner, ref["name"]):
            problem = ("RefNotPermitted", f"no ReferenceGrant in namespace {owner} permits to use its certificate")
        elif not has_secret.get(key):
            problem = ("InvalidCertificateRef", f"secret {key} has no usable certificate")
        elif not listener.secret:
            listener.secret = key
    listener.broken = listener.broken or problem is not None
    listener.unresolved = problem or listener.unresolved


def _find_conflicts(listeners: Sequence[Listener]) -> None:
    """Listeners of one port."""
    plain = [listener for listener in listeners if listener.protocol == "HTTP"]
    names = [(listener.protocol, listener.hostname) for listener in listeners]
    for listener in listeners:
        if listener.refused:
            continue
        if plain and len(plain) != len([item for item in listeners if not item.refused]):
            listener.conflict = ("ProtocolConflict", f"port {listener.port} has listeners with and without TLS")
        elif names.count((listener.protocol, listener.hostname)) > 1:
            listener.conflict = ("HostnameConflict", f"port {listener.port} has several listeners for the host name {listener.hostname!r}")


def unusable_address(gateway: Object) -> Problem | None:
    """Why the addresses that a Gateway asks for cannot be had at all."""
    for item in (gateway.get("spec") or {}).get("addresses") or ():
        kind = item.get("type") or "IPAddress"
        if kind not in _NAMES_OF_GATEWAYS or (item.get("value") and not is_address(item["value"])):
            return "UnsupportedAddress", f"addresses of type {kind} are not supported"
    return None


def gateway_status(gateway: Object, listeners: Sequence[Listener], addresses: Sequence[str], pending: Problem | None) -> dict[str, Any]:
    """The whole status of a Gateway.

    Args:
      addresses: Where it is reached.
      pending: Why it is not reached anywhere yet.
    """
    generation = gateway["metadata"].get("generation") or 0
    refused = unusable_address(gateway)
    good = [listener for listener in listeners if listener.works]
    accepted = ("Accepted", "") if len(good) == len(listeners) else ("ListenersNotValid", "some listeners do not work")
    programmed = ("Programmed", "") if good else ("Invalid", "no listener works")
    if good and pending:
        programmed = pending
    accepts = refused is None and any(not (listener.refused or listener.conflict) for listener in listeners)
    return {
        "addresses": [{"type": "IPAddress", "value": address} for address in addresses],
        "conditions": [
            condition("Accepted", accepts, *(refused or accepted), generation),
            condition("Programmed", bool(good) and not pending and not refused, *(("Invalid", "") if refused else programmed), generation),
        ],
        "listeners": [listener.status() for listener in listeners],
    }
