"""ResourceQuota: what is used, counted anew whenever something is freed.

Admission charges what is created; this controller gives back what ended, and corrects both.
Source: pkg/controller/resourcequota/resource_quota_controller.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

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
# Admission writes the same status at the moment of creation; let it be first.
_DELAY_SECONDS = 0.1


class ResourceQuotaController:
    """Keeps status.used of every ResourceQuota."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._quotas = ctx.informer(RESOURCE_QUOTAS)
        self._resync = ctx.config.quota_resync_seconds
        self._informers: dict[str, Informer] = {name: ctx.informer(res) for name, res in _SHARED.items()}
        self._unknown: set[str] = set()
        self.controller = Controller("resourcequota-controller", self._reconcile, workers=5)
        self._quotas.add_handler(self._changed, self._updated)
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
        wake = self._waker(resource)
        informer.add_handler(wake, self._update_waker(resource, wake), wake)

    def _waker(self, resource: str) -> Callable[[Object], None]:
        def wake(obj: Object) -> None:
            for item in self._quotas.list(obj["metadata"].get("namespace") or "-"):
                if any(quota.group_resource(name) == resource for name in item["spec"].get("hard") or ()):
                    self.controller.queue.add_after(object_key(item), _DELAY_SECONDS)

        return wake

    @staticmethod
    def _update_waker(resource: str, wake: Callable[[Object], None]) -> Callable[[Object, Object], None]:
        def update(old: Object, new: Object) -> None:
            if resource == "pods":
                if podutil.is_finished(old) == podutil.is_finished(new) and old["spec"] == new["spec"]:
                    return
            elif resource == "resourcequotas" or old.get("spec") == new.get("spec"):
                return
            wake(new)

        return update

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
            await self._ctx.client.update(RESOURCE_QUOTAS, {**item, "status": {"hard": hard, "used": used}}, subresource="status")
        return Result(self._resync)


def _same(left: Object | None, right: Object) -> bool:
    left = left or {}
    return left.keys() == right.keys() and all(quantity.compare(left[name], right[name]) == 0 for name in left)
