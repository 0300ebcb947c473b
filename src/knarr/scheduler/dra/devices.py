"""Devices as drivers publish them in ResourceSlices: which pools a node reaches, which devices a selector picks.

A slice is read once per version of its object. What an expression says about a device is remembered with the device, since
neither changes: a cycle over thousands of devices evaluates nothing twice. Callers: the event handlers (`Slices.set`), the
allocator.

Source: dynamic-resource-allocation cel, structured (GatherPools).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.api import devices, quantity
from knarr.scheduler.objects import Object
from knarr.scheduler.terms import NodeSelector, node_term

DeviceID = tuple[str, str, str]
"""(driver, pool, device)."""
Counters = dict[str, dict[str, Any]]
"""Counter set to counter to amount."""


class AllocationError(Exception):
    """A claim, class or slice is not as it must be: trying other nodes would not help."""


def read_selector(selector: Mapping[str, Any] | None) -> NodeSelector | None:
    """Compile a NodeSelector as slices and allocations carry it; None stays None."""
    return NodeSelector((), tuple(node_term(t) for t in selector.get("nodeSelectorTerms") or ())) if selector else None


def _reaches(node: Object, name: str | None, everywhere: bool, selector: NodeSelector | None) -> bool:
    if name:
        return bool(node["metadata"]["name"] == name)
    if everywhere:
        return True
    return selector is not None and selector.matches(node["metadata"].get("labels") or {}, node["metadata"]["name"])


class Device:
    """One device of a slice."""

    __slots__ = ("_answers", "_variables", "consumes", "id", "name", "selector", "slice", "spec")

    def __init__(self, owner: Slice, spec: Object) -> None:
        self.slice = owner
        self.spec = spec
        self.name: str = spec["name"]
        self.id: DeviceID = (owner.driver, owner.pool, self.name)
        self.selector = read_selector(spec.get("nodeSelector"))
        self.consumes: Counters = {
            part["counterSet"]: {name: quantity.parse(c["value"]) for name, c in (part.get("counters") or {}).items()}
            for part in spec.get("consumesCounters") or ()
        }
        self._variables: dict[str, Any] | None = None
        self._answers: dict[str, bool | str] = {}

    def attribute(self, name: str) -> Mapping[str, Any] | None:
        """Find an attribute by its full name; the driver's own ones may lack the domain."""
        attributes: Mapping[str, Any] = self.spec.get("attributes") or {}
        if name in attributes:
            return attributes[name]  # type: ignore[no-any-return]
        domain, slash, rest = name.partition("/")
        return attributes.get(rest) if slash and domain == self.slice.driver else None

    def matches(self, expression: str) -> bool:
        """Evaluate a selector. Raises AllocationError: it is wrong, or fails on this device."""
        answer = self._answers.get(expression)
        if answer is None:
            answer = self._answers[expression] = self._evaluate(expression)
        if isinstance(answer, str):
            raise AllocationError(answer)
        return answer

    def _evaluate(self, expression: str) -> bool | str:
        try:
            if self._variables is None:
                self._variables = devices.as_seen(self.slice.driver, self.spec)
            return devices.matches(expression, self._variables)
        except devices.DeviceError as error:
            return str(error)

    def reaches(self, node: Object) -> bool:
        """Whether a device of a slice that leaves the choice of nodes to its devices can be used on the node."""
        return _reaches(node, self.spec.get("nodeName"), bool(self.spec.get("allNodes")), self.selector)


class Slice:
    """One ResourceSlice, read."""

    __slots__ = (
        "all_nodes",
        "counters",
        "devices",
        "driver",
        "generation",
        "name",
        "node_name",
        "per_device",
        "pool",
        "selector",
        "spec",
        "total",
    )

    def __init__(self, obj: Object) -> None:
        spec = obj["spec"]
        pool = spec.get("pool") or {}
        self.spec = spec
        self.name: str = obj["metadata"]["name"]
        self.driver: str = spec.get("driver") or ""
        self.pool: str = pool.get("name") or ""
        self.generation: int = pool.get("generation") or 0
        self.total: int = pool.get("resourceSliceCount") or 0
        self.node_name: str = spec.get("nodeName") or ""
        self.all_nodes = bool(spec.get("allNodes"))
        self.selector = read_selector(spec.get("nodeSelector"))
        self.per_device = bool(spec.get("perDeviceNodeSelection"))
        self.counters: Counters = {
            part["name"]: {name: quantity.parse(c["value"]) for name, c in (part.get("counters") or {}).items()}
            for part in spec.get("sharedCounters") or ()
        }
        self.devices = [Device(self, device) for device in spec.get("devices") or ()]

    def reaches(self, node: Object) -> bool:
        if self.node_name or self.all_nodes or self.selector is not None:
            return _reaches(node, self.node_name, self.all_nodes, self.selector)
        return self.per_device and any(device.reaches(node) for device in self.devices)


@dataclass(slots=True)
class Pool:
    """The newest slices of one pool, as far as a node reaches them."""

    driver: str
    name: str
    slices: list[Slice] = field(default_factory=list)
    incomplete: bool = False
    invalid: str = ""
    """Why nothing may be allocated from it, or ""."""

    @property
    def id(self) -> str:
        return f"{self.driver}/{self.name}"

    def counters(self) -> Counters:
        """All shared counters of the pool."""
        return {name: counters for part in self.slices for name, counters in part.counters.items()}

    def finish(self) -> None:
        newest = max(part.generation for part in self.slices)
        self.slices = [part for part in self.slices if part.generation == newest]
        self.incomplete = len(self.slices) != self.slices[0].total
        seen: set[str] = set()
        for part in self.slices:
            for device in part.devices:
                if device.name in seen:
                    self.invalid = f"duplicate device name {device.name}"
                seen.add(device.name)


class Slices:
    """All ResourceSlices as last seen."""

    def __init__(self) -> None:
        self._by_name: dict[str, Slice] = {}
        self._of_node: dict[str, dict[str, Slice]] = {}
        """Most slices belong to one node; the others are under ""."""
        self._version = 0
        self._pools: dict[str, tuple[int, Object, list[Pool]]] = {}

    def set(self, obj: Object) -> None:
        self.remove(obj)
        read = Slice(obj)
        self._by_name[read.name] = read
        self._of_node.setdefault(read.node_name, {})[read.name] = read

    def remove(self, obj: Object) -> None:
        old = self._by_name.pop(obj["metadata"]["name"], None)
        if old is not None:
            others = self._of_node[old.node_name]
            del others[old.name]
            if not others:
                del self._of_node[old.node_name]
        self._version += 1

    def pools(self, node: Object, *, partitionable: bool) -> list[Pool]:
        """Pools with devices that the node reaches, remembered until a slice or the node changes."""
        name = node["metadata"]["name"]
        memo = self._pools.get(name)
        if memo is not None and memo[0] == self._version and memo[1] is node:
            return memo[2]
        if len(self._pools) > 2 * len(self._of_node) + 10_000:
            self._pools.clear()
        pools: dict[tuple[str, str], Pool] = {}
        candidates = [*self._of_node.get(name, {}).values(), *self._of_node.get("", {}).values()]
        for part in sorted(candidates, key=lambda part: (part.driver, part.pool, part.name)):
            if (partitionable or not part.per_device) and part.reaches(node):
                pools.setdefault((part.driver, part.pool), Pool(part.driver, part.pool)).slices.append(part)
        for pool in pools.values():
            pool.finish()
        found = list(pools.values())
        self._pools[name] = (self._version, node, found)
        return found
