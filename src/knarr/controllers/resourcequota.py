"""ResourceQuota: what is used, counted anew whenever something is freed.

Admission charges what is created; this controller gives back what ended, and corrects both.
Source: pkg/controller/resourcequota/resource_quota_controller.go.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from knarr.aiokits.log import get_logger
from knarr.api import quantity
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PODS, REPLICATION_CONTROLLERS, RESOURCE_CLAIMS, RESOURCE_QUOTAS, SERVICES
from knarr.api.scheme import SCHEME, Resource
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.discovery import server_resources
from knarr.client.informer import Informer
from knarr.controllers import podutil, quota
from knarr.controllers.context import Context, object_key, trim_to_metadata

log = get_logger(__name__)

_SHARED: dict[str, Resource] = {
    "pods": PODS,
    "services": SERVICES,
    "persistentvolumeclaims": PERSISTENT_VOLUME_CLAIMS,
    "replicationcontrollers": REPLICATION_CONTROLLERS,
    "resourcequotas": RESOURCE_QUOTAS,
    "resourceclaims.resource.k8s.io": RESOURCE_CLAIMS,
}
# Many objects often go together: one recount for all.
_DELAY_SECONDS = 0.1


class ResourceQuotaController:
    """Keeps status.used of every ResourceQuota."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._quotas = ctx.informer(RESOURCE_QUOTAS)
        self._resync = ctx.config.quota_resync_seconds
        self._informers: dict[str, Informer] = {name: ctx.informer(res) for name, res in _SHARED.items()}
        self._unknown: set[str] = set()
        self._since: dict[str, float] = {}
        """Revision at which we put a quota into force; infinite while we do."""
        self.controller = Controller("resourcequota-controller", self._reconcile, workers=5)
        self._quotas.add_handler(self._changed, self._updated, self._changed)
        for name, informer in self._informers.items():
            self._follow(name, informer)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, obj: Object) -> None:
        self.controller.queue.add(object_key(obj))

    def _updated(self, old: Object, new: Object) -> None:
        status = new.get("status") or {}
        if old["spec"] != new["spec"] or status.get("hard") != new["spec"].get("hard"):
            self._changed(new)

    def _follow(self, resource: str, informer: Informer) -> None:
        """Recount what an event may have freed.

        What it added only where the quota was not in force yet: otherwise admission has charged it, and a recount that has seen the
        charge before the object would take it back.
        """

        def quotas_of(obj: Object) -> list[Object]:
            found = self._quotas.list(obj["metadata"].get("namespace") or "-")
            return [item for item in found if resource in map(quota.group_resource, item["spec"].get("hard") or ())]

        def wake(item: Object) -> None:
            self.controller.queue.add_after(object_key(item), _DELAY_SECONDS)

        def added(obj: Object) -> None:
            for item in quotas_of(obj):
                if int(obj["metadata"]["resourceVersion"]) <= self._in_force(item):
                    wake(item)

        def updated(old: Object, new: Object) -> None:
            for item in quotas_of(new):
                if quota.frees(item, resource, old, new):
                    wake(item)

        def deleted(obj: Object) -> None:
            for item in quotas_of(obj):
                wake(item)

        informer.add_handler(added, updated, deleted)

    def _in_force(self, item: Object) -> float:
        """From which revision on admission charges what is created."""
        if (item.get("status") or {}).get("hard") != item["spec"].get("hard"):
            return math.inf
        return self._since.get(object_key(item), 0)

    async def _informer(self, resource: str) -> Informer | None:
        """Give the cache of counted objects, starting one on the first quota that asks for it."""
        known = self._informers.get(resource)
        if known is not None or resource in self._unknown:
            return known
        plural, _, group = resource.partition(".")
        candidates = [res for res in SCHEME.resources() if (res.plural, res.group) == (plural, group)]
        if not candidates:
            served, _ = await server_resources(self._ctx.client)
            candidates = [res for res in served if (res.plural, res.group) == (plural, group)]
        if not candidates or "list" not in candidates[0].verbs or not candidates[0].namespaced:
            self._unknown.add(resource)
            return None
        shared = self._ctx.shared_informer(candidates[0])
        informer = shared or self._ctx.informers.get(candidates[0], transform=trim_to_metadata)
        self._informers[resource] = informer
        self._follow(resource, informer)
        await self._ctx.informers.start()
        await informer.wait_synced()
        return informer

    async def _reconcile(self, key: str) -> Result | None:
        item = self._quotas.get_key(key)
        if item is None or podutil.is_deleting(item):
            self._since.pop(key, None)
            return None
        hard = item["spec"].get("hard") or {}
        status = item.get("status") or {}
        objects: dict[str, Iterable[Object]] = {}
        namespace = item["metadata"]["namespace"]
        for resource in {quota.group_resource(name) for name in hard}:
            informer = await self._informer(resource) if resource else None
            if informer is not None:
                objects[resource] = informer.list(namespace)
        before = status.get("used") or {}
        used = {name: value for name, value in before.items() if name in hard}
        used.update(quota.total_usage(item, objects))
        if not (_same(status.get("hard"), hard) and _same(before, used) and status.get("used") is not None):
            if not _same(status.get("hard"), hard):
                self._since[key] = math.inf
            done = await self._ctx.client.update(RESOURCE_QUOTAS, {**item, "status": {"hard": hard, "used": used}}, subresource="status")
            if key in self._since:
                self._since[key] = min(self._since[key], int(done["metadata"]["resourceVersion"]))
        return Result(self._resync)


def _same(left: Object | None, right: Object) -> bool:
    left = left or {}
    return left.keys() == right.keys() and all(quantity.compare(left[name], right[name]) == 0 for name in left)
