"""The quality-of-service class that a pod's requests and limits amount to.

Source: pkg/apis/core/helper/qos ComputePodQOS.
"""

from __future__ import annotations

from typing import Any

from knarr.api import quantity

_COUNTED = ("cpu", "memory")


def pod_qos(spec: dict[str, Any]) -> str:
    """Give "Guaranteed", "Burstable" or "BestEffort"."""
    own = spec.get("resources") or {}
    if own.get("requests") or own.get("limits"):
        return _class([own])
    containers = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]
    return _class([c.get("resources") or {} for c in containers])


def _class(resources: list[dict[str, Any]]) -> str:
    requested = limited = False
    guaranteed = True
    totals: dict[str, dict[str, Any]] = {"requests": {}, "limits": {}}
    for entry in resources:
        present = {}
        for kind in ("requests", "limits"):
            amounts = {n: quantity.parse(t) for n, t in (entry.get(kind) or {}).items() if n in _COUNTED}
            present[kind] = {n: a for n, a in amounts.items() if a > 0}
            for name, amount in present[kind].items():
                totals[kind][name] = totals[kind].get(name, 0) + amount
        requested = requested or bool(present["requests"])
        limited = limited or bool(present["limits"])
        guaranteed = guaranteed and len(present["limits"]) == len(_COUNTED)
    if not requested and not limited:
        return "BestEffort"
    if guaranteed and totals["requests"] == totals["limits"]:
        return "Guaranteed"
    return "Burstable"
