"""RuntimeClass: a pod's overhead and node restrictions come from its runtime class.

Source: kubernetes plugin/pkg/admission/runtimeclass.
"""

from __future__ import annotations

from knarr.api import meta, quantity
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store


def _same(left: Object | None, right: Object | None) -> bool:
    left, right = left or {}, right or {}
    return left.keys() == right.keys() and all(quantity.compare(left[name], right[name]) == 0 for name in left)


class RuntimeClass(Plugin):
    name = "RuntimeClass"

    def __init__(self, runtime_classes: Store) -> None:
        self._classes = runtime_classes

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation == CREATE

    def _class(self, request: AdmissionRequest) -> Object | None:
        name = (request.object or {})["spec"].get("runtimeClassName")
        if not name:
            return None
        found = self._classes.get_nowait("", name)
        if found is None:
            raise refuse(request, f'pod rejected: RuntimeClass "{name}" not found')
        return found

    def admit(self, request: AdmissionRequest) -> None:
        chosen = self._class(request)
        if chosen is None or request.object is None:
            return
        spec = request.object["spec"]
        fixed = (chosen.get("overhead") or {}).get("podFixed")
        if chosen.get("overhead") is not None:
            if spec.get("overhead") and not _same(fixed, spec["overhead"]):
                raise refuse(request, "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead")
            if fixed:
                spec["overhead"] = dict(fixed)
        scheduling = chosen.get("scheduling")
        if scheduling is None:
            return
        selector = dict(spec.get("nodeSelector") or {})
        for key, value in (scheduling.get("nodeSelector") or {}).items():
            if selector.get(key, value) != value:
                raise refuse(request, f"conflict: runtimeClass.scheduling.nodeSelector[{key}] = {value}; pod.spec.nodeSelector[{key}] = {selector[key]}")
            selector[key] = value
        if selector:
            spec["nodeSelector"] = selector
        tolerations = list(spec.get("tolerations") or ())
        tolerations += [meta.deep_copy(one) for one in scheduling.get("tolerations") or () if one not in tolerations]
        if tolerations:
            spec["tolerations"] = tolerations

    def validate(self, request: AdmissionRequest) -> None:
        chosen = self._class(request)
        overhead = (request.object or {})["spec"].get("overhead")
        if chosen is not None and chosen.get("overhead") is not None:
            if not _same((chosen["overhead"] or {}).get("podFixed"), overhead):
                raise refuse(request, "pod rejected: Pod's Overhead doesn't match RuntimeClass's defined Overhead")
        elif overhead is not None:
            raise refuse(request, "pod rejected: Pod Overhead set without corresponding RuntimeClass defined Overhead")
