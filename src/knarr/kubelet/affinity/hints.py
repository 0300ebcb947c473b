"""Hints of the managers about NUMA nodes, and the choice among them: the topology manager's policies. Pure.

A provider gives, per resource, either None (no preference) or a list of hints; an empty list means that no placement is possible.
Source: pkg/kubelet/cm/topologymanager (policy.go, policy_none.go, policy_best_effort.go, policy_restricted.go,
policy_single_numa_node.go).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

POLICIES = ("none", "best-effort", "restricted", "single-numa-node")
SCOPES = ("container", "pod")


@dataclass(frozen=True, slots=True)
class Hint:
    """A set of NUMA nodes; None leaves the choice open."""

    nodes: frozenset[int] | None
    preferred: bool


Hints = Sequence[Hint] | None
"""What one provider says about one resource."""


def combinations(nodes: Sequence[int]) -> list[frozenset[int]]:
    """All non-empty sets of nodes, small ones first."""
    return [frozenset(chosen) for size in range(1, len(nodes) + 1) for chosen in itertools.combinations(nodes, size)]


def choose(policy: str, nodes: Sequence[int], given: Sequence[Hints]) -> tuple[Hint, bool]:
    """(the hint to place by, whether the pod may run) for what all providers said.

    Args:
      nodes: the machine's NUMA nodes.
    """
    everything = frozenset(nodes)
    if policy == "none":
        return Hint(None, True), True
    lists = [_open(hints) for hints in given] or [[Hint(None, True)]]
    if policy == "single-numa-node":
        lists = [[h for h in hints if (h.nodes is None and h.preferred) or (h.nodes is not None and len(h.nodes) == 1 and h.preferred)] for hints in lists]
        best = _merge(everything, lists)
        if best.nodes == everything:
            best = Hint(None, best.preferred)
    else:
        best = _merge(everything, lists)
    return best, policy == "best-effort" or best.preferred


def _open(hints: Hints) -> list[Hint]:
    if hints is None:
        return [Hint(None, True)]
    return list(hints) or [Hint(None, False)]


def _merge(everything: frozenset[int], lists: Sequence[list[Hint]]) -> Hint:
    """The best of all ways to take one hint of each list."""
    # The widest of the narrowest: what at least one provider cannot go below.
    least = max((min((len(h.nodes) for h in hints if h.nodes is not None), default=0) for hints in lists), default=0)
    best: Hint | None = None
    for taken in itertools.product(*lists):
        nodes = everything
        for hint in taken:
            nodes = nodes & (hint.nodes if hint.nodes is not None else everything)
        if not nodes:
            continue
        same = all(hint.nodes in (None, taken_nodes) for taken_nodes in [_first(taken)] for hint in taken)
        merged = Hint(nodes, all(hint.preferred for hint in taken) and same)
        if best is None or _better(merged, best, least):
            best = merged
    return best or Hint(everything, False)


def _first(taken: Sequence[Hint]) -> frozenset[int] | None:
    return next((hint.nodes for hint in taken if hint.nodes is not None), None)


def _better(candidate: Hint, current: Hint, least: int) -> bool:
    assert candidate.nodes is not None
    assert current.nodes is not None
    if candidate.preferred != current.preferred:
        return candidate.preferred
    if candidate.preferred:
        return _narrower(candidate.nodes, current.nodes)
    # Neither is preferred: as near as possible to what is needed at least, from above.
    size, other = len(candidate.nodes), len(current.nodes)
    if size == other:
        return _narrower(candidate.nodes, current.nodes)
    if other < least:
        return size > other
    return least <= size < other


def _narrower(a: frozenset[int], b: frozenset[int]) -> bool:
    return (len(a), sorted(a)) < (len(b), sorted(b))
