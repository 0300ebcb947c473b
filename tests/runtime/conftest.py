"""A real runtime for tests: own folders, own groups, pods without a network beyond the loopback. Leaves nothing behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from knarr.runtime.cgroups import Cgroups
from knarr.runtime.cri import (
    ContainerConfig,
    ContainerEvent,
    ContainerMetadata,
    ContainerStatus,
    NetworkResult,
    PodSandboxConfig,
    PodSandboxMetadata,
    RuntimeFault,
    SandboxNetwork,
)
from knarr.runtime.embedded import EmbeddedRuntime, RuntimeConfig
from tests.images import build

BUSYBOX = "docker.io/library/busybox:latest"


class LoopbackNetwork:
    """A pod network that attaches nothing: the sandbox has its loopback."""

    def __init__(self) -> None:
        self.attached: set[str] = set()
        self.failure: Exception | None = None
        self.dead = False
        """Set when the process that used it is taken as killed: what still runs of it does nothing any more."""

    async def setup(self, sandbox: SandboxNetwork) -> NetworkResult:
        if self.dead:
            raise RuntimeFault("killed")
        if self.failure is not None:
            raise self.failure
        self.attached.add(sandbox.sandbox_id)
        return NetworkResult(["127.0.0.1"])

    async def teardown(self, sandbox: SandboxNetwork) -> None:
        if not self.dead:
            self.attached.discard(sandbox.sandbox_id)

    async def ready(self) -> str | None:
        return None


class Bench:
    """A runtime with short-hands."""

    def __init__(self, folder: Path, group: str) -> None:
        self.folder, self.group = folder, group
        self.network = LoopbackNetwork()
        self.runtime = self.make()

    def make(self, **options: object) -> EmbeddedRuntime:
        return EmbeddedRuntime(
            RuntimeConfig(root=str(self.folder / "root"), state=str(self.folder / "state"), network=self.network, cgroup_root=self.group, **options)  # type: ignore[arg-type]
        )

    async def restart(self) -> None:
        """End this runtime as a killed kubelet would, and start another over the same folders."""
        await self.kill()
        await self.revive()

    async def kill(self) -> None:
        """End this runtime at once: whatever it was about to do does not happen."""
        self.network.dead = True
        self.runtime._workers.close()
        await self.runtime.close()

    async def revive(self) -> None:
        """Start another runtime over the same folders."""
        attached, self.network = self.network.attached, LoopbackNetwork()
        self.network.attached = attached
        self.runtime = self.make()
        await self.runtime.start()

    def sandbox(self, **fields: object) -> PodSandboxConfig:
        uid = uuid.uuid4().hex
        config = PodSandboxConfig(PodSandboxMetadata("pod", uid, "default"), hostname="pod", log_directory=str(self.folder / "logs" / uid))
        config.cgroup_parent = f"{self.group}/pod{config.metadata.uid[:8]}"
        for name, value in fields.items():
            setattr(config, name, value)
        return config

    def container(self, *command: str, name: str = "c", **fields: object) -> ContainerConfig:
        config = ContainerConfig(ContainerMetadata(name), BUSYBOX, command=list(command), log_path=f"{name}/0.log")
        for key, value in fields.items():
            setattr(config, key, value)
        return config

    async def run(self, *command: str, sandbox_id: str = "", **fields: object) -> str:
        """Start a container (in a sandbox of its own); returns its id."""
        sandbox_id = sandbox_id or await self.runtime.run_pod_sandbox(self.sandbox())
        container_id = await self.runtime.create_container(sandbox_id, self.container(*command, **fields))
        await self.runtime.start_container(container_id)
        return container_id

    async def ended(self, container_id: str) -> ContainerStatus:
        """Wait for a container's end."""
        events = self.runtime.events()
        while (status := await self.runtime.container_status(container_id)).finished_at_ns == 0:
            async for event in events:
                if event.container_id == container_id and event.type == "STOPPED":
                    break
        return status

    async def output(self, *command: str, **fields: object) -> tuple[int, str]:
        """Run to the end; returns exit code and log text without decoration."""
        container_id = await self.run(*command, **fields)
        status = await self.ended(container_id)
        return status.exit_code, self.log(status)

    def log(self, status: ContainerStatus) -> str:
        text = ""
        for line in Path(status.log_path).read_text().splitlines():
            _, _, tag, content = line.split(" ", 3)
            text += content + ("\n" if tag == "F" else "")
        return text

    async def clean(self) -> None:
        for sandbox in await self.runtime.list_pod_sandboxes():
            await self.runtime.remove_pod_sandbox(sandbox.id)


def mounts_below(folder: Path) -> list[str]:
    return [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if line.split()[4].startswith(str(folder) + "/")]


def processes_naming(text: str) -> list[str]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if text in command:
                    found.append(command)
    return found


@pytest.fixture(scope="session")
def image_folder() -> Iterator[Path]:
    """A store with the busybox image, loaded once; tests work on a copy of its records with the same layers."""
    folder = Path(tempfile.mkdtemp(prefix="runtime-images-", dir="/tmp"))
    import asyncio

    async def load() -> None:
        runtime = EmbeddedRuntime(RuntimeConfig(root=str(folder), state=str(folder / "state"), network=LoopbackNetwork()))
        await runtime.start()
        await runtime.load_images(str(build.busybox()))
        await runtime.close()

    asyncio.run(load())
    yield folder / "images"
    shutil.rmtree(folder)


@pytest.fixture
async def bench(image_folder: Path) -> AsyncIterator[Bench]:
    """A started runtime that has the busybox image."""
    if os.geteuid() != 0:
        pytest.fail("the runtime's tests need root")
    folder = Path(tempfile.mkdtemp(prefix="runtime-test-", dir="/tmp"))
    folder.chmod(0o755)
    (folder / "root").mkdir()
    subprocess.run(["cp", "-a", str(image_folder), str(folder / "root/images")], check=True)
    group = f"/knarr-test-{folder.name[-8:]}"
    made = Bench(folder, group)
    await made.runtime.start()
    try:
        yield made
        await made.clean()
        assert mounts_below(folder) == []
        assert processes_naming(str(folder)) == []
        assert made.network.attached == set()
    finally:
        with contextlib.suppress(Exception):
            await made.clean()
        await made.runtime.close()
        Cgroups().kill(group)
        Cgroups().remove(group)
        for mount in reversed(mounts_below(folder)):
            subprocess.run(["umount", "-l", mount], check=False)
        shutil.rmtree(folder, ignore_errors=True)


__all__ = ["BUSYBOX", "Bench", "ContainerEvent", "LoopbackNetwork", "mounts_below", "processes_naming"]
