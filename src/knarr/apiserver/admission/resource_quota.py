"""ResourceQuota: charges what an operation will use before it happens, and gives it back when it does not happen.

The charge is a compare-and-swap on each quota's status.used, so several API servers agree. Charges of one namespace take turns. The
controller recounts later; it alone lowers usage when objects go.

Source: apiserver pkg/admission/plugin/resourcequota.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import meta, quota
from knarr.api.errors import StatusError
from knarr.api.podresources import ResourceList
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, refuse
from knarr.apiserver.attributes import AdmissionRequest, Store

log = get_logger(__name__)


class ResourceQuota(Plugin):
    name = "ResourceQuota"

    def __init__(self, quotas: Store, tasks: Tasks) -> None:
        self._quotas = quotas
        self._tasks = tasks
        self._turns: dict[str, asyncio.Lock] = {}
        self._known: tuple[int, dict[str, list[str]]] = (-1, {})

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        if not resource.namespaced or operation not in (CREATE, UPDATE) or (resource.plural == "events" and resource.group in ("", "events.k8s.io")):
            return False
        if subresource:
            return resource.plural == "pods" and not resource.group and subresource == "resize"
        if operation == UPDATE and resource.group:
            return (resource.group, resource.plural) == ("resource.k8s.io", "resourceclaims")
        return operation == CREATE or resource.plural in ("pods", "services", "persistentvolumeclaims")

    def sources(self) -> tuple[Store, ...]:
        return (self._quotas,)

    def concerns(self, operation: str, resource: Resource, subresource: str) -> bool:
        return bool(self._by_namespace())

    def _by_namespace(self) -> dict[str, list[str]]:
        generation = self._quotas.generation
        if self._known[0] != generation:
            found: dict[str, list[str]] = {}
            for one in self._quotas.list_nowait():
                found.setdefault(meta.namespace(one), []).append(meta.name(one))
            self._known = (generation, found)
        return self._known[1]

    def validate(self, request: AdmissionRequest) -> Awaitable[None] | None:
        resource, obj = request.resource, request.object
        if obj is None or not self._by_namespace().get(request.namespace):
            return None
        if not quota.handles(resource.group, resource.plural, request.operation, request.subresource, obj, request.old_object):
            return None
        return self._charge(request, obj)

    async def _charge(self, request: AdmissionRequest, obj: Object) -> None:
        turn = self._turns.setdefault(request.namespace, asyncio.Lock())
        async with turn:
            deltas = self._deltas(request, obj)
            if request.dry_run:
                return
            charged: list[tuple[str, ResourceList]] = []
            try:
                for name, delta in deltas.items():
                    await self._apply(request, name, delta)
                    charged.append((name, delta))
            except StatusError:
                for name, delta in charged:
                    await self._give_back(request.namespace, name, delta)
                raise
        if charged:
            request.undo.append(self._undo(request.namespace, charged))

    def _undo(self, namespace: str, charged: list[tuple[str, ResourceList]]) -> Callable[[], None]:
        async def give_back() -> None:
            async with self._turns.setdefault(namespace, asyncio.Lock()):
                for name, delta in charged:
                    await self._give_back(namespace, name, delta)

        def undo() -> None:
            self._tasks.spawn(give_back(), "quota-undo")

        return undo

    def _deltas(self, request: AdmissionRequest, obj: Object) -> dict[str, ResourceList]:
        """What each quota will be charged; refuses what no charge can make right."""
        group, plural = request.resource.group, request.resource.plural
        wanted = quota.usage(group, plural, obj)
        deltas: dict[str, ResourceList] = {}
        for name in sorted(self._by_namespace().get(request.namespace, ())):
            found = self._quotas.get_nowait(request.namespace, name)
            status = (found or {}).get("status") or {}
            hard = status.get("hard") or {}
            if found is None or not quota.matches(found, group, plural, obj, hard):
                continue
            restricted = quota.matching_resources(group, plural, hard)
            if plural == "pods" and not group:
                missing = quota.missing_requests(obj, restricted)
                if missing:
                    raise refuse(request, f"failed quota: {name}: {missing}")
            used = status.get("used") or {}
            if any(resource not in used for resource in restricted):
                raise refuse(request, f"status unknown for quota: {name}, resources: {','.join(sorted(restricted))}")
            delta = wanted
            if request.operation == UPDATE and request.old_object is not None and quota.matches(found, group, plural, request.old_object, hard):
                delta = quota.minus_at_least_zero(wanted, quota.usage(group, plural, request.old_object))
            delta = {resource: amount for resource, amount in quota.masked(delta, hard).items() if amount not in ("0", 0)}
            if delta:
                self._check(request, name, delta, used, hard)
                deltas[name] = delta
        return deltas

    @staticmethod
    def _check(request: AdmissionRequest, name: str, delta: ResourceList, used: ResourceList, hard: ResourceList) -> None:
        over = quota.exceeded(quota.masked(quota.plus(used, delta), delta), hard)
        if over:
            shown = [quota.shown(quota.masked(amounts, over)) for amounts in (delta, used, hard)]
            raise refuse(request, f"exceeded quota: {name}, requested: {shown[0]}, used: {shown[1]}, limited: {shown[2]}")

    async def _apply(self, request: AdmissionRequest, name: str, delta: ResourceList) -> None:
        def change(current: Object) -> Object:
            status = current.setdefault("status", {})
            used = status.get("used") or {}
            # Checked again on what is stored now: another server may have charged meanwhile.
            self._check(request, name, delta, used, status.get("hard") or {})
            status["used"] = quota.plus(used, delta)
            return current

        await self._quotas.update(request.namespace, name, change)

    async def _give_back(self, namespace: str, name: str, delta: ResourceList) -> None:
        def change(current: Object) -> Object:
            status = current.setdefault("status", {})
            used = status.get("used") or {}
            status["used"] = {**used, **quota.minus_at_least_zero(quota.masked(used, delta), delta)}
            return current

        try:
            await self._quotas.update(namespace, name, change)
        except StatusError as error:
            # The quota is gone, or the controller will recount it.
            log.debug("quota charge not given back", quota=f"{namespace}/{name}", error=str(error))
