"""Memory manager, policy Static: memory and huge pages of Guaranteed pods come from chosen NUMA nodes.

Caller: affinity.manager. Accounting only: the kernel enforces it through cpuset.mems. A group of several nodes, once used together,
stays a group until its last container ends, as upstream, so that nobody is squeezed in beside it.
Source: pkg/kubelet/cm/memorymanager (policy_static.go, state), KEP-1769.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.affinity.cpus import NotEnough
from knarr.kubelet.affinity.hints import Hint, Hints, combinations
from knarr.kubelet.affinity.machine import Machine


@dataclass(slots=True)
class Block:
    """What one container has."""

    nodes: frozenset[int]
    amounts: dict[str, int] = field(default_factory=dict)


def wanted(pod: Object, container: Object) -> dict[str, int]:
    """Kind to bytes that a container needs pinned; empty for pods that are not Guaranteed."""
    if podutil.qos_class(pod) != "Guaranteed" or pod["spec"].get("resources"):
        return {}
    requests = (container.get("resources") or {}).get("requests") or {}
    return {name: quantity.value(raw) for name, raw in requests.items() if (name == "memory" or name.startswith("hugepages-")) and quantity.value(raw)}


class MemoryManager:
    """The Static policy on one machine.

    Args:
      reserved: NUMA node to kind to bytes that pods may not have.
    """

    def __init__(self, machine: Machine, reserved: Mapping[int, Mapping[str, int]], assigned: dict[str, dict[str, Block]] | None = None) -> None:
        self._machine = machine
        self._room = {
            node: {kind: max(0, total - reserved.get(node, {}).get(kind, 0)) for kind, total in kinds.items()} for node, kinds in machine.memory.items()
        }
        known = set(machine.memory)
        self.assigned = {uid: kept for uid, given in (assigned or {}).items() if (kept := {n: b for n, b in given.items() if b.nodes <= known})}

    def of(self, uid: str, name: str) -> frozenset[int] | None:
        block = self.assigned.get(uid, {}).get(name)
        return block.nodes if block is not None else None

    def _blocks(self, uid: str) -> list[Block]:
        """What counts against the room: of a pod that is being admitted, init containers' blocks are taken over by the others."""
        return [block for other, given in self.assigned.items() if other != uid for block in given.values()]

    def _fits(self, uid: str, nodes: frozenset[int], amounts: Mapping[str, int], own: Mapping[str, int]) -> bool:
        for kind, amount in amounts.items():
            used = own.get(kind, 0)
            for block in self._blocks(uid):
                if block.nodes & nodes:
                    if block.nodes != nodes and (len(block.nodes) > 1 or len(nodes) > 1):
                        return False
                    used += block.amounts.get(kind, 0)
            if used + amount > sum(self._room[node].get(kind, 0) for node in nodes):
                return False
        return True

    def hints(self, uid: str, name: str, amounts: Mapping[str, int], own: Mapping[str, int]) -> Hints:
        """Where the memory could come from; `own` is what the pod's other containers were given before."""
        if not amounts:
            return None
        held = self.of(uid, name)
        if held is not None:
            return [Hint(held, True)]
        sets = combinations(tuple(sorted(self._room)))
        could = [nodes for nodes in sets if all(sum(self._room[n].get(kind, 0) for n in nodes) >= amount for kind, amount in amounts.items())]
        least = min((len(nodes) for nodes in could), default=len(self._room))
        return [Hint(nodes, len(nodes) == least) for nodes in could if self._fits(uid, nodes, amounts, own)]

    def allocate(self, uid: str, name: str, amounts: dict[str, int], nodes: frozenset[int] | None, own: Mapping[str, int]) -> frozenset[int]:
        """Give a container its memory. Raises NotEnough."""
        held = self.of(uid, name)
        if held is not None:
            return held
        hints = self.hints(uid, name, amounts, own) or []
        fitting = [hint for hint in hints if nodes is None or hint.nodes == nodes] or [h for h in hints if nodes is None or (h.nodes or frozenset()) >= nodes]
        fitting.sort(key=lambda hint: (not hint.preferred, len(hint.nodes or ()), sorted(hint.nodes or ())))
        if not fitting:
            raise NotEnough("[memorymanager] failed to find the default preferred hint" if nodes is None else "[memorymanager] failed to find NUMA nodes to extend the current topology hint")
        chosen = fitting[0].nodes
        assert chosen is not None
        self.assigned.setdefault(uid, {})[name] = Block(chosen, dict(amounts))
        return chosen

    def release(self, uid: str) -> bool:
        return self.assigned.pop(uid, None) is not None
