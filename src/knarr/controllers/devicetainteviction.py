"""Device taint eviction: pods leave devices with NoExecute taints that their claims do not tolerate (any longer).

Runs behind the gate DRADeviceTaints. When a pod has to go follows from its allocated claims, the taints of their devices (the
drivers' and those of DeviceTaintRules), and the tolerations written down with the allocation.
Source: pkg/controller/devicetainteviction.
"""

from __future__ import annotations

from collections.abc import Iterator

from knarr.aiokits import clock
from knarr.api.devices import tolerates
from knarr.api.resources import DEVICE_CLASSES, DEVICE_TAINT_RULES, RESOURCE_CLAIMS, RESOURCE_SLICES
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.informer import Informers
from knarr.client.slicetracker import SliceTracker
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key
from knarr.controllers.resourceclaim import claim_name, claims_of, is_of
from knarr.controllers.tainteviction import disruption_condition, evict, reference

NAME = "device-taint-eviction-controller"
_Pool = tuple[str, str]


class DeviceTaintEvictionController:
    """Keys are pods, "namespace/name"."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._pods = ctx.pods
        self._claims = ctx.informer(RESOURCE_CLAIMS)
        # Its own, since the kind need not be served: nobody waits for it.
        self._optional = Informers(ctx.client)
        self._recorder = ctx.recorder(NAME)
        self._pools: dict[_Pool, dict[str, Object]] = {}
        """By pool: slices as the tracker shows them, by name."""
        self._evictions: dict[str, str] = {}
        """Pods that are to be evicted at some time, with their uid."""
        self.controller = Controller(NAME, self._reconcile, workers=8)
        self._pods.add_index("resourceclaims", claims_of)
        self._claims.add_index("devicepool", _pools_of)
        self._pods.add_handler(self._pod_added, self._pod_updated, self._pod_deleted)
        self._claims.add_handler(self._claim_changed, lambda _, new: self._claim_changed(new), self._claim_changed)
        rules = self._optional.get(DEVICE_TAINT_RULES)
        SliceTracker(ctx.informer(RESOURCE_SLICES), rules, ctx.informer(DEVICE_CLASSES), self._slice_changed, self._failed)

    async def run(self) -> None:
        try:
            await self._optional.start()
            await self.controller.run()
        finally:
            await self._optional.close()

    # Events

    def _pod_added(self, pod: Object) -> None:
        if pod["spec"].get("resourceClaims"):
            self.controller.queue.add(object_key(pod))

    def _pod_updated(self, old: Object, new: Object) -> None:
        before, after = ((pod["spec"].get("nodeName"), (pod.get("status") or {}).get("resourceClaimStatuses")) for pod in (old, new))
        if before != after or old["metadata"]["uid"] != new["metadata"]["uid"]:
            self._pod_added(new)

    def _pod_deleted(self, pod: Object) -> None:
        self._evictions.pop(object_key(pod), None)

    def _claim_changed(self, claim: Object) -> None:
        for pod in self._pods.by_index("resourceclaims", object_key(claim)):
            self.controller.queue.add(object_key(pod))

    def _slice_changed(self, old: Object | None, new: Object | None) -> None:
        # A slice never changes its driver or pool.
        pool = _pool_of(new or old or {})
        before = self._taints(pool)
        held = self._pools.setdefault(pool, {})
        if old is not None:
            held.pop(old["metadata"]["name"], None)
        if new is not None:
            held[new["metadata"]["name"]] = new
        if not held:
            del self._pools[pool]
        if self._taints(pool) != before:
            for claim in self._claims.by_index("devicepool", "/".join(pool)):
                self._claim_changed(claim)

    def _failed(self, rule: Object, problem: str) -> None:
        self._recorder.event(rule, "Warning", "CELRuntimeError", problem)

    # Taints

    def _taints(self, pool: _Pool) -> dict[str, list[Object]]:
        """The NoExecute taints of a pool's devices, by device, out of its newest slices."""
        slices = self._pools.get(pool, {}).values()
        newest = max((_generation(one) for one in slices), default=0)
        found: dict[str, list[Object]] = {}
        for one in slices:
            if _generation(one) == newest:
                for device in one["spec"].get("devices") or ():
                    taints = [taint for taint in device.get("taints") or () if taint.get("effect") == "NoExecute"]
                    if taints:
                        found.setdefault(device["name"], taints)
        return found

    def _claim_due(self, claim: Object) -> float | None:
        """When pods that use a claim have to go; None: never, as things are."""
        due = None
        for result in _results(claim):
            for taint in self._taints((result["driver"], result["pool"])).get(result["device"], ()):
                at = _end_of(taint, result.get("tolerations") or [])
                if at is not None and (due is None or at < due):
                    due = at
        return due

    def _pod_due(self, pod: Object) -> float | None:
        if not pod["spec"].get("nodeName") or podutil.is_finished(pod):
            return None
        meta = pod["metadata"]
        due = None
        for entry in pod["spec"].get("resourceClaims") or ():
            name, own = claim_name(pod, entry)
            claim = self._claims.get(meta["namespace"], name) if name else None
            if claim is None or (own and not is_of(pod, claim)) or not _reserved(claim, meta["uid"]):
                continue
            at = self._claim_due(claim)
            if at is not None and (due is None or at < due):
                due = at
        return due

    async def _reconcile(self, key: str) -> Result | None:
        pod = self._pods.get_key(key)
        if pod is None:
            self._evictions.pop(key, None)
            return None
        uid = pod["metadata"]["uid"]
        due = self._pod_due(pod)
        if due is None or "deletionTimestamp" in pod["metadata"]:
            if self._evictions.pop(key, None) == uid and due is None:
                self._recorder.event(reference(pod), "Normal", "DeviceTaintManagerEviction", "Cancelling deletion")
            return None
        self._evictions[key] = uid
        left = due - clock.now()
        if left > 0:
            return Result(left)
        self._recorder.event(reference(pod), "Normal", "DeviceTaintManagerEviction", "Marking for deletion")
        why = "Device Taint manager: deleting due to NoExecute taint"
        await evict(self._client, pod, disruption_condition(pod, "DeletionByDeviceTaintManager", why))
        self._evictions.pop(key, None)
        return None


def _end_of(taint: Object, tolerations: list[Object]) -> float | None:
    """When a taint is not tolerated any more; None: it always is."""
    added = clock.parse_rfc3339(taint["timeAdded"]) if taint.get("timeAdded") else clock.now()
    seconds: list[int] = []
    for toleration in tolerations:
        if toleration.get("effect") == "NoExecute" and tolerates(toleration, taint):
            if toleration.get("tolerationSeconds") is None:
                return None
            seconds.append(max(0, toleration["tolerationSeconds"]))
    return added + min(seconds, default=0)


def _results(claim: Object) -> list[Object]:
    allocation = (claim.get("status") or {}).get("allocation") or {}
    return (allocation.get("devices") or {}).get("results") or []


def _pools_of(claim: Object) -> Iterator[str]:
    yield from {f"{result['driver']}/{result['pool']}" for result in _results(claim)}


def _reserved(claim: Object, uid: str) -> bool:
    users = (claim.get("status") or {}).get("reservedFor") or ()
    return any(user.get("uid") == uid for user in users)


def _pool_of(obj: Object) -> _Pool:
    spec = obj["spec"]
    return spec.get("driver") or "", (spec.get("pool") or {}).get("name") or ""


def _generation(obj: Object) -> int:
    return (obj["spec"].get("pool") or {}).get("generation") or 0
