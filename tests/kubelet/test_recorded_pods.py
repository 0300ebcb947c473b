"""Recorded pods of a real node behave the same on ours: states and reasons in order, events, logs."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from knarr.network.podnet import BridgeNetwork
from knarr.testing.apiserver import _folder, running_apiserver
from knarr.testing.apiserver import test_pki as make_pki
from tests.kubelet.conftest import Bench
from tests.kubelet.replay import Play, scenarios

QUICK_SECONDS = 2.45
LONGEST_SECONDS = 40.0
AT_ONCE = 8

# What a recording cannot be compared in, and why.
LEFT_OUT = {
    "sec-supplemental-strict": "the recorded runtime refuses what ours does",
    "volume-missing-pvc": "the recorded scheduler never bound the pod",
    "image-volume-or-runtimeclass-missing": "refused by the API server",
    "restart-onfailure-two-containers": "the recorded kubelet lost the last state to its garbage collector",
    "volume-configmap-update-propagates": "waits 95 seconds",
    "downward-volume-update": "waits 95 seconds",
    "resize-deferred": "played alone below: it depends on the node's size",
    "resize-infeasible": "played alone below",
    "pod-admission-outofcpu": "played alone below",
    "delete-during-image-backoff": "the recorded kubelet looked once more between failure and deletion",
    "annotation-update-generation": "needs an image from a registry",
}
IMAGES = ("docker.io/library/busybox:latest", "rec.invalid/none:1", "UPPER/INVALID:::x")
KINDS = ("Pod", "ConfigMap", "Secret", "Service")


def _playable(scenario: dict, low: float, high: float) -> bool:  # type: ignore[type-arg]
    last = scenario["timeline"][-1]["t"] if scenario["timeline"] else 0.0
    if scenario["scenario"] in LEFT_OUT or not low < last <= high:
        return False
    pods = [o for o in scenario["objects"] if o["kind"] == "Pod"]
    images = {c["image"] for p in pods for c in p["spec"]["containers"] + p["spec"].get("initContainers", [])}
    return all(o["kind"] in KINDS for o in scenario["objects"]) and images <= set(IMAGES)


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
    async with running_apiserver() as server:
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
            await bench.start()
            assert bench.kubelet is not None
            # Many recordings at once: each was made alone on a node of two CPUs.
            bench.kubelet.capacity.allocatable["cpu"] = "100"
            yield bench
        finally:
            await bench.clean()
            await network.cleanup()
            await network.close()


async def _play(bench: Bench, low: float, high: float) -> None:
    slots, faults = asyncio.Semaphore(AT_ONCE), []

    async def one(number: int, scenario: dict) -> None:  # type: ignore[type-arg]
        async with slots:
            play = Play(bench, scenario, number)
            last = scenario["timeline"][-1]["t"] if scenario["timeline"] else 0.0
            try:
                await play.run(last * 1.5 + 25)
                found = play.differences() + play.result_differences()
            except TimeoutError:
                found = ["did not come to its end"]
            faults.extend(f"{scenario['scenario']}: {text}" for text in found)

    chosen = [(i, s) for i, s in enumerate(scenarios()) if _playable(s, low, high)]
    assert len(chosen) > 20
    async with asyncio.TaskGroup() as group:
        for number, scenario in chosen:
            group.create_task(one(number, scenario))
    assert not faults, "\n".join(faults)


async def test_quick_recordings_replay(networked: Bench) -> None:
    await _play(networked, -1.0, QUICK_SECONDS)


async def test_recordings_that_depend_on_the_size_of_the_node_replay(networked: Bench) -> None:
    assert networked.kubelet is not None
    networked.kubelet.capacity.allocatable["cpu"] = "2"
    names = [n for n, why in LEFT_OUT.items() if "played alone" in why]
    for number, scenario in enumerate(scenarios()):
        if scenario["scenario"] in names:
            play = Play(networked, scenario, number)
            await play.run(30)
            assert not play.differences(), scenario["scenario"]
            async with asyncio.timeout(10):
                while networked.kubelet.workers.active_pods():
                    await asyncio.sleep(0.02)


@pytest.mark.slow
@pytest.mark.timeout(600)
async def test_longer_recordings_replay(networked: Bench) -> None:
    await _play(networked, QUICK_SECONDS, LONGEST_SECONDS)
