"""EndpointSlices of Services with a selector.

Slices are grouped by the ports that pods resolve to; endpoints stay in their slice as long as
they live, so that one change writes one slice.
Hints come from `trafficDistribution` with each endpoint, or from topologyhints for all of a Service where the annotation asks for them.
Source: endpointslice/reconciler.go, utils.go, pkg/controller/endpointslice/endpointslice_controller.go.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import orjson

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import ENDPOINT_SLICES, SERVICES
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.leanpods import pod_ips
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key
from knarr.controllers.ownwrites import OwnWrites
from knarr.controllers.podservices import PodServices, TriggerTimes, belongs_in_endpoints, find_port, is_headless, needs_hostname
from knarr.controllers.topologyhints import ZONE, Slices, ZoneHints, node_share, wants_hints

MANAGED_BY = "endpointslice.kubernetes.io/managed-by"
SERVICE_NAME = "kubernetes.io/service-name"
HEADLESS = "service.kubernetes.io/headless"
TRIGGER_TIME = "endpoints.kubernetes.io/last-change-trigger-time"
_MANAGER = "endpointslice-controller.k8s.io"
_RESERVED = (MANAGED_BY, SERVICE_NAME, HEADLESS)
_DISTRIBUTIONS = ("PreferClose", "PreferSameZone", "PreferSameNode")
_ALL_NODES = "nodes"
"""Key of the queue that stands for a change of the nodes; no Service has one without a slash."""


class EndpointSliceController:
    """Keeps the slices of every Service with a selector."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._batch = ctx.config.endpoint_batch_seconds
        self._most = ctx.config.max_endpoints_per_slice
        self._services = ctx.informer(SERVICES)
        self._slices = ctx.informer(ENDPOINT_SLICES)
        self._nodes = ctx.nodes
        self._slices.add_index("service", slice_service)
        self._recorder = ctx.recorder("endpoint-slice-controller")
        self._members = PodServices(self._services, ctx.pods)
        self._triggers = TriggerTimes()
        self._writes = OwnWrites(self._slices)
        self._zones = ZoneHints()
        self._zones_stale = True
        self.controller = Controller("endpointslice-controller", self._reconcile, workers=10, max_retries=15)
        self._services.add_handler(self._service_changed, lambda old, new: self._service_changed(new), self._service_deleted)
        ctx.pods.add_handler(self._pod_changed, self._pod_updated, self._pod_changed)
        self._slices.add_handler(self._slice_changed, self._slice_updated, self._slice_deleted)
        self._nodes.add_handler(self._node_added, self._node_updated, lambda node: self._nodes_changed())
        self._missing_nodes: dict[str, set[str]] = {}

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _service_changed(self, service: Object) -> None:
        self.controller.queue.add(object_key(service))

    def _service_deleted(self, service: Object) -> None:
        self._members.forget(service)
        self.controller.queue.add(object_key(service))

    def _pod_changed(self, pod: Object) -> None:
        for key in self._members.services_of(pod):
            self.controller.queue.add_after(key, self._batch)

    def _pod_updated(self, old: Object, new: Object) -> None:
        for key in self._members.changed(old, new):
            self.controller.queue.add_after(key, self._batch)

    def _slice_changed(self, obj: Object) -> None:
        if _is_ours(obj):
            key = _service_key(obj)
            echo = self._writes.seen(key, obj)
            if not echo:
                self.controller.queue.add(key)

    def _slice_updated(self, old: Object, new: Object) -> None:
        self._slice_changed(new)
        if _is_ours(old) and (not _is_ours(new) or _service_key(old) != _service_key(new)):
            self.controller.queue.add(_service_key(old))

    def _slice_deleted(self, obj: Object) -> None:
        if _is_ours(obj):
            key = _service_key(obj)
            if not self._writes.seen(key, obj, True):
                self.controller.queue.add(key)

    def _node_added(self, node: Object) -> None:
        for key in self._missing_nodes.pop(node["metadata"]["name"], ()):
            self.controller.queue.add(key)
        self._nodes_changed()

    def _node_updated(self, old: Object, new: Object) -> None:
        if node_share(old) != node_share(new):
            self._nodes_changed()

    def _nodes_changed(self) -> None:
        self._zones_stale = True
        self.controller.queue.add(_ALL_NODES)

    def _read_zones(self) -> None:
        """Take the nodes as they are now, before the next Service is looked at."""
        if self._zones_stale:
            self._zones_stale = False
            for key in self._zones.set_nodes(self._nodes.list()):
                self.controller.queue.add(key)

    # Reconcile

    async def _reconcile(self, key: str) -> Result | None:
        self._read_zones()
        if key == _ALL_NODES:
            return None
        service = self._services.get_key(key)
        if service is None:
            self._triggers.forget(key)
            self._writes.forget(key)
            self._zones.forget(key)
            return None
        if not service["spec"].get("selector") or service["spec"].get("type") == "ExternalName":
            return None
        if self._writes.behind(key):
            # The echo of our last write will come within milliseconds.
            return Result(0.01)
        pods = self._members.pods_of(service)
        existing = [obj for obj in self._slices.by_index("service", key) if _is_ours(obj) and not podutil.is_deleting(obj)]
        families = _address_types(service)
        trigger = self._triggers.compute(key, service, pods)
        for gone in {obj["addressType"] for obj in existing}.difference(families):
            self._zones.forget(key, gone)
        try:
            for family in families:
                current = [obj for obj in existing if obj.get("addressType") == family]
                await self._sync_family(key, service, pods, current, family, trigger)
            for obj in existing:
                if obj.get("addressType") not in families:
                    await self._delete(key, obj)
        except StatusError as error:
            if errors.is_namespace_terminating(error):
                return None
            if not errors.is_conflict(error) and not errors.is_not_found(error):
                message = f"Error updating Endpoint Slices for Service {key}: {error.message}"
                self._recorder.event(service, "Warning", "FailedToUpdateEndpointSlices", message)
            raise
        return None

    async def _sync_family(
        self, key: str, service: Object, pods: list[Object], existing: list[Object], family: str, trigger: str | None
    ) -> None:
        plan = _Plan(service, family, self._most)
        mine: dict[bytes, list[Object]] = {}
        for obj in existing:
            if _is_owned(obj, service):
                mine.setdefault(_port_key(obj.get("ports") or []), []).append(obj)
            else:
                plan.delete.append(obj)
        ports_by_key: dict[bytes, list[Object]] = {}
        wanted: dict[bytes, dict[tuple[Any, ...], Object]] = {}
        for pod in pods:
            if not belongs_in_endpoints(pod, True):
                continue
            ports = _pod_ports(service, pod)
            group = _port_key(ports)
            ports_by_key[group] = ports
            endpoints = wanted.setdefault(group, {})
            endpoint = self._endpoint(key, pod, service, family)
            if endpoint is not None:
                endpoints[_identity(endpoint)] = endpoint
        for group, endpoints in wanted.items():
            plan.fill(mine.pop(group, []), endpoints, ports_by_key[group])
        for leftover in mine.values():
            plan.delete += leftover
        plan.ensure_one(existing)
        if plan.by_annotation:
            slices = Slices(plan.create, plan.update, plan.unchanged)
            events = self._zones.add(key, family, slices)
        else:
            events = self._zones.disable(key, family)
        try:
            await self._apply(key, service, plan, trigger)
        finally:
            for event in events:
                self._recorder.event(service, *event)

    def _endpoint(self, key: str, pod: Object, service: Object, family: str) -> Object | None:
        addresses = [address for address in pod_ips(pod) if (":" in address) == (family == "IPv6")]
        if not addresses:
            return None
        node_name = pod["spec"].get("nodeName", "")
        node = self._nodes.get(None, node_name)
        publish = bool(service["spec"].get("publishNotReadyAddresses"))
        if node is None and not publish:
            self._missing_nodes.setdefault(node_name, set()).add(key)
            return None
        serving, terminating = podutil.is_ready(pod), podutil.is_deleting(pod)
        ready = publish or (serving and not terminating)
        pod_meta = pod["metadata"]
        endpoint: Object = {
            "addresses": addresses,
            "conditions": {"ready": ready, "serving": serving, "terminating": terminating},
            "targetRef": {"kind": "Pod", "namespace": pod_meta["namespace"], "name": pod_meta["name"], "uid": pod_meta["uid"]},
        }
        if needs_hostname(pod, service):
            endpoint["hostname"] = pod["spec"]["hostname"]
        if node_name:
            endpoint["nodeName"] = node_name
        zone = meta.labels(node).get(ZONE) if node is not None else None
        if zone:
            endpoint["zone"] = zone
        distribution = service["spec"].get("trafficDistribution")
        if distribution in _DISTRIBUTIONS and ready and not wants_hints(service):
            hints: Object = {}
            if zone:
                hints["forZones"] = [{"name": zone}]
            if distribution == "PreferSameNode" and node_name:
                hints["forNodes"] = [{"name": node_name}]
            if hints:
                endpoint["hints"] = hints
        return endpoint

    async def _apply(self, key: str, service: Object, plan: _Plan, trigger: str | None) -> None:
        plan.reuse_deleted()
        if not podutil.is_deleting(service):
            for obj in plan.create:
                _set_trigger(obj, trigger)
                self._writes.wrote(key, await self._client.create(ENDPOINT_SLICES, obj))
        for obj in plan.update:
            _set_trigger(obj, trigger)
            self._writes.wrote(key, await self._client.update(ENDPOINT_SLICES, obj))
        for obj in plan.delete:
            await self._delete(key, obj)

    async def _delete(self, key: str, obj: Object) -> None:
        try:
            await self._client.delete(ENDPOINT_SLICES, obj["metadata"]["name"], obj["metadata"]["namespace"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
        self._writes.deleted(key, obj)


class _Plan:
    """Which slices of one Service and address family to create, update and delete."""

    def __init__(self, service: Object, family: str, most: int) -> None:
        self.service = service
        self.family = family
        self.most = most
        self.by_annotation = wants_hints(service)
        """Hints are given afterwards, to all slices together: they are no part of what an endpoint should be."""
        self.create: list[Object] = []
        self.update: list[Object] = []
        self.delete: list[Object] = []
        self.unchanged: list[Object] = []

    def fill(self, existing: list[Object], wanted: dict[tuple[Any, ...], Object], ports: list[Object]) -> None:
        """Place the endpoints of one port group; `wanted` is used up."""
        changed: list[Object] = []
        unchanged: list[Object] = []
        for obj in existing:
            kept: list[Object] = []
            differs = False
            for endpoint in obj.get("endpoints") or ():
                new = wanted.pop(_identity(endpoint), None)
                if new is not None:
                    kept.append(new)
                    differs = differs or new != (_without_hints(endpoint) if self.by_annotation else endpoint)
            labels, relabelled = _labels(obj, self.service)
            if differs or len(kept) != len(obj.get("endpoints") or ()):
                if not kept:
                    self.delete.append(obj)
                    continue
                changed.append(_with(obj, kept, labels))
            elif relabelled:
                changed.append(_with(obj, kept, labels))
            else:
                unchanged.append(obj)
        rest = list(wanted.values())
        for obj in sorted(changed, key=lambda item: -len(item["endpoints"])):
            room = self.most - len(obj["endpoints"])
            obj["endpoints"] += rest[:room]
            del rest[:room]
        while rest:
            target = self._closest(unchanged, len(rest)) if len(rest) < self.most else None
            if target is None:
                target = new_slice(self.service, self.family, ports)
                self.create.append(target)
            else:
                unchanged.remove(target)
                target = _with(target, [dict(endpoint) for endpoint in target.get("endpoints") or ()], _labels(target, self.service)[0])
                changed.append(target)
            room = self.most - len(target["endpoints"])
            target["endpoints"] += rest[:room]
            del rest[:room]
        self.update += changed
        self.unchanged += unchanged

    def _closest(self, slices: list[Object], count: int) -> Object | None:
        fitting = [obj for obj in slices if len(obj.get("endpoints") or ()) + count <= self.most]
        return max(fitting, key=lambda obj: len(obj.get("endpoints") or ()), default=None)

    def ensure_one(self, existing: list[Object]) -> None:
        """A Service without endpoints has one empty slice, so that consumers know it was looked at."""
        if len(existing) != len(self.delete) or self.create:
            return
        placeholder = new_slice(self.service, self.family, [])
        if len(self.delete) == 1 and _is_placeholder(self.delete[0], placeholder, self.service):
            self.delete.clear()
        else:
            self.create.append(placeholder)

    def reuse_deleted(self) -> None:
        """Turn deletions with creations into updates, which watchers see as one step."""
        kept: list[Object] = []
        for obj in self.delete:
            if self.create and _is_owned(obj, self.service):
                new = self.create.pop()
                new["metadata"].pop("generateName", None)
                self.update.append({**new, "metadata": {**obj["metadata"], "labels": new["metadata"]["labels"]}})
            else:
                kept.append(obj)
        self.delete = kept


def _is_placeholder(obj: Object, placeholder: Object, service: Object) -> bool:
    return not obj.get("endpoints") and not obj.get("ports") and obj["metadata"].get("labels") == placeholder["metadata"]["labels"]


def slice_service(obj: Object) -> list[str]:
    """Index function: the key of the Service a slice belongs to."""
    name = meta.labels(obj).get(SERVICE_NAME)
    return [f"{obj['metadata'].get('namespace', '')}/{name}"] if name else []


def _service_key(obj: Object) -> str:
    return f"{obj['metadata'].get('namespace', '')}/{meta.labels(obj).get(SERVICE_NAME, '')}"


def _is_ours(obj: Object) -> bool:
    return meta.labels(obj).get(MANAGED_BY) == _MANAGER


def _is_owned(obj: Object, service: Object) -> bool:
    return any(ref["uid"] == service["metadata"]["uid"] and ref["kind"] == "Service" for ref in meta.owner_references(obj))


def _address_types(service: Object) -> list[str]:
    families = service["spec"].get("ipFamilies")
    if families:
        return list(families)
    cluster_ip = service["spec"].get("clusterIP", "")
    if cluster_ip and cluster_ip != "None":
        return ["IPv6" if ":" in cluster_ip else "IPv4"]
    return ["IPv4", "IPv6"]


def _port_key(ports: Iterable[Object]) -> bytes:
    normal = sorted((p.get("name") or "", p.get("port") or 0, p.get("protocol") or "", p.get("appProtocol") or "") for p in ports)
    return orjson.dumps(normal)


def _pod_ports(service: Object, pod: Object) -> list[Object]:
    result = []
    for service_port in service["spec"].get("ports") or ():
        number = find_port(pod, service_port)
        if number is None:
            continue
        port: Object = {"name": service_port.get("name", ""), "port": number, "protocol": service_port.get("protocol", "TCP")}
        if service_port.get("appProtocol"):
            port["appProtocol"] = service_port["appProtocol"]
        result.append(port)
    return result


def _identity(endpoint: Object) -> tuple[Any, ...]:
    target = endpoint.get("targetRef") or {}
    return (*endpoint.get("addresses", ()), endpoint.get("hostname"), target.get("namespace"), target.get("name"), target.get("uid"))


def _without_hints(endpoint: Object) -> Object:
    return {name: value for name, value in endpoint.items() if name != "hints"}


def _labels(obj: Object | None, service: Object) -> tuple[dict[str, str], bool]:
    """(labels a slice should have, whether its free labels differ from the Service's)."""
    own = {name: value for name, value in meta.labels(obj).items() if name not in _RESERVED} if obj is not None else {}
    labels = {name: value for name, value in meta.labels(service).items() if name not in _RESERVED}
    changed = own != labels
    if is_headless(service):
        labels[HEADLESS] = ""
    labels[SERVICE_NAME] = service["metadata"]["name"]
    labels[MANAGED_BY] = _MANAGER
    return labels, changed


def _with(obj: Object, endpoints: list[Object], labels: dict[str, str]) -> Object:
    return {**obj, "metadata": {**obj["metadata"], "labels": labels}, "endpoints": endpoints}


def new_slice(service: Object, family: str, ports: list[Object]) -> Object:
    """Make an empty slice of a Service."""
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "generateName": service["metadata"]["name"] + "-",
            "namespace": service["metadata"]["namespace"],
            "labels": _labels(None, service)[0],
            "ownerReferences": [meta.new_controller_ref(service, "v1", "Service")],
        },
        "addressType": family,
        "endpoints": [],
        "ports": ports,
    }


def _set_trigger(obj: Object, trigger: str | None) -> None:
    annotations = dict(meta.annotations(obj))
    annotations.pop(TRIGGER_TIME, None)
    if trigger:
        annotations[TRIGGER_TIME] = trigger
    obj["metadata"] = {**obj["metadata"]}
    obj["metadata"].pop("annotations", None)
    if annotations:
        obj["metadata"]["annotations"] = annotations
