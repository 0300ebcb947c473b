"""Objects that every cluster has from its first second: namespaces, the kubernetes Service, priority classes, flow schemas.

Called once at start, before requests are served; idempotent. RBAC policy is auth's.

Source: pkg/controlplane/{controller/systemnamespaces,controller/kubernetesservice,reconcilers}, pkg/registry/scheduling/rest,
apiserver apis/flowcontrol/bootstrap.
"""

from __future__ import annotations

import asyncio
import hashlib
import ipaddress
import socket
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.defaulting import default as default_builtin
from knarr.api.types import Object
from knarr.apiserver import flowdefaults, machinery, peers
from knarr.apiserver.registry.allocators import address_object

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

NAMESPACES = ("default", "kube-system", "kube-public", "kube-node-lease")
PRIORITY_CLASSES = (
    ("system-node-critical", 2000001000, "Used for system critical pods that must not be moved from their current node."),
    ("system-cluster-critical", 2000000000, "Used for system critical pods that must run in the cluster, but can be moved to another node if necessary."),
)  # fmt: skip
LEASE_SECONDS = 3600


async def bootstrap(server: APIServer) -> None:
    """Write what is missing, all at once: the store puts it into one commit."""
    todo: list[tuple[str, str, Object]] = [
        ("", "namespaces", {
            "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}}, "spec": {"finalizers": ["kubernetes"]},
            "status": {"phase": "Active"},
        }) for name in NAMESPACES
    ]  # fmt: skip
    todo += [
        ("scheduling.k8s.io", "priorityclasses", {
            "metadata": {"name": name, "generation": 1}, "value": value, "description": description, "preemptionPolicy": "PreemptLowerPriority",
        }) for name, value, description in PRIORITY_CLASSES
    ]  # fmt: skip
    todo += [("flowcontrol.apiserver.k8s.io", "prioritylevelconfigurations", obj) for obj in flowdefaults.priority_levels()]
    todo += [("flowcontrol.apiserver.k8s.io", "flowschemas", obj) for obj in flowdefaults.flow_schemas()]
    await asyncio.gather(
        *[_create(server, group, plural, obj) for group, plural, obj in todo], _service_cidr(server), _authentication_config(server),
        kubernetes_service(server),
    )


async def _create(server: APIServer, group: str, plural: str, obj: Object) -> None:
    store = server.registry.stores[group, plural]
    metadata = obj["metadata"]
    if store.find(metadata.get("namespace", ""), metadata["name"]) is not None:
        return
    default_builtin(store.resource, obj)
    machinery.fill_status(store.resource, obj)
    try:
        await store.create(obj)
    except errors.StatusError as error:
        # Another API server on the same store was faster.
        if not errors.is_already_exists(error):
            raise


async def _service_cidr(server: APIServer) -> None:
    now = clock.now_rfc3339()
    await _create(server, "networking.k8s.io", "servicecidrs", {
        "metadata": {"name": "kubernetes", "finalizers": ["networking.k8s.io/service-cidr-finalizer"]},
        "spec": {"cidrs": list(server.config.service_cidrs)},
        "status": {"conditions": [{
            "type": "Ready", "status": "True", "lastTransitionTime": now, "reason": "", "message": "Kubernetes Service CIDR is ready",
        }]},
    })


async def kubernetes_service(server: APIServer) -> None:
    """Write the kubernetes Service, its Endpoints and its EndpointSlice."""
    network = ipaddress.ip_network(server.config.service_cidrs[0], strict=False)
    address = str(network[1])
    family = "IPv6" if network.version == 6 else "IPv4"
    service: Object = {
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"component": "apiserver", "provider": "kubernetes"}},
        "spec": {
            "ports": [{"name": "https", "protocol": "TCP", "port": 443, "targetPort": server.port}],
            "clusterIP": address, "clusterIPs": [address], "type": "ClusterIP", "sessionAffinity": "None", "ipFamilies": [family],
            "ipFamilyPolicy": "SingleStack",
        },
    }  # fmt: skip
    await _create(server, "networking.k8s.io", "ipaddresses", address_object(address, family, service))
    await _create(server, "", "services", service)
    await server.registry.stores["", "services"].update("default", "kubernetes", lambda obj: _with_port(obj, server.port))
    await publish_endpoints(server)


def _with_port(service: Object, port: int) -> Object | None:
    ports = service["spec"]["ports"]
    if ports and ports[0].get("targetPort") != port and ports[0].get("name") == "https":
        ports[0]["targetPort"] = port
        return service
    return None


async def publish_endpoints(server: APIServer, addresses: list[str] | None = None) -> None:
    """Say where the API is served: here, and by whoever else shares the store (addresses, if they are known already)."""
    if addresses is None:
        addresses = await peers.announce(server) if server.storage.shared else [server.advertise_address]
    if not addresses:
        return
    family = "IPv6" if ":" in addresses[0] else "IPv4"
    subset = [{"addresses": [{"ip": address} for address in addresses], "ports": [{"name": "https", "port": server.port, "protocol": "TCP"}]}]
    await _create(server, "", "endpoints", {
        "metadata": {"name": "kubernetes", "namespace": "default", "labels": {"endpointslice.kubernetes.io/skip-mirror": "true"}}, "subsets": subset,
    })
    endpoints = [{"addresses": [address], "conditions": {"ready": True}} for address in addresses]
    ports = [{"name": "https", "protocol": "TCP", "port": server.port}]
    await _create(server, "discovery.k8s.io", "endpointslices", {
        "metadata": {
            "name": "kubernetes", "namespace": "default", "generation": 1, "labels": {"kubernetes.io/service-name": "kubernetes"},
        },
        "addressType": family, "endpoints": endpoints, "ports": ports,
    })  # fmt: skip

    def endpoints_now(obj: Object) -> Object | None:
        if obj.get("subsets") == subset:
            return None
        return {**obj, "subsets": subset}

    def slice_now(obj: Object) -> Object | None:
        if obj.get("endpoints") == endpoints and obj.get("ports") == ports:
            return None
        return {**obj, "endpoints": endpoints, "ports": ports}

    await server.registry.stores["", "endpoints"].update("default", "kubernetes", endpoints_now)
    await server.registry.stores["discovery.k8s.io", "endpointslices"].update("default", "kubernetes", slice_now)


async def _authentication_config(server: APIServer) -> None:
    """Publish how clients of extension API servers are authenticated."""
    config = server.config
    data: dict[str, str] = {}
    if config.client_ca:
        data["client-ca-file"] = _read(config.client_ca)
    if config.requestheader_client_ca:
        data["requestheader-client-ca-file"] = _read(config.requestheader_client_ca)
        data["requestheader-username-headers"] = '["X-Remote-User"]'
        data["requestheader-group-headers"] = '["X-Remote-Group"]'
        data["requestheader-extra-headers-prefix"] = '["X-Remote-Extra-"]'
        data["requestheader-uid-headers"] = '["X-Remote-Uid"]'
        names = ", ".join(f'"{name}"' for name in config.requestheader_allowed_names)
        data["requestheader-allowed-names"] = f"[{names}]"
    if not data:
        return
    await _create(server, "", "configmaps", {
        "metadata": {"name": "extension-apiserver-authentication", "namespace": "kube-system"}, "data": data,
    })
    await server.registry.stores["", "configmaps"].update(
        "kube-system", "extension-apiserver-authentication", lambda obj: None if obj.get("data") == data else {**obj, "data": data})


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()


def identity(server: APIServer) -> str:
    """Return the name of this server's identity Lease."""
    base = server.config.identity or socket.gethostname()
    digest = hashlib.sha256(base.encode()).hexdigest()[:26]
    return f"apiserver-{digest}"


async def renew_identity(server: APIServer) -> None:
    """Create or renew the identity Lease."""
    name = identity(server)
    now = clock.now_micro()
    host = server.config.identity or socket.gethostname()
    await _create(server, "coordination.k8s.io", "leases", {
        "metadata": {"name": name, "namespace": "kube-system", "labels": {
            "apiserver.kubernetes.io/identity": "kube-apiserver", "kubernetes.io/hostname": host}},
        "spec": {"holderIdentity": f"{name}_{server.instance_id}", "leaseDurationSeconds": LEASE_SECONDS, "renewTime": now},
    })

    def renew(obj: Object) -> Object:
        obj["spec"] = {**obj["spec"], "renewTime": now, "holderIdentity": f"{name}_{server.instance_id}"}
        return obj

    await server.registry.stores["coordination.k8s.io", "leases"].update("kube-system", name, renew)


async def forget_old_identities(server: APIServer) -> None:
    """Remove the identity Leases of servers that are long gone."""
    leases = server.registry.stores["coordination.k8s.io", "leases"]
    for lease in leases.list_nowait("kube-system"):
        metadata, spec = lease["metadata"], lease.get("spec") or {}
        if (metadata.get("labels") or {}).get("apiserver.kubernetes.io/identity") != "kube-apiserver" or not spec.get("renewTime"):
            continue
        if clock.parse_rfc3339(spec["renewTime"]) + (spec.get("leaseDurationSeconds") or 0) < clock.now():
            await leases.delete("kube-system", metadata["name"], uid=metadata["uid"])
