"""NodeAffinity: nodeSelector and required node affinity filter, preferred node affinity scores."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Ints, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, Refusal, Rejection, normalize_by_maximum, reject
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.terms import NodeSelector, node_term, preferred_node_terms

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle

REASON = "node(s) didn't match Pod's node affinity/selector"
REASON_ENFORCED = "node(s) didn't match scheduler-enforced node affinity"
REASON_CONFLICT = "pod affinity terms conflict"


class NodeAffinity(Plugin):
    name = "NodeAffinity"
    normalizes = True

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        added = args.get("addedAffinity") or {}
        required = added.get("requiredDuringSchedulingIgnoredDuringExecution")
        terms = None if required is None else tuple(node_term(t) for t in required.get("nodeSelectorTerms") or ())
        self._added = None if terms is None else NodeSelector((), terms)
        self._added_preferred = preferred_node_terms(added)

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return ((ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_LABEL), self._became_matching),)

    def _matches(self, waiting: PodInfo, node: Pod) -> bool:
        labels, name = node["metadata"].get("labels") or {}, node["metadata"]["name"]
        if self._added is not None and not self._added.matches(labels, name):
            return False
        wanted = waiting.shape.node_selector
        return wanted is None or wanted.matches(labels, name)

    def _became_matching(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        return new is not None and self._matches(waiting, new) and (old is None or not self._matches(waiting, old))

    def pre_filter(self, cycle: Cycle) -> Any:
        wanted = cycle.shape.node_selector
        if wanted is None:
            return SKIP if self._added is None else None
        names = wanted.node_names()
        if names is not None and not names:
            return Refusal(self.name, REASON_CONFLICT)
        return names

    def _mask(self, cycle: Cycle, key: str, wanted: NodeSelector) -> Bools | None:
        """Rows that match, for all rows at once; None when all existing nodes do."""
        stamp = cycle.table.static_version
        memo = cycle.shape.memo.get((self, key))
        if memo is None or memo[0] != stamp:
            mask = cycle.table.labels.matching(wanted)
            memo = cycle.shape.memo[self, key] = (stamp, None if mask[cycle.table.order].all() else mask)
        result: Bools | None = memo[1]
        return result

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        enforced = None
        if self._added is not None:
            mask = self._mask(cycle, "added", self._added)
            if mask is not None:
                enforced = mask[rows]
        wanted = cycle.shape.node_selector
        own = None
        if wanted is not None:
            if len(rows) == 1:
                # A pod pinned to one node (as by a DaemonSet): no need to look at the columns.
                node = cycle.table.info(int(rows[0])).node
                if node is None or not wanted.matches(node["metadata"].get("labels") or {}, node["metadata"]["name"]):
                    own = np.zeros(1, dtype=np.bool_)
            else:
                mask = self._mask(cycle, "own", wanted)
                if mask is not None:
                    own = mask[rows]
        if enforced is None:
            return None if own is None else reject(self, rows, own, REASON, unresolvable=True)
        ok = enforced if own is None else enforced & own
        if ok.all():
            return None
        failed = ~ok
        return ok, Rejection(self.name, rows[failed], [(REASON_ENFORCED, ~enforced[failed]), (REASON, enforced[failed])], True)

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        terms = (*self._added_preferred, *cycle.shape.preferred_node_terms)
        if not terms:
            return None
        stamp = cycle.table.static_version
        memo = cycle.shape.memo.get((self, "score"))
        if memo is None or memo[0] != stamp:
            total = np.zeros(cycle.table.capacity, dtype=np.int64)
            for weight, term in terms:
                total += cycle.table.labels.term(term) * weight
            memo = cycle.shape.memo[self, "score"] = (stamp, total)
        scores: Ints = memo[1]
        return scores[rows]

    def normalize(self, cycle: Cycle, rows: Rows, scores: npt.NDArray[Any]) -> Ints:
        return normalize_by_maximum(scores)
