"""One scheduling cycle: from a pod and the node table to the name of a node, or the reasons for none.

Filters see nodes in windows that start where the last cycle ended, until enough feasible ones
are found; scores are compared over those, ties are broken at random. Synchronous and without
side effects but for the start index.

Source: pkg/scheduler/schedule_one.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from knarr.scheduler.columns import Ints, Rows
from knarr.scheduler.framework import Cycle, Diagnosis, Profile
from knarr.scheduler.handle import Handle
from knarr.scheduler.nodes import NodeInfo
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.queue import Nominator

MINIMUM_FEASIBLE_NODES = 100
MINIMUM_PERCENTAGE = 5


class ExtenderCaller(Protocol):
    """The extenders of a scheduler, asked after the filters and the scores (see `extender`)."""

    @property
    def filters(self) -> bool: ...

    async def filter(self, pod: PodInfo, rows: Rows, diagnosis: Diagnosis) -> Rows: ...

    async def scores(self, pod: PodInfo, rows: Rows) -> Ints | None: ...


@dataclass(slots=True)
class Found:
    """The chosen node and how many were looked at."""

    node_name: str
    row: int
    feasible: int
    evaluated: int
    cycle: Cycle


class Algorithm:
    """Holds what carries over from cycle to cycle: where the next search starts."""

    def __init__(self, handle: Handle, nominator: Nominator, *, percentage_of_nodes_to_score: int = 0) -> None:
        self.handle = handle
        self.nominator = nominator
        self._percentage = percentage_of_nodes_to_score
        self._start = 0

    def nodes_to_find(self, profile: Profile, nodes: int) -> int:
        """Give the number of feasible nodes that are enough."""
        if nodes < MINIMUM_FEASIBLE_NODES:
            return nodes
        percentage = profile.percentage_of_nodes_to_score
        if percentage is None:
            percentage = self._percentage
        if percentage == 0:
            percentage = max(50 - nodes // 125, MINIMUM_PERCENTAGE)
        return max(nodes * percentage // 100, MINIMUM_FEASIBLE_NODES)

    def prepare(self, profile: Profile, pod: PodInfo) -> tuple[Cycle, Diagnosis, Rows]:
        """Run the pre-filters.

        Returns:
          (cycle, diagnosis, rows worth a look); no rows when the pod was refused as a whole.
        """
        table = self.handle.table
        cycle = Cycle(table, pod)
        order = table.order
        diagnosis = Diagnosis(nodes=len(order), cycle=cycle)
        names = profile.run_pre_filters(cycle, diagnosis)
        if diagnosis.pre_filter is not None:
            return cycle, diagnosis, order[:0]
        if names is not None:
            rows = table.rows_of(sorted(names))
            diagnosis.considered = rows
            return cycle, diagnosis, rows
        return cycle, diagnosis, order

    def feasible(
        self, profile: Profile, pod: PodInfo, cycle: Cycle, diagnosis: Diagnosis, rows: Rows, *, wanted: int | None = None
    ) -> Rows:
        """Give rows that pass all filters: the nominated one alone if it does, else up to the number needed."""
        if not rows.size:
            return rows
        nominated = pod.nominated_node or self.nominator.node_of(pod.uid)
        if nominated:
            info = self.handle.table.get(nominated)
            if info is not None:
                row = np.array([info.row], dtype=np.intp)
                if self._filter(profile, cycle, row, None).size:
                    return row
        total = len(rows)
        if wanted is None:
            wanted = self.nodes_to_find(profile, total)
        if wanted >= total:
            return self._filter(profile, cycle, rows, diagnosis)
        start = self._start % total
        found: list[Rows] = []
        number = seen = 0
        step = wanted
        while seen < total and number < wanted:
            begin = (start + seen) % total
            end = min(begin + min(step, total - seen), total)
            window = rows[begin:end]
            passed = self._filter(profile, cycle, window, diagnosis)
            if number + len(passed) > wanted:
                passed = passed[: wanted - number]
                # Search goes on behind the last node taken, so that every node gets its turn.
                seen += int(np.flatnonzero(window == passed[-1])[0]) + 1
            else:
                seen += len(window)
            found.append(passed)
            number += len(passed)
            step = wanted if number else min(step * 4, total)
        self._start = (start + seen) % total
        return found[0] if len(found) == 1 else np.concatenate(found)

    def _filter(self, profile: Profile, cycle: Cycle, rows: Rows, diagnosis: Diagnosis | None) -> Rows:
        passed = profile.run_filters(cycle, rows, diagnosis)
        if len(self.nominator) and passed.size:
            passed = self._respect_nominated(profile, cycle, passed, diagnosis)
        return passed

    def _respect_nominated(self, profile: Profile, cycle: Cycle, rows: Rows, diagnosis: Diagnosis | None) -> Rows:
        """Nodes with nominated pods of no lower priority must have room for those as well."""
        table, pod = self.handle.table, cycle.pod
        refused = []
        candidates = set(rows.tolist())
        for name in list(self.nominator.nodes):
            info = table.get(name)
            if info is None or info.row not in candidates:
                continue
            others = [
                p for p in self.nominator.pods_for(name) if p.uid != pod.uid and p.priority >= pod.priority and p.uid not in info.pods
            ]
            if others and not self.fits_with(profile, cycle, info, others, diagnosis):
                refused.append(info.row)
        return rows[~np.isin(rows, np.array(refused, dtype=np.intp))] if refused else rows

    def fits_with(
        self, profile: Profile, cycle: Cycle, info: NodeInfo, others: Sequence[PodInfo], diagnosis: Diagnosis | None = None
    ) -> bool:
        """Whether the pod fits the node if the others were there too. Leaves the table as it was."""
        table = self.handle.table
        rows = {other.uid: other.row for other in others}
        for other in others:
            table.place(other, info)
        try:
            again = Cycle(table, cycle.pod)
            again_diagnosis = Diagnosis(nodes=len(table.order))
            profile.run_pre_filters(again, again_diagnosis)
            if again_diagnosis.pre_filter is not None:
                return False
            return bool(profile.run_filters(again, np.array([info.row], dtype=np.intp), diagnosis).size)
        finally:
            for other in others:
                table.displace(other, info)
                other.row = rows[other.uid]

    def choose(self, scores: Ints, rows: Rows) -> int:
        """Give the row with the highest score, at random among equals."""
        best = np.flatnonzero(scores == scores.max())
        index = int(best[0]) if len(best) == 1 else int(best[int(self.handle.random.random() * len(best))])
        return int(rows[index])

    def schedule(self, profile: Profile, pod: PodInfo) -> Found | Diagnosis:
        """Find a node for a pod, without extenders.

        Returns:
          Found, or the Diagnosis when no node takes it.

        Raises:
          PluginError: a plugin failed; the cycle says nothing about the pod.
        """
        cycle, diagnosis, rows = self.prepare(profile, pod)
        passed = self.feasible(profile, pod, cycle, diagnosis, rows)
        if not passed.size:
            return diagnosis
        return self._select(profile, cycle, diagnosis, passed, None)

    async def schedule_with(self, profile: Profile, pod: PodInfo, extenders: ExtenderCaller) -> Found | Diagnosis:
        """The same, asking extenders between; the only cycle that awaits."""
        cycle, diagnosis, rows = self.prepare(profile, pod)
        passed = self.feasible(profile, pod, cycle, diagnosis, rows)
        if passed.size and extenders.filters:
            before = len(passed)
            passed = await extenders.filter(pod, passed, diagnosis)
            if len(passed) != before:
                diagnosis.plugins.add("Extender")
        if not passed.size:
            return diagnosis
        extra = await extenders.scores(pod, passed) if len(passed) > 1 else None
        return self._select(profile, cycle, diagnosis, passed, extra)

    def _select(self, profile: Profile, cycle: Cycle, diagnosis: Diagnosis, passed: Rows, extra: Ints | None) -> Found:
        if len(passed) == 1:
            row = int(passed[0])
        else:
            scores = profile.run_scores(cycle, passed)
            if extra is not None:
                scores = scores + extra
            row = self.choose(scores, passed)
        refused = sum(len(r.rows) for r in diagnosis.rejections)
        return Found(self.handle.table.name(row), row, len(passed), len(passed) + refused, cycle)
