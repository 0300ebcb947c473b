"""Pods on a real node: from creation to their end."""

from __future__ import annotations

from knarr.api.resources import PODS
from tests.kubelet.conftest import Bench, condition, container_state


async def test_a_pod_becomes_ready_and_goes_away(bench: Bench) -> None:
    await bench.run("p", "sleep 1000", restartPolicy="Always")
    pod = await bench.until_ready("p")
    assert pod["status"]["phase"] == "Running"
    assert pod["status"]["podIP"]
    assert "running" in container_state(pod)
    await bench.client.delete(PODS, "p", bench.namespace)
    await bench.until_gone("p")


async def test_a_pod_that_exits_zero_succeeds(bench: Bench) -> None:
    await bench.run("p", "echo hello; exit 0")
    pod = await bench.until_phase("p", "Succeeded")
    assert container_state(pod)["terminated"]["reason"] == "Completed"
    assert condition(pod, "Ready") == "False"
    assert await bench.log("p") == "hello\n"


async def test_a_pod_that_fails_is_failed_with_its_code(bench: Bench) -> None:
    await bench.run("p", "exit 3")
    pod = await bench.until_phase("p", "Failed")
    assert container_state(pod)["terminated"]["exitCode"] == 3
    assert container_state(pod)["terminated"]["reason"] == "Error"
