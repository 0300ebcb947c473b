"""Deletion of namespaces: everything in them first, then their finalizer.

A terminating namespace is worked on until nothing is left: pods first, because other content may
guard them, then every resource that the server can delete, custom ones too. What holds it up is
told in the namespace's conditions.
Source: pkg/controller/namespace/deletion/namespaced_resources_deleter.go, status_condition_utils.go; KEP-5080.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import NAMESPACES, PODS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.discovery import server_resources
from knarr.controllers.context import Context
from knarr.http.errors import HTTPError

log = get_logger(__name__)

_FINALIZER_ESTIMATE_SECONDS = 15
_PARALLEL = 8

_SUCCESS = {
    "NamespaceDeletionDiscoveryFailure": ("ResourcesDiscovered", "All resources successfully discovered"),
    "NamespaceDeletionGroupVersionParsingFailure": ("ParsedGroupVersions", "All legacy kube types successfully parsed"),
    "NamespaceDeletionContentFailure": ("ContentDeleted", "All content successfully deleted, may be waiting on finalization"),
    "NamespaceContentRemaining": ("ContentRemoved", "All content successfully removed"),
    "NamespaceFinalizersRemaining": ("ContentHasNoFinalizers", "All content-preserving finalizers finished"),
}


@dataclass(slots=True)
class _Left:
    """What is left of a namespace's content."""

    estimate_seconds: int = 0
    resources: dict[str, int] = field(default_factory=dict)
    finalizers: dict[str, int] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    discovery: str = ""


class NamespaceController:
    """Empties and finalizes terminating namespaces."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._namespaces = ctx.informer(NAMESPACES)
        self.controller = Controller("namespace-controller", self._reconcile, workers=10)
        self._namespaces.add_handler(self._changed, lambda old, new: self._changed(new))
        # The last pod's end is what most deletions wait for: no timer could be as quick.
        ctx.pods.add_handler(on_delete=self._pod_deleted)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, namespace: Object) -> None:
        if "deletionTimestamp" in namespace["metadata"]:
            self.controller.queue.add(namespace["metadata"]["name"])

    def _pod_deleted(self, pod: Object) -> None:
        namespace = self._namespaces.get(None, pod["metadata"].get("namespace", ""))
        if namespace is not None:
            self._changed(namespace)

    async def _reconcile(self, name: str) -> Result | None:
        if self._namespaces.get(None, name) is None:
            return None
        try:
            namespace = await self._client.get(NAMESPACES, name)
        except StatusError as error:
            if errors.is_not_found(error):
                return None
            raise
        if "deletionTimestamp" not in namespace["metadata"]:
            return None
        if (namespace.get("status") or {}).get("phase") != "Terminating":
            namespace.setdefault("status", {})["phase"] = "Terminating"
            namespace = await self._client.update(NAMESPACES, namespace, subresource="status")
        if not (namespace.get("spec") or {}).get("finalizers"):
            return None
        left = await self._delete_content(namespace)
        namespace = await self._write_conditions(namespace, left)
        if left.failures or left.discovery:
            raise RuntimeError("; ".join([*left.failures, left.discovery]))
        if left.estimate_seconds or left.resources:
            return Result(left.estimate_seconds / 2 + 1)
        await self._finalize(namespace)
        return None

    async def _finalize(self, namespace: Object) -> None:
        kept = [item for item in namespace["spec"].get("finalizers") or () if item != "kubernetes"]
        namespace = {**namespace, "spec": {**namespace["spec"], "finalizers": kept}}
        try:
            await self._client.update(NAMESPACES, namespace, subresource="finalize")
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _delete_content(self, namespace: Object) -> _Left:
        left = _Left()
        name = namespace["metadata"]["name"]
        resources, failed = await server_resources(self._client)
        if failed:
            groups = ", ".join(sorted(failed))
            left.discovery = f"Discovery failed for some groups, {len(failed)} failing: unable to retrieve the complete list of server APIs: {groups}"
        deletable = [res for res in resources if res.namespaced and "delete" in res.verbs and "list" in res.verbs]
        await self._delete_resource(PODS, namespace, left)
        if left.resources:
            left.resources.clear()
            left.finalizers.clear()
            return left
        gate = asyncio.Semaphore(_PARALLEL)

        async def delete(res: Resource) -> None:
            async with gate:
                await self._delete_resource(res, namespace, left)

        await asyncio.gather(*[delete(res) for res in deletable if res != PODS])
        log.debug("namespace content deleted", namespace=name, remaining=len(left.resources))
        return left

    async def _delete_resource(self, res: Resource, namespace: Object, left: _Left) -> None:
        try:
            await self._delete_all(res, namespace, left)
        except (StatusError, HTTPError, OSError) as error:
            if isinstance(error, StatusError) and error.code in (404, 405):
                return
            left.failures.append(str(error))

    async def _delete_all(self, res: Resource, namespace: Object, left: _Left) -> None:
        name = namespace["metadata"]["name"]
        items = (await self._client.list(res, name)).get("items") or []
        if not items:
            return
        estimate = _graceful_seconds(items, namespace) if res == PODS else 0
        if "deletecollection" in res.verbs:
            await self._client.delete_collection(res, name, propagation_policy="Background")
        else:
            for item in items:
                await self._delete_one(res, item["metadata"]["name"], name)
        items = (await self._client.list(res, name)).get("items") or []
        if not items:
            return
        left.resources[f"{res.plural}.{res.group}"] = len(items)
        finalizers: dict[str, int] = {}
        for item in items:
            for finalizer in item["metadata"].get("finalizers") or ():
                finalizers[finalizer] = finalizers.get(finalizer, 0) + 1
        for finalizer, count in finalizers.items():
            left.finalizers[finalizer] = left.finalizers.get(finalizer, 0) + count
        if not estimate and finalizers:
            estimate = _FINALIZER_ESTIMATE_SECONDS
        left.estimate_seconds = max(left.estimate_seconds, estimate)
        if not estimate:
            gvr = f"{res.group}/{res.version}, Resource={res.plural}"
            left.failures.append(f"unexpected items still remain in namespace: {name} for gvr: {gvr}")

    async def _delete_one(self, res: Resource, name: str, namespace: str) -> None:
        try:
            await self._client.delete(res, name, namespace, propagation_policy="Background")
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _write_conditions(self, namespace: Object, left: _Left) -> Object:
        conditions = meta.deep_copy((namespace.get("status") or {}).get("conditions") or [])
        changed = False
        problems = _problems(left)
        now = clock.now_rfc3339()
        for type, (reason, message) in _SUCCESS.items():
            status = "False"
            if type in problems:
                status = "True"
                reason, message = problems[type]
            old = meta.get_condition(conditions, type)
            if old is not None and (old["status"], old.get("reason"), old.get("message")) == (status, reason, message):
                continue
            changed = True
            if old is None:
                old = {"type": type}
                conditions.append(old)
            if old.get("status") != status:
                old["lastTransitionTime"] = now
            old.update(status=status, reason=reason, message=message)
        if not changed:
            return namespace
        namespace = {**namespace, "status": {**(namespace.get("status") or {}), "conditions": conditions}}
        try:
            return await self._client.update(NAMESPACES, namespace, subresource="status")
        except StatusError as error:
            if errors.is_not_found(error):
                return namespace
            raise


def _problems(left: _Left) -> dict[str, tuple[str, str]]:
    problems: dict[str, tuple[str, str]] = {}
    if left.discovery:
        problems["NamespaceDeletionDiscoveryFailure"] = ("DiscoveryFailed", left.discovery)
    if left.failures:
        message = f"Failed to delete all resource types, {len(left.failures)} remaining: {', '.join(sorted(left.failures))}"
        problems["NamespaceDeletionContentFailure"] = ("ContentDeletionFailed", message)
    if left.resources:
        parts = sorted(f"{name} has {count} resource instances" for name, count in left.resources.items())
        problems["NamespaceContentRemaining"] = ("SomeResourcesRemain", f"Some resources are remaining: {', '.join(parts)}")
    if left.finalizers:
        parts = sorted(f"{name} in {count} resource instances" for name, count in left.finalizers.items())
        message = f"Some content in the namespace has finalizers remaining: {', '.join(parts)}"
        problems["NamespaceFinalizersRemaining"] = ("SomeFinalizersRemain", message)
    return problems


def _graceful_seconds(pods: list[Object], namespace: Object) -> int:
    """How long the pods may still take, counted from the namespace's deletion; 0 when they are late."""
    longest = 0
    for pod in pods:
        if (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed"):
            longest = max(longest, int((pod.get("spec") or {}).get("terminationGracePeriodSeconds") or 0))
    passed = clock.now() - clock.parse_rfc3339(namespace["metadata"]["deletionTimestamp"])
    return 0 if passed >= longest else longest
