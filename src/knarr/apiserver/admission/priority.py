"""Priority: a pod's priority is that of its class; there is at most one default class.

Source: kubernetes plugin/pkg/admission/priority.
"""

from __future__ import annotations

from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store


class Priority(Plugin):
    name = "Priority"

    def __init__(self, priority_classes: Store) -> None:
        self._classes = priority_classes
        self._default: tuple[int, Object | None] = (-1, None)

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        pods_or_classes = is_resource(resource, "", "pods") or is_resource(resource, "scheduling.k8s.io", "priorityclasses")
        return pods_or_classes and not subresource and operation in (CREATE, UPDATE)

    def _default_class(self) -> Object | None:
        generation = self._classes.generation
        if self._default[0] != generation:
            defaults = [one for one in self._classes.list_nowait() if one.get("globalDefault")]
            self._default = (generation, min(defaults, key=lambda one: one.get("value", 0)) if defaults else None)
        return self._default[1]

    def admit(self, request: AdmissionRequest) -> None:
        if request.resource.plural != "pods" or request.object is None:
            return
        spec = request.object["spec"]
        if request.operation == UPDATE:
            old = (request.old_object or {}).get("spec") or {}
            for field in ("priority", "preemptionPolicy"):
                if spec.get(field) is None and old.get(field) is not None:
                    spec[field] = old[field]
            return
        name = spec.get("priorityClassName")
        if name:
            chosen = self._classes.get_nowait("", name)
            if chosen is None:
                raise refuse(request, f"no PriorityClass with name {name} was found")
        else:
            chosen = self._default_class()
            if chosen is not None:
                spec["priorityClassName"] = chosen["metadata"]["name"]
        priority = chosen.get("value", 0) if chosen is not None else 0
        policy = chosen.get("preemptionPolicy") if chosen is not None else "PreemptLowerPriority"
        given = spec.get("priority")
        if given is not None and given != priority:
            raise refuse(request, f"the integer value of priority ({given}) must not be provided in pod spec; "
                                  f"priority admission controller computed {priority} from the given PriorityClass name")
        spec["priority"] = priority
        if policy:
            given_policy = spec.get("preemptionPolicy")
            if given_policy is not None and given_policy != policy:
                raise refuse(request, f"the string value of PreemptionPolicy ({given_policy}) must not be provided in pod spec; "
                                      f"priority admission controller computed {policy} from the given PriorityClass name")
            spec["preemptionPolicy"] = policy

    def validate(self, request: AdmissionRequest) -> None:
        if request.resource.plural != "priorityclasses" or request.object is None or not request.object.get("globalDefault"):
            return
        default = self._default_class()
        if default is None:
            return
        name = default["metadata"]["name"]
        if request.operation == CREATE or name != request.object["metadata"]["name"]:
            raise refuse(request, f"PriorityClass {name} is already marked as default. Only one default can exist")
