"""CPU manager, policy static: whole CPUs for containers of Guaranteed pods that ask for them, one shared pool for all others.

Caller: affinity.manager. State: who has which CPUs, kept in a file, so that a restarted kubelet gives nobody else's away.
Invariant: exclusive CPUs of two pods never overlap; within a pod a main container may take over what an init container had.
Source: pkg/kubelet/cm/cpumanager (policy_static.go, cpu_assignment.go), KEP-3570.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.affinity.hints import Hint, Hints, combinations
from knarr.kubelet.affinity.machine import Machine

OPTIONS = ("full-pcpus-only", "strict-cpu-reservation")

Assignments = dict[str, dict[str, frozenset[int]]]
"""Pod uid to container to CPUs."""


class NotEnough(Exception):
    """A container cannot have what it asks for; `reason` is the pod's."""

    def __init__(self, message: str, reason: str = "UnexpectedAdmissionError") -> None:
        super().__init__(message)
        self.reason = reason


def exclusive_count(pod: Object, container: Object) -> int:
    """How many whole CPUs a container gets for itself; 0 for those of the shared pool."""
    if podutil.qos_class(pod) != "Guaranteed" or pod["spec"].get("resources"):
        return 0
    millis = quantity.cpu_millicores(((container.get("resources") or {}).get("requests") or {}).get("cpu") or 0)
    return millis // 1000 if millis % 1000 == 0 else 0


def take(machine: Machine, free: frozenset[int], count: int) -> frozenset[int]:
    """Choose CPUs so that sockets, then cores, stay whole for others. Raises NotEnough."""
    if count > len(free):
        raise NotEnough(f"not enough cpus available to satisfy request: requested={count}, available={len(free)}")
    chosen: set[int] = set()
    cpus = machine.cpus
    for kind in ("node", "socket", "core") if _split_sockets(machine) else ("socket", "node", "core"):
        for group in _whole(machine, kind, free - chosen):
            if len(group) <= count - len(chosen):
                chosen |= group

    def rank(number: int) -> tuple[int, int, int, int, int]:
        cpu, left = cpus[number], free - chosen
        held = any(cpus[other].socket == cpu.socket for other in chosen)
        beside = sum(1 for other in left if cpus[other].socket == cpu.socket)
        siblings = sum(1 for other in left if cpus[other].core == cpu.core)
        return (0 if held else 1, beside, siblings, cpu.core, number)

    while len(chosen) < count:
        chosen.add(min(free - chosen, key=rank))
    return frozenset(chosen)


def _split_sockets(machine: Machine) -> bool:
    """Whether a socket has several NUMA nodes, which then are the smaller unit."""
    return len({(cpu.socket, cpu.node) for cpu in machine.cpus.values()}) > len({cpu.socket for cpu in machine.cpus.values()})


def _whole(machine: Machine, kind: str, free: Iterable[int]) -> list[frozenset[int]]:
    """Groups of a kind that are wholly free; those on the fullest sockets first."""
    total: dict[int, set[int]] = {}
    for number, cpu in machine.cpus.items():
        total.setdefault(getattr(cpu, kind), set()).add(number)
    available = set(free)
    whole = {key: group for key, group in total.items() if group <= available}
    on_socket: dict[int, int] = {}
    for number in available:
        socket = machine.cpus[number].socket
        on_socket[socket] = on_socket.get(socket, 0) + 1
    return [frozenset(group) for _, group in sorted(whole.items(), key=lambda item: (on_socket[machine.cpus[min(item[1])].socket], item[0]))]


class CPUManager:
    """The static policy on one machine.

    Args:
      reserved: CPUs that are never exclusive, because the system's own work is counted there.
      assigned: what is known from before; what no longer fits the machine is dropped.
    """

    def __init__(self, machine: Machine, reserved: frozenset[int], options: Sequence[str] = (), assigned: Assignments | None = None) -> None:
        self._machine = machine
        self.reserved = reserved
        self._options = frozenset(options)
        everything = frozenset(machine.cpus)
        self.assigned: Assignments = {
            uid: kept for uid, given in (assigned or {}).items() if (kept := {name: cpus for name, cpus in given.items() if cpus <= everything - reserved})
        }

    def _taken(self) -> frozenset[int]:
        return frozenset().union(*(cpus for given in self.assigned.values() for cpus in given.values()))

    @property
    def shared(self) -> frozenset[int]:
        """CPUs of all containers without exclusive ones."""
        pool = frozenset(self._machine.cpus) - self._taken()
        return pool - self.reserved if "strict-cpu-reservation" in self._options else pool

    @property
    def free(self) -> frozenset[int]:
        """CPUs that may become exclusive."""
        return frozenset(self._machine.cpus) - self._taken() - self.reserved

    def of(self, uid: str, name: str) -> frozenset[int] | None:
        """The exclusive CPUs of a container; None for those of the shared pool."""
        return self.assigned.get(uid, {}).get(name)

    def hints(self, uid: str, name: str, count: int, reusable: frozenset[int]) -> Hints:
        """Where the CPUs could be."""
        if not count:
            return None
        held = self.of(uid, name)
        if held is not None:
            return [Hint(frozenset(self._machine.cpus[number].node for number in held), True)]
        usable, total = self.free | reusable, frozenset(self._machine.cpus)
        sets = combinations(self._machine.nodes)
        least = min((len(nodes) for nodes in sets if len(self._machine.on_nodes(nodes) & total) >= count), default=len(self._machine.nodes))
        out = []
        for nodes in sets:
            here = self._machine.on_nodes(nodes)
            if reusable & here != reusable or len(usable & here) < count:
                continue
            out.append(Hint(nodes, len(nodes) == least))
        return out

    def allocate(self, uid: str, name: str, count: int, nodes: frozenset[int] | None, reusable: frozenset[int]) -> frozenset[int]:
        """Give a container its CPUs, near these NUMA nodes if possible. Raises NotEnough."""
        held = self.of(uid, name)
        if held is not None:
            return held
        usable = self.free | reusable
        if "full-pcpus-only" in self._options:
            self._check_whole_cores(count, usable)
        if count > len(usable):
            raise NotEnough(f"not enough cpus available to satisfy request: requested={count}, available={len(usable)}")
        near = usable & self._machine.on_nodes(nodes) if nodes is not None else usable
        first = reusable if len(reusable) <= count else take(self._machine, reusable, count)
        chosen = first & near if nodes is not None else first
        chosen |= take(self._machine, near - chosen, min(len(near - chosen), count - len(chosen)))
        chosen |= take(self._machine, usable - chosen, count - len(chosen))
        self.assigned.setdefault(uid, {})[name] = chosen
        return chosen

    def _check_whole_cores(self, count: int, usable: frozenset[int]) -> None:
        per_core = max(1, len(self._machine.cpus) // max(1, len({cpu.core for cpu in self._machine.cpus.values()})))
        if count % per_core:
            raise NotEnough(
                f"SMT Alignment Error: requested {count} cpus not multiple cpus per core = {per_core}", "SMTAlignmentError"
            )
        whole = sum(len(group) for group in _whole(self._machine, "core", usable))
        if count > whole:
            raise NotEnough(f"SMT Alignment Error: not enough free physical CPUs: available physical CPUs = {whole}, requested CPUs = {count}, CPUs per core = {per_core}", "SMTAlignmentError")

    def release(self, uid: str) -> bool:
        """The pod has ended; whether it had CPUs of its own."""
        return self.assigned.pop(uid, None) is not None
