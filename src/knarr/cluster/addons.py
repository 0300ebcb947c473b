"""Objects that every knarr cluster has beside upstream's own: what the node's network parts may read, and the DNS Service.

Role: applied by the control process at each start; an object that a user has changed keeps the change unless it is ours to hold
(roles). Deleting the kube-dns Service's selector-less slices and applying CoreDNS' own manifest replaces our DNS by CoreDNS.
"""

from __future__ import annotations

import asyncio
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.api.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, SERVICES
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster.config import ClusterConfig
from knarr.http.errors import HTTPError

log = get_logger(__name__)

NETWORK_GROUP = "knarr:network"
RETRY_SECONDS = 0.2
READ = ["get", "list", "watch"]
WRITE = ["create", "delete", "patch", "update"]
NETWORK_RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["endpoints", "namespaces", "nodes", "pods", "services"], "verbs": READ},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": [*READ, *WRITE]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies", "servicecidrs", "ingresses", "ingressclasses"], "verbs": READ},
    {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]},
]


async def ensure(client: Client, config: ClusterConfig) -> None:
    """Create what is missing and correct the roles; tries until the API server takes it.

    Cancellation: leaves some objects made; the next start makes the rest.
    """
    labels = {"app.kubernetes.io/managed-by": "knarr"}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": NETWORK_GROUP, "labels": labels}, "rules": NETWORK_RULES}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": NETWORK_GROUP, "labels": labels},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": NETWORK_GROUP},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": NETWORK_GROUP}],
    }
    await _apply(client, CLUSTER_ROLES, role, replace=True)
    await _apply(client, CLUSTER_ROLE_BINDINGS, binding, replace=True)
    await _apply(client, SERVICES, dns_service(config), replace=False)


def dns_service(config: ClusterConfig) -> Object:
    """kube-dns as clusters name it everywhere, without a selector: the nodes' DNS servers are its endpoints."""
    ports = [("dns", "UDP", 53), ("dns-tcp", "TCP", 53), ("metrics", "TCP", 9153)]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {
            "name": "kube-dns",
            "namespace": "kube-system",
            "labels": {"k8s-app": "kube-dns", "kubernetes.io/cluster-service": "true", "kubernetes.io/name": "KnarrDNS"},
        },
        "spec": {
            "clusterIP": config.dns_ip,
            "internalTrafficPolicy": "Cluster",
            "ports": [{"name": name, "protocol": protocol, "port": port, "targetPort": port} for name, protocol, port in ports],
        },
    }


async def _apply(client: Client, resource: Resource, wanted: Object, *, replace: bool) -> None:
    name, namespace = wanted["metadata"]["name"], wanted["metadata"].get("namespace")
    while True:
        try:
            try:
                await client.create(resource, wanted, namespace)
                return
            except StatusError as error:
                if error.reason != "AlreadyExists":
                    raise
            if replace:
                current = await client.get(resource, name, namespace)
                if any(current.get(field) != wanted[field] for field in wanted if field not in ("apiVersion", "kind", "metadata")):
                    await client.update(resource, {**wanted, "metadata": {**wanted["metadata"], "resourceVersion": current["metadata"]["resourceVersion"]}})
            return
        except (StatusError, HTTPError, OSError) as error:
            log.warning("add-on not applied yet", kind=wanted["kind"], name=name, error=str(error))
            await asyncio.sleep(RETRY_SECONDS)
