"""CPU manager, memory manager and topology manager: placing by the policies on machines of all shapes, and real pinning on this one."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from knarr.api.resources import PODS
from knarr.api.types import Object
from knarr.kubelet.affinity import machine as machines
from knarr.kubelet.affinity.cpus import CPUManager, NotEnough, take
from knarr.kubelet.affinity.hints import Hint, choose
from knarr.kubelet.affinity.machine import CPU, Machine, format_cpus, parse_cpus
from knarr.kubelet.affinity.manager import Affinity
from knarr.kubelet.affinity.memory import MemoryManager
from knarr.kubelet.config import KubeletConfig
from tests.kubelet.conftest import Bench

GIB = 1 << 30


def make_machine(sockets: int, cores: int, threads: int) -> Machine:
    """Numbered as Linux does: all first threads, then all second ones; one NUMA node with 8 GiB per socket."""
    cpus = {t * sockets * cores + core: CPU(core // cores, core, core // cores) for t in range(threads) for core in range(sockets * cores)}
    return Machine(cpus, {socket: {"memory": 8 * GIB} for socket in range(sockets)})


def guaranteed(uid: str, *cpus: str, memory: str = "1Gi", init: str = "") -> Object:
    def container(name: str, cpu: str) -> Object:
        amounts = {"cpu": cpu, "memory": memory}
        return {"name": name, "resources": {"requests": amounts, "limits": amounts}}

    spec: Object = {"containers": [container(f"c{i}", cpu) for i, cpu in enumerate(cpus)]}
    if init:
        spec["initContainers"] = [container("init", init)]
    return {"metadata": {"uid": uid, "name": uid, "namespace": "ns"}, "spec": spec, "status": {"qosClass": "Guaranteed"}}


def affinity(folder: Path, machine: Machine, **options: Any) -> Affinity:
    given = {"cpu_manager_policy": "static", "reserved_system_cpus": "0", **options}
    return Affinity(KubeletConfig(node_name="n", root_dir=str(folder), **given), runtime=None, machine=machine)  # type: ignore[arg-type]


@pytest.mark.parametrize(("text", "cpus"), [("", set()), ("3", {3}), ("0-2,5", {0, 1, 2, 5}), ("7,0-1", {0, 1, 7})])
def test_lists_of_cpus_are_read_and_written(text: str, cpus: set[int]) -> None:
    assert parse_cpus(text) == cpus
    assert parse_cpus(format_cpus(cpus)) == cpus


@pytest.mark.parametrize(
    ("shape", "free", "count", "expected"),
    [
        ((1, 2, 1), "1", 1, "1"),
        ((1, 4, 2), "0-7", 1, "0"),
        ((1, 4, 2), "0-7", 2, "0,4"),  # one whole core
        ((1, 4, 2), "1-7", 3, "1,4-5"),  # a whole core, then the thread that stands alone
        ((2, 4, 1), "0-7", 4, "0-3"),  # a whole socket
        ((2, 4, 1), "1-7", 4, "4-7"),  # the socket that is whole
        ((2, 4, 1), "1-7", 2, "1-2"),  # from the socket that is broken already
    ],
)
def test_cpus_are_taken_so_that_sockets_and_cores_stay_whole(shape: tuple[int, int, int], free: str, count: int, expected: str) -> None:
    assert format_cpus(take(make_machine(*shape), parse_cpus(free), count)) == expected


def test_more_cpus_than_are_free_are_refused() -> None:
    with pytest.raises(NotEnough, match="requested=3, available=2"):
        take(make_machine(1, 4, 1), frozenset({1, 2}), 3)


def one(*nodes: int, preferred: bool = True) -> Hint:
    return Hint(frozenset(nodes), preferred)


@pytest.mark.parametrize(
    ("policy", "given", "expected", "admitted"),
    [
        ("none", [[one(0)]], Hint(None, True), True),
        ("best-effort", [[one(0), one(1)], [one(1)]], one(1), True),
        ("best-effort", [[one(0)], [one(1)]], one(0, 1, preferred=False), True),
        ("restricted", [[one(0)], [one(1)]], one(0, 1, preferred=False), False),
        ("restricted", [[one(0, 1)], None], one(0, 1), True),
        ("single-numa-node", [[one(0, 1)], None], Hint(None, False), False),
        ("single-numa-node", [[one(0), one(1), one(0, 1, preferred=False)], [one(1), one(0, 1, preferred=False)]], one(1), True),
        ("restricted", [[]], one(0, 1, preferred=False), False),
        ("best-effort", [], one(0, 1), True),
    ],
)
def test_the_topology_policies_choose_and_refuse(policy: str, given: list[Any], expected: Hint, admitted: bool) -> None:
    assert choose(policy, (0, 1), given) == (expected, admitted)


def test_whole_cpus_of_guaranteed_pods_are_exclusive_and_come_back(tmp_path: Path) -> None:
    node = affinity(tmp_path, make_machine(1, 4, 1))
    assert node.admit(guaranteed("a", "2")) is None
    assert (node.cpuset("a", "c0"), node.cpuset("b", "c"), node.exclusive("a")) == ("1-2", "0,3", True)
    assert node.admit(guaranteed("b", "1500m")) is None
    assert node.cpuset("b", "c0") == "0,3"
    assert node.admit(guaranteed("c", "2")) == (
        "UnexpectedAdmissionError",
        "Allocate failed due to not enough cpus available to satisfy request: requested=2, available=1, which is unexpected",
    )
    assert affinity(tmp_path, make_machine(1, 4, 1)).cpuset("a", "c0") == "1-2"
    node.release("a")
    assert node.cpuset("b", "c0") == "0-3"
    assert node.admit(guaranteed("c", "2")) is None


def test_a_main_container_takes_over_the_cpus_of_an_init_container(tmp_path: Path) -> None:
    node = affinity(tmp_path, make_machine(1, 4, 1))
    assert node.admit(guaranteed("a", "2", "1", init="3")) is None
    assert node.cpuset("a", "init") == "1-3"
    assert {node.cpuset("a", "c0"), node.cpuset("a", "c1")} == {"1-2", "3"}
    assert node.cpuset("other", "c") == "0"


def test_reserved_cpus_are_no_part_of_a_strict_pool_and_whole_cores_only_are_given_if_so_wanted(tmp_path: Path) -> None:
    node = affinity(tmp_path, make_machine(1, 4, 2), reserved_system_cpus="0,4", cpu_manager_options=("full-pcpus-only", "strict-cpu-reservation"))
    assert node.cpuset("x", "c") == "1-3,5-7"
    refused = node.admit(guaranteed("a", "1"))
    assert refused == ("SMTAlignmentError", "SMT Alignment Error: requested 1 cpus not multiple cpus per core = 2")
    assert node.admit(guaranteed("b", "2")) is None
    assert node.cpuset("b", "c0") == "1,5"


def test_a_static_policy_without_reserved_cpus_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reserved for the system"):
        affinity(tmp_path, make_machine(1, 4, 1), reserved_system_cpus="")


def test_cpus_and_memory_come_from_one_numa_node_or_the_pod_is_refused(tmp_path: Path) -> None:
    node = affinity(
        tmp_path, make_machine(2, 4, 1), memory_manager_policy="Static", reserved_memory={0: {"memory": GIB}}, topology_manager_policy="single-numa-node"
    )
    assert node.admit(guaranteed("a", "2", memory="6Gi")) is None
    first = node.mems("a", "c0")
    # Two CPUs are free beside the first pod, but not the memory.
    assert node.admit(guaranteed("b", "2", memory="4Gi")) is None
    assert node.mems("b", "c0") != first
    assert node.admit(guaranteed("c", "1", memory="7Gi")) == ("TopologyAffinityError", "Resources cannot be allocated with Topology locality")
    assert node.cpuset("c", "c0") == node.cpuset("none", "c")


def test_a_pod_scope_keeps_all_containers_together(tmp_path: Path) -> None:
    node = affinity(tmp_path, make_machine(2, 4, 1), topology_manager_policy="single-numa-node", topology_manager_scope="pod")
    assert node.admit(guaranteed("a", "2", "2")) is None
    assert parse_cpus(node.cpuset("a", "c0")) | parse_cpus(node.cpuset("a", "c1")) == {4, 5, 6, 7}
    assert node.admit(guaranteed("b", "2", "2")) == ("TopologyAffinityError", "Resources cannot be allocated with Topology locality")


def test_memory_of_several_nodes_is_one_group_until_it_is_given_back() -> None:
    memory = MemoryManager(make_machine(2, 1, 1), {})
    assert memory.allocate("a", "c", {"memory": 12 * GIB}, None, {}) == {0, 1}
    assert memory.allocate("b", "c", {"memory": GIB}, frozenset({0}), {}) == {0, 1}
    with pytest.raises(NotEnough):
        memory.allocate("c", "c", {"memory": 4 * GIB}, None, {})
    memory.release("b")
    memory.release("a")
    assert memory.allocate("b", "c", {"memory": GIB}, None, {}) == {0}


def test_what_no_longer_fits_the_machine_is_forgotten() -> None:
    manager = CPUManager(make_machine(1, 2, 1), frozenset({0}), (), {"gone": {"c": frozenset({5})}, "good": {"c": frozenset({1})}})
    assert manager.assigned == {"good": {"c": frozenset({1})}}


async def test_on_this_machine_a_guaranteed_pod_has_its_cpu_alone_and_others_are_moved_away(bench: Bench) -> None:
    cpus = sorted(machines.read().cpus)
    if len(cpus) < 2:
        pytest.fail("needs a machine with two CPUs")
    await bench.stop()
    bench.options = {"cpu_manager_policy": "static", "reserved_system_cpus": str(cpus[0])}
    await bench.start()
    show = "while :; do grep Cpus_allowed_list /proc/self/status; sleep 0.1; done"
    await bench.run("shared", show, restartPolicy="Always")
    await bench.until_ready("shared")
    assert await seen(bench, "shared") == set(cpus)
    amounts = {"cpu": "1", "memory": "32Mi"}
    await bench.run("own", show, restartPolicy="Always", container={"resources": {"requests": amounts, "limits": amounts}})
    await bench.until_ready("own")
    assert await seen(bench, "own") == {cpus[1]}
    await until_seen(bench, "shared", set(cpus) - {cpus[1]})
    await bench.restart()
    assert await seen(bench, "own") == {cpus[1]}
    await bench.run("late", "true", container={"resources": {"requests": amounts, "limits": amounts}})
    assert (await bench.until_phase("late", "Failed"))["status"]["reason"] in ("UnexpectedAdmissionError", "OutOfcpu")
    await bench.client.delete(PODS, "own", bench.namespace, grace_period_seconds=0)
    await until_seen(bench, "shared", set(cpus))


async def seen(bench: Bench, name: str) -> set[int]:
    """The CPUs that a pod's newest process says it may use."""
    folder = next((bench.folder / "logs").glob(f"{bench.namespace}_{name}_*/c"))
    for _ in range(100):
        lines = (folder / "0.log").read_text().splitlines()
        if lines:
            return set(parse_cpus(lines[-1].rsplit("\t", 1)[-1]))
        await asyncio.sleep(0.05)
    raise AssertionError("nothing was printed")


async def until_seen(bench: Bench, name: str, wanted: set[int]) -> None:
    async with asyncio.timeout(10):
        while await seen(bench, name) != wanted:
            await asyncio.sleep(0.05)
