"""Small readings of API objects that several parts of the network need; index functions for informers."""

from __future__ import annotations

from knarr.api.types import Object

SERVICE_NAME = "kubernetes.io/service-name"


def slice_service(obj: Object) -> list[str]:
    """Index function: the Service an EndpointSlice belongs to, as "namespace/name"."""
    meta = obj["metadata"]
    name = (meta.get("labels") or {}).get(SERVICE_NAME)
    return [f"{meta.get('namespace', '')}/{name}"] if name else []


def object_key(obj: Object) -> str:
    """ "namespace/name"; the namespace is empty for cluster-scoped objects."""
    meta = obj["metadata"]
    return f"{meta.get('namespace', '')}/{meta['name']}"
