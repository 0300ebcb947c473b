"""Under pressure the node ends pods in the right order and says so."""

from __future__ import annotations

from knarr.kubelet.eviction import Signal, threshold
from tests.kubelet.conftest import Bench, condition


def test_thresholds_are_shares_or_amounts() -> None:
    assert threshold("10%", 1000) == 100
    assert threshold("100Mi", 1 << 40) == 100 << 20


async def test_memory_pressure_evicts_the_pod_that_uses_most_over_its_request(bench: Bench) -> None:
    assert bench.kubelet is not None
    small = {"resources": {"requests": {"memory": "64Mi"}, "limits": {"memory": "64Mi"}}}
    await bench.run("modest", "sleep 1000", container=small)
    await bench.run("greedy", "x=$(head -c 20000000 /dev/zero | tr '\\0' x); sleep 1000; true")
    for name in ("modest", "greedy"):
        await bench.until_ready(name)
    eviction = bench.kubelet.eviction
    eviction.read = lambda: {"memory.available": Signal(10 << 20, 1 << 30)}
    await eviction.look()
    pod = await bench.until_phase("greedy", "Failed")
    assert pod["status"]["reason"] == "Evicted"
    assert pod["status"]["message"].startswith("The node was low on resource: memory. Threshold quantity: 100Mi, available: 10Mi.")
    assert condition(pod, "DisruptionTarget") == "True"
    assert eviction.pressure()["MemoryPressure"]
    await bench.run("late", "true")
    refused = await bench.until_phase("late", "Failed")
    assert refused["status"]["reason"] == "Evicted"
    await bench.run("guaranteed", "sleep 1", container={"resources": {"limits": {"memory": "32Mi", "cpu": "100m"}}})
    await bench.until_phase("guaranteed", "Succeeded")
    assert (await bench.until_phase("modest", "Running"))["status"]["phase"] == "Running"
