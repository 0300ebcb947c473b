"""Gateway API beside Ingress: watches its resources once they are served, writes their statuses.

Role: owned by `controller`. The resources are custom; whoever wants them installs their definitions, and from then on
we follow. Making routes of them is `gateway`'s work.
Invariants: without the definitions nothing is watched but them. Only objects of classes whose controllerName is ours
get a status, and of an HTTPRoute only our own parents' entries.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

from knarr.aiokits.clock import now_rfc3339
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, CUSTOM_RESOURCE_DEFINITIONS, ENDPOINT_SLICES, NAMESPACES, SERVICES
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.informer import Informer, Informers
from knarr.client.rest import Client
from knarr.network.ingress import gateway
from knarr.network.ingress.backendtls import Policies
from knarr.network.ingress.gateway import Outcome, Published, World
from knarr.network.ingress.gatewayapi import (
    BACKEND_TLS_POLICIES,
    CONTROLLER,
    FEATURES,
    GATEWAY_CLASSES,
    GATEWAYS,
    GROUP,
    HTTP_ROUTES,
    REFERENCE_GRANTS,
    ROUTES,
    condition,
)
from knarr.network.ingress.gatewayservices import GatewayServices, Ports, is_of_gateway
from knarr.network.ingress.routes import Addresses, Routes
from knarr.network.loadbalancer import ingress_addresses
from knarr.network.objects import object_key

log = get_logger(__name__)

_KINDS = (GATEWAY_CLASSES, GATEWAYS, HTTP_ROUTES)
_OPTIONAL = (*ROUTES[1:], REFERENCE_GRANTS, BACKEND_TLS_POLICIES)
"""Served by some releases of the definitions only."""


def _slim(obj: Object) -> Object:
    # Of a definition only its name and whether it is served matter; schemas are large.
    return {
        "metadata": {"name": obj["metadata"]["name"], "resourceVersion": obj["metadata"].get("resourceVersion")},
        "versions": [item["name"] for item in (obj.get("spec") or {}).get("versions") or () if item.get("served")],
        "status": {"conditions": (obj.get("status") or {}).get("conditions") or []},
    }


class GatewaySupport:
    """See the module.

    Args:
      wake: Set when something changed.
      shown: Addresses of this machine, under which all Gateways are reached.
      class_name: Name of the GatewayClass that we make.
      own_addresses: Every Gateway gets a Service of type LoadBalancer; there must be somebody who gives those addresses.
    """

    def __init__(
        self, client: Client, informers: Informers, wake: asyncio.Event, shown: Sequence[Mapping[str, str]], *, class_name: str, own_addresses: bool
    ) -> None:
        self._client = client
        self._informers = informers
        self._wake = wake
        self._shown = shown
        self._definitions = informers.get(CUSTOM_RESOURCE_DEFINITIONS, transform=_slim)
        self._namespaces = informers.get(NAMESPACES)
        self._watched: dict[Resource, Informer] = {}
        self._class = class_name
        self._services = informers.get(SERVICES)
        self._own = GatewayServices(client, self._services, informers.get(ENDPOINT_SLICES)) if own_addresses else None

    def subscribe(self) -> None:
        """Follow the definitions."""
        self._definitions.add_handler(self._definition_seen, lambda _old, new: self._definition_seen(new))
        self._namespaces.add_handler(self._namespace_seen, self._namespace_changed)
        self._services.add_handler(on_update=self._service_changed)

    def _definition_seen(self, obj: Object) -> None:
        if obj["metadata"]["name"].endswith("." + GROUP):
            self._wake.set()

    def _namespace_seen(self, _obj: Object) -> None:
        if self._watched:
            self._wake.set()

    def _namespace_changed(self, old: Object, new: Object) -> None:
        if old["metadata"].get("labels") != new["metadata"].get("labels"):
            self._namespace_seen(new)

    def _service_changed(self, old: Object, new: Object) -> None:
        if is_of_gateway(new) and ingress_addresses(old) != ingress_addresses(new):
            self._wake.set()

    def _served(self, resource: Resource) -> bool:
        found = self._definitions.get(None, f"{resource.plural}.{resource.group}")
        if found is None or resource.version not in found["versions"]:
            return False
        return any(item.get("type") == "Established" and item.get("status") == "True" for item in found["status"]["conditions"])

    @property
    def active(self) -> bool:
        """Whether the resources are watched."""
        return all(resource in self._watched for resource in _KINDS) and all(informer.synced for informer in self._watched.values())

    def _list(self, resource: Resource) -> list[Object]:
        return list(self._watched[resource].list()) if resource in self._watched else []

    async def prepare(self) -> None:
        """Begin to watch the resources as soon as they are served."""
        if not all(self._served(resource) for resource in _KINDS):
            return
        fresh = [resource for resource in (*_KINDS, *_OPTIONAL) if resource not in self._watched and self._served(resource)]
        if BACKEND_TLS_POLICIES in self._watched and CONFIG_MAPS not in self._watched and self._list(BACKEND_TLS_POLICIES):
            # Authorities lie in them; nobody else here needs them.
            fresh.append(CONFIG_MAPS)
        for resource in fresh:
            informer = self._informers.get(resource)
            informer.add_handler(self._seen, self._changed, self._seen)
            self._watched[resource] = informer
        if fresh:
            await self._informers.start()
            for informer in self._watched.values():
                await informer.wait_synced()
        await self._ensure_class()

    async def _ensure_class(self) -> None:
        if self._watched[GATEWAY_CLASSES].get(None, self._class) is not None:
            return
        metadata = {"name": self._class, "labels": {"app.kubernetes.io/managed-by": "knarr"}}
        wanted = {"apiVersion": GATEWAY_CLASSES.api_version, "kind": GATEWAY_CLASSES.kind, "metadata": metadata, "spec": {"controllerName": CONTROLLER}}
        try:
            await self._client.create(GATEWAY_CLASSES, wanted)
        except StatusError as error:
            if not errors.is_already_exists(error):
                raise

    def _seen(self, _obj: Object) -> None:
        self._wake.set()

    def _changed(self, old: Object, new: Object) -> None:
        if old.get("spec") != new.get("spec") or old.get("data") != new.get("data") or old["metadata"].get("deletionTimestamp") != new["metadata"].get("deletionTimestamp"):
            self._wake.set()

    def _classes(self) -> list[Object]:
        return [obj for obj in self._watched[GATEWAY_CLASSES].list() if (obj.get("spec") or {}).get("controllerName") == CONTROLLER]

    def gateways(self) -> list[Object]:
        """Gateways of our classes."""
        if not self.active:
            return []
        names = {obj["metadata"]["name"] for obj in self._classes()}
        return [obj for obj in self._watched[GATEWAYS].list() if (obj.get("spec") or {}).get("gatewayClassName") in names]

    def _published(self, obj: Object) -> Published:
        return self._own.published(obj) if self._own else Published(tuple(item["ip"] for item in self._shown))

    def add_routes(self, routes: Routes, addresses: Addresses, has_secret: Mapping[str, bool]) -> Outcome:
        """Add all routes of our Gateways; see gateway.add_routes."""
        if not self.active:
            return Outcome()
        labels = {obj["metadata"]["name"]: obj["metadata"].get("labels") or {} for obj in self._namespaces.list()}
        maps = self._watched.get(CONFIG_MAPS)
        policies = Policies(routes, self._list(BACKEND_TLS_POLICIES), maps.get_key if maps else lambda _key: None, self._port_name)
        world = World(
            addresses=addresses,
            has_secret=has_secret,
            namespace_labels=labels,
            published=self._published,
            grants=self._list(REFERENCE_GRANTS),
            protocols=lambda *asked: str(self._port(*asked).get("appProtocol") or ""),
            policies=policies,
        )
        return gateway.add_routes(routes, self.gateways(), {resource.kind: self._list(resource) for resource in ROUTES}, world)

    def _port(self, namespace: str, name: str, port: Mapping[str, Any]) -> Mapping[str, Any]:
        service = self._services.get(namespace, name) or {}
        return next((item for item in (service.get("spec") or {}).get("ports") or () if item.get("port") == port.get("number")), {})

    def _port_name(self, namespace: str, name: str, port: Mapping[str, Any]) -> str:
        return str(self._port(namespace, name, port).get("name") or "")

    async def bring_about(self, outcome: Outcome, ports: Ports) -> None:
        """Give every Gateway its Service."""
        if self.active and self._own:
            before = dict(self._own.refused)
            await self._own.bring_about(self.gateways(), outcome.listeners, ports)
            if self._own.refused != before:
                # What was refused is said in the status, which is made before.
                self._wake.set()

    async def write_statuses(self, outcome: Outcome) -> None:
        """Bring statuses to what came out; unchanged ones are not written."""
        if not self.active:
            return
        for obj in self._classes():
            generation = obj["metadata"].get("generation") or 0
            status = {"conditions": [condition("Accepted", True, "Accepted", "", generation)], "supportedFeatures": [{"name": name} for name in FEATURES]}
            await self._write(GATEWAY_CLASSES, obj, status)
        for obj in self.gateways():
            if (found := outcome.gateways.get(object_key(obj))) is not None:
                await self._write(GATEWAYS, obj, found)
        for resource in ROUTES:
            await self._write_shares(resource, "parents", outcome.routes.get(resource.kind, {}))
        await self._write_shares(BACKEND_TLS_POLICIES, "ancestors", outcome.policies)

    async def _write_shares(self, resource: Resource, part: str, statuses: Mapping[str, Mapping[str, Any]]) -> None:
        """Write our entries of a list that other controllers write to, too."""
        for obj in self._list(resource):
            present = (obj.get("status") or {}).get(part) or ()
            foreign = [item for item in present if item.get("controllerName") != CONTROLLER]
            ours = statuses.get(object_key(obj), {}).get(part, [])
            if ours or len(foreign) != len(present):
                await self._write(resource, obj, {part: [*foreign, *ours]})

    async def _write(self, resource: Resource, obj: Object, status: dict[str, Any]) -> None:
        before = obj.get("status") or {}
        _keep_times(before, status)
        if all(before.get(name) == content for name, content in status.items()):
            return
        meta = obj["metadata"]
        try:
            patch = {"metadata": {"uid": meta["uid"]}, "status": status}
            await self._client.patch(resource, meta["name"], meta.get("namespace"), patch, type="merge", subresource="status")
        except StatusError as error:
            if not errors.is_not_found(error) and not errors.is_conflict(error):
                raise


def _keep_times(before: Any, after: Any) -> None:
    """Give every condition its transition time: the former one unless its status changed."""
    if isinstance(after, dict):
        conditions = after.get("conditions")
        if isinstance(conditions, list):
            known = {item.get("type"): item for item in (before.get("conditions") if isinstance(before, dict) else None) or ()}
            for item in conditions:
                old = known.get(item["type"])
                same = old is not None and old.get("status") == item["status"]
                item["lastTransitionTime"] = old["lastTransitionTime"] if same and old and old.get("lastTransitionTime") else now_rfc3339()
        for name, part in after.items():
            if name != "conditions":
                _keep_times(before.get(name) if isinstance(before, dict) else None, part)
    elif isinstance(after, list):
        for index, part in enumerate(after):
            identity = _identity(part)
            match = next((item for item in before or () if _identity(item) == identity), None) if isinstance(before, list) else None
            _keep_times(
                match if identity is not None else (before[index] if isinstance(before, list) and index < len(before) else None), part
            )


def _identity(part: Any) -> Any:
    return (part.get("name") or part.get("parentRef") or part.get("ancestorRef")) if isinstance(part, dict) else None
