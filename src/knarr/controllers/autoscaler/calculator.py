"""From metrics to a number of replicas; pure.

Pods without metrics or not ready count against the direction of the change, so that missing data
never makes a change larger.
Source: pkg/controller/podautoscaler/replica_calculator.go.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.api import quantity
from knarr.api.types import Object
from knarr.controllers import podutil
from knarr.controllers.autoscaler.metrics import MetricsError, PodMetric
from knarr.controllers.quota import pod_resources

_MOST = 2**31 - 1


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far from 1 a ratio may be without a change."""

    down: float
    up: float

    def covers(self, ratio: float) -> bool:
        return 1.0 - self.down <= ratio <= 1.0 + self.up


@dataclass(frozen=True, slots=True)
class Timing:
    """How long new pods' CPU use and readiness are not trusted."""

    cpu_initialization_seconds: float
    initial_readiness_seconds: float


@dataclass(slots=True)
class _Groups:
    ready: int
    unready: set[str]
    missing: set[str]
    ignored: set[str]


def _group(pods: Sequence[Object], metrics: Mapping[str, PodMetric], resource: str, timing: Timing) -> _Groups:
    groups = _Groups(0, set(), set(), set())
    for pod in pods:
        name = pod["metadata"]["name"]
        if podutil.is_deleting(pod) or podutil.phase(pod) == "Failed":
            groups.ignored.add(name)
        elif podutil.phase(pod) == "Pending":
            groups.unready.add(name)
        elif name not in metrics:
            groups.missing.add(name)
        elif resource == "cpu" and _is_unready(pod, metrics[name], timing):
            groups.unready.add(name)
        else:
            groups.ready += 1
    return groups


def _is_unready(pod: Object, metric: PodMetric, timing: Timing) -> bool:
    condition = podutil.condition(pod, "Ready")
    started = (pod.get("status") or {}).get("startTime")
    if condition is None or not started:
        return True
    start = clock.parse_rfc3339(started)
    changed = clock.parse_rfc3339(condition["lastTransitionTime"]) if condition.get("lastTransitionTime") else 0.0
    if start + timing.cpu_initialization_seconds > clock.now():
        return bool(condition["status"] == "False") or metric.timestamp < changed + metric.window_seconds
    return bool(condition["status"] == "False") and start + timing.initial_readiness_seconds > changed


def _propose(
    current: int,
    metrics: Mapping[str, PodMetric],
    groups: _Groups,
    ratio_of: Callable[[Mapping[str, int]], float],
    missing_value: Callable[[str], int],
    tolerance: Tolerance,
) -> int:
    values = {name: metric.value for name, metric in metrics.items() if name not in groups.ignored and name not in groups.unready}
    if not values:
        raise MetricsError("did not receive metrics for targeted pods (pods might be unready)")
    ratio = ratio_of(values)
    growing = bool(groups.unready) and ratio > 1.0
    if not growing and not groups.missing:
        return current if tolerance.covers(ratio) else math.ceil(ratio * groups.ready)
    if ratio != 1.0:
        for name in groups.missing:
            values[name] = missing_value(name) if ratio < 1.0 else 0
    if growing:
        for name in groups.unready:
            values[name] = 0
    careful = ratio_of(values)
    if tolerance.covers(careful) or (ratio < 1.0 < careful) or (careful < 1.0 < ratio):
        return current
    replicas = math.ceil(careful * len(values))
    if (careful < 1.0 and replicas > current) or (careful > 1.0 and replicas < current):
        return current
    return replicas


def _active_values(metrics: Mapping[str, PodMetric], groups: _Groups) -> list[int]:
    return [metric.value for name, metric in metrics.items() if name not in groups.ignored and name not in groups.unready]


def requests_of(pods: Sequence[Object], resource: str, container: str) -> dict[str, int]:
    """Requests of the resource by pod, in thousandths.

    Raises:
      MetricsError: a container asks for nothing, so that a share of it means nothing.
    """
    result = {}
    for pod in pods:
        name = pod["metadata"]["name"]
        if not container and ((pod["spec"].get("resources") or {}).get("requests") or {}):
            amounts = pod_resources(pod, "requests")
            if resource not in amounts:
                raise MetricsError(f"missing pod-level request for {resource} in Pod {name}")
            result[name] = math.ceil(amounts[resource] * 1000)
            continue
        sidecars = [item for item in pod["spec"].get("initContainers") or () if item.get("restartPolicy") == "Always"]
        listed = [*(pod["spec"].get("containers") or ()), *sidecars]
        chosen = [item for item in listed if not container or item["name"] == container]
        if container and not chosen:
            raise MetricsError(f"container {container} not found in Pod {name}")
        total = 0
        for item in chosen:
            asked = ((item.get("resources") or {}).get("requests") or {}).get(resource)
            if asked is None:
                raise MetricsError(f"missing request for {resource} in container {item['name']} of Pod {name}")
            total += quantity.milli_value(asked)
        result[name] = total
    return result


def by_utilization(
    current: int,
    target_percent: int,
    metrics: Mapping[str, PodMetric],
    pods: Sequence[Object],
    resource: str,
    container: str,
    tolerance: Tolerance,
    timing: Timing,
) -> tuple[int, int, int]:
    """(replicas, utilization in percent, average use in thousandths)."""
    if not pods:
        raise MetricsError("no pods returned by selector while calculating replica count")
    groups = _group(pods, metrics, resource, timing)
    values = _active_values(metrics, groups)
    if not values:
        raise MetricsError("did not receive metrics for targeted pods (pods might be unready)")
    requests = requests_of(pods, resource, container)

    def ratio(chosen: Mapping[str, int]) -> float:
        asked = sum(requests[name] for name in chosen if name in requests)
        if not asked:
            raise MetricsError("no metrics returned matched known pods")
        used = sum(value for name, value in chosen.items() if name in requests)
        return used * 100 // asked / target_percent

    fallback = max(100, target_percent)
    replicas = _propose(current, metrics, groups, ratio, lambda name: requests[name] * fallback // 100, tolerance)
    known = {name: m.value for name, m in metrics.items() if name in requests and name not in groups.ignored | groups.unready}
    asked = sum(requests[name] for name in known)
    return replicas, sum(known.values()) * 100 // asked, sum(known.values()) // len(known)


def by_average(
    current: int, target: int, metrics: Mapping[str, PodMetric], pods: Sequence[Object], resource: str, tolerance: Tolerance, timing: Timing
) -> tuple[int, int]:
    """(replicas, average value) for a target average in thousandths."""
    if not pods:
        raise MetricsError("no pods returned by selector while calculating replica count")
    groups = _group(pods, metrics, resource, timing)

    def ratio(chosen: Mapping[str, int]) -> float:
        return sum(chosen.values()) / len(chosen) / target

    replicas = _propose(current, metrics, groups, ratio, lambda _: target, tolerance)
    values = _active_values(metrics, groups)
    return replicas, sum(values) // len(values)


def by_value(current: int, ratio: float, pods: Sequence[Object], tolerance: Tolerance) -> int:
    """Replicas for a value of the whole: the ready pods times its ratio to the target."""
    if current == 0:
        return math.ceil(ratio)
    if tolerance.covers(ratio):
        return current
    if not pods:
        raise MetricsError("unable to calculate ready pods: no pods returned by selector while calculating replica count")
    ready = sum(1 for pod in pods if podutil.phase(pod) == "Running" and podutil.is_ready(pod))
    return min(_MOST, math.ceil(ratio * ready))


def by_share(current: int, value: int, target: int, tolerance: Tolerance) -> tuple[int, int]:
    """(replicas, share per replica) for a value that replicas share evenly."""
    ratio = value / (target * current) if current else math.inf
    replicas = current if tolerance.covers(ratio) else min(_MOST, math.ceil(value / target))
    return replicas, math.ceil(value / current) if current else value
