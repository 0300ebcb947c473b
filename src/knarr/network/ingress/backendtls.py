"""BackendTLSPolicies: TLS to backends whose certificate is checked. Pure.

Role: `gateway` asks with `of` for the policy of a Service's port, and with `statuses` for what to write afterwards.
Invariants: of several policies for one Service or port the oldest counts; one for a port hides one for the Service. A policy that
cannot be followed lets nothing through: requests for its Service are answered 500.
Source: gateway-api BackendTLSPolicy, GEP-713 (conflicts).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.api.types import Object
from knarr.network.ingress.alternatives import Action
from knarr.network.ingress.annotations import HTTPS_BACKEND
from knarr.network.ingress.certificates import authority_name, readable, server_action
from knarr.network.ingress.gatewayapi import CONTROLLER, GROUP, condition
from knarr.network.ingress.routes import Routes, Server
from knarr.network.objects import object_key

SYSTEM = "@system-ca"
_Problem = tuple[str, str]


@dataclass(slots=True)
class _Policy:
    obj: Object
    server: Server | None = None
    pem: str = ""
    refused: _Problem | None = None
    unresolved: _Problem | None = None
    gateways: dict[str, None] = field(default_factory=dict)


class Policies:
    """See the module.

    Args:
      config_map: Finds a ConfigMap by its "namespace/name".
      port_names: Name of the port of a Service's backend reference.
    """

    def __init__(
        self,
        routes: Routes | None = None,
        objects: Iterable[Object] = (),
        config_map: Callable[[str], Object | None] = lambda _key: None,
        port_names: Callable[[str, str, Mapping[str, Any]], str] = lambda _namespace, _name, _port: "",
    ) -> None:
        self._routes = routes or Routes()
        self._config_map = config_map
        self._port_name = port_names
        self._by_target: dict[tuple[str, str, str], _Policy] = {}
        self._all: list[_Policy] = []
        for obj in sorted(objects, key=lambda obj: (obj["metadata"].get("creationTimestamp") or "", object_key(obj))):
            self._add(_Policy(obj))

    def _add(self, policy: _Policy) -> None:
        self._all.append(policy)
        self._read(policy)
        namespace, spec = policy.obj["metadata"]["namespace"], policy.obj.get("spec") or {}
        for ref in spec.get("targetRefs") or ():
            if ref.get("group", "") != "" or ref.get("kind") != "Service":
                continue
            target = (namespace, ref["name"], ref.get("sectionName") or "")
            if target in self._by_target:
                other = object_key(self._by_target[target].obj)
                policy.refused = ("Conflicted", f"policy {other} is older and counts for service {ref['name']}")
            else:
                self._by_target[target] = policy

    def _read(self, policy: _Policy) -> None:
        check = (policy.obj.get("spec") or {}).get("validation") or {}
        namespace, name = policy.obj["metadata"]["namespace"], check.get("hostname") or ""
        if check.get("subjectAltNames"):
            policy.refused = ("Invalid", "subjectAltNames are not supported")
            return
        if check.get("wellKnownCACertificates") == "System":
            policy.server = Server(name, SYSTEM, name)
            return
        pems: list[str] = []
        for ref in check.get("caCertificateRefs") or ():
            if ref.get("group", "") != "" or ref.get("kind") != "ConfigMap":
                policy.unresolved = ("InvalidKind", f"authorities of kind {ref.get('kind')} are not supported")
                continue
            found = self._config_map(f"{namespace}/{ref['name']}")
            pem = ((found or {}).get("data") or {}).get("ca.crt") or ""
            if readable(pem):
                pems.append(pem)
            else:
                policy.unresolved = ("InvalidCACertificateRef", f"config map {ref['name']} has no certificates under ca.crt")
        if not pems:
            policy.unresolved = policy.unresolved or ("InvalidCACertificateRef", "no authority is named")
            policy.refused = ("NoValidCACertificate", policy.unresolved[1])
            return
        pem = "\n".join(part.strip() for part in pems) + "\n"
        policy.server = Server(name, authority_name(pem), name)
        policy.pem = pem

    def of(self, namespace: str, name: str, port: Mapping[str, Any]) -> tuple[str, tuple[Action, ...]] | None:
        """Flags and actions for requests to a Service's port; None when no policy counts for it."""
        section = self._port_name(namespace, name, port)
        found = (self._by_target.get((namespace, name, section)) if section else None) or self._by_target.get((namespace, name, ""))
        if found is None:
            return None
        if found.server is None:
            return "", (("reply", "500"),)
        if found.pem:
            self._routes.authorities[found.server.authority] = found.pem
        return HTTPS_BACKEND, (server_action(self._routes, found.server),)

    def used_by(self, route: Object, gateway: str) -> None:
        """A route of a Gateway leads to Services: the policies of these are told about the Gateway."""
        own = route["metadata"]["namespace"]
        wanted = {
            (ref.get("namespace") or own, ref["name"])
            for rule in (route.get("spec") or {}).get("rules") or ()
            for ref in rule.get("backendRefs") or ()
        }
        for policy in self._all:
            targets = (policy.obj.get("spec") or {}).get("targetRefs") or ()
            if any((policy.obj["metadata"]["namespace"], ref["name"]) in wanted for ref in targets):
                policy.gateways[gateway] = None

    def statuses(self) -> dict[str, dict[str, Any]]:
        """Status of each policy that a Gateway of ours uses."""
        return {object_key(policy.obj): {"ancestors": [_ancestor(policy, key) for key in sorted(policy.gateways)[:16]]} for policy in self._all}


def _ancestor(policy: _Policy, gateway: str) -> dict[str, Any]:
    namespace, _slash, name = gateway.partition("/")
    generation = policy.obj["metadata"].get("generation") or 0
    return {
        "ancestorRef": {"group": GROUP, "kind": "Gateway", "namespace": namespace, "name": name},
        "controllerName": CONTROLLER,
        "conditions": [
            condition("Accepted", policy.refused is None, *(policy.refused or ("Accepted", "")), generation),
            condition("ResolvedRefs", policy.unresolved is None, *(policy.unresolved or ("ResolvedRefs", "")), generation),
        ],
    }
