"""The simulator: keeps the declared number of nodes without machines, and leads pods on them through their stages.

Run by a process of its own under the cluster's supervisor, and by tests. It speaks to the API only. Invariants: nodes and
pods that are not simulated are never touched; of a pod that no stage is due for only its name is kept, so that 100,000
steady pods cost little memory and no time. Bound: the pods that are between stages; WORKERS writes at a time.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import NODES, PODS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.simulate import podstatus, stages
from knarr.simulate.nodes import LABEL, SimulatedNodes, pod_address
from knarr.simulate.stages import Stage

log = get_logger(__name__)

WORKERS = 32


@dataclass(frozen=True, slots=True)
class SimulatorConfig:
    """What is simulated."""

    nodes: int
    tainted: bool = True
    """Keep pods away that do not tolerate simulated nodes."""
    stages: str = stages.DEFAULT
    """YAML documents of kind Stage."""
    lease_seconds: float = 20.0
    """Time between renewals of a node's Lease; controllers give a node up after 50 s."""
    pods_per_node: int = 110


class Simulator:
    """See the module; `await run()` works until cancelled, `await wait_nodes()` returns when the nodes are there."""

    def __init__(self, client: Client, config: SimulatorConfig) -> None:
        self._client = client
        found = stages.whole(config.stages)
        self._pod_stages = [stage for stage in found if stage.resource == "pods"]
        self._node_stages = [stage for stage in found if stage.resource == "nodes"]
        # Apart, because which pods are ours is known only once the nodes are.
        self._node_informers, self._pod_informers = Informers(client), Informers(client)
        self._nodes = self._node_informers.get(NODES, transform=_trim_node, label_selector=f"{LABEL}=true")
        self._pods = self._pod_informers.get(PODS, transform=self._trim_pod)
        self._recorder = EventRecorder(client, "knarr-simulator")
        self._fleet = SimulatedNodes(client, self._nodes, config.nodes, config.tainted, config.lease_seconds, config.pods_per_node)
        self._due: dict[str, tuple[Stage, float]] = {}
        self._moved: dict[str, int] = {}
        self._pod_control = Controller("simulated-pods", self._move_pod, workers=WORKERS)
        self._node_control = Controller("simulated-nodes", self._move_node, workers=4)
        self._pods.add_handler(self._pod_seen, lambda _, new: self._pod_seen(new), self._pod_gone)
        self._nodes.add_handler(self._node_seen, lambda _, new: self._node_seen(new))

    async def wait_nodes(self) -> None:
        """Until all declared nodes exist."""
        await self._fleet.complete.wait()

    async def run(self) -> None:
        try:
            async with Tasks() as tasks:
                tasks.spawn(self._node_control.run(), "simulated-nodes")
                tasks.spawn(self._pod_control.run(), "simulated-pods")
                await self._node_informers.start()
                await self._nodes.wait_synced()
                await self._pod_informers.start()
                tasks.spawn_eternal(self._fleet.run(), "simulated-fleet")
                await asyncio.get_running_loop().create_future()
        finally:
            await self._recorder.close()
            await self._pod_informers.close()
            await self._node_informers.close()

    # Pods

    def _trim_pod(self, pod: Object) -> Object:
        """Keep a pod whole only while a stage is due for it."""
        metadata = pod["metadata"]
        metadata.pop("managedFields", None)
        name = pod["spec"].get("nodeName")
        if name and (self._fleet.declares(name) or self._nodes.get(None, name) is not None) and any(stage.matches(pod) for stage in self._pod_stages):
            return pod
        return {"metadata": {"namespace": metadata["namespace"], "name": metadata["name"]}}

    def _pod_seen(self, pod: Object) -> None:
        key = meta.key(pod)
        stage = stages.due(self._pod_stages, pod) if "spec" in pod else None
        self._plan(self._pod_control, key, stage)

    def _plan(self, control: Controller, key: str, stage: Stage | None) -> None:
        if stage is None:
            self._due.pop(key, None)
            return
        known = self._due.get(key)
        if known is not None and known[0].name == stage.name:
            return  # what has begun goes on, although something else of the object has changed
        delay = stage.delay()
        self._due[key] = (stage, clock.now() + delay)
        control.queue.add_after(key, delay)

    def _pod_gone(self, pod: Object) -> None:
        self._due.pop(meta.key(pod), None)

    async def _move_pod(self, key: str) -> Result | None:
        planned, pod = self._due.get(key), self._pods.get_key(key)
        if planned is None or pod is None or "spec" not in pod:
            return None
        stage, at = planned
        if (left := at - clock.now()) > 0:
            return Result(left)
        if self._fleet.is_silent(pod["spec"]["nodeName"]):
            return Result(5.0)
        self._due.pop(key, None)
        try:
            await self._carry_out(pod, stage)
        except Exception as error:
            if not (isinstance(error, StatusError) and (errors.is_not_found(error) or errors.is_conflict(error))):
                self._due[key] = planned
                raise
            # Its change may have come while this stage was due, and then comes no more.
            if (now := self._pods.get_key(key)) is not None:
                self._pod_seen(now)
        return None

    async def _carry_out(self, pod: Object, stage: Stage) -> None:
        what, metadata = stage.next, pod["metadata"]
        namespace, name, uid = metadata["namespace"], metadata["name"], metadata["uid"]
        if what.event is not None:
            self._recorder.event(pod, what.event.get("type", "Normal"), what.event.get("reason", stage.name), what.event.get("message", ""))
        if what.delete:
            await self._client.delete(PODS, name, namespace, grace_period_seconds=0, uid=uid)
            return
        status: Object = {}
        if what.phase:
            node = self._nodes.get(None, pod["spec"]["nodeName"])
            self._moved[pod["spec"]["nodeName"]] = number = self._moved.get(pod["spec"]["nodeName"], 0) + 1
            status = podstatus.status_of(pod, what, clock.now_rfc3339(), pod_address(node, number), "")
        if what.status:
            status = podstatus.merged(status or pod.get("status") or {}, what.status)
        if status:
            await self._client.patch(PODS, name, namespace, {"metadata": {"uid": uid}, "status": status}, subresource="status")

    # Nodes

    def _node_seen(self, node: Object) -> None:
        self._plan(self._node_control, meta.name(node), stages.due(self._node_stages, node))

    async def _move_node(self, key: str) -> Result | None:
        planned, node = self._due.get(key), self._nodes.get(None, key)
        if planned is None or node is None:
            return None
        stage, at = planned
        if (left := at - clock.now()) > 0:
            return Result(left)
        self._due.pop(key, None)
        what = stage.next
        if what.event is not None:
            self._recorder.event(node, what.event.get("type", "Normal"), what.event.get("reason", stage.name), what.event.get("message", ""))
        if what.delete:
            await self._client.delete(NODES, key)
        elif what.status:
            status = podstatus.merged(node.get("status") or {}, what.status)
            await self._client.patch(NODES, key, None, {"status": status}, subresource="status")
        return None


def _trim_node(node: Object) -> Object:
    node["metadata"].pop("managedFields", None)
    return node
