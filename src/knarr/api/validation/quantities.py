"""Resource names, quantities and resource requirements of containers and pods.

Source: pkg/apis/core/validation validateResourceRequirements, core/helper resource names.
"""

from __future__ import annotations

from typing import Any

from knarr.api import quantity
from knarr.api.errors import FieldError, duplicate, field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object, add
from knarr.api.validation.strings import NEGATIVE, dns_label, label_key_errors

CONTAINER_RESOURCES = frozenset({"cpu", "memory", "ephemeral-storage"})
QUOTA_RESOURCES = frozenset(
    {
        "cpu", "memory", "ephemeral-storage", "requests.cpu", "requests.memory", "requests.storage", "requests.ephemeral-storage",
        "limits.cpu", "limits.memory", "limits.ephemeral-storage", "pods", "resourcequotas", "services", "replicationcontrollers",
        "secrets", "persistentvolumeclaims", "configmaps", "services.nodeports", "services.loadbalancers",
    }
)  # fmt: skip
STANDARD_RESOURCES = QUOTA_RESOURCES | {"storage"}
INTEGER_RESOURCES = frozenset(
    {
        "pods", "resourcequotas", "services", "replicationcontrollers", "secrets", "configmaps", "persistentvolumeclaims",
        "services.nodeports", "services.loadbalancers",
    }
)  # fmt: skip
NOT_INTEGER = "must be an integer"


def is_huge_page(name: str) -> bool:
    return name.startswith("hugepages-")


def is_native(name: str) -> bool:
    return "/" not in name or "kubernetes.io/" in name


def is_extended(name: str) -> bool:
    return not is_native(name) and not name.startswith("requests.") and not label_key_errors(f"requests.{name}")


def may_overcommit(name: str) -> bool:
    return is_native(name) and not is_huge_page(name)


def validate_resource_name(name: str, path: str, errors: Errors) -> bool:
    """The rule of all resource names; whether it held."""
    found = label_key_errors(name)
    if found:
        add(errors, path, name, found)
        return False
    if "/" not in name and name not in STANDARD_RESOURCES and not is_huge_page(name):
        errors.append(invalid_value(path, name, "must be a standard resource type or fully qualified"))
        return False
    return True


def validate_container_resource_name(name: str, path: str, errors: Errors) -> None:
    if name in CONTAINER_RESOURCES:
        return
    validate_resource_name(name, path, errors)
    if "/" not in name:
        if not is_huge_page(name):
            errors.append(invalid_value(path, name, "must be a standard resource for containers"))
    elif not is_native(name) and not is_extended(name):
        errors.append(invalid_value(path, name, "doesn't follow extended resource name standard"))


def validate_pod_resource_name(name: str, path: str, errors: Errors) -> None:
    if validate_resource_name(name, path, errors) and name not in ("cpu", "memory") and not is_huge_page(name):
        errors.append(not_supported(path, name, ["cpu", "hugepages-", "memory"]))


def validate_quota_resource_name(name: str, path: str, errors: Errors) -> None:
    validate_resource_name(name, path, errors)
    if "/" not in name and name not in QUOTA_RESOURCES and not name.startswith(("hugepages-", "requests.hugepages-")):
        errors.append(invalid_value(path, name, "must be a standard resource for quota"))


def nonnegative_quantity(text: Any, path: str, errors: Errors) -> bool:
    if quantity.parse(text) < 0:
        errors.append(invalid_value(path, str(text), NEGATIVE))
        return False
    return True


def validate_resource_amount(name: str, text: Any, path: str, errors: Errors) -> None:
    """A quantity is not negative, and whole where the resource is counted."""
    nonnegative_quantity(text, path, errors)
    if (name in INTEGER_RESOURCES or is_extended(name)) and quantity.parse(text).denominator != 1:
        errors.append(invalid_value(path, str(text), NOT_INTEGER))


def _huge_page_amount(name: str, text: Any, path: str, errors: Errors) -> None:
    try:
        size = quantity.value(name[len("hugepages-") :])
    except ValueError:
        size = 0
    amount = quantity.parse(text)
    if size <= 0 or amount < 0 or amount % size:
        errors.append(invalid_value(path, str(text), f"{text} is not positive integer multiple of {name}"))


def validate_requirements(requirements: Object, claims: frozenset[str], path: str, errors: Errors, *, of_pod: bool = False) -> None:
    """ResourceRequirements of a container (or, with `of_pod`, of a pod)."""
    limits, requests = requirements.get("limits") or {}, requirements.get("requests") or {}
    name_rule = validate_pod_resource_name if of_pod else validate_container_resource_name
    has_base = has_huge = False
    for name, text in limits.items():
        own = f"{path}.limits[{name}]"
        name_rule(name, own, errors)
        validate_resource_amount(name, text, own, errors)
        if is_huge_page(name):
            has_huge = True
            _huge_page_amount(name, text, own, errors)
        has_base = has_base or name in ("cpu", "memory")
    for name, text in requests.items():
        own = f"{path}.requests[{name}]"
        name_rule(name, own, errors)
        validate_resource_amount(name, text, own, errors)
        if name in limits:
            order = quantity.compare(text, limits[name])
            if order and not may_overcommit(name):
                errors.append(invalid_value(f"{path}.requests", str(text), f"must be equal to {name} limit of {limits[name]}"))
            elif order > 0:
                message = f"must be less than or equal to {name} limit of {limits[name]}"
                errors.append(invalid_value(f"{path}.requests", str(text), message))
        elif not may_overcommit(name):
            errors.append(required(f"{path}.limits", "Limit must be set for non overcommitable resources"))
        if is_huge_page(name):
            has_huge = True
            _huge_page_amount(name, text, own, errors)
        has_base = has_base or name in ("cpu", "memory")
    if has_huge and not has_base:
        errors.append(field_forbidden(path, "HugePages require cpu or memory"))
    if requirements.get("claims"):
        _claims(requirements["claims"], claims, f"{path}.claims", errors)


def _claims(claims: list[Object], known: frozenset[str], path: str, errors: Errors) -> None:
    names: set[str] = set()
    for index, claim in enumerate(claims):
        own, name, request = f"{path}[{index}]", claim.get("name") or "", claim.get("request") or ""
        if not name:
            errors.append(required(own))
            continue
        if name in names:
            errors.append(duplicate(own, name))
        else:
            key = name
            if request:
                add(errors, f"{own}.request", request, dns_label(request))
                key = f"{name}/{request}"
            if key in names:
                errors.append(duplicate(own, key))
            elif not request:
                errors.extend(duplicate(own, name) for other in names if other.startswith(f"{name}/"))
            names.add(key)
        if name not in known:
            detail = "must be one of the names in pod.spec.resourceClaims"
            detail += f": {', '.join(sorted(known))}" if known else " which is empty"
            errors.append(FieldError("FieldValueNotFound", own, detail, name))
