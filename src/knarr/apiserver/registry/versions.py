"""Conversion between the versions of built-in kinds that are served in two: events and horizontal pod autoscalers.

Pure. from_stored gives the served form of a stored object, to_stored the reverse; both return a new outer object.

Source: pkg/apis/events/v1/conversion.go, pkg/apis/autoscaling/v1/conversion.go.
"""

from __future__ import annotations

from typing import Any

import orjson

from knarr.api.types import Object
from knarr.apiserver.forms import Converter

_EVENT_RENAMED = (
    ("involvedObject", "regarding"), ("message", "note"), ("source", "deprecatedSource"), ("firstTimestamp", "deprecatedFirstTimestamp"),
    ("lastTimestamp", "deprecatedLastTimestamp"), ("count", "deprecatedCount"), ("reportingComponent", "reportingController"),
)  # fmt: skip
_TO_EVENTS = dict(_EVENT_RENAMED)
_TO_CORE = {new: old for old, new in _EVENT_RENAMED}


def event_from_core(obj: Object) -> Object:
    """core/v1 Event as events.k8s.io/v1."""
    out = {_TO_EVENTS.get(key, key): value for key, value in obj.items()}
    out["apiVersion"] = "events.k8s.io/v1"
    for key in ("reportingComponent", "reportingInstance"):
        if out.get(key) == "":
            del out[key]
    if out.get("reportingController") == "":
        del out["reportingController"]
    return out


def event_to_core(obj: Object) -> Object:
    """events.k8s.io/v1 Event as core/v1."""
    out = {_TO_CORE.get(key, key): value for key, value in obj.items()}
    out["apiVersion"] = "v1"
    out.setdefault("involvedObject", {})
    out.setdefault("source", {})
    for key in ("firstTimestamp", "lastTimestamp", "eventTime"):
        out.setdefault(key, None)
    out.setdefault("reportingComponent", "")
    out.setdefault("reportingInstance", "")
    return out


_CPU_STATUS = "autoscaling.alpha.kubernetes.io/current-metrics"
_METRICS = "autoscaling.alpha.kubernetes.io/metrics"
_CONDITIONS = "autoscaling.alpha.kubernetes.io/conditions"
_BEHAVIOR = "autoscaling.alpha.kubernetes.io/behavior"


def _is_cpu(metric: Object, part: str) -> bool:
    resource = metric.get("resource") or {}
    return metric.get("type") == "Resource" and resource.get("name") == "cpu" and (resource.get(part) or {}).get("averageUtilization") is not None


def hpa_v1_from_v2(obj: Object) -> Object:
    """autoscaling/v2 as v1: what v1 cannot say goes into annotations."""
    out = {**obj, "apiVersion": "autoscaling/v1", "metadata": dict(obj["metadata"])}
    annotations: dict[str, str] = dict(obj["metadata"].get("annotations") or {})
    spec = dict(obj.get("spec") or {})
    metrics = spec.pop("metrics", None) or []
    behavior = spec.pop("behavior", None)
    others = []
    for metric in metrics:
        if _is_cpu(metric, "target") and "targetCPUUtilizationPercentage" not in spec:
            spec["targetCPUUtilizationPercentage"] = metric["resource"]["target"]["averageUtilization"]
        else:
            others.append(metric)
    if others:
        annotations[_METRICS] = orjson.dumps([_metric_to_v1(m, "target", "target") for m in others]).decode()
    if behavior is not None:
        annotations[_BEHAVIOR] = orjson.dumps(behavior).decode()
    status = dict(obj.get("status") or {})
    current = status.pop("currentMetrics", None) or []
    conditions = status.pop("conditions", None)
    rest = []
    for metric in current:
        if _is_cpu(metric, "current") and "currentCPUUtilizationPercentage" not in status:
            status["currentCPUUtilizationPercentage"] = metric["resource"]["current"]["averageUtilization"]
        rest.append(metric)
    if rest:
        annotations[_CPU_STATUS] = orjson.dumps([_metric_to_v1(m, "current", "current") for m in rest]).decode()
    if conditions:
        annotations[_CONDITIONS] = orjson.dumps(conditions).decode()
    status.setdefault("currentReplicas", 0)
    status.setdefault("desiredReplicas", 0)
    out["spec"], out["status"] = spec, status
    if annotations:
        out["metadata"]["annotations"] = annotations
    return out


def hpa_v1_to_v2(obj: Object) -> Object:
    """autoscaling/v1 as v2: annotations that carry what v1 cannot say become fields again."""
    out = {**obj, "apiVersion": "autoscaling/v2", "metadata": dict(obj["metadata"])}
    annotations: dict[str, str] = dict(obj["metadata"].get("annotations") or {})
    spec, status = dict(obj.get("spec") or {}), dict(obj.get("status") or {})
    metrics: list[Object] = [_metric_to_v2(m, "target") for m in _json(annotations.pop(_METRICS, ""), [])]
    percent = spec.pop("targetCPUUtilizationPercentage", None)
    if percent is not None:
        cpu = {"type": "Resource", "resource": {"name": "cpu", "target": {"type": "Utilization", "averageUtilization": percent}}}
        metrics.insert(0, cpu)
    if metrics:
        spec["metrics"] = metrics
    behavior = _json(annotations.pop(_BEHAVIOR, ""), None)
    if behavior is not None:
        spec["behavior"] = behavior
    current = [_metric_to_v2(m, "current") for m in _json(annotations.pop(_CPU_STATUS, ""), [])]
    percent = status.pop("currentCPUUtilizationPercentage", None)
    if percent is not None and not any(_is_cpu(m, "current") for m in current):
        current.insert(0, {"type": "Resource", "resource": {"name": "cpu", "current": {"averageUtilization": percent}}})
    status["currentMetrics"] = current or None
    conditions = _json(annotations.pop(_CONDITIONS, ""), None)
    if conditions:
        status["conditions"] = conditions
    status.setdefault("desiredReplicas", 0)
    out["spec"], out["status"] = spec, status
    if annotations:
        out["metadata"]["annotations"] = annotations
    else:
        out["metadata"].pop("annotations", None)
    return out


def _json(text: str, otherwise: Any) -> Any:
    if not text:
        return otherwise
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return otherwise


def _metric_to_v1(metric: Object, part: str, prefix: str) -> Object:
    """v2 nests value, averageValue and averageUtilization; v1 has them flat, under older names."""
    source = {"Resource": "resource", "ContainerResource": "containerResource", "Pods": "pods", "Object": "object", "External": "external"}
    key = source.get(metric.get("type") or "", "")
    inner = dict(metric.get(key) or {})
    nested = inner.pop(part, None) or {}
    flat: Object = {}
    if key in ("resource", "containerResource"):
        if "averageUtilization" in nested:
            flat[f"{prefix}AverageUtilization"] = nested["averageUtilization"]
        if "averageValue" in nested:
            flat[f"{prefix}AverageValue"] = nested["averageValue"]
        return {"type": metric.get("type"), key: {**inner, **flat}}
    named = inner.pop("metric", None) or {}
    flat["metricName"] = named.get("name", "")
    if "selector" in named:
        flat["metricSelector" if key == "external" else "selector"] = named["selector"]
    if "describedObject" in inner:
        flat["target"] = inner.pop("describedObject")
    names = {"value": f"{prefix}Value", "averageValue": f"{prefix}AverageValue" if key != "object" else "averageValue"}
    for old, new in names.items():
        if old in nested:
            flat[new] = nested[old]
    return {"type": metric.get("type"), key: {**inner, **flat}}


def _metric_to_v2(metric: Object, part: str) -> Object:
    source = {"Resource": "resource", "ContainerResource": "containerResource", "Pods": "pods", "Object": "object", "External": "external"}
    key = source.get(metric.get("type") or "", "")
    inner = dict(metric.get(key) or {})
    nested: Object = {}
    for old, new in (
        (f"{part}AverageUtilization", "averageUtilization"), (f"{part}AverageValue", "averageValue"), (f"{part}Value", "value"),
        ("averageValue", "averageValue"),
    ):  # fmt: skip
        if old in inner:
            nested[new] = inner.pop(old)
    if part == "target":
        nested["type"] = "Utilization" if "averageUtilization" in nested else "AverageValue" if "averageValue" in nested else "Value"
    if key not in ("resource", "containerResource"):
        if "target" in inner and key == "object":
            inner["describedObject"] = inner.pop("target")
        named: Object = {"name": inner.pop("metricName", "")}
        for selector in ("metricSelector", "selector"):
            if selector in inner:
                named["selector"] = inner.pop(selector)
        inner["metric"] = named
    inner[part] = nested
    return {"type": metric.get("type"), key: inner}


CONVERTERS: dict[tuple[str, str], tuple[Converter, Converter]] = {
    ("events.k8s.io/v1", "Event"): (event_from_core, event_to_core),
    ("autoscaling/v1", "HorizontalPodAutoscaler"): (hpa_v1_from_v2, hpa_v1_to_v2),
}
