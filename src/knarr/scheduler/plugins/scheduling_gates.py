"""SchedulingGates: a pod with gates stays out of the active queue. Source: KEP-3521."""

from __future__ import annotations

from collections.abc import Iterable

from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import Hint, Plugin, Refusal
from knarr.scheduler.podinfo import Pod, PodInfo


def _is_own_pod(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    return new is not None and new["metadata"]["uid"] == waiting.uid


class SchedulingGates(Plugin):
    name = "SchedulingGates"

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return ((ClusterEvent("Pod", Action.UPDATE_POD_GATES), _is_own_pod),)

    def pre_enqueue(self, pod: PodInfo) -> Refusal | None:
        gates = pod.pod["spec"].get("schedulingGates")
        if not gates:
            return None
        names = " ".join(gate["name"] for gate in gates)
        return Refusal(self.name, f"waiting for scheduling gates: [{names}]")
