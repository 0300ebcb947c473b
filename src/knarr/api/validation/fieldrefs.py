"""References from environment and downward API volumes to fields and resources of the pod.

Source: pkg/apis/core/validation validateObjectFieldSelector, validateContainerResourceFieldSelector; core/pods helpers.
"""

from __future__ import annotations

import re
from typing import Any

from knarr.api import quantity
from knarr.api.errors import invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add
from knarr.api.validation.strings import label_key_errors

ENV_FIELDS = (
    "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName", "spec.serviceAccountName",
    "status.hostIP", "status.hostIPs", "status.podIP", "status.podIPs",
)  # fmt: skip
VOLUME_FIELDS = ("metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid")
_KNOWN = frozenset(
    {
        "metadata.annotations", "metadata.labels", "metadata.name", "metadata.namespace", "metadata.uid", "spec.nodeName",
        "spec.restartPolicy", "spec.serviceAccountName", "spec.schedulerName", "status.phase", "status.hostIP", "status.hostIPs",
        "status.podIP", "status.podIPs", "spec.host",
    }
)  # fmt: skip
RESOURCES = (
    "limits.cpu", "limits.ephemeral-storage", "limits.memory", "requests.cpu", "requests.ephemeral-storage", "requests.memory",
)  # fmt: skip
_SIZES = "1, 1k, 1M, 1G, 1T, 1P, 1E, 1Ki, 1Mi, 1Gi, 1Ti, 1Pi, 1Ei"
_SUBSCRIPT = re.compile(r"(.+)\['(.*)'\]")
_HUGE_PAGES = ("requests.hugepages-", "limits.hugepages-")


def validate_field_ref(reference: Object, allowed: tuple[str, ...], path: str, errors: Errors) -> None:
    """ObjectFieldSelector."""
    if not reference.get("apiVersion"):
        errors.append(required(f"{path}.apiVersion"))
        return
    field_path = reference.get("fieldPath") or ""
    if not field_path:
        errors.append(required(f"{path}.fieldPath"))
        return
    subscripted = _SUBSCRIPT.fullmatch(field_path)
    base = subscripted[1] if subscripted else field_path
    if reference["apiVersion"] != "v1":
        message = f"error converting fieldPath: unsupported pod version: {reference['apiVersion']}"
        errors.append(invalid_value(f"{path}.fieldPath", field_path, message))
        return
    known = base in ("metadata.annotations", "metadata.labels") if subscripted else base in _KNOWN
    if not known:
        message = f"error converting fieldPath: field label not supported: {field_path if subscripted is None else base}"
        errors.append(invalid_value(f"{path}.fieldPath", field_path, message))
        return
    if subscripted:
        key = subscripted[2]
        shown = key.lower() if base == "metadata.annotations" else key
        add(errors, path, shown, label_key_errors(shown))
    elif base not in allowed:
        errors.append(not_supported(f"{path}.fieldPath", base, sorted(allowed)))


def validate_resource_field_ref(reference: Object, path: str, errors: Errors, *, in_volume: bool) -> None:
    """ResourceFieldSelector."""
    resource = reference.get("resource") or ""
    if in_volume and not reference.get("containerName"):
        errors.append(required(f"{path}.containerName"))
    elif not resource:
        errors.append(required(f"{path}.resource"))
    elif resource not in RESOURCES and not resource.startswith(_HUGE_PAGES):
        errors.append(not_supported(f"{path}.resource", resource, RESOURCES))
    _divisor(resource, reference.get("divisor"), path, errors)


def _divisor(resource: str, divisor: Any, path: str, errors: Errors) -> None:
    if divisor is None or not quantity.parse(divisor):
        return
    text = quantity.canonical(divisor)
    kind = resource.partition(".")[2]
    if kind == "cpu":
        if text not in ("1m", "1"):
            errors.append(invalid_value(f"{path}.divisor", resource, "only divisor's values 1m and 1 are supported with the cpu resource"))
        return
    words = {"memory": "memory", "ephemeral-storage": "local ephemeral storage"}.get(kind)
    if words is None and resource.startswith(_HUGE_PAGES):
        words = "hugepages"
    if words is not None and text not in _SIZES.split(", "):
        errors.append(invalid_value(f"{path}.divisor", resource, f"only divisor's values {_SIZES} are supported with the {words} resource"))
