"""Small plugins that run when asked for: about namespaces, anti-affinity, and everything at all.

Source: kubernetes plugin/pkg/admission/{admit,deny,antiaffinity,namespace/exists,namespace/autoprovision}.
"""

from __future__ import annotations

from collections.abc import Awaitable

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.apiserver.admission.plugin import CREATE, DELETE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store

_HOST = "kubernetes.io/hostname"


class AlwaysAdmit(Plugin):
    """Takes everything, as does having no plugin at all."""

    name = "AlwaysAdmit"
    by_default = False


class AlwaysDeny(Plugin):
    """Takes nothing."""

    name = "AlwaysDeny"
    by_default = False

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return True

    def admit(self, request: AdmissionRequest) -> None:
        raise refuse(request, "admission control is denying all modifications")

    def validate(self, request: AdmissionRequest) -> None:
        self.admit(request)


class LimitPodHardAntiAffinityTopology(Plugin):
    """Keeps pods from reserving more than a host by required anti-affinity."""

    name = "LimitPodHardAntiAffinityTopology"
    by_default = False

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, "", "pods") and not subresource and operation in (CREATE, UPDATE)

    def validate(self, request: AdmissionRequest) -> None:
        affinity = ((request.object or {})["spec"].get("affinity") or {}).get("podAntiAffinity") or {}
        for term in affinity.get("requiredDuringSchedulingIgnoredDuringExecution") or ():
            key = term.get("topologyKey") or ""
            if key != _HOST:
                raise refuse(request, f"affinity.PodAntiAffinity.RequiredDuringScheduling has TopologyKey {key} but only key {_HOST} is allowed")


class NamespaceExists(Plugin):
    """Nothing happens in a namespace that does not exist."""

    name = "NamespaceExists"
    by_default = False
    operations = frozenset({CREATE, UPDATE, DELETE})

    def __init__(self, namespaces: Store) -> None:
        self._namespaces = namespaces

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return resource.namespaced and operation in self.operations

    def validate(self, request: AdmissionRequest) -> Awaitable[None] | None:
        return self._look(request.namespace) if self._is_missing(request) else None

    def _is_missing(self, request: AdmissionRequest) -> bool:
        return bool(request.namespace) and self._namespaces.get_nowait("", request.namespace) is None

    async def _look(self, namespace: str) -> None:
        if await self._namespaces.get_live("", namespace) is None:
            raise errors.not_found("namespaces", namespace)


class NamespaceAutoProvision(NamespaceExists):
    """Makes the namespace that something is created in."""

    name = "NamespaceAutoProvision"
    operations = frozenset({CREATE})

    def admit(self, request: AdmissionRequest) -> Awaitable[None] | None:
        return self._provide(request.namespace) if self._is_missing(request) and not request.dry_run else None

    def validate(self, request: AdmissionRequest) -> None:
        return None

    async def _provide(self, namespace: str) -> None:
        made = {
            "apiVersion": "v1", "kind": "Namespace",
            "metadata": {"name": namespace, "labels": {"kubernetes.io/metadata.name": namespace}},
            "spec": {"finalizers": ["kubernetes"]}, "status": {"phase": "Active"},
        }  # fmt: skip
        try:
            await self._namespaces.create(made)
        except StatusError as error:
            if not errors.is_already_exists(error):
                raise
