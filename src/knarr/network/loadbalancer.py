"""LoadBalancer Services without a cloud: an address from a pool, at once.

Role: one `LoadBalancerController` per cluster (control process). It writes `status.loadBalancer`; the proxies of all
nodes answer for the address, and the pod network routes the pool to this machine's bridge, so that the machine itself
reaches it immediately.
Invariants: Services with a loadBalancerClass other than ours are left alone, in status and deletion. The allocation's
only record is the Service's status, so a restart loses nothing; two Services never hold one address. A Service that has
one carries upstream's finalizer and stays until its address has left its status.
Source: behaviour of cloud-provider's service controller (status, events, finalizer).
"""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import ip_address
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import SERVICES
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.network.objects import object_key
from knarr.network.pool import parse

log = get_logger(__name__)

CLASS = "knarr.dev/host"
FINALIZER = "service.kubernetes.io/load-balancer-cleanup"


def is_ours(service: Object) -> bool:
    """Whether this controller gives the Service its address."""
    spec = service.get("spec") or {}
    return spec.get("type") == "LoadBalancer" and spec.get("loadBalancerClass") in (None, "", CLASS)


def ingress_addresses(service: Object) -> list[str]:
    """Addresses in a Service's load balancer status."""
    ingress = ((service.get("status") or {}).get("loadBalancer") or {}).get("ingress") or ()
    return [item["ip"] for item in ingress if item.get("ip")]


def _finalizers(service: Object) -> list[str]:
    return list(service["metadata"].get("finalizers") or ())


def _abandoned(service: Object) -> bool:
    """Whether a Service had a load balancer, ours or that of a cloud, which it no longer wants."""
    spec = service.get("spec") or {}
    deleted = is_ours(service) and service["metadata"].get("deletionTimestamp")
    return FINALIZER in _finalizers(service) and bool(deleted or spec.get("type") != "LoadBalancer")


class LoadBalancerController:
    """See the module.

    Args:
      pool: Networks and ranges (see `pool`) to take addresses from; one per family at least for that family's Services.
    """

    def __init__(self, client: Client, informers: Informers, *, pool: Sequence[str] = ("172.29.128.0/24",)) -> None:
        self._client = client
        self._informers = informers
        self._services = informers.get(SERVICES)
        self._pool = parse(pool)
        self._recorder = EventRecorder(client, "service-controller")
        self._controller = Controller("loadbalancer", self._reconcile)
        self._taken: dict[str, str] = {}
        """Address to Service: those in statuses, and those being written."""

    async def run(self) -> None:
        """Give out addresses until cancelled."""
        self._services.add_handler(self._seen, self._changed, self._gone)
        await self._informers.start()
        await self._services.wait_synced()
        try:
            await self._controller.run()
        finally:
            await self._recorder.close()

    def _seen(self, service: Object) -> None:
        key = object_key(service)
        if is_ours(service):
            for address in ingress_addresses(service):
                if self._in_pool(address):
                    self._taken.setdefault(address, key)
        if is_ours(service) or ingress_addresses(service) or _abandoned(service):
            self._controller.queue.add(key)

    def _changed(self, old: Object, new: Object) -> None:
        if is_ours(old) or is_ours(new) or _abandoned(new):
            self._seen(new)
            self._controller.queue.add(object_key(new))

    def _gone(self, service: Object) -> None:
        self._release(object_key(service))

    def _release(self, key: str) -> None:
        for address in [address for address, holder in self._taken.items() if holder == key]:
            del self._taken[address]
            # Somebody may be waiting for just this address, or for any.
            for waiting in self._services.list():
                if is_ours(waiting) and not ingress_addresses(waiting):
                    self._controller.queue.add(object_key(waiting))

    def _in_pool(self, address: str) -> bool:
        return ip_address(address) in self._pool

    async def _reconcile(self, key: str) -> None:
        namespace, _slash, name = key.partition("/")
        service = self._services.get(namespace, name)
        if service is None:
            self._release(key)
            return
        present = ingress_addresses(service)
        deleted = bool(service["metadata"].get("deletionTimestamp"))
        if deleted or not is_ours(service):
            ours = [address for address in present if self._taken.get(address) == key]
            kept = deleted or (service.get("spec") or {}).get("type") == "LoadBalancer"
            written = await self._write(service, []) if _abandoned(service) or (ours and not kept) else True
            if written:
                # Not before: until then the nodes answer for the address.
                self._release(key)
            return
        wanted = self._choose(service, key, present)
        if wanted is None:
            return
        written = await self._write(service, wanted) if wanted != present or FINALIZER not in _finalizers(service) else False
        if written and wanted != present:
            self._recorder.event(service, "Normal", "EnsuredLoadBalancer", f"Ensured load balancer: {', '.join(wanted)}")

    def _choose(self, service: Object, key: str, present: list[str]) -> list[str] | None:
        """One address per family; None when there is none to be had (said in an event)."""
        spec: dict[str, Any] = service["spec"]
        wanted: list[str] = []
        for family in spec.get("ipFamilies") or ["IPv4"]:
            version = 6 if family == "IPv6" else 4
            asked = spec.get("loadBalancerIP") or ""
            if asked and ip_address(asked).version == version:
                holder = self._taken.get(asked)
                if not self._in_pool(asked) or holder not in (None, key):
                    why = f"is held by {holder}" if holder not in (None, key) else "is not in the pool"
                    self._recorder.event(service, "Warning", "SyncLoadBalancerFailed", f"address {asked} {why}")
                    return None
                address: str | None = asked
            else:
                kept = [a for a in present if ip_address(a).version == version and self._taken.get(a) == key]
                address = kept[0] if kept else self._free(version)
            if address is None:
                if self._pool.has(version):
                    self._recorder.event(service, "Warning", "SyncLoadBalancerFailed", "no address is left in the pool")
                    return None
                continue
            self._taken[address] = key
            wanted.append(address)
        return wanted or None

    def _free(self, version: int) -> str | None:
        return next((address for address in self._pool.candidates(version) if address not in self._taken), None)

    async def _write(self, service: Object, addresses: list[str]) -> bool:
        """Let the status name these addresses, and the finalizer stand while there are any; False when the Service is another by now."""
        meta = service["metadata"]
        ingress = [{"ip": address, "ipMode": "VIP"} for address in addresses] or None
        finalizers = [name for name in _finalizers(service) if name != FINALIZER] + [FINALIZER] * bool(addresses)
        # Others' finalizers must not be lost: what was read must still stand.
        seen = {"uid": meta["uid"], "resourceVersion": meta["resourceVersion"], "finalizers": finalizers}
        patch = {"metadata": seen, "status": {"loadBalancer": {"ingress": ingress}}}
        try:
            await self._client.patch(SERVICES, meta["name"], meta["namespace"], patch, type="merge", subresource="status")
        except StatusError as error:
            # Deleted meanwhile, changed, or made anew under the same name: its own event comes.
            if not errors.is_not_found(error) and not errors.is_conflict(error):
                raise
            return False
        return True
