"""NamespaceLifecycle: nothing is created in a namespace that does not exist or is going away; some namespaces stay for ever.

Source: apiserver pkg/admission/plugin/namespace/lifecycle.
"""

from __future__ import annotations

from knarr.api.errors import forbidden, not_found
from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, DELETE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store

_IMMORTAL = frozenset({"default", "kube-system", "kube-public"})


class NamespaceLifecycle(Plugin):
    name = "NamespaceLifecycle"

    def __init__(self, namespaces: Store) -> None:
        self._namespaces = namespaces

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        if is_resource(resource, "", "namespaces"):
            return operation == DELETE
        if is_resource(resource, "authorization.k8s.io", "localsubjectaccessreviews"):
            return False
        return resource.namespaced and operation in (CREATE, UPDATE)

    def admit(self, request: AdmissionRequest) -> None:
        if request.operation == DELETE:
            if request.name in _IMMORTAL:
                raise forbidden(request.resource, request.name, "this namespace may not be deleted")
            return
        if not request.namespace:
            return
        namespace = self._namespaces.get_nowait("", request.namespace)
        if namespace is None:
            raise not_found("namespaces", request.namespace)
        if request.operation != CREATE or (namespace.get("status") or {}).get("phase") != "Terminating":
            return
        error = refuse(request, f"unable to create new content in namespace {request.namespace} because it is being terminated")
        error.details["causes"] = [{
            "reason": "NamespaceTerminating", "message": f"namespace {request.namespace} is being terminated", "field": "metadata.namespace",
        }]  # fmt: skip
        raise error
