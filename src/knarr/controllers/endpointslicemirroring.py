"""EndpointSlice mirroring: hand-made Endpoints of Services without a selector, shown as EndpointSlices.

Source: pkg/controller/endpointslicemirroring.
"""

from __future__ import annotations

import ipaddress
from typing import Any

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import ENDPOINT_SLICES, ENDPOINTS, SERVICES
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key
from knarr.controllers.endpointslice import MANAGED_BY, SERVICE_NAME, TRIGGER_TIME, slice_service
from knarr.controllers.ownwrites import OwnWrites

_MANAGER = "endpointslicemirroring-controller.k8s.io"
_SKIP = "endpointslice.kubernetes.io/skip-mirror"
_LEADER = "control-plane.alpha.kubernetes.io/leader"
_LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
_MOST = 1000

_Group = tuple[str, tuple[tuple[Any, ...], ...]]


class EndpointSliceMirroringController:
    """Keeps the mirrored slices of every Endpoints object that asks for it."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._endpoints = ctx.informer(ENDPOINTS)
        self._services = ctx.informer(SERVICES)
        self._slices = ctx.informer(ENDPOINT_SLICES)
        self._slices.add_index("service", slice_service)
        self._recorder = ctx.recorder("endpoint-slice-mirroring-controller")
        self._writes = OwnWrites(self._slices)
        self.controller = Controller("endpointslice-mirroring-controller", self._reconcile, workers=5, max_retries=15)
        self._endpoints.add_handler(self._changed, lambda old, new: self._changed(new), self._changed)
        self._services.add_handler(self._service_changed, self._service_updated, self._service_changed)
        self._slices.add_handler(self._slice_changed, lambda old, new: self._slice_changed(new), self._slice_deleted)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, endpoints: Object) -> None:
        if _mirrors(endpoints) or self._mine(object_key(endpoints)):
            self.controller.queue.add(object_key(endpoints))

    def _service_changed(self, service: Object) -> None:
        if self._endpoints.get_key(object_key(service)) is not None:
            self.controller.queue.add(object_key(service))

    def _service_updated(self, old: Object, new: Object) -> None:
        if bool(old["spec"].get("selector")) != bool(new["spec"].get("selector")):
            self._service_changed(new)

    def _slice_changed(self, obj: Object) -> None:
        if _is_ours(obj) and not self._writes.seen(slice_service(obj)[0], obj):
            self.controller.queue.add(slice_service(obj)[0])

    def _slice_deleted(self, obj: Object) -> None:
        if _is_ours(obj) and not self._writes.seen(slice_service(obj)[0], obj, True):
            self.controller.queue.add(slice_service(obj)[0])

    def _mine(self, key: str) -> list[Object]:
        return [obj for obj in self._slices.by_index("service", key) if _is_ours(obj) and not podutil.is_deleting(obj)]

    async def _reconcile(self, key: str) -> Result | None:
        if self._writes.behind(key):
            return Result(0.01)
        endpoints = self._endpoints.get_key(key)
        service = self._services.get_key(key)
        existing = self._mine(key)
        if endpoints is None or not _mirrors(endpoints) or service is None or service["spec"].get("selector"):
            for obj in existing:
                await self._delete(key, obj)
            return None
        wanted = self._wanted(endpoints)
        by_group: dict[_Group, list[Object]] = {}
        for obj in existing:
            by_group.setdefault((obj["addressType"], _port_group(obj.get("ports") or [])), []).append(obj)
        create: list[Object] = []
        update: list[Object] = []
        delete: list[Object] = []
        for group, (ports, addresses) in wanted.items():
            known = by_group.pop(group, [])
            delete += known[1:]
            if known and _same(known[0], endpoints, addresses):
                continue
            obj = _new_slice(endpoints, group[0], ports, addresses)
            (update if known else create).append(_named(obj, known[0]) if known else obj)
        for leftover in by_group.values():
            delete += leftover
        # A slice that changes its ports is one update: nobody must see a moment without any.
        for obj in list(create):
            twin = next((item for item in delete if item["addressType"] == obj["addressType"]), None)
            if twin is not None:
                delete.remove(twin)
                create.remove(obj)
                update.append(_named(obj, twin))
        await self._apply(key, endpoints, create, update, delete)
        return None

    async def _apply(self, key: str, endpoints: Object, create: list[Object], update: list[Object], delete: list[Object]) -> None:
        try:
            for obj in create if not podutil.is_deleting(endpoints) else ():
                self._writes.wrote(key, await self._client.create(ENDPOINT_SLICES, obj))
            for obj in update:
                self._writes.wrote(key, await self._client.update(ENDPOINT_SLICES, obj))
            for obj in delete:
                await self._delete(key, obj)
        except StatusError as error:
            if not errors.is_namespace_terminating(error):
                raise

    async def _delete(self, key: str, obj: Object) -> None:
        try:
            await self._client.delete(ENDPOINT_SLICES, obj["metadata"]["name"], obj["metadata"]["namespace"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
        self._writes.deleted(key, obj)

    def _wanted(self, endpoints: Object) -> dict[_Group, tuple[list[Object], list[Object]]]:
        """Ports and endpoints per address family and set of ports."""
        result: dict[_Group, tuple[list[Object], list[Object]]] = {}
        invalid = skipped = 0
        for subset in endpoints.get("subsets") or ():
            ports = [_port(item) for item in subset.get("ports") or ()]
            taken = 0
            for field, ready in (("addresses", True), ("notReadyAddresses", False)):
                for address in subset.get(field) or ():
                    if taken >= _MOST:
                        skipped += 1
                        continue
                    try:
                        ip = ipaddress.ip_address(address["ip"])
                    except ValueError:
                        invalid += 1
                        continue
                    taken += 1
                    group = (f"IPv{ip.version}", _port_group(ports))
                    result.setdefault(group, (ports, []))[1].append(_endpoint(address, str(ip), ready))
        if invalid:
            message = f"Skipped {invalid} invalid IP addresses when mirroring to EndpointSlices"
            self._recorder.event(endpoints, "Warning", "InvalidIPAddress", message)
        if skipped:
            message = f"A max of {_MOST} addresses can be mirrored to EndpointSlices per Endpoints subset. {skipped} addresses were skipped"
            self._recorder.event(endpoints, "Warning", "TooManyAddressesToMirror", message)
        return result


def _mirrors(endpoints: Object) -> bool:
    return meta.labels(endpoints).get(_SKIP) != "true" and _LEADER not in meta.annotations(endpoints)


def _is_ours(obj: Object) -> bool:
    return meta.labels(obj).get(MANAGED_BY) == _MANAGER and SERVICE_NAME in meta.labels(obj)


def _port(item: Object) -> Object:
    port: Object = {"name": item.get("name", ""), "port": item["port"], "protocol": item.get("protocol", "TCP")}
    if item.get("appProtocol"):
        port["appProtocol"] = item["appProtocol"]
    return port


def _port_group(ports: list[Object]) -> tuple[tuple[Any, ...], ...]:
    return tuple(sorted((p.get("name") or "", p.get("port"), p.get("protocol"), p.get("appProtocol") or "") for p in ports))


def _endpoint(address: Object, ip: str, ready: bool) -> Object:
    endpoint: Object = {"addresses": [ip], "conditions": {"ready": ready}}
    for source, target in (("hostname", "hostname"), ("nodeName", "nodeName"), ("targetRef", "targetRef")):
        if address.get(source):
            endpoint[target] = address[source]
    return endpoint


def _free_annotations(obj: Object) -> dict[str, str]:
    return {name: value for name, value in meta.annotations(obj).items() if name not in (TRIGGER_TIME, _LAST_APPLIED)}


def _same(obj: Object, endpoints: Object, wanted: list[Object]) -> bool:
    own_labels = {name: value for name, value in meta.labels(obj).items() if name not in (MANAGED_BY, SERVICE_NAME)}
    owners = meta.owner_references(obj)
    uid = endpoints["metadata"]["uid"]

    def order(endpoint: Object) -> str:
        return str(endpoint["addresses"])

    return (
        sorted(obj.get("endpoints") or [], key=order) == sorted(wanted, key=order)
        and own_labels == dict(meta.labels(endpoints))
        and dict(meta.annotations(obj)) == _free_annotations(endpoints)
        and not any(ref["kind"] == "Endpoints" and ref["uid"] != uid for ref in owners)
    )


def _named(obj: Object, existing: Object) -> Object:
    new_meta = {name: value for name, value in obj["metadata"].items() if name != "generateName"}
    new_meta.update(name=existing["metadata"]["name"], resourceVersion=existing["metadata"]["resourceVersion"])
    return {**obj, "metadata": new_meta}


def _new_slice(endpoints: Object, family: str, ports: list[Object], addresses: list[Object]) -> Object:
    name = endpoints["metadata"]["name"]
    obj_meta: Object = {
        "generateName": name + "-",
        "namespace": endpoints["metadata"]["namespace"],
        "labels": {**meta.labels(endpoints), SERVICE_NAME: name, MANAGED_BY: _MANAGER},
        "ownerReferences": [meta.new_controller_ref(endpoints, "v1", "Endpoints")],
    }
    annotations = _free_annotations(endpoints)
    if annotations:
        obj_meta["annotations"] = annotations
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": obj_meta,
        "addressType": family,
        "endpoints": addresses[:_MOST],
        "ports": ports,
    }
