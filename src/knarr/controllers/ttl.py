"""TTL: tells kubelets by a node annotation how long they may cache Secrets and ConfigMaps, by the size of the cluster.

Source: pkg/controller/ttl/ttl_controller.go.
"""

from __future__ import annotations

from knarr.api import meta
from knarr.api.resources import NODES
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context

_ANNOTATION = "node.alpha.kubernetes.io/ttl"
# (least nodes, most nodes, seconds); the ranges overlap so that a cluster at a border does not flap.
_STEPS = ((0, 100, 0), (90, 500, 15), (450, 1000, 30), (900, 2000, 60), (1800, 2**31, 300))


class TTLController:
    """Keeps the annotation on every node."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._nodes = ctx.nodes
        self._count = 0
        self._step = 0
        self.controller = Controller("ttl-controller", self._reconcile, workers=5)
        self._nodes.add_handler(lambda node: self._counted(node, 1), self._updated, lambda node: self._counted(node, -1))

    async def run(self) -> None:
        await self.controller.run()

    def _counted(self, node: Object, change: int) -> None:
        self._count += change
        if self._count > _STEPS[self._step][1] and self._step < len(_STEPS) - 1:
            self._step += 1
        elif self._count < _STEPS[self._step][0] and self._step > 0:
            self._step -= 1
        if change > 0:
            self.controller.queue.add(node["metadata"]["name"])

    def _updated(self, old: Object, new: Object) -> None:
        if meta.annotations(new).get(_ANNOTATION) != str(_STEPS[self._step][2]):
            self.controller.queue.add(new["metadata"]["name"])

    async def _reconcile(self, name: str) -> None:
        node = self._nodes.get(None, name)
        wanted = str(_STEPS[self._step][2])
        if node is not None and meta.annotations(node).get(_ANNOTATION) != wanted:
            await self._client.patch(NODES, name, None, {"metadata": {"annotations": {_ANNOTATION: wanted}}}, type="strategic")
