"""How many pods of which kind are on which node, kept current as pods come and go.

Pod affinity and topology spreading ask "how many pods that match this selector are in that
domain" for every pod scheduled. Instead of looking at all pods each time, a selector that was
asked once keeps a column of counts per node row; a pod that arrives or leaves adds or takes one
in the columns it matches. Pods with equal namespace and labels share one `Likeness`, so that
matching is done once per likeness and not once per pod.

Caller: `nodes` (places and removes pods), plugins (ask). Invariant: for every counter and row,
counts[row] is the number of placed pods on that row that the counter's test accepts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.podinfo import PodInfo, PodShape
from knarr.scheduler.terms import Labels, PodTerm

MAXIMUM_COUNTERS = 1024

Counts = npt.NDArray[np.int32]


class Likeness:
    """Pods of one namespace with equal labels, terminating ones apart."""

    __slots__ = ("counters", "deleting", "key", "labels", "namespace", "rows", "total")

    def __init__(self, key: Hashable, namespace: str, labels: Labels, deleting: bool) -> None:
        self.key = key
        self.namespace = namespace
        self.labels = labels
        self.deleting = deleting
        self.rows: dict[int, int] = {}
        self.total = 0
        self.counters: list[Counter] = []


Test = Callable[[Likeness], bool]


class Counter:
    """A column of counts for one test."""

    __slots__ = ("counts", "test", "total", "version")

    def __init__(self, test: Test, capacity: int) -> None:
        self.test = test
        self.counts: Counts = np.zeros(capacity, dtype=np.int32)
        self.total = 0
        self.version = 0

    def add(self, row: int, number: int) -> None:
        self.counts[row] += number
        self.total += number
        self.version += 1


class PodCounters:
    """All counters over placed pods. Counters not asked for the longest time go first."""

    def __init__(self) -> None:
        self.capacity = 0
        self._likenesses: dict[Hashable, Likeness] = {}
        self._counters: OrderedDict[Hashable, Counter] = OrderedDict()

    def grow(self, capacity: int) -> None:
        self.capacity = capacity
        for counter in self._counters.values():
            counts = np.zeros(capacity, dtype=np.int32)
            counts[: len(counter.counts)] = counter.counts
            counter.counts = counts

    def _likeness(self, info: PodInfo) -> Likeness:
        shape = info.shape
        memo_key = "likeness-deleting" if info.deleting else "likeness"
        key = shape.memo.get(memo_key)
        if key is None:
            key = shape.memo[memo_key] = (shape.namespace, frozenset(shape.labels.items()), info.deleting)
        likeness = self._likenesses.get(key)
        if likeness is None:
            likeness = self._likenesses[key] = Likeness(key, shape.namespace, shape.labels, info.deleting)
            likeness.counters = [c for c in self._counters.values() if c.test(likeness)]
        return likeness

    def add(self, info: PodInfo, row: int) -> None:
        likeness = self._likeness(info)
        likeness.rows[row] = likeness.rows.get(row, 0) + 1
        likeness.total += 1
        for counter in likeness.counters:
            counter.add(row, 1)

    def remove(self, info: PodInfo, row: int) -> None:
        likeness = self._likeness(info)
        left = likeness.rows.get(row, 0) - 1
        if left:
            likeness.rows[row] = left
        else:
            likeness.rows.pop(row, None)
        likeness.total -= 1
        for counter in likeness.counters:
            counter.add(row, -1)
        if not likeness.total:
            del self._likenesses[likeness.key]

    def counter(self, key: Hashable, test: Test) -> Counter:
        """Give the counter of a test.

        Args:
          key: stands for the test: equal keys mean equal tests.
        """
        counter = self._counters.get(key)
        if counter is not None:
            self._counters.move_to_end(key)
            return counter
        if len(self._counters) >= MAXIMUM_COUNTERS:
            _, old = self._counters.popitem(last=False)
            for likeness in self._likenesses.values():
                if old in likeness.counters:
                    likeness.counters.remove(old)
        counter = self._counters[key] = Counter(test, self.capacity)
        for likeness in self._likenesses.values():
            if test(likeness):
                likeness.counters.append(counter)
                for row, number in likeness.rows.items():
                    counter.add(row, number)
        return counter

    def __len__(self) -> int:
        return len(self._likenesses)


class TermGroup:
    """All placed pods that carry one and the same affinity term, counted per row."""

    __slots__ = ("counts", "kind", "term", "total")

    def __init__(self, kind: str, term: PodTerm, capacity: int) -> None:
        self.kind = kind
        self.term = term
        self.counts: Counts = np.zeros(capacity, dtype=np.int32)
        self.total = 0


KINDS = ("required_affinity", "required_anti_affinity", "preferred_affinity", "preferred_anti_affinity")


class TermGroups:
    """The affinity terms of placed pods. `version` moves when a group appears or vanishes."""

    def __init__(self) -> None:
        self.capacity = 0
        self.version = 0
        self._groups: dict[tuple[str, PodTerm], TermGroup] = {}

    def grow(self, capacity: int) -> None:
        self.capacity = capacity
        for group in self._groups.values():
            counts = np.zeros(capacity, dtype=np.int32)
            counts[: len(group.counts)] = group.counts
            group.counts = counts

    def add(self, shape: PodShape, row: int, number: int) -> None:
        """Count the terms of a pod in (number 1) or out (number -1)."""
        for kind in KINDS:
            for term in getattr(shape, kind):
                key = (kind, term)
                group = self._groups.get(key)
                if group is None:
                    group = self._groups[key] = TermGroup(kind, term, self.capacity)
                    self.version += 1
                group.counts[row] += number
                group.total += number
                if not group.total:
                    del self._groups[key]
                    self.version += 1

    def matching(self, shape: PodShape, namespace_labels: Labels, labels_version: int) -> list[TermGroup]:
        """Give the groups whose term matches a pod of this shape; remembered until groups or namespaces change."""
        stamp = (self.version, labels_version)
        memo: tuple[Any, list[TermGroup]] | None = shape.memo.get("term-groups")
        if memo is not None and memo[0] == stamp:
            return memo[1]
        found = [g for g in self._groups.values() if g.term.matches(shape.namespace, shape.labels, namespace_labels)]
        shape.memo["term-groups"] = (stamp, found)
        return found

    def __len__(self) -> int:
        return len(self._groups)
