"""HorizontalPodAutoscaler v2 and v1, Scale. Source: pkg/apis/autoscaling/validation."""

from __future__ import annotations

import json
from typing import Any

from knarr.api import quantity
from knarr.api.errors import field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add, nonnegative, validate_label_selector
from knarr.api.validation.quantities import nonnegative_quantity
from knarr.api.validation.strings import POSITIVE, path_segment

_SOURCES = ("object", "external", "pods", "resource", "containerResource")
_TYPES = {"Object": "object", "Pods": "pods", "Resource": "resource", "External": "external", "ContainerResource": "containerResource"}
_TYPE_LIST = ["ContainerResource", "External", "Object", "Pods", "Resource"]
_METRICS_ANNOTATION, _BEHAVIOR_ANNOTATION = "autoscaling.alpha.kubernetes.io/metrics", "autoscaling.alpha.kubernetes.io/behavior"


def _reference(reference: Object, path: str, errors: Errors, *, needs_group: bool) -> None:
    for key in ("kind", "name"):
        value = reference.get(key) or ""
        if not value:
            errors.append(required(f"{path}.{key}"))
        else:
            add(errors, f"{path}.{key}", value, path_segment(value))
    version = reference.get("apiVersion") or ""
    if version.count("/") > 1:
        errors.append(invalid_value(f"{path}.apiVersion", version, f"unexpected GroupVersion string: {version}"))
    elif needs_group and "/" not in version and version != "v1":
        errors.append(invalid_value(f"{path}.apiVersion", version, "apiVersion must specify API group"))


def _identifier(metric: Object, path: str, errors: Errors) -> None:
    name = metric.get("name") or ""
    if not name:
        errors.append(required(f"{path}.name", "must specify a metric name"))
    else:
        add(errors, f"{path}.name", name, path_segment(name))
    validate_label_selector(metric.get("selector"), f"{path}.selector", errors)


def _target(target: Object, path: str, errors: Errors) -> None:
    kind = target.get("type") or ""
    if not kind:
        errors.append(required(f"{path}.type", "must specify a metric target type"))
    if kind not in ("Utilization", "Value", "AverageValue"):
        message = "must be either Utilization, Value, or AverageValue"
        errors.append(invalid_value(f"{path}.type", kind, message))
    utilization = target.get("averageUtilization")
    for key in ("value", "averageValue"):
        if target.get(key) is not None and quantity.parse(target[key]) <= 0:
            errors.append(invalid_value(f"{path}.{key}", target[key], "must be positive"))
    if utilization is not None and utilization < 1:
        errors.append(invalid_value(f"{path}.averageUtilization", utilization, POSITIVE))


def _source(kind: str, source: Object, path: str, errors: Errors) -> None:
    target, own = source.get("target") or {}, f"{path}.target"
    value, average, utilization = target.get("value"), target.get("averageValue"), target.get("averageUtilization")
    if kind == "object":
        _reference(source.get("describedObject") or {}, f"{path}.describedObject", errors, needs_group=False)
    if kind in ("object", "external", "pods"):
        _identifier(source.get("metric") or {}, f"{path}.metric", errors)
    else:
        if kind == "containerResource" and not source.get("container"):
            errors.append(required(f"{path}.container", "must specify a container"))
        if not source.get("name"):
            errors.append(required(f"{path}.name", "must specify a resource name"))
    _target(target, own, errors)
    if kind == "object":
        if value is None and average is None:
            errors.append(required(f"{own}.averageValue", "must set either a target value or averageValue"))
    elif kind == "external":
        if value is None and average is None:
            errors.append(required(f"{own}.averageValue", "must set either a target value for metric or a per-pod target"))
        if value is not None and average is not None:
            errors.append(field_forbidden(f"{own}.value", "may not set both a target value for metric and a per-pod target"))
    elif kind == "pods":
        if average is None or quantity.parse(average) <= 0:
            if not any(e.field == f"{own}.averageValue" for e in errors):
                errors.append(required(f"{own}.averageValue", "must specify a positive target averageValue"))
    else:
        if utilization is None and average is None:
            errors.append(required(f"{own}.averageUtilization", "must set either a target raw value or a target utilization"))
        if utilization is not None and average is not None:
            errors.append(field_forbidden(f"{own}.averageValue", "may not set both a target raw value and a target utilization"))


def _metric(metric: Object, path: str, errors: Errors) -> None:
    kind = metric.get("type") or ""
    if not kind:
        errors.append(required(f"{path}.type", "must specify a metric source type"))
    if kind not in _TYPES:
        errors.append(not_supported(f"{path}.type", kind, _TYPE_LIST))
    present = [key for key in _SOURCES if metric.get(key) is not None]
    if present:
        _source(present[0], metric[present[0]], f"{path}.{present[0]}", errors)
    expected = _TYPES.get(kind)
    if expected is None:
        errors.append(not_supported(f"{path}.type", kind, _TYPE_LIST))
    elif metric.get(expected) is None:
        errors.append(required(f"{path}.{expected}", "must populate information for the given metric source"))
    if len(present) != 1:
        message = "must populate the given metric source only"
        errors.extend(field_forbidden(f"{path}.{key}", message) for key in present if key != expected)


def _rules(rules: Object, path: str, errors: Errors) -> None:
    window, own = rules.get("stabilizationWindowSeconds"), f"{path}.stabilizationWindowSeconds"
    if window is not None and window < 0:
        errors.append(invalid_value(own, window, "must be greater than or equal to zero"))
    if window is not None and window > 3600:
        errors.append(invalid_value(own, window, "must be less than or equal to 3600"))
    select = rules.get("selectPolicy")
    if select is not None and select not in ("Max", "Min", "Disabled"):
        errors.append(not_supported(f"{path}.selectPolicy", select, ["Disabled", "Max", "Min"]))
    if not rules.get("policies"):
        errors.append(required(f"{path}.policies", "must specify at least one Policy"))
    for index, policy in enumerate(rules.get("policies") or ()):
        own, period = f"{path}.policies[{index}]", policy.get("periodSeconds") or 0
        if policy.get("type") not in ("Pods", "Percent"):
            errors.append(not_supported(f"{own}.type", policy.get("type") or "", ["Percent", "Pods"]))
        if (policy.get("value") or 0) <= 0:
            errors.append(invalid_value(f"{own}.value", policy.get("value") or 0, "must be greater than zero"))
        if period <= 0:
            errors.append(invalid_value(f"{own}.periodSeconds", period, "must be greater than zero"))
        if period > 1800:
            errors.append(invalid_value(f"{own}.periodSeconds", period, "must be less than or equal to 1800"))
    if rules.get("tolerance") is not None:
        nonnegative_quantity(rules["tolerance"], f"{path}.tolerance", errors)


def _as_v2(obj: Object) -> Object:
    """The metrics of a v1 object as the v2 form states them."""
    spec = dict(obj.get("spec") or {})
    if obj.get("apiVersion") != "autoscaling/v1":
        return spec
    metrics: list[Any] = []
    percent = spec.pop("targetCPUUtilizationPercentage", None)
    if percent is not None:
        target = {"type": "Utilization", "averageUtilization": percent}
        metrics.append({"type": "Resource", "resource": {"name": "cpu", "target": target}})
    annotations = obj["metadata"].get("annotations") or {}
    if _BEHAVIOR_ANNOTATION in annotations:
        try:
            spec["behavior"] = json.loads(annotations[_BEHAVIOR_ANNOTATION])
        except ValueError:
            spec.pop("behavior", None)
    spec["metrics"] = metrics
    return spec


def create_autoscaler(obj: Object, errors: Errors) -> None:
    spec = _as_v2(obj)
    least, most, metrics = spec.get("minReplicas"), spec.get("maxReplicas") or 0, spec.get("metrics") or []
    if least is not None and least < 1:
        errors.append(invalid_value("spec.minReplicas", least, "must be greater than or equal to 1"))
    if most < 1:
        errors.append(invalid_value("spec.maxReplicas", most, POSITIVE))
    if least is not None and most < least:
        errors.append(invalid_value("spec.maxReplicas", most, "must be greater than or equal to `minReplicas`"))
    _reference(spec.get("scaleTargetRef") or {}, "spec.scaleTargetRef", errors, needs_group=True)
    for index, metric in enumerate(metrics):
        _metric(metric, f"spec.metrics[{index}]", errors)
    if least == 0 and not any(m.get("type") in ("Object", "External") for m in metrics):
        message = "must specify at least one Object or External metric to support scaling to zero replicas"
        errors.append(field_forbidden("spec.metrics", message))
    for key in ("scaleUp", "scaleDown"):
        rules = (spec.get("behavior") or {}).get(key)
        if rules is not None:
            _rules(rules, f"spec.behavior.{key}", errors)


def update_autoscaler(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        for key in ("currentReplicas", "desiredReplicas"):
            nonnegative(errors, f"status.{key}", (new.get("status") or {}).get(key))
        return
    create_autoscaler(new, errors)


def create_scale(obj: Object, errors: Errors) -> None:
    nonnegative(errors, "spec.replicas", (obj.get("spec") or {}).get("replicas"))
