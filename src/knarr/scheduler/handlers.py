"""Event handlers: what the API server tells, told to the node table, the objects and the queue.

Holds which pods are placed (`placed`) and which of those are only assumed. An assumed pod stays
so until the server shows it bound, its binding fails, or it is deleted.

Source: pkg/scheduler/eventhandlers.go, backend/cache/cache.go.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from knarr.api import resources
from knarr.api.scheme import Resource
from knarr.client.informer import Informers
from knarr.client.leanpods import lean_pod
from knarr.client.slicetracker import SliceTracker
from knarr.scheduler.config import ExtenderConfig
from knarr.scheduler.events import (
    ASSIGNED_POD_ADD,
    ASSIGNED_POD_DELETE,
    NODE_ADD,
    NODE_DELETE,
    Action,
    ClusterEvent,
    node_changes,
    pod_changes,
)
from knarr.scheduler.podinfo import Pod, PodInfo

if TYPE_CHECKING:
    from knarr.scheduler.scheduler import Scheduler

Object = dict[str, Any]

NOT_FINISHED = "status.phase!=Succeeded,status.phase!=Failed"


def pod_transform(extenders: Sequence[ExtenderConfig]) -> Callable[[Object], Object]:
    """What is dropped of pods: what upstream drops, too, as far as extenders see them."""
    if not extenders:
        return lean_pod
    victims_too = any(extender.preempt_verb and not extender.node_cache_capable for extender in extenders)

    def keep(pod: Object) -> Object:
        if pod["spec"].get("nodeName") and not victims_too:
            return lean_pod(pod)
        pod["metadata"].pop("managedFields", None)
        return pod

    return keep


def _slim_workload(obj: Object) -> Object:
    """Of workloads and Services only the selector counts."""
    metadata = obj["metadata"]
    return {
        "apiVersion": obj.get("apiVersion"),
        "kind": obj.get("kind"),
        "metadata": {key: metadata[key] for key in ("name", "namespace", "uid", "resourceVersion") if key in metadata},
        "spec": {"selector": (obj.get("spec") or {}).get("selector")},
    }


def _slim_namespace(obj: Object) -> Object:
    metadata = obj["metadata"]
    return {"metadata": {key: metadata[key] for key in ("name", "uid", "resourceVersion", "labels") if key in metadata}}


def _selector_changed(old: Object, new: Object) -> bool:
    return bool(old["spec"]["selector"] != new["spec"]["selector"])


def _labels_changed(old: Object, new: Object) -> bool:
    return bool(old["metadata"].get("labels") != new["metadata"].get("labels"))


class EventHandlers:
    """See the module."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._handle = scheduler.handle
        self._table = scheduler.handle.table
        self._queue = scheduler.queue
        self.placed: dict[str, PodInfo] = {}
        self.assumed: set[str] = set()
        self._pending: dict[str, PodInfo] = {}

    def register(self, informers: Informers) -> None:
        """Put the handlers on all informers that scheduling needs."""
        pods = informers.get(resources.PODS, field_selector=NOT_FINISHED, transform=self._scheduler.pod_transform)
        pods.add_handler(self.pod_added, self.pod_updated, self.pod_deleted)
        informers.get(resources.NODES).add_handler(self.node_added, self.node_updated, self.node_deleted)
        for resource in (resources.SERVICES, resources.REPLICATION_CONTROLLERS, resources.REPLICA_SETS, resources.STATEFUL_SETS):
            self._watch(informers, resource, _slim_workload, _selector_changed)
        self._watch(informers, resources.NAMESPACES, _slim_namespace, _labels_changed)
        for resource in (
            resources.POD_DISRUPTION_BUDGETS,
            resources.PERSISTENT_VOLUME_CLAIMS,
            resources.PERSISTENT_VOLUMES,
            resources.STORAGE_CLASSES,
            resources.CSI_NODES,
            resources.CSI_DRIVERS,
            resources.CSI_STORAGE_CAPACITIES,
            resources.VOLUME_ATTACHMENTS,
        ):
            self._watch(informers, resource, None, None)
        claims, slices = self._handle.claims, self._handle.slices
        self._watch(informers, resources.DEVICE_CLASSES, None, None)
        self._watch_own(informers, resources.RESOURCE_CLAIMS, claims.set, claims.remove)
        if not self._handle.feature_gates.get("DRADeviceTaints"):
            self._watch_own(informers, resources.RESOURCE_SLICES, slices.set, slices.remove)
            return
        # Rules need not be served: their informer is another, that nobody waits for.
        rules = self._scheduler.optional_informers.get(resources.DEVICE_TAINT_RULES)
        found = informers.get(resources.RESOURCE_SLICES)
        SliceTracker(found, rules, informers.get(resources.DEVICE_CLASSES), self._slice_changed)

    def _slice_changed(self, old: Object | None, new: Object | None) -> None:
        """A slice with the taints of rules."""
        if new is not None:
            self._handle.slices.set(new)
            self._queue.move(ClusterEvent("ResourceSlice", Action.ADD if old is None else Action.UPDATE_OTHER), old, new)
        elif old is not None:
            self._handle.slices.remove(old)
            self._queue.move(ClusterEvent("ResourceSlice", Action.DELETE), old, None)

    def _watch_own(self, informers: Informers, resource: Resource, put: Callable[[Object], None], take: Callable[[Object], None]) -> None:
        """Objects that have a holder of their own."""
        queue = self._queue
        added, updated, deleted = (ClusterEvent(resource.kind, action) for action in (Action.ADD, Action.UPDATE_OTHER, Action.DELETE))

        def on_add(obj: Object) -> None:
            put(obj)
            queue.move(added, None, obj)

        def on_update(old: Object, new: Object) -> None:
            put(new)
            queue.move(updated, old, new)

        def on_delete(obj: Object) -> None:
            take(obj)
            queue.move(deleted, obj, None)

        informers.get(resource).add_handler(on_add, on_update, on_delete)

    def _watch(
        self,
        informers: Informers,
        resource: Resource,
        transform: Callable[[Object], Object] | None,
        matters: Callable[[Object, Object], bool] | None,
    ) -> None:
        kind, objects, queue = resource.kind, self._handle.objects, self._queue
        is_volume = kind in ("PersistentVolume", "PersistentVolumeClaim")
        added, updated, deleted = (ClusterEvent(kind, action) for action in (Action.ADD, Action.UPDATE_OTHER, Action.DELETE))

        def on_add(obj: Object) -> None:
            objects.set(kind, obj)
            if is_volume:
                self._scheduler.volume_writer.changed()
            queue.move(added, None, obj)

        def on_update(old: Object, new: Object) -> None:
            objects.set(kind, new, matters=matters is None or matters(old, new))
            if is_volume:
                self._scheduler.volume_writer.changed()
            queue.move(updated, old, new)

        def on_delete(obj: Object) -> None:
            objects.remove(kind, obj)
            if is_volume:
                self._scheduler.volume_writer.changed()
            queue.move(deleted, obj, None)

        informers.get(resource, transform=transform).add_handler(on_add, on_update, on_delete)

    # Pods.

    def pending(self, uid: str) -> PodInfo | None:
        """Give the pod as last seen if it still exists without a node."""
        return self._pending.get(uid)

    def pod_added(self, pod: Pod) -> None:
        if pod["spec"].get("nodeName"):
            self._assigned(pod, None)
        elif (pod["spec"].get("schedulerName") or "default-scheduler") in self._scheduler.profiles:
            info = PodInfo(pod, self._handle.shapes)
            self._pending[info.uid] = info
            self._queue.add(info)

    def pod_updated(self, old: Pod, new: Pod) -> None:
        if (new.get("status") or {}).get("phase") in ("Succeeded", "Failed"):
            self.pod_deleted(new)
            return
        if new["spec"].get("nodeName"):
            self._assigned(new, old)
            return
        if old["metadata"].get("resourceVersion") == new["metadata"].get("resourceVersion"):
            return
        uid = new["metadata"]["uid"]
        if (new["spec"].get("schedulerName") or "default-scheduler") not in self._scheduler.profiles or uid in self.assumed:
            return
        info = PodInfo(new, self._handle.shapes)
        self._pending[uid] = info
        nominated_before = (old.get("status") or {}).get("nominatedNodeName") or ""
        self._queue.update(info, old)
        if nominated_before and nominated_before != info.nominated_node:
            # The place it had counted on is free for pods that matter no more than it does.
            self._queue.move(ASSIGNED_POD_DELETE, old, None, only=lambda other: other.priority <= info.priority)

    def _assigned(self, pod: Pod, old: Pod | None) -> None:
        """The server shows a pod on a node: new to us, assumed by us, or changed."""
        uid = pod["metadata"]["uid"]
        info = self.placed.get(uid)
        was_assumed = uid in self.assumed
        if info is None:
            info = PodInfo(pod, self._handle.shapes)
            self._table.add_pod(info, info.node_name)
            self.placed[uid] = info
            self._pending.pop(uid, None)
            self._queue.delete(uid)
            self._queue.move(ASSIGNED_POD_ADD, None, pod)
            return
        self.assumed.discard(uid)
        if was_assumed:
            self._pending.pop(uid, None)
        same_place = info.node_name == pod["spec"]["nodeName"]
        if same_place and info.deleting == ("deletionTimestamp" in pod["metadata"]) and _same_shape(info.pod, pod):
            info.set_pod(pod)
        else:
            self._table.remove_pod(info)
            info = self.placed[uid] = PodInfo(pod, self._handle.shapes)
            self._table.add_pod(info, info.node_name)
        if was_assumed:
            # Only now may others count on the pod being there: a binding can fail.
            self._queue.move(ASSIGNED_POD_ADD, None, pod)
        elif old is not None:
            for event in pod_changes(old, pod):
                self._queue.move(event, old, pod)

    def pod_deleted(self, pod: Pod) -> None:
        uid = pod["metadata"]["uid"]
        self._pending.pop(uid, None)
        info = self.placed.pop(uid, None)
        self.assumed.discard(uid)
        self._scheduler.diagnoses.forget(uid)
        self._scheduler.handle.preemption_ended(uid)
        nominated = self._queue.nominator.node_of(uid)
        self._queue.delete(uid)
        if info is not None:
            self._table.remove_pod(info)
            gone = info.pod if not pod["spec"].get("nodeName") else pod
            if not gone["spec"].get("nodeName"):
                gone = {**gone, "spec": {**gone["spec"], "nodeName": info.node_name}}
            self._queue.move(ASSIGNED_POD_DELETE, gone, None)
        elif nominated:
            priority = pod["spec"].get("priority") or 0
            self._queue.move(ASSIGNED_POD_DELETE, pod, None, only=lambda other: other.priority <= priority)

    def assume(self, info: PodInfo, node_name: str) -> None:
        """Count a pod as placed before its binding is written."""
        self._table.add_pod(info, node_name)
        self.placed[info.uid] = info
        self.assumed.add(info.uid)

    def forget(self, info: PodInfo) -> None:
        """Take an assumption back, unless the server has confirmed it or the pod is gone."""
        if info.uid in self.assumed:
            self.assumed.discard(info.uid)
            del self.placed[info.uid]
            self._table.remove_pod(info)
            info.node_name = ""

    # Nodes.

    def node_added(self, node: Object) -> None:
        self._table.set_node(node)
        self._queue.move(NODE_ADD, None, node)

    def node_updated(self, old: Object, new: Object) -> None:
        self._table.set_node(new)
        for event in node_changes(old, new):
            self._queue.move(event, old, new)

    def node_deleted(self, node: Object) -> None:
        self._table.remove_node(node["metadata"]["name"])
        self._queue.move(NODE_DELETE, node, None)


def _same_shape(old: Pod, new: Pod) -> bool:
    """Cheap and safe: False only costs building the shape again."""
    before, after = old["metadata"], new["metadata"]
    if before.get("generation") != after.get("generation") or before.get("labels") != after.get("labels"):
        return False
    return _resources(old) == _resources(new)


def _resources(pod: Pod) -> list[Any]:
    statuses = (pod.get("status") or {}).get("containerStatuses")
    if not statuses:
        return []
    return [(s.get("resources"), s.get("allocatedResources")) for s in statuses if s.get("resources")]
