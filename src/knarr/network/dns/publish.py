"""How pods find the DNS servers: the kube-dns Service and, per node, an EndpointSlice that names this node's server.

Role: cluster runs one `DNSPublisher` beside each DNSServer. The Service has no selector; each node writes its own
slice, with a hint for itself, so that pods ask the server of their own node and fall back to others while it is away.
Replaceable: as soon as the Service gets a selector (somebody applied CoreDNS's manifest), our slices go and the usual
controller takes over; without a selector they return.
Invariants: only objects of these names are touched; the Service is made when missing and never changed afterwards.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import Any

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import ENDPOINT_SLICES, NODES, SERVICES
from knarr.api.types import Object
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.network.dns.forward import Resolver
from knarr.network.dns.records import NAME, NAMESPACE, Store

log = get_logger(__name__)

MANAGER = "dns.knarr.dev"


def dns_service(cluster_ips: Sequence[str]) -> Object:
    """The kube-dns Service as it is made when missing."""
    families = ["IPv6" if ":" in address else "IPv4" for address in cluster_ips]
    labels = {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "CoreDNS"}
    annotations = {"prometheus.io/port": "9153", "prometheus.io/scrape": "true"}
    ports = [
        {"name": "dns", "port": 53, "protocol": "UDP", "targetPort": 53},
        {"name": "dns-tcp", "port": 53, "protocol": "TCP", "targetPort": 53},
        {"name": "metrics", "port": 9153, "protocol": "TCP", "targetPort": 9153},
    ]
    spec: dict[str, Any] = {
        "type": "ClusterIP",
        "clusterIP": cluster_ips[0],
        "clusterIPs": list(cluster_ips),
        "ipFamilies": families,
        "ports": ports,
    }
    spec["ipFamilyPolicy"] = "RequireDualStack" if len(set(families)) > 1 else "SingleStack"
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": labels, "annotations": annotations},
        "spec": spec,
    }


def servers_of(slices: Store, nodes: Collection[str]) -> list[Resolver]:
    """The DNS servers that some nodes have published.

    Args:
      slices: EndpointSlices with the index "service".
    """
    return [
        Resolver(address, int(port["port"]))
        for part in slices.by_index("service", f"{NAMESPACE}/{NAME}")
        for port in part.get("ports") or ()
        if port.get("name") == "dns" and port.get("port")
        for endpoint in part.get("endpoints") or ()
        if endpoint.get("nodeName") in nodes
        for address in endpoint.get("addresses") or ()
    ]


def dns_slice(node: Object | None, node_name: str, addresses: Sequence[str], port: int = 53) -> Object:
    """This node's slice; addresses of one family, `port` where the server listens."""
    family = "IPv6" if ":" in addresses[0] else "IPv4"
    metadata: dict[str, Any] = {
        "name": f"{NAME}-{node_name}" + ("-v6" if family == "IPv6" else ""),
        "namespace": NAMESPACE,
        "labels": {"kubernetes.io/service-name": NAME, "endpointslice.kubernetes.io/managed-by": MANAGER, "k8s-app": "kube-dns"},
    }
    if node is not None:
        owner = {"apiVersion": "v1", "kind": "Node", "name": node_name, "uid": node["metadata"]["uid"]}
        metadata["ownerReferences"] = [owner]
    endpoint = {
        "addresses": list(addresses),
        "conditions": {"ready": True, "serving": True, "terminating": False},
        "nodeName": node_name,
        "hints": {"forNodes": [{"name": node_name}]},
    }
    ports = [
        {"name": "dns", "port": port, "protocol": "UDP"},
        {"name": "dns-tcp", "port": port, "protocol": "TCP"},
        {"name": "metrics", "port": 9153, "protocol": "TCP"},
    ]
    return {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": metadata,
        "addressType": family,
        "endpoints": [endpoint],
        "ports": ports,
    }


class DNSPublisher:
    """See the module.

    Args:
      addresses, port: Where this node's server listens (one address per family).
      cluster_ips: Addresses of the Service when it has to be made.
    """

    def __init__(
        self,
        client: Client,
        informers: Informers,
        *,
        node_name: str,
        addresses: Sequence[str],
        cluster_ips: Sequence[str] = ("10.96.0.10",),
        port: int = 53,
    ) -> None:
        self._client = client
        self._informers = informers
        self._service = informers.get(SERVICES)
        self._slices = informers.get(ENDPOINT_SLICES)
        self._node_name = node_name
        self._addresses = list(addresses)
        self._cluster_ips = list(cluster_ips)
        self._port = port
        self._wake = asyncio.Event()
        self.published = asyncio.Event()
        """Set once the slices stand as they should."""

    async def run(self) -> None:
        """Keep Service and slices until cancelled."""
        self._service.add_handler(self._seen, lambda _old, new: self._seen(new), self._seen)
        self._slices.add_handler(on_update=lambda _old, new: self._seen(new), on_delete=self._seen)
        await self._informers.start()
        await self._service.wait_synced()
        await self._slices.wait_synced()
        backoff = Backoff(0.2, 30.0)
        while True:
            self._wake.clear()
            try:
                await self._reconcile()
            except (StatusError, HTTPError, OSError) as error:
                delay = backoff.next_seconds()
                log.info("the DNS Service cannot be published yet, will retry", delay_seconds=delay, error=str(error))
                await asyncio.sleep(delay)
                continue
            backoff.reset()
            self.published.set()
            await self._wake.wait()

    def _seen(self, obj: Object) -> None:
        meta = obj["metadata"]
        if meta.get("namespace") == NAMESPACE and meta["name"].startswith(NAME):
            self._wake.set()

    async def _reconcile(self) -> None:
        service = self._service.get(NAMESPACE, NAME)
        if service is None:
            try:
                service = await self._client.create(SERVICES, dns_service(self._cluster_ips), NAMESPACE)
            except StatusError as error:
                if not errors.is_already_exists(error):
                    raise
                service = await self._client.get(SERVICES, NAME, NAMESPACE)
        ours = not (service.get("spec") or {}).get("selector")
        node: Object | None = None
        for family in (4, 6):
            addresses = [address for address in self._addresses if (":" in address) == (family == 6)]
            if not addresses:
                continue
            if ours and node is None:
                node = await self._own_node()
            await self._reconcile_slice(dns_slice(node, self._node_name, addresses, self._port), ours)

    async def _own_node(self) -> Object | None:
        try:
            return await self._client.get(NODES, self._node_name)
        except StatusError as error:
            if errors.is_not_found(error):
                return None
            raise

    async def _reconcile_slice(self, wanted: Object, ours: bool) -> None:
        name = wanted["metadata"]["name"]
        present = self._slices.get(NAMESPACE, name)
        if not ours:
            if present is not None:
                await self._delete(name)
            return
        if present is None:
            try:
                await self._client.create(ENDPOINT_SLICES, wanted, NAMESPACE)
                return
            except StatusError as error:
                if not errors.is_already_exists(error):
                    raise
            present = await self._client.get(ENDPOINT_SLICES, name, NAMESPACE)
        references = wanted["metadata"].get("ownerReferences")
        same_owner = references is None or present["metadata"].get("ownerReferences") == references
        if present.get("endpoints") != wanted["endpoints"] or present.get("ports") != wanted["ports"] or not same_owner:
            wanted["metadata"]["resourceVersion"] = present["metadata"].get("resourceVersion", "")
            await self._client.update(ENDPOINT_SLICES, wanted)

    async def _delete(self, name: str) -> None:
        try:
            await self._client.delete(ENDPOINT_SLICES, name, NAMESPACE)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def withdraw(self) -> None:
        """Remove this node's slices (the node leaves)."""
        for suffix in ("", "-v6"):
            await self._delete(f"{NAME}-{self._node_name}{suffix}")
