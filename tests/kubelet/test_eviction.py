"""Under pressure the node ends pods in the right order and says so."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from knarr.api.resources import EVENTS, NODES
from knarr.kubelet import configfile
from knarr.kubelet.config import EvictionConfig, KubeletConfig
from knarr.kubelet.eviction import ALLOCATABLE, Eviction, Signal, threshold, thresholds
from knarr.kubelet.usage import PodUsage, Space, low_message, order, tree
from tests.kubelet.conftest import Bench, condition

GI = 1 << 30


def test_a_file_of_many_names_is_used_once(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    alone = tree(str(tmp_path))
    for number in range(5):
        os.link(tmp_path / "file", tmp_path / f"name{number}")
    assert tree(str(tmp_path)) == alone
    assert alone.inodes == 2
    assert alone.size >= 100_000
    assert tree(str(tmp_path / "none")) == Space()


def test_thresholds_are_shares_or_amounts() -> None:
    assert threshold("10%", 1000) == 100
    assert threshold("100Mi", 1 << 40) == 100 << 20


def test_a_threshold_acted_upon_holds_until_its_minimum_reclaim_is_free() -> None:
    (one,) = thresholds(EvictionConfig(hard={"nodefs.available": "10%"}, minimum_reclaim={"nodefs.available": "500"}), allocatable=True)
    assert one.crossed({"nodefs.available": Signal(999, 10_000)})
    enough, more = {"nodefs.available": Signal(1_200, 10_000)}, {"nodefs.available": Signal(1_500, 10_000)}
    assert (one.crossed(enough), one.crossed(enough, reclaimed=True), one.crossed(more, reclaimed=True)) == (False, True, False)


def test_pods_together_are_watched_as_the_node_is() -> None:
    signals = [t.signal for t in thresholds(EvictionConfig(), allocatable=True)]
    assert signals.count(ALLOCATABLE) == 1
    assert ALLOCATABLE not in [t.signal for t in thresholds(EvictionConfig(), allocatable=False)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("evictionHard: {disk.available: 1Gi}", "unknown eviction signal"),
        ("evictionHard: {memory.available: 120%}", "between 0% and 100%"),
        ("evictionSoft: {memory.available: 1Gi}", "grace period must be specified"),
    ],
)
def test_thresholds_that_make_no_sense_are_refused(text: str, words: str) -> None:
    with pytest.raises(configfile.ConfigFileError, match=words):
        configfile.load(f"apiVersion: {configfile.API_VERSION}\nkind: {configfile.KIND}\n{text}\n", KubeletConfig(node_name="n"))


def _pod(name: str, priority: int = 0, **requests: str) -> Any:
    containers = [{"name": "c", "resources": {"requests": requests}}]
    return {"metadata": {"name": name}, "spec": {"priority": priority, "containers": containers}, "status": {"qosClass": "Burstable"}}


def test_pods_over_their_request_go_first_then_by_priority_then_the_biggest() -> None:
    pods = [
        (_pod("within", memory="1Gi"), PodUsage(memory=GI // 2)),
        (_pod("important", 1000, memory="1Gi"), PodUsage(memory=4 * GI)),
        (_pod("over", memory="1Gi"), PodUsage(memory=2 * GI)),
        (_pod("far-over", memory="1Gi"), PodUsage(memory=3 * GI)),
    ]
    assert [p["metadata"]["name"] for p, u in sorted(pods, key=lambda one: order(*one, "memory"))] == ["far-over", "over", "important", "within"]


def test_processes_and_inodes_are_ranked_by_themselves() -> None:
    few, many = PodUsage(processes=3, layers={"c": Space(9 << 30, 5)}), PodUsage(processes=300, layers={"c": Space(1 << 20, 5000)})
    pods = [(_pod("a", 10), many), (_pod("b"), few), (_pod("c"), many)]
    assert [p["metadata"]["name"] for p, u in sorted(pods, key=lambda one: order(*one, "pids"))] == ["c", "b", "a"]
    assert sorted([("few", few), ("many", many)], key=lambda one: order(_pod("x"), one[1], "inodes"))[0][0] == "many"


def test_the_message_names_containers_over_their_request_and_the_event_has_them_apart() -> None:
    used = PodUsage(memory=3 * GI, container_memory={"c": 3 * GI})
    text, annotations = low_message(_pod("p", memory="1Gi"), used, "memory", 100 << 20, 10 << 20)
    assert text == (
        "The node was low on resource: memory. Threshold quantity: 100Mi, available: 10Mi. "
        "Container c was using 3Gi, request is 1Gi, has larger consumption of memory. "
    )
    assert annotations == {"offending_containers": "c", "offending_containers_usage": "3Gi", "starved_resource": "memory"}


def _eviction(bench: Bench) -> Eviction:
    assert bench.kubelet is not None
    return bench.kubelet.eviction


async def _restart(bench: Bench, **eviction: Any) -> Eviction:
    await bench.stop()
    bench.options = {"eviction": EvictionConfig(**eviction)}
    await bench.start()
    return _eviction(bench)


async def _node_condition(bench: Bench, kind: str, value: str) -> None:
    async with asyncio.timeout(5):
        while condition(await bench.client.get(NODES, bench.node_name), kind) != value:
            await asyncio.sleep(0.05)


async def test_memory_pressure_evicts_the_pod_that_uses_most_over_its_request(bench: Bench) -> None:
    small = {"resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "64Mi"}}}
    await bench.run("modest", "sleep 1000", container=small)
    await bench.run("greedy", "x=$(head -c 20000000 /dev/zero | tr '\\0' x); sleep 1000; true")
    for name in ("modest", "greedy"):
        await bench.until_ready(name)
    eviction = _eviction(bench)
    eviction.read = lambda: {"memory.available": Signal(10 << 20, 1 << 30)}
    await eviction.look()
    pod = await bench.until_phase("greedy", "Failed")
    assert pod["status"]["reason"] == "Evicted"
    assert pod["status"]["message"].startswith("The node was low on resource: memory. Threshold quantity: 100Mi, available: 10Mi.")
    assert condition(pod, "DisruptionTarget") == "True"
    assert eviction.pressure()["MemoryPressure"]
    await _node_condition(bench, "MemoryPressure", "True")
    await bench.run("late", "true")
    refused = await bench.until_phase("late", "Failed")
    assert refused["status"]["reason"] == "Evicted"
    await bench.run("guaranteed", "sleep 1", container={"resources": {"limits": {"memory": "32Mi", "cpu": "100m"}}})
    await bench.until_phase("guaranteed", "Succeeded")
    assert (await bench.until_phase("modest", "Running"))["status"]["phase"] == "Running"
    told = {e["reason"] for e in (await bench.client.list(EVENTS, "default"))["items"]}
    assert {"EvictionThresholdMet", "NodeHasInsufficientMemory"} <= told


async def test_a_soft_threshold_is_a_condition_at_once_and_an_eviction_after_its_grace_period(bench: Bench) -> None:
    eviction = await _restart(
        bench,
        hard={},
        soft={"memory.available": "1Gi"},
        soft_grace_period_seconds={"memory.available": 0.3},
        max_pod_grace_period_seconds=7,
        pressure_transition_period_seconds=0.5,
    )
    await bench.run("p", "trap 'exit 0' TERM; sleep 1000 & wait", terminationGracePeriodSeconds=60)
    await bench.until_ready("p")
    eviction.read = lambda: {"memory.available": Signal(10 << 20, 4 * GI)}
    await eviction.look()
    assert eviction.pressure()["MemoryPressure"]
    assert bench.kubelet is not None
    (worker,) = bench.kubelet.workers.workers()
    assert not worker.ending
    await asyncio.sleep(0.35)
    await eviction.look()
    assert worker.grace_seconds == 7
    assert (await bench.until_phase("p", "Failed"))["status"]["reason"] == "Evicted"
    eviction.read = lambda: {"memory.available": Signal(3 * GI, 4 * GI)}
    await eviction.look()
    assert eviction.pressure()["MemoryPressure"]  # for its transition period
    await asyncio.sleep(0.55)
    await eviction.look()
    await _node_condition(bench, "MemoryPressure", "False")


async def test_on_a_full_disk_unused_images_go_before_any_pod(bench: Bench) -> None:
    eviction = _eviction(bench)
    await bench.run("p", "sleep 1000")
    await bench.until_ready("p")
    full, roomy = {"nodefs.available": Signal(1, 100)}, {"nodefs.available": Signal(50, 100)}
    assert bench.kubelet is not None
    before = {tag for image in await bench.runtime.list_images() for tag in image.repo_tags}
    bench.kubelet.garbage._first_seen = dict.fromkeys((i.id for i in await bench.runtime.list_images()), 0.0)
    seen = iter((full, roomy))
    eviction.read = lambda: next(seen)
    await eviction.look()
    after = {tag for image in await bench.runtime.list_images() for tag in image.repo_tags}
    assert after < before
    assert any("busybox" in tag for tag in after)
    assert [w.ending for w in bench.kubelet.workers.workers()] == [False]
    await _node_condition(bench, "DiskPressure", "True")
    assert eviction.admit({"spec": {"containers": []}, "metadata": {}, "status": {}}) == ("Evicted", "The node had condition: [DiskPressure]. ")


async def test_pods_over_their_local_storage_are_evicted_all_in_one_round(bench: Bench) -> None:
    eviction = _eviction(bench)
    volume = {"volumes": [{"name": "v", "emptyDir": {"sizeLimit": "1Mi"}}]}
    await bench.run("volume", "head -c 3000000 /dev/urandom > /v/f; sleep 1000", container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, **volume)
    limits = {"resources": {"limits": {"ephemeral-storage": "1Mi"}}}
    await bench.run("layer", "head -c 3000000 /dev/urandom > /tmp-file; sleep 1000", container=limits)
    await bench.run("log", "head -c 3000000 /dev/urandom | base64; sleep 1000", container=limits)
    await bench.run("within", "echo hello; sleep 1000", container=limits)
    for name in ("volume", "layer", "log", "within"):
        await bench.until_ready(name)
    assert bench.kubelet is not None
    eviction.read = lambda: {}
    async with asyncio.timeout(20):
        while sum(w.evict is not None for w in bench.kubelet.workers.workers()) < 3:
            await asyncio.sleep(0.2)
            bench.runtime._stats._disk.clear()  # sizes of layers are remembered for a while
            await eviction.look()
    for name, words in (
        ("volume", 'Usage of EmptyDir volume "v" exceeds the limit "1Mi". '),
        ("layer", "Pod ephemeral local storage usage exceeds the total limit of containers 1Mi. "),
        ("log", "Pod ephemeral local storage usage exceeds the total limit of containers 1Mi. "),
    ):
        pod = await bench.until_phase(name, "Failed")
        assert (pod["status"]["reason"], pod["status"]["message"]) == ("Evicted", words)
        assert condition(pod, "DisruptionTarget") is None
    assert (await bench.until_phase("within", "Running"))["status"]["phase"] == "Running"
