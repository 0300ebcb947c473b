"""ObjectMeta: names, labels, annotations, owners, finalizers, and what an update may not change.

Source: apimachinery api/validation/objectmeta.go, apis/meta/v1/validation; apiserver registry/rest create.go, update.go.
"""

from __future__ import annotations

from typing import Any

from knarr.api.errors import FieldError, field_forbidden, invalid_value, not_supported, required, too_long
from knarr.api.validation.strings import (
    IMMUTABLE,
    NEGATIVE,
    Rule,
    condition_reason,
    dns_label,
    label_key_errors,
    label_value_errors,
    mask_trailing_dash,
    path_segment,
    path_segment_prefix,
)

Object = dict[str, Any]
Errors = list[FieldError]

MAXIMUM_ANNOTATION_BYTES = 256 * 1024


def add(errors: Errors, path: str, value: Any, messages: tuple[str, ...]) -> None:
    """Add an "Invalid value" per message."""
    for message in messages:
        errors.append(invalid_value(path, value, message))


def immutable(errors: Errors, path: str, new: Any, old: Any) -> None:
    if new != old:
        errors.append(invalid_value(path, new, IMMUTABLE))


def nonnegative(errors: Errors, path: str, value: int | None) -> None:
    if value is not None and value < 0:
        errors.append(invalid_value(path, value, NEGATIVE))


def validate_labels(labels: dict[str, str] | None, path: str, errors: Errors) -> None:
    if not labels:
        return
    for key, value in labels.items():
        for message in label_key_errors(key):
            errors.append(invalid_value(path, key, message))
        for message in label_value_errors(value):
            errors.append(invalid_value(path, value, message))


def validate_annotations(annotations: dict[str, str] | None, path: str, errors: Errors) -> None:
    if not annotations:
        return
    size = 0
    for key, value in annotations.items():
        for message in label_key_errors(key.lower()):
            errors.append(invalid_value(path, key, message))
        size += len(key) + len(value)
    if (
        size > MAXIMUM_ANNOTATION_BYTES // 4
        and sum(len(k.encode()) + len(v.encode()) for k, v in annotations.items()) > MAXIMUM_ANNOTATION_BYTES
    ):
        errors.append(too_long(path, MAXIMUM_ANNOTATION_BYTES))


def validate_owner_references(references: list[Object] | None, path: str, errors: Errors) -> None:
    controller = ""
    for reference in references or ():
        api_version, kind, name = reference.get("apiVersion") or "", reference.get("kind") or "", reference.get("name") or ""
        if not api_version.rpartition("/")[2]:
            errors.append(invalid_value(f"{path}.apiVersion", api_version, "version must not be empty"))
        if not kind:
            errors.append(invalid_value(f"{path}.kind", kind, "must not be empty"))
        if not name:
            errors.append(invalid_value(f"{path}.name", name, "must not be empty"))
        if not reference.get("uid"):
            errors.append(invalid_value(f"{path}.uid", reference.get("uid") or "", "must not be empty"))
        if kind == "Event" and api_version == "v1":
            errors.append(invalid_value(path, reference, "/v1, Kind=Event is disallowed from being an owner"))
        if reference.get("controller"):
            own = f"{kind}/{name}"
            if controller:
                message = f'Only one reference can have Controller set to true. Found "true" in references for {controller} and {own}'
                errors.append(invalid_value(path, references, message))
            else:
                controller = own


_STANDARD_FINALIZERS = frozenset({"kubernetes", "orphan", "foregroundDeletion"})


def validate_finalizers(finalizers: list[str] | None, path: str, errors: Errors) -> None:
    """The generic rule: qualified names, not both ways of deletion."""
    if not finalizers:
        return
    for finalizer in finalizers:
        add(errors, path, finalizer, label_key_errors(finalizer))
    if "orphan" in finalizers and "foregroundDeletion" in finalizers:
        errors.append(invalid_value(path, finalizers, "finalizer orphan and foregroundDeletion cannot be both set"))


def validate_core_finalizers(finalizers: list[str] | None, path: str, errors: Errors) -> None:
    """The stricter rule of most built-in kinds: names without a domain must be well known."""
    for index, finalizer in enumerate(finalizers or ()):
        if "/" not in finalizer and finalizer not in _STANDARD_FINALIZERS:
            message = "name is neither a standard finalizer name nor is it fully qualified"
            errors.append(invalid_value(f"{path}[{index}]", finalizer, message))


def validate_managed_fields(entries: list[Object] | None, path: str, errors: Errors) -> None:
    for index, entry in enumerate(entries or ()):
        own = f"{path}[{index}]"
        if entry.get("operation") not in ("Apply", "Update"):
            errors.append(invalid_value(f"{own}.operation", entry.get("operation") or "", "must be `Apply` or `Update`"))
        if entry.get("fieldsType") and entry["fieldsType"] != "FieldsV1":
            errors.append(invalid_value(f"{own}.fieldsType", entry["fieldsType"], "must be `FieldsV1`"))
        validate_field_manager(entry.get("manager") or "", f"{own}.manager", errors)
        if "subresource" in entry and len(entry["subresource"] or "") > 256:
            errors.append(too_long(f"{own}.subresource", 256))


def validate_field_manager(manager: str, path: str, errors: Errors) -> None:
    if len(manager) <= 32 and manager.isprintable():
        return  # 32 characters are 128 bytes at most
    if len(manager.encode()) > 128:
        errors.append(too_long(path, 128))
    for index, character in enumerate(manager):
        if not character.isprintable():
            errors.append(invalid_value(path, manager, f"invalid character U+{ord(character):04X} (at position {index})"))


def _common(metadata: Object, namespaced: bool, errors: Errors, path: str) -> None:
    namespace = metadata.get("namespace") or ""
    if namespaced:
        if not namespace:
            errors.append(required(f"{path}.namespace"))
        elif found := dns_label(namespace):
            add(errors, f"{path}.namespace", namespace, found)
    elif namespace:
        errors.append(field_forbidden(f"{path}.namespace", "not allowed on this type"))
    if "generation" in metadata and metadata["generation"] < 0:
        errors.append(invalid_value(f"{path}.generation", metadata["generation"], NEGATIVE))
    if "labels" in metadata:
        validate_labels(metadata["labels"], f"{path}.labels", errors)
    if "annotations" in metadata:
        validate_annotations(metadata["annotations"], f"{path}.annotations", errors)
    if "ownerReferences" in metadata:
        validate_owner_references(metadata["ownerReferences"], f"{path}.ownerReferences", errors)
    if "finalizers" in metadata:
        validate_finalizers(metadata["finalizers"], f"{path}.finalizers", errors)
    if "managedFields" in metadata:
        validate_managed_fields(metadata["managedFields"], f"{path}.managedFields", errors)


def validate_object_meta(
    metadata: Object, namespaced: bool, rule: Rule, errors: Errors, path: str = "metadata", *, core_finalizers: bool = True,
    prefix: bool = True,
) -> None:  # fmt: skip
    """Check the metadata of an object of a kind whose names, and with `prefix` also prefixes of names, follow `rule`."""
    generate_name, name = metadata.get("generateName") or "", metadata.get("name") or ""
    if generate_name and prefix:
        add(errors, f"{path}.generateName", generate_name, rule(mask_trailing_dash(generate_name)))
    if not name:
        errors.append(required(f"{path}.name", "name or generateName is required"))
    elif found := rule(name):
        add(errors, f"{path}.name", name, found)
    _common(metadata, namespaced, errors, path)
    if core_finalizers and "finalizers" in metadata:
        validate_core_finalizers(metadata["finalizers"], f"{path}.finalizers", errors)


def validate_generic_meta(metadata: Object, namespaced: bool, errors: Errors, path: str = "metadata") -> None:
    """The check of every kind: whatever the kind's own rule says, a name must fit into a URL path."""
    validate_path_names(metadata, errors, path)
    _common(metadata, namespaced, errors, path)


def validate_path_names(metadata: Object, errors: Errors, path: str = "metadata") -> None:
    """The part of validate_generic_meta that no kind's own rule makes superfluous."""
    generate_name, name = metadata.get("generateName") or "", metadata.get("name") or ""
    if generate_name:
        add(errors, f"{path}.generateName", generate_name, path_segment_prefix(generate_name))
    if not name:
        errors.append(required(f"{path}.name", "name or generateName is required"))
    else:
        add(errors, f"{path}.name", name, path_segment(name))


def validate_object_meta_update(new: Object, old: Object, errors: Errors, path: str = "metadata") -> None:
    """What no update may change, and that what it may change stays valid."""
    if old.get("deletionTimestamp"):
        extra = sorted(set(new.get("finalizers") or ()) - set(old.get("finalizers") or ()))
        if extra:
            listed = "[]string{" + ", ".join(f'"{e}"' for e in extra) + "}"
            message = f"no new finalizers can be added if the object is being deleted, found new finalizers {listed}"
            errors.append(field_forbidden(f"{path}.finalizers", message))
    if not new.get("resourceVersion"):
        errors.append(invalid_value(f"{path}.resourceVersion", "", "must be specified for an update"))
    if (new.get("generation") or 0) < (old.get("generation") or 0):
        errors.append(invalid_value(f"{path}.generation", new.get("generation") or 0, "must not be decremented"))
    for key in ("name", "namespace", "uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds"):
        if new.get(key) != old.get(key):
            errors.append(invalid_value(f"{path}.{key}", new.get(key), IMMUTABLE))
    validate_labels(new.get("labels"), f"{path}.labels", errors)
    validate_annotations(new.get("annotations"), f"{path}.annotations", errors)
    if "ownerReferences" in new:
        validate_owner_references(new["ownerReferences"], f"{path}.ownerReferences", errors)
    if "managedFields" in new:
        validate_managed_fields(new["managedFields"], f"{path}.managedFields", errors)


def validate_conditions(conditions: list[Object] | None, path: str, errors: Errors) -> None:
    """metav1.Condition lists."""
    seen: set[str] = set()
    for index, condition in enumerate(conditions or ()):
        own = f"{path}[{index}]"
        kind = condition.get("type") or ""
        if kind in seen:
            errors.append(FieldError("FieldValueDuplicate", f"{own}.type", "", kind))
        seen.add(kind)
        add(errors, f"{own}.type", kind, label_key_errors(kind))
        if condition.get("status") not in ("True", "False", "Unknown"):
            errors.append(not_supported(f"{own}.status", condition.get("status") or "", ["False", "True", "Unknown"]))
        if (condition.get("observedGeneration") or 0) < 0:
            message = "must be greater than or equal to zero"
            errors.append(invalid_value(f"{own}.observedGeneration", condition["observedGeneration"], message))
        if not condition.get("lastTransitionTime"):
            errors.append(required(f"{own}.lastTransitionTime"))
        reason = condition.get("reason") or ""
        if not reason:
            errors.append(required(f"{own}.reason"))
        else:
            add(errors, f"{own}.reason", reason, condition_reason(reason))
            if len(reason) > 1024:
                errors.append(too_long(f"{own}.reason", 1024))
        if len((condition.get("message") or "").encode()) > 32 * 1024:
            errors.append(too_long(f"{own}.message", 32 * 1024))


def validate_label_selector(selector: Object | None, path: str, errors: Errors, *, allow_invalid_values: bool = False) -> None:
    """A LabelSelector: matchLabels and matchExpressions."""
    if not selector:
        return
    validate_labels(selector.get("matchLabels"), f"{path}.matchLabels", errors)
    for index, expression in enumerate(selector.get("matchExpressions") or ()):
        own = f"{path}.matchExpressions[{index}]"
        operator, values = expression.get("operator") or "", expression.get("values") or ()
        if operator in ("In", "NotIn"):
            if not values:
                errors.append(required(f"{own}.values", "must be specified when `operator` is 'In' or 'NotIn'"))
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                errors.append(field_forbidden(f"{own}.values", "may not be specified when `operator` is 'Exists' or 'DoesNotExist'"))
        else:
            errors.append(invalid_value(f"{own}.operator", operator, "not a valid selector operator"))
        key = expression.get("key") or ""
        add(errors, f"{own}.key", key, label_key_errors(key))
        if not allow_invalid_values:
            for position, value in enumerate(values):
                add(errors, f"{own}.values[{position}]", value, label_value_errors(value))
