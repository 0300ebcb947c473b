"""A node that is killed at any step, and whose parts are killed and broken at random: pods end where their specs say, nothing leaks.

The short form runs a few faults; KNARR_FAULTS=200 (and KNARR_FAULT_SEED) runs that many, KNARR_EVERY_STEP=1 every step of a pod's
start and stop instead of some.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from knarr.api.resources import EVENTS, PODS
from knarr.api.types import Object
from knarr.kubelet.cgroups import Cgroups
from knarr.kubelet.volumes import mounts
from knarr.testing.apiserver import running_apiserver
from tests.kubelet.conftest import Bench, condition
from tests.kubelet.node_process import NodeProcess
from tests.runtime.conftest import processes_naming

EVERY_STEP = bool(os.environ.get("KNARR_EVERY_STEP"))
FAULTS = int(os.environ.get("KNARR_FAULTS") or 14)
SEED = int(os.environ.get("KNARR_FAULT_SEED") or 1)
DISK_BYTES = 64 << 20


class Site:
    """A node process, its folders on a disk of their own, and the API server."""

    def __init__(self, bench: Bench, node: NodeProcess) -> None:
        self.bench, self.node, self.client = bench, node, bench.client
        self.folder, self.data, self.logs = bench.folder, bench.folder / "data", bench.folder / "logs"
        self.disks = (self.data, self.logs)
        self.settings = node.settings

    async def pod(self, name: str, script: str, **spec: Any) -> None:
        volumes = [{"name": "m", "emptyDir": {"medium": "Memory"}}, {"name": "d", "downwardAPI": {"items": [{"path": "n", "fieldRef": {"fieldPath": "metadata.name"}}]}}]
        volumes.append({"name": "h", "hostPath": {"path": str(self.folder / "marks")}})
        mounted = [{"name": "m", "mountPath": "/m"}, {"name": "d", "mountPath": "/d", "subPath": "n"}, {"name": "h", "mountPath": "/marks"}]
        await self.bench.run(name, script, container={"volumeMounts": mounted}, volumes=volumes, **spec)

    def runs(self, name: str) -> int:
        """How often the pod's program was started."""
        path = self.folder / "marks" / name
        return len(path.read_text().splitlines()) if path.exists() else 0

    async def pods(self) -> list[Object]:
        found: list[Object] = (await self.client.list(PODS, self.bench.namespace))["items"]
        return found

    async def until(self, what: str, holds: Callable[[list[Object]], bool], seconds: float = 90) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while not holds(await self.pods()):
                    await asyncio.sleep(0.05)
                return
        states = [(p["metadata"]["name"], p["metadata"].get("deletionTimestamp"), p["status"].get("phase"), p["status"].get("containerStatuses")) for p in await self.pods()]
        raise AssertionError(f"not {what}: {states}")

    def left(self) -> dict[str, Any]:
        """What of any pod is still on the host."""
        root, state = self.data / "root", self.folder / "state"
        folders = [root / "containers", root / "sandboxes", self.data / "kubelet/pods", self.logs, state / "containers", state / "sandboxes", state / "exits", state / "oci"]
        found: dict[str, Any] = {str(path): names for path in folders if path.is_dir() and (names := os.listdir(path))}
        found["mounts"] = [m for m in mounts.mount_points(str(self.folder)) if Path(m) not in (*self.disks, self.folder / "net")]
        found["groups"] = list(Cgroups(self.bench.config()).pod_groups())
        found["processes"] = processes_naming(str(self.folder))
        found["links"] = [n for n in os.listdir("/sys/class/net") if n.startswith(self.settings["link_prefix"])]
        return {what: names for what, names in found.items() if names}

    async def until_clean(self) -> None:
        """Everything is deleted and gone."""
        await self.client.delete_collection(PODS, self.bench.namespace, grace_period_seconds=1)
        await self.until("deleted", lambda pods: not pods)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(40):
                while self.left():
                    await asyncio.sleep(0.1)
        assert self.left() == {}


@pytest_asyncio.fixture
async def site() -> AsyncIterator[Site]:
    folder, pid = Path(tempfile.mkdtemp(prefix="knarr-kubelet-")), os.getpid()
    folder.chmod(0o755)
    (folder / "marks").mkdir()
    for disk in ("data", "logs"):
        (folder / disk).mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder / disk)], check=True)
    async with running_apiserver() as server:
        bench = Bench(server, folder)
        bench.root = folder / "data" / "root"
        bench.runtime = bench.make_runtime()
        node = NodeProcess({
            "folder": str(folder), "data": str(folder / "data"), "group": bench.group, "kubeconfig": server.kubeconfig_path,
            "node_name": bench.node_name, "bridge": f"kf{pid % 99999}", "pod_cidr": f"10.214.{pid % 250}.0/24", "table": f"knarr-fault-{pid}",
            "link_prefix": f"f{pid % 256:02x}-", "options": {"crash_loop_initial_seconds": 0.1, "crash_loop_max_seconds": 0.5},
        })  # fmt: skip
        try:
            await bench.prepare()
            await bench.runtime.close()
            yield Site(bench, node)
        finally:
            await node.close()
            subprocess.run(["mount", "-o", "remount,bind,rw", str(folder / "data")], check=False)
            await bench.runtime_again()
            await bench.clean()
            subprocess.run(["nft", "delete", "table", "inet", node.settings["table"]], check=False, capture_output=True)
            subprocess.run(["ip", "link", "delete", node.settings["bridge"]], check=False, capture_output=True)
            for point in mounts.mount_points(str(folder)):
                mounts.unmount(point)
            shutil.rmtree(folder, ignore_errors=True)


def _ready(pods: list[Object]) -> bool:
    return bool(pods) and all(condition(p, "Ready") == "True" for p in pods)


async def _dies_at(site: Site, step: int, act: Awaitable[Any], done: Callable[[list[Object]], bool]) -> bool:
    """Let the node die at a step of what `act` makes it do, and start it again; False when it lived through all of it."""
    await site.node.arm(step)
    await act
    async with asyncio.timeout(60):
        while not site.node.died.is_set() and not done(await site.pods()):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(site.node.died.wait(), 0.02)
    if not site.node.died.is_set():
        await site.node.arm(0)
        if not site.node.died.is_set():
            return False
    await site.node.start()
    return True


@pytest.mark.timeout(1200)
async def test_a_kubelet_killed_at_any_step_of_start_and_stop_ends_as_an_undisturbed_one(site: Site) -> None:
    await site.node.start()
    starting = stopping = True
    deaths = {"start": 0, "stop": 0}
    for step in range(1, 400, 1 if EVERY_STEP else 9):
        name = f"p{step}"
        init = {"name": "i", "image": "busybox", "command": ["true"]}
        creating = site.pod(name, f"echo run >> /marks/{name}; sleep 1000", restartPolicy="Always", initContainers=[init])
        if starting:
            starting = await _dies_at(site, step, creating, _ready)
            deaths["start"] += starting
        else:
            await creating
        await site.until("Ready, its program at work", lambda pods, name=name: _ready(pods) and site.runs(name) > 0)  # type: ignore[misc]
        status = (await site.pods())[0]["status"]
        assert status["containerStatuses"][0]["restartCount"] == 0, step
        assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
        deleting = site.client.delete(PODS, name, site.bench.namespace, grace_period_seconds=1)
        if stopping:
            stopping = await _dies_at(site, step, deleting, lambda pods: not pods and not site.left())
            deaths["stop"] += stopping
        else:
            await deleting
        await site.until_clean()
        assert site.runs(name) == 1, f"its program was started once, with a death at step {step}"
        if not starting and not stopping:
            break
    print(f"deaths: {deaths}")
    assert not starting
    assert not stopping
    assert min(deaths.values()) > (12 if EVERY_STEP else 0), deaths


class Chaos:
    """Faults of one site, chosen by a seeded chance."""

    def __init__(self, site: Site, chance: random.Random) -> None:
        self.site, self.chance = site, chance
        self.done: dict[str, int] = {}

    async def one(self) -> None:
        """Do one fault and take it back; nothing when there is no process to kill."""
        kinds = ("kubelet", "conmon", "runc", "container", "container", "full disk", "read-only disk", "network")
        kind = self.chance.choice(kinds)
        if kind == "kubelet":
            await self.site.node.kill()
            await asyncio.sleep(self.chance.uniform(0, 0.2))
            await self.site.node.start()
        elif kind in ("conmon", "runc", "container"):
            if not self.kill_one(kind):
                return
        else:
            await getattr(self, kind.replace(" ", "_").replace("-", "_"))()
        self.done[kind] = self.done.get(kind, 0) + 1

    def kill_one(self, kind: str) -> bool:
        pids = []
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError, ValueError):
                words = Path(f"/proc/{int(entry)}/cmdline").read_bytes().split(b"\0")
                if kind == "container":
                    if self.site.bench.group.encode() in Path(f"/proc/{entry}/cgroup").read_bytes():
                        pids.append(int(entry))
                elif os.path.basename(words[0]) == kind.encode() and any(str(self.site.folder).encode() in word for word in words):
                    pids.append(int(entry))
        if not pids:
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.chance.choice(sorted(pids)), signal.SIGKILL)
        return True

    async def full_disk(self) -> None:
        fills = [disk / "fill" for disk in self.site.disks]
        for fill in fills:
            with contextlib.suppress(OSError), fill.open("wb", buffering=0) as file:
                while file.write(bytes(65536)):
                    pass
        await asyncio.sleep(self.chance.uniform(0.2, 0.6))
        for fill in fills:
            fill.unlink()

    async def read_only_disk(self) -> None:
        # The kernel refuses while any file is open for writing, so it is asked again. The disk of the logs never is without one.
        disk = str(self.site.data)
        async with asyncio.timeout(20):
            while subprocess.run(["mount", "-o", "remount,bind,ro", disk], check=False, capture_output=True).returncode:
                await asyncio.sleep(0.01)
        await asyncio.sleep(self.chance.uniform(0.2, 0.6))
        subprocess.run(["mount", "-o", "remount,bind,rw", disk], check=True)

    async def network(self) -> None:
        bridge = self.site.settings["bridge"]
        subprocess.run(["ip", "link", "set", bridge, "down"], check=False)
        await asyncio.sleep(self.chance.uniform(0.1, 0.4))
        subprocess.run(["ip", "link", "set", bridge, "up"], check=False)


@pytest.mark.timeout(3600)
async def test_random_faults_during_churn_change_no_end_and_leak_nothing(site: Site) -> None:
    chance = random.Random(SEED)
    chaos = Chaos(site, chance)
    await site.node.start()
    living: list[str] = []
    number = 0
    while sum(chaos.done.values()) < FAULTS:
        kind = chance.choice(("always", "done", "once"))
        name, number = f"{kind}-{number}", number + 1
        if kind == "always":
            await site.pod(name, f"echo run >> /marks/{name}; sleep 1000", restartPolicy="Always")
        elif kind == "done":
            await site.pod(name, f"echo run >> /marks/{name}; sleep 0.2; exit 0", restartPolicy="OnFailure")
        else:
            await site.pod(name, "sleep 0.2; exit 3")
        living.append(name)
        if len(living) > 8:
            victim = living.pop(chance.randrange(len(living)))
            await site.client.delete(PODS, victim, site.bench.namespace, grace_period_seconds=chance.choice((0, 1)))
        await asyncio.sleep(chance.uniform(0, 0.3))
        await chaos.one()

    def settled(pods: list[Object]) -> bool:
        wanted = {"always": lambda p: _ready([p]), "done": lambda p: p["status"]["phase"] == "Succeeded", "once": lambda p: p["status"]["phase"] == "Failed"}
        return {p["metadata"]["name"] for p in pods} == set(living) and all(wanted[p["metadata"]["name"].partition("-")[0]](p) for p in pods)

    await site.until("every pod where its spec says", settled)
    events = (await site.client.list(EVENTS, site.bench.namespace))["items"]
    told = {(e["involvedObject"]["name"], e["reason"]) for e in events}
    for pod in await site.pods():
        name, status = pod["metadata"]["name"], pod["status"]["containerStatuses"][0]
        if name.startswith("once"):
            ended = status["state"]["terminated"]
            assert ended["exitCode"] in (3, 128, 137, 255), ended
            assert ended["exitCode"] == 3 or ended.get("message") or ended["reason"] in ("Error", "StartError"), ended
        assert (name, "Started") in told or (name, "Failed") in told, name
    print(f"faults: {chaos.done}, pods: {number}")
    await site.until_clean()
