"""Taint eviction: pods leave nodes with NoExecute taints that they do not tolerate (any longer).

Source: pkg/controller/tainteviction/taint_eviction.go.
"""

from __future__ import annotations

from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import PODS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.rest import Client
from knarr.controllers import taints
from knarr.controllers.context import Context, object_key


@dataclass(slots=True)
class _Eviction:
    started: float
    due: float


class TaintEvictionController:
    """Deletes pods when their toleration of a node's taints ends."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._nodes = ctx.nodes
        self._pods = ctx.pods
        self._recorder = ctx.recorder("taint-eviction-controller")
        self._evictions: dict[str, _Eviction] = {}
        self.controller = Controller("taint-eviction-controller", self._reconcile, workers=8)
        self._nodes.add_handler(self._node_changed, self._node_updated)
        self._pods.add_handler(self._pod_changed, self._pod_updated, self._pod_deleted)

    async def run(self) -> None:
        await self.controller.run()

    def _node_changed(self, node: Object) -> None:
        if _no_execute(node):
            self._wake_pods(node)

    def _node_updated(self, old: Object, new: Object) -> None:
        if _no_execute(old) != _no_execute(new):
            self._wake_pods(new)

    def _wake_pods(self, node: Object) -> None:
        for pod in self._pods.by_index("node", node["metadata"]["name"]):
            self.controller.queue.add(object_key(pod))

    def _pod_changed(self, pod: Object) -> None:
        node = self._nodes.get(None, pod["spec"].get("nodeName", ""))
        if node is not None and _no_execute(node):
            self.controller.queue.add(object_key(pod))

    def _pod_updated(self, old: Object, new: Object) -> None:
        before, after = old["spec"], new["spec"]
        if before.get("nodeName") != after.get("nodeName") or before.get("tolerations") != after.get("tolerations"):
            self._pod_changed(new)

    def _pod_deleted(self, pod: Object) -> None:
        if self._evictions.pop(object_key(pod), None) is not None:
            self._cancelled(pod)

    def _cancelled(self, pod: Object) -> None:
        self._recorder.event(reference(pod), "Normal", "TaintManagerEviction", f"Cancelling deletion of Pod {object_key(pod)}")

    async def _reconcile(self, key: str) -> Result | None:
        pod = self._pods.get_key(key)
        if pod is None:
            self._evictions.pop(key, None)
            return None
        node = self._nodes.get(None, pod["spec"].get("nodeName", ""))
        delay = _tolerated_seconds(_no_execute(node) if node is not None else [], pod["spec"].get("tolerations") or [])
        if delay is None:
            if self._evictions.pop(key, None) is not None:
                self._cancelled(pod)
            return None
        now = clock.now()
        eviction = self._evictions.get(key)
        if eviction is None:
            eviction = self._evictions[key] = _Eviction(now, now + delay)
        # A changed toleration counts from the start of the taint; none at all means now.
        eviction.due = eviction.started + delay if delay > 0 else min(eviction.due, now)
        if eviction.due > now:
            return Result(eviction.due - now)
        await self._evict(pod)
        self._evictions.pop(key, None)
        return None

    async def _evict(self, pod: Object) -> None:
        if "deletionTimestamp" in pod["metadata"]:
            return
        self._recorder.event(reference(pod), "Normal", "TaintManagerEviction", f"Marking for deletion Pod {object_key(pod)}")
        condition = disruption_condition(pod, "DeletionByTaintManager", "Taint manager: deleting due to NoExecute taint")
        await evict(self._client, pod, condition)


async def evict(client: Client, pod: Object, condition: Object) -> None:
    """Write down why a pod goes, and delete it; one that has gone or been replaced meanwhile is left alone. Raises StatusError."""
    meta = pod["metadata"]
    patch = {"metadata": {"uid": meta["uid"]}, "status": {"conditions": [condition]}}
    try:
        await client.patch(PODS, meta["name"], meta["namespace"], patch, type="strategic", subresource="status")
        await client.delete(PODS, meta["name"], meta["namespace"], uid=meta["uid"])
    except StatusError as error:
        if not errors.is_not_found(error):
            raise


def disruption_condition(pod: Object, reason: str, message: str) -> Object:
    """The condition that tells why a pod was disrupted."""
    condition: Object = {
        "type": "DisruptionTarget",
        "status": "True",
        "lastTransitionTime": clock.now_rfc3339(),
        "reason": reason,
        "message": message,
    }
    if (pod.get("status") or {}).get("observedGeneration"):
        condition["observedGeneration"] = pod["metadata"].get("generation") or 0
    return condition


def reference(pod: Object) -> Object:
    """What events about an eviction are attached to."""
    return {"apiVersion": "v1", "kind": "Pod", "name": pod["metadata"]["name"], "namespace": pod["metadata"]["namespace"]}


def _no_execute(node: Object) -> list[Object]:
    return [taint for taint in taints.of_node(node) if taint.get("effect") == "NoExecute"]


def _tolerated_seconds(present: list[Object], tolerations: list[Object]) -> float | None:
    """How long the pod may stay; None for ever, 0 not at all."""
    if not present:
        return None
    used: list[Object] = []
    for taint in present:
        matching = [toleration for toleration in tolerations if taints.tolerates(toleration, taint)]
        if not matching:
            return 0.0
        used.append(matching[0])
    limits = [float(max(0, item["tolerationSeconds"])) for item in used if item.get("tolerationSeconds") is not None]
    return min(limits) if limits else None
