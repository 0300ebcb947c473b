"""What a pod asks of a node, as integers.

Callers: `podinfo` (once per pod shape), queueing hints. Amounts are CPU in millicores and
everything else in whole units, rounded up, as the scheduler compares them.

Source: component-helpers resource.PodRequests; KEP-753 (sidecars), KEP-2837 (pod level), KEP-1287 (resize).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from knarr.api import quantity

Amounts = dict[str, int]

DEFAULT_CPU_MILLICORES = 100
DEFAULT_MEMORY_BYTES = 200 * 1024 * 1024


def amount(resource: str, text: Any) -> int:
    """Give the integer amount of a quantity: millicores for cpu, whole units rounded up for the rest."""
    return quantity.cpu_millicores(text) if resource == "cpu" else quantity.value(text)


def amounts(resource_list: dict[str, Any] | None) -> Amounts:
    return {name: amount(name, text) for name, text in resource_list.items()} if resource_list else {}


def _add(total: Amounts, more: Amounts) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0) + value


def _raise_to(total: Amounts, least: Amounts) -> None:
    for name, value in least.items():
        if value > total.get(name, 0):
            total[name] = value


def _is_resize_infeasible(pod: dict[str, Any]) -> bool:
    for condition in pod.get("status", {}).get("conditions") or ():
        if condition.get("type") == "PodResizePending":
            return bool(condition.get("reason") == "Infeasible")
    return False


def _container_requests(container: dict[str, Any], status: dict[str, Any] | None, infeasible: bool) -> Amounts:
    """The most of what is wanted, allocated and in force: a resize under way must fit before and after."""
    wanted = amounts((container.get("resources") or {}).get("requests"))
    if status is None or not status.get("resources"):
        return wanted
    result = amounts(status["resources"].get("requests"))
    _raise_to(result, amounts(status.get("allocatedResources")))
    if not infeasible:
        _raise_to(result, wanted)
    return result


def _sum_containers(pod: dict[str, Any], missing: Amounts) -> Amounts:
    spec, status = pod["spec"], pod.get("status") or {}
    statuses = {s["name"]: s for key in ("containerStatuses", "initContainerStatuses") for s in status.get(key) or () if s.get("resources")}
    infeasible = bool(statuses) and _is_resize_infeasible(pod)

    def requests(container: dict[str, Any], may_resize: bool) -> Amounts:
        result = _container_requests(container, statuses.get(container["name"]) if may_resize else None, infeasible)
        for name, value in missing.items():
            result.setdefault(name, value)
        return result

    total: Amounts = {}
    for container in spec.get("containers") or ():
        _add(total, requests(container, True))
    sidecars: Amounts = {}
    peak: Amounts = {}
    for container in spec.get("initContainers") or ():
        is_sidecar = container.get("restartPolicy") == "Always"
        own = requests(container, is_sidecar)
        if is_sidecar:
            _add(total, own)
            _add(sidecars, own)
            own = sidecars
        else:
            own = dict(own)
            _add(own, sidecars)
        _raise_to(peak, own)
    _raise_to(total, peak)
    return total


def _is_pod_level(name: str) -> bool:
    return name in ("cpu", "memory") or name.startswith("hugepages-")


def pod_requests(pod: dict[str, Any], *, missing: Amounts | None = None) -> Amounts:
    """Compute what one pod takes of a node.

    Args:
      missing: amounts assumed for each container that does not state the resource.

    Returns:
      Resource name to amount; resources that nobody asks for are absent.
    """
    spec = pod["spec"]
    total = _sum_containers(pod, missing or {})
    pod_level = (spec.get("resources") or {}).get("requests")
    if pod_level:
        for name, text in pod_level.items():
            if _is_pod_level(name):
                total[name] = amount(name, text)
    if spec.get("overhead"):
        _add(total, amounts(spec["overhead"]))
    return total


def nonzero_requests(pod: dict[str, Any]) -> tuple[int, int]:
    """Give (cpu millicores, memory bytes) with the defaults for containers that state none: for spreading load only."""
    total = pod_requests(pod, missing={"cpu": DEFAULT_CPU_MILLICORES, "memory": DEFAULT_MEMORY_BYTES})
    return total.get("cpu", 0), total.get("memory", 0)


def scaled_down(old: dict[str, Any], new: dict[str, Any], names: Iterable[str] | None = None) -> bool:
    """Tell whether an update lowered any request (of the named resources, or of all)."""
    before, after = pod_requests(old), pod_requests(new)
    return any(after.get(name, 0) < value for name, value in before.items() if names is None or name in names)
