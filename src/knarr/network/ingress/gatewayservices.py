"""A Service of type LoadBalancer for each Gateway, so that it has addresses of its own, and any ports.

Role: owned by `gateways`. The Service leads to the proxy on this machine; the load balancer gives it an address; the proxy sees
from a connection's first destination which Gateway and port were meant (`doors`).
Invariants: only Services that carry our label and belong to the Gateway are touched; they go with it. A Service that somebody else
made under the name is left alone, and the Gateway says so.
Source: gateway-api GatewaySpec.addresses, GatewayInfrastructure, GEP-1762 (names and labels of what belongs to a Gateway).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import ENDPOINT_SLICES, SERVICES
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.informer import Informer
from knarr.client.rest import Client
from knarr.network.ingress.gateway import Published
from knarr.network.ingress.gatewayapi import GATEWAYS
from knarr.network.ingress.listeners import Listener
from knarr.network.loadbalancer import ingress_addresses
from knarr.network.objects import SERVICE_NAME, object_key

log = get_logger(__name__)

GATEWAY_NAME = "gateway.networking.k8s.io/gateway-name"
MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
_OURS = "gateway.knarr.dev"
_LONGEST_NAME = 63


@dataclass(frozen=True, slots=True)
class Ports:
    """Where the proxy listens on this machine."""

    address: str
    http: int
    https: int
    streams: int


def service_name(gateway: Object) -> str:
    """Name of a Gateway's Service."""
    name = f"{gateway['metadata']['name']}-{gateway['spec']['gatewayClassName']}".replace(".", "-")
    if len(name) <= _LONGEST_NAME and name[0].isalpha():
        return name
    return f"gateway-{hashlib.blake2b(object_key(gateway).encode(), digest_size=10).hexdigest()}"


def is_of_gateway(service: Object) -> bool:
    """Whether we made a Service for a Gateway."""
    return ((service["metadata"].get("labels") or {}).get(MANAGED_BY)) == _OURS


def _asked(gateway: Object) -> list[str]:
    return [item["value"] for item in (gateway.get("spec") or {}).get("addresses") or () if item.get("value")]


def _metadata(gateway: Object) -> dict[str, Any]:
    meta, extra = gateway["metadata"], (gateway.get("spec") or {}).get("infrastructure") or {}
    owner = {"apiVersion": GATEWAYS.api_version, "kind": GATEWAYS.kind, "name": meta["name"], "uid": meta["uid"], "controller": True, "blockOwnerDeletion": True}
    return {
        "name": service_name(gateway),
        "namespace": meta["namespace"],
        "labels": {**(extra.get("labels") or {}), GATEWAY_NAME: meta["name"], MANAGED_BY: _OURS},
        "annotations": dict(extra.get("annotations") or {}),
        "ownerReferences": [owner],
    }


def render_service(gateway: Object, listeners: Sequence[Listener]) -> Object:
    """The Service that a Gateway wants."""
    ports = sorted({listener.port for listener in listeners if listener.works})
    spec: dict[str, Any] = {
        "type": "LoadBalancer",
        "allocateLoadBalancerNodePorts": False,
        "ipFamilyPolicy": "SingleStack",
        "ipFamilies": ["IPv4"],
        # There is one endpoint. But connections to Services with affinity are translated on their way, never when they are begun, so
        # that the proxy can ask where they were meant to go.
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ports": [{"name": f"p{port}", "port": port, "protocol": "TCP", "targetPort": port} for port in ports],
    }
    if asked := _asked(gateway):
        spec["loadBalancerIP"] = asked[0]
    return {"apiVersion": "v1", "kind": "Service", "metadata": _metadata(gateway), "spec": spec}


def render_slice(gateway: Object, listeners: Sequence[Listener], ports: Ports) -> Object:
    """The EndpointSlice behind the Service: the proxy."""
    to: dict[int, int] = {}
    for listener in listeners:
        if listener.works:
            place = {"HTTP": ports.http, "HTTPS": ports.https}.get(listener.protocol, ports.streams)
            # Where some names of a port are passed on undecrypted, somebody has to look at the name first.
            to[listener.port] = ports.streams if ports.streams in (place, to.get(listener.port)) else place
    metadata = _metadata(gateway)
    metadata["labels"] = {**metadata["labels"], SERVICE_NAME: metadata["name"]}
    return {
        "apiVersion": ENDPOINT_SLICES.api_version,
        "kind": ENDPOINT_SLICES.kind,
        "metadata": metadata,
        "addressType": "IPv4",
        "endpoints": [{"addresses": [ports.address], "conditions": {"ready": True}}],
        # There is one endpoint. But connections to Services with affinity are translated on their way, never when they are begun, so
        # that the proxy can ask where they were meant to go.
        "sessionAffinity": "ClientIP",
        "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
        "ports": [{"name": f"p{port}", "port": place, "protocol": "TCP"} for port, place in sorted(to.items())],
    }


def _part(obj: Any, wanted: Any) -> Any:
    """What of an object is compared with the wanted one: the same keys, at any depth."""
    if isinstance(wanted, dict):
        return {name: _part(obj.get(name), part) for name, part in wanted.items()} if isinstance(obj, dict) else obj
    if isinstance(wanted, list) and isinstance(obj, list) and len(obj) == len(wanted):
        return [_part(*pair) for pair in zip(obj, wanted, strict=True)]
    return obj


class GatewayServices:
    """See the module."""

    def __init__(self, client: Client, services: Informer, slices: Informer) -> None:
        self._client = client
        self._services = services
        self._slices = slices
        self.refused: dict[str, str] = {}
        """Why the API does not take a Service or EndpointSlice, by kind and key."""
        services.add_index("of-gateway", lambda obj: ["yes"] if is_of_gateway(obj) else [])

    def published(self, gateway: Object) -> Published:
        """Where a Gateway is reached now, by its Service."""
        namespace, name = gateway["metadata"]["namespace"], service_name(gateway)
        service = self._services.get(namespace, name)
        if service is None:
            why = self.refused.get(f"Service {namespace}/{name}", "its Service does not exist yet")
            return Published(pending=("AddressNotAssigned", why), own=True)
        if not is_of_gateway(service):
            return Published(pending=("AddressNotAssigned", f"there is a service {service['metadata']['name']} that is not its own"), own=True)
        found, asked = tuple(ingress_addresses(service)), _asked(gateway)
        inside = tuple((service.get("spec") or {}).get("clusterIPs") or ())
        if asked and (not found or set(asked) - set(found)):
            return Published((), inside, ("AddressNotUsable", f"address {asked[0]} cannot be had"), own=True)
        if not found:
            return Published((), inside, ("AddressNotAssigned", "its Service has no address yet"), own=True)
        return Published(found, inside, own=True)

    async def bring_about(self, gateways: Iterable[Object], listeners: Mapping[str, Sequence[Listener]], ports: Ports) -> None:
        """Make, change and remove Services and EndpointSlices. Raises StatusError."""
        wanted: set[str] = set()
        for gateway in gateways:
            mine = listeners.get(object_key(gateway), ())
            if not any(listener.works for listener in mine):
                continue
            service = render_service(gateway, mine)
            wanted.add(object_key(service))
            current = self._services.get(service["metadata"]["namespace"], service["metadata"]["name"])
            if current is None or is_of_gateway(current):
                await self._put(SERVICES, current, service)
                part = render_slice(gateway, mine, ports)
                await self._put(ENDPOINT_SLICES, self._slices.get(part["metadata"]["namespace"], part["metadata"]["name"]), part)
        for service in list(self._services.by_index("of-gateway", "yes")):
            if object_key(service) not in wanted and not service["metadata"].get("deletionTimestamp"):
                await self._remove(service)

    async def _put(self, resource: Resource, current: Object | None, wanted: Object) -> None:
        meta = wanted["metadata"]
        try:
            if current is None:
                await self._client.create(resource, wanted, meta["namespace"])
            elif _part(current, wanted) != wanted or (current.get("spec") or {}).get("loadBalancerIP") != (wanted.get("spec") or {}).get("loadBalancerIP"):
                patch = {name: part for name, part in wanted.items() if name not in ("apiVersion", "kind")}
                patch["metadata"] = {"uid": current["metadata"]["uid"], "labels": meta["labels"], "annotations": meta["annotations"]}
                if resource is SERVICES:
                    patch["spec"] = {"loadBalancerIP": None, **wanted["spec"]}
                await self._client.patch(resource, meta["name"], meta["namespace"], patch, type="merge")
        except StatusError as error:
            # Where somebody was faster, or it is being removed, its own event comes.
            if errors.is_already_exists(error) or errors.is_conflict(error) or errors.is_not_found(error):
                return
            if error.code not in (400, 403, 422):
                raise
            # A quota, or a namespace that is being removed, is this Gateway's trouble only.
            key = f"{resource.kind} {object_key(wanted)}"
            if self.refused.get(key) != error.message:
                log.warning("a gateway gets no service", gateway=meta["labels"][GATEWAY_NAME], namespace=meta["namespace"], error=error.message)
            self.refused[key] = error.message
        else:
            self.refused.pop(f"{resource.kind} {object_key(wanted)}", None)

    async def _remove(self, service: Object) -> None:
        meta = service["metadata"]
        for resource in (ENDPOINT_SLICES, SERVICES):
            try:
                await self._client.delete(resource, meta["name"], meta["namespace"])
            except StatusError as error:
                if not errors.is_not_found(error):
                    raise
