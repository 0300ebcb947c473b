"""LimitRanger: defaults, minima, maxima and ratios of resources in a namespace.

Source: kubernetes plugin/pkg/admission/limitranger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from knarr.api import quantity
from knarr.api.podresources import pod_total
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store

_ANNOTATION = "kubernetes.io/limit-ranger"
Amounts = Mapping[str, str]


class LimitRanger(Plugin):
    name = "LimitRanger"

    def __init__(self, limit_ranges: Store) -> None:
        self._ranges = limit_ranges
        self._known: tuple[int, dict[str, list[Object]]] = (-1, {})

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        if is_resource(resource, "", "pods"):
            return (operation == CREATE and not subresource) or (operation == UPDATE and subresource == "resize")
        return is_resource(resource, "", "persistentvolumeclaims") and not subresource and operation in (CREATE, UPDATE)

    def sources(self) -> tuple[Store, ...]:
        return (self._ranges,)

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        return bool(self._by_namespace())

    def _by_namespace(self) -> dict[str, list[Object]]:
        generation = self._ranges.generation
        if self._known[0] != generation:
            found: dict[str, list[Object]] = {}
            for one in self._ranges.list_nowait():
                found.setdefault(one["metadata"]["namespace"], []).append(one)
            self._known = (generation, found)
        return self._known[1]

    def _limits(self, request: AdmissionRequest) -> list[list[Object]]:
        """The spec.limits of each range that applies."""
        if request.object is None or (request.old_object or {}).get("metadata", {}).get("deletionTimestamp"):
            return []
        return [(one.get("spec") or {}).get("limits") or [] for one in self._by_namespace().get(request.namespace, ())]

    def admit(self, request: AdmissionRequest) -> None:
        if request.resource.plural != "pods" or request.object is None:
            return
        for limits in self._limits(request):
            _default_pod(request.object, limits)

    def validate(self, request: AdmissionRequest) -> None:
        obj = request.object
        for limits in self._limits(request):
            assert obj is not None
            problems = _pod_problems(obj, limits) if request.resource.plural == "pods" else _claim_problems(obj, limits)
            if problems:
                raise refuse(request, problems[0] if len(problems) == 1 else f"[{', '.join(problems)}]")


def _default_pod(pod: Object, limits: list[Object]) -> None:
    requests: dict[str, str] = {}
    maxima: dict[str, str] = {}
    for limit in limits:
        if limit.get("type") == "Container":
            requests.update(limit.get("defaultRequest") or {})
            maxima.update(limit.get("default") or {})
    notes: list[str] = []
    for field, word in (("containers", "container"), ("initContainers", "init container")):
        for container in pod["spec"].get(field) or ():
            resources = container.setdefault("resources", {})
            for kind, defaults, noun in (("requests", requests, "request"), ("limits", maxima, "limit")):
                have = resources.get(kind) or {}
                added = {name: amount for name, amount in defaults.items() if name not in have}
                if added:
                    resources[kind] = {**have, **added}
                    notes.append(f"{', '.join(sorted(added))} {noun} for {word} {container.get('name', '')}")
    if notes:
        metadata = pod["metadata"]
        metadata["annotations"] = {**(metadata.get("annotations") or {}), _ANNOTATION: f"LimitRanger plugin set: {'; '.join(notes)}"}


def _minimum(kind: str, name: str, enforced: str, requests: Amounts, limits: Amounts) -> str:
    if name not in requests:
        return f"minimum {name} usage per {kind} is {enforced}.  No request is specified"
    if quantity.compare(requests[name], enforced) < 0:
        return f"minimum {name} usage per {kind} is {enforced}, but request is {requests[name]}"
    if name in limits and quantity.compare(limits[name], enforced) < 0:
        return f"minimum {name} usage per {kind} is {enforced}, but limit is {limits[name]}"
    return ""


def _maximum(kind: str, name: str, enforced: str, requests: Amounts, limits: Amounts) -> str:
    if name not in limits:
        return f"maximum {name} usage per {kind} is {enforced}.  No limit is specified"
    if quantity.compare(limits[name], enforced) > 0:
        return f"maximum {name} usage per {kind} is {enforced}, but limit is {limits[name]}"
    if name in requests and quantity.compare(requests[name], enforced) > 0:
        return f"maximum {name} usage per {kind} is {enforced}, but request is {requests[name]}"
    return ""


def _maximum_request(kind: str, name: str, enforced: str, requests: Amounts) -> str:
    if name not in requests:
        return f"maximum {name} usage per {kind} is {enforced}.  No request is specified"
    if quantity.compare(requests[name], enforced) > 0:
        return f"maximum {name} usage per {kind} is {enforced}, but request is {requests[name]}"
    return ""


def _ratio(kind: str, name: str, enforced: str, requests: Amounts, limits: Amounts) -> str:
    request, limit = quantity.parse(requests.get(name, "0")), quantity.parse(limits.get(name, "0"))
    if not request:
        return f"{name} max limit to request ratio per {kind} is {enforced}, but no request is specified or request is 0"
    if not limit:
        return f"{name} max limit to request ratio per {kind} is {enforced}, but no limit is specified or limit is 0"
    if limit / request > quantity.parse(enforced):
        return f"{name} max limit to request ratio per {kind} is {enforced}, but provided ratio is {float(limit / request):f}"
    return ""


def _check(limit: Object, requests: Amounts, limits: Amounts) -> Iterable[str]:
    kind = limit["type"]
    for name, enforced in sorted((limit.get("min") or {}).items()):
        yield _minimum(kind, name, enforced, requests, limits)
    for name, enforced in sorted((limit.get("max") or {}).items()):
        yield _maximum(kind, name, enforced, requests, limits)
    for name, enforced in sorted((limit.get("maxLimitRequestRatio") or {}).items()):
        yield _ratio(kind, name, enforced, requests, limits)


def _pod_problems(pod: Object, limits: list[Object]) -> list[str]:
    found: list[str] = []
    for limit in limits:
        if limit.get("type") == "Container":
            for container in [*(pod["spec"].get("containers") or ()), *(pod["spec"].get("initContainers") or ())]:
                resources = container.get("resources") or {}
                found += _check(limit, resources.get("requests") or {}, resources.get("limits") or {})
        elif limit.get("type") == "Pod":
            # Overhead is not the pod author's: it is left out here.
            bare = {**pod, "spec": {key: value for key, value in pod["spec"].items() if key != "overhead"}}
            found += _check(limit, pod_total(bare, "requests"), pod_total(bare, "limits"))
    return list(dict.fromkeys(problem for problem in found if problem))


def _claim_problems(claim: Object, limits: list[Object]) -> list[str]:
    requests = ((claim.get("spec") or {}).get("resources") or {}).get("requests") or {}
    found: list[str] = []
    for limit in limits:
        if limit.get("type") == "PersistentVolumeClaim":
            found += [_minimum("PersistentVolumeClaim", name, amount, requests, {}) for name, amount in sorted((limit.get("min") or {}).items())]
            found += [_maximum_request("PersistentVolumeClaim", name, amount, requests) for name, amount in sorted((limit.get("max") or {}).items())]
    return [problem for problem in found if problem]
