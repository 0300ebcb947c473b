"""DefaultTolerationSeconds: a pod stays five minutes on a node that is not ready or not reachable, unless it says otherwise.

Source: kubernetes plugin/pkg/admission/defaulttolerationseconds.
"""

from __future__ import annotations

from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource
from knarr.apiserver.attributes import AdmissionRequest

_KEYS = ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")


class DefaultTolerationSeconds(Plugin):
    name = "DefaultTolerationSeconds"

    def __init__(self, seconds: int = 300) -> None:
        self._seconds = seconds

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation in (CREATE, UPDATE)

    def admit(self, request: AdmissionRequest) -> None:
        if request.object is None:
            return
        spec = request.object["spec"]
        tolerations = spec.get("tolerations") or []
        missing = [
            key for key in _KEYS
            if not any(t.get("key", "") in (key, "") and t.get("effect", "") in ("NoExecute", "") for t in tolerations)
        ]  # fmt: skip
        if missing:
            added = [{"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": self._seconds} for key in missing]
            spec["tolerations"] = [*tolerations, *added]
