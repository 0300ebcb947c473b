"""Graceful node shutdown: when the machine goes down, pods end within their time, critical ones last.

Caller: kubelet (`run` waits for the request; `admit` refuses pods meanwhile). The request comes from the cluster's node process,
when the node is switched off or the machine ends its supervisor. Source: pkg/kubelet/nodeshutdown.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet.configfile import shutdown_groups
from knarr.kubelet.node import Node
from knarr.kubelet.pod_worker import PodWorker, Stage
from knarr.kubelet.pods import PodWorkers

if TYPE_CHECKING:
    from knarr.kubelet.node_status import NodeReporter

log = get_logger(__name__)

_REASON = "Terminated"
_MESSAGE = "Pod was terminated in response to imminent node shutdown."


class NodeShutdown:
    """Ends all pods in an orderly way."""

    def __init__(self, node: Node, workers: PodWorkers, reporter: NodeReporter) -> None:
        self._node = node
        self._workers = workers
        self._reporter = reporter
        self._requested = asyncio.Event()
        self.finished = asyncio.Event()
        """Set when all pods have ended or their time is over."""

    def request(self) -> None:
        """The machine is about to go down."""
        self._requested.set()

    def admit(self, pod: Object) -> tuple[str, str] | None:
        """Refuse new pods during a shutdown."""
        if self._requested.is_set():
            return "NodeShutdown", "Pod was rejected as the node is shutting down."
        return None

    async def run(self) -> None:
        """Wait for the request, then end the pods."""
        await self._requested.wait()
        self._reporter.shutting_down = True
        self._node.meters.gauges["kubelet_graceful_shutdown_start_time_seconds"] = clock.now()
        self._reporter.changed()
        self._node.event(self._reporter.reference(), "Normal", "Shutdown", "Shutdown manager detected shutdown event")
        workers = [w for w in self._workers.workers() if w.stage < Stage.TERMINATED]
        groups = shutdown_groups(self._node.config)
        for index, (_, seconds) in enumerate(groups):
            await self._end([w for w in workers if _group_of(w.pod, groups) == index], seconds)
        self._node.meters.gauges["kubelet_graceful_shutdown_end_time_seconds"] = clock.now()
        self.finished.set()
        await asyncio.Event().wait()

    async def _end(self, workers: list[PodWorker], seconds: float) -> None:
        condition = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "TerminationByKubelet",
            "message": _MESSAGE,
            "lastTransitionTime": clock.now_rfc3339(),
        }
        tasks = set()
        for worker in workers:
            grace = min(float(worker.pod["spec"].get("terminationGracePeriodSeconds", 30)), seconds)
            worker.terminate(int(grace), (_REASON, _MESSAGE), condition)
            if worker.task is not None:
                tasks.add(worker.task)
        if tasks:
            await asyncio.wait(tasks, timeout=seconds + 2.0)


def _group_of(pod: Object, groups: list[tuple[int, float]]) -> int:
    """The last group whose priority the pod reaches; the first one for those below all."""
    priority = pod["spec"].get("priority") or 0
    return max((index for index, (lowest, _) in enumerate(groups) if priority >= lowest), default=0)
