"""Endpoints of Services with a selector, the older form of EndpointSlices.

Source: pkg/controller/endpoint/endpoints_controller.go, pkg/api/v1/endpoints/util.go.
"""

from __future__ import annotations

import ipaddress
import math
from typing import Any

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import ENDPOINTS, SERVICES
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.client.leanpods import pod_ips
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key
from knarr.controllers.ownwrites import OwnWrites
from knarr.controllers.podservices import PodServices, TriggerTimes, belongs_in_endpoints, find_port, is_headless, needs_hostname

_HEADLESS = "service.kubernetes.io/headless"
_MANAGED_BY = "endpoints.kubernetes.io/managed-by"
_MANAGER = "endpoint-controller"
_TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
_OVER_CAPACITY = "endpoints.kubernetes.io/over-capacity"
_CAPACITY = 1000


class EndpointsController:
    """Keeps the Endpoints object of every Service with a selector."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._batch = ctx.config.endpoint_batch_seconds
        self._services = ctx.informer(SERVICES)
        self._endpoints = ctx.informer(ENDPOINTS)
        self._recorder = ctx.recorder("endpoint-controller")
        self._members = PodServices(self._services, ctx.pods)
        self._triggers = TriggerTimes()
        self._writes = OwnWrites(self._endpoints)
        # Endpoints go with a Service of their name, also hand-made ones; others without one are left alone.
        self._bereft: set[str] = set()
        self.controller = Controller("endpoints-controller", self._reconcile, workers=10, max_retries=15)
        self._services.add_handler(self._service_changed, lambda old, new: self._service_changed(new), self._service_deleted)
        ctx.pods.add_handler(self._pod_changed, self._pod_updated, self._pod_changed)
        self._endpoints.add_handler(self._seen, lambda old, new: self._seen(new), self._endpoints_deleted)

    async def run(self) -> None:
        # Endpoints whose Service went away while nobody was looking.
        for endpoints in self._endpoints:
            if meta.labels(endpoints).get(_MANAGED_BY) == _MANAGER:
                self.controller.queue.add(object_key(endpoints))
        await self.controller.run()

    def _service_changed(self, service: Object) -> None:
        self.controller.queue.add(object_key(service))

    def _service_deleted(self, service: Object) -> None:
        self._members.forget(service)
        self._bereft.add(object_key(service))
        self.controller.queue.add(object_key(service))

    def _pod_changed(self, pod: Object) -> None:
        for key in self._members.services_of(pod):
            self.controller.queue.add_after(key, self._batch)

    def _pod_updated(self, old: Object, new: Object) -> None:
        for key in self._members.changed(old, new):
            self.controller.queue.add_after(key, self._batch)

    def _seen(self, endpoints: Object) -> None:
        self._writes.seen(object_key(endpoints), endpoints)

    def _endpoints_deleted(self, endpoints: Object) -> None:
        self._writes.seen(object_key(endpoints), endpoints, True)
        self.controller.queue.add(object_key(endpoints))

    async def _reconcile(self, key: str) -> None:
        namespace, _, name = key.partition("/")
        service = self._services.get(namespace, name)
        current = self._endpoints.get(namespace, name)
        if service is None:
            self._triggers.forget(key)
            self._writes.forget(key)
            if current is not None and (key in self._bereft or meta.labels(current).get(_MANAGED_BY) == _MANAGER):
                await self._delete(key, current)
            self._bereft.discard(key)
            return
        self._bereft.discard(key)
        if not service["spec"].get("selector") or service["spec"].get("type") == "ExternalName":
            return
        if self._writes.behind(key):
            self.controller.queue.add_after(key, 0.01)
            return
        pods = self._members.pods_of(service)
        trigger = self._triggers.compute(key, service, pods)
        subsets = _repack(_triples(service, pods))
        if current is not None and _is_current(current, subsets, service):
            return
        await self._write(key, service, current, subsets, trigger)

    async def _delete(self, key: str, current: Object) -> None:
        try:
            await self._client.delete(ENDPOINTS, current["metadata"]["name"], current["metadata"]["namespace"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _write(self, key: str, service: Object, current: Object | None, subsets: list[Object], trigger: str | None) -> None:
        namespace, _, name = key.partition("/")
        new_meta: Object = dict(current["metadata"]) if current is not None else {"name": name, "namespace": namespace}
        labels = {**meta.labels(service), _MANAGED_BY: _MANAGER}
        if is_headless(service):
            labels[_HEADLESS] = ""
        else:
            labels.pop(_HEADLESS, None)
        annotations = dict(new_meta.get("annotations") or {})
        for annotation in (_TRIGGER_TIME, _OVER_CAPACITY):
            annotations.pop(annotation, None)
        if trigger:
            annotations[_TRIGGER_TIME] = trigger
        if _truncate(subsets):
            annotations[_OVER_CAPACITY] = "truncated"
        new_meta["labels"] = labels
        new_meta.pop("annotations", None)
        if annotations:
            new_meta["annotations"] = annotations
        obj: Object = {"apiVersion": "v1", "kind": "Endpoints", "metadata": new_meta, "subsets": subsets}
        try:
            written = await (self._client.update(ENDPOINTS, obj) if current is not None else self._client.create(ENDPOINTS, obj))
        except StatusError as error:
            if current is None and errors.is_namespace_terminating(error):
                return
            if not errors.is_conflict(error) and not errors.is_already_exists(error):
                self._failed(obj, key, current is None, error)
            raise
        self._writes.wrote(key, written)

    def _failed(self, obj: Object, key: str, creating: bool, error: StatusError) -> None:
        if creating:
            message = f"Failed to create endpoint for service {key}: {error.message}"
            self._recorder.event(obj, "Warning", "FailedToCreateEndpoint", message)
        else:
            self._recorder.event(obj, "Warning", "FailedToUpdateEndpoint", f"Failed to update endpoint {key}: {error.message}")


Triple = tuple[Object, Object | None, bool]


def _triples(service: Object, pods: list[Object]) -> list[Triple]:
    """(address, port or None, ready) of all pods and ports."""
    publish = bool(service["spec"].get("publishNotReadyAddresses"))
    result: list[Triple] = []
    for pod in pods:
        if not belongs_in_endpoints(pod, publish):
            continue
        address = _address(service, pod)
        if address is None:
            continue
        ready = publish or podutil.is_ready(pod)
        ports = service["spec"].get("ports") or []
        if not ports and is_headless(service):
            result.append((address, None, ready))
        for service_port in ports:
            number = find_port(pod, service_port)
            if number is None:
                continue
            port: Object = {"port": number, "protocol": service_port.get("protocol", "TCP")}
            for name in ("name", "appProtocol"):
                if service_port.get(name):
                    port[name] = service_port[name]
            result.append((address, port, ready))
    return result


def _address(service: Object, pod: Object) -> Object | None:
    families = service["spec"].get("ipFamilies") or []
    if families:
        wants_v6 = families[0] == "IPv6"
    elif is_headless(service):
        wants_v6 = ":" in pod["status"].get("podIP", "")
    else:
        wants_v6 = ":" in service["spec"]["clusterIP"]
    ip = next((item for item in pod_ips(pod) if (":" in item) == wants_v6), None)
    if ip is None:
        return None
    pod_meta = pod["metadata"]
    address: Object = {"ip": ip}
    if needs_hostname(pod, service):
        address["hostname"] = pod["spec"]["hostname"]
    if pod["spec"].get("nodeName"):
        address["nodeName"] = pod["spec"]["nodeName"]
    address["targetRef"] = {"kind": "Pod", "namespace": pod_meta["namespace"], "name": pod_meta["name"], "uid": pod_meta["uid"]}
    return address


def _repack(triples: list[Triple]) -> list[Object]:
    """Group ports with the same addresses into subsets, in a canonical order."""
    by_port: dict[tuple[Any, ...], dict[tuple[str, str], tuple[Object, bool]]] = {}
    ports: dict[tuple[Any, ...], Object | None] = {}
    for address, port, ready in triples:
        port_key = (port.get("name", ""), port["port"], port["protocol"], port.get("appProtocol", "")) if port is not None else ()
        ports[port_key] = port
        addresses = by_port.setdefault(port_key, {})
        address_key = (address["ip"], address["targetRef"]["uid"])
        known = addresses.get(address_key)
        # Once not ready on a port, not ready.
        addresses[address_key] = (address, ready if known is None else known[1] and ready)
    groups: dict[frozenset[tuple[str, str, bool]], list[tuple[Any, ...]]] = {}
    for port_key, addresses in by_port.items():
        members = frozenset((ip, uid, ready) for (ip, uid), (_, ready) in addresses.items())
        groups.setdefault(members, []).append(port_key)
    subsets = []
    for port_keys in groups.values():
        addresses = by_port[port_keys[0]]
        ordered = sorted(addresses.values(), key=lambda item: (ipaddress.ip_address(item[0]["ip"]).packed, item[0]["targetRef"]["uid"]))
        subset: Object = {}
        ready_ones = [address for address, ready in ordered if ready]
        other_ones = [address for address, ready in ordered if not ready]
        if ready_ones:
            subset["addresses"] = ready_ones
        if other_ones:
            subset["notReadyAddresses"] = other_ones
        numbered = [port for key in sorted(port_keys, key=str) if (port := ports[key]) is not None]
        if numbered:
            subset["ports"] = numbered
        subsets.append(subset)
    subsets.sort(key=lambda subset: str(subset.get("ports")))
    return subsets


def _is_current(current: Object, subsets: list[Object], service: Object) -> bool:
    labels = {**meta.labels(service), _MANAGED_BY: _MANAGER}
    own = dict(meta.labels(current))
    own.pop(_HEADLESS, None)
    labels.pop(_HEADLESS, None)
    if own != labels or _OVER_CAPACITY in meta.annotations(current):
        return False
    count = sum(len(s.get("addresses") or ()) + len(s.get("notReadyAddresses") or ()) for s in subsets)
    return count <= _CAPACITY and (current.get("subsets") or []) == subsets


def _truncate(subsets: list[Object]) -> bool:
    """Cut what is beyond the capacity, not ready addresses first; says whether something was cut."""
    ready = sum(len(subset.get("addresses") or ()) for subset in subsets)
    others = sum(len(subset.get("notReadyAddresses") or ()) for subset in subsets)
    if ready + others <= _CAPACITY:
        return False
    cut_ready = ready > _CAPACITY
    field, total, most = ("addresses", ready, _CAPACITY) if cut_ready else ("notReadyAddresses", others, _CAPACITY - ready)
    left = most
    for subset in subsets:
        share = min(left, math.ceil(len(subset.get(field) or ()) / total * most)) if total else 0
        if cut_ready:
            subset.pop("notReadyAddresses", None)
        if subset.get(field):
            subset[field] = subset[field][:share]
            left -= len(subset[field])
    return True
