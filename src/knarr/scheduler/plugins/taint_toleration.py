"""TaintToleration: untolerated NoSchedule and NoExecute taints filter, PreferNoSchedule taints score.

Nodes share few distinct sets of taints, so a pod's tolerations are held against each set once.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Ints, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import Cycle, Hint, Plugin, Rejection, normalize_by_maximum
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.terms import taints, untolerated


def _became_tolerated(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    if new is None:
        return False
    tolerations = waiting.shape.tolerations
    before = old is None or untolerated(taints(old), tolerations) is not None
    return before and untolerated(taints(new), tolerations) is None


def _is_own_toleration(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    return new is not None and new["metadata"]["uid"] == waiting.uid


class TaintToleration(Plugin):
    name = "TaintToleration"
    normalizes = True

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return (
            (ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_TAINT), _became_tolerated),
            (ClusterEvent("Pod", Action.UPDATE_POD_TOLERATION), _is_own_toleration),
        )

    def _verdicts(self, cycle: Cycle) -> tuple[int, list[str | None], Bools, npt.NDArray[np.int64]]:
        """Per taint code: the reason for a refusal, whether it passes, how many soft taints it has untolerated."""
        sets = cycle.table.taint_sets
        memo = cycle.shape.memo.get(self)
        if memo is not None and memo[0] == len(sets):
            return memo  # type: ignore[no-any-return]
        tolerations = cycle.shape.tolerations
        soft = [t for t in tolerations if t.effect in ("", "PreferNoSchedule")]
        reasons: list[str | None] = []
        counts = []
        for taint_set in sets:
            taint = untolerated(taint_set, tolerations)
            reasons.append(None if taint is None else f"node(s) had untolerated taint {{{taint[0]}: {taint[1]}}}")
            counts.append(sum(t[2] == "PreferNoSchedule" and not any(s.tolerates(t) for s in soft) for t in taint_set))
        passes = np.array([reason is None for reason in reasons], dtype=np.bool_)
        memo = cycle.shape.memo[self] = (len(sets), reasons, passes, np.array(counts, dtype=np.int64))
        return memo

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        _, reasons, passes, _ = self._verdicts(cycle)
        if passes.all():
            return None
        codes = cycle.table.taint_codes[rows]
        ok: Bools = passes[codes]
        if ok.all():
            return None
        failed = codes[~ok]
        by_reason: dict[str, Bools] = {}
        for code in np.unique(failed).tolist():
            reason = reasons[code]
            assert reason is not None
            mask = failed == code
            by_reason[reason] = by_reason[reason] | mask if reason in by_reason else mask
        return ok, Rejection(self.name, rows[~ok], list(by_reason.items()), True)

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        counts = self._verdicts(cycle)[3]
        return counts[cycle.table.taint_codes[rows]] if counts.any() else None

    def normalize(self, cycle: Cycle, rows: Rows, scores: npt.NDArray[Any]) -> Ints:
        return normalize_by_maximum(scores, reverse=True)
