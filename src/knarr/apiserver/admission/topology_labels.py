"""PodTopologyLabels: a pod carries the zone and region of its node, copied when it is bound.

Source: kubernetes plugin/pkg/admission/podtopologylabels.
"""

from __future__ import annotations

from knarr.api import meta
from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, Plugin, is_resource
from knarr.apiserver.attributes import AdmissionRequest, Store

_LABELS = ("topology.kubernetes.io/zone", "topology.kubernetes.io/region")


class PodTopologyLabels(Plugin):
    name = "PodTopologyLabels"

    def __init__(self, nodes: Store) -> None:
        self._nodes = nodes

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        if operation != CREATE:
            return False
        return (is_resource(resource, "", "pods") and subresource in ("", "binding")) or is_resource(resource, "", "bindings")

    def admit(self, request: AdmissionRequest) -> None:
        obj = request.object
        if obj is None:
            return
        if request.kind[2] == "Binding":
            target = obj.get("target") or {}
            name = target.get("name") if target.get("kind") == "Node" else ""
        else:
            name = (obj.get("spec") or {}).get("nodeName")
        node = self._nodes.get_nowait("", name) if name else None
        if node is None:
            return
        found = {label: meta.labels(node)[label] for label in _LABELS if label in meta.labels(node)}
        if found:
            metadata = obj.setdefault("metadata", {})
            metadata["labels"] = {**(metadata.get("labels") or {}), **found}
