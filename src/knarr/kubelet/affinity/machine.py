"""The machine's CPUs, cores, sockets and NUMA nodes, as the kernel shows them in /sys. Pure but for reading.

Source: cadvisor machine topology, pkg/kubelet/cm/cpumanager/topology.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class CPU:
    """Where one logical CPU sits."""

    socket: int
    core: int
    """Unique over the machine."""
    node: int


@dataclass(frozen=True, slots=True)
class Machine:
    """CPUs by number; memory by NUMA node and kind ("memory", "hugepages-2Mi", …) in bytes."""

    cpus: dict[int, CPU]
    memory: dict[int, dict[str, int]] = field(default_factory=dict)

    @property
    def nodes(self) -> tuple[int, ...]:
        return tuple(sorted({cpu.node for cpu in self.cpus.values()} | set(self.memory)))

    def on_nodes(self, nodes: Iterable[int]) -> frozenset[int]:
        """CPUs of these NUMA nodes."""
        wanted = set(nodes)
        return frozenset(number for number, cpu in self.cpus.items() if cpu.node in wanted)


def parse_cpus(text: str) -> frozenset[int]:
    """A list such as "0-2,5". Raises ValueError."""
    out: set[int] = set()
    for part in text.strip().split(","):
        if part.strip():
            low, _, high = part.strip().partition("-")
            first, last = int(low), int(high or low)
            if first < 0 or last < first:
                raise ValueError(f"{text!r} is not a list of CPUs such as 0-2,5")
            out.update(range(first, last + 1))
    return frozenset(out)


def format_cpus(cpus: Iterable[int]) -> str:
    """The shortest list of that kind; "" for none."""
    parts: list[str] = []
    run: list[int] = []
    for number in sorted(cpus):
        if run and number != run[-1] + 1:
            parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
            run = []
        run.append(number)
    if run:
        parts.append(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]))
    return ",".join(parts)


def read(root: str = "/sys") -> Machine:
    """Read it. Raises OSError on a kernel without the files."""
    base = os.path.join(root, "devices/system")
    online = parse_cpus(_text(os.path.join(base, "cpu/online")))
    node_of = {}
    memory: dict[int, dict[str, int]] = {}
    for node in _numbered(os.path.join(base, "node"), "node"):
        folder = os.path.join(base, "node", f"node{node}")
        node_of.update(dict.fromkeys(parse_cpus(_text(os.path.join(folder, "cpulist"))), node))
        memory[node] = _memory(folder)
    cpus: dict[int, CPU] = {}
    cores: dict[tuple[int, str], int] = {}
    for number in sorted(online):
        folder = os.path.join(base, "cpu", f"cpu{number}", "topology")
        socket = max(0, int(_text(os.path.join(folder, "physical_package_id"), "0")))
        siblings = _text(os.path.join(folder, "thread_siblings_list"), str(number))
        core = cores.setdefault((socket, siblings), len(cores))
        cpus[number] = CPU(socket, core, node_of.get(number, 0))
    if not memory:
        total = next((int(line.split()[1]) * 1024 for line in _text("/proc/meminfo").splitlines() if line.startswith("MemTotal:")), 0)
        memory = {0: {"memory": total}}
    return Machine(cpus, memory)


def _memory(folder: str) -> dict[str, int]:
    out: dict[str, int] = {}
    for line in _text(os.path.join(folder, "meminfo"), "").splitlines():
        words = line.split()
        if len(words) >= 4 and words[2] == "MemTotal:":
            out["memory"] = int(words[3]) * 1024
    for kilobytes in _numbered(os.path.join(folder, "hugepages"), "hugepages-", "kB"):
        count = int(_text(os.path.join(folder, "hugepages", f"hugepages-{kilobytes}kB", "nr_hugepages"), "0"))
        size = f"{kilobytes // 1048576}Gi" if kilobytes % 1048576 == 0 else f"{kilobytes // 1024}Mi"
        out[f"hugepages-{size}"] = count * kilobytes * 1024
    huge = sum(size for name, size in out.items() if name != "memory")
    if "memory" in out:
        out["memory"] -= huge
    return out


def _numbered(folder: str, prefix: str, suffix: str = "") -> list[int]:
    names = os.listdir(folder) if os.path.isdir(folder) else []
    middles = (name[len(prefix) : len(name) - len(suffix)] for name in names if name.startswith(prefix) and name.endswith(suffix))
    return sorted(int(middle) for middle in middles if middle.isdigit())


def _text(path: str, default: str | None = None) -> str:
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            return file.read().strip()
    except OSError:
        if default is None:
            raise
        return default
