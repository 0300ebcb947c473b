"""PersistentVolumeClaims and the claim templates inside of pods and StatefulSets.

Source: pkg/apis/core/validation ValidatePersistentVolumeClaim*.
"""

from __future__ import annotations

from typing import Any

from knarr.api import quantity
from knarr.api.errors import field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add, immutable, validate_label_selector
from knarr.api.validation.quantities import is_native, nonnegative_quantity
from knarr.api.validation.strings import POSITIVE, dns_label, dns_subdomain, label_key_errors

ACCESS_MODES = ("ReadOnlyMany", "ReadWriteMany", "ReadWriteOnce", "ReadWriteOncePod")
VOLUME_MODES = ("Block", "Filesystem")
BETA_CLASS = "volume.beta.kubernetes.io/storage-class"
_RESIZE_STATES = (
    "ControllerResizeInProgress", "ControllerResizeInfeasible", "NodeResizeInProgress", "NodeResizeInfeasible", "NodeResizePending",
)  # fmt: skip


def validate_access_modes(modes: list[str], path: str, errors: Errors) -> None:
    alone = others = False
    for mode in modes:
        if mode not in ACCESS_MODES:
            errors.append(not_supported(path, mode, ACCESS_MODES))
        alone = alone or mode == "ReadWriteOncePod"
        others = others or (mode in ACCESS_MODES and mode != "ReadWriteOncePod")
    if alone and others:
        errors.append(field_forbidden(path, "may not use ReadWriteOncePod with other access modes"))


def _data_source(source: Object, path: str, errors: Errors, *, check_group: bool) -> None:
    for key in ("name", "kind"):
        if not source.get(key):
            errors.append(required(f"{path}.{key}"))
    group = source.get("apiGroup") or ""
    if not group and source.get("kind") != "PersistentVolumeClaim":
        message = "must be 'PersistentVolumeClaim' when referencing the default apiGroup"
        errors.append(invalid_value(path, source.get("kind") or "", message))
    if group and check_group:
        add(errors, f"{path}.apiGroup", group, dns_subdomain(group))
    if source.get("namespace"):
        add(errors, f"{path}.namespace", source["namespace"], dns_label(source["namespace"]))


def validate_claim_spec(spec: Object, path: str, errors: Errors, *, check_group: bool = True) -> None:
    """The spec of a claim."""
    modes = spec.get("accessModes") or []
    if not modes:
        errors.append(required(f"{path}.accessModes", "at least 1 access mode is required"))
    validate_label_selector(spec.get("selector"), f"{path}.selector", errors)
    validate_access_modes(modes, f"{path}.accessModes", errors)
    storage = ((spec.get("resources") or {}).get("requests") or {}).get("storage")
    own = f"{path}.resources[storage]"
    if storage is None:
        errors.append(required(own))
    elif quantity.parse(storage) <= 0:
        errors.append(invalid_value(own, str(storage), POSITIVE))
    class_name = spec.get("storageClassName")
    if class_name:
        add(errors, f"{path}.storageClassName", class_name, dns_subdomain(class_name))
    mode = spec.get("volumeMode")
    if mode is not None and mode not in VOLUME_MODES:
        errors.append(not_supported(f"{path}.volumeMode", mode, VOLUME_MODES))
    source, reference = spec.get("dataSource"), spec.get("dataSourceRef")
    if source is not None:
        _data_source(source, f"{path}.dataSource", errors, check_group=check_group)
    if reference is not None:
        _data_source(reference, f"{path}.dataSourceRef", errors, check_group=check_group)
    if reference is not None and reference.get("namespace"):
        if source is not None:
            errors.append(invalid_value(path, f"{path}.dataSource", "may not be specified when dataSourceRef.namespace is specified"))
    elif source is not None and reference is not None:
        if any(source.get(key) != reference.get(key) for key in ("apiGroup", "kind", "name")):
            errors.append(invalid_value(path, f"{path}.dataSource", "must match dataSourceRef"))
    attributes = spec.get("volumeAttributesClassName")
    if attributes:
        add(errors, f"{path}.volumeAttributesClassName", attributes, dns_subdomain(attributes))


def create_claim(obj: Object, errors: Errors) -> None:
    validate_claim_spec(obj.get("spec") or {}, "spec", errors)


def update_claim(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    """A claim's spec is fixed but for what binding fills in and what may grow."""
    if subresource == "status":
        _update_status(new, errors)
        return
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    check_group = not any((before.get(key) or {}).get("apiGroup") for key in ("dataSource", "dataSourceRef"))
    validate_claim_spec(spec, "spec", errors, check_group=check_group)
    left, right = dict(spec), dict(before)
    if not before.get("volumeName"):
        right["volumeName"] = left.get("volumeName")
    annotations, old_annotations = new["metadata"].get("annotations") or {}, old["metadata"].get("annotations") or {}
    old_beta, beta = old_annotations.get(BETA_CLASS), annotations.get(BETA_CLASS)
    class_name, old_class = spec.get("storageClassName"), before.get("storageClassName")
    if old_beta is not None and old_class is None and class_name == old_beta and beta in (None, old_beta):
        left["storageClassName"] = None
    else:
        immutable(errors, f"metadata.annotations[{BETA_CLASS}]", beta or "", old_beta or "")
        if class_name is not None and old_class is None and (old_beta is None or class_name == old_beta):
            left["storageClassName"] = old_class
    is_bound = (new.get("status") or {}).get("phase") == "Bound"
    if is_bound:
        left["resources"] = _with_storage(left.get("resources"), right.get("resources"))
        left["volumeAttributesClassName"] = right.get("volumeAttributesClassName")
    if {k: v for k, v in left.items() if v is not None} != {k: v for k, v in right.items() if v is not None}:
        message = "spec is immutable after creation except resources.requests and volumeAttributesClassName for bound claims"
        errors.append(field_forbidden("spec", message))
    _shrinks(spec, before, old.get("status") or {}, errors)
    immutable(errors, "volumeMode", spec.get("volumeMode"), before.get("volumeMode"))
    attributes = spec.get("volumeAttributesClassName")
    if (
        attributes != before.get("volumeAttributesClassName")
        and (old.get("status") or {}).get("currentVolumeAttributesClassName") is not None
    ):
        if not attributes:
            what = "nil" if attributes is None else "empty string"
            message = f"update to {what} is forbidden when status.currentVolumeAttributesClassName is not nil"
            errors.append(field_forbidden("spec.volumeAttributesClassName", message))


def _with_storage(resources: Any, old: Any) -> Any:
    if not resources or not resources.get("requests"):
        return resources
    storage = ((old or {}).get("requests") or {}).get("storage")
    return {**resources, "requests": {**resources["requests"], "storage": storage}}


def _shrinks(spec: Object, before: Object, status: Object, errors: Errors) -> None:
    def storage(of: Object) -> Any:
        return ((of.get("resources") or {}).get("requests") or {}).get("storage") or "0"

    if quantity.compare(storage(spec), storage(before)) < 0:
        capacity = (status.get("capacity") or {}).get("storage") or "0"
        if quantity.compare(storage(spec), capacity) <= 0:
            errors.append(field_forbidden("spec.resources.requests.storage", "field can not be less than status.capacity"))


def _resource_key(name: str, path: str, errors: Errors) -> bool:
    found = label_key_errors(name)
    if found:
        add(errors, path, name, found)
        return False
    if is_native(name) and name != "storage":
        errors.append(not_supported(path, name, ["storage"]))
        return False
    return True


def _update_status(new: Object, errors: Errors) -> None:
    status = new.get("status") or {}
    if not (new.get("spec") or {}).get("accessModes"):
        errors.append(required("Spec.accessModes"))
    for name, text in (status.get("capacity") or {}).items():
        if quantity.value(text) < 0:
            errors.append(invalid_value(f"status.capacity[{name}]", quantity.value(text), "must be a valid resource quantity"))
    for name, state in (status.get("allocatedResourceStatuses") or {}).items():
        _resource_key(name, "status.allocatedResourceStatuses", errors)
        if state not in _RESIZE_STATES:
            errors.append(not_supported("status.allocatedResourceStatuses", name, sorted(_RESIZE_STATES)))
    for name, text in (status.get("allocatedResources") or {}).items():
        if _resource_key(name, "status.allocatedResources", errors):
            nonnegative_quantity(text, f"status.allocatedResources[{name}]", errors)
