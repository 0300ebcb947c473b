"""Groups of one small kind each: RuntimeClass, PriorityClass, Lease, APIService, Event.

Source: pkg/apis/node, scheduling and coordination validation, kube-aggregator apiregistration/validation, core/validation/events.go.
"""

from __future__ import annotations

from typing import Any

from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add, immutable, validate_labels
from knarr.api.validation.quantities import validate_requirements
from knarr.api.validation.scheduling import validate_tolerations
from knarr.api.validation.strings import (
    POSITIVE,
    Messages,
    dns_1035_label,
    dns_label,
    dns_subdomain,
    label_key_errors,
    path_segment,
    range_message,
)

# RuntimeClass.


def create_runtime_class(obj: Object, errors: Errors) -> None:
    handler = obj.get("handler") or ""
    add(errors, "handler", handler, dns_label(handler))
    overhead, scheduling = obj.get("overhead"), obj.get("scheduling")
    if overhead is not None:
        validate_requirements({"limits": overhead.get("podFixed") or {}}, frozenset(), "overhead", errors)
    if scheduling is not None:
        validate_labels(scheduling.get("nodeSelector"), "scheduling.nodeSelector", errors)
        tolerations = scheduling.get("tolerations") or []
        validate_tolerations(tolerations, "scheduling.tolerations.tolerations", errors)
        keys = [tuple(t.get(key) for key in ("key", "operator", "value", "effect")) for t in tolerations]
        errors.extend(duplicate(f"scheduling.tolerations[{i}]", tolerations[i]) for i, key in enumerate(keys) if key in keys[:i])


def update_runtime_class(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    immutable(errors, "handler", new.get("handler"), old.get("handler"))


# PriorityClass.

_SYSTEM = {"system-node-critical": 2000001000, "system-cluster-critical": 2000000000}
HIGHEST_PRIORITY = 1_000_000_000


def create_priority_class(obj: Object, errors: Errors) -> None:
    name, value, policy = obj["metadata"].get("name") or "", obj.get("value") or 0, obj.get("preemptionPolicy")
    if name.startswith("system-"):
        known = _SYSTEM.get(name)
        problem = f"{name} is not a known system priority class"
        if known is not None:
            problem = f"value of {name} PriorityClass must be {known}" if value != known else ""
            if not problem and obj.get("globalDefault"):
                problem = f"globalDefault of {name} PriorityClass must be false"
        if problem:
            message = f"priority class names with 'system-' prefix are reserved for system use only. error: {problem}"
            errors.append(field_forbidden("metadata.name", message))
    elif value > HIGHEST_PRIORITY:
        errors.append(field_forbidden("value", f"maximum allowed value of a user defined priority is {HIGHEST_PRIORITY}"))
    if policy is not None:
        if not policy:
            errors.append(required("preemptionPolicy"))
        elif policy not in ("PreemptLowerPriority", "Never"):
            errors.append(not_supported("preemptionPolicy", policy, ["PreemptLowerPriority", "Never"]))


def update_priority_class(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if (new.get("value") or 0) != (old.get("value") or 0):
        errors.append(field_forbidden("value", "may not be changed in an update."))
    immutable(errors, "preemptionPolicy", new.get("preemptionPolicy"), old.get("preemptionPolicy"))


# Lease.


def create_lease(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    duration, transitions = spec.get("leaseDurationSeconds"), spec.get("leaseTransitions")
    if duration is not None and duration <= 0:
        errors.append(invalid_value("spec.leaseDurationSeconds", duration, POSITIVE))
    if transitions is not None and transitions < 0:
        errors.append(invalid_value("spec.leaseTransitions", transitions, "must be greater than or equal to 0"))
    if spec.get("strategy") is not None:
        name = spec["strategy"].split("/")
        if len(name) == 1:
            if spec["strategy"] != "OldestEmulationVersion":
                errors.append(not_supported("spec.strategy", spec["strategy"], ["OldestEmulationVersion"]))
        else:
            add(errors, "spec.strategy", spec["strategy"], label_key_errors(spec["strategy"]))


# APIService.


def api_service_name(value: str) -> Messages:
    """Any name in a path; it must also be "version.group", which create checks."""
    return path_segment(value)


def create_api_service(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    version, group, service = spec.get("version") or "", spec.get("group") or "", spec.get("service")
    wanted = f"{version}.{group}"
    for key in ("generateName", "name"):
        given = obj["metadata"].get(key) or ""
        # Of a name that is wrong anyway nothing more is said.
        if given and given != wanted and not path_segment(given):
            errors.append(invalid_value(f"metadata.{key}", given, f'must be `spec.version+"."+spec.group`: "{wanted}"'))
    if group:
        add(errors, "spec.group", group, dns_subdomain(group))
    elif version != "v1":
        errors.append(required("spec.group", "only v1 may have an empty group and it better be legacy kube"))
    add(errors, "spec.version", version, dns_1035_label(version))
    for key, most in (("groupPriorityMinimum", 20000), ("versionPriority", 1000)):
        value = spec.get(key) or 0
        if not 1 <= value <= most:
            message = f"must be positive and less than {most}"
            errors.append(invalid_value(f"spec.{key}", value, message))
    insecure, bundle = bool(spec.get("insecureSkipTLSVerify")), spec.get("caBundle")
    if service is None:
        if bundle:
            errors.append(invalid_value("spec.caBundle", f"{len(bundle)} bytes", "local APIServices may not have a caBundle"))
        if insecure:
            message = "local APIServices may not have insecureSkipTLSVerify"
            errors.append(invalid_value("spec.insecureSkipTLSVerify", True, message))
        return
    for key in ("namespace", "name"):
        if not service.get(key):
            errors.append(required(f"spec.service.{key}"))
    port = service.get("port")
    if port is not None and not 1 <= port <= 65535:
        errors.append(invalid_value("spec.service.port", port, f"port is not valid: {range_message(1, 65535)}"))
    if insecure and bundle:
        errors.append(invalid_value("spec.insecureSkipTLSVerify", True, "may not be true if caBundle is present"))


def update_api_service(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource != "status":
        create_api_service(new, errors)
        return
    for index, condition in enumerate((new.get("status") or {}).get("conditions") or ()):
        if condition.get("status") not in ("True", "False", "Unknown"):
            path = f"status.conditions[{index}].status"
            errors.append(not_supported(path, condition.get("status") or "", ["False", "True", "Unknown"]))


# Events, core and events.k8s.io: one stored kind, two sets of rules.


def _legacy_event(obj: Object, errors: Errors, *, is_core: bool) -> None:
    namespace = obj["metadata"].get("namespace") or ""
    involved = (obj.get("involvedObject") if is_core else obj.get("regarding")) or {}
    own = involved.get("namespace") or ""
    mismatch = invalid_value("involvedObject.namespace", own, "does not match event.namespace")
    if not obj.get("eventTime"):
        if namespace != own if own else namespace not in ("", "default"):
            errors.append(mismatch)
    else:
        if not own and namespace not in ("default", "kube-system"):
            errors.append(mismatch)
        _new_event_fields(obj, errors, is_core=is_core)
    add(errors, "namespace", namespace, dns_subdomain(namespace))


def _new_event_fields(obj: Object, errors: Errors, *, is_core: bool) -> None:
    key = "reportingComponent" if is_core else "reportingController"
    controller = obj.get(key) or ""
    if not controller:
        errors.append(required(key))
    add(errors, key, controller, label_key_errors(controller))
    for name, limit in (("reportingInstance", 128), ("action", 128), ("reason", 128)):
        value = obj.get(name) or ""
        if not value:
            errors.append(required(name))
        if len(value) > limit:
            errors.append(invalid_value(name, "", f"can have at most {limit} characters"))
    if len(obj.get("message" if is_core else "note") or "") > 1024:
        errors.append(invalid_value("message", "", "can have at most 1024 characters"))


def _series(obj: Object, errors: Errors) -> None:
    series = obj.get("series")
    if series is not None:
        if (series.get("count") or 0) < 2:
            errors.append(invalid_value("series.count", "", "should be at least 2"))
        if not series.get("lastObservedTime"):
            errors.append(required("series.lastObservedTime"))


def create_core_event(obj: Object, errors: Errors) -> None:
    _legacy_event(obj, errors, is_core=True)


def update_core_event(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _legacy_event(new, errors, is_core=True)


def create_event(obj: Object, errors: Errors) -> None:
    _legacy_event(obj, errors, is_core=False)
    _series(obj, errors)
    if not obj.get("eventTime"):
        errors.append(required("eventTime"))
    if obj.get("type") not in ("Normal", "Warning"):
        errors.append(invalid_value("type", "", f"has invalid value: {obj.get('type') or ''}"))
    for key, shown in (
        ("deprecatedFirstTimestamp", "firstTimestamp"),
        ("deprecatedLastTimestamp", "lastTimestamp"),
        ("deprecatedCount", "count"),
    ):
        if obj.get(key):
            errors.append(invalid_value(shown, "", "needs to be unset"))
    if any((obj.get("deprecatedSource") or {}).values()):
        errors.append(invalid_value("source", "", "needs to be unset"))


_EVENT_FIELDS: tuple[tuple[str, str, Any], ...] = (
    ("regarding", "involvedObject", None), ("reason", "reason", ""), ("note", "message", ""), ("deprecatedSource", "source", None),
    ("deprecatedFirstTimestamp", "firstTimestamp", None), ("deprecatedLastTimestamp", "lastTimestamp", None),
    ("deprecatedCount", "count", 0), ("reason", "reason", ""), ("type", "type", ""), ("eventTime", "eventTime", None),
    ("action", "action", ""), ("related", "related", None), ("reportingController", "reportingController", ""),
    ("reportingInstance", "reportingInstance", ""),
)  # fmt: skip


def update_event(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _legacy_event(new, errors, is_core=False)
    if new.get("series") != old.get("series"):
        _series(new, errors)
    for key, shown, default in _EVENT_FIELDS:
        immutable(errors, shown, new.get(key) or default, old.get(key) or default)
