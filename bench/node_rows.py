"""Rows of a full node: 110 pods with readiness probes, and a thousand pods one after the other. They need root.

They make a cluster of their own (KNARR_NAME, else `bench`), deleted at the end. Memory is the proportional set size; a leak is
anything of processes, mounts, cgroups or open files that is there after the churn and was not there before it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import uvloop

from bench import machine
from bench.cluster_rows import NAME, knarr
from bench.row import Row
from knarr.api.resources import PODS
from knarr.client.config import ClientConfig
from knarr.client.rest import Client

ROWS = ("density-start", "density-stop", "density-memory", "density-cpu", "churn-rate", "churn-memory", "churn-leaks")
PODS_PER_NODE = 110
CHURN_PODS, CHURN_WARM_UP, CHURN_AT_ONCE = 1000, 100, 10
IDLE_SECONDS = 60
IMAGE = "knarr.test/bench:1"


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    from tests.images import debian, oci

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KUBECONFIG": f"{folder}/kubeconfig"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as ./run does
        layer = oci.layer_from_files({"bin/busybox": (Path("/bin/busybox").read_bytes(), 0o755)})
        image = oci.write_archive(debian.cache_folder() / "bench-node.tar", [([IMAGE], [layer], oci.ImageConfig())])
        knarr(environment, "delete", check=False)
        try:
            knarr(environment, "up")
            knarr(environment, "image", "load", str(image))
            node = Node(environment)
            if any(name.startswith("density") for name in names):
                yield from uvloop.run(density(node))
            if any(name.startswith("churn") for name in names):
                yield from uvloop.run(churn(node))
        finally:
            knarr(environment, "delete", check=False)


class Node:
    """The processes and host objects of the cluster under measurement."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.kubeconfig = environment["KUBECONFIG"]
        supervisor: dict[str, Any] = json.loads(knarr(environment, "status", "-o", "json", check=False))["supervisor"]
        self.parts: dict[str, int] = {part["name"]: part["pid"] for part in supervisor["components"]}
        self.node = next(pid for name, pid in self.parts.items() if "node" in name)
        self.all = [supervisor["pid"], *self.parts.values()]
        self._mark = f"/knarr/{NAME}/"

    def conmons(self) -> list[int]:
        """Processes that hold containers of this cluster."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    command = (entry / "cmdline").read_bytes().split(b"\0")
                except OSError:
                    continue
                if os.path.basename(command[0]) == b"conmon" and any(self._mark.encode() in word for word in command):
                    found.append(int(entry.name))
        return found

    def holdings(self) -> dict[str, int]:
        """How many host objects the cluster has, by kind."""
        mounts = sum(self._mark in line for line in Path("/proc/self/mountinfo").read_text().splitlines())
        groups = sum(1 for path in Path("/sys/fs/cgroup").rglob(f"knarr-{NAME}/**/pod*") if path.is_dir())
        return {"conmons": len(self.conmons()), "mounts": mounts, "cgroups": groups, "files": len(os.listdir(f"/proc/{self.node}/fd"))}


async def density(node: Node) -> list[Row]:
    """A node filled at once, left alone, and emptied at once."""
    client = Client(ClientConfig.from_kubeconfig(node.kubeconfig))
    try:
        before = machine.pss_bytes(node.all)
        names = [f"full-{number}" for number in range(PODS_PER_NODE)]
        start = await until(client, names, "Ready", [client.create(PODS, probed(name)) for name in names])
        await asyncio.sleep(5)
        held = node.conmons()
        memory = (machine.pss_bytes([*node.all, *held]) - before) / len(names) / 1e6
        begin, used = time.monotonic(), machine.cpu_seconds([*node.all, *held])
        await asyncio.sleep(IDLE_SECONDS)
        share = 100 * (machine.cpu_seconds([*node.all, *held]) - used) / (time.monotonic() - begin)
        stop = await until(client, names, "gone", [client.delete(PODS, name, "default", grace_period_seconds=1) for name in names])
    finally:
        await client.close()
    return [
        Row("density-start", "s", [start], note=f"{PODS_PER_NODE} pods created at once, until all are Ready"),
        Row("density-stop", "s", [stop], note="grace period 1 s, until all are gone"),
        Row("density-memory", "MB", [memory], note="PSS of conmon, kubelet, API server and controllers per pod"),
        Row("density-cpu", "% of a core", [share], note=f"an HTTP readiness probe every 10 s on each, over {IDLE_SECONDS} s"),
    ]


async def churn(node: Node) -> list[Row]:
    """Pods that come and go, a few at a time."""
    client = Client(ClientConfig.from_kubeconfig(node.kubeconfig))
    try:
        await in_turns(client, "warm", CHURN_WARM_UP)
        await asyncio.sleep(5)
        memory, had = machine.pss_bytes([node.node]), node.holdings()
        begin = time.monotonic()
        await in_turns(client, "churn", CHURN_PODS)
        rate = CHURN_PODS / (time.monotonic() - begin)
        await asyncio.sleep(5)
        growth = 100 * (machine.pss_bytes([node.node]) / memory - 1)
        left = {kind: count - had[kind] for kind, count in node.holdings().items() if count > had[kind]}
    finally:
        await client.close()
    return [
        Row("churn-rate", "pods/s", [rate], note=f"{CHURN_PODS} pods started and stopped, {CHURN_AT_ONCE} at a time"),
        Row("churn-memory", "%", [growth], note=f"growth of the kubelet's PSS ({memory / 1e6:.0f} MB) meanwhile"),
        Row("churn-leaks", "objects", [sum(left.values())], note=str(left) if left else "processes, mounts, cgroups, open files"),
    ]


async def in_turns(client: Client, prefix: str, count: int) -> None:
    """Start and stop `count` pods, CHURN_AT_ONCE at a time."""
    for first in range(0, count, CHURN_AT_ONCE):
        names = [f"{prefix}-{number}" for number in range(first, min(first + CHURN_AT_ONCE, count))]
        await until(client, names, "Ready", [client.create(PODS, plain(name)) for name in names])
        await until(client, names, "gone", [client.delete(PODS, name, "default", grace_period_seconds=1) for name in names])


async def until(client: Client, names: Sequence[str], what: str, requests: Sequence[Any]) -> float:
    """Send the requests; seconds until all these pods are "Ready" or "gone"."""
    waiting = set(names)
    listed = await client.list(PODS, "default")
    begin = time.monotonic()
    sending = asyncio.gather(*requests)
    async with asyncio.timeout(180):
        async for kind, pod in client.watch(PODS, "default", resource_version=listed["metadata"]["resourceVersion"]):
            conditions = pod.get("status", {}).get("conditions", ())
            ready = any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)
            if kind == "DELETED" if what == "gone" else ready:
                waiting.discard(pod["metadata"]["name"])
            if not waiting:
                break
    elapsed = time.monotonic() - begin
    await sending
    return elapsed


def plain(name: str, **container: Any) -> dict[str, Any]:
    # The first process of a container is not ended by a signal that it does not handle.
    script = "trap 'exit 0' TERM; /bin/busybox sleep 100000 & wait"
    made = {"name": "c", "image": IMAGE, "imagePullPolicy": "Never", "command": ["/bin/busybox", "sh", "-c", script], **container}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": {"containers": [made]}}


def probed(name: str) -> dict[str, Any]:
    """A pod with a web server whose readiness is asked for every ten seconds."""
    probe = {"httpGet": {"path": "/ready", "port": 8080}, "periodSeconds": 10}
    script = "echo yes > /ready; exec /bin/busybox httpd -f -p 8080 -h /"
    return plain(name, command=["/bin/busybox", "sh", "-c", script], readinessProbe=probe)
