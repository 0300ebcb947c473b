"""Pods from files on the node, and their mirrors."""

from __future__ import annotations

import asyncio

import yaml

from knarr.api.resources import PODS
from tests.kubelet.conftest import Bench

MANIFEST = {
    "apiVersion": "v1",
    "kind": "Pod",
    "metadata": {"name": "s", "namespace": "test"},
    "spec": {"terminationGracePeriodSeconds": 1, "containers": [{"name": "c", "image": "busybox", "imagePullPolicy": "IfNotPresent", "command": ["sleep", "1000"]}]},
}


async def test_a_static_pod_runs_is_mirrored_changed_and_removed(bench: Bench) -> None:
    await bench.stop()
    folder = bench.folder / "manifests"
    folder.mkdir()
    bench.options = {"static_pod_path": str(folder)}
    await bench.start()
    name = f"s-{bench.node_name}"
    (folder / "s.yaml").write_text(yaml.safe_dump(MANIFEST))
    for _ in range(200):
        listed = await bench.client.list(PODS, bench.namespace)
        if listed["items"]:
            break
        await asyncio.sleep(0.02)
    mirror = await bench.until_ready(name)
    assert mirror["metadata"]["annotations"]["kubernetes.io/config.source"] == "file"
    assert mirror["metadata"]["ownerReferences"][0]["kind"] == "Node"
    await bench.client.delete(PODS, name, bench.namespace, grace_period_seconds=0)
    async with asyncio.timeout(10):
        while True:
            listed = await bench.client.list(PODS, bench.namespace)
            if listed["items"] and listed["items"][0]["metadata"]["uid"] != mirror["metadata"]["uid"]:
                break
            await asyncio.sleep(0.02)
    again = await bench.until_ready(name)
    assert again["status"]["containerStatuses"][0]["restartCount"] == 0
    changed = {**MANIFEST, "metadata": {**MANIFEST["metadata"], "labels": {"new": "yes"}}}
    (folder / "s.yaml").write_text(yaml.safe_dump(changed))
    async with asyncio.timeout(15):
        while True:
            listed = await bench.client.list(PODS, bench.namespace, label_selector="new=yes")
            if listed["items"]:
                break
            await asyncio.sleep(0.02)
    await bench.until_ready(name)
    (folder / "s.yaml").unlink()
    await bench.until_gone(name)
