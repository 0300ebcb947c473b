"""ReplicaSet and ReplicationController: so many pods of one template, no more and no less.

One class serves both kinds, as upstream's does. Pods are counted from the cache; expectations
keep a stale cache from creating or deleting twice.
Source: pkg/controller/replicaset/replica_set.go, replica_set_utils.go, pkg/controller/replication.
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import PODS, REPLICA_SETS, REPLICATION_CONTROLLERS
from knarr.api.scheme import Resource
from knarr.api.selectors import NOTHING, LabelSelector, from_label_selector, from_map
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key, possibly_owned
from knarr.controllers.expectations import Expectations
from knarr.controllers.refs import Claims
from knarr.controllers.selectorcache import SelectorCache

log = get_logger(__name__)

_BURST = 500
_EMPTY: Object = {}


class ReplicaSetController:
    """Keeps the pods of all ReplicaSets (or ReplicationControllers)."""

    def __init__(self, ctx: Context, resource: Resource = REPLICA_SETS) -> None:
        component = "replicaset-controller" if resource is REPLICA_SETS else "replication-controller"
        self._ctx = ctx
        self._resource = resource
        self._sets = ctx.informer(resource)
        self._pods = ctx.pods
        self._recorder = ctx.recorder(component)
        self._control = podutil.PodControl(ctx.client, self._recorder)
        self._expectations = Expectations()
        self._selectors = SelectorCache(self._compile)
        name = "replicaset-controller" if resource is REPLICA_SETS else "replicationcontroller-controller"
        self.controller = Controller(name, self._reconcile, workers=10)
        self._sets.add_index("controller", _owner_uid)
        self._sets.add_handler(self._set_changed, lambda old, new: self._set_changed(new), self._set_deleted)
        self._pods.add_handler(self._pod_added, self._pod_updated, self._pod_deleted)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _set_changed(self, obj: Object) -> None:
        self.controller.queue.add(object_key(obj))

    def _set_deleted(self, obj: Object) -> None:
        key = object_key(obj)
        self._expectations.forget(key)
        self._selectors.forget(obj)
        self.controller.queue.add(key)

    def _owner(self, pod: Object) -> Object | None:
        reference = meta.controller_of(pod)
        if reference is None or reference["kind"] != self._resource.kind:
            return None
        owner = self._sets.get(pod["metadata"].get("namespace"), reference["name"])
        return owner if owner is not None and owner["metadata"]["uid"] == reference["uid"] else None

    def _pod_added(self, pod: Object) -> None:
        if podutil.is_deleting(pod):
            self._pod_deleted(pod)
            return
        if meta.controller_of(pod) is None:
            self._wake_matching(pod)
            return
        owner = self._owner(pod)
        if owner is not None:
            key = object_key(owner)
            self._expectations.created(key)
            self.controller.queue.add(key)

    def _pod_updated(self, old: Object, new: Object) -> None:
        if podutil.is_deleting(new):
            self._pod_deleted(new)
            return
        old_ref, new_ref = meta.controller_of(old), meta.controller_of(new)
        if old_ref != new_ref and old_ref is not None and (owner := self._owner(old)) is not None:
            self.controller.queue.add(object_key(owner))
        if new_ref is not None:
            owner = self._owner(new)
            if owner is None:
                return
            self.controller.queue.add(object_key(owner))
            min_ready = owner["spec"].get("minReadySeconds") or 0
            if min_ready and podutil.is_ready(new) and not podutil.is_ready(old):
                self.controller.queue.add_after(object_key(owner), min_ready)
        elif old_ref != new_ref or old["metadata"].get("labels") != new["metadata"].get("labels"):
            self._wake_matching(new)

    def _pod_deleted(self, pod: Object) -> None:
        owner = self._owner(pod)
        if owner is not None:
            key = object_key(owner)
            self._expectations.deleted(key, object_key(pod))
            self.controller.queue.add(key)

    def _wake_matching(self, pod: Object) -> None:
        labels = pod["metadata"].get("labels")
        if not labels:
            return
        for candidate in self._sets.list(pod["metadata"].get("namespace")):
            if self._selector(candidate).matches(labels):
                self.controller.queue.add(object_key(candidate))

    def _selector(self, obj: Object) -> LabelSelector:
        return self._selectors.get(obj, obj["spec"].get("selector"))

    def _compile(self, source: Object | None) -> LabelSelector:
        selector = from_label_selector(source) if self._resource is REPLICA_SETS else from_map(source)
        # An empty selector selects nothing here: it could only be a mistake.
        return NOTHING if selector.empty else selector

    # Reconcile

    async def _reconcile(self, key: str) -> Result | None:
        rs = self._sets.get_key(key)
        if rs is None:
            self._expectations.forget(key)
            return None
        needs_sync = self._expectations.satisfied(key)
        selector = self._selector(rs)
        candidates = possibly_owned(self._pods, rs)
        active = [pod for pod in candidates if podutil.is_active(pod)]
        pods = await Claims(self._ctx.client, PODS, rs, self._resource, selector).claim(active)
        failure: Exception | None = None
        if needs_sync and not podutil.is_deleting(rs):
            failure = await self._manage(key, rs, pods)
        now = clock.now()
        status = _status(rs, pods, failure, now)
        await self._write_status(rs, status)
        if failure is not None:
            raise failure
        min_ready = rs["spec"].get("minReadySeconds") or 0
        if min_ready and status.get("readyReplicas", 0) != status.get("availableReplicas", 0):
            return Result(podutil.next_availability_seconds(pods, min_ready, now) or float(min_ready))
        return None

    async def _manage(self, key: str, rs: Object, pods: list[Object]) -> Exception | None:
        difference = len(pods) - _replicas(rs)
        if difference < 0:
            return await self._create(key, rs, min(-difference, _BURST))
        if difference > 0:
            return await self._delete(key, rs, pods, min(difference, _BURST))
        return None

    async def _create(self, key: str, rs: Object, count: int) -> Exception | None:
        namespace = rs["metadata"]["namespace"]
        reference = meta.new_controller_ref(rs, self._resource.api_version, self._resource.kind)
        self._expectations.expect(key, count)

        async def create(_: int) -> None:
            try:
                await self._control.create(podutil.pod_from_template(rs["spec"].get("template") or {}, rs, reference), namespace, rs)
            except StatusError as error:
                # Nothing can be created any more; the expectation runs out with the namespace.
                if not errors.is_namespace_terminating(error):
                    raise

        successes, failure = await podutil.slow_start(count, create)
        for _ in range(count - successes):
            self._expectations.created(key)
        return failure

    async def _delete(self, key: str, rs: Object, pods: list[Object], count: int) -> Exception | None:
        if count < len(pods):
            pods = podutil.sort_for_deletion(pods, self._related_pods(rs))
        doomed = pods[:count]
        self._expectations.expect(key, 0, {object_key(pod) for pod in doomed})

        async def delete(pod: Object) -> None:
            try:
                await self._control.delete(pod["metadata"]["name"], pod["metadata"]["namespace"], rs)
            except Exception as error:
                self._expectations.deleted(key, object_key(pod))
                if not errors.is_not_found(error):
                    raise

        try:
            await podutil.gather_all([delete(pod) for pod in doomed])
        except Exception as error:
            return error
        return None

    def _related_pods(self, rs: Object) -> list[Object]:
        """Pods of all sets with the same controller, so that a rollout spreads over nodes."""
        reference = meta.controller_of(rs)
        if reference is None:
            return []
        others = self._sets.by_index("controller", reference["uid"])
        return [pod for other in others for pod in self._pods.by_index("controller", other["metadata"]["uid"])]

    async def _write_status(self, rs: Object, status: Object) -> None:
        old = rs.get("status") or {}
        generation = rs["metadata"].get("generation") or 0
        counts = ("replicas", "fullyLabeledReplicas", "readyReplicas", "availableReplicas")
        if (
            all((old.get(name) or 0) == (status.get(name) or 0) for name in counts)
            and (old.get("observedGeneration") or 0) == generation
            and (old.get("conditions") or []) == (status.get("conditions") or [])
        ):
            return
        status["observedGeneration"] = generation
        changed = {**rs, "status": status}
        try:
            await self._ctx.client.update(self._resource, changed, subresource="status")
        except StatusError as error:
            if not errors.is_conflict(error):
                raise
            fresh = await self._ctx.client.get(self._resource, rs["metadata"]["name"], rs["metadata"]["namespace"])
            fresh["status"] = status
            await self._ctx.client.update(self._resource, fresh, subresource="status")


def _owner_uid(obj: Object) -> list[str]:
    reference = meta.controller_of(obj)
    return [reference["uid"]] if reference is not None else []


def _replicas(rs: Object) -> int:
    value = rs["spec"].get("replicas")
    return 1 if value is None else int(value)


def _status(rs: Object, pods: list[Object], failure: Exception | None, now: float) -> Object:
    spec = rs["spec"]
    wanted = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
    min_ready = spec.get("minReadySeconds") or 0
    labelled = ready = available = 0
    # Informers keep equal labels and conditions of many pods once: each is looked at once.
    has_labels: dict[int, bool] = {}
    are_ready: dict[int, bool] = {}
    for pod in pods:
        labels = pod["metadata"].get("labels") or _EMPTY
        fully = has_labels.get(id(labels))
        if fully is None:
            fully = has_labels[id(labels)] = all(labels.get(name) == value for name, value in wanted.items())
        labelled += fully
        conditions = (pod.get("status") or _EMPTY).get("conditions")
        is_ready = are_ready.get(id(conditions))
        if is_ready is None:
            is_ready = are_ready[id(conditions)] = podutil.is_ready(pod)
        if is_ready:
            ready += 1
            if not min_ready or podutil.is_available(pod, min_ready, now):
                available += 1
    old = rs.get("status") or {}
    status: Object = {"replicas": len(pods)}
    for name, value in (("fullyLabeledReplicas", labelled), ("readyReplicas", ready), ("availableReplicas", available)):
        if value:
            status[name] = value
    if old.get("observedGeneration"):
        status["observedGeneration"] = old["observedGeneration"]
    conditions = list(old.get("conditions") or ())
    failed = meta.get_condition(conditions, "ReplicaFailure")
    if failure is not None and failed is None:
        reason = "FailedCreate" if len(pods) < _replicas(rs) else "FailedDelete"
        conditions.append(
            {
                "type": "ReplicaFailure",
                "status": "True",
                "reason": reason,
                "message": str(failure),
                "lastTransitionTime": clock.now_rfc3339(),
            }
        )
    elif failure is None and failed is not None:
        conditions = [item for item in conditions if item.get("type") != "ReplicaFailure"]
    if conditions:
        status["conditions"] = conditions
    return status


def replication_controllers(ctx: Context) -> ReplicaSetController:
    """Make the controller of ReplicationControllers."""
    return ReplicaSetController(ctx, REPLICATION_CONTROLLERS)
