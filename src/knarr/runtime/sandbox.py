"""Pod sandboxes: namespaces, network, /dev/shm, resolv.conf and host name that the containers of a pod share.

Role: run, stop, remove, status and recovery of sandboxes. Callers: embedded.py; container.py asks for a sandbox's facts.
A sandbox has no process of its own unless its containers share one PID namespace (pause.py).
Invariants: the record is on disk before anything is made, so whatever a crash leaves is found and taken back; stop is
idempotent and keeps the record; a READY sandbox has its namespaces pinned.
Source: containerd internal/cri/server/sandbox_run.go, sandbox_stop.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.runtime import disk, namespaces, process, records, syscalls
from knarr.runtime.conmon import Process
from knarr.runtime.cri import (
    DNSConfig,
    NotFound,
    PodNetwork,
    PodSandboxConfig,
    PodSandboxStatus,
    RuntimeFault,
    SandboxNetwork,
    SandboxState,
)
from knarr.runtime.pause import Pause
from knarr.runtime.undo import Undo
from knarr.runtime.workers import Workers, run_in_thread

log = get_logger(__name__)
_SHM_BYTES = 64 << 20


@dataclass(slots=True)
class Sandbox:
    """One sandbox as it is recorded. `ready` false with `complete` false means: half made, to be taken back."""

    id: str
    config: PodSandboxConfig
    created_at_ns: int
    runtime_handler: str = ""
    complete: bool = False
    ready: bool = False
    networked: bool = False
    ips: list[str] = field(default_factory=list)
    pause: Process | None = None

    @property
    def host_network(self) -> bool:
        return self.config.namespaces.network == "NODE"


class Sandboxes:
    """See the module. `root` keeps records, `state` the volatile mounts."""

    def __init__(self, root: str, state: str, network: PodNetwork, pause: Pause, workers: Workers, tasks: Tasks, cgroup_root: str) -> None:
        self._root, self._state = os.path.join(root, "sandboxes"), os.path.join(state, "sandboxes")
        self._network, self._pause, self._workers, self._tasks = network, pause, workers, tasks
        self._cgroup_root = cgroup_root
        self._sandboxes: dict[str, Sandbox] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    # Facts

    def get(self, sandbox_id: str) -> Sandbox:
        """Find by id; raises NotFound."""
        sandbox = self._sandboxes.get(sandbox_id)
        if sandbox is None:
            raise NotFound(f'sandbox "{sandbox_id}": not found')
        return sandbox

    def all(self) -> list[Sandbox]:
        return [sandbox for sandbox in self._sandboxes.values() if sandbox.complete]

    def lock(self, sandbox_id: str) -> asyncio.Lock:
        return self._locks.setdefault(sandbox_id, asyncio.Lock())

    def directory(self, sandbox_id: str) -> str:
        return os.path.join(self._root, sandbox_id)

    def state_directory(self, sandbox_id: str) -> str:
        return os.path.join(self._state, sandbox_id)

    def namespace_path(self, sandbox: Sandbox, kind: str) -> str:
        return os.path.join(self._state, sandbox.id, "ns", kind)

    def namespace_paths(self, sandbox: Sandbox) -> dict[str, str]:
        """Kind to path of every namespace that this sandbox has (pid only when its containers share one)."""
        paths = {kind: self.namespace_path(sandbox, kind) for kind in self._kinds(sandbox)}
        if sandbox.config.namespaces.user_mappings is not None:
            paths["user"] = self.namespace_path(sandbox, "user")
        if sandbox.pause is not None:
            paths["pid"] = f"/proc/{sandbox.pause.pid}/ns/pid"
        return paths

    def shm_path(self, sandbox: Sandbox) -> str:
        return os.path.join(self._state, sandbox.id, "shm")

    def cgroup_parent(self, sandbox: Sandbox) -> str:
        return sandbox.config.cgroup_parent or f"{self._cgroup_root}/{sandbox.id[:13]}"

    def _kinds(self, sandbox: Sandbox) -> list[str]:
        kinds = [] if sandbox.host_network else ["net", "uts"]
        if sandbox.config.namespaces.ipc != "NODE":
            kinds.append("ipc")
        return kinds

    def status(self, sandbox: Sandbox) -> PodSandboxStatus:
        state = SandboxState.READY if sandbox.ready else SandboxState.NOTREADY
        netns = "" if sandbox.host_network or not sandbox.ready else self.namespace_path(sandbox, "net")
        config = sandbox.config
        return PodSandboxStatus(
            sandbox.id, config.metadata, state, sandbox.created_at_ns, list(sandbox.ips), config.namespaces,
            config.labels, config.annotations, sandbox.runtime_handler, netns,
        )  # fmt: skip

    def list(self, labels: Mapping[str, str] | None) -> list[PodSandboxStatus]:
        wanted = (labels or {}).items()
        return [self.status(item) for item in self.all() if all(item.config.labels.get(key) == value for key, value in wanted)]

    # Changing

    async def run(self, config: PodSandboxConfig, runtime_handler: str) -> Sandbox:
        """Make a sandbox; on failure or cancellation nothing is left."""
        sandbox = Sandbox(os.urandom(32).hex(), config, time.time_ns(), runtime_handler)
        async with Undo(self._tasks, f"sandbox {sandbox.id[:13]}") as undo:
            self._sandboxes[sandbox.id] = sandbox
            undo.add(lambda: self._discard(sandbox))
            await self._workers.run(lambda: self._prepare_files(sandbox))
            await self._make_namespaces(sandbox)
            if not sandbox.host_network:
                sandbox.networked = True
                result = await self._network.setup(self._network_view(sandbox))
                sandbox.ips = list(result.ips)
            if config.namespaces.pid == "POD":
                sandbox.pause = await self._pause.start(sandbox.id, self.namespace_paths(sandbox), self.cgroup_parent(sandbox), config)
            sandbox.complete = sandbox.ready = True
            await self._save(sandbox)
        return sandbox

    def _network_view(self, sandbox: Sandbox) -> SandboxNetwork:
        metadata = sandbox.config.metadata
        return SandboxNetwork(
            sandbox.id, self.namespace_path(sandbox, "net"), metadata.namespace, metadata.name, metadata.uid,
            tuple(sandbox.config.port_mappings), sandbox.config.annotations,
        )  # fmt: skip

    def _prepare_files(self, sandbox: Sandbox) -> None:
        directory, state, config = self.directory(sandbox.id), self.state_directory(sandbox.id), sandbox.config
        os.makedirs(directory, mode=0o711)
        os.makedirs(state, mode=0o711)
        disk.write_record(os.path.join(directory, "sandbox.json"), records.encode(sandbox))
        if config.log_directory:
            os.makedirs(config.log_directory, mode=0o755, exist_ok=True)
        if config.namespaces.ipc != "NODE":
            shm = self.shm_path(sandbox)
            os.mkdir(shm)
            flags = syscalls.MS_NOSUID | syscalls.MS_NODEV | syscalls.MS_NOEXEC
            syscalls.mount("shm", shm, "tmpfs", flags, f"mode=1777,size={_SHM_BYTES}{_shm_owner(config)}")
        _write(os.path.join(directory, "resolv.conf"), resolv_conf(config.dns))
        _write(os.path.join(directory, "hostname"), (config.hostname or os.uname().nodename) + "\n")

    async def _make_namespaces(self, sandbox: Sandbox) -> None:
        config = sandbox.config
        plan = namespaces.NamespacePlan(
            os.path.join(self.state_directory(sandbox.id), "ns"),
            self._kinds(sandbox),
            config.hostname,
            config.sysctls,
            config.namespaces.user_mappings,
        )
        await run_in_thread(lambda: namespaces.create(plan), f"sandbox {sandbox.id[:13]}")

    async def stop(self, sandbox: Sandbox) -> None:
        """Give back network, namespaces and mounts; the record stays. Containers must have been stopped. Idempotent."""
        if sandbox.networked:
            await self._network.teardown(self._network_view(sandbox))
            sandbox.networked = False
        if sandbox.pause is not None:
            await self._pause.stop(sandbox.id, sandbox.pause)
            sandbox.pause = None
        await self._workers.run(lambda: self._drop(sandbox.id))
        if sandbox.ready or not sandbox.complete:
            sandbox.ready = False
            if sandbox.complete:
                await self._save(sandbox)

    def _drop(self, sandbox_id: str) -> None:
        state = self.state_directory(sandbox_id)
        namespaces.drop(os.path.join(state, "ns"))
        for name in ("shm", "layers"):
            with contextlib.suppress(FileNotFoundError):
                while syscalls.unmount(os.path.join(state, name)):
                    pass
        disk.remove_tree(state)

    async def remove(self, sandbox: Sandbox) -> None:
        """Stop and forget. Idempotent."""
        await self._discard(sandbox)

    async def _discard(self, sandbox: Sandbox) -> None:
        await self.stop(sandbox)
        await self._workers.run(lambda: disk.remove_tree(self.directory(sandbox.id)))
        self._sandboxes.pop(sandbox.id, None)
        self._locks.pop(sandbox.id, None)

    async def _save(self, sandbox: Sandbox) -> None:
        record, path = records.encode(sandbox), os.path.join(self.directory(sandbox.id), "sandbox.json")
        await self._workers.run(lambda: disk.write_record(path, record))

    # Recovery

    async def recover(self) -> None:
        """Find everything again after a restart; half-made sandboxes are taken back, lost ones become NOTREADY.

        One sandbox's failure does not stop the others.
        """
        await self._workers.run(lambda: disk.make_directories(self._root, self._state))
        known = set()
        for sandbox_id in await self._workers.run(lambda: os.listdir(self._root)):
            try:
                await self._recover_one(sandbox_id)
            except (OSError, RuntimeFault) as error:
                log.error("sandbox could not be recovered", sandbox=sandbox_id, error=error)
            known.add(sandbox_id)
        for sandbox_id in await self._workers.run(lambda: os.listdir(self._state)):
            if sandbox_id not in known:
                try:
                    await self._workers.run(lambda lost=sandbox_id: self._drop(lost))  # type: ignore[misc]
                except OSError as error:
                    log.error("what is left of a sandbox could not be dropped", sandbox=sandbox_id, error=error)

    async def _recover_one(self, sandbox_id: str) -> None:
        directory = self.directory(sandbox_id)
        try:
            record = await self._workers.run(lambda: disk.read_record(os.path.join(directory, "sandbox.json")))
            sandbox = records.from_record(Sandbox, record) if record is not None else None
        except (disk.BadRecord, TypeError, ValueError, KeyError) as error:
            log.warning("unreadable sandbox record", sandbox=sandbox_id, error=error)
            sandbox = None
        if sandbox is None:
            await self._workers.run(lambda: self._drop(sandbox_id))
            await self._workers.run(lambda: disk.remove_tree(directory))
            return
        self._sandboxes[sandbox_id] = sandbox
        if not sandbox.complete:
            sandbox.networked = not sandbox.host_network
            await self._pause.stop(sandbox.id, None)
            await self._discard(sandbox)
            return
        if sandbox.ready and not self._intact(sandbox):
            await self.stop(sandbox)

    def _intact(self, sandbox: Sandbox) -> bool:
        base = os.path.join(self.state_directory(sandbox.id), "ns")
        if not all(namespaces.pinned(base, kind) for kind in self._kinds(sandbox)):
            return False
        return sandbox.pause is None or process.alive(sandbox.pause.pid, sandbox.pause.started)


def _shm_owner(config: PodSandboxConfig) -> str:
    mappings = config.namespaces.user_mappings
    owner = next((item.host_id for item in mappings or () if item.container_id == 0), None)
    return f",uid={owner},gid={owner}" if owner else ""


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)
        os.fchmod(file.fileno(), 0o644)


def resolv_conf(dns: DNSConfig | None) -> str:
    """The text of a resolv.conf; without a configuration the host's."""
    if dns is None or not (dns.servers or dns.searches or dns.options):
        with contextlib.suppress(OSError), open("/etc/resolv.conf") as file:
            return file.read()
        return ""
    lines = [f"search {' '.join(dns.searches)}"] if dns.searches else []
    lines += [f"nameserver {server}" for server in dns.servers]
    if dns.options:
        lines.append(f"options {' '.join(dns.options)}")
    return "\n".join(lines) + "\n"
