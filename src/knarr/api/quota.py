"""What objects count against a ResourceQuota: pure functions shared by admission (charges) and the quota controller (recounts).

Names of quota resources: count/<plural>[.<group>] for every kind; for core kinds also the plain plural; for pods compute
resources, for claims storage (also per storage class), for services node ports and load balancers, for resource claims devices
per device class.

Source: kubernetes pkg/quota/v1/evaluator/core, apiserver pkg/quota/v1.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from knarr.aiokits import clock
from knarr.api import quantity
from knarr.api.podresources import ResourceList, add, pod_total
from knarr.api.types import Object

CREATE, UPDATE = "CREATE", "UPDATE"
_LEGACY_COUNTS = frozenset({"configmaps", "persistentvolumeclaims", "replicationcontrollers", "resourcequotas", "secrets", "services", "pods"})
_POD_RESOURCES = frozenset({
    "pods", "count/pods", "cpu", "memory", "ephemeral-storage", "requests.cpu", "requests.memory", "requests.ephemeral-storage",
    "limits.cpu", "limits.memory", "limits.ephemeral-storage",
})  # fmt: skip
_MUST_SPECIFY = frozenset({"cpu", "memory", "requests.cpu", "requests.memory", "limits.cpu", "limits.memory"})
_CLASS_SUFFIX = ".storageclass.storage.k8s.io/"
DEVICE_SUFFIX = ".deviceclass.resource.k8s.io/devices"
_MOST_DEVICES = 32
"""What a claim for all devices may come to."""
_CLAIM_RESOURCES = ("persistentvolumeclaims", "requests.storage")
_SERVICE_RESOURCES = frozenset({"services", "count/services", "services.nodeports", "services.loadbalancers"})


def count_name(group: str, plural: str) -> str:
    """The object count resource of a kind: count/deployments.apps, count/pods."""
    return f"count/{plural}.{group}" if group else f"count/{plural}"


def is_extended(name: str) -> bool:
    """Whether a resource name is an extended one: qualified, outside kubernetes.io, and no request prefix."""
    domain, slash, _ = name.partition("/")
    return bool(slash) and not domain.endswith("kubernetes.io") and not name.startswith("requests.")


def _is_native(name: str) -> bool:
    return "/" not in name or "kubernetes.io/" in name


def matching_resources(group: str, plural: str, names: Iterable[str]) -> list[str]:
    """Those of the quota's resource names that objects of this kind count against."""
    if group == "" and plural == "pods":
        return [
            name for name in names
            if name in _POD_RESOURCES or name.startswith(("hugepages-", "requests.hugepages-")) or (name.startswith("requests.") and not _is_native(name))
        ]  # fmt: skip
    if group == "" and plural == "services":
        return [name for name in names if name in _SERVICE_RESOURCES]
    if group == "" and plural == "persistentvolumeclaims":
        by_class = tuple(_CLASS_SUFFIX + name for name in _CLAIM_RESOURCES)
        return [name for name in names if name == "count/persistentvolumeclaims" or name in _CLAIM_RESOURCES or name.endswith(by_class)]
    own = {count_name(group, plural)}
    if (group, plural) == ("resource.k8s.io", "resourceclaims"):
        return [name for name in names if name in own or name.endswith(DEVICE_SUFFIX)]
    if group == "" and plural in _LEGACY_COUNTS:
        own.add(plural)
    return [name for name in names if name in own]


def handles(group: str, plural: str, operation: str, subresource: str, new: Object | None, old: Object | None) -> bool:
    """Whether an operation may change what is used."""
    if group == "" and plural == "pods":
        if subresource == "resize":
            return operation == UPDATE
        if subresource:
            return False
        return operation == CREATE or (operation == UPDATE and is_terminating(new or {}) != is_terminating(old or {}))
    if subresource:
        return False
    if (group, plural) in (("", "services"), ("", "persistentvolumeclaims"), ("resource.k8s.io", "resourceclaims")):
        return operation in (CREATE, UPDATE)
    return operation == CREATE


# -- usage -----------------------------------------------------------------------------------------------------------------
def usage(group: str, plural: str, obj: Object, *, now: float | None = None) -> ResourceList:
    """What one object uses.

    Args:
      now: Epoch seconds, for pods whose grace period may be over; None means the present.
    """
    if group == "" and plural == "pods":
        return _pod_usage(obj, clock.now() if now is None else now)
    if group == "" and plural == "services":
        return _service_usage(obj)
    if group == "" and plural == "persistentvolumeclaims":
        return _claim_usage(obj)
    out: ResourceList = {count_name(group, plural): "1"}
    if group == "" and plural in _LEGACY_COUNTS:
        out[plural] = "1"
    if (group, plural) == ("resource.k8s.io", "resourceclaims"):
        out.update({name: str(number) for name, number in devices(obj).items()})
    return out


def devices(claim: Object) -> dict[str, int]:
    """Devices that a ResourceClaim may come to hold, by quota resource; of alternatives the worst per class."""
    found: dict[str, int] = {}
    for request in ((claim.get("spec") or {}).get("devices") or {}).get("requests") or ():
        worst: dict[str, int] = {}
        for wanted in request.get("firstAvailable") or [request.get("exactly") or {}]:
            name = (wanted.get("deviceClassName") or "") + DEVICE_SUFFIX
            mode = wanted.get("allocationMode")
            number = _MOST_DEVICES if mode == "All" else wanted.get("count") or 0 if mode == "ExactCount" else 0
            worst[name] = max(worst.get(name, 0), number)
        for name, number in worst.items():
            found[name] = found.get(name, 0) + number
    found.pop(DEVICE_SUFFIX, None)
    return found


def _pod_usage(pod: Object, now: float) -> ResourceList:
    out: ResourceList = {"count/pods": "1"}
    if not _counts(pod, now):
        return out
    add(out, _compute(pod_total(pod, "requests", use_status=True), pod_total(pod, "limits", use_status=True)))
    return out


def _counts(pod: Object, now: float) -> bool:
    """Finished pods, and deleted ones whose grace period is over, use nothing but their place in the store."""
    if (pod.get("status") or {}).get("phase") in ("Failed", "Succeeded"):
        return False
    metadata = pod.get("metadata") or {}
    deleted, grace = metadata.get("deletionTimestamp"), metadata.get("deletionGracePeriodSeconds")
    return not (deleted and grace is not None and now > clock.parse_rfc3339(deleted) + grace)


def _compute(requests: Mapping[str, str], limits: Mapping[str, str]) -> ResourceList:
    out: ResourceList = {"pods": "1"}
    for name in ("cpu", "memory", "ephemeral-storage"):
        if name in requests:
            out[name] = out[f"requests.{name}"] = requests[name]
        if name in limits:
            out[f"limits.{name}"] = limits[name]
    for name, amount in requests.items():
        if name.startswith("hugepages-"):
            out[name] = out[f"requests.{name}"] = amount
        if is_extended(name):
            out[f"requests.{name}"] = amount
    return out


def _service_usage(service: Object) -> ResourceList:
    spec = service.get("spec") or {}
    ports = spec.get("ports") or []
    out: ResourceList = {"count/services": "1", "services": "1", "services.loadbalancers": "0", "services.nodeports": "0"}
    kind = spec.get("type")
    if kind == "NodePort":
        out["services.nodeports"] = str(len(ports))
    elif kind == "LoadBalancer":
        # Node ports are allocated later than this is asked: the intent counts.
        suppressed = spec.get("allocateLoadBalancerNodePorts") is False
        out["services.nodeports"] = str(sum(1 for port in ports if port.get("nodePort")) if suppressed else len(ports))
        out["services.loadbalancers"] = "1"
    return out


def _claim_usage(claim: Object) -> ResourceList:
    spec = claim.get("spec") or {}
    annotations = (claim.get("metadata") or {}).get("annotations") or {}
    storage_class = annotations.get("volume.beta.kubernetes.io/storage-class") or spec.get("storageClassName") or ""
    out: ResourceList = {"persistentvolumeclaims": "1", "count/persistentvolumeclaims": "1"}
    if storage_class:
        out[f"{storage_class}{_CLASS_SUFFIX}persistentvolumeclaims"] = "1"
    requested = ((spec.get("resources") or {}).get("requests") or {}).get("storage")
    if requested is not None:
        allocated = ((claim.get("status") or {}).get("allocatedResources") or {}).get("storage")
        if allocated is not None and quantity.compare(allocated, requested) > 0:
            requested = allocated
        parsed = quantity.parse(requested)
        if parsed.denominator != 1:
            requested = quantity.format(quantity.value(requested), quantity.format_of(requested))
        out["requests.storage"] = requested
        if storage_class:
            out[f"{storage_class}{_CLASS_SUFFIX}requests.storage"] = requested
    return out


# -- scopes ------------------------------------------------------------------------------------------------------------------
def is_terminating(pod: Object) -> bool:
    deadline = (pod.get("spec") or {}).get("activeDeadlineSeconds")
    return deadline is not None and deadline >= 0


def _is_best_effort(pod: Object) -> bool:
    spec = pod.get("spec") or {}
    holders = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ()), spec]
    for holder in holders:
        resources = holder.get("resources") or {}
        for kind in ("requests", "limits"):
            if any(name in ("cpu", "memory") and quantity.parse(amount) > 0 for name, amount in (resources.get(kind) or {}).items()):
                return False
    return True


def _crosses_namespaces(pod: Object) -> bool:
    affinity = (pod.get("spec") or {}).get("affinity") or {}
    for kind in ("podAffinity", "podAntiAffinity"):
        rules = affinity.get(kind) or {}
        terms = list(rules.get("requiredDuringSchedulingIgnoredDuringExecution") or ())
        terms += [one.get("podAffinityTerm") or {} for one in rules.get("preferredDuringSchedulingIgnoredDuringExecution") or ()]
        if any(term.get("namespaces") or term.get("namespaceSelector") is not None for term in terms):
            return True
    return False


def _selects(selector: Object, value: str | None) -> bool:
    """Match one optional value against a scope selector's operator."""
    operator, values = selector.get("operator"), selector.get("values") or []
    if operator == "In":
        return value is not None and value in values
    if operator == "NotIn":
        return value is None or value not in values
    return (value is not None) == (operator != "DoesNotExist")


def matches_scope(plural: str, obj: Object, selector: Object) -> bool:
    """Whether an object falls under one scope; only pods and claims have scopes."""
    scope = selector.get("scopeName")
    if plural == "pods":
        if scope == "Terminating":
            return is_terminating(obj)
        if scope == "NotTerminating":
            return not is_terminating(obj)
        if scope == "BestEffort":
            return _is_best_effort(obj)
        if scope == "NotBestEffort":
            return not _is_best_effort(obj)
        if scope == "PriorityClass":
            return _selects(selector, (obj.get("spec") or {}).get("priorityClassName") or None)
        if scope == "CrossNamespacePodAffinity":
            return _crosses_namespaces(obj)
    if plural == "persistentvolumeclaims" and scope == "VolumeAttributesClass":
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        names = {spec.get("volumeAttributesClassName"), status.get("currentVolumeAttributesClassName")}
        names |= {(status.get("modifyVolumeStatus") or {}).get("targetVolumeAttributesClassName")}
        found = [name for name in names if name]
        return any(_selects(selector, name) for name in found) if found else _selects(selector, None)
    return False


def scopes_of(quota: Object) -> list[Object]:
    """All scopes of a quota as selectors."""
    spec = quota.get("spec") or {}
    out: list[Object] = [{"scopeName": name, "operator": "Exists"} for name in spec.get("scopes") or ()]
    return out + list((spec.get("scopeSelector") or {}).get("matchExpressions") or ())


def matches(quota: Object, group: str, plural: str, obj: Object, hard: Mapping[str, Any]) -> bool:
    """Whether a quota with these hard limits has anything to say about an object."""
    if not matching_resources(group, plural, hard):
        return False
    return all(matches_scope(plural if not group else "", obj, selector) for selector in scopes_of(quota))


# -- constraints and sums -----------------------------------------------------------------------------------------------------
def missing_requests(pod: Object, restricted: Iterable[str]) -> str:
    """What containers must specify because a quota restricts it: "must specify limits.cpu for: a,b", or ""."""
    spec = pod.get("spec") or {}
    if (spec.get("resources") or {}).get("requests") or (spec.get("resources") or {}).get("limits"):
        return ""
    wanted = _MUST_SPECIFY.intersection(restricted)
    missing: dict[str, list[str]] = {}
    for container in [*(spec.get("containers") or ()), *(spec.get("initContainers") or ())]:
        resources = container.get("resources") or {}
        has = _compute(resources.get("requests") or {}, resources.get("limits") or {})
        for name in wanted - has.keys():
            missing.setdefault(name, []).append(container.get("name", ""))
    if not missing:
        return ""
    return "must specify " + "; ".join(f"{name} for: {','.join(sorted(set(missing[name])))}" for name in sorted(missing))


def masked(amounts: Mapping[str, str], names: Iterable[str]) -> ResourceList:
    chosen = set(names)
    return {name: amount for name, amount in amounts.items() if name in chosen}


def plus(left: Mapping[str, str], right: Mapping[str, str]) -> ResourceList:
    out = dict(left)
    add(out, right)
    return out


def minus_at_least_zero(left: Mapping[str, str], right: Mapping[str, str]) -> ResourceList:
    """left - right, nothing below zero."""
    out: ResourceList = {}
    for name in {**left, **right}:
        difference = quantity.subtract(left.get(name, "0"), right.get(name, "0"))
        out[name] = difference if quantity.parse(difference) > 0 else "0"
    return out


def exceeded(amounts: Mapping[str, str], hard: Mapping[str, str]) -> list[str]:
    """Names whose amount is above the hard limit."""
    return [name for name, amount in amounts.items() if name in hard and quantity.compare(amount, hard[name]) > 0]


def shown(amounts: Mapping[str, str]) -> str:
    return ",".join(f"{name}={amounts[name]}" for name in sorted(amounts))
