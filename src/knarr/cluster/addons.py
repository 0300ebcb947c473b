"""Objects that every knarr cluster has beside upstream's own: what the node's network parts may read and write.

Role: applied by the control process at each start.
"""

from __future__ import annotations

import asyncio
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.api.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, STORAGE_CLASSES
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.volume import localpath
from knarr.http.errors import HTTPError

log = get_logger(__name__)

NETWORK_GROUP = "knarr:network"
RETRY_SECONDS = 0.2
READ = ["get", "list", "watch"]
WRITE = ["create", "delete", "patch", "update"]
NETWORK_RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["endpoints", "namespaces", "nodes", "pods", "services"], "verbs": READ},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["create"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": [*READ, *WRITE]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["networkpolicies", "servicecidrs", "ingresses", "ingressclasses"], "verbs": READ},
    {"apiGroups": ["", "events.k8s.io"], "resources": ["events"], "verbs": ["create", "patch", "update"]},
]
BALANCER_RULES: list[dict[str, Any]] = [
    {"apiGroups": [""], "resources": ["services", "nodes"], "verbs": READ},
    {"apiGroups": [""], "resources": ["services/status"], "verbs": ["patch", "update"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["ingresses", "ingressclasses"], "verbs": [*READ, "create"]},
    {"apiGroups": ["networking.k8s.io"], "resources": ["ingresses/status"], "verbs": ["patch", "update"]},
    {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["*"], "verbs": [*READ, "patch", "update"]},
    {"apiGroups": ["gateway.networking.k8s.io"], "resources": ["gatewayclasses"], "verbs": ["create"]},
    {"apiGroups": [""], "resources": ["services"], "verbs": ["create", "delete"]},
    {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": ["create", "patch", "delete"]},
]
"""What the control process' load balancer and ingress controllers may do beyond upstream's controller manager."""


async def ensure(client: Client) -> None:
    """Create what is missing and correct the roles; tries until the API server takes it.

    Cancellation: leaves some objects made; the next start makes the rest.
    """
    await _ensure_role(client, NETWORK_GROUP, NETWORK_RULES, {"kind": "Group", "name": NETWORK_GROUP})
    if not (await _storage_classes(client)):
        await apply(client, STORAGE_CLASSES, localpath.default_class(), fixed=True)
    await _ensure_role(client, "knarr:load-balancer", BALANCER_RULES, {"kind": "User", "name": "system:kube-controller-manager"})


async def _storage_classes(client: Client) -> list[Object]:
    """Those that exist: a cluster has our class from its first start until somebody brings his own."""
    found: list[Object] = (await client.list(STORAGE_CLASSES)).get("items") or []
    return found


async def _ensure_role(client: Client, name: str, rules: list[dict[str, Any]], subject: dict[str, str]) -> None:
    labels = {"app.kubernetes.io/managed-by": "knarr"}
    role = {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": "ClusterRole", "metadata": {"name": name, "labels": labels}, "rules": rules}
    binding = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRoleBinding",
        "metadata": {"name": name, "labels": labels},
        "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": name},
        "subjects": [{"apiGroup": "rbac.authorization.k8s.io", **subject}],
    }
    await apply(client, CLUSTER_ROLES, role)
    await apply(client, CLUSTER_ROLE_BINDINGS, binding)


async def apply(client: Client, resource: Resource, wanted: Object, *, fixed: bool = False) -> None:
    """Make an object, or give an existing one the wanted fields beside its metadata; tries until the API server takes it.

    Args:
      fixed: leave an existing one as it is.
    """
    name, namespace = wanted["metadata"]["name"], wanted["metadata"].get("namespace")
    while True:
        try:
            try:
                await client.create(resource, wanted, namespace)
                return
            except StatusError as error:
                if error.reason != "AlreadyExists":
                    raise
            if fixed:
                return
            current = await client.get(resource, name, namespace)
            if any(current.get(field) != wanted[field] for field in wanted if field not in ("apiVersion", "kind", "metadata")):
                await client.update(resource, {**wanted, "metadata": {**wanted["metadata"], "resourceVersion": current["metadata"]["resourceVersion"]}})
            return
        except (StatusError, HTTPError, OSError) as error:
            log.warning("add-on not applied yet", kind=wanted["kind"], name=name, error=str(error))
            await asyncio.sleep(RETRY_SECONDS)
