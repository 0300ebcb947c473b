"""Conversion between the served versions of one built-in kind: HorizontalPodAutoscaler v1 and v2, Event core and events.k8s.io.

Called by the API server where a resource is stored in another version than asked for, and by server-side apply. Pure:
a new object comes back, parts may be shared with the old one.

Source: pkg/apis/autoscaling/v1/conversion.go, pkg/apis/events/v1/conversion.go.
"""

from typing import Any

import orjson

from knarr.api.types import Object

_METRICS = "autoscaling.alpha.kubernetes.io/metrics"
_CURRENT_METRICS = "autoscaling.alpha.kubernetes.io/current-metrics"
_CONDITIONS = "autoscaling.alpha.kubernetes.io/conditions"
_BEHAVIOR = "autoscaling.alpha.kubernetes.io/behavior"


def convert(obj: Object, api_version: str) -> Object:
    """The object in another version of its kind; itself if it is in that version already.

    Raises:
      KeyError: there is no such conversion.
    """
    if obj.get("apiVersion") == api_version:
        return obj
    return _CONVERSIONS[obj.get("apiVersion") or "", obj.get("kind") or "", api_version](obj)


def needed(api_version: str, stored_api_version: str) -> bool:
    """Whether objects must be converted between these two versions."""
    return api_version != stored_api_version


# --- events -----------------------------------------------------------------------------------------------------------

_CORE_TO_EVENTS = {
    "involvedObject": "regarding", "message": "note", "source": "deprecatedSource", "firstTimestamp": "deprecatedFirstTimestamp",
    "lastTimestamp": "deprecatedLastTimestamp", "count": "deprecatedCount", "reportingComponent": "reportingController",
}
_EVENTS_TO_CORE = {new: old for old, new in _CORE_TO_EVENTS.items()}
# Each version always writes these of its fields, so they exist on the other side too.
_EVENT_SHAPE: Object = {"source": {}, "firstTimestamp": None, "lastTimestamp": None, "involvedObject": {}, "eventTime": None}


def _event_to_events(obj: Object) -> Object:
    made: Object = {_CORE_TO_EVENTS.get(key, key): value for key, value in obj.items()}
    made["apiVersion"] = "events.k8s.io/v1"
    for key in ("reportingController", "reportingInstance"):
        if made.get(key) == "":
            del made[key]
    return made


def _event_to_core(obj: Object) -> Object:
    made: Object = {_EVENTS_TO_CORE.get(key, key): value for key, value in obj.items()}
    made["apiVersion"] = "v1"
    made.setdefault("reportingComponent", "")
    made.setdefault("reportingInstance", "")
    for key, value in _EVENT_SHAPE.items():
        made.setdefault(key, dict(value) if isinstance(value, dict) else value)
    return made


# --- autoscaling ------------------------------------------------------------------------------------------------------


def _is_cpu(metric: Object, part: str) -> Any:
    """The CPU utilization of a resource metric, None if it is another metric."""
    if metric.get("type") != "Resource":
        return None
    resource = metric.get("resource") or {}
    if resource.get("name") != "cpu":
        return None
    return (resource.get(part) or {}).get("averageUtilization")


def _metric_to_v1(metric: Object, part: str) -> Object:
    """One metric in the layout of the annotation, which is that of v2beta1."""
    made: Object = {"type": metric.get("type")}
    kind = metric.get("type") or ""
    key = kind[:1].lower() + kind[1:]
    given = metric.get(key) or {}
    numbers = given.get(part) or {}
    prefix = "target" if part == "target" else "current"
    inner: Object = {}
    match kind:
        case "Resource" | "ContainerResource":
            inner["name"] = given.get("name")
            if "container" in given:
                inner["container"] = given["container"]
            if numbers.get("averageUtilization") is not None:
                inner[f"{prefix}AverageUtilization"] = numbers["averageUtilization"]
            value = numbers.get("averageValue")
            if value is not None:
                inner[f"{prefix}AverageValue"] = value
        case "Pods":
            inner = {"metricName": (given.get("metric") or {}).get("name"), f"{prefix}AverageValue": numbers.get("averageValue")}
        case "Object":
            inner = {"target": given.get("describedObject"), "metricName": (given.get("metric") or {}).get("name"),
                     f"{prefix}Value": numbers.get("value") or "0"}
            if numbers.get("averageValue") is not None:
                inner["averageValue"] = numbers["averageValue"]
        case "External":
            inner = {"metricName": (given.get("metric") or {}).get("name"), f"{prefix}Value": numbers.get("value")}
            if numbers.get("averageValue") is not None:
                inner[f"{prefix}AverageValue"] = numbers["averageValue"]
    selector = (given.get("metric") or {}).get("selector")
    if selector is not None:
        inner["metricSelector" if kind == "External" else "selector"] = selector
    made[key] = {k: v for k, v in inner.items() if v is not None}
    return made


def _metric_to_v2(metric: Object, part: str) -> Object:
    kind = metric.get("type") or ""
    key = kind[:1].lower() + kind[1:]
    given = metric.get(key) or {}
    prefix = "target" if part == "target" else "current"
    numbers: Object = {}
    for field, name in ((f"{prefix}AverageUtilization", "averageUtilization"), (f"{prefix}AverageValue", "averageValue"),
                        (f"{prefix}Value", "value"), ("averageValue", "averageValue")):
        if given.get(field) is not None:
            numbers[name] = given[field]
    if "averageValue" in numbers and numbers.get("value") == "0":
        del numbers["value"]
    if part == "target":
        numbers["type"] = "Utilization" if "averageUtilization" in numbers else "AverageValue" if "averageValue" in numbers else "Value"
    inner: Object = {}
    if kind in ("Resource", "ContainerResource"):
        inner["name"] = given.get("name")
        if "container" in given:
            inner["container"] = given["container"]
    else:
        identity: Object = {"name": given.get("metricName")}
        selector = given.get("metricSelector" if kind == "External" else "selector")
        if selector is not None:
            identity["selector"] = selector
        inner["metric"] = identity
        if kind == "Object":
            inner["describedObject"] = given.get("target")
    inner[part] = numbers
    return {"type": kind, key: inner}


def _autoscaler_to_v1(obj: Object) -> Object:
    made: Object = {**obj, "apiVersion": "autoscaling/v1"}
    meta: Object = dict(obj.get("metadata") or {})
    annotations = dict(meta.get("annotations") or {})
    spec, status = dict(obj.get("spec") or {}), dict(obj.get("status") or {})
    others: list[Object] = []
    for metric in spec.pop("metrics", None) or ():
        percentage = _is_cpu(metric, "target")
        if percentage is not None and "targetCPUUtilizationPercentage" not in spec:
            spec["targetCPUUtilizationPercentage"] = percentage
        else:
            others.append(_metric_to_v1(metric, "target"))
    current: list[Object] = []
    for metric in status.pop("currentMetrics", None) or ():
        percentage = _is_cpu(metric, "current")
        if percentage is not None:
            status["currentCPUUtilizationPercentage"] = percentage
        current.append(_metric_to_v1(metric, "current"))
    behavior, conditions = spec.pop("behavior", None), status.pop("conditions", None)
    for key, value in ((_METRICS, others), (_CURRENT_METRICS, current), (_CONDITIONS, conditions), (_BEHAVIOR, _capital_keys(behavior))):
        if value:
            annotations[key] = orjson.dumps(value).decode()
    if annotations:
        meta["annotations"] = annotations
    status.setdefault("currentReplicas", 0)
    status.setdefault("desiredReplicas", 0)
    return {**made, "metadata": meta, "spec": spec, "status": status}


def _capital_keys(value: Any) -> Any:
    """Behaviour is kept in the annotation under Go's field names."""
    if isinstance(value, dict):
        return {key[:1].upper() + key[1:]: _capital_keys(item) for key, item in value.items()}
    return [_capital_keys(item) for item in value] if isinstance(value, list) else value


def _small_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key[:1].lower() + key[1:]: _small_keys(item) for key, item in value.items() if item is not None}
    return [_small_keys(item) for item in value] if isinstance(value, list) else value


def _autoscaler_to_v2(obj: Object) -> Object:
    meta: Object = dict(obj.get("metadata") or {})
    annotations = dict(meta.get("annotations") or {})
    spec, status = dict(obj.get("spec") or {}), dict(obj.get("status") or {})
    metrics: list[Object] = []
    percentage = spec.pop("targetCPUUtilizationPercentage", None)
    if percentage is not None:
        target = {"type": "Utilization", "averageUtilization": percentage}
        metrics.append({"type": "Resource", "resource": {"name": "cpu", "target": target}})
    metrics = [*(_metric_to_v2(m, "target") for m in _annotation(annotations, _METRICS) or ()), *metrics]
    if metrics:
        spec["metrics"] = metrics
    behavior = _annotation(annotations, _BEHAVIOR)
    if behavior:
        spec["behavior"] = _small_keys(behavior)
    status.pop("currentCPUUtilizationPercentage", None)
    current = _annotation(annotations, _CURRENT_METRICS)
    status["currentMetrics"] = [_metric_to_v2(m, "current") for m in current] if current else None
    conditions = _annotation(annotations, _CONDITIONS)
    if conditions:
        status["conditions"] = conditions
    if not status.get("currentReplicas"):
        status.pop("currentReplicas", None)
    status.setdefault("desiredReplicas", 0)
    if annotations:
        meta["annotations"] = annotations
    else:
        meta.pop("annotations", None)
    return {**obj, "apiVersion": "autoscaling/v2", "metadata": meta, "spec": spec, "status": status}


def _annotation(annotations: dict[str, str], key: str) -> Any:
    text = annotations.pop(key, None)
    if text is None:
        return None
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return None


_CONVERSIONS = {
    ("v1", "Event", "events.k8s.io/v1"): _event_to_events,
    ("events.k8s.io/v1", "Event", "v1"): _event_to_core,
    ("autoscaling/v2", "HorizontalPodAutoscaler", "autoscaling/v1"): _autoscaler_to_v1,
    ("autoscaling/v1", "HorizontalPodAutoscaler", "autoscaling/v2"): _autoscaler_to_v2,
}
