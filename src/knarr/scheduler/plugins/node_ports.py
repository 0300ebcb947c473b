"""NodePorts: the host ports a pod wants must be free on the node."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, Rejection, reject
from knarr.scheduler.podinfo import Pod, PodInfo, host_ports

REASON = "node(s) didn't have free ports for the requested pod ports"


def _freed_port(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    if old is None:
        return False
    # A nominated pod counts as if it were placed, so its end frees its ports as well.
    if not old["spec"].get("nodeName") and not (old.get("status") or {}).get("nominatedNodeName"):
        return False
    wanted = {(protocol, port) for _, protocol, port in waiting.shape.host_ports}
    return any((protocol, port) in wanted for _, protocol, port in host_ports(old["spec"]))


class NodePorts(Plugin):
    name = "NodePorts"
    follows_pods = True

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return ((ClusterEvent("Pod", Action.DELETE), _freed_port), (ClusterEvent("Node", Action.ADD), None))

    def pre_filter(self, cycle: Cycle) -> Any:
        return None if cycle.shape.host_ports else SKIP

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        table, wanted = cycle.table, cycle.shape.host_ports
        taken = [row for row in table.port_rows if table.info(row).ports_conflict(wanted)]
        if not taken:
            return None
        ok: Bools = ~np.isin(rows, np.array(taken, dtype=np.intp))
        return reject(self, rows, ok, REASON, unresolvable=False)
