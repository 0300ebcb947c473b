"""Recorded pods of a real node behave the same on ours: states and reasons in order, events, logs."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from knarr.controllers.manager import ControllerManager, ControllersConfig
from knarr.network.podnet import BridgeNetwork
from knarr.scheduler.scheduler import Scheduler, SchedulerConfig
from knarr.testing.apiserver import _folder, running_apiserver
from knarr.testing.apiserver import test_pki as make_pki
from tests.images import build
from tests.kubelet.conftest import Bench
from tests.kubelet.replay import Play, length, scenarios

QUICK_SECONDS = 2.45
LONGEST_SECONDS = 120.0
QUICK_AT_ONCE, LONGER_AT_ONCE = 8, 24
AGAIN_AT_ONCE = (4, 1)

ALONE = ("resize-deferred", "resize-infeasible", "pod-admission-outofcpu")
"""What depends on the size of the node."""
UNSCHEDULED = ("volume-missing-pvc",)
"""Pods that the recorded scheduler never bound."""
OLD_RUNTIME = ("sec-supplemental-strict",)
"""What the recorded runtime could not do, and ours can."""
APART = (*ALONE, *UNSCHEDULED, *OLD_RUNTIME)
SERVER, NONROOT = "registry.k8s.io/e2e-test-images/agnhost:2.56", "registry.k8s.io/e2e-test-images/nonroot:1.4"
OTHER_BUSYBOX = "registry.k8s.io/e2e-test-images/busybox:1.37.0-1"


def _playable(scenario: dict, low: float, high: float) -> bool:  # type: ignore[type-arg]
    return scenario["scenario"] not in APART and low < length(scenario) <= high


@pytest_asyncio.fixture
async def networked() -> AsyncIterator[Bench]:
    """A kubelet whose pods have a bridge, with a server for logs."""
    folder, pid = Path(tempfile.mkdtemp(prefix="knarr-kubelet-")), os.getpid()
    network = BridgeNetwork(
        bridge=f"kt{pid % 99999}",
        pod_cidrs=[f"10.213.{pid % 250}.0/24"],
        cluster_cidrs=["10.213.0.0/16"],
        state_dir=folder / "net",
        table=f"knarr-test-{pid}",
        link_prefix=f"k{pid % 256:02x}-",
    )
    await network.start()
    async with running_apiserver(service_cidrs=("10.0.0.0/16",)) as server:
        bench = Bench(server, folder, network)
        serving = make_pki().node_serving(folder, bench.node_name, ["127.0.0.1"])
        bench.options = {
            "port": 16320 + pid % 70,
            "serving_cert": str(serving.certificate),
            "serving_key": str(serving.key),
            "client_ca": str(Path(_folder().name) / "ca.crt"),
            "cluster_dns": ("10.0.0.10",),
        }
        try:
            await bench.prepare()
            for archive in (build.test_server((SERVER,)), build.nonroot((NONROOT,)), build.busybox((OTHER_BUSYBOX,))):
                await bench.runtime.load_images(str(archive))
            await bench.start()
            assert bench.kubelet is not None
            # Many recordings at once: each was made alone on a node of two CPUs.
            bench.kubelet.capacity.allocatable["cpu"] = "100"
            yield bench
        finally:
            await bench.clean()
            await network.cleanup()
            await network.close()


async def _play(bench: Bench, low: float, high: float, at_once: int) -> None:
    """Replay recordings side by side, the longest first; what differs then is played again with little beside it.

    A recording tells how long a pod was in each state, and a busy machine can be late. A difference that is ours comes
    every time.
    """
    chosen = [(i, s) for i, s in enumerate(scenarios()) if _playable(s, low, high)]
    assert len(chosen) > 20
    chosen.sort(key=lambda item: -length(item[1]))
    for attempt, width in enumerate((at_once, *AGAIN_AT_ONCE)):
        faults = await _play_all(bench, chosen, width, attempt * 1000)
        chosen = [(number, scenario) for number, scenario in chosen if number in faults]
        if not chosen:
            return
    raise AssertionError("\n".join(f"{scenario['scenario']}: {text}" for number, scenario in chosen for text in faults[number]))


async def _play_all(bench: Bench, chosen: list[tuple[int, dict]], width: int, offset: int) -> dict[int, list[str]]:  # type: ignore[type-arg]
    """What differs, by the number of the scenario."""
    slots, faults = asyncio.Semaphore(width), {}

    async def one(number: int, scenario: dict) -> None:  # type: ignore[type-arg]
        async with slots:
            play = Play(bench, scenario, number + offset)
            try:
                await play.run(length(scenario) * 1.5 + 40)
                found = play.differences() + play.result_differences()
            except TimeoutError:
                found = ["did not come to its end"]
            if found:
                faults[number] = found

    async with asyncio.TaskGroup() as group:
        for number, scenario in chosen:
            group.create_task(one(number, scenario))
    return faults


async def test_quick_recordings_replay(networked: Bench) -> None:
    await _play(networked, -1.0, QUICK_SECONDS, QUICK_AT_ONCE)


async def test_recordings_that_depend_on_the_size_of_the_node_replay(networked: Bench) -> None:
    assert networked.kubelet is not None
    networked.kubelet.capacity.allocatable["cpu"] = "2"
    for number, scenario in enumerate(scenarios()):
        if scenario["scenario"] in ALONE:
            play = Play(networked, scenario, number)
            await play.run(30)
            assert not play.differences(), scenario["scenario"]
            async with asyncio.timeout(10):
                while networked.kubelet.workers.active_pods():
                    await asyncio.sleep(0.02)


async def test_a_pod_that_cannot_be_scheduled_is_left_alone_as_recorded(networked: Bench) -> None:
    scheduler = asyncio.ensure_future(Scheduler(networked.client, SchedulerConfig()).run())
    try:
        for number, scenario in enumerate(scenarios()):
            if scenario["scenario"] in UNSCHEDULED:
                play = Play(networked, scenario, number, scheduled=False)
                await play.run(30)
                assert not play.differences()
                (states,) = play.states.values()
                assert states[-1]["conditions"] == [["PodScheduled", "False", "Unschedulable"]]
    finally:
        scheduler.cancel()
        await asyncio.wait({scheduler})


async def test_what_the_runtime_cannot_do_is_refused_as_recorded(networked: Bench) -> None:
    await networked.stop()
    networked.runtime.features = frozenset()  # type: ignore[misc]
    await networked.start()
    for number, scenario in enumerate(scenarios()):
        if scenario["scenario"] in OLD_RUNTIME:
            play = Play(networked, scenario, number)
            await play.run(30)
            assert not play.differences()


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_longer_recordings_replay(networked: Bench) -> None:
    jobs = asyncio.ensure_future(ControllerManager(networked.client, ControllersConfig(enabled="job-controller")).run())
    try:
        await _play(networked, QUICK_SECONDS, LONGEST_SECONDS, LONGER_AT_ONCE)
    finally:
        jobs.cancel()
        await asyncio.wait({jobs})
