"""Pods: first state, quality of service class, graceful deletion, selectable fields.

Source: pkg/registry/core/pod/strategy.go, pkg/apis/core/helper/qos.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.api import quantity
from knarr.api.types import Object
from knarr.api.warnings.pods import take_apparmor_annotations
from knarr.apiserver.registry.base import Strategy, rest_of

if TYPE_CHECKING:
    from knarr.apiserver.call import Call


def qos_class(spec: Object) -> str:
    """Return Guaranteed, Burstable or BestEffort."""
    requests: dict[str, object] = {}
    limits: dict[str, object] = {}
    guaranteed = True
    pod_resources = spec.get("resources") or {}
    if pod_resources.get("requests") or pod_resources.get("limits"):
        groups = [pod_resources]
    else:
        groups = [c.get("resources") or {} for c in (spec.get("containers") or []) + (spec.get("initContainers") or [])]
    totals_requests: dict[str, int] = {}
    totals_limits: dict[str, int] = {}
    for resources in groups:
        for name, value in (resources.get("requests") or {}).items():
            if name in ("cpu", "memory") and (amount := _amount(name, value)) > 0:
                totals_requests[name] = totals_requests.get(name, 0) + amount
        found = set()
        for name, value in (resources.get("limits") or {}).items():
            if name in ("cpu", "memory") and (amount := _amount(name, value)) > 0:
                totals_limits[name] = totals_limits.get(name, 0) + amount
                found.add(name)
        if len(found) < 2:
            guaranteed = False
    requests.update(totals_requests)
    limits.update(totals_limits)
    if not requests and not limits:
        return "BestEffort"
    if guaranteed and requests == limits and len(requests) == 2:
        return "Guaranteed"
    return "Burstable"


def _amount(name: str, value: object) -> int:
    return quantity.cpu_millicores(value) if name == "cpu" else quantity.value(value)  # type: ignore[arg-type]


class Pod(Strategy):
    graceful = True
    returns_deleted = True
    has_generation = True
    trigger = "spec.nodeName"
    field_names = (
        "spec.nodeName", "spec.restartPolicy", "spec.schedulerName", "spec.serviceAccountName", "spec.hostNetwork", "status.phase",
        "status.podIP", "status.podIPs", "status.nominatedNodeName",
    )  # fmt: skip
    field_aliases = {"spec.host": "spec.nodeName"}

    def fields(self, obj: Object) -> tuple[str, ...]:
        spec, status = obj.get("spec") or {}, obj.get("status") or {}
        address = status.get("podIP") or ""
        addresses = status.get("podIPs")
        return (
            spec.get("nodeName") or "", spec.get("restartPolicy") or "", spec.get("schedulerName") or "", spec.get("serviceAccountName") or "",
            "true" if spec.get("hostNetwork") else "false", status.get("phase") or "", address,
            ",".join(a.get("ip") or "" for a in addresses) if addresses and len(addresses) > 1 else address,
            status.get("nominatedNodeName") or "",
        )  # fmt: skip

    def prepare_create(self, call: Call, obj: Object) -> None:
        spec = obj.setdefault("spec", {})
        obj["metadata"]["generation"] = 1
        if (spec.get("terminationGracePeriodSeconds") or 0) < 0:
            spec["terminationGracePeriodSeconds"] = 1
        obj["status"] = {"phase": "Pending", "qosClass": qos_class(spec)}
        if spec.get("schedulingGates") and not spec.get("nodeName"):
            obj["status"]["conditions"] = [{
                "type": "PodScheduled", "status": "False", "lastProbeTime": None, "lastTransitionTime": clock.now_rfc3339(),
                "reason": "SchedulingGated", "message": "Scheduling is blocked due to non-empty scheduling gates",
            }]
        _merge_label_selectors(obj)
        call.warnings += take_apparmor_annotations(obj)

    def prepare_update(self, call: Call, obj: Object, old: Object) -> None:
        if "status" in old:
            obj["status"] = old["status"]
        obj.setdefault("spec", {})
        self.raise_generation(obj, old)

    @staticmethod
    def raise_generation(obj: Object, old: Object) -> None:
        if rest_of(obj) != rest_of(old):
            obj["metadata"]["generation"] = (old["metadata"].get("generation") or 0) + 1

    def prepare_status(self, call: Call, obj: Object, old: Object) -> None:
        super().prepare_status(call, obj, old)
        metadata, before = obj["metadata"], old["metadata"]
        metadata.pop("deletionTimestamp", None)
        # The kubelet may not change owners through status.
        if "ownerReferences" in before:
            metadata["ownerReferences"] = before["ownerReferences"]
        else:
            metadata.pop("ownerReferences", None)
        status, was = obj.setdefault("status", {}), old.get("status") or {}
        if "qosClass" in was:
            status.setdefault("qosClass", was["qosClass"])

    def prepare_ephemeral(self, call: Call, obj: Object, old: Object) -> None:
        """Only ephemeral containers are taken over."""
        wanted = (obj.get("spec") or {}).get("ephemeralContainers")
        fresh = {**old, "metadata": {**old["metadata"], "resourceVersion": obj["metadata"]["resourceVersion"]}, "spec": dict(old["spec"])}
        if "managedFields" in obj["metadata"]:
            fresh["metadata"]["managedFields"] = obj["metadata"]["managedFields"]
        if wanted:
            fresh["spec"]["ephemeralContainers"] = wanted
        else:
            fresh["spec"].pop("ephemeralContainers", None)
        obj.clear()
        obj.update(fresh)
        self.raise_generation(obj, old)

    def prepare_resize(self, call: Call, obj: Object, old: Object) -> None:
        """Only the resources and resize policies of containers are taken over; other containers than before are left for validation to refuse."""
        given, before = obj.get("spec") or {}, old["spec"]
        if any(len(given.get(kind) or []) != len(before.get(kind) or []) for kind in ("containers", "initContainers")):
            return
        metadata = {**old["metadata"], "resourceVersion": obj["metadata"]["resourceVersion"]}
        if "managedFields" in obj["metadata"]:
            metadata["managedFields"] = obj["metadata"]["managedFields"]
        spec = dict(before)
        for kind in ("containers", "initContainers"):
            if before.get(kind):
                spec[kind] = _resized(before[kind], given[kind])
        obj.clear()
        obj.update({**old, "metadata": metadata, "spec": spec})
        self.raise_generation(obj, old)

    def check_graceful(self, call: Call, obj: Object, options: Object) -> bool:
        grace = options.get("gracePeriodSeconds")
        spec = obj.get("spec") or {}
        if grace is None:
            grace = spec.get("terminationGracePeriodSeconds")
            grace = 30 if grace is None else grace
        if grace < 0:
            grace = 1
        # A pod that no kubelet has, or whose containers have all ended, needs nobody to end it.
        if not spec.get("nodeName") or (obj.get("status") or {}).get("phase") in ("Failed", "Succeeded"):
            grace = 0
        options["gracePeriodSeconds"] = grace
        return True


def _resized(old: list[Object], given: list[Object]) -> list[Object]:
    """The old containers with what may be resized; those given as they are when their names or order differ."""
    if [c.get("name") for c in old] != [c.get("name") for c in given]:
        return given
    out: list[Object] = []
    for before, wanted in zip(old, given, strict=True):
        container: Object = {key: value for key, value in before.items() if key not in ("resources", "resizePolicy")}
        out.append({**container, **{key: wanted[key] for key in ("resources", "resizePolicy") if key in wanted}})
    return out


def _merge_label_selectors(obj: Object) -> None:
    """matchLabelKeys of pod affinity become terms of the label selector, once, at creation."""
    labels = obj["metadata"].get("labels") or {}
    affinity = (obj.get("spec") or {}).get("affinity") or {}
    for kind in ("podAffinity", "podAntiAffinity"):
        part = affinity.get(kind) or {}
        terms = list(part.get("requiredDuringSchedulingIgnoredDuringExecution") or [])
        terms += [t.get("podAffinityTerm") or {} for t in part.get("preferredDuringSchedulingIgnoredDuringExecution") or []]
        for term in terms:
            for keys, operator in (("matchLabelKeys", "In"), ("mismatchLabelKeys", "NotIn")):
                for key in term.get(keys) or []:
                    if key in labels and term.get("labelSelector") is not None:
                        expressions = term["labelSelector"].setdefault("matchExpressions", [])
                        expressions.append({"key": key, "operator": operator, "values": [labels[key]]})
    for constraint in (obj.get("spec") or {}).get("topologySpreadConstraints") or []:
        for key in constraint.get("matchLabelKeys") or []:
            if key in labels and constraint.get("labelSelector") is not None:
                expressions = constraint["labelSelector"].setdefault("matchExpressions", [])
                expressions.append({"key": key, "operator": "In", "values": [labels[key]]})
