"""Whether a node is one that a pod template's nodeSelector and required node affinity ask for.

Source: component-helpers scheduling/corev1/nodeaffinity.
"""

from __future__ import annotations

from collections.abc import Mapping

from knarr.api import meta
from knarr.api.types import Object


def matches_required(spec: Object, node: Object) -> bool:
    """Whether the node fits the pod spec's nodeSelector and required node affinity."""
    labels = meta.labels(node)
    for name, value in (spec.get("nodeSelector") or {}).items():
        if labels.get(name) != value:
            return False
    affinity = (spec.get("affinity") or {}).get("nodeAffinity") or {}
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is None:
        return True
    return matches_selector(required, node)


def matches_selector(selector: Object, node: Object) -> bool:
    """Whether any of a NodeSelector's terms matches; an empty term matches nothing."""
    labels = meta.labels(node)
    fields = {"metadata.name": node["metadata"]["name"]}
    for term in selector.get("nodeSelectorTerms") or ():
        expressions, by_field = term.get("matchExpressions") or (), term.get("matchFields") or ()
        if not expressions and not by_field:
            continue
        if all(_holds(item, labels) for item in expressions) and all(_holds(item, fields) for item in by_field):
            return True
    return False


def _holds(requirement: Object, labels: Mapping[str, str]) -> bool:
    value = labels.get(requirement["key"])
    operator = requirement["operator"]
    values: list[str] = requirement.get("values") or []
    if operator == "In":
        return value is not None and value in values
    if operator == "NotIn":
        return value is None or value not in values
    if operator == "Exists":
        return value is not None
    if operator == "DoesNotExist":
        return value is None
    if operator in ("Gt", "Lt"):
        try:
            left, right = int(value or ""), int(values[0])
        except (ValueError, IndexError):
            return False
        return left > right if operator == "Gt" else left < right
    return False
