"""TaintNodesByCondition: a new node starts tainted not-ready, so that nothing lands on it before it is known to work.

Source: kubernetes plugin/pkg/admission/nodetaint.
"""

from __future__ import annotations

from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, Plugin, is_resource
from knarr.apiserver.attributes import AdmissionRequest

_TAINT = {"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}


class TaintNodesByCondition(Plugin):
    name = "TaintNodesByCondition"

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "nodes") and not subresource and operation == CREATE

    def admit(self, request: AdmissionRequest) -> None:
        if request.object is None:
            return
        spec = request.object.setdefault("spec", {})
        taints = spec.get("taints") or []
        if not any(taint.get("key") == _TAINT["key"] and taint.get("effect") == _TAINT["effect"] for taint in taints):
            spec["taints"] = [*taints, dict(_TAINT)]
