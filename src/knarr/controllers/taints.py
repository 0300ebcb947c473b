"""Taints and tolerations, as nodes and pods carry them.

Source: component-helpers scheduling/corev1/helpers.go, pkg/util/taints.
"""

from __future__ import annotations

from collections.abc import Iterable

from knarr.api.types import Object

NOT_READY = "node.kubernetes.io/not-ready"
UNREACHABLE = "node.kubernetes.io/unreachable"
UNSCHEDULABLE = "node.kubernetes.io/unschedulable"
OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"


def of_node(node: Object) -> list[Object]:
    return (node.get("spec") or {}).get("taints") or []


def tolerates(toleration: Object, taint: Object) -> bool:
    """Whether one toleration covers one taint; its seconds are not looked at."""
    if toleration.get("effect") and toleration["effect"] != taint.get("effect"):
        return False
    if toleration.get("key") and toleration["key"] != taint.get("key"):
        return False
    operator = toleration.get("operator") or "Equal"
    if operator == "Exists":
        return True
    if operator == "Equal":
        return (toleration.get("value") or "") == (taint.get("value") or "") and bool(toleration.get("key"))
    return False


def untolerated(taints: Iterable[Object], tolerations: Iterable[Object], effects: tuple[str, ...]) -> Object | None:
    """Give the first taint of these effects that no toleration covers, or None."""
    known = list(tolerations)
    for taint in taints:
        if taint.get("effect") in effects and not any(tolerates(item, taint) for item in known):
            return taint
    return None


def same(left: Object, right: Object) -> bool:
    """Whether two taints are the same one (key and effect)."""
    return left.get("key") == right.get("key") and left.get("effect") == right.get("effect")


def contains(taints: Iterable[Object], key: str, effect: str) -> bool:
    return any(taint.get("key") == key and taint.get("effect") == effect for taint in taints)
