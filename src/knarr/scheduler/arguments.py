"""What the arguments of plugins may be: a configuration that upstream's scheduler would refuse at its start is refused, too.

Called by `config` when a KubeSchedulerConfiguration is read. Pure.

Source: apis/config/validation/validation_pluginargs.go.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

Arguments = dict[str, Any]

_ALWAYS = frozenset({"apiVersion", "kind"})
_STRATEGIES = ("LeastAllocated", "MostAllocated", "RequestedToCapacityRatio")
_ACTIONS = ("DoNotSchedule", "ScheduleAnyway")


def _range(args: Arguments, name: str, low: int, high: int | None) -> Iterator[str]:
    value = args.get(name)
    if value is not None and (value < low or (high is not None and value > high)):
        yield f"{name}: Invalid value: {value}: not in valid range [{low}, {'inf)' if high is None else f'{high}]'}"


def _one_of(path: str, value: Any, supported: Iterable[str]) -> Iterator[str]:
    if value not in supported:
        yield f'{path}: Unsupported value: "{value}": supported values: ' + ", ".join(f'"{name}"' for name in supported)


def _preemption(args: Arguments) -> Iterator[str]:
    yield from _range(args, "minCandidateNodesPercentage", 0, 100)
    yield from _range(args, "minCandidateNodesAbsolute", 0, None)
    if args.get("minCandidateNodesPercentage") == 0 and args.get("minCandidateNodesAbsolute") == 0:
        yield "minCandidateNodesPercentage: Invalid value: 0: cannot be zero at the same time as minCandidateNodesAbsolute"


def _pod_affinity(args: Arguments) -> Iterator[str]:
    yield from _range(args, "hardPodAffinityWeight", 0, 100)


def _node_affinity(args: Arguments) -> Iterator[str]:
    required = (args.get("addedAffinity") or {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if required is not None and not required.get("nodeSelectorTerms"):
        yield "addedAffinity.requiredDuringSchedulingIgnoredDuringExecution: Required value: must have at least one node selector term"


def _spreading(args: Arguments) -> Iterator[str]:
    constraints = args.get("defaultConstraints") or []
    kind = args.get("defaultingType") or "System"
    yield from _one_of("defaultingType", kind, ("System", "List"))
    if kind == "System" and constraints:
        yield 'defaultingType: Invalid value: "System": when .defaultConstraints are not empty'
    seen = set()
    for index, one in enumerate(constraints):
        path = f"defaultConstraints[{index}]"
        if (one.get("maxSkew") or 0) <= 0:
            yield f"{path}.maxSkew: Invalid value: {one.get('maxSkew') or 0}: not in valid range (0, inf)"
        if not one.get("topologyKey"):
            yield f"{path}.topologyKey: Required value: can not be empty"
        yield from _one_of(f"{path}.whenUnsatisfiable", one.get("whenUnsatisfiable") or "", _ACTIONS)
        if one.get("labelSelector") is not None:
            yield f"{path}.labelSelector: Forbidden: constraint must not define a selector, as they deduced for each pod"
        pair = one.get("topologyKey"), one.get("whenUnsatisfiable")
        if pair in seen:
            yield f'{path}: Duplicate value: "{{{pair[0]}, {pair[1]}}}"'
        seen.add(pair)


def _fit(args: Arguments) -> Iterator[str]:
    for group in args.get("ignoredResourceGroups") or ():
        if "/" in group:
            yield f'ignoredResourceGroups: Invalid value: "{group}": resource group name can\'t contain \'/\''
    strategy = args.get("scoringStrategy")
    if strategy is None:
        return
    kind = strategy.get("type") or ""
    yield from _one_of("scoringStrategy.type", kind, _STRATEGIES)
    for index, resource in enumerate(strategy.get("resources") or ()):
        weight = resource.get("weight", 1)
        if not 0 < weight <= 100:
            path = f"scoringStrategy.resources[{index}].weight"
            yield f"{path}: Invalid value: {weight}: resource weight of {resource.get('name')} not in valid range (0, 100]"
    if kind == "RequestedToCapacityRatio":
        yield from _shape("scoringStrategy.requestedToCapacityRatio.shape", (strategy.get("requestedToCapacityRatio") or {}).get("shape") or [])


def _shape(path: str, points: list[Arguments]) -> Iterator[str]:
    if not points:
        yield f"{path}: Required value: at least one point must be specified"
    before = None
    for index, point in enumerate(points):
        at, score = point.get("utilization") or 0, point.get("score") or 0
        if before is not None and before >= at:
            yield f"{path}[{index}].utilization: Invalid value: {at}: values must be sorted in increasing order"
        if not 0 <= at <= 100:
            yield f"{path}[{index}].utilization: Invalid value: {at}: not in valid range [0, 100]"
        if not 0 <= score <= 10:
            yield f"{path}[{index}].score: Invalid value: {score}: not in valid range [0, 10]"
        before = at


def _balanced(args: Arguments) -> Iterator[str]:
    seen = set()
    for index, resource in enumerate(args.get("resources") or ()):
        name, weight = resource.get("name"), resource.get("weight", 1)
        if name in seen:
            yield f'resources[{index}].name: Duplicate value: "{name}"'
        if weight != 1:
            yield f"resources[{index}].weight: Invalid value: {weight}: must be 1"
        seen.add(name)


def _binding(args: Arguments) -> Iterator[str]:
    if (args.get("bindTimeoutSeconds") or 0) < 0:
        yield f"bindTimeoutSeconds: Invalid value: {args['bindTimeoutSeconds']}: invalid BindTimeoutSeconds, should not be a negative value"


_CHECKS: dict[str, tuple[frozenset[str], Callable[[Arguments], Iterator[str]]]] = {
    "DefaultPreemption": (frozenset({"minCandidateNodesPercentage", "minCandidateNodesAbsolute"}), _preemption),
    "InterPodAffinity": (frozenset({"hardPodAffinityWeight", "ignorePreferredTermsOfExistingPods"}), _pod_affinity),
    "NodeAffinity": (frozenset({"addedAffinity"}), _node_affinity),
    "PodTopologySpread": (frozenset({"defaultConstraints", "defaultingType"}), _spreading),
    "NodeResourcesFit": (frozenset({"ignoredResources", "ignoredResourceGroups", "scoringStrategy"}), _fit),
    "NodeResourcesBalancedAllocation": (frozenset({"resources"}), _balanced),
    "VolumeBinding": (frozenset({"bindTimeoutSeconds"}), _binding),
}


def check(plugin: str, args: Arguments) -> None:
    """Check the arguments of a plugin; those of plugins that have none are not looked at.

    Raises:
      ValueError: a field is unknown or its value cannot be meant.
    """
    found = _CHECKS.get(plugin)
    if found is None:
        return
    known, problems = found
    if unknown := sorted(set(args) - known - _ALWAYS):
        raise ValueError(f'{plugin}Args: unknown field "{unknown[0]}"')
    try:
        told = list(problems(args))
    except (AttributeError, TypeError) as error:
        raise ValueError(f"{plugin}Args: {error}") from error
    if told:
        raise ValueError(f"{plugin}Args: " + ", ".join(told))
