"""DefaultPreemption: which pods of lower priority would have to go, and from which node.

`find` only decides; evicting the victims is the scheduler's business. A node is tried by taking
its lower-priority pods out of the table, asking the filters again, and putting back as many as
still leave room, the most important first. Most pods depend on a node's other pods by resources
alone; for those the trial is integer arithmetic on one node and the filters are not run.

Source: plugins/defaultpreemption, framework/preemption.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np

from knarr.aiokits import clock
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import Cycle, Diagnosis, Hint, Plugin, Profile, Refusal
from knarr.scheduler.nodes import NodeInfo, NodeTable
from knarr.scheduler.plugins.node_resources import NodeResourcesFit, Room
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.queue import Nominator
from knarr.scheduler.terms import selector

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle, Object

NOT_HELPFUL = "Preemption is not helpful for scheduling"
NO_VICTIMS = "No preemption victims found for incoming pod"
_OFFSET = 2**31


@dataclass(slots=True)
class Candidate:
    """A node, the pods to evict there (most important first), and how many of those a budget protects."""

    node_name: str
    victims: list[PodInfo]
    violations: int


@dataclass(slots=True)
class Decision:
    """What preemption came to: a candidate, or a message; `clears` tells to take a nomination back."""

    candidate: Candidate | None
    message: str
    clears: bool = False


def _never(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    return False


@lru_cache(maxsize=4096)
def _seconds(text: str) -> float:
    """A time as a pod's status has it; thousands of pods share few of them."""
    return clock.parse_rfc3339(text)


def start_time(pod: Pod) -> float:
    """When a pod started; pods that have not are taken to start now."""
    text = (pod.get("status") or {}).get("startTime")
    return _seconds(text) if text else clock.now()


def by_importance(pods: Sequence[PodInfo]) -> list[PodInfo]:
    """Sort, the most important pod first: higher priority, then longer running, then placed later."""
    present = clock.now()

    def key(entry: tuple[int, PodInfo]) -> tuple[int, float, int]:
        index, info = entry
        text = (info.pod.get("status") or {}).get("startTime")
        if text:
            return -info.priority, _seconds(text), index
        return -info.priority, present, -index

    return [info for _, info in sorted(enumerate(pods), key=key)]


class Budgets:
    """PodDisruptionBudgets, counted down as victims are considered."""

    def __init__(self, budgets: Iterable[Object]) -> None:
        self._items = []
        for budget in budgets:
            wanted = selector((budget.get("spec") or {}).get("selector"))
            if not wanted.is_empty and not wanted.nothing:
                status = budget.get("status") or {}
                entry = (
                    budget["metadata"].get("namespace", ""),
                    wanted,
                    status.get("disruptedPods") or {},
                    status.get("disruptionsAllowed") or 0,
                )
                self._items.append(entry)

    def split(self, victims: Sequence[PodInfo]) -> tuple[list[PodInfo], list[PodInfo]]:
        """Give (those whose eviction breaks a budget, the others), in the order given."""
        left = [entry[3] for entry in self._items]
        violating: list[PodInfo] = []
        others: list[PodInfo] = []
        for info in victims:
            broken = False
            for index, (namespace, wanted, disrupted, _) in enumerate(self._items):
                if not info.shape.labels or namespace != info.namespace or not wanted.matches(info.shape.labels) or info.name in disrupted:
                    continue
                left[index] -= 1
                broken = broken or left[index] < 0
            (violating if broken else others).append(info)
        return violating, others


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """Pick the candidate that does the least harm."""

    def harm(c: Candidate) -> tuple[int, int, int, int, float]:
        highest = c.victims[0].priority
        starts = [start_time(v.pod) for v in c.victims if v.priority == highest]
        return c.violations, highest, sum(v.priority + _OFFSET for v in c.victims), len(c.victims), -min(starts)

    return min(candidates, key=harm)


class DefaultPreemption(Plugin):
    name = "DefaultPreemption"

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self._percentage = int(args.get("minCandidateNodesPercentage", 10))
        self._absolute = int(args.get("minCandidateNodesAbsolute", 100))

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        # The plugins that refused the pod wake it up; this one only holds it back for a moment.
        return ((ClusterEvent("Pod", Action.DELETE), _never),)

    def pre_enqueue(self, pod: PodInfo) -> Refusal | None:
        if self.handle.is_preempting(pod.uid):
            return Refusal(self.name, "waiting for the preemption for this pod to be finished")
        return None

    def _ineligible(self, pod: PodInfo, nominated: str, diagnosis: Diagnosis) -> str:
        """Why the pod may not preempt, or ""."""
        if pod.shape.preemption_policy == "Never":
            return "not eligible due to preemptionPolicy=Never."
        if not nominated:
            return ""
        info = self.handle.table.get(nominated)
        if info is None or info.row not in _resolvable(diagnosis, self.handle.table):
            return ""
        if any(p.priority < pod.priority and p.deleting and _is_preempted(p.pod) for p in info.pods.values()):
            return "not eligible due to a terminating pod on the nominated node."
        return ""

    def find(self, profile: Profile, pod: PodInfo, diagnosis: Diagnosis, nominator: Nominator) -> Decision | list[Candidate]:
        """Look for nodes where evicting pods would make room.

        Returns:
          Candidates to choose from, or the Decision that there are none.
        """
        table = self.handle.table
        problem = self._ineligible(pod, pod.nominated_node or nominator.node_of(pod.uid), diagnosis)
        if problem:
            return Decision(None, f"preemption: {problem}")
        rows = sorted(_resolvable(diagnosis, table))
        histogram: dict[str, int] = {}
        candidates: list[Candidate] = []
        if rows:
            wanted = min(max(len(rows) * self._percentage // 100, self._absolute), len(rows))
            offset = self.handle.random.randrange(len(rows))
            budgets = Budgets(self.handle.objects.list("PodDisruptionBudget"))
            trial = _Trial(profile, table, pod, nominator, budgets)
            trial.look_at(rows)
            for step in range(len(rows)):
                answer = trial.on_node(table.info(rows[(offset + step) % len(rows)]))
                if isinstance(answer, Candidate):
                    candidates.append(answer)
                    if len(candidates) >= wanted and any(not c.violations for c in candidates):
                        break
                else:
                    for reason in answer:
                        histogram[reason] = histogram.get(reason, 0) + 1
        if candidates:
            return candidates
        absent = len(table) - len(rows)
        if absent:
            histogram[NOT_HELPFUL] = histogram.get(NOT_HELPFUL, 0) + absent
        lines = ", ".join(sorted(f"{number} {reason}" for reason, number in histogram.items()))
        return Decision(None, f"preemption: 0/{len(table)} nodes are available: {lines}.", clears=True)


def _is_preempted(pod: Pod) -> bool:
    for condition in (pod.get("status") or {}).get("conditions") or ():
        if condition["type"] == "DisruptionTarget":
            return bool(condition["status"] == "True" and condition.get("reason") == "PreemptionByScheduler")
    return False


def _resolvable(diagnosis: Diagnosis, table: NodeTable) -> set[int]:
    """Rows that were refused for reasons which removing pods may cure."""
    if diagnosis.pre_filter is not None:
        return set() if diagnosis.pre_filter.unresolvable else set(table.order.tolist())
    rows = {row for rejection in diagnosis.rejections for row in rejection.resolvable_rows().tolist()}
    rows |= {row for row, (_, unresolvable) in diagnosis.extender_reasons.items() if not unresolvable}
    return {row for row in rows if table.valid[row]}


class _Trial:
    """Tries evictions node by node for one pod, always leaving the table as it was."""

    def __init__(self, profile: Profile, table: NodeTable, pod: PodInfo, nominator: Nominator, budgets: Budgets) -> None:
        self._profile = profile
        self._table = table
        self._pod = pod
        self._nominator = nominator
        self._budgets = budgets
        self._cycle = Cycle(table, pod)
        profile.run_pre_filters(self._cycle, Diagnosis())
        follows = [p for p in profile.filters if p.follows_pods and p.name not in self._cycle.skipped_filters]
        fit = next((p for p in profile.filters if isinstance(p, NodeResourcesFit)), None)
        self._fit = fit if not follows else None
        self._passing: frozenset[int] = frozenset()
        """Rows that no filter refuses but the one for resources, when nothing else depends on the pods there."""

    def look_at(self, rows: Sequence[int]) -> None:
        """Prepare for trials on these rows."""
        if self._fit is None:
            return
        skipped = self._cycle.skipped_filters
        self._cycle.skipped_filters = skipped | {self._fit.name}
        passing = self._profile.run_filters(self._cycle, np.array(rows, dtype=np.intp), None)
        self._cycle.skipped_filters = skipped
        self._passing = frozenset(passing.tolist())

    def on_node(self, info: NodeInfo) -> Candidate | list[str]:
        """Give the candidate this node makes, or the reasons why it makes none."""
        priority = self._pod.priority
        potential = [p for p in info.pods.values() if p.priority < priority]
        if not potential:
            return [NO_VICTIMS]
        others = [
            p for p in self._nominator.pods_for(info.name) if p.uid != self._pod.uid and p.priority >= priority and p.uid not in info.pods
        ]
        if self._fit is not None and info.row in self._passing:
            answer = self._by_numbers(self._fit.room(self._cycle, info.row), info, potential, others)
            if answer is not None:
                return answer
        removed = list(potential)
        try:
            for victim in potential:
                self._table.displace(victim, info)
            for other in others:
                self._table.place(other, info)
            reasons = self._refused(info)
            if reasons:
                return reasons
            violating, fine = self._budgets.split(by_importance(potential))
            victims: list[PodInfo] = []
            violations = 0
            for group in (violating, fine):
                for victim in group:
                    self._table.place(victim, info)
                    removed.remove(victim)
                    if self._refused(info):
                        self._table.displace(victim, info)
                        removed.append(victim)
                        victims.append(victim)
                        violations += group is violating
            if violating and fine:
                victims = by_importance(victims)
            if not victims:
                return [NO_VICTIMS]
            return Candidate(info.name, victims, violations)
        finally:
            for victim in removed:
                self._table.place(victim, info)
            for other in others:
                self._table.displace(other, info)

    def _by_numbers(self, room: Room, info: NodeInfo, potential: list[PodInfo], others: list[PodInfo]) -> Candidate | list[str] | None:
        """The trial where only resources count: the table is not touched. None: there is not enough room even so."""
        for victim in potential:
            room.change(victim.shape, 1)
        for other in others:
            room.change(other.shape, -1)
        if not room.fits:
            return None
        violating, fine = self._budgets.split(by_importance(potential))
        victims: list[PodInfo] = []
        violations = 0
        for group in (violating, fine):
            for victim in group:
                room.change(victim.shape, -1)
                if not room.fits:
                    room.change(victim.shape, 1)
                    victims.append(victim)
                    violations += group is violating
        if violating and fine:
            victims = by_importance(victims)
        return Candidate(info.name, victims, violations) if victims else [NO_VICTIMS]

    def _refused(self, info: NodeInfo) -> list[str]:
        """Reasons why the pod does not fit the node as the table stands; empty when it fits."""
        cycle = Cycle(self._table, self._pod)
        diagnosis = Diagnosis()
        self._profile.run_pre_filters(cycle, diagnosis)
        if diagnosis.pre_filter is not None:
            return [diagnosis.pre_filter.reason]
        return self._ask(cycle, info)

    def _ask(self, cycle: Cycle, info: NodeInfo) -> list[str]:
        diagnosis = Diagnosis()
        if self._profile.run_filters(cycle, np.array([info.row], dtype=np.intp), diagnosis).size:
            return []
        return [reason for rejection in diagnosis.rejections for reason in rejection.reasons(0)]
