"""InterPodAffinity: pods near or away from other pods, by domain.

Both directions are asked of counters, never of pods one by one: how many pods match the
incoming pod's terms (counters by term), and which placed pods carry terms that match the
incoming pod (term groups). Sums by domain are made per cycle.

Source: plugins/interpodaffinity (filtering, scoring).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Ints, LabelColumn, Rows
from knarr.scheduler.counters import Counter, Counts, Likeness
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import MAXIMUM_SCORE, SKIP, Cycle, Hint, Plugin, Rejection
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.terms import PodTerm, Selector

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle

REASON_EXISTING = "node(s) didn't satisfy existing pods anti-affinity rules"
REASON_AFFINITY = "node(s) didn't match pod affinity rules"
REASON_ANTI_AFFINITY = "node(s) didn't match pod anti-affinity rules"


class InterPodAffinity(Plugin):
    name = "InterPodAffinity"
    follows_pods = True
    normalizes = True

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self._hard_weight = int(args.get("hardPodAffinityWeight", 1))
        self._ignore_existing_preferred = bool(args.get("ignorePreferredTermsOfExistingPods", False))

    # What wakes a pod up.

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        node = Action.ADD | Action.UPDATE_NODE_LABEL | Action.UPDATE_NODE_TAINT
        pod = Action.ADD | Action.DELETE | Action.UPDATE_POD_LABEL
        return ((ClusterEvent("Pod", pod), self._pod_changed), (ClusterEvent("Node", node), self._node_changed))

    def _matches(self, term: PodTerm, pod: Pod) -> bool:
        metadata = pod["metadata"]
        namespace = metadata.get("namespace", "")
        return term.matches(namespace, metadata.get("labels") or {}, self.handle.objects.namespace_labels(namespace))

    def _matches_all(self, terms: Sequence[PodTerm], pod: Pod | None) -> bool:
        return pod is not None and bool(terms) and all(self._matches(t, pod) for t in terms)

    def _matches_any(self, terms: Sequence[PodTerm], pod: Pod | None) -> bool:
        return pod is not None and any(self._matches(t, pod) for t in terms)

    def _pod_changed(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        near, far = waiting.shape.required_affinity, waiting.shape.required_anti_affinity
        if new is not None and new["metadata"]["uid"] == waiting.uid:
            return True
        if old is not None and new is not None:
            if self._matches_all(near, new) and not self._matches_all(near, old):
                return True
            return self._matches_any(far, old) and not self._matches_any(far, new)
        if new is not None:
            return self._matches_all(near, new)
        if old is None:
            return False
        if self._matches_any(far, old):
            return True
        # The pod that left may itself have kept the waiting one away.
        theirs = self.handle.shapes.of(old).required_anti_affinity
        return self._matches_any(theirs, waiting.pod)

    def _node_changed(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if new is None:
            return False
        after = new["metadata"].get("labels") or {}
        before = (old["metadata"].get("labels") or {}) if old is not None else {}
        near, far = waiting.shape.required_affinity, waiting.shape.required_anti_affinity
        if near:
            if any(t.topology_key not in after for t in near):
                return False
            return old is None or any(before.get(t.topology_key) != after[t.topology_key] for t in near)
        if far:
            return old is None or any(before.get(t.topology_key) != after.get(t.topology_key) for t in far)
        return True

    # Counting.

    def _namespaces(self, term: PodTerm) -> frozenset[str] | None:
        """Names the term looks into; None for all."""
        if term.namespace_selector is None:
            return term.namespaces
        if term.namespace_selector.is_empty:
            return None
        return term.namespaces | self.handle.objects.namespaces_matching(term.namespace_selector)

    def _counter(self, cycle: Cycle, terms: Sequence[PodTerm]) -> Counter:
        """Placed pods that match all of the terms."""
        parts: tuple[tuple[frozenset[str] | None, Selector], ...] = tuple((self._namespaces(t), t.selector) for t in terms)

        def test(likeness: Likeness) -> bool:
            return all((names is None or likeness.namespace in names) and s.matches(likeness.labels) for names, s in parts)

        return cycle.table.counters.counter(("affinity", parts), test)

    def _domains(self, cycle: Cycle, key: str, counts: Counts) -> _Domains:
        return _Domains(cycle.table.labels.column(key), counts)

    # Filter.

    def pre_filter(self, cycle: Cycle) -> Any:
        shape, table, objects = cycle.shape, cycle.table, self.handle.objects
        forbidding: list[_Domains] = []
        if len(table.term_groups):
            labels = objects.namespace_labels(shape.namespace)
            for group in table.term_groups.matching(shape, labels, objects.version("Namespace")):
                if group.kind == "required_anti_affinity":
                    forbidding.append(self._domains(cycle, group.term.topology_key, group.counts))
        near, far = shape.required_affinity, shape.required_anti_affinity
        if not near and not far and not forbidding:
            return SKIP
        wanted: list[_Domains] = []
        nobody = self_matching = False
        if near:
            counter = self._counter(cycle, near)
            wanted = [self._domains(cycle, t.topology_key, counter.counts) for t in near]
            nobody = not counter.total or not any(d.present for d in wanted)
            self_matching = nobody and self._matches_all(near, cycle.pod.pod)
        avoided = [self._domains(cycle, t.topology_key, self._counter(cycle, (t,)).counts) for t in far]
        cycle.data[self.name] = (wanted, self_matching, avoided, forbidding)
        return None

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        wanted, self_matching, avoided, forbidding = cycle.data[self.name]
        near = np.ones(len(rows), dtype=np.bool_)
        for domains in wanted:
            if self_matching:
                near &= domains.column.codes[rows] >= 0
            else:
                near &= domains.at(rows) > 0
        away = np.ones(len(rows), dtype=np.bool_)
        for domains in avoided:
            away &= domains.at(rows) <= 0
        left_alone = np.ones(len(rows), dtype=np.bool_)
        for domains in forbidding:
            left_alone &= domains.at(rows) <= 0
        ok = near & away & left_alone
        if ok.all():
            return None
        failed = ~ok
        first, second = ~near[failed], (near & ~away)[failed]
        parts: list[tuple[str, Bools | None]] = [(REASON_AFFINITY, first), (REASON_ANTI_AFFINITY, second)]
        parts.append((REASON_EXISTING, ~first & ~second))
        return ok, Rejection(self.name, rows[failed], parts, first)

    # Score.

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        shape, table, objects = cycle.shape, cycle.table, self.handle.objects
        has_own = bool(shape.preferred_affinity or shape.preferred_anti_affinity)
        if not has_own and (self._ignore_existing_preferred or not len(table.term_groups)):
            return None
        total = np.zeros(len(rows), dtype=np.int64)
        touched = False
        for terms, sign in ((shape.preferred_affinity, 1), (shape.preferred_anti_affinity, -1)):
            for term in terms:
                counter = self._counter(cycle, (term,))
                if counter.total:
                    total += self._domains(cycle, term.topology_key, counter.counts).at(rows) * (sign * term.weight)
                    touched = True
        if len(table.term_groups):
            for group in table.term_groups.matching(shape, objects.namespace_labels(shape.namespace), objects.version("Namespace")):
                weight = self._group_weight(group.kind, group.term)
                if weight:
                    total += self._domains(cycle, group.term.topology_key, group.counts).at(rows) * weight
                    touched = True
        return total if touched else None

    def _group_weight(self, kind: str, term: PodTerm) -> int:
        if kind == "required_affinity":
            return self._hard_weight
        if kind == "preferred_affinity":
            return term.weight
        return -term.weight if kind == "preferred_anti_affinity" else 0

    def normalize(self, cycle: Cycle, rows: Rows, scores: npt.NDArray[Any]) -> Ints:
        lowest, highest = int(scores.min()), int(scores.max())
        if highest == lowest:
            return np.zeros(len(rows), dtype=np.int64)
        result: Ints = (MAXIMUM_SCORE * ((scores - lowest) / (highest - lowest))).astype(np.int64)
        return result


class _Domains:
    """A column of counts per row, read by domain: at(rows) is the count in the whole domain of each row."""

    __slots__ = ("_sums", "column", "counts")

    def __init__(self, column: LabelColumn, counts: Counts) -> None:
        self.column = column
        self.counts = counts
        self._sums: Ints | None = None if column.is_unique else column.sums(counts)

    @property
    def present(self) -> bool:
        """Whether any counted pod is on a node that has the label."""
        return bool((self.counts[self.column.codes >= 0]).any()) if self._sums is None else bool(self._sums.any())

    def at(self, rows: Rows) -> Ints:
        codes = self.column.codes[rows]
        if self._sums is None:
            return np.where(codes >= 0, self.counts[rows], 0).astype(np.int64)
        if not self._sums.size:
            return np.zeros(len(rows), dtype=np.int64)
        return np.where(codes >= 0, self._sums[codes], 0)
