"""NodeResourcesFit and NodeResourcesBalancedAllocation: do the requests fit, and how well.

All amounts are integers as in `resources`. Scores use what pods ask for, with defaults for
those that ask for nothing; the filter uses requests alone.

Source: plugins/noderesources (fit, least_allocated, most_allocated, requested_to_capacity_ratio, balanced_allocation).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.columns import Bools, Ints, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import MAXIMUM_SCORE, Cycle, Hint, Plugin, Rejection
from knarr.scheduler.nodes import CPU, MEMORY
from knarr.scheduler.podinfo import Pod, PodInfo, PodShape
from knarr.scheduler.resources import amounts, pod_requests, scaled_down

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle

_DEFAULT_RESOURCES: list[dict[str, Any]] = [{"name": "cpu", "weight": 1}, {"name": "memory", "weight": 1}]
_NATIVE = ("cpu", "memory", "ephemeral-storage")
TOO_MANY_PODS = "Too many pods"


def _freed_resources(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    """A pod left its node (or its nomination): worth a try if it held something the waiting pod wants."""
    if old is None:
        return False
    if not old["spec"].get("nodeName") and not (old.get("status") or {}).get("nominatedNodeName"):
        return False
    held = pod_requests(old)
    # Every pod holds a place among the allowed number, so any departure helps a pod that asks for nothing.
    return not waiting.shape.request_items or any(held.get(name) for name, _ in waiting.shape.request_items)


def _scaled_down(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    if old is None or new is None:
        return False
    if new["metadata"]["uid"] == waiting.uid:
        return True
    if not new["spec"].get("nodeName"):
        return False
    return scaled_down(old, new, [name for name, _ in waiting.shape.request_items])


def _node_could_fit(waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
    """A node came or grew: it must at least hold the pod when empty, and have grown in what the pod wants."""
    if new is None:
        return False
    have = amounts((new.get("status") or {}).get("allocatable"))
    if have.get("pods", 0) < 1 or any(have.get(name, 0) < value for name, value in waiting.shape.request_items):
        return False
    if old is None:
        return True
    had = amounts((old.get("status") or {}).get("allocatable"))
    names = ["pods", *(name for name, _ in waiting.shape.request_items)]
    return any(have.get(name, 0) > had.get(name, 0) for name in names)


class Room:
    """What a node would have left with one more pod on it, of all that this pod asks for; negative where it does not fit."""

    __slots__ = ("_left", "_names", "_pods")

    def __init__(self, names: list[str], left: list[int], pods: int) -> None:
        self._names = names
        self._left = left
        self._pods = pods

    def change(self, shape: PodShape, number: int) -> None:
        """Take a pod off the node (1), or put it there (-1)."""
        self._pods += number
        requests, left = shape.requests, self._left
        for index, name in enumerate(self._names):
            amount = requests.get(name)
            if amount:
                left[index] += number * amount

    @property
    def fits(self) -> bool:
        return self._pods >= 0 and (not self._left or min(self._left) >= 0)


class NodeResourcesFit(Plugin):
    name = "NodeResourcesFit"

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self._ignored = frozenset(args.get("ignoredResources") or ())
        self._ignored_groups = tuple(f"{group}/" for group in args.get("ignoredResourceGroups") or ())
        strategy = args.get("scoringStrategy") or {}
        self._strategy: str = strategy.get("type") or "LeastAllocated"
        self._resources = [(r["name"], int(r.get("weight") or 1)) for r in strategy.get("resources") or _DEFAULT_RESOURCES]
        shape = (strategy.get("requestedToCapacityRatio") or {}).get("shape") or []
        self._utilization = np.array([p.get("utilization") or 0 for p in shape], dtype=np.int64)
        self._shape_scores = np.array([(p.get("score") or 0) * 10 for p in shape], dtype=np.int64)

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return (
            (ClusterEvent("Pod", Action.DELETE), _freed_resources),
            (ClusterEvent("Pod", Action.UPDATE_POD_SCALE_DOWN), _scaled_down),
            (ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_ALLOCATABLE), _node_could_fit),
        )

    def _is_ignored(self, name: str) -> bool:
        return "/" in name and name not in _NATIVE and (name in self._ignored or name.startswith(self._ignored_groups or ("\0",)))

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        table = cycle.table
        short: list[tuple[str, Bools]] = []
        unresolvable: Bools | None = None
        full = table.pods_count[rows] >= table.pods_allowed[rows]
        if full.any():
            short.append((TOO_MANY_PODS, full))
        for name, wanted in cycle.shape.request_items:
            if self._is_ignored(name):
                continue
            index = table.resource(name)
            have = table.allocatable[index, rows]
            lacking = (have - table.requested[index, rows]) < wanted
            if lacking.any():
                short.append((f"Insufficient {name}", lacking))
                never = have < wanted
                unresolvable = never if unresolvable is None else unresolvable | never
        if not short:
            return None
        bad = short[0][1]
        for _, mask in short[1:]:
            bad = bad | mask
        if unresolvable is None:
            unresolvable = np.zeros(len(rows), dtype=np.bool_)
        parts: list[tuple[str, Bools | None]] = [(reason, mask[bad]) for reason, mask in short]
        return ~bad, Rejection(self.name, rows[bad], parts, unresolvable[bad])

    def room(self, cycle: Cycle, row: int) -> Room:
        """The filter for a single node, without arrays: preemption tries many small changes of one node."""
        table = cycle.table
        names, left = [], []
        for name, wanted in cycle.shape.request_items:
            if not self._is_ignored(name):
                index = table.resource(name)
                names.append(name)
                left.append(int(table.allocatable[index, row]) - int(table.requested[index, row]) - wanted)
        return Room(names, left, int(table.pods_allowed[row]) - int(table.pods_count[row]) - 1)

    def _amounts(self, cycle: Cycle, rows: Rows, name: str) -> tuple[Ints, Ints] | None:
        """(allocatable, requested with this pod) of one resource; None when the resource does not count here."""
        table, shape = cycle.table, cycle.shape
        if name == "cpu":
            return table.allocatable[CPU, rows], table.nonzero[0, rows] + shape.nonzero_cpu
        if name == "memory":
            return table.allocatable[MEMORY, rows], table.nonzero[1, rows] + shape.nonzero_memory
        wanted = shape.requests.get(name, 0)
        if not wanted and name not in _NATIVE:
            return None
        index = table.resource(name)
        return table.allocatable[index, rows], table.requested[index, rows] + wanted

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        total: Ints | None = None
        weights: Ints | int = 0
        for name, weight in self._resources:
            pair = self._amounts(cycle, rows, name)
            if pair is None:
                continue
            have, used = pair
            counted = have > 0
            every = bool(counted.all())
            divisor = have if every else np.where(counted, have, 1)
            scores = self._resource_score(divisor, used)
            if self._strategy == "RequestedToCapacityRatio":
                counted, every = counted & (scores > 0), False
            if not every:
                scores = np.where(counted, scores, 0)
            part = scores if weight == 1 else scores * weight
            total = part if total is None else total + part
            weights = weights + (weight if every else counted * weight)
        if total is None:
            return None
        if isinstance(weights, int):
            average: Ints = total // weights
            return average
        divided = np.where(weights > 0, weights, 1)
        if self._strategy == "RequestedToCapacityRatio":
            rounded: Ints = np.floor(total / divided + 0.5).astype(np.int64)
            return rounded
        quotient: Ints = total // divided
        return quotient

    def _resource_score(self, have: Ints, used: Ints) -> Ints:
        if self._strategy == "LeastAllocated":
            least: Ints = np.maximum(have - used, 0) * MAXIMUM_SCORE // have
            return least
        if self._strategy == "MostAllocated":
            most: Ints = np.minimum(used, have) * MAXIMUM_SCORE // have
            return most
        utilization = np.where(used > have, 100, used * 100 // have)
        return self._broken_line(np.asarray(utilization, dtype=np.int64))

    def _broken_line(self, at: Ints) -> Ints:
        """Evaluate the configured function between its points, in whole numbers truncated toward zero."""
        xs, ys = self._utilization, self._shape_scores
        if not xs.size:
            return np.zeros(at.shape, dtype=np.int64)
        result = np.full(at.shape, ys[-1], dtype=np.int64)
        done = at <= xs[0]
        result[done] = ys[0]
        for i in range(1, len(xs)):
            here = ~done & (at <= xs[i])
            step = (ys[i] - ys[i - 1]) * (at[here] - xs[i - 1])
            result[here] = ys[i - 1] + np.sign(step) * (np.abs(step) // (xs[i] - xs[i - 1]))
            done |= here
        return result


class NodeResourcesBalancedAllocation(Plugin):
    name = "NodeResourcesBalancedAllocation"

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self._resources = [r["name"] for r in args.get("resources") or _DEFAULT_RESOURCES]

    def score(self, cycle: Cycle, rows: Rows) -> npt.NDArray[Any] | None:
        table, requests = cycle.table, cycle.shape.requests
        wanted = [requests.get(name, 0) for name in self._resources]
        if not any(wanted):
            # Pods that ask for nothing would otherwise all go to the one best balanced node.
            return None
        fractions, counted = [], []
        for name, amount in zip(self._resources, wanted, strict=True):
            if not amount and name not in _NATIVE:
                continue
            index = table.resource(name)
            have = table.allocatable[index, rows]
            present = have > 0
            used = table.requested[index, rows] + amount
            fraction = np.minimum(used / (have if present.all() else np.where(present, have, 1)), 1.0)
            fractions.append(fraction)
            counted.append(present)
        if not fractions:
            return None
        if len(fractions) == 2 and counted[0].all() and counted[1].all():
            deviation = np.abs((fractions[0] - fractions[1]) / 2)
        else:
            values, mask = np.stack(fractions), np.stack(counted)
            number = np.maximum(mask.sum(axis=0), 1)
            mean = np.where(mask, values, 0).sum(axis=0) / number
            deviation = np.sqrt(np.where(mask, (values - mean) ** 2, 0).sum(axis=0) / number)
        result: Ints = ((1 - deviation) * MAXIMUM_SCORE).astype(np.int64)
        return result
