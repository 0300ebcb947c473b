"""NodeName: a pod that names its node fits only there."""

from __future__ import annotations

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.framework import Cycle, Plugin, Rejection, reject

REASON = "node(s) didn't match the requested node name"


class NodeName(Plugin):
    name = "NodeName"

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        wanted = cycle.pod.pod["spec"].get("nodeName")
        if not wanted:
            return None
        row = cycle.table.rows.get(wanted, -1)
        ok: Bools = np.equal(rows, row)
        return reject(self, rows, ok, REASON, unresolvable=True)
