"""What a whole pod requests and is limited to, as exact quantities.

Callers: quota (admission and controller), limit ranges. The scheduler and the kubelet count in whole integers by themselves.
Source: component-helpers resource/helpers.go.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from knarr.api import quantity
from knarr.api.types import Object

ResourceList = dict[str, str]


def add(into: ResourceList, amounts: Mapping[str, str]) -> None:
    for name, amount in amounts.items():
        into[name] = quantity.add(into[name], amount) if name in into else amount


def maximum(into: ResourceList, amounts: Mapping[str, str]) -> None:
    for name, amount in amounts.items():
        if name not in into or quantity.compare(amount, into[name]) > 0:
            into[name] = amount


def is_pod_level(name: str) -> bool:
    return name in ("cpu", "memory") or name.startswith("hugepages-")


def _amounts(container: Object, kind: str, status: Object | None, infeasible: bool) -> ResourceList:
    spec: dict[str, Any] = (container.get("resources") or {}).get(kind) or {}
    if status is None:
        return dict(spec)
    actual = (status.get("resources") or {}).get(kind) or {}
    allocated = (status.get("allocatedResources") or {}) if kind == "requests" else {}
    # A resize under way holds the larger of what is wished for and what is in force.
    out: ResourceList = {} if infeasible else dict(spec)
    maximum(out, actual)
    maximum(out, allocated)
    return out or dict(spec)


def pod_total(pod: Object, kind: str, *, use_status: bool = False) -> ResourceList:
    """Sum a pod's "requests" or "limits": containers and sidecars together, or the largest init container, plus overhead.

    Args:
      use_status: Count a resize under way at the larger of old and new.
    """
    spec = pod.get("spec") or {}
    status = pod.get("status") or {}
    statuses: dict[str, Object] = {}
    infeasible = False
    if use_status:
        for field in ("containerStatuses", "initContainerStatuses"):
            statuses.update({one.get("name", ""): one for one in status.get(field) or ()})
        infeasible = any(
            one.get("type") == "PodResizePending" and one.get("reason") == "Infeasible" for one in status.get("conditions") or ()
        )
    total: ResourceList = {}
    for container in spec.get("containers") or ():
        add(total, _amounts(container, kind, statuses.get(container.get("name", "")), infeasible))
    sidecars: ResourceList = {}
    starting: ResourceList = {}
    for container in spec.get("initContainers") or ():
        amounts = _amounts(container, kind, statuses.get(container.get("name", "")), infeasible)
        if container.get("restartPolicy") == "Always":
            add(total, amounts)
            add(sidecars, amounts)
            maximum(starting, sidecars)
        else:
            add(amounts, sidecars)
            maximum(starting, amounts)
    maximum(total, starting)
    for name, amount in ((spec.get("resources") or {}).get(kind) or {}).items():
        if is_pod_level(name):
            total[name] = amount
    for name, amount in (spec.get("overhead") or {}).items():
        # Overhead raises limits only where there is a limit.
        if kind == "requests" or name in total:
            add(total, {name: amount})
    return total
