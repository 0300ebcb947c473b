"""What a node does beside running pods: it shuts down in order, rotates logs, refuses what it cannot hold."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from knarr.api.resources import LEASES, NODES, PODS, PRIORITY_CLASSES
from tests.kubelet.conftest import Bench, condition, container_state


async def test_a_shutdown_ends_pods_within_their_time_and_says_why(bench: Bench) -> None:
    await bench.stop()
    bench.options = {"shutdown_grace_period_seconds": 4.0, "shutdown_grace_period_critical_seconds": 1.0}
    await bench.start()
    await bench.run("p", "trap 'exit 0' TERM; sleep 1000 & wait", restartPolicy="Always")
    await bench.until_ready("p")
    assert bench.kubelet is not None
    bench.kubelet.shutdown.request()
    pod = await bench.until("p", lambda p: p if p and p["status"]["phase"] in ("Failed", "Succeeded") else None)
    assert (pod["status"]["reason"], pod["status"]["message"]) == ("Terminated", "Pod was terminated in response to imminent node shutdown.")
    assert condition(pod, "DisruptionTarget") == "True"
    await bench.run("late", "true")
    assert (await bench.until_phase("late", "Failed"))["status"]["reason"] == "NodeShutdown"
    async with asyncio.timeout(5):
        while True:
            node = await bench.client.get(NODES, bench.node_name)
            ready = next(c for c in node["status"]["conditions"] if c["type"] == "Ready")
            if ready["status"] == "False":
                break
            await asyncio.sleep(0.05)
    assert ready["message"] == "node is shutting down"


async def test_a_shutdown_by_priority_ends_one_group_after_the_other_each_within_its_time(bench: Bench) -> None:
    await bench.stop()
    bench.options = {"shutdown_grace_period_by_priority": ((0, 1.0), (1000, 2.0), (2000, 2.0))}
    await bench.start()
    for name, value in (("middle", 1500), ("high", 5000)):
        await bench.client.create(PRIORITY_CLASSES, {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": name}, "value": value})
    ending = "trap 'sleep 0.2; exit 0' TERM; sleep 1000 & wait"
    # Its grace period is longer than its group's time.
    await bench.run("stubborn", "trap '' TERM; sleep 1000 & wait; wait", terminationGracePeriodSeconds=60)
    await bench.run("low", ending, terminationGracePeriodSeconds=60)
    await bench.run("middle", ending, terminationGracePeriodSeconds=60, priorityClassName="middle")
    await bench.run("high", ending, terminationGracePeriodSeconds=60, priorityClassName="high")
    for name in ("stubborn", "low", "middle", "high"):
        await bench.until_ready(name)
    assert bench.kubelet is not None
    started = asyncio.get_running_loop().time()
    bench.kubelet.shutdown.request()
    ended, codes = {}, {}

    async def note(name: str) -> None:
        pod = await bench.until_phase(name, "Failed")
        ended[name], codes[name] = asyncio.get_running_loop().time() - started, container_state(pod)["terminated"]["exitCode"]
        assert pod["status"]["reason"] == "Terminated"

    await asyncio.gather(*(note(name) for name in ("stubborn", "low", "middle", "high")))
    assert codes == {"stubborn": 137, "low": 0, "middle": 0, "high": 0}
    assert ended["low"] < ended["stubborn"] < ended["middle"] < ended["high"]
    async with asyncio.timeout(5):
        await bench.kubelet.shutdown.finished.wait()


async def test_a_full_log_is_rotated_and_goes_on(bench: Bench) -> None:
    await bench.stop()
    bench.options = {"container_log_max_size_bytes": 20_000, "container_log_max_files": 3}
    await bench.start()
    await bench.run("p", "i=0; while :; do i=$((i+1)); echo line $i of a log that grows; sleep 0.001; done", restartPolicy="Always")
    pod = await bench.until_ready("p")
    folder = bench.folder / "logs" / f"test_p_{pod['metadata']['uid']}" / "c"
    assert bench.kubelet is not None
    for _ in range(2):
        async with asyncio.timeout(20):
            while (folder / "0.log").stat().st_size < 21_000:
                await asyncio.sleep(0.02)
        await bench.kubelet.garbage.rotate_logs()
        await asyncio.sleep(1.1)
    names = sorted(f.name for f in folder.iterdir())
    assert names[0] == "0.log"
    assert len(names) <= 3
    assert (folder / "0.log").stat().st_size < 21_000 * 5


async def test_a_node_registers_and_renews_its_lease(bench: Bench) -> None:
    node = await bench.client.get(NODES, bench.node_name)
    assert condition(node, "Ready") == "True"
    assert node["metadata"]["labels"]["kubernetes.io/hostname"] == bench.node_name
    assert {"cpu", "memory", "pods", "ephemeral-storage"} <= set(node["status"]["capacity"])
    assert node["status"]["nodeInfo"]["kubeletVersion"] == "v1.35.0"
    async with asyncio.timeout(5):
        while not (leases := (await bench.client.list(LEASES, "kube-node-lease"))["items"]):
            await asyncio.sleep(0.05)
    assert leases[0]["spec"]["holderIdentity"] == bench.node_name
    assert leases[0]["metadata"]["ownerReferences"][0]["uid"] == node["metadata"]["uid"]


async def test_a_pod_that_does_not_fit_is_refused_with_the_numbers(bench: Bench) -> None:
    await bench.run("big", "true", container={"resources": {"requests": {"cpu": "1000"}}})
    pod = await bench.until_phase("big", "Failed")
    assert pod["status"]["reason"] == "OutOfcpu"
    assert pod["status"]["message"].startswith("Pod was rejected: Node didn't have enough resource: cpu, requested: 1000000, used: 0,")


async def test_the_room_of_a_pod_that_was_deleted_by_force_is_free_at_once(bench: Bench) -> None:
    assert bench.kubelet is not None
    bench.kubelet.capacity.allocatable["cpu"] = "2"
    most = {"resources": {"requests": {"cpu": "1500m"}}}
    await bench.run("old", "trap '' TERM; sleep 1000 & wait; wait", container=most)
    await bench.until_ready("old")
    await bench.client.delete(PODS, "old", bench.namespace, grace_period_seconds=0)
    await bench.run("new", "sleep 1000", container=most)
    await bench.until_ready("new")


async def test_resources_that_others_advertise_on_the_node_can_be_allocated_until_they_are_taken_back(bench: Bench) -> None:
    async def patched(value: str | None) -> None:
        patch = {"status": {"capacity": {"example.com/fake": value}}}
        await bench.client.patch(NODES, bench.node_name, None, patch, type="merge", subresource="status")

    async def offers(value: str | None) -> None:
        async with asyncio.timeout(10):
            while (await bench.client.get(NODES, bench.node_name))["status"]["allocatable"].get("example.com/fake") != value:
                await asyncio.sleep(0.02)

    await patched("1k")
    await offers("1k")
    await patched(None)
    await offers(None)


async def test_a_node_that_others_called_unknown_says_at_once_that_it_is_there(bench: Bench) -> None:
    node = await bench.client.get(NODES, bench.node_name)
    missed = [{**c, "status": "Unknown", "reason": "NodeStatusUnknown"} for c in node["status"]["conditions"]]
    await bench.client.patch(NODES, bench.node_name, None, {"status": {"conditions": missed}}, subresource="status")
    async with asyncio.timeout(5):
        while condition(await bench.client.get(NODES, bench.node_name), "Ready") != "True":
            await asyncio.sleep(0.05)


async def test_the_burstable_group_has_the_cpu_share_of_its_pods_together(bench: Bench) -> None:
    assert bench.kubelet is not None
    groups = bench.kubelet.node.cgroups
    name, one, two = ("cpu.weight", "20", "39") if groups.is_v2 else ("cpu.shares", "512", "1024")
    file = Path((groups.hierarchies.v2 or groups.hierarchies.v1["cpu"]) + groups.qos_parent("Burstable"), name)

    async def until_share(wanted: str) -> None:
        async with asyncio.timeout(10):
            while file.read_text().strip() != wanted:
                await asyncio.sleep(0.05)

    await bench.run("a", "sleep 1000", container={"resources": {"requests": {"cpu": "500m"}}})
    await bench.until_ready("a")
    await until_share(one)
    await bench.run("b", "sleep 1000", container={"resources": {"requests": {"cpu": "500m"}}})
    await bench.until_ready("b")
    await until_share(two)
    await bench.client.delete(PODS, "b", bench.namespace, grace_period_seconds=0)
    await until_share(one)


async def test_what_changes_while_the_status_is_on_its_way_is_told_at_once(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    assert bench.kubelet is not None
    reporter = bench.kubelet.reporter
    patch, late = bench.client.patch, False

    async def slow(*arguments: object, **options: object) -> object:
        nonlocal late
        answer = await patch(*arguments, **options)  # type: ignore[arg-type]
        if not late and options.get("subresource") == "status" and arguments[1] == bench.node_name:
            # The network comes just as it was written that there is none.
            late = True
            monkeypatch.undo()
            reporter.changed()
        return answer

    async def none() -> str:
        return "still to come"

    monkeypatch.setattr(bench.network, "ready", none)
    monkeypatch.setattr(bench.client, "patch", slow)
    reporter.changed()
    async with asyncio.timeout(8):
        while not late or condition(await bench.client.get(NODES, bench.node_name), "Ready") != "True":
            await asyncio.sleep(0.05)
