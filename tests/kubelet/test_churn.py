"""Kubelet and runtime end at random moments while pods come and go: every pod ends where its spec says, nothing leaks."""

from __future__ import annotations

import asyncio
import os
import random
import subprocess

from knarr.api.errors import StatusError
from knarr.api.resources import PODS
from knarr.kubelet.cgroups import Cgroups
from knarr.kubelet.volumes import mounts
from tests.kubelet.conftest import Bench

ROUNDS = 10


async def test_restarts_during_starts_and_stops_leave_nothing_and_lose_nothing(bench: Bench) -> None:
    chance = random.Random(6)
    expected: dict[str, str] = {}
    deleted: set[str] = set()
    volume = {"volumes": [{"name": "m", "emptyDir": {"medium": "Memory"}}]}
    mount = {"volumeMounts": [{"name": "m", "mountPath": "/m"}]}
    for number in range(ROUNDS):
        for kind, script, phase in (("ok", "sleep 0.2; exit 0", "Succeeded"), ("bad", "sleep 0.1; exit 3", "Failed"), ("run", "sleep 1000", "Running")):
            name = f"{kind}{number}"
            await bench.run(name, script, container=mount, **volume)
            expected[name] = phase
        if number:
            victim = f"run{number - 1}"
            await bench.client.delete(PODS, victim, bench.namespace, grace_period_seconds=chance.choice((0, 1)))
            deleted.add(victim)
            expected.pop(victim)
        await asyncio.sleep(chance.uniform(0, 0.15))
        await bench.restart()
    for name, phase in expected.items():
        pod = await bench.until_phase(name, phase, 30)
        status = pod["status"]["containerStatuses"][0]
        if phase != "Running":
            assert status["state"]["terminated"]["exitCode"] == (0 if phase == "Succeeded" else 3), name
    for name in deleted:
        await bench.until_gone(name, 15)
    wanted = sum(1 for phase in expected.values() if phase == "Running")
    async with asyncio.timeout(40):
        # A pod that was deleted at once is gone from the API before its container: that one still has its grace period to end.
        while len([c for c in await bench.runtime.list_containers() if c.state.name == "RUNNING"]) != wanted:
            await asyncio.sleep(0.05)
    for name in expected:
        try:
            await bench.client.delete(PODS, name, bench.namespace, grace_period_seconds=1)
        except StatusError as e:
            raise AssertionError(name) from e
    for name in expected:
        await bench.until_gone(name, 20)
    assert bench.kubelet is not None
    async with asyncio.timeout(20):
        while bench.kubelet.workers.workers():
            await asyncio.sleep(0.05)
    assert await bench.runtime.list_containers() == []
    assert await bench.runtime.list_pod_sandboxes() == []
    assert os.listdir(bench.folder / "kubelet" / "pods") == []
    assert os.listdir(bench.folder / "logs") == []
    assert [m for m in mounts.mount_points(str(bench.folder)) if "pods" in m or "containers" in m or "netns" in m] == []
    assert Cgroups(bench.config()).pod_groups() == {}
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(bench.folder) not in processes
