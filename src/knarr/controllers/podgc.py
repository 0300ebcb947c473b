"""Pod garbage collection: pods that nobody else will ever remove.

Those of nodes that are gone (after a while, in case the cache is wrong), those that were being
deleted before they got a node, those on nodes declared out of service, and finished ones beyond
a limit. Work starts from events; nothing runs while nothing is wrong.
Source: pkg/controller/podgc/gc_controller.go.
"""

from __future__ import annotations

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import NODES, PODS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil, taints
from knarr.controllers.context import Context, object_key
from knarr.controllers.tainteviction import disruption_condition

log = get_logger(__name__)

_QUARANTINE_SECONDS = 40.0
_TERMINATED = "#terminated"
_NODE = "#node/"


class PodGCController:
    """Force-deletes pods without a future. Keys: a pod, "#node/<name>" for a lost node, "#terminated"."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._threshold = ctx.config.terminated_pod_gc_threshold
        self._period = ctx.config.pod_gc_period_seconds
        self._nodes = ctx.nodes
        self._pods = ctx.pods
        self._finished: set[str] = set()
        self._lost: set[str] = set()
        self.controller = Controller("pod-garbage-collector-controller", self._reconcile)
        self._pods.add_handler(self._pod_changed, lambda old, new: self._pod_changed(new), self._pod_deleted)
        self._nodes.add_handler(self._node_changed, lambda old, new: self._node_changed(new), self._node_deleted)

    async def run(self) -> None:
        await self.controller.run()

    def _pod_changed(self, pod: Object) -> None:
        key = object_key(pod)
        node_name = pod["spec"].get("nodeName")
        if podutil.is_finished(pod) and key not in self._finished:
            self._finished.add(key)
            if self._threshold > 0 and len(self._finished) > self._threshold:
                self.controller.queue.add_after(_TERMINATED, self._period)
        if podutil.is_deleting(pod):
            if not node_name:
                self.controller.queue.add(key)
            elif (node := self._nodes.get(None, node_name)) is not None and _out_of_service(node):
                self.controller.queue.add(key)
        if node_name and node_name not in self._lost and self._nodes.get(None, node_name) is None:
            self._lost.add(node_name)
            self.controller.queue.add_after(_NODE + node_name, _QUARANTINE_SECONDS)

    def _pod_deleted(self, pod: Object) -> None:
        self._finished.discard(object_key(pod))

    def _node_changed(self, node: Object) -> None:
        self._lost.discard(node["metadata"]["name"])
        if _out_of_service(node):
            for pod in self._pods.by_index("node", node["metadata"]["name"]):
                if podutil.is_deleting(pod):
                    self.controller.queue.add(object_key(pod))

    def _node_deleted(self, node: Object) -> None:
        name = node["metadata"]["name"]
        if self._pods.by_index("node", name):
            self._lost.add(name)
            self.controller.queue.add_after(_NODE + name, _QUARANTINE_SECONDS)

    async def _reconcile(self, key: str) -> Result | None:
        if key == _TERMINATED:
            await self._collect_finished()
        elif key.startswith(_NODE):
            return await self._collect_lost(key.removeprefix(_NODE))
        else:
            await self._collect_terminating(key)
        return None

    async def _collect_finished(self) -> None:
        pods = [pod for key in self._finished if (pod := self._pods.get_key(key)) is not None]
        excess = len(pods) - self._threshold
        if self._threshold <= 0 or excess <= 0:
            return
        pods.sort(key=lambda pod: (not _is_evicted(pod), podutil.created_at(pod), pod["metadata"]["name"]))
        log.info("deleting finished pods beyond the limit", count=excess)
        await podutil.gather_all([self._fail_and_delete(pod, None) for pod in pods[:excess]])

    async def _collect_lost(self, name: str) -> Result | None:
        if self._nodes.get(None, name) is not None:
            self._lost.discard(name)
            return None
        try:
            await self._client.get(NODES, name)
            return Result(self._period)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
        for pod in self._pods.by_index("node", name):
            condition = disruption_condition(pod, "DeletionByPodGC", "PodGC: node no longer exists")
            await self._fail_and_delete(pod, condition)
        self._lost.discard(name)
        return None

    async def _collect_terminating(self, key: str) -> None:
        pod = self._pods.get_key(key)
        if pod is None or not podutil.is_deleting(pod):
            return
        node_name = pod["spec"].get("nodeName")
        node = self._nodes.get(None, node_name or "")
        if not node_name or (node is not None and _out_of_service(node)):
            await self._fail_and_delete(pod, None)

    async def _fail_and_delete(self, pod: Object, condition: Object | None) -> None:
        name, namespace = pod["metadata"]["name"], pod["metadata"]["namespace"]
        try:
            if not podutil.is_finished(pod):
                status: Object = {"phase": "Failed"}
                if condition is not None:
                    status["conditions"] = [condition]
                patch = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": status}
                await self._client.patch(PODS, name, namespace, patch, type="strategic", subresource="status")
            await self._client.delete(PODS, name, namespace, grace_period_seconds=0, uid=pod["metadata"]["uid"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise


def _is_evicted(pod: Object) -> bool:
    status = pod.get("status") or {}
    return status.get("phase") == "Failed" and status.get("reason") == "Evicted"


def _out_of_service(node: Object) -> bool:
    present = any(taint.get("key") == taints.OUT_OF_SERVICE for taint in taints.of_node(node))
    return present and not podutil.is_ready(node)
