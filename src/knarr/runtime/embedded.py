"""The embedded runtime: conmon and runc below, RuntimeService and ImageService above.

Role: wires image store, sandboxes, containers and streams together and is what the kubelet gets. Every method is short: the
work is in the modules named after it. Call `await start()` first (it recovers everything from disk and kernel) and
`await close()` last; containers outlive both.
Loops: one task per running container waits for conmon's end (input: a pidfd; nothing queues).
Invariants: calls on one sandbox are serialised by its lock where they change it; all state is derived from records on disk.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ParamSpec, TypeVar

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.runtime import execs, forward, process
from knarr.runtime.attach import Attach, attach
from knarr.runtime.cgroups import Cgroups
from knarr.runtime.conmon import Conmon
from knarr.runtime.container import Containers
from knarr.runtime.cri import (
    AuthConfig,
    ContainerConfig,
    ContainerEvent,
    ContainerStats,
    ContainerStatus,
    ExecResult,
    FilesystemUsage,
    Image,
    LinuxResources,
    NotFound,
    PodNetwork,
    PodSandboxConfig,
    PodSandboxStatus,
    RuntimeCondition,
    RuntimeFault,
    RuntimeVersion,
    SandboxStats,
)
from knarr.runtime.events import Events
from knarr.runtime.images.archive import Loader
from knarr.runtime.images.registry import Mirrors, Progress, Puller
from knarr.runtime.images.store import ImageStore
from knarr.runtime.pause import Pause
from knarr.runtime.roots import Roots
from knarr.runtime.runc import Runc
from knarr.runtime.sandbox import Sandboxes
from knarr.runtime.security import may_lower_oom_score
from knarr.runtime.snapshots import Snapshots
from knarr.runtime.stats import Stats
from knarr.runtime.workers import Workers

log = get_logger(__name__)


P = ParamSpec("P")
T = TypeVar("T")


def _faults(call: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """What the operating system refuses (a full disk, no more processes) is a fault of the runtime to its callers."""

    @functools.wraps(call)
    async def wrapped(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await call(*args, **kwargs)
        except OSError as error:
            raise RuntimeFault(f"{call.__name__}: {error}") from error

    return wrapped


@dataclass(frozen=True, slots=True)
class RuntimeConfig:
    """Where and with what the runtime works."""

    root: str
    """Folder of images, layers and records; kept over a restart of the machine."""
    state: str
    """Folder of mounts, sockets and pids; on a tmpfs, gone after a restart of the machine."""
    network: PodNetwork
    """Attaches sandboxes."""
    cgroup_root: str = "/knarr"
    """Parent group of pods for which the kubelet names none."""
    oci_runtime: str = "runc"
    """Program that makes containers: runc or crun, a name or a path."""
    conmon: str = "conmon"
    handlers: Mapping[str, str] = field(default_factory=dict)
    """Names of RuntimeClass handlers, each the program to use. "" and "runc" are always there."""
    mirrors: Mirrors = field(default_factory=Mirrors)
    """Mirrors of registries, and which registries speak plain HTTP."""
    max_layer_bytes: int = 0
    """Largest unpacked layer; 0 is no limit."""


class EmbeddedRuntime:
    """Implements cri.RuntimeService and cri.ImageService; see the module."""

    features = frozenset({"supplementalGroupsPolicy", "recursiveReadOnlyMounts", "userNamespaces"})

    def __init__(self, config: RuntimeConfig) -> None:
        self.config = config
        self._workers, self._tasks, self._events = Workers(), Tasks(), Events()
        self._cgroups = Cgroups()
        self._runc = Runc(shutil.which(config.oci_runtime) or config.oci_runtime, os.path.join(config.state, "oci"))
        self._conmon = Conmon(self._runc, os.path.join(config.state, "exits"), config.conmon)
        self.images = ImageStore(os.path.join(config.root, "images"), self._workers, self._tasks, max_layer_bytes=config.max_layer_bytes)
        self._puller = Puller(self.images, self._workers, self._tasks, config.mirrors)
        self._snapshots = Snapshots(self.images.layers.root, config.root)
        pause = Pause(self._runc, config.state, self._workers)
        self._sandboxes = Sandboxes(config.root, config.state, config.network, pause, self._workers, self._tasks, config.cgroup_root)
        roots = Roots(self._snapshots, self.images, self._sandboxes, self._workers)
        self._containers = Containers(
            config.root, config.state, sandboxes=self._sandboxes, images=self.images, roots=roots, conmon_=self._conmon, runc=self._runc,
            handlers={name: Runc(shutil.which(program) or program, self._runc.root) for name, program in config.handlers.items()},
            cgroups=self._cgroups, events=self._events, workers=self._workers, tasks=self._tasks, oom_score_floor=_oom_floor(),
        )  # fmt: skip
        self._execs = execs.Execs(self._containers)
        self._stats = Stats(self._containers, self._sandboxes, self._cgroups, self._workers)
        self._version = ""

    async def start(self) -> None:
        """Recover what is on disk and in the kernel. Raises RuntimeFault when conmon or the OCI runtime is missing."""
        for program in (self.config.oci_runtime, self.config.conmon):
            if shutil.which(program) is None:
                raise RuntimeFault(f"{program} is not installed")

        def prepare() -> None:
            for path, mode in ((self.config.root, 0o711), (self.config.state, 0o711), (self._conmon.exit_dir, 0o700), (self._runc.root, 0o700)):
                os.makedirs(path, mode=mode, exist_ok=True)
            self.images.load()
            self._snapshots.probe()

        await self._workers.run(prepare)
        await self._sandboxes.recover()
        await self._containers.recover()
        await self.images.collect()

    async def close(self) -> None:
        """Stop watching; sandboxes and containers go on."""
        await self._tasks.close()
        self._events.close()
        self._workers.close()

    # Runtime service

    async def version(self) -> RuntimeVersion:
        if not self._version:
            done = await process.run([self._runc.binary, "--version"])
            self._version = done.stdout.decode().splitlines()[0].rpartition(" ")[2].partition("+")[0]
        return RuntimeVersion("knarr", self._version)

    async def status(self) -> list[RuntimeCondition]:
        missing = [name for name in (self.config.oci_runtime, self.config.conmon) if shutil.which(name) is None]
        why = await self.config.network.ready()
        return [
            RuntimeCondition("RuntimeReady", not missing, "ProgramMissing" if missing else "", f"{missing} not installed" if missing else ""),
            RuntimeCondition("NetworkReady", why is None, "NetworkPluginNotReady" if why else "", why or ""),
        ]

    @_faults
    async def run_pod_sandbox(self, config: PodSandboxConfig, runtime_handler: str = "") -> str:
        if runtime_handler not in ("", "runc") and runtime_handler not in self.config.handlers:
            raise RuntimeFault(f'no runtime for "{runtime_handler}" is configured')
        if runtime_handler in self.config.handlers and shutil.which(self.config.handlers[runtime_handler]) is None:
            raise RuntimeFault(f'runtime handler "{runtime_handler}" needs {self.config.handlers[runtime_handler]}, which is not installed')
        return (await self._sandboxes.run(config, runtime_handler)).id

    @_faults
    async def stop_pod_sandbox(self, sandbox_id: str) -> None:
        try:
            sandbox = self._sandboxes.get(sandbox_id)
        except NotFound:
            return
        async with self._sandboxes.lock(sandbox_id):
            containers = self._containers.of_sandbox(sandbox_id)
            results = await asyncio.gather(*(self._containers.stop(item, 0) for item in containers), return_exceptions=True)
            for result in results:
                if isinstance(result, BaseException):
                    raise result
            await self._containers.wait_dropped(containers)
            await self._sandboxes.stop(sandbox)

    @_faults
    async def remove_pod_sandbox(self, sandbox_id: str) -> None:
        await self.stop_pod_sandbox(sandbox_id)
        try:
            sandbox = self._sandboxes.get(sandbox_id)
        except NotFound:
            return
        async with self._sandboxes.lock(sandbox_id):
            for container in self._containers.of_sandbox(sandbox_id):
                await self._containers.remove(container)
            await self._sandboxes.remove(sandbox)

    async def pod_sandbox_status(self, sandbox_id: str) -> PodSandboxStatus:
        return self._sandboxes.status(self._sandboxes.get(sandbox_id))

    async def list_pod_sandboxes(self, labels: Mapping[str, str] | None = None) -> list[PodSandboxStatus]:
        return self._sandboxes.list(labels)

    @_faults
    async def create_container(self, sandbox_id: str, config: ContainerConfig) -> str:
        return (await self._containers.create(self._sandboxes.get(sandbox_id), config)).id

    @_faults
    async def start_container(self, container_id: str) -> None:
        await self._containers.start(self._containers.get(container_id))

    @_faults
    async def stop_container(self, container_id: str, timeout_seconds: float, signal: str = "") -> None:
        try:
            container = self._containers.get(container_id)
        except NotFound:
            return
        await self._containers.stop(container, timeout_seconds, signal)

    @_faults
    async def remove_container(self, container_id: str) -> None:
        try:
            container = self._containers.get(container_id)
        except NotFound:
            return
        await self._containers.remove(container)

    async def container_status(self, container_id: str) -> ContainerStatus:
        return self._containers.status(self._containers.get(container_id))

    async def list_containers(self, labels: Mapping[str, str] | None = None, sandbox_id: str | None = None) -> list[ContainerStatus]:
        return self._containers.list(labels, sandbox_id)

    @_faults
    async def update_container_resources(self, container_id: str, resources: LinuxResources) -> None:
        await self._containers.update(self._containers.get(container_id), resources)

    @_faults
    async def reopen_container_log(self, container_id: str) -> None:
        self._containers.reopen_log(self._containers.get(container_id))

    @_faults
    async def exec_sync(self, container_id: str, command: Sequence[str], timeout_seconds: float = 0) -> ExecResult:
        return await self._execs.run(self._containers.running(container_id), command, timeout_seconds)

    @_faults
    async def exec(self, container_id: str, command: Sequence[str], *, tty: bool, stdin: bool) -> execs.Exec:
        return self._execs.start(self._containers.running(container_id), command, tty=tty, stdin=stdin)

    @_faults
    async def attach(self, container_id: str, *, tty: bool, stdin: bool) -> Attach:
        return await attach(self._containers, self._containers.running(container_id), stdin=stdin)

    @_faults
    async def port_forward(self, sandbox_id: str, port: int) -> forward.Connection:
        sandbox = self._sandboxes.get(sandbox_id)
        if not sandbox.ready:
            raise RuntimeFault(f'sandbox "{sandbox_id}" is not ready')
        return await forward.connect("" if sandbox.host_network else self._sandboxes.namespace_path(sandbox, "net"), port)

    @_faults
    async def list_container_stats(self, labels: Mapping[str, str] | None = None) -> list[ContainerStats]:
        return await self._stats.containers(labels)

    @_faults
    async def list_pod_sandbox_stats(self) -> list[SandboxStats]:
        return await self._stats.sandboxes()

    def events(self) -> AsyncIterator[ContainerEvent]:
        return self._events.subscribe()

    # Image service

    async def list_images(self) -> list[Image]:
        return [self.images.to_cri(image) for image in self.images.all()]

    async def image_status(self, reference: str) -> Image | None:
        image = self.images.find(reference)
        return None if image is None else self.images.to_cri(image)

    @_faults
    async def pull_image(
        self, reference: str, auth: Sequence[AuthConfig] = (), namespace: str = "", progress: Progress | None = None
    ) -> str:
        return (await self._puller.pull(reference, auth, progress)).id

    @_faults
    async def remove_image(self, reference: str) -> None:
        await self.images.remove(reference)

    @_faults
    async def image_fs_info(self) -> FilesystemUsage:
        used, inodes = self.images.layers.usage()
        return FilesystemUsage(self.config.root, time.time_ns(), used, inodes)

    # For the command line

    @_faults
    async def load_images(self, path: str, *, name: str = "") -> list[Image]:
        """Load an archive or layout; returns its images. Raises RuntimeFault."""
        return [self.images.to_cri(image) for image in await Loader(self.images, self._workers).load(path, name=name)]

    @_faults
    async def prune_images(self) -> list[str]:
        """Remove the images that no container uses; returns their ids."""
        return await self.images.prune({container.image_id for container in self._containers.all()})


def _oom_floor() -> int:
    """The lowest oom_score_adj that we may give: anything with CAP_SYS_RESOURCE, else our own."""
    if may_lower_oom_score():
        return -1000
    with open("/proc/self/oom_score_adj") as file:
        return int(file.read())
