"""Makes the built-in metrics server known to the cluster: Service, EndpointSlice, APIService and the reader's role.

Caller: the control process at each start. An APIService that points to somebody else's Service is left alone.
"""

from __future__ import annotations

import base64

from knarr.api.errors import StatusError
from knarr.api.resources import API_SERVICES, CLUSTER_ROLES, ENDPOINT_SLICES, SERVICES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster import addons
from knarr.cluster.usage.server import GROUP, VERSION

NAME, NAMESPACE = "knarr-metrics", "kube-system"
HOST = f"{NAME}.{NAMESPACE}.svc"
_LABELS = {"app.kubernetes.io/managed-by": "knarr"}


async def register(client: Client, address: str, port: int, authority: bytes) -> None:
    """Lead the aggregator to where this process listens; tries until the API server takes it."""
    role: Object = {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "ClusterRole",
        "metadata": {
            "name": "system:aggregated-metrics-reader",
            "labels": {**_LABELS, **{f"rbac.authorization.k8s.io/aggregate-to-{role}": "true" for role in ("view", "edit", "admin")}},
        },
        "rules": [{"apiGroups": [GROUP], "resources": ["pods", "nodes"], "verbs": ["get", "list", "watch"]}],
    }
    await addons.apply(client, CLUSTER_ROLES, role)
    service: Object = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": NAME, "namespace": NAMESPACE, "labels": _LABELS},
        "spec": {"ports": [{"name": "https", "port": 443, "protocol": "TCP", "targetPort": 10250}]},
    }
    await addons.apply(client, SERVICES, service, fixed=True)
    slice_: Object = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": NAME,
            "namespace": NAMESPACE,
            "labels": {**_LABELS, "kubernetes.io/service-name": NAME, "endpointslice.kubernetes.io/managed-by": "knarr"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": [address], "conditions": {"ready": True}}],
        "ports": [{"name": "https", "port": port, "protocol": "TCP"}],
    }
    await addons.apply(client, ENDPOINT_SLICES, slice_)
    if await _is_ours(client):
        spec = {
            "group": GROUP,
            "version": VERSION,
            "groupPriorityMinimum": 100,
            "versionPriority": 100,
            "service": {"name": NAME, "namespace": NAMESPACE, "port": 443},
            "caBundle": base64.b64encode(authority).decode(),
        }
        body = {"apiVersion": "apiregistration.k8s.io/v1", "kind": "APIService", "metadata": {"name": f"{VERSION}.{GROUP}", "labels": _LABELS}, "spec": spec}
        await addons.apply(client, API_SERVICES, body)


async def _is_ours(client: Client) -> bool:
    """Whether the group is free or served from here."""
    try:
        present = await client.get(API_SERVICES, f"{VERSION}.{GROUP}")
    except StatusError as error:
        if error.reason != "NotFound":
            raise
        return True
    reference = present["spec"].get("service") or {}
    return bool(reference.get("name") == NAME and reference.get("namespace") == NAMESPACE)
