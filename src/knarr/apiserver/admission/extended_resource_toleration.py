"""ExtendedResourceToleration: a pod that asks for a device tolerates the taint that keeps others off the nodes that have it.

Source: kubernetes plugin/pkg/admission/extendedresourcetoleration.
"""

from __future__ import annotations

from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource
from knarr.apiserver.attributes import AdmissionRequest


def _is_extended(name: str) -> bool:
    domain, slash, _ = name.partition("/")
    return bool(slash) and domain != "kubernetes.io" and not domain.endswith(".kubernetes.io") and not name.startswith("requests.")


class ExtendedResourceToleration(Plugin):
    name = "ExtendedResourceToleration"
    by_default = False

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation in (CREATE, UPDATE)

    def admit(self, request: AdmissionRequest) -> None:
        spec = (request.object or {}).get("spec") or {}
        wanted = {
            name for group in ("containers", "initContainers") for container in spec.get(group) or ()
            for name in (container.get("resources") or {}).get("requests") or {} if _is_extended(name)
        }  # fmt: skip
        tolerations = list(spec.get("tolerations") or ())
        for name in sorted(wanted):
            toleration = {"key": name, "operator": "Exists", "effect": "NoSchedule"}
            if not any(_covers(existing, name) for existing in tolerations):
                tolerations.append(toleration)
        if wanted:
            spec["tolerations"] = tolerations


def _covers(toleration: dict[str, object], key: str) -> bool:
    if toleration.get("operator") != "Exists" or toleration.get("tolerationSeconds") is not None:
        return False
    return toleration.get("key", "") in (key, "") and toleration.get("effect", "") in ("NoSchedule", "")
