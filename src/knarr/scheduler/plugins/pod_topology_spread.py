"""PodTopologySpread: pods of one kind evenly over domains (zones, hosts); hard constraints filter, soft ones score.

The number of matching pods per node comes from a counter that is kept current as pods are
placed; a cycle only sums it by domain. Which nodes count at all (labels present, node affinity
and taints as the constraint wishes) is remembered per shape until a node changes.

Source: plugins/podtopologyspread; KEP-895, KEP-3022 (minDomains), KEP-3094 (inclusion policies).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Ints, LabelColumn, Rows
from knarr.scheduler.counters import Counter, Likeness
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import MAXIMUM_SCORE, SKIP, Cycle, Hint, Plugin, Rejection
from knarr.scheduler.plugins.default_selector import default_selector
from knarr.scheduler.podinfo import Pod, PodInfo, Spread
from knarr.scheduler.terms import Selector, untolerated

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle

REASON = "node(s) didn't match pod topology spread constraints"
REASON_MISSING_LABEL = REASON + " (missing required label)"
HOSTNAME = "kubernetes.io/hostname"
_SYSTEM_DEFAULTS = [
    {"maxSkew": 3, "topologyKey": HOSTNAME, "whenUnsatisfiable": "ScheduleAnyway"},
    {"maxSkew": 5, "topologyKey": "topology.kubernetes.io/zone", "whenUnsatisfiable": "ScheduleAnyway"},
]


class PodTopologySpread(Plugin):
    name = "PodTopologySpread"
    follows_pods = True
    normalizes = True

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self._system_defaulted = args.get("defaultingType", "System") != "List"
        self._defaults = _SYSTEM_DEFAULTS if self._system_defaulted else args.get("defaultConstraints") or []

    # What wakes a pod up.

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        node = Action.ADD | Action.DELETE | Action.UPDATE_NODE_LABEL | Action.UPDATE_NODE_TAINT
        return (
            (ClusterEvent("Pod", Action.ADD | Action.DELETE | Action.UPDATE_POD_LABEL), self._pod_changed),
            (ClusterEvent("Node", node), self._node_changed),
        )

    def _pod_changed(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        for pod in (old, new):
            if pod is not None and pod["metadata"].get("namespace", "") != waiting.namespace:
                return False
        constraints = self._hard(waiting)
        if new is not None and new["metadata"]["uid"] == waiting.uid:
            return True
        labels = [(pod["metadata"].get("labels") or {}) for pod in (old, new) if pod is not None]
        if len(labels) == 2:
            return any(c.selector.matches(labels[0]) != c.selector.matches(labels[1]) for c in constraints)
        return any(c.selector.matches(labels[0]) for c in constraints)

    def _node_changed(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        keys = [c.topology_key for c in self._hard(waiting)]

        def values(node: Pod) -> list[str] | None:
            labels = node["metadata"].get("labels") or {}
            return [labels[key] for key in keys] if all(key in labels for key in keys) else None

        if old is None or new is None:
            present = new if new is not None else old
            return present is not None and values(present) is not None
        before, after = values(old), values(new)
        if before is None and after is None:
            return False
        return before != after or old.get("spec", {}).get("taints") != new.get("spec", {}).get("taints")

    # Constraints.

    def _from_defaults(self, pod: PodInfo, soft: bool) -> Sequence[Spread]:
        wanted = [c for c in self._defaults if (c["whenUnsatisfiable"] == "ScheduleAnyway") == soft]
        if not wanted:
            return ()
        found = default_selector(pod.shape, self.handle.objects)
        if found is None:
            return ()
        memo = pod.shape.memo.get((self, "defaults", soft))
        if memo is None or memo[0] is not found:
            memo = pod.shape.memo[self, "defaults", soft] = (found, tuple(Spread(c, pod.shape.labels, found) for c in wanted))
        result: Sequence[Spread] = memo[1]
        return result

    def _hard(self, pod: PodInfo) -> Sequence[Spread]:
        return pod.shape.hard_spread if pod.shape.uses_own_spread else self._from_defaults(pod, False)

    def _soft(self, pod: PodInfo) -> Sequence[Spread]:
        return pod.shape.soft_spread if pod.shape.uses_own_spread else self._from_defaults(pod, True)

    def _counter(self, cycle: Cycle, selector: Selector) -> Counter:
        """Pods of the same namespace that match, terminating ones left out; an empty selector counts nobody."""
        namespace = cycle.shape.namespace

        def test(likeness: Likeness) -> bool:
            return not likeness.deleting and likeness.namespace == namespace and not selector.is_empty and selector.matches(likeness.labels)

        return cycle.table.counters.counter(("spread", namespace, selector), test)

    def _eligible(self, cycle: Cycle, constraints: Sequence[Spread], all_keys: bool, kind: str) -> list[Rows]:
        """Per constraint the rows whose pods count; remembered until nodes change."""
        stamp = (cycle.table.static_version, constraints)
        memo = cycle.shape.memo.get((self, kind))
        if memo is not None and memo[0][0] == stamp[0] and memo[0][1] is constraints:
            found: list[Rows] = memo[1]
            return found
        table, shape = cycle.table, cycle.shape
        base = table.valid.copy()
        if all_keys:
            for c in constraints:
                base &= table.labels.column(c.topology_key).codes >= 0
        matching = None if shape.node_selector is None else table.labels.matching(shape.node_selector)
        passes = np.array([untolerated(s, shape.tolerations) is None for s in table.taint_sets], dtype=np.bool_)
        result = []
        for c in constraints:
            rows = base & (table.labels.column(c.topology_key).codes >= 0)
            if c.honor_affinity and matching is not None:
                rows &= matching
            if c.honor_taints:
                rows &= passes[table.taint_codes]
            result.append(np.flatnonzero(rows))
        cycle.shape.memo[self, kind] = (stamp, result)
        return result

    # Filter.

    def pre_filter(self, cycle: Cycle) -> Any:
        constraints = self._hard(cycle.pod)
        if not constraints:
            return SKIP
        eligible = self._eligible(cycle, constraints, True, "hard")
        state = []
        for c, rows in zip(constraints, eligible, strict=True):
            column = cycle.table.labels.column(c.topology_key)
            sums, present = _domain_sums(column, self._counter(cycle, c.selector), rows)
            domains = int(np.count_nonzero(present))
            least = int(sums[present].min()) if domains and domains >= c.minimum_domains else 0
            own = 1 if c.selector.matches(cycle.shape.labels) else 0
            state.append((column, sums, c.maximum_skew - own + least))
        cycle.data[self.name] = state
        return None

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        ok = np.ones(len(rows), dtype=np.bool_)
        missing = np.zeros(len(rows), dtype=np.bool_)
        for column, sums, most in cycle.data[self.name]:
            codes = column.codes[rows]
            absent = codes < 0
            missing |= ok & absent
            within = (sums[codes] <= most) if sums.size else np.full(len(rows), most >= 0, dtype=np.bool_)
            ok &= within & ~absent
        if ok.all():
            return None
        failed = ~ok
        lacking = missing[failed]
        parts: list[tuple[str, Bools | None]] = [(REASON_MISSING_LABEL, lacking), (REASON, ~lacking)]
        return ok, Rejection(self.name, rows[failed], parts, lacking)

    # Score.

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        constraints = self._soft(cycle.pod)
        if not constraints:
            return None
        table = cycle.table
        all_keys = cycle.shape.uses_own_spread or not self._system_defaulted
        columns = [table.labels.column(c.topology_key) for c in constraints]
        codes = [column.codes[rows] for column in columns]
        ignored = np.zeros(len(rows), dtype=np.bool_)
        if all_keys:
            for own in codes:
                ignored |= own < 0
        cycle.data["spread-ignored"] = ignored
        eligible = self._eligible(cycle, constraints, all_keys, "soft")
        total = np.zeros(len(rows), dtype=np.float64)
        for c, column, own, count_rows in zip(constraints, columns, codes, eligible, strict=True):
            counter = self._counter(cycle, c.selector)
            labelled = (own >= 0) & ~ignored
            if c.topology_key == HOSTNAME:
                numbers: npt.NDArray[Any] = counter.counts[rows]
                size = len(rows) - int(np.count_nonzero(ignored))
            else:
                sums, _ = _domain_sums(column, counter, count_rows)
                numbers = sums[own] if sums.size else np.zeros(len(rows), dtype=np.int64)
                size = len(np.unique(own[~ignored]))
            part = numbers * math.log(size + 2) + (c.maximum_skew - 1)
            total += np.where(labelled, part, 0.0)
        return np.floor(total + 0.5).astype(np.int64)

    def normalize(self, cycle: Cycle, rows: Rows, scores: npt.NDArray[Any]) -> Ints:
        ignored: Bools = cycle.data["spread-ignored"]
        counted = scores[~ignored]
        result = np.zeros(len(rows), dtype=np.int64)
        if counted.size:
            highest, lowest = int(counted.max()), int(counted.min())
            if highest == 0:
                result[~ignored] = MAXIMUM_SCORE
            else:
                result[~ignored] = MAXIMUM_SCORE * (highest + lowest - counted) // highest
        return result


def _domain_sums(column: LabelColumn, counter: Counter, rows: Rows) -> tuple[Ints, Bools]:
    """(pods per domain code, which codes have an eligible node)."""
    codes = column.codes[rows]
    if column.is_unique:
        sums = np.zeros(column.size, dtype=np.int64)
        present = np.zeros(column.size, dtype=np.bool_)
        sums[codes], present[codes] = counter.counts[rows], True
        return sums, present
    if not counter.total:
        return np.zeros(column.size, dtype=np.int64), np.bincount(codes, minlength=column.size) > 0
    sums = np.bincount(codes, weights=counter.counts[rows], minlength=column.size).astype(np.int64)
    return sums, np.bincount(codes, minlength=column.size) > 0
