"""NamespaceLifecycle: nothing is created in a namespace that does not exist or is going away; some namespaces stay for ever.

Source: apiserver pkg/admission/plugin/namespace/lifecycle.
"""

from __future__ import annotations

from collections.abc import Awaitable

from knarr.api.errors import forbidden, not_found
from knarr.api.scheme import Resource
from knarr.api.types import Object
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

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        if request.operation == DELETE:
            if request.name in _IMMORTAL:
                raise forbidden(request.resource, request.name, "this namespace may not be deleted")
            return None
        if not request.namespace:
            return None
        namespace = self._namespaces.get_nowait("", request.namespace)
        if namespace is None:
            return self._look(request)
        self._check(request, namespace)
        return None

    async def _look(self, request: AdmissionRequest) -> None:
        """Another server may have made the namespace just now."""
        namespace = await self._namespaces.get_live("", request.namespace)
        if namespace is None:
            raise not_found("namespaces", request.namespace)
        self._check(request, namespace)

    @staticmethod
    def _check(request: AdmissionRequest, namespace: Object) -> None:
        if request.operation != CREATE or (namespace.get("status") or {}).get("phase") != "Terminating":
            return
        error = refuse(request, f"unable to create new content in namespace {request.namespace} because it is being terminated")
        error.details["causes"] = [{
            "reason": "NamespaceTerminating", "message": f"namespace {request.namespace} is being terminated", "field": "metadata.namespace",
        }]  # fmt: skip
        raise error
