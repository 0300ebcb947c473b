"""Pods on a real node: from creation to their end."""

from __future__ import annotations

import asyncio

import pytest

from knarr.api.resources import EVENTS, PODS
from knarr.kubelet import pod_sync
from knarr.runtime.cri import RuntimeFault
from tests.kubelet.conftest import Bench, condition, container_state


async def test_a_pod_becomes_ready_and_goes_away(bench: Bench) -> None:
    await bench.run("p", "sleep 1000", restartPolicy="Always")
    pod = await bench.until_ready("p")
    assert pod["status"]["phase"] == "Running"
    assert pod["status"]["podIP"]
    assert "running" in container_state(pod)
    await bench.client.delete(PODS, "p", bench.namespace)
    await bench.until_gone("p")


async def test_a_pod_that_came_before_the_pod_network_goes_on_as_soon_as_that_is_there(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    async def not_yet(sandbox: object = None) -> str:
        if sandbox is not None:
            raise RuntimeFault("no addresses yet")
        return "the node has no pod CIDR yet"

    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(bench.network, "setup", not_yet)
        meanwhile.setattr(bench.network, "ready", not_yet)
        meanwhile.setattr(pod_sync, "_NETWORK_RETRY_SECONDS", 1000.0)
        await bench.run("early", "sleep 1000")
        async with asyncio.timeout(10):
            while not (told := [e for e in (await bench.client.list(EVENTS, bench.namespace))["items"] if "Network" in e["reason"]]):
                await asyncio.sleep(0.05)
    why = "NetworkReady=false reason:NetworkPluginNotReady message:the node has no pod CIDR yet"
    assert told[0]["message"] == f"network is not ready: container runtime network not ready: {why}"
    assert bench.kubelet is not None
    bench.kubelet.network_changed()
    await bench.until_ready("early")


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


async def test_a_running_container_and_a_sidecar_are_resized_in_place(bench: Bench) -> None:
    small = {"limits": {"cpu": "100m", "memory": "30Mi"}, "requests": {"cpu": "20m", "memory": "20Mi"}}
    large = {"limits": {"cpu": "200m", "memory": "40Mi"}, "requests": {"cpu": "30m", "memory": "25Mi"}}
    side = {"name": "side", "restartPolicy": "Always", "command": ["sleep", "1000"], "resources": small}
    await bench.run("p", "sleep 1000", restartPolicy="Always", initContainers=[side], container={"resources": small})
    before = await bench.until_ready("p")
    patch = {"spec": {"containers": [{"name": "c", "resources": large}], "initContainers": [{"name": "side", "resources": large}]}}
    await bench.client.patch(PODS, "p", bench.namespace, patch, subresource="resize", type="strategic")

    def resized(pod: dict | None) -> bool:  # type: ignore[type-arg]
        status = (pod or {}).get("status") or {}
        shown = [s.get("resources") for s in (*status["containerStatuses"], *status["initContainerStatuses"])]
        return shown == [large, large] and not condition(pod or {}, "PodResizeInProgress")

    after = await bench.until("p", lambda pod: pod if resized(pod) else None)
    assert after["status"]["containerStatuses"][0]["containerID"] == before["status"]["containerStatuses"][0]["containerID"]
    for container in await bench.runtime.list_containers():
        limits = container.resources
        assert limits is not None
        assert (limits.memory_limit_bytes, limits.cpu_quota_us, limits.cpu_shares) == (40 << 20, 20_000, 30)
    result = await bench.runtime.exec_sync(after["status"]["containerStatuses"][0]["containerID"].partition("://")[2], ["true"])
    assert result.exit_code == 0


async def test_memory_in_use_is_not_taken_away(bench: Bench) -> None:
    script = "x=$(head -c 20000000 /dev/zero | tr '\\0' x); echo ready; sleep 1000; true"
    await bench.run("p", script, restartPolicy="Always", container={"resources": {"limits": {"memory": "200Mi"}}})
    await bench.until_ready("p")
    while "ready" not in await bench.log("p"):
        await asyncio.sleep(0.05)
    patch = {"spec": {"containers": [{"name": "c", "resources": {"limits": {"memory": "10Mi"}, "requests": {"memory": "10Mi"}}}]}}
    await bench.client.patch(PODS, "p", bench.namespace, patch, subresource="resize", type="strategic")

    def refused(pod: dict | None) -> dict | None:  # type: ignore[type-arg]
        found = [c for c in (pod or {})["status"]["conditions"] if c["type"] == "PodResizeInProgress"]
        return pod if found and found[0].get("reason") == "Error" else None

    pod = await bench.until("p", refused)
    assert pod["status"]["containerStatuses"][0]["resources"]["limits"]["memory"] == "200Mi"
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0


async def test_a_pod_that_takes_its_time_to_end_turns_unready_when_its_probe_says_so(bench: Bench) -> None:
    script = "touch /tmp/ready; trap 'rm /tmp/ready' TERM; while :; do sleep 0.1; done"
    probe = {"exec": {"command": ["test", "-e", "/tmp/ready"]}, "periodSeconds": 1, "failureThreshold": 1}
    await bench.run("p", script, terminationGracePeriodSeconds=60, container={"readinessProbe": probe})
    await bench.until_ready("p")
    await bench.client.delete(PODS, "p", bench.namespace)
    pod = await bench.until("p", lambda pod: pod if condition(pod or {}, "Ready") == "False" else None)
    assert "running" in container_state(pod)
    assert pod["status"]["phase"] == "Running"
    await bench.client.delete(PODS, "p", bench.namespace, grace_period_seconds=0)
    await bench.until_gone("p")


async def test_an_https_hook_that_is_answered_in_plain_http_is_asked_again_without_its_secrets(bench: Bench) -> None:
    asked: list[bytes] = []

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # As Go's plain server answers what is no HTTP, and any request.
        asked.append(await reader.read(4096))
        writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        await writer.drain()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    secret = [{"name": "Authorization", "value": "Bearer x"}, {"name": "X-Plain", "value": "yes"}]
    hook = {"httpGet": {"host": "127.0.0.1", "port": port, "scheme": "HTTPS", "path": "/hook", "httpHeaders": secret}}
    async with server:
        await bench.run("p", "sleep 1000", container={"lifecycle": {"postStart": hook}})
        await bench.until_ready("p")
        assert len(asked) == 2
        assert asked[1].startswith(b"GET /hook HTTP/1.1\r\n")
        assert (b"x-plain: yes" in asked[1].lower(), b"authorization" in asked[1].lower()) == (True, False)
        assert bench.kubelet is not None
        assert bench.kubelet.meters.counters["kubelet_lifecycle_handler_http_fallbacks_total"] == 1
        async with asyncio.timeout(5):
            while "LifecycleHTTPFallback" not in {e["reason"] for e in (await bench.client.list(EVENTS, bench.namespace))["items"]}:
                await asyncio.sleep(0.05)


async def test_a_sleep_before_the_stop_ends_with_the_grace_period_and_is_counted(bench: Bench) -> None:
    await bench.run("p", "sleep 1000", container={"lifecycle": {"preStop": {"sleep": {"seconds": 900}}}}, terminationGracePeriodSeconds=1000)
    await bench.until_ready("p")
    await bench.client.delete(PODS, "p", bench.namespace, grace_period_seconds=1)
    await bench.until_gone("p")
    assert bench.kubelet is not None
    assert bench.kubelet.meters.counters["kubelet_sleep_action_terminated_early_total"] == 1
