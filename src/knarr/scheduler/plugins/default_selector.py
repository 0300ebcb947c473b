"""The selector of "the other pods of the same application": Services and the controlling workload of a pod.

Used by PodTopologySpread for pods that state no constraints of their own. Source: plugins/helper DefaultSelector.
"""

from __future__ import annotations

from knarr.scheduler.objects import Objects
from knarr.scheduler.podinfo import PodShape
from knarr.scheduler.terms import Selector, merge, selector, set_selector

KINDS = ("Service", "ReplicationController", "ReplicaSet", "StatefulSet")
_LABEL_SELECTED = {"ReplicaSet": "apps/", "StatefulSet": "apps/"}


def default_selector(shape: PodShape, objects: Objects) -> Selector | None:
    """Give the selector, or None when nothing selects the pod; remembered per shape until such an object changes."""
    stamp = tuple(objects.version(kind, shape.namespace) for kind in KINDS)
    memo = shape.memo.get("default-selector")
    if memo is not None and memo[0] == stamp:
        found: Selector | None = memo[1]
        return found
    result = _work_out(shape, objects)
    shape.memo["default-selector"] = (stamp, result)
    return result


def _work_out(shape: PodShape, objects: Objects) -> Selector | None:
    equal: dict[str, str] = {}
    for service in objects.list("Service", shape.namespace):
        wanted = (service.get("spec") or {}).get("selector")
        if wanted and all(shape.labels.get(key) == value for key, value in wanted.items()):
            equal.update(wanted)
    parts = []
    if shape.owner is not None:
        api_version, kind, name = shape.owner
        if kind == "ReplicationController" and api_version == "v1":
            owner = objects.get(kind, name, shape.namespace)
            if owner is not None:
                equal.update(owner["spec"].get("selector") or {})
        elif kind in _LABEL_SELECTED and api_version.startswith(_LABEL_SELECTED[kind]):
            owner = objects.get(kind, name, shape.namespace)
            if owner is not None:
                parts.append(selector(owner["spec"].get("selector")))
    if equal:
        parts.append(set_selector(equal))
    if not parts:
        return None
    merged = merge(parts)
    return None if merged.is_empty else merged
