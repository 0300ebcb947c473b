"""NodeUnschedulable: cordoned nodes take only pods that tolerate it."""

from __future__ import annotations

from collections.abc import Iterable

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import Cycle, Hint, Plugin, Rejection, reject
from knarr.scheduler.podinfo import Pod, PodInfo, PodShape

REASON = "node(s) were unschedulable"
_TAINT = ("node.kubernetes.io/unschedulable", "", "NoSchedule")


def _tolerates(shape: PodShape) -> bool:
    return any(t.tolerates(_TAINT) for t in shape.tolerations)


def _became_schedulable(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    if new is None or new.get("spec", {}).get("unschedulable"):
        return False
    return old is None or bool(old.get("spec", {}).get("unschedulable"))


def _is_own_toleration(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    return new is not None and new["metadata"]["uid"] == waiting.uid


class NodeUnschedulable(Plugin):
    name = "NodeUnschedulable"

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return (
            (ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_TAINT), _became_schedulable),
            (ClusterEvent("Pod", Action.UPDATE_POD_TOLERATION), _is_own_toleration),
        )

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        cordoned = cycle.table.unschedulable[rows]
        if not cordoned.any() or _tolerates(cycle.shape):
            return None
        return reject(self, rows, ~cordoned, REASON, unresolvable=True)
