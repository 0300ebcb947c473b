"""A real kubelet for tests: real API server in memory, real runtime, own folders and groups. Leaves nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import tempfile
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest_asyncio

from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, EVENTS, NAMESPACES, NODES, PODS, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.kubelet import Kubelet
from knarr.runtime.cgroups import Cgroups
from knarr.runtime.cri import NetworkResult, SandboxNetwork
from knarr.runtime.embedded import EmbeddedRuntime, RuntimeConfig
from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from tests.images import build


class LoopbackNetwork:
    """Attaches nothing; every pod gets an address that exists nowhere."""

    def __init__(self) -> None:
        self._next = 0

    async def setup(self, sandbox: SandboxNetwork) -> NetworkResult:
        self._next += 1
        return NetworkResult([f"10.99.{self._next // 250}.{self._next % 250 + 1}"])

    async def teardown(self, sandbox: SandboxNetwork) -> None:
        return

    async def ready(self) -> str | None:
        return None


class Bench:
    """A node under test with short-hands."""

    def __init__(self, server: RunningAPIServer, folder: Path, network: Any = None) -> None:
        self.server = server
        self.client: Client = server.client
        self.folder = folder
        self.group = f"/knarr-test-{uuid.uuid4().hex[:8]}"
        self.node_name = "node-under-test"
        self.namespace = "test"
        self.network = network or LoopbackNetwork()
        self.root = folder / "root"
        """Where images, sandboxes and containers are kept."""
        self.runtime = self.make_runtime()
        self.kubelet: Kubelet | None = None
        self._task: asyncio.Task[None] | None = None
        self.options: dict[str, Any] = {}

    def make_runtime(self) -> EmbeddedRuntime:
        config = RuntimeConfig(root=str(self.root), state=str(self.folder / "state"), network=self.network, cgroup_root=self.group)
        return EmbeddedRuntime(config)

    def config(self) -> KubeletConfig:
        fields: dict[str, Any] = {
            "node_name": self.node_name,
            "root_dir": str(self.folder / "kubelet"),
            "share_root": True,
            "pod_logs_dir": str(self.folder / "logs"),
            "cgroup_root": self.group,
            "resolv_conf": "/etc/resolv.conf",
            "crash_loop_initial_seconds": 10.0,
        }
        return KubeletConfig(**{**fields, **self.options})

    async def start(self) -> None:
        """Start a kubelet and wait until it handles pods."""
        self.kubelet = Kubelet(self.client, self.runtime, self.runtime, self.config())
        self._task = asyncio.get_running_loop().create_task(self.kubelet.run(), name="kubelet")
        ready = asyncio.get_running_loop().create_task(self.kubelet.ready.wait())
        await asyncio.wait({self._task, ready}, return_when=asyncio.FIRST_COMPLETED, timeout=20)
        if self._task.done():
            self._task.result()
        assert self.kubelet.ready.is_set()

    async def stop(self) -> None:
        """End the kubelet as a crash would: containers go on."""
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._task
            self._task = None

    async def runtime_again(self) -> None:
        """A new runtime over the same folders."""
        self.runtime = self.make_runtime()
        await self.runtime.start()

    async def restart(self, meanwhile: Callable[[], Any] | None = None) -> None:
        """End kubelet and runtime, and start new ones over the same folders."""
        await self.stop()
        await self.runtime.close()
        if meanwhile is not None:
            await meanwhile()
        await self.runtime_again()
        await self.start()

    async def prepare(self) -> None:
        """Images, namespace, service account: what controllers would make."""
        await self.runtime.start()
        for archive in (build.busybox(), build.pause()):
            await self.runtime.load_images(str(archive))
        await self.client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}})
        account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": self.namespace}}
        await self.client.create(SERVICE_ACCOUNTS, account, self.namespace)
        root = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "kube-root-ca.crt", "namespace": self.namespace}}
        await self.client.create(CONFIG_MAPS, {**root, "data": {"ca.crt": "test"}}, self.namespace)

    async def create(self, pod: Object) -> Object:
        """Create a pod on this node."""
        pod = {"apiVersion": "v1", "kind": "Pod", **pod}
        pod["metadata"].setdefault("namespace", self.namespace)
        pod["spec"].setdefault("nodeName", self.node_name)
        for container in pod["spec"]["containers"] + pod["spec"].get("initContainers", []):
            container.setdefault("image", "busybox")
            container.setdefault("imagePullPolicy", "IfNotPresent")
        return await self.client.create(PODS, pod, pod["metadata"]["namespace"])

    async def run(self, name: str, script: str, **spec: Any) -> Object:
        """Create a pod of one busybox container with a shell script."""
        container = {"name": "c", "command": ["sh", "-c", script], **spec.pop("container", {})}
        spec.setdefault("restartPolicy", "Never")
        spec.setdefault("terminationGracePeriodSeconds", 1)
        return await self.create({"metadata": {"name": name}, "spec": {"containers": [container], **spec}})

    async def until(self, name: str, condition: Callable[[Object | None], Any], seconds: float = 20) -> Any:
        """Watch a pod until the condition holds (of None when it is gone); gives what it returned."""
        try:
            return await self._until(name, condition, seconds)
        except TimeoutError as e:
            pods = await self.client.list(PODS, self.namespace, field_selector=f"metadata.name={name}")
            events = await self.client.list(EVENTS, self.namespace, field_selector=f"involvedObject.name={name}")
            told = [f"{e['reason']}: {e['message']}" for e in events["items"]]
            raise AssertionError(f"{name} is {[(p['metadata'].get('deletionTimestamp'), p['status']) for p in pods['items']]}, events {told}") from e

    async def _until(self, name: str, condition: Callable[[Object | None], Any], seconds: float) -> Any:
        async with asyncio.timeout(seconds):
            listed = await self.client.list(PODS, self.namespace, field_selector=f"metadata.name={name}")
            pod = listed["items"][0] if listed["items"] else None
            if (result := condition(pod)) or pod is None:
                return result
            version = listed["metadata"]["resourceVersion"]
            watch = self.client.watch(PODS, self.namespace, resource_version=version, field_selector=f"metadata.name={name}")
            async for kind, obj in watch:
                if kind == "BOOKMARK":
                    continue
                if result := condition(None if kind == "DELETED" else obj):
                    return result
        raise AssertionError("watch ended")

    async def until_phase(self, name: str, phase: str, seconds: float = 20) -> Object:
        return await self.until(name, lambda p: p if p and p["status"].get("phase") == phase else None, seconds)

    async def until_ready(self, name: str, seconds: float = 20) -> Object:
        return await self.until(name, lambda p: p if p and condition(p, "Ready") == "True" else None, seconds)

    async def until_gone(self, name: str, seconds: float = 20) -> None:
        await self.until(name, lambda p: p is None, seconds)

    async def log(self, name: str, container: str = "c", attempt: int = 0) -> str:
        """What a container has written, read from its CRI log."""
        pod = await self.client.get(PODS, name, self.namespace)
        path = self.folder / "logs" / f"{self.namespace}_{name}_{pod['metadata']['uid']}" / container / f"{attempt}.log"
        lines = path.read_text().splitlines(keepends=True)
        return "".join(part[3] if part[2] == "F" else part[3].rstrip("\n") for part in (line.split(" ", 3) for line in lines))

    async def clean(self) -> None:
        with contextlib.suppress(StatusError):
            await self.client.delete_collection(PODS, self.namespace, grace_period_seconds=0)
        await self.stop()
        for sandbox in await self.runtime.list_pod_sandboxes():
            await self.runtime.stop_pod_sandbox(sandbox.id)
            await self.runtime.remove_pod_sandbox(sandbox.id)
        await self.runtime.close()
        from knarr.kubelet.cgroups import Hierarchies
        from knarr.kubelet.volumes import mounts

        for point in mounts.mount_points(str(self.folder)):
            mounts.unmount(point)
        hierarchies = Hierarchies.of_host()
        for mount in {hierarchies.v2, hierarchies.beside, *hierarchies.v1.values()} - {""}:
            root = Path(mount + self.group)
            if root.is_dir():
                for folder in sorted((p for p in root.rglob("*") if p.is_dir()), key=lambda p: -len(p.parts)):
                    folder.rmdir()
                root.rmdir()
        shutil.rmtree(self.folder, ignore_errors=True)


def condition(pod: Object, kind: str) -> str | None:
    """Status of one condition."""
    return next((c["status"] for c in pod["status"].get("conditions") or [] if c["type"] == kind), None)


def container_state(pod: Object, name: str = "c") -> Object:
    return next(s for s in pod["status"]["containerStatuses"] if s["name"] == name)["state"]


@pytest_asyncio.fixture
async def bench() -> AsyncIterator[Bench]:
    """A kubelet that handles pods of namespace "test"."""
    folder = Path(tempfile.mkdtemp(prefix="knarr-kubelet-"))
    async with running_apiserver() as server:
        bench = Bench(server, folder)
        try:
            await bench.prepare()
            await bench.start()
            yield bench
        finally:
            await bench.clean()


__all__ = ["NODES", "Bench", "Cgroups"]
