"""OwnerReferencesPermissionEnforcement: who makes an object die with another one, or holds another one's deletion up, must be
allowed to do that directly.

Source: kubernetes plugin/pkg/admission/gc.
"""

from __future__ import annotations

from collections.abc import Callable

from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, refuse
from knarr.apiserver.attributes import AdmissionRequest, Attributes, Authorizer, Decision

FindResources = Callable[[str, str], list[Resource]]
"""Served resources of an (apiVersion, kind)."""


def _references(obj: Object | None) -> list[Object]:
    return ((obj or {}).get("metadata") or {}).get("ownerReferences") or []


class OwnerReferencesPermissionEnforcement(Plugin):
    name = "OwnerReferencesPermissionEnforcement"
    by_default = False

    def __init__(self, authorizer: Authorizer, find: FindResources) -> None:
        self._authorizer = authorizer
        self._find = find

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        # Pods' status takes no owner references.
        return operation in (CREATE, UPDATE) and (resource.group, resource.plural, subresource) != ("", "pods", "status")

    async def validate(self, request: AdmissionRequest) -> None:
        new, old = _references(request.object), _references(request.old_object)
        if new == old:
            return
        if request.operation != CREATE:
            allowed, reason = await self._allows(Attributes(
                request.user, "delete", request.resource.group, request.resource.version, request.resource.plural, request.subresource,
                request.namespace, request.name,
            ))  # fmt: skip
            if not allowed:
                raise refuse(request, f"cannot set an ownerRef on a resource you can't delete: {reason}, <nil>")
        blocked = {reference.get("uid") for reference in old if reference.get("blockOwnerDeletion")}
        blocking = [reference for reference in new if reference.get("blockOwnerDeletion") and reference.get("uid") not in blocked]
        if not blocking or (await self._allows(Attributes(request.user, "update", "*", "*", "*", "finalizers", "", "*")))[0]:
            return
        for reference in blocking:
            await self._check(request, reference)

    async def _check(self, request: AdmissionRequest, reference: Object) -> None:
        version, kind = reference.get("apiVersion", ""), reference.get("kind", "")
        resources = self._find(version, kind)
        if not resources:
            why = f'no matches for kind "{kind}" in version "{version}"'
            raise refuse(request, f"cannot set blockOwnerDeletion in this case because cannot find RESTMapping for APIVersion {version} Kind {kind}: {why}")
        for resource in resources:
            allowed, reason = await self._allows(Attributes(
                request.user, "update", resource.group, resource.version, resource.plural, "finalizers",
                request.namespace if resource.namespaced else "", reference.get("name", ""),
            ))  # fmt: skip
            if not allowed:
                why = f"cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on: {reason}, <nil>"
                raise refuse(request, why)

    async def _allows(self, attributes: Attributes) -> tuple[bool, str]:
        decision, reason = self._authorizer.authorize(attributes)
        if decision is Decision.ASK:
            decision, reason = await self._authorizer.authorize_async(attributes)
        return decision is Decision.ALLOW, reason
