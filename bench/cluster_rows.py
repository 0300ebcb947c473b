"""Rows of a whole cluster: start, pods, idle cost. They need root and make a cluster named `bench`, deleted at the end."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import uvloop

from bench import machine
from bench.row import Row
from knarr.api.resources import PODS
from knarr.client.config import ClientConfig
from knarr.client.rest import Client

ROWS = ("up-api-ready", "up-node-ready", "pod-start", "pod-start-50", "pod-stop", "pod-exit", "idle-memory", "idle-cpu")
NAME = os.environ.get("KNARR_NAME") or "bench"
IN_TURN, AT_ONCE = 20, 50
IDLE_SECONDS = 60


def measure(names: list[str], options: argparse.Namespace) -> Iterator[Row]:
    from tests.images import debian, oci

    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, "KUBECONFIG": f"{folder}/kubeconfig"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)  # as ./run does
        shell = Path("/bin/busybox")
        layer = oci.layer_from_files({"bin/busybox": (shell.read_bytes(), 0o755)})
        image = oci.write_archive(
            debian.cache_folder() / "bench.tar",
            [(["knarr.test/bench:1"], [layer], oci.ImageConfig(entrypoint=["/bin/busybox", "sleep", "100000"]))],
        )
        knarr(environment, "delete", check=False)
        try:
            api, node = [], []
            for _ in range(options.repeat):
                knarr(environment, "down", check=False)
                output = knarr(environment, "up")
                api.append(_seconds(output, r"API server answers.*\(([\d.]+) s\)"))
                node.append(_seconds(output, r"node .* is Ready \(([\d.]+) s\)"))
            yield Row("up-api-ready", "s", api, note="from the command to the API's first answer")
            yield Row("up-node-ready", "s", node)
            knarr(environment, "image", "load", str(image))
            if any(name.startswith("idle") for name in names):
                yield from idle(environment)
            if any(name.startswith("pod") for name in names):
                yield from uvloop.run(pods(f"{folder}/kubeconfig", options.repeat))
        finally:
            knarr(environment, "delete", check=False)


def knarr(environment: dict[str, str], verb: str, *arguments: str, check: bool = True) -> str:
    action = [arguments[0]] if verb == "image" else []
    rest = arguments[len(action) :]
    result = subprocess.run(
        [sys.executable, "-m", "knarr", verb, *action, "--name", NAME, *rest], env=environment, capture_output=True, text=True, check=False
    )
    if check and result.returncode != 0:
        raise RuntimeError(result.stdout + result.stderr)
    return result.stdout if verb == "status" else result.stderr


def _seconds(text: str, pattern: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"no {pattern!r} in {text!r}")
    return float(found[1])


def idle(environment: dict[str, str]) -> Iterator[Row]:
    status: dict[str, Any] = json.loads(knarr(environment, "status", "-o", "json", check=False))["supervisor"]
    pids = [status["pid"], *(part["pid"] for part in status["components"])]
    time.sleep(10)
    start, used = time.monotonic(), machine.cpu_seconds(pids)
    time.sleep(IDLE_SECONDS)
    share = 100 * (machine.cpu_seconds(pids) - used) / (time.monotonic() - start)
    yield Row("idle-memory", "MB", [machine.pss_bytes(pids) / 1e6], note="PSS of all processes")
    yield Row("idle-cpu", "% of a core", [share], note=f"over {IDLE_SECONDS} s")


async def pods(kubeconfig: str, repeat: int) -> list[Row]:
    client = Client(ClientConfig.from_kubeconfig(kubeconfig))
    try:
        one = [await started(client, [f"turn-{number}"]) for number in range(IN_TURN)]
        many = [await started(client, [f"burst-{run}-{number}" for number in range(AT_ONCE)]) for run in range(repeat)]
        stops = [await stopped(client, f"stop-{number}") for number in range(IN_TURN)]
        with tempfile.TemporaryDirectory() as folder:
            os.mkfifo(f"{folder}/end")
            exits = [await exited(client, f"exit-{number}", folder) for number in range(IN_TURN)]
    finally:
        await client.close()
    return [
        Row("pod-start", "s", one, note="create to Ready seen by a watcher, in turn"),
        Row("pod-start-50", "s", many, note="50 pods at once"),
        Row("pod-stop", "s", stops, note="delete to gone, a container that ends on SIGTERM"),
        Row("pod-exit", "s", exits, note="a container's own end to Succeeded seen by a watcher"),
    ]


async def started(client: Client, names: list[str]) -> float:
    """Seconds from the first create to the last pod Ready; the pods are deleted and gone afterwards."""
    waiting, alive = set(names), set(names)
    ready, gone = asyncio.Event(), asyncio.Event()
    listed = await client.list(PODS, "default")

    async def watch() -> None:
        async for kind, obj in client.watch(PODS, "default", resource_version=listed["metadata"]["resourceVersion"]):
            name = obj.get("metadata", {}).get("name")
            if kind == "DELETED":
                alive.discard(name)
            elif any(
                condition["type"] == "Ready" and condition["status"] == "True" for condition in obj.get("status", {}).get("conditions", ())
            ):
                waiting.discard(name)
            if not waiting:
                ready.set()
            if not alive:
                gone.set()

    watcher = asyncio.ensure_future(watch())
    start = time.monotonic()
    await asyncio.gather(*(client.create(PODS, _pod(name)) for name in names))
    await asyncio.wait_for(ready.wait(), 120)
    elapsed = time.monotonic() - start
    await asyncio.gather(*(client.delete(PODS, name, "default", grace_period_seconds=1) for name in names))
    await asyncio.wait_for(gone.wait(), 120)
    watcher.cancel()
    return elapsed


async def _seen(client: Client, name: str, version: str, what: Callable[[str, dict[str, Any]], bool]) -> dict[str, Any]:
    """The first event after a version that shows it."""
    async with asyncio.timeout(60):
        async for kind, pod in client.watch(PODS, "default", resource_version=version, field_selector=f"metadata.name={name}"):
            if what(kind, pod):
                return pod
    raise RuntimeError("the watch ended")


def _ready(_: str, pod: dict[str, Any]) -> bool:
    return any(item["type"] == "Ready" and item["status"] == "True" for item in pod.get("status", {}).get("conditions", ()))


async def stopped(client: Client, name: str) -> float:
    """Seconds from the delete to the end of a pod whose container ends as soon as it is told to."""
    pod = _pod(name)
    pod["spec"]["containers"][0]["command"] = ["/bin/busybox", "sh", "-c", "trap 'exit 0' TERM; /bin/busybox sleep 100000 & wait"]
    made = await client.create(PODS, pod)
    running = await _seen(client, name, made["metadata"]["resourceVersion"], _ready)
    watching = asyncio.ensure_future(_seen(client, name, running["metadata"]["resourceVersion"], lambda kind, _: kind == "DELETED"))
    await asyncio.sleep(0.2)
    start = time.monotonic()
    await client.delete(PODS, name, "default")
    await watching
    return time.monotonic() - start


async def exited(client: Client, name: str, folder: str) -> float:
    """Seconds from a container's end, which a byte in a pipe brings about, to the pod's Succeeded."""
    pod = _pod(name)
    main = {"command": ["/bin/busybox", "sh", "-c", "read x </d/end"], "volumeMounts": [{"name": "d", "mountPath": "/d"}]}
    pod["spec"] |= {"restartPolicy": "Never", "volumes": [{"name": "d", "hostPath": {"path": folder}}]}
    pod["spec"]["containers"][0] |= main
    made = await client.create(PODS, pod)
    running = await _seen(client, name, made["metadata"]["resourceVersion"], _ready)
    done = _seen(client, name, running["metadata"]["resourceVersion"], lambda _, pod: pod["status"].get("phase") == "Succeeded")
    watching = asyncio.ensure_future(done)
    await asyncio.sleep(0.2)
    pipe = await asyncio.to_thread(os.open, f"{folder}/end", os.O_WRONLY)
    start = time.monotonic()
    os.write(pipe, b"x\n")
    os.close(pipe)
    await watching
    elapsed = time.monotonic() - start
    await client.delete(PODS, name, "default", grace_period_seconds=0)
    return elapsed


def _pod(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "default"},
        "spec": {"containers": [{"name": "c", "image": "knarr.test/bench:1", "imagePullPolicy": "Never"}]},
    }
