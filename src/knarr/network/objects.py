"""Small readings of API objects that several parts of the network need; index functions for informers."""

from __future__ import annotations

from ipaddress import ip_address

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


def is_address(text: object) -> bool:
    """Whether something is the text of an IP address; statuses are written by others and may hold anything."""
    try:
        ip_address(str(text))
    except ValueError:
        return False
    return True
