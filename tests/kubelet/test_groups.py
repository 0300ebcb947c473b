"""Figures of control groups, read from trees as the kernel shows them in both versions."""

from __future__ import annotations

from pathlib import Path

from knarr.kubelet.cgroups import Hierarchies
from knarr.kubelet.server import groups, stats

MIB = 1 << 20


def _tree(folder: Path, files: dict[str, str]) -> str:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(folder)


def test_version_two_tells_cpu_memory_io_and_pressure(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "g/cpu.stat": "usage_usec 3000\nuser_usec 2000\nsystem_usec 1000\nnr_periods 9\nnr_throttled 4\nthrottled_usec 50\n",
            "g/cpu.max": "20000 100000\n",
            "g/cpu.weight": "39\n",
            "g/memory.current": f"{10 * MIB}\n",
            "g/memory.stat": f"anon {MIB}\nfile {2 * MIB}\ninactive_file {3 * MIB}\npgfault 7\npgmajfault 2\n",
            "g/memory.max": "max\n",
            "g/memory.swap.max": "max\n",
            "g/memory.events": "max 5\noom_kill 1\n",
            "g/pids.current": "3\n",
            "g/pids.max": "100\n",
            "g/cgroup.procs": "11\n12\n",
            "g/io.stat": "254:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n",
            "g/memory.pressure": "some avg10=1.50 avg60=0.10 avg300=0.00 total=2000000\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=1000000\n",
        },
    )
    found = groups.read(Hierarchies(v2=root), "/g")
    assert found is not None
    assert (found.cpu_ns, found.cpu_user_ns, found.cpu_system_ns, found.throttled_periods) == (3_000_000, 2_000_000, 1_000_000, 4)
    assert (found.cpu_quota_us, found.cpu_period_us) == (20_000, 100_000)
    assert abs(found.cpu_shares - 1000) < 30  # weights are coarser than shares
    assert (found.memory, found.working_set, found.rss, found.cache) == (10 * MIB, 7 * MIB, MIB, 2 * MIB)
    assert (found.memory_limit, found.fail_count, found.oom_kills, found.threads, found.threads_most) == (0, 5, 1, 3, 100)
    assert found.processes == [11, 12]
    assert found.io == {"254:0": {"rbytes": 10, "wbytes": 20, "rios": 1, "wios": 2, "dbytes": 0, "dios": 0}}
    assert found.pressure["memory"].some["avg10"] == 1.5
    assert stats._psi(found.pressure["memory"])["full"]["total"] == 1_000_000_000
    assert stats.swap_allowed(found, 4 * MIB, v2=True) == 4 * MIB
    assert groups.read(Hierarchies(v2=root), "/gone") is None


def test_version_one_tells_the_same_and_counts_swap_with_memory(tmp_path: Path) -> None:
    root = _tree(
        tmp_path,
        {
            "cpuacct/g/cpuacct.usage": "3000000\n",
            "cpuacct/g/cpuacct.stat": "user 2\nsystem 1\n",
            "cpu/g/cpu.shares": "204\n",
            "cpu/g/cpu.cfs_period_us": "100000\n",
            "cpu/g/cpu.cfs_quota_us": "-1\n",
            "cpu/g/cpu.stat": "nr_periods 9\nnr_throttled 4\nthrottled_time 50\n",
            "memory/g/memory.usage_in_bytes": f"{10 * MIB}\n",
            "memory/g/memory.stat": f"rss 1\ntotal_rss {MIB}\ntotal_cache {2 * MIB}\ntotal_inactive_file {3 * MIB}\ntotal_swap 5\n",
            "memory/g/memory.limit_in_bytes": f"{20 * MIB}\n",
            "memory/g/memory.memsw.limit_in_bytes": f"{21 * MIB}\n",
            "memory/g/memory.soft_limit_in_bytes": "9223372036854771712\n",
            "memory/g/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n",
            "blkio/g/blkio.throttle.io_service_bytes": "254:0 Read 10\n254:0 Write 20\n254:0 Total 30\nTotal 30\n",
            "pids/g/pids.current": "3\n",
            "pids/g/pids.max": "max\n",
        },
    )
    hierarchies = Hierarchies(v1={name: f"{root}/{name}" for name in ("cpu", "cpuacct", "memory", "pids", "blkio")})
    found = groups.read(hierarchies, "/g")
    assert found is not None
    assert (found.cpu_ns, found.cpu_shares, found.cpu_quota_us, found.throttled_ns) == (3_000_000, 204, 0, 50)
    assert (found.memory, found.working_set, found.rss, found.swap, found.oom_kills) == (10 * MIB, 7 * MIB, MIB, 5, 2)
    assert (found.memory_limit, found.swap_limit, found.reservation, found.threads_most) == (20 * MIB, 21 * MIB, 0, 0)
    assert found.io == {"254:0": {"rbytes": 10, "wbytes": 20}}
    assert stats.swap_allowed(found, 4 * MIB, v2=False) == MIB
    assert found.pressure == {}
