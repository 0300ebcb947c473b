"""In-place resizes that wait for room get it, in their order, as soon as there is some."""

from __future__ import annotations

import asyncio
from typing import Any

from knarr.api.resources import PODS, PRIORITY_CLASSES
from knarr.api.types import Object
from tests.kubelet.conftest import Bench


async def _run(bench: Bench, name: str, millis: int, **spec: Any) -> None:
    cpu = {"cpu": f"{millis}m", "memory": "16Mi"}
    await bench.run(name, "sleep 1000", container={"resources": {"requests": cpu, "limits": cpu}}, **spec)
    await bench.until_ready(name)


async def _resize(bench: Bench, name: str, millis: int) -> None:
    cpu = {"cpu": f"{millis}m"}
    patch = {"spec": {"containers": [{"name": "c", "resources": {"requests": cpu, "limits": cpu}}]}}
    await bench.client.patch(PODS, name, bench.namespace, patch, type="strategic", subresource="resize")


def _waits(pod: Object | None) -> bool:
    return any(c["type"] == "PodResizePending" and c["reason"] == "Deferred" for c in (pod or {"status": {}})["status"].get("conditions") or [])


def _has(pod: Object | None, millis: int) -> bool:
    assert pod is not None
    status = pod["status"]["containerStatuses"][0]
    wanted = str(millis // 1000) if millis % 1000 == 0 else f"{millis}m"
    return not _waits(pod) and bool(status["resources"]["requests"]["cpu"] == wanted == status["allocatedResources"]["cpu"])


async def test_a_resize_that_waits_is_granted_when_another_pod_shrinks_the_important_one_first(bench: Bench) -> None:
    assert bench.kubelet is not None
    bench.kubelet.capacity.allocatable["cpu"] = "2"
    important = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": "important"}, "value": 1000}
    await bench.client.create(PRIORITY_CLASSES, important)
    await _run(bench, "big", 1200)
    await _run(bench, "first", 300)
    await _run(bench, "second", 300, priorityClassName="important")
    for name in ("first", "second"):
        await _resize(bench, name, 800)
        await bench.until(name, _waits)
    # Room for one of the two.
    await _resize(bench, "big", 700)
    await bench.until("big", lambda pod: _has(pod, 700))
    await bench.until("second", lambda pod: _has(pod, 800))
    assert _waits(await bench.client.get(PODS, "first", bench.namespace))
    await bench.client.delete(PODS, "big", bench.namespace, grace_period_seconds=0)
    await bench.until("first", lambda pod: _has(pod, 800))
    counters = bench.kubelet.meters.counters
    accepted = {name.partition("=")[2]: n for name, n in counters.items() if name.startswith("kubelet_pod_deferred_accepted_resizes_total")}
    assert accepted == {'"pod_resized"}': 1, '"pods_removed"}': 1}
    assert counters['kubelet_container_requested_resizes_total{operation_type="increase",requirement="requests",resource="cpu"}'] == 2
    took = bench.kubelet.meters.histograms["kubelet_pod_resize_duration_milliseconds"]['success="true"']
    async with asyncio.timeout(10):
        while sum(took.counts) < 3:
            await asyncio.sleep(0.02)
