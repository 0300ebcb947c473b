"""Kinds of the core group without a module of their own: config, accounts, nodes, namespaces, quota, limits, volumes, events.

Source: pkg/apis/core/validation.
"""

from __future__ import annotations

import base64
import posixpath
from fractions import Fraction
from typing import Any

import orjson

from knarr.api import quantity
from knarr.api.errors import FieldError, duplicate, field_forbidden, invalid_value, not_supported, required, too_long
from knarr.api.validation.claims import VOLUME_MODES, validate_access_modes
from knarr.api.validation.metadata import Errors, Object, add, immutable
from knarr.api.validation.quantities import (
    QUOTA_RESOURCES,
    may_overcommit,
    validate_container_resource_name,
    validate_quota_resource_name,
    validate_resource_amount,
    validate_resource_name,
)
from knarr.api.validation.scheduling import validate_effect, validate_node_selector
from knarr.api.validation.service import validate_cidr
from knarr.api.validation.strings import POSITIVE, config_key, dns_subdomain, label_key_errors, label_value_errors
from knarr.api.validation.volumes import ONE_TYPE, SOURCES, driver_name, no_backsteps

MAXIMUM_BYTES = 1024 * 1024


def _raw_size(text: str | None) -> int:
    """Bytes behind canonical base64; null is none."""
    return len(text) * 3 // 4 - text.count("=", -2) if text else 0


def create_config_map(obj: Object, errors: Errors) -> None:
    data, binary, size = obj.get("data") or {}, obj.get("binaryData") or {}, 0
    for key, value in data.items():
        add(errors, f"data[{key}]", key, config_key(key))
        if key in binary:
            errors.append(invalid_value(f"data[{key}]", key, "duplicate of key present in binaryData"))
        size += len(value) if value.isascii() else len(value.encode())
    for key, value in binary.items():
        add(errors, f"binaryData[{key}]", key, config_key(key))
        size += _raw_size(value)
    if size > MAXIMUM_BYTES:
        errors.append(too_long("", MAXIMUM_BYTES))


def _frozen(new: Object, old: Object, keys: tuple[str, ...], errors: Errors) -> None:
    if not old.get("immutable"):
        return
    message = "field is immutable when `immutable` is set"
    if not new.get("immutable"):
        errors.append(field_forbidden("immutable", message))
    for key in keys:
        if (new.get(key) or {}) != (old.get(key) or {}):
            errors.append(field_forbidden(key, message))


def update_config_map(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _frozen(new, old, ("data", "binaryData"), errors)
    create_config_map(new, errors)


_ACCOUNT_NAME = "kubernetes.io/service-account.name"
_NEEDED_KEYS = {
    "kubernetes.io/dockercfg": ".dockercfg",
    "kubernetes.io/dockerconfigjson": ".dockerconfigjson",
}


def _json_object(text: str, path: str, errors: Errors) -> None:
    try:
        value = orjson.loads(base64.b64decode(text) or b"")
    except ValueError as error:
        errors.append(invalid_value(path, "<secret contents redacted>", str(error)))
        return
    if value is not None and not isinstance(value, dict):
        message = "json: cannot unmarshal into Go value of type map[string]interface {}"
        errors.append(invalid_value(path, "<secret contents redacted>", message))


def create_secret(obj: Object, errors: Errors) -> None:
    data, kind, size = obj.get("data") or {}, obj.get("type") or "", 0
    for key, value in data.items():
        add(errors, f"data[{key}]", key, config_key(key))
        size += _raw_size(value)
    if size > MAXIMUM_BYTES:
        errors.append(too_long("data", MAXIMUM_BYTES))
    if kind == "kubernetes.io/service-account-token":
        if not (obj["metadata"].get("annotations") or {}).get(_ACCOUNT_NAME):
            errors.append(required(f"metadata.annotations[{_ACCOUNT_NAME}]"))
    elif kind in _NEEDED_KEYS:
        key = _NEEDED_KEYS[kind]
        if key not in data:
            errors.append(required(f"data[{key}]"))
        else:
            _json_object(data[key], f"data[{key}]", errors)
    elif kind == "kubernetes.io/basic-auth":
        if "username" not in data and "password" not in data:
            errors.extend((required("data[username]"), required("data[password]")))
    elif kind == "kubernetes.io/ssh-auth":
        if not data.get("ssh-privatekey"):
            errors.append(required("data[ssh-privatekey]"))
    elif kind == "kubernetes.io/tls":
        errors.extend(required(f"data[{key}]") for key in ("tls.crt", "tls.key") if key not in data)


def update_secret(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    immutable(errors, "type", new.get("type") or "", old.get("type") or "")
    _frozen(new, old, ("data",), errors)
    create_secret(new, errors)


# Namespaces and nodes.


def _finalizer(name: str, path: str, errors: Errors) -> None:
    add(errors, path, name, label_key_errors(name))
    if "/" not in name and name not in ("kubernetes", "orphan", "foregroundDeletion"):
        errors.append(invalid_value(path, name, "name is neither a standard finalizer name nor is it fully qualified"))


def create_namespace(obj: Object, errors: Errors) -> None:
    for name in (obj.get("spec") or {}).get("finalizers") or ():
        _finalizer(name, "spec.finalizers", errors)


def update_namespace(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "finalize":
        for index, name in enumerate((new.get("spec") or {}).get("finalizers") or ()):
            _finalizer(name, f"spec.finalizers[{index}]", errors)
    elif subresource == "status":
        phase = (new.get("status") or {}).get("phase") or ""
        if "deletionTimestamp" in new["metadata"]:
            if phase != "Terminating":
                errors.append(invalid_value("status.Phase", phase, "may only be 'Terminating' if `deletionTimestamp` is not empty"))
        elif phase != "Active":
            errors.append(invalid_value("status.Phase", phase, "may only be 'Active' if `deletionTimestamp` is empty"))


def _taints(taints: list[Object], errors: Errors) -> None:
    seen: set[tuple[str, str]] = set()
    for index, taint in enumerate(taints):
        path = f"metadata.taints[{index}]"
        key, value, effect = taint.get("key") or "", taint.get("value") or "", taint.get("effect") or ""
        add(errors, f"{path}.key", key, label_key_errors(key))
        found = label_value_errors(value)
        if found:
            errors.append(invalid_value(f"{path}.value", value, ";".join(found)))
        if not effect:
            errors.append(required(f"{path}.effect"))
        else:
            validate_effect(effect, f"{path}.effect", errors)
        if (key, effect) in seen:
            errors.append(FieldError("FieldValueDuplicate", path, "taints must be unique by key and effect pair", taint))
        seen.add((key, effect))


def _node_resources(obj: Object, errors: Errors) -> None:
    for key in ("capacity", "allocatable"):
        for name, text in ((obj.get("status") or {}).get(key) or {}).items():
            validate_resource_amount(name, text, f"status.{key}.{name}", errors)


def create_node(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    _taints(spec.get("taints") or [], errors)
    _node_resources(obj, errors)
    ranges = spec.get("podCIDRs") or []
    for index, value in enumerate(ranges):
        validate_cidr(value, f"spec.podCIDRs[{index}]", errors)
    if len(ranges) > 1 and (len(ranges) > 2 or len({":" in value for value in ranges}) < 2):
        errors.append(invalid_value("spec.podCIDRs", ranges, "may specify no more than one CIDR for each IP family"))


def update_node(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _node_resources(new, errors)
    addresses = (new.get("status") or {}).get("addresses") or []
    for index, address in enumerate(addresses):
        if address in addresses[:index]:
            errors.append(duplicate(f"status.addresses[{index}]", address))
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    message = 'node updates may not change podCIDR except from "" to valid'
    old_ranges, ranges = before.get("podCIDRs") or [], spec.get("podCIDRs") or []
    if old_ranges:
        if len(old_ranges) != len(ranges):
            errors.append(field_forbidden("spec.podCIDRs", message))
        else:
            errors.extend(field_forbidden("spec.podCIDRs", message) for a, b in zip(old_ranges, ranges, strict=True) if a != b)
    if before.get("providerID") and spec.get("providerID") != before["providerID"]:
        errors.append(field_forbidden("spec.providerID", 'node updates may not change providerID except from "" to valid'))
    _taints(spec.get("taints") or [], errors)
    if spec.get("externalID") != before.get("externalID"):
        errors.append(field_forbidden("spec.externalID", "may not be updated"))


# Quota and limits.

_SCOPES = frozenset(
    {"Terminating", "NotTerminating", "BestEffort", "NotBestEffort", "PriorityClass", "CrossNamespacePodAffinity", "VolumeAttributesClass"}
)
_POD_QUOTA = frozenset(
    {
        "pods", "cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory", "ephemeral-storage",
        "requests.ephemeral-storage", "limits.ephemeral-storage",
    }
)  # fmt: skip
_CLAIM_QUOTA = frozenset({"persistentvolumeclaims", "requests.storage"})


def _scope_fits(scope: str, name: str) -> bool:
    if scope in ("Terminating", "NotTerminating", "NotBestEffort", "PriorityClass", "CrossNamespacePodAffinity"):
        return name in _POD_QUOTA or "hugepages-" in name
    if scope == "BestEffort":
        return name == "pods"
    return name in _CLAIM_QUOTA if scope == "VolumeAttributesClass" else True


def _hard(amounts: Object, path: str, errors: Errors) -> None:
    for name, text in amounts.items():
        validate_quota_resource_name(name, f"{path}[{name}]", errors)
        validate_resource_amount(name, text, f"{path}[{name}]", errors)


def _conflicting(scopes: set[str], shown: Any, path: str, errors: Errors) -> None:
    for pair in ({"BestEffort", "NotBestEffort"}, {"Terminating", "NotTerminating"}):
        if pair <= scopes:
            errors.append(invalid_value(path, shown, "conflicting scopes"))


def _standard(names: Object) -> list[str]:
    return [n for n in sorted(names) if n in QUOTA_RESOURCES or n.startswith(("hugepages-", "requests.hugepages-"))]


def _quota_spec(spec: Object, errors: Errors) -> None:
    hard, scopes = spec.get("hard") or {}, spec.get("scopes") or []
    _hard(hard, "spec.hard", errors)
    for scope in scopes:
        if scope not in _SCOPES:
            errors.append(invalid_value("spec.scopes", scopes, "unsupported scope"))
        for name in _standard(hard):
            if not _scope_fits(scope, name):
                errors.append(invalid_value("spec.scopes", scopes, "unsupported scope applied to resource"))
    _conflicting(set(scopes), scopes, "spec.scopes", errors)
    selector = spec.get("scopeSelector")
    if selector is not None:
        _scope_selector(selector, hard, scopes, errors)


def _scope_selector(selector: Object, hard: Object, scopes: list[str], errors: Errors) -> None:
    path, seen = "spec.scopeSelector.matchExpressions", set()
    for item in selector.get("matchExpressions") or ():
        scope, operator, values = item.get("scopeName") or "", item.get("operator") or "", item.get("values") or []
        if scope not in _SCOPES:
            errors.append(invalid_value(f"{path}.scopeName", scope, "unsupported scope"))
        for name in _standard(hard):
            if not _scope_fits(scope, name):
                errors.append(invalid_value(path, selector, "unsupported scope applied to resource"))
        if scope in _SCOPES - {"PriorityClass", "VolumeAttributesClass"} and operator != "Exists":
            message = (
                "must be 'Exists' when scope is any of ResourceQuotaScopeTerminating, ResourceQuotaScopeNotTerminating, "
                "ResourceQuotaScopeBestEffort, ResourceQuotaScopeNotBestEffort or ResourceQuotaScopeCrossNamespacePodAffinity"
            )
            errors.append(invalid_value(f"{path}.operator", operator, message))
        if operator in ("In", "NotIn"):
            if not values:
                errors.append(
                    required(f"{path}.values", "must be at least one value when `operator` is 'In' or 'NotIn' for scope selector")
                )
        elif operator in ("Exists", "DoesNotExist"):
            if values:
                message = "must be no value when `operator` is 'Exist' or 'DoesNotExist' for scope selector"
                errors.append(invalid_value(f"{path}.values", values, message))
        else:
            errors.append(invalid_value(f"{path}.operator", operator, "not a valid selector operator"))
        seen.add(scope)
    _conflicting(seen, scopes, path, errors)


def create_resource_quota(obj: Object, errors: Errors) -> None:
    _quota_spec(obj.get("spec") or {}, errors)
    for key in ("hard", "used"):
        _hard((obj.get("status") or {}).get(key) or {}, f"status.{key}", errors)


def update_resource_quota(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        for key in ("hard", "used"):
            _hard((new.get("status") or {}).get(key) or {}, f"status.{key}", errors)
        return
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    _quota_spec(spec, errors)
    if set(spec.get("scopes") or ()) != set(before.get("scopes") or ()):
        errors.append(invalid_value("spec.scopes", spec.get("scopes"), "field is immutable"))


def _limit_name(kind: str, name: str, path: str, errors: Errors) -> None:
    if kind in ("Pod", "Container"):
        validate_container_resource_name(name, path, errors)
    else:
        validate_resource_name(name, path, errors)


def create_limit_range(obj: Object, errors: Errors) -> None:
    kinds: set[str] = set()
    for index, limit in enumerate((obj.get("spec") or {}).get("limits") or ()):
        path, kind = f"spec.limits[{index}]", limit.get("type") or ""
        found = label_key_errors(kind)
        add(errors, f"{path}.type", kind, found)
        if not found and "/" not in kind and kind not in ("Pod", "Container", "PersistentVolumeClaim"):
            errors.append(invalid_value(f"{path}.type", kind, "must be a standard limit type or fully qualified"))
        if kind in kinds:
            errors.append(duplicate(f"{path}.type", kind))
        kinds.add(kind)
        _limit(limit, kind, path, errors)


def _limit(limit: Object, kind: str, path: str, errors: Errors) -> None:
    given: dict[str, dict[str, Any]] = {
        key: limit.get(key) or {} for key in ("max", "min", "default", "defaultRequest", "maxLimitRequestRatio")
    }
    names: list[str] = []
    for key, amounts in given.items():
        if (
            key == "maxLimitRequestRatio"
            and kind == "PersistentVolumeClaim"
            and "storage" not in given["min"]
            and "storage" not in given["max"]
        ):
            message = "either minimum or maximum storage value is required, but neither was provided"
            errors.append(required(f"{path}.limits", message))
        if kind == "Pod" and key in ("default", "defaultRequest"):
            if amounts:
                errors.append(field_forbidden(f"{path}.{key}", "may not be specified when `type` is 'Pod'"))
            given[key] = {}
            continue
        for name in amounts:
            _limit_name(kind, name, f"{path}.{key}[{name}]", errors)
            if name not in names:
                names.append(name)
    for name in names:
        _limit_order(name, {key: amounts[name] for key, amounts in given.items() if name in amounts}, path, errors)


_ORDERS = (
    ("min", "max", "min", "min value {} is greater than max value {}", 0),
    ("min", "defaultRequest", "defaultRequest", "min value {} is greater than default request value {}", 1),
    ("defaultRequest", "max", "defaultRequest", "default request value {} is greater than max value {}", 0),
    ("defaultRequest", "default", "defaultRequest", "default request value {} is greater than default limit value {}", 0),
    ("min", "default", "default", "min value {} is greater than default value {}", 0),
    ("default", "max", "default", "default value {} is greater than max value {}", 1),
)


def _limit_order(name: str, amounts: dict[str, Any], path: str, errors: Errors) -> None:
    for left, right, where, message, shown in _ORDERS:
        if left in amounts and right in amounts and quantity.compare(amounts[left], amounts[right]) > 0:
            pair = (amounts[left], amounts[right])
            errors.append(invalid_value(f"{path}.{where}[{name}]", pair[shown], message.format(*pair)))
    ratio = amounts.get("maxLimitRequestRatio")
    if ratio is not None:
        own = f"{path}.maxLimitRequestRatio[{name}]"
        if quantity.parse(ratio) < 1:
            errors.append(invalid_value(own, ratio, f"ratio {ratio} is less than 1"))
        if "min" in amounts and "max" in amounts:
            least = quantity.parse(amounts["min"])
            limit = quantity.parse(amounts["max"]) / least if least else None
            if limit is not None and quantity.parse(ratio) > limit:
                errors.append(invalid_value(own, ratio, f"ratio {ratio} is greater than max/min = {float(Fraction(limit)):f}"))
    default, request = amounts.get("default"), amounts.get("defaultRequest")
    if not may_overcommit(name) and default is not None and request is not None and quantity.compare(default, request):
        message = f"default value {default} must equal to defaultRequest value {request} in {name}"
        errors.append(invalid_value(f"{path}.defaultRequest[{name}]", request, message))


# Volumes.


def _local(source: Object, path: str, errors: Errors) -> None:
    target = source.get("path") or ""
    if not target:
        errors.append(required(f"{path}.path"))
        return
    no_backsteps(target, f"{path}.path", errors)


def _secret_ref(reference: Object | None, path: str, errors: Errors) -> None:
    if reference is not None:
        errors.extend(required(f"{path}.{key}") for key in ("name", "namespace") if not reference.get(key))


def _csi(source: Object, path: str, errors: Errors) -> None:
    driver_name(source.get("driver") or "", f"{path}.driver", errors)
    if not source.get("volumeHandle"):
        errors.append(required(f"{path}.volumeHandle"))
    for key in ("controllerPublishSecretRef", "controllerExpandSecretRef", "nodePublishSecretRef", "nodeExpandSecretRef"):
        _secret_ref(source.get(key), f"{path}.{key}", errors)


def _named_secret(*keys: str) -> Any:
    def check(source: Object, path: str, errors: Errors) -> None:
        errors.extend(required(f"{path}.{key}") for key in keys if not source.get(key))

    return check


_VOLUME_SOURCES: dict[str, Any] = {
    **{
        kind: SOURCES[kind]
        for kind in (
            "hostPath", "gcePersistentDisk", "awsElasticBlockStore", "glusterfs", "flocker", "nfs", "rbd", "quobyte", "cephfs",
            "iscsi", "cinder", "fc", "flexVolume", "azureFile", "vsphereVolume", "photonPersistentDisk", "portworxVolume",
            "azureDisk", "scaleIO",
        )
    },
    "local": _local,
    "storageos": _named_secret(),
    "csi": _csi,
}  # fmt: skip


def validate_volume_spec(spec: Object, path: str, errors: Errors) -> None:
    """The spec of a PersistentVolume."""
    if not spec.get("accessModes"):
        errors.append(required(f"{path}.accessModes"))
    validate_access_modes(spec.get("accessModes") or [], f"{path}.accessModes", errors)
    capacity = spec.get("capacity") or {}
    if not capacity:
        errors.append(required(f"{path}.capacity"))
    if "storage" not in capacity or len(capacity) > 1:
        errors.append(not_supported(f"{path}.capacity", capacity, ["storage"]))
    for name, text in capacity.items():
        own, amount = f"{path}.capacity[{name}]", quantity.parse(text)
        if quantity.value(text) < 0:
            errors.append(invalid_value(own, quantity.value(text), "must be a valid resource quantity"))
        if amount <= 0:
            errors.append(invalid_value(own, str(text), POSITIVE))
    policy = spec.get("persistentVolumeReclaimPolicy")
    if policy and policy not in ("Delete", "Recycle", "Retain"):
        errors.append(not_supported(f"{path}.persistentVolumeReclaimPolicy", policy, ["Delete", "Recycle", "Retain"]))
    affinity = spec.get("nodeAffinity")
    if affinity is not None:
        if affinity.get("required") is None:
            errors.append(required(f"{path}.nodeAffinity.required", "must specify required node constraints"))
        else:
            validate_node_selector(affinity["required"], f"{path}.nodeAffinity.required", errors)
    _volume_source(spec, path, errors)
    if policy == "Recycle" and posixpath.normpath((spec.get("hostPath") or {}).get("path") or "-") == "/":
        message = "may not be 'recycle' for a hostPath mount of '/'"
        errors.append(field_forbidden(f"{path}.persistentVolumeReclaimPolicy", message))
    if spec.get("storageClassName"):
        add(errors, f"{path}.storageClassName", spec["storageClassName"], dns_subdomain(spec["storageClassName"]))
    mode = spec.get("volumeMode")
    if mode is not None and mode not in VOLUME_MODES:
        errors.append(not_supported(f"{path}.volumeMode", mode, VOLUME_MODES))
    attributes = spec.get("volumeAttributesClassName")
    if attributes is not None:
        if not attributes:
            errors.append(required(f"{path}.volumeAttributesClassName", "an empty string is disallowed"))
        else:
            add(errors, f"{path}.volumeAttributesClassName", attributes, dns_subdomain(attributes))
        if spec.get("csi") is None:
            errors.append(required(f"{path}.csi", "has to be specified when using volumeAttributesClassName"))


def _volume_source(spec: Object, path: str, errors: Errors) -> None:
    given = [kind for kind in _VOLUME_SOURCES if spec.get(kind) is not None]
    if not given:
        errors.append(required(path, "must specify a volume type"))
        return
    _VOLUME_SOURCES[given[0]](spec[given[0]], f"{path}.{given[0]}", errors)
    errors.extend(field_forbidden(f"{path}.{kind}", ONE_TYPE) for kind in given[1:])
    if given[0] == "local" and spec.get("nodeAffinity") is None:
        errors.append(required(f"{path}.nodeAffinity", "Local volume requires node affinity"))


def create_volume(obj: Object, errors: Errors) -> None:
    validate_volume_spec(obj.get("spec") or {}, "spec", errors)


def update_volume(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource == "status":
        return
    create_volume(new, errors)
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    after = {kind: spec.get(kind) for kind in _VOLUME_SOURCES}
    if before.get("csi") is not None and before["csi"].get("controllerExpandSecretRef") is None and after.get("csi") is not None:
        after["csi"] = {key: value for key, value in spec["csi"].items() if key != "controllerExpandSecretRef"}
    if after != {kind: before.get(kind) for kind in _VOLUME_SOURCES}:
        errors.append(field_forbidden("spec.persistentvolumesource", "spec.persistentvolumesource is immutable after creation"))
    immutable(errors, "volumeMode", spec.get("volumeMode"), before.get("volumeMode"))
    if before.get("nodeAffinity") is not None:
        immutable(errors, "nodeAffinity", spec.get("nodeAffinity"), before["nodeAffinity"])
    if before.get("volumeAttributesClassName") is not None and spec.get("volumeAttributesClassName") is None:
        errors.append(field_forbidden("spec.volumeAttributesClassName", "update from non-nil value to nil is forbidden"))
