"""Figures of containers, and control groups of version 2 on a faked tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from knarr.runtime.cgroups import Cgroups
from knarr.runtime.cri import LinuxResources
from knarr.runtime.spec import resources
from knarr.runtime.stats import interfaces
from tests.runtime.conftest import Bench


async def test_figures_of_a_running_container(bench: Bench) -> None:
    container_id = await bench.run("sh", "-c", "dd if=/dev/zero of=/file bs=1M count=3 2>/dev/null; i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; sleep 1000")
    for _ in range(300):
        result = await bench.runtime.exec_sync(container_id, ["sh", "-c", "[ -e /file ] && ps | grep -c 'sleep 1000'"])
        if result.stdout.strip() == b"2":
            break
    (stats,) = await bench.runtime.list_container_stats()
    assert stats.id == container_id
    assert stats.cpu_usage_core_ns > 1_000_000
    assert 0 < stats.memory_working_set_bytes <= stats.memory_usage_bytes
    assert stats.process_count >= 1
    assert stats.writable_layer_bytes >= 3 << 20
    assert stats.writable_layer_inodes >= 1
    (sandbox,) = await bench.runtime.list_pod_sandbox_stats()
    assert sandbox.process_count >= 1


def test_interfaces_are_read_from_the_kernels_table() -> None:
    text = (
        "Inter-|   Receive  |  Transmit\n face |bytes packets errs drop fifo frame compressed multicast|bytes packets errs drop fifo colls carrier compressed\n"
        "    lo: 10 1 0 0 0 0 0 0 10 1 0 0 0 0 0 0\n  eth1: 5 1 0 0 0 0 0 0 6 1 0 0 0 0 0 0\n  eth0: 100 2 3 0 0 0 0 0 200 4 5 0 0 0 0 0\n"
    )
    first, second = interfaces(text)
    assert (first.name, first.rx_bytes, first.rx_errors, first.tx_bytes, first.tx_errors) == ("eth0", 100, 3, 200, 5)
    assert second.name == "eth1"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    group = tmp_path / "kubepods/pod1/c1"
    group.mkdir(parents=True)
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    (group / "memory.current").write_text("1000000\n")
    (group / "memory.stat").write_text("anon 400000\nfile 600000\ninactive_file 300000\npgfault 12\npgmajfault 3\n")
    (group / "cpu.stat").write_text("usage_usec 1500\nuser_usec 1000\n")
    (group / "pids.current").write_text("4\n")
    (group / "memory.events").write_text("low 0\nhigh 0\nmax 9\noom 2\noom_kill 1\n")
    return tmp_path


def test_version_2_is_recognised_and_read(tree: Path) -> None:
    groups = Cgroups(str(tree))
    assert groups.version == 2
    usage = groups.usage("/kubepods/pod1/c1")
    assert (usage.cpu_ns, usage.memory_bytes, usage.working_set_bytes, usage.rss_bytes) == (1_500_000, 1_000_000, 700_000, 400_000)
    assert (usage.page_faults, usage.major_page_faults, usage.processes) == (12, 3, 4)
    assert groups.oom_kills("/kubepods/pod1/c1") == 1
    assert groups.oom_kills("/kubepods/pod1/gone") == 0
    assert groups.exists("/kubepods/pod1/c1")


def test_version_1_beside_an_empty_version_2_tree_counts_as_version_1(tmp_path: Path) -> None:
    for name in ("memory", "cpuacct", "pids", "unified", "systemd"):
        (tmp_path / name / "g").mkdir(parents=True)
    (tmp_path / "unified/cgroup.controllers").write_text("")
    (tmp_path / "memory/g/memory.usage_in_bytes").write_text("500")
    (tmp_path / "memory/g/memory.stat").write_text("rss 1\ntotal_rss 200\ntotal_inactive_file 100\n")
    (tmp_path / "memory/g/memory.oom_control").write_text("oom_kill_disable 0\nunder_oom 0\noom_kill 2\n")
    (tmp_path / "cpuacct/g/cpuacct.usage").write_text("77")
    groups = Cgroups(str(tmp_path))
    assert (groups.version, groups.controllers) == (1, ["cpuacct", "memory", "pids"])
    usage = groups.usage("/g")
    assert (usage.cpu_ns, usage.working_set_bytes, usage.rss_bytes) == (77, 400, 200)
    assert groups.oom_kills("g") == 2


def test_an_empty_group_is_removed_with_those_below_it(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("")
    os.makedirs(tmp_path / "a/b/c")
    Cgroups(str(tmp_path)).remove("/a")
    assert not (tmp_path / "a").exists()


def test_resources_become_the_runtimes_document() -> None:
    wanted = LinuxResources(
        cpu_period_us=100000, cpu_quota_us=50000, cpu_shares=512, memory_limit_bytes=1 << 20, pids_limit=10, cpuset_cpus="0", unified={"memory.high": "5"}
    )
    assert resources(wanted, 2) == {
        "cpu": {"shares": 512, "quota": 50000, "period": 100000, "cpus": "0"},
        "memory": {"limit": 1 << 20},
        "pids": {"limit": 10},
        "unified": {"memory.high": "5"},
    }
    assert "unified" not in resources(wanted, 1)
    assert resources(LinuxResources(), 1) == {"cpu": {}}
