"""What the scheduler writes about pods other than bindings: conditions, nominations, evictions.

Source: schedule_one.go updatePod, framework/preemption prepareCandidateAsync.
"""

from __future__ import annotations

import asyncio
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError, is_not_found
from knarr.api.resources import PODS
from knarr.client.events import EventRecorder
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.scheduler.dispatcher import Dispatcher
from knarr.scheduler.handle import Handle
from knarr.scheduler.plugins.preemption import Candidate
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.queue import SchedulingQueue

log = get_logger(__name__)


def condition_patch(pod: Pod, condition: dict[str, Any]) -> dict[str, Any] | None:
    """Give the condition as it is to be written, or None when the pod has it already."""
    for old in (pod.get("status") or {}).get("conditions") or ():
        if old["type"] == condition["type"]:
            if old["status"] == condition["status"]:
                if all(old.get(key, "") == condition.get(key, "") for key in ("reason", "message")):
                    return None
                return {**condition, "lastTransitionTime": old.get("lastTransitionTime")}
    return {**condition, "lastTransitionTime": clock.now_rfc3339()}


class StatusWriter:
    """See the module. All methods return at once; the dispatcher writes."""

    def __init__(
        self, client: Client, handle: Handle, queue: SchedulingQueue, dispatcher: Dispatcher, recorders: dict[str, EventRecorder]
    ) -> None:
        self._client = client
        self._handle = handle
        self._queue = queue
        self._dispatcher = dispatcher
        self._recorders = recorders

    def refused(self, info: PodInfo, reason: str, message: str, nominated: str | None) -> None:
        """Note on the pod that it is not scheduled; `nominated` sets or ("") clears the nomination, None leaves it."""
        condition: dict[str, Any] = {"type": "PodScheduled", "status": "False", "reason": reason, "message": message}
        generation = _observed_generation(info.pod)
        if generation:
            condition["observedGeneration"] = generation
        patch: dict[str, Any] = {}
        changed = condition_patch(info.pod, condition)
        if changed is not None:
            patch["conditions"] = [{**changed, "lastProbeTime": None}]
        if nominated is not None and nominated != info.nominated_node:
            patch["nominatedNodeName"] = nominated or None
        if patch:
            self._dispatcher.submit(info.uid, self._patch, info.pod, patch)

    async def _patch(self, pod: Pod, status: dict[str, Any]) -> None:
        metadata = pod["metadata"]
        body = {"metadata": {"uid": metadata["uid"]}, "status": status}
        try:
            await self._client.patch(PODS, metadata["name"], metadata["namespace"], body, type="strategic", subresource="status")
        except StatusError as error:
            if not is_not_found(error) and error.code != 409:
                log.warning("status of a pod could not be written", pod=f"{metadata['namespace']}/{metadata['name']}", error=error)
        except (HTTPError, OSError) as error:
            log.warning("status of a pod could not be written", pod=f"{metadata['namespace']}/{metadata['name']}", error=repr(error))

    # Preemption.

    def preempt(self, info: PodInfo, candidate: Candidate) -> None:
        """Evict the victims; the pod stays out of the active queue until the last one is told to go."""
        self._handle.preemption_started(info.uid)
        lower = [p for p in self._queue.nominator.pods_for(candidate.node_name) if p.priority < info.priority]
        for other in lower:
            self._queue.nominator.set(other, "")
            self._dispatcher.submit(other.uid, self._patch, other.pod, {"nominatedNodeName": None})
        self._dispatcher.submit(f"preempt/{info.uid}", self._evict_all, info, candidate)

    async def _evict_all(self, info: PodInfo, candidate: Candidate) -> None:
        # Most important first in the list: the last to go is the one whose end finally makes room.
        *others, last = candidate.victims
        gone = False
        try:
            results = await asyncio.gather(*(self._evict(info, victim, candidate.node_name) for victim in others))
            self._handle.last_victim(info.uid, candidate.node_name, last.uid)
            node = self._handle.table.get(candidate.node_name)
            present = node is not None and last.uid in node.pods
            gone = await self._evict(info, last, candidate.node_name) and all(results) and present
        finally:
            if not gone:
                self._handle.preemption_ended(info.uid)
        if not gone:
            # No deletion may ever come to wake the pod up.
            self._queue.activate(info.uid)

    async def _evict(self, preemptor: PodInfo, victim: PodInfo, node_name: str) -> bool:
        pod = victim.pod
        scheduler_name = preemptor.shape.scheduler_name
        condition: dict[str, Any] = {
            "type": "DisruptionTarget",
            "status": "True",
            "reason": "PreemptionByScheduler",
            "message": f"{scheduler_name}: preempting to accommodate a higher priority pod",
        }
        generation = _observed_generation(pod)
        if generation:
            condition["observedGeneration"] = generation
        changed = condition_patch(pod, condition)
        try:
            if changed is not None:
                body = {"metadata": {"uid": victim.uid}, "status": {"conditions": [changed]}}
                await self._client.patch(PODS, victim.name, victim.namespace, body, type="strategic", subresource="status")
            await self._client.delete(PODS, victim.name, victim.namespace, uid=victim.uid)
        except StatusError as error:
            if is_not_found(error) or error.code == 409:
                return True
            log.warning("victim could not be evicted", pod=victim.key, preemptor=preemptor.key, error=error)
            return False
        except (HTTPError, OSError) as error:
            log.warning("victim could not be evicted", pod=victim.key, preemptor=preemptor.key, error=repr(error))
            return False
        recorder = self._recorders.get(scheduler_name)
        if recorder is not None:
            message = f"Preempted by pod {preemptor.uid} on node {node_name}"
            recorder.event(pod, "Normal", "Preempted", message, related=preemptor.pod, action="Preempting")
        return True


def _observed_generation(pod: Pod) -> int:
    """The generation a condition speaks of. Source: KEP-5067."""
    return int(pod["metadata"].get("generation") or 0)
