"""What objects use of a quota: requests, limits, storage and counts, by the names that quotas know.

Pure functions over objects in wire form; amounts are Fractions.
Source: pkg/quota/v1/evaluator/core (pods.go, services.go, persistent_volume_claims.go), resource-helper PodRequests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fractions import Fraction

from knarr.aiokits import clock
from knarr.api import quantity
from knarr.api.quota import DEVICE_SUFFIX, devices
from knarr.api.types import Object

Usage = dict[str, Fraction]
ONE = Fraction(1)

_STANDARD = ("cpu", "memory", "ephemeral-storage")
_POD_NAMES = frozenset(
    ["pods", "count/pods", *_STANDARD, *(f"requests.{name}" for name in _STANDARD), *(f"limits.{name}" for name in _STANDARD)]
)
_SERVICE_NAMES = frozenset(["services", "count/services", "services.nodeports", "services.loadbalancers"])
_CLASS = ".storageclass.storage.k8s.io/"
_CLAIM_NAMES = ("persistentvolumeclaims", "requests.storage")
_RESOURCE_CLAIMS = "resourceclaims.resource.k8s.io"
_COUNTED = ("configmaps", "resourcequotas", "replicationcontrollers", "secrets")


def group_resource(name: str) -> str:
    """Which objects a name of a quota is about: "pods", "services", "deployments.apps"…"""
    if name in _SERVICE_NAMES:
        return "services"
    if name in _CLAIM_NAMES or name == "count/persistentvolumeclaims" or any(name.endswith(_CLASS + item) for item in _CLAIM_NAMES):
        return "persistentvolumeclaims"
    if name in _COUNTED:
        return name
    if name in _POD_NAMES or name.startswith(("hugepages-", "requests.")):
        return "pods"
    if name.endswith(DEVICE_SUFFIX):
        return _RESOURCE_CLAIMS
    return name.removeprefix("count/") if name.startswith("count/") else ""


def usage_of(resource: str, obj: Object) -> Usage:
    """What one object uses; `resource` as `group_resource` gives it."""
    if resource == "pods":
        return pod_usage(obj)
    if resource == "services":
        return service_usage(obj)
    if resource == "persistentvolumeclaims":
        return claim_usage(obj)
    usage = {f"count/{resource}": ONE}
    if resource == _RESOURCE_CLAIMS:
        usage.update({name: Fraction(number) for name, number in devices(obj).items()})
    if resource in _COUNTED:
        usage[resource] = ONE
    return usage


# Pods


def _amounts(listed: Mapping[str, str] | None) -> Usage:
    return {name: quantity.parse(value) for name, value in (listed or {}).items()}


def _add(total: Usage, more: Usage) -> None:
    for name, amount in more.items():
        total[name] = total.get(name, Fraction(0)) + amount


def _max(total: Usage, other: Usage) -> None:
    for name, amount in other.items():
        if amount > total.get(name, Fraction(-1)):
            total[name] = amount


def _of_container(container: Object, field: str, statuses: Mapping[str, Object]) -> Usage:
    amounts = _amounts((container.get("resources") or {}).get(field))
    status = statuses.get(container["name"])
    if status is not None and field == "requests":
        # While a resize is on its way, the larger of wanted and actual counts.
        actual = _amounts((status.get("resources") or {}).get("requests"))
        _max(amounts, {name: amount for name, amount in actual.items() if name in amounts})
    return amounts


def pod_resources(pod: Object, field: str) -> Usage:
    """Requests or limits ("requests", "limits") of a whole pod: containers, sidecars, init containers, overhead."""
    spec, status = pod["spec"], pod.get("status") or {}
    statuses = {item["name"]: item for listed in ("containerStatuses", "initContainerStatuses") for item in status.get(listed) or ()}
    total: Usage = {}
    for container in spec.get("containers") or ():
        _add(total, _of_container(container, field, statuses))
    sidecars: Usage = {}
    largest: Usage = {}
    for container in spec.get("initContainers") or ():
        own = _of_container(container, field, statuses)
        if container.get("restartPolicy") == "Always":
            _add(total, own)
            _add(sidecars, own)
            own = dict(sidecars)
        else:
            _add(own, sidecars)
        _max(largest, own)
    _max(total, largest)
    for name, amount in _amounts((spec.get("resources") or {}).get(field)).items():
        total[name] = amount
    for name, amount in _amounts(spec.get("overhead")).items():
        if field == "requests" or name in total:
            _add(total, {name: amount})
    return total


def is_charged(pod: Object) -> bool:
    """Whether a pod still uses its resources: not finished, not overdue with its deletion."""
    if (pod.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
        return False
    meta = pod["metadata"]
    if "deletionTimestamp" in meta and meta.get("deletionGracePeriodSeconds") is not None:
        # The deletion timestamp has the grace period in it; upstream waits for another one.
        return bool(clock.now() <= clock.parse_rfc3339(meta["deletionTimestamp"]) + meta["deletionGracePeriodSeconds"])
    return True


def pod_usage(pod: Object) -> Usage:
    usage: Usage = {"count/pods": ONE}
    if not is_charged(pod):
        return usage
    usage["pods"] = ONE
    requests, limits = pod_resources(pod, "requests"), pod_resources(pod, "limits")
    for name, amount in requests.items():
        if name in _STANDARD or name.startswith("hugepages-"):
            usage[name] = amount
            usage[f"requests.{name}"] = amount
        elif "/" in name and "kubernetes.io/" not in name:
            usage[f"requests.{name}"] = amount
    for name, amount in limits.items():
        if name in _STANDARD:
            usage[f"limits.{name}"] = amount
    return usage


# Services and claims


def service_usage(service: Object) -> Usage:
    spec = service.get("spec") or {}
    ports = spec.get("ports") or ()
    type = spec.get("type") or "ClusterIP"
    node_ports = 0
    if type == "NodePort":
        node_ports = len(ports)
    elif type == "LoadBalancer":
        allocates = spec.get("allocateLoadBalancerNodePorts") is not False
        node_ports = len(ports) if allocates else sum(1 for port in ports if port.get("nodePort"))
    return {
        "count/services": ONE,
        "services": ONE,
        "services.loadbalancers": Fraction(int(type == "LoadBalancer")),
        "services.nodeports": Fraction(node_ports),
    }


def claim_class(claim: Object) -> str:
    """The storage class of a claim, "" without one."""
    annotations = claim["metadata"].get("annotations") or {}
    old = annotations.get("volume.beta.kubernetes.io/storage-class")
    return str(old if old is not None else claim["spec"].get("storageClassName") or "")


def claim_usage(claim: Object) -> Usage:
    usage: Usage = {"persistentvolumeclaims": ONE, "count/persistentvolumeclaims": ONE}
    name = claim_class(claim)
    if name:
        usage[f"{name}{_CLASS}persistentvolumeclaims"] = ONE
    asked = ((claim["spec"].get("resources") or {}).get("requests") or {}).get("storage")
    if asked is not None:
        amount = Fraction(quantity.value(asked))
        allocated = ((claim.get("status") or {}).get("allocatedResources") or {}).get("storage")
        if allocated is not None:
            amount = max(amount, Fraction(quantity.value(allocated)))
        usage["requests.storage"] = amount
        if name:
            usage[f"{name}{_CLASS}requests.storage"] = amount
    return usage


# Scopes


def matches_scopes(quota: Object, resource: str, obj: Object) -> bool:
    """Whether an object is within all scopes of a quota; quotas with scopes are about pods (and classes of claims)."""
    spec = quota["spec"]
    requirements: list[Object] = [{"scopeName": name, "operator": "Exists"} for name in spec.get("scopes") or ()]
    requirements += (spec.get("scopeSelector") or {}).get("matchExpressions") or []
    if not requirements:
        return True
    if resource == "pods":
        return all(_pod_in_scope(item, obj) for item in requirements)
    if resource == "persistentvolumeclaims":
        return all(_claim_in_scope(item, obj) for item in requirements)
    return False


def frees(item: Object, resource: str, old: Object, new: Object) -> bool:
    """Whether an object uses less of a quota than before.

    Source: pkg/quota/v1/install/update_filter.go.
    """
    before = usage_of(resource, old) if matches_scopes(item, resource, old) else {}
    after = usage_of(resource, new) if matches_scopes(item, resource, new) else {}
    return any(amount > after.get(name, 0) for name, amount in before.items())


def _pod_in_scope(requirement: Object, pod: Object) -> bool:
    scope = requirement["scopeName"]
    spec = pod["spec"]
    if scope in ("Terminating", "NotTerminating"):
        deadline = spec.get("activeDeadlineSeconds")
        return bool(deadline is not None and deadline >= 0) == bool(scope == "Terminating")
    if scope in ("BestEffort", "NotBestEffort"):
        return _is_best_effort(spec) == bool(scope == "BestEffort")
    if scope == "PriorityClass":
        return _value_matches(requirement, [spec["priorityClassName"]] if spec.get("priorityClassName") else [])
    return bool(scope == "CrossNamespacePodAffinity") and crosses_namespaces(spec.get("affinity") or {})


def _is_best_effort(spec: Object) -> bool:
    holders = [*(spec.get("containers") or ()), *(spec.get("initContainers") or ()), spec]
    for holder in holders:
        resources = holder.get("resources") or {}
        for field in ("requests", "limits"):
            if any(name in ("cpu", "memory") and quantity.parse(value) > 0 for name, value in (resources.get(field) or {}).items()):
                return False
    return True


def crosses_namespaces(affinity: Object) -> bool:
    """Whether a pod (anti-)affinity names other namespaces."""
    for kind in ("podAffinity", "podAntiAffinity"):
        terms = affinity.get(kind) or {}
        listed = list(terms.get("requiredDuringSchedulingIgnoredDuringExecution") or ())
        listed += [item["podAffinityTerm"] for item in terms.get("preferredDuringSchedulingIgnoredDuringExecution") or ()]
        if any(term.get("namespaces") or term.get("namespaceSelector") is not None for term in listed):
            return True
    return False


def _claim_in_scope(requirement: Object, claim: Object) -> bool:
    if requirement["scopeName"] != "VolumeAttributesClass":
        return False
    status = claim.get("status") or {}
    names = [
        claim["spec"].get("volumeAttributesClassName"),
        status.get("currentVolumeAttributesClassName"),
        (status.get("modifyVolumeStatus") or {}).get("targetVolumeAttributesClassName"),
    ]
    return _value_matches(requirement, [name for name in names if name])


def _value_matches(requirement: Object, values: Iterable[str]) -> bool:
    operator, wanted = requirement["operator"], requirement.get("values") or ()
    present = list(values)
    if operator == "Exists":
        return bool(present)
    if operator == "DoesNotExist":
        return not present
    hit = any(value in wanted for value in present)
    return hit if operator == "In" else not hit


def total_usage(quota: Object, objects: Mapping[str, Iterable[Object]]) -> dict[str, str]:
    """What is used of every name in spec.hard whose objects are given.

    Args:
      objects: by `group_resource`; names about other objects are left out.

    Returns:
      canonical quantities.
    """
    hard = quota["spec"].get("hard") or {}
    totals: Usage = {name: Fraction(0) for name in hard if group_resource(name) in objects}
    for resource, listed in objects.items():
        for obj in listed:
            if matches_scopes(quota, resource, obj):
                for name, amount in usage_of(resource, obj).items():
                    if name in totals:
                        totals[name] += amount
    return {name: _written(name, amount, hard[name]) for name, amount in totals.items()}


def _written(name: str, amount: Fraction, hard: str) -> str:
    binary = name.endswith(("memory", "storage")) or "hugepages-" in name
    return quantity.format(amount, quantity.BINARY_SI if binary and amount else quantity.DECIMAL_SI)
