"""ServiceCIDRs: ready once their ranges can be used, and kept while an address in them is.

Source: pkg/controller/servicecidrs/servicecidrs_controller.go; KEP-1880.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.resources import IP_ADDRESSES, SERVICE_CIDRS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers.context import Context, trim_to_metadata
from knarr.controllers.podutil import is_deleting

_FINALIZER = "networking.k8s.io/service-cidr-finalizer"
_GRACE_SECONDS = 10.0

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class ServiceCIDRController:
    """Keeps condition Ready and the finalizer of every ServiceCIDR."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._ranges = ctx.informer(SERVICE_CIDRS)
        self._addresses = ctx.informers.get(IP_ADDRESSES, transform=trim_to_metadata)
        self._recorder = ctx.recorder("service-cidr-controller")
        self.controller = Controller("service-cidr-controller", self._reconcile)
        self._ranges.add_handler(self._changed, lambda old, new: self._changed(new), self._gone)
        self._addresses.add_handler(on_delete=self._address_gone)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, obj: Object) -> None:
        self.controller.queue.add(obj["metadata"]["name"])

    def _gone(self, obj: Object) -> None:
        for other in self._ranges:
            self._changed(other)

    def _address_gone(self, obj: Object) -> None:
        for other in self._ranges:
            if is_deleting(other):
                self._changed(other)

    async def _reconcile(self, name: str) -> Result | None:
        obj = self._ranges.get(None, name)
        if obj is None:
            return None
        if is_deleting(obj):
            return await self._release(obj)
        if _FINALIZER not in meta.finalizers(obj):
            patch = {"metadata": {"finalizers": [*meta.finalizers(obj), _FINALIZER], "resourceVersion": obj["metadata"]["resourceVersion"]}}
            obj = await self._client.patch(SERVICE_CIDRS, name, None, patch)
        await self._set_ready(obj, "True", "", "Kubernetes Service CIDR is ready")
        return None

    async def _set_ready(self, obj: Object, status: str, reason: str, message: str) -> None:
        conditions = meta.deep_copy((obj.get("status") or {}).get("conditions") or [])
        current = meta.get_condition(conditions, "Ready")
        if current is not None and (current["status"], current.get("reason", ""), current.get("message", "")) == (status, reason, message):
            return
        stamp = current["lastTransitionTime"] if current is not None and current["status"] == status else clock.now_rfc3339()
        condition = {"type": "Ready", "status": status, "reason": reason, "message": message, "lastTransitionTime": stamp}
        conditions = [item for item in conditions if item["type"] != "Ready"] + [condition]
        await self._client.update(SERVICE_CIDRS, {**obj, "status": {**(obj.get("status") or {}), "conditions": conditions}}, subresource="status")

    async def _release(self, obj: Object) -> Result | None:
        if _FINALIZER not in meta.finalizers(obj):
            return None
        if self._is_used(obj):
            message = "There are still IPAddresses referencing the ServiceCIDR, please remove them or create a new ServiceCIDR"
            await self._set_ready(obj, "False", "Terminating", message)
            return None
        # API servers allocate from what they last saw; nobody may hand out an address while it goes.
        deleted = clock.parse_rfc3339(obj["metadata"]["deletionTimestamp"])
        if deleted + _GRACE_SECONDS > clock.now():
            return Result(deleted + _GRACE_SECONDS - clock.now())
        kept = [item for item in meta.finalizers(obj) if item != _FINALIZER]
        patch = {"metadata": {"finalizers": kept, "resourceVersion": obj["metadata"]["resourceVersion"]}}
        await self._client.patch(SERVICE_CIDRS, obj["metadata"]["name"], None, patch)
        return None

    def _is_used(self, obj: Object) -> bool:
        """Whether an address has no other range that it belongs to."""
        others = [network for other in self._ranges if other is not obj and not is_deleting(other) for network in _networks(other)]
        mine = list(_networks(obj))
        for item in self._addresses:
            address = ipaddress.ip_address(item["metadata"]["name"])
            if any(address in network for network in mine) and not any(address in network for network in others):
                return True
        return False


def _networks(obj: Object) -> Iterator[Network]:
    for text in obj["spec"].get("cidrs") or ():
        yield ipaddress.ip_network(text)
