"""A kubelet may end at any moment: the next one finds its pods again."""

from __future__ import annotations

import asyncio
import gc
import os
import weakref

from knarr.api.resources import PODS
from knarr.kubelet.volumes import mounts
from tests.kubelet.conftest import Bench, container_state


async def _ids(bench: Bench) -> dict[str, str]:
    return {c.labels["io.kubernetes.pod.name"]: c.id for c in await bench.runtime.list_containers()}


async def test_pods_outlive_the_kubelet_and_nothing_is_started_twice(bench: Bench) -> None:
    for name in ("a", "b"):
        await bench.run(name, "sleep 1000", restartPolicy="Always")
        await bench.until_ready(name)
    await bench.run("done", "echo finished")
    await bench.until_phase("done", "Succeeded")
    before = await _ids(bench)
    await bench.restart()
    await bench.run("c", "sleep 1000", restartPolicy="Always")
    await bench.until_ready("c")
    after = await _ids(bench)
    assert {n: after[n] for n in before} == before
    pod = await bench.client.get(PODS, "a", bench.namespace)
    assert pod["status"]["containerStatuses"][0]["restartCount"] == 0
    assert pod["status"]["containerStatuses"][0]["ready"]
    await bench.client.delete(PODS, "done", bench.namespace)
    await bench.until_gone("done")


async def test_what_happened_while_the_kubelet_was_away_is_made_up_for(bench: Bench) -> None:
    await bench.run("gone", "sleep 1000", restartPolicy="Always")
    await bench.run("forced", "sleep 1000", restartPolicy="Always")
    await bench.run("ends", "sleep 1.5; exit 7")
    for name in ("gone", "forced"):
        await bench.until_ready(name)

    async def meanwhile() -> None:
        await bench.client.delete(PODS, "gone", bench.namespace)
        await bench.client.delete(PODS, "forced", bench.namespace, grace_period_seconds=0)
        await bench.run("new", "sleep 1000", restartPolicy="Always")
        await asyncio.sleep(1.0)

    await bench.restart(meanwhile)
    await bench.until_ready("new")
    await bench.until_gone("gone")
    pod = await bench.until_phase("ends", "Failed")
    assert container_state(pod)["terminated"]["exitCode"] == 7
    async with asyncio.timeout(10):
        while {"gone", "forced"} & set(await _ids(bench)):
            await asyncio.sleep(0.05)


async def test_a_pod_leaves_nothing_on_the_node(bench: Bench) -> None:
    volumes = [
        {"name": "m", "emptyDir": {"medium": "Memory"}},
        {"name": "d", "emptyDir": {}},
        {"name": "i", "downwardAPI": {"items": [{"path": "l", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
    ]
    volume_mounts = [{"name": "m", "mountPath": "/m"}, {"name": "d", "mountPath": "/d", "subPath": "x/y"}, {"name": "i", "mountPath": "/i"}]
    await bench.run("p", "sleep 1000", container={"volumeMounts": volume_mounts}, volumes=volumes)
    pod = await bench.until_ready("p")
    uid = pod["metadata"]["uid"]
    assert bench.kubelet is not None
    worker = weakref.ref(bench.kubelet.workers.get(uid))  # type: ignore[type-var]
    await bench.client.delete(PODS, "p", bench.namespace)
    await bench.until_gone("p")
    async with asyncio.timeout(10):
        while bench.kubelet.workers.get(uid) is not None:
            await asyncio.sleep(0.02)
    assert not os.path.exists(bench.folder / "kubelet" / "pods" / uid)
    assert mounts.mount_points(str(bench.folder / "kubelet")) == [str(bench.folder / "kubelet")]
    assert not await bench.runtime.list_pod_sandboxes({"io.kubernetes.pod.uid": uid})
    assert uid not in bench.kubelet.node.cgroups.pod_groups()
    assert not [e for e in os.listdir(bench.folder / "logs") if uid in e]
    gc.collect()
    assert worker() is None, "nothing keeps it in memory"
