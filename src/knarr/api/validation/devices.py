"""Dynamic resource allocation: claims and their templates, device classes, resource slices.

Fields behind gates that are always off (shared counters, several allocations, binding conditions) are not judged.

Source: pkg/apis/resource/validation/validation.go.
"""

from __future__ import annotations

import re
from typing import Any

from knarr.api import cel
from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required, too_long, too_many
from knarr.api.validation.metadata import Errors, immutable, validate_annotations, validate_labels
from knarr.api.validation.scheduling import validate_node_selector
from knarr.api.validation.strings import dns_label, dns_subdomain, label_key_errors, label_value_errors

Object = dict[str, Any]
_MAX_ITEMS = 32
_MAX_ALTERNATIVES = 8
_MAX_CONSUMERS = 256
_MAX_DEVICES = 128
_MAX_EXPRESSION = 10 * 1024
_MAX_TEXT = 64
_MAX_TAINTS = 4
_EFFECTS = ("NoExecute", "NoSchedule")
_IDENTIFIER = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]{0,31}")
_NUMBER, _BEFORE, _BUILD = r"(0|[1-9]\d*)", r"(0|[1-9]\d*|\d*[a-zA-Z-][0-9a-zA-Z-]*)", r"[0-9a-zA-Z-]+"
_VERSION = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}(-{_BEFORE}(\.{_BEFORE})*)?(\+{_BUILD}(\.{_BUILD})*)?", re.ASCII)
_PLACES = ("nodeName", "nodeSelector", "allNodes", "perDeviceNodeSelection")


# --- claims -------------------------------------------------------------------------------------------------------------


def create_resource_claim(obj: Object, errors: Errors) -> None:
    _claim_spec(obj.get("spec") or {}, "spec", errors)


def update_resource_claim(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if not subresource:
        immutable(errors, "spec", new.get("spec"), old.get("spec"))
        return
    status, before = new.get("status") or {}, old.get("status") or {}
    users, allocation = status.get("reservedFor") or [], status.get("allocation")
    _size(users, _MAX_CONSUMERS, "status.reservedFor", errors)
    _unique(users, "uid", "status.reservedFor", errors)
    for index, user in enumerate(users):
        errors += [required(f"status.reservedFor[{index}].{key}") for key in ("resource", "name", "uid") if not user.get(key)]
    if users and allocation is None:
        errors.append(field_forbidden("status.reservedFor", "may not be specified when `allocated` is not set"))
    elif users and new["metadata"].get("deletionTimestamp") and any(user not in (before.get("reservedFor") or ()) for user in users):
        detail = "new entries may not be added while `deallocationRequested` or `deletionTimestamp` are set"
        errors.append(field_forbidden("status.reservedFor", detail))
    if allocation is not None and before.get("allocation") is not None:
        immutable(errors, "status.allocation", allocation, before["allocation"])


_TEMPLATE_FORBIDDEN = (
    "name", "generateName", "namespace", "selfLink", "uid", "resourceVersion", "generation", "creationTimestamp", "deletionTimestamp",
    "deletionGracePeriodSeconds", "ownerReferences", "finalizers", "managedFields",
)


def create_claim_template(obj: Object, errors: Errors) -> None:
    template = obj.get("spec") or {}
    metadata = template.get("metadata") or {}
    validate_annotations(metadata.get("annotations"), "spec.metadata.annotations", errors)
    validate_labels(metadata.get("labels"), "spec.metadata.labels", errors)
    for key in _TEMPLATE_FORBIDDEN:
        if metadata.get(key):
            errors.append(field_forbidden(f"spec.metadata.{'uID' if key == 'uid' else key}", "cannot be set"))
    _claim_spec(template.get("spec") or {}, "spec.spec", errors)


def update_claim_template(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    create_claim_template(new, errors)
    immutable(errors, "spec", new.get("spec"), old.get("spec"))


def _size(items: list[Any], maximum: int, path: str, errors: Errors) -> None:
    if len(items) > maximum:
        errors.append(too_many(path, len(items), maximum))


def _unique(items: list[Object], key: str, path: str, errors: Errors) -> None:
    seen: set[Any] = set()
    for index, item in enumerate(items):
        value = item.get(key) or ""
        if value in seen:
            errors.append(duplicate(f"{path}[{index}].{key}", value))
        seen.add(value)


def _claim_spec(spec: Object, path: str, errors: Errors) -> None:
    devices, path = spec.get("devices") or {}, f"{path}.devices"
    requests = devices.get("requests") or []
    names = {request.get("name") or "": {sub.get("name") for sub in request.get("firstAvailable") or ()} for request in requests}
    _size(requests, _MAX_ITEMS, f"{path}.requests", errors)
    for index, request in enumerate(requests):
        _request(request, f"{path}.requests[{index}]", errors)
    _unique(requests, "name", f"{path}.requests", errors)
    for key, check in (("constraints", _constraint), ("config", _configuration)):
        items = devices.get(key) or []
        _size(items, _MAX_ITEMS, f"{path}.{key}", errors)
        for index, item in enumerate(items):
            own = f"{path}.{key}[{index}]"
            for position, name in enumerate(item.get("requests") or ()):
                _reference(name, names, f"{own}.requests[{position}]", errors)
            check(item, own, errors)


def _name(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
    errors += [invalid_value(path, name, message) for message in dns_label(name) if name]


def _reference(name: str, names: dict[str, set[Any]], path: str, errors: Errors) -> None:
    main, slash, alternative = name.partition("/")
    if "/" not in alternative:
        for part in name.split("/"):
            _name(part, path, errors)
    if main not in names or (slash and alternative not in names[main]):
        detail = "must be the name of a request in the claim or the name of a request and a subrequest separated by '/'"
        errors.append(invalid_value(path, name, detail))


def _request_name(name: str, path: str, errors: Errors) -> None:
    errors += [invalid_value(path, name, message) for message in dns_label(name)]


def _request(request: Object, path: str, errors: Errors) -> None:
    _request_name(request.get("name") or "", f"{path}.name", errors)
    alternatives, exactly = request.get("firstAvailable") or [], request.get("exactly")
    _size(alternatives, _MAX_ALTERNATIVES, f"{path}.firstAvailable", errors)
    for index, alternative in enumerate(alternatives):
        own = f"{path}.firstAvailable[{index}]"
        _request_name(alternative.get("name") or "", f"{own}.name", errors)
        _exact(alternative, own, errors)
    _unique(alternatives, "name", f"{path}.firstAvailable", errors)
    if exactly is not None:
        _exact(exactly, f"{path}.exactly", errors)
    detail = "exactly one of `exactly` or `firstAvailable` is required"
    if not alternatives and exactly is None:
        errors.append(required(path, detail))
    elif alternatives and exactly is not None:
        errors.append(invalid_value(path, None, f"{detail}, but multiple fields are set"))


def _exact(request: Object, path: str, errors: Errors) -> None:
    device_class = request.get("deviceClassName") or ""
    if not device_class:
        errors.append(required(f"{path}.deviceClassName"))
    else:
        errors += [invalid_value(f"{path}.deviceClassName", device_class, message) for message in dns_subdomain(device_class)]
    _selectors(request.get("selectors") or [], f"{path}.selectors", errors)
    mode, count = request.get("allocationMode") or "", request.get("count") or 0
    if mode == "All":
        if count:
            errors.append(invalid_value(f"{path}.count", count, "must not be specified when allocationMode is 'All'"))
    elif mode == "ExactCount":
        if count <= 0:
            errors.append(invalid_value(f"{path}.count", count, "must be greater than zero"))
    else:
        errors.append(not_supported(f"{path}.allocationMode", mode, ("All", "ExactCount")))
    for index, toleration in enumerate(request.get("tolerations") or ()):
        _toleration(toleration, f"{path}.tolerations[{index}]", errors)


def _toleration(toleration: Object, path: str, errors: Errors) -> None:
    key, operator, value, effect = (toleration.get(name) or "" for name in ("key", "operator", "value", "effect"))
    if key:
        errors += [invalid_value(f"{path}.key", key, message) for message in label_key_errors(key)]
    if operator == "Exists":
        if value:
            errors.append(invalid_value(f"{path}.value", value, "must be empty for operator `Exists`"))
    elif operator == "Equal":
        errors += [invalid_value(f"{path}.value", value, message) for message in label_value_errors(value)]
    elif not operator:
        errors.append(required(f"{path}.operator"))
    else:
        errors.append(not_supported(f"{path}.operator", operator, ("Equal", "Exists")))
    if effect and effect not in _EFFECTS:
        errors.append(not_supported(f"{path}.effect", effect, _EFFECTS))


def _selectors(selectors: list[Object], path: str, errors: Errors) -> None:
    _size(selectors, _MAX_ITEMS, path, errors)
    for index, selector in enumerate(selectors):
        own = f"{path}[{index}].cel"
        if selector.get("cel") is None:
            errors.append(required(own))
            continue
        expression = selector["cel"].get("expression") or ""
        if len(expression) > _MAX_EXPRESSION:
            errors.append(invalid_value(f"{own}.expression", "", f"may not be more than {_MAX_EXPRESSION} bytes"))
            continue
        try:
            cel.base().compile(expression, {"device": cel.DYN}, result=cel.BOOL)
        except cel.CompileError as error:
            message = f"compilation failed: {error}"
            if isinstance(error, cel.ResultTypeError):
                message = f"must evaluate to bool or the unknown type, not {error.found}"
            errors.append(invalid_value(f"{own}.expression", expression, message))


def _constraint(constraint: Object, path: str, errors: Errors) -> None:
    name = constraint.get("matchAttribute")
    if name is None:
        errors.append(required(f"{path}.matchAttribute"))
        return
    own = f"{path}.matchAttribute"
    if "/" not in name:
        errors.append(invalid_value(own, name, "must include a domain"))
    _qualified(name, own, errors)


def _configuration(config: Object, path: str, errors: Errors) -> None:
    opaque, own = config.get("opaque"), f"{path}.opaque"
    if opaque is None:
        errors.append(required(own))
        return
    _driver(opaque.get("driver") or "", f"{own}.driver", errors)
    parameters = opaque.get("parameters")
    if parameters is None:
        errors.append(required(f"{own}.parameters"))
    elif not isinstance(parameters, dict):
        errors.append(invalid_value(f"{own}.parameters", parameters, "must be a valid JSON object"))


def _driver(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
        return
    if len(name) > 63:
        errors.append(invalid_value(path, name, "must be no more than 63 bytes"))
    errors += [invalid_value(path, name, message) for message in dns_subdomain(name.lower())]


def _qualified(name: str, path: str, errors: Errors) -> None:
    """An identifier, with or without a domain before it."""
    if not name:
        errors.append(required(path, "name required"))
        return
    domain, slash, identifier = name.rpartition("/")
    if slash and not domain:
        errors.append(required(path, "the domain must not be empty"))
    elif slash:
        errors += [invalid_value(path, domain, message) for message in dns_subdomain(domain)]
    if not identifier:
        errors.append(required(path, "the name must not be empty"))
    elif not _IDENTIFIER.fullmatch(identifier):
        errors.append(
            invalid_value(
                path,
                identifier,
                "a valid C identifier must start with alphabetic character or '_', followed by a string of alphanumeric characters or '_' (e.g. 'my_name',  or 'MY_NAME',  or 'MyName', regex used for validation is '[A-Za-z_][A-Za-z0-9_]*')",
            )
        )


# --- classes ------------------------------------------------------------------------------------------------------------


def create_device_class(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    _selectors(spec.get("selectors") or [], "spec.selectors", errors)
    config = spec.get("config") or []
    _size(config, _MAX_ITEMS, "spec.config", errors)
    for index, item in enumerate(config):
        _configuration(item, f"spec.config[{index}]", errors)


# --- slices -------------------------------------------------------------------------------------------------------------


def create_resource_slice(obj: Object, errors: Errors) -> None:
    _slice(obj.get("spec") or {}, None, errors)


def update_resource_slice(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _slice(new.get("spec") or {}, old.get("spec") or {}, errors)


def _slice(spec: Object, before: Object | None, errors: Errors) -> None:
    _driver(spec.get("driver") or "", "spec.driver", errors)
    pool = spec.get("pool") or {}
    name = pool.get("name") or ""
    _pool_name(name, "spec.pool.name", errors)
    if (pool.get("resourceSliceCount") or 0) <= 0:
        errors.append(invalid_value("spec.pool.resourceSliceCount", pool.get("resourceSliceCount") or 0, "must be greater than zero"))
    if (pool.get("generation") or 0) < 0:
        errors.append(invalid_value("spec.pool.generation", pool["generation"], "must be greater than or equal to zero"))
    if before is not None:
        immutable(errors, "spec.pool.name", name, (before.get("pool") or {}).get("name"))
        for key in ("driver", "nodeName"):
            immutable(errors, f"spec.{key}", spec.get(key), before.get(key))
    _place(spec, errors)
    devices = spec.get("devices") or []
    _size(devices, _MAX_DEVICES, "spec.devices", errors)
    for index, device in enumerate(devices):
        _device(device, f"spec.devices[{index}]", errors)
    _unique(devices, "name", "spec.devices", errors)


def _pool_name(name: str, path: str, errors: Errors) -> None:
    if not name:
        errors.append(required(path))
    else:
        errors += [invalid_value(path, part, message) for part in name.split("/") for message in dns_subdomain(part)]


def _place(spec: Object, errors: Errors) -> None:
    chosen = []
    for key in _PLACES:
        value, path = spec.get(key), f"spec.{key}"
        if value is None:
            continue
        if key == "nodeSelector":
            validate_node_selector(value, path, errors)
            terms = value.get("nodeSelectorTerms") or []
            if len(terms) != 1:
                errors.append(invalid_value(f"{path}.nodeSelectorTerms", terms, "must have exactly one node selector term"))
        elif not value:
            wanted = "a non-empty string" if key == "nodeName" else "true"
            errors.append(invalid_value(path, value, f"must be either unset or set to {wanted}"))
            continue
        elif key == "nodeName":
            errors += [invalid_value(path, value, message) for message in dns_subdomain(value)]
        chosen.append(f"`{key}`")
    detail = f"exactly one of {', '.join(f'`{key}`' for key in _PLACES)} is required"
    if not chosen:
        errors.append(required("spec", detail))
    elif len(chosen) > 1:
        errors.append(invalid_value("spec", f"{{{', '.join(chosen)}}}", f"{detail}, but multiple fields are set"))


def _device(device: Object, path: str, errors: Errors) -> None:
    _name(device.get("name") or "", f"{path}.name", errors)
    attributes, capacity = device.get("attributes") or {}, device.get("capacity") or {}
    if len(attributes) + len(capacity) > _MAX_ITEMS:
        detail = f"the total number of attributes and capacities must not exceed {_MAX_ITEMS}"
        errors.append(invalid_value(path, len(attributes) + len(capacity), detail))
    for key, attribute in attributes.items():
        _qualified(key, f"{path}.attributes[{key}]", errors)
        _attribute(attribute, f"{path}.attributes[{key}]", errors)
    for key in capacity:
        _qualified(key, f"{path}.capacity[{key}]", errors)
    taints = device.get("taints") or []
    _size(taints, _MAX_TAINTS, f"{path}.taints", errors)
    for index, taint in enumerate(taints):
        _taint(taint, f"{path}.taints[{index}]", errors)


def _taint(taint: Object, path: str, errors: Errors) -> None:
    key, value, effect = (taint.get(name) or "" for name in ("key", "value", "effect"))
    errors += [invalid_value(f"{path}.key", key, message) for message in label_key_errors(key)]
    if value:
        errors += [invalid_value(f"{path}.value", value, message) for message in label_value_errors(value)]
    if not effect:
        errors.append(required(f"{path}.effect"))
    elif effect not in _EFFECTS:
        errors.append(not_supported(f"{path}.effect", effect, _EFFECTS))


def create_taint_rule(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    chosen, path = spec.get("deviceSelector") or {}, "spec.deviceSelector"
    if chosen.get("deviceClassName") is not None:
        name = chosen["deviceClassName"]
        if not name:
            errors.append(required(f"{path}.deviceClassName"))
        errors += [invalid_value(f"{path}.deviceClassName", name, message) for message in dns_subdomain(name) if name]
    if chosen.get("driver") is not None:
        _driver(chosen["driver"], f"{path}.driver", errors)
    if chosen.get("pool") is not None:
        _pool_name(chosen["pool"], f"{path}.pool", errors)
    if chosen.get("device") is not None:
        _name(chosen["device"], f"{path}.device", errors)
    _selectors(chosen.get("selectors") or [], f"{path}.selectors", errors)
    _taint(spec.get("taint") or {}, "spec.taint", errors)


def _attribute(attribute: Object, path: str, errors: Errors) -> None:
    given = [key for key in ("int", "bool", "string", "version") if attribute.get(key) is not None]
    version = attribute.get("version")
    if len(attribute.get("string") or "") > _MAX_TEXT:
        errors.append(too_long(f"{path}.string", _MAX_TEXT))
    if version is not None and not _VERSION.fullmatch(version):
        detail = "must be a string compatible with semver.org spec 2.0.0"
        errors.append(invalid_value(f"{path}.version", version, detail))
    if len(version or "") > _MAX_TEXT:
        errors.append(too_long(f"{path}.version", _MAX_TEXT))
    if not given:
        errors.append(required(path, "exactly one value must be specified"))
    elif len(given) > 1:
        errors.append(invalid_value(path, attribute, "exactly one value must be specified"))
