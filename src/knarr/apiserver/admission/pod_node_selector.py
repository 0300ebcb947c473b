"""PodNodeSelector: pods of a namespace run only on nodes that the namespace's annotation, or the cluster's default, selects.

Configuration: `podNodeSelectorPluginConfig: {clusterDefaultNodeSelector: "a=b", <namespace>: "c=d"}`; a namespace's entry is the
most that its pods may select.

Source: kubernetes plugin/pkg/admission/podnodeselector.
"""

from __future__ import annotations

from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store

_ANNOTATION = "scheduler.alpha.kubernetes.io/node-selector"
_DEFAULT = "clusterDefaultNodeSelector"


class PodNodeSelector(Plugin):
    name = "PodNodeSelector"
    by_default = False

    def __init__(self, namespaces: Store, configuration: object) -> None:
        self._namespaces = namespaces
        known = configuration.get("podNodeSelectorPluginConfig") if isinstance(configuration, dict) else None
        self._selectors = {str(key): str(value) for key, value in (known or {}).items()}

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation == CREATE

    def admit(self, request: AdmissionRequest) -> None:
        spec = (request.object or {})["spec"]
        own = spec.get("nodeSelector") or {}
        merged = {**self._of_namespace(request, own), **own}
        if merged:
            spec["nodeSelector"] = merged
        self.validate(request)

    def validate(self, request: AdmissionRequest) -> None:
        own = (request.object or {})["spec"].get("nodeSelector") or {}
        self._of_namespace(request, own)
        allowed = _labels(self._selectors.get(request.namespace, ""))
        if allowed and any(allowed.get(key) != value for key, value in own.items()):
            raise refuse(request, "pod node label selector labels conflict with its namespace whitelist")

    def _of_namespace(self, request: AdmissionRequest, own: dict[str, str]) -> dict[str, str]:
        """Return the namespace's selector. Raises StatusError 403 if the pod's own says otherwise."""
        namespace = self._namespaces.get_nowait("", request.namespace) or {}
        annotations = (namespace.get("metadata") or {}).get("annotations") or {}
        wanted = _labels(annotations[_ANNOTATION] if _ANNOTATION in annotations else self._selectors.get(_DEFAULT, ""))
        if any(own.get(key, value) != value for key, value in wanted.items()):
            raise refuse(request, "pod node label selector conflicts with its namespace node label selector")
        return wanted


def _labels(selector: str) -> dict[str, str]:
    """Read "a=b,c=d". Raises StatusError 500: it comes from an administrator, not from whoever asks."""
    found: dict[str, str] = {}
    for part in selector.split(",") if selector else ():
        key, equals, value = part.partition("=")
        if not equals or "=" in value:
            raise StatusError(500, "", f"invalid selector: {part}")
        found[key.strip()] = value.strip()
    return found
