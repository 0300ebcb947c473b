"""What pods together may use is limited on the host, in both versions of control groups, and only then said to be."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from knarr.api.resources import EVENTS
from knarr.kubelet import allocatable, configfile
from knarr.kubelet.cgroups import Cgroups, Hierarchies
from knarr.kubelet.config import KubeletConfig
from tests.kubelet.conftest import Bench

CAPACITY = {"cpu": "4", "memory": "8Gi", "pods": "110", "ephemeral-storage": "10Gi", "hugepages-2Mi": "64Mi"}
CONTROLLERS = ("cpu", "memory", "pids", "hugetlb")
NODE: dict[str, Any] = {"kind": "Node", "metadata": {"name": "n"}}


def config(**fields: Any) -> KubeletConfig:
    return KubeletConfig(node_name="n", cgroup_root="/ours", **fields)


def version_1(root: Path, controllers: tuple[str, ...] = CONTROLLERS) -> Hierarchies:
    """A tree of files as the kernel would show, with the files of kubepods that are written."""
    files = {"cpu": ["cpu.shares"], "memory": ["memory.limit_in_bytes"], "pids": ["pids.max"], "hugetlb": ["hugetlb.2MB.limit_in_bytes"]}
    for controller in controllers:
        for group in ("", "/burstable", "/besteffort"):
            folder = root / controller / "ours/kubepods"
            (folder / group.strip("/")).mkdir(parents=True, exist_ok=True)
            for name in files[controller]:
                (folder / group.strip("/") / name).touch()
    return Hierarchies(v1={controller: str(root / controller) for controller in controllers})


def version_2(root: Path) -> Hierarchies:
    (root / "ours/kubepods").mkdir(parents=True)
    (root / "cgroup.controllers").write_text("cpu memory pids hugetlb")
    for group in ("", "/burstable", "/besteffort"):
        (root / f"ours/kubepods{group}").mkdir(exist_ok=True)
        for name in ("cpu.weight", "memory.max", "pids.max", "hugetlb.2MB.max"):
            (root / f"ours/kubepods{group}" / name).touch()
    return Hierarchies(v2=str(root))


async def enforced(settings: KubeletConfig, hierarchies: Hierarchies, seconds: float = 5) -> list[tuple[str, str, str]]:
    told: list[tuple[str, str, str]] = []

    def record(obj: object, kind: str, reason: str, message: str) -> None:
        told.append((kind, reason, message))

    async with asyncio.timeout(seconds):
        await allocatable.enforce(settings, Cgroups(settings, hierarchies), CAPACITY, record, NODE)
    return told


@pytest.fixture
def few_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.kubelet.machine.most_processes", lambda: 4000)


@pytest.mark.usefixtures("few_processes")
async def test_version_1_gets_capacity_less_reservations_and_no_eviction_threshold(tmp_path: Path) -> None:
    reserved = config(system_reserved={"cpu": "500m", "memory": "1Gi", "pid": "100"}, kube_reserved={"cpu": "500m", "memory": "1Gi", "pid": "900"})
    told = await enforced(reserved, version_1(tmp_path))
    kubepods = {c: tmp_path / c / "ours/kubepods" for c in CONTROLLERS}
    assert (kubepods["cpu"] / "cpu.shares").read_text() == str(3 * 1024)
    assert (kubepods["memory"] / "memory.limit_in_bytes").read_text() == str(6 << 30)
    assert (kubepods["pids"] / "pids.max").read_text() == "3000"
    assert (kubepods["hugetlb"] / "hugetlb.2MB.limit_in_bytes").read_text() == str(64 << 20)
    assert told == [("Normal", "NodeAllocatableEnforced", "Updated Node Allocatable limit across pods")]


@pytest.mark.usefixtures("few_processes")
async def test_version_2_gets_the_same_limits(tmp_path: Path) -> None:
    told = await enforced(config(system_reserved={"memory": "1Gi"}, reserved_system_cpus="0-1"), version_2(tmp_path))
    kubepods = tmp_path / "ours/kubepods"
    assert (kubepods / "cpu.weight").read_text() == "79"
    assert (kubepods / "memory.max").read_text() == str(7 << 30)
    assert (kubepods / "pids.max").read_text() == "4000"
    assert (kubepods / "hugetlb.2MB.max").read_text() == str(64 << 20)
    assert (kubepods / "burstable/memory.max").read_text() in ("", "max")
    assert [reason for _, reason, _ in told] == ["NodeAllocatableEnforced"]


@pytest.mark.usefixtures("few_processes")
async def test_without_enforcement_pods_may_use_all_there_is(tmp_path: Path) -> None:
    await enforced(config(system_reserved={"memory": "1Gi"}, enforce_node_allocatable=()), version_1(tmp_path))
    assert (tmp_path / "memory/ours/kubepods/memory.limit_in_bytes").read_text() == str(8 << 30)


@pytest.mark.usefixtures("few_processes")
async def test_a_limit_that_cannot_be_set_is_a_warning_until_it_can(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(allocatable, "_RETRY_SECONDS", 0.01)
    hierarchies = version_1(tmp_path)
    missing = tmp_path / "memory/ours/kubepods/memory.limit_in_bytes"
    missing.unlink()
    task = asyncio.ensure_future(enforced(config(), hierarchies))
    await asyncio.sleep(0.05)
    assert not task.done()
    missing.touch()
    told = await task
    message = 'Failed to update Node Allocatable Limits "/ours/kubepods": memory.limit_in_bytes: No such file or directory'
    assert told[0] == ("Warning", "FailedNodeAllocatableEnforcement", message)
    assert told[-1][:2] == ("Normal", "NodeAllocatableEnforced")


@pytest.mark.usefixtures("few_processes")
async def test_a_host_without_the_controller_is_never_said_to_be_limited(tmp_path: Path) -> None:
    settings = config()
    told: list[str] = []
    cgroups = Cgroups(settings, version_1(tmp_path, ("cpu", "memory")))
    task = asyncio.ensure_future(allocatable.enforce(settings, cgroups, CAPACITY, lambda _o, _k, reason, message: told.append(f"{reason}: {message}"), NODE))
    await asyncio.sleep(0.05)
    task.cancel()
    assert told == ['FailedNodeAllocatableEnforcement: Failed to update Node Allocatable Limits "/ours/kubepods": pids.max: the host has no pids controller']


@pytest.mark.usefixtures("few_processes")
async def test_groups_of_the_system_and_of_daemons_are_limited_when_asked_for(tmp_path: Path) -> None:
    hierarchies = version_1(tmp_path)
    for controller, name in (("cpu", "cpu.shares"), ("memory", "memory.limit_in_bytes"), ("pids", "pids.max")):
        for group in ("system", "daemons"):
            (tmp_path / controller / group).mkdir()
            (tmp_path / controller / group / name).touch()
    (tmp_path / "hugetlb/system").mkdir()
    (tmp_path / "hugetlb/daemons").mkdir()
    settings = config(
        enforce_node_allocatable=("pods", "system-reserved", "kube-reserved-compressible"),
        system_reserved={"cpu": "1", "memory": "1Gi"},
        kube_reserved={"cpu": "500m", "memory": "1Gi"},
        system_reserved_cgroup="/system",
        kube_reserved_cgroup="/daemons",
    )
    told = await enforced(settings, hierarchies)
    assert (tmp_path / "cpu/system/cpu.shares").read_text() == "1024"
    assert (tmp_path / "memory/system/memory.limit_in_bytes").read_text() == str(1 << 30)
    assert (tmp_path / "cpu/daemons/cpu.shares").read_text() == "512"
    assert (tmp_path / "memory/daemons/memory.limit_in_bytes").read_text() == ""
    assert [message for _, _, message in told[:2]] == ["Updated limits on system reserved cgroup /system", "Updated limits on kube reserved cgroup /daemons"]


def test_a_configuration_file_names_whose_groups_are_limited() -> None:
    head = "apiVersion: kubelet.config.k8s.io/v1beta1\nkind: KubeletConfiguration\n"
    found, idle = configfile.load(head + "enforceNodeAllocatable: [pods, system-reserved]\nsystemReservedCgroup: /sys", config())
    assert (found.enforce_node_allocatable, found.system_reserved_cgroup, idle) == (("pods", "system-reserved"), "/sys", [])
    for wrong in ("enforceNodeAllocatable: [everything]", "enforceNodeAllocatable: [kube-reserved]"):
        with pytest.raises(configfile.ConfigFileError):
            configfile.load(head + wrong, config())


async def test_a_real_kubelet_limits_its_pods_before_it_says_so(bench: Bench) -> None:
    assert bench.kubelet is not None
    async with asyncio.timeout(10):
        while True:
            events = await bench.client.list(EVENTS, "default", field_selector="involvedObject.kind=Node")
            told = [e["reason"] for e in events["items"] if "NodeAllocatable" in e["reason"]]
            if told:
                break
            await asyncio.sleep(0.05)
    cgroups = bench.kubelet.node.cgroups
    kubepods = (cgroups.hierarchies.v2 or cgroups.hierarchies.v1["pids"]) + cgroups.kubepods()
    limited = Path(kubepods, "pids.max").read_text().strip() != "max"
    assert told == ["NodeAllocatableEnforced" if limited else "FailedNodeAllocatableEnforcement"]
