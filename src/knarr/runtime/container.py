"""Containers: create, start, stop, remove, and finding them again after a restart.

Role: the life of a container between image store, sandbox, conmon and the OCI runtime. Callers: embedded.py, execs.py, stats.py.
As in containerd, create only prepares (root file system, specification); the process is made by start, so a command that does
not exist is a failed *start*: exit code 128, reason StartError.
Invariants: state is derived from three times (created, started, finished); a record is on disk before the thing it describes
is made; conmon's end is watched before the process is let go; after the end the OCI runtime's state, the groups and the mount
are dropped at once, the writable layer and the record stay until remove.
Start, end and recovery are together because they share the same few lines of state and are one another's proof.
Source: containerd internal/cri/server/container_{create,start,stop,remove}.go, restart.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.runtime import conmon, disk, process, records
from knarr.runtime.cgroups import Cgroups
from knarr.runtime.conmon import Conmon, ConmonOptions, CreateFault, Held
from knarr.runtime.container_model import Container, Live, merge_resources, signal_number
from knarr.runtime.container_spec import change_resources, write_spec
from knarr.runtime.cri import (
    ContainerConfig,
    ContainerEvent,
    ContainerState,
    ContainerStatus,
    LinuxResources,
    NotFound,
    RuntimeFault,
)
from knarr.runtime.events import Events
from knarr.runtime.images.store import ImageStore, StoredImage
from knarr.runtime.roots import Prepared, Roots
from knarr.runtime.runc import Runc, RuncFault
from knarr.runtime.sandbox import Sandbox, Sandboxes
from knarr.runtime.spec import resources
from knarr.runtime.strays import kill_strays
from knarr.runtime.undo import Undo
from knarr.runtime.workers import Workers

log = get_logger(__name__)
_KILL_SECONDS = 30.0
_EXECUTE_SECONDS = 2.0
_EXIT_CANNOT_START, _EXIT_UNKNOWN = 128, 255


class Containers:
    """See the module."""

    def __init__(
        self, root: str, state: str, *, sandboxes: Sandboxes, images: ImageStore, roots: Roots, conmon_: Conmon, runc: Runc,
        handlers: Mapping[str, Runc], cgroups: Cgroups, events: Events, workers: Workers, tasks: Tasks, oom_score_floor: int,
    ) -> None:  # fmt: skip
        self._root, self._state = os.path.join(root, "containers"), os.path.join(state, "containers")
        self._sandboxes, self._images, self._roots = sandboxes, images, roots
        self._handlers = dict(handlers)
        self._conmon, self._runc, self._cgroups, self._events = conmon_, runc, cgroups, events
        self._workers, self._tasks, self._oom_score_floor = workers, tasks, oom_score_floor
        self._containers: dict[str, Container] = {}
        self._live: dict[str, Live] = {}
        self.by_sandbox: dict[str, set[str]] = {}

    # Facts

    def get(self, container_id: str) -> Container:
        """Find by id; raises NotFound."""
        container = self._containers.get(container_id)
        if container is None or not container.complete:
            raise NotFound(f'container "{container_id}": not found')
        return container

    def running(self, container_id: str) -> Container:
        """Find one that runs; raises NotFound, RuntimeFault."""
        container = self.get(container_id)
        if container.state is not ContainerState.RUNNING:
            raise RuntimeFault(f'container "{container_id}" is in {container.state.value} state')
        return container

    def all(self) -> list[Container]:
        return [container for container in self._containers.values() if container.complete]

    def of_sandbox(self, sandbox_id: str) -> list[Container]:
        return [self._containers[item] for item in self.by_sandbox.get(sandbox_id, ()) if item in self._containers]

    def runc_of(self, container: Container) -> Runc:
        """The program that makes a container: its sandbox's handler (RuntimeClass) decides."""
        return self._handlers.get(container.handler, self._runc)

    def bundle(self, container_id: str) -> str:
        return os.path.join(self._state, container_id)

    def directory(self, container_id: str) -> str:
        return os.path.join(self._root, container_id)

    def status(self, container: Container) -> ContainerStatus:
        config, user = container.config, container.user
        return ContainerStatus(
            container.id, container.sandbox_id, config.metadata, container.state, container.created_at_ns, container.started_at_ns,
            container.finished_at_ns, container.exit_code, config.image, container.image_id, container.image_ref,
            container.reason, container.message, container.exit_code - 128 if 128 < container.exit_code < 160 else 0,
            container.held.container.pid if container.held and container.state is ContainerState.RUNNING else 0,
            config.labels, config.annotations, config.mounts, container.log_path, config.resources,
            (user.uid, user.gid, list(user.groups)) if user else None, container.stop_signal,
        )  # fmt: skip

    def list(self, labels: Mapping[str, str] | None, sandbox_id: str | None) -> list[ContainerStatus]:
        wanted = (labels or {}).items()
        chosen = self.all() if sandbox_id is None else [item for item in self.of_sandbox(sandbox_id) if item.complete]
        return [self.status(item) for item in chosen if all(item.config.labels.get(key) == value for key, value in wanted)]

    # Create

    async def create(self, sandbox: Sandbox, config: ContainerConfig) -> Container:
        """Prepare a container; on failure nothing is left."""
        if not sandbox.ready:
            raise RuntimeFault(f'sandbox "{sandbox.id}" is not ready')
        image = self._images.get(config.image)
        container = Container(
            os.urandom(32).hex(), sandbox.id, config, image.id, image.digests[0] if image.digests else image.id, list(image.chain), time.time_ns()
        )
        if config.log_path and sandbox.config.log_directory:
            container.log_path = os.path.join(sandbox.config.log_directory, config.log_path)
        container.handler = sandbox.runtime_handler
        container.cgroup = f"{self._sandboxes.cgroup_parent(sandbox)}/{container.id}"
        async with Undo(self._tasks, f"container {container.id[:13]}") as undo:
            self._register(container)
            undo.add(lambda: self._forget(container))
            self._images.hold(container.id, container.chain)
            await self._workers.run(lambda: self._make_directories(container))
            layers = [layer.number for layer in self._images.layers_of(image)]
            prepared = await self._roots.prepare(sandbox, config, layers, self.directory(container.id), self.bundle(container.id), image)
            await self._workers.run(lambda: self._write_spec(container, sandbox, image, prepared))
            container.complete = True
            await self._save(container)
        self._publish("CREATED", container)
        return container

    def _register(self, container: Container) -> None:
        self._containers[container.id] = container
        self._live[container.id] = Live()
        self.by_sandbox.setdefault(container.sandbox_id, set()).add(container.id)

    def _make_directories(self, container: Container) -> None:
        os.makedirs(self.directory(container.id), 0o711)
        os.makedirs(self.bundle(container.id), 0o711)
        disk.write_record(os.path.join(self.directory(container.id), "container.json"), records.encode(container))

    def _write_spec(self, container: Container, sandbox: Sandbox, image: StoredImage, prepared: Prepared) -> None:
        paths = self._sandboxes.namespace_paths(sandbox)
        self._choose_pid_namespace(paths, container.config)
        image_config: dict[str, Any] = self._images.config(image).get("config") or {}
        write_spec(
            container,
            sandbox,
            image_config,
            prepared,
            bundle=self.bundle(container.id),
            namespace_paths=paths,
            shm_path=self._sandboxes.shm_path(sandbox) if "ipc" in paths else "",
            sandbox_dir=self._sandboxes.directory(sandbox.id),
            cgroup_version=self._cgroups.version,
            oom_score_floor=self._oom_score_floor,
        )

    def _choose_pid_namespace(self, paths: dict[str, str], config: ContainerConfig) -> None:
        wanted = config.security.namespaces
        if wanted.pid == "TARGET":
            target = self.running(wanted.target_id)
            if target.sandbox_id not in self.by_sandbox or target.held is None:
                raise RuntimeFault(f'target container "{wanted.target_id}" does not run')
            paths["pid"] = f"/proc/{target.held.container.pid}/ns/pid"
        elif wanted.pid != "POD":
            paths.pop("pid", None)

    # Start

    async def start(self, container: Container) -> None:
        """Let the container run. A failure makes it EXITED with StartError and is raised."""
        async with self._live[container.id].lock:
            if container.state is not ContainerState.CREATED:
                raise RuntimeFault(f'container "{container.id}" is in {container.state.value} state')
            if not self._sandboxes.get(container.sandbox_id).ready:
                raise RuntimeFault(f'sandbox "{container.sandbox_id}" is not ready')
            try:
                async with Undo(self._tasks, f"start {container.id[:13]}") as undo:
                    undo.add(lambda: self._kill_leftovers(container))
                    await self._start(container)
            except RuntimeFault as error:
                message = f"failed to create task: {error}" if isinstance(error, CreateFault) else str(error)
                await self._failed(container, message)
                raise RuntimeFault(message) from error
            # From here on its program is at work, and neither a cancellation nor a full disk takes that back.
            container.started_at_ns = time.time_ns()
            if container.finished_at_ns:
                container.started_at_ns = min(container.started_at_ns, container.finished_at_ns)
            self._publish("STARTED", container)
            self._live[container.id].announced = True
            await self._save_fact(container)

    async def _start(self, container: Container) -> None:
        """Make the process and let it go; what fails here can be taken back."""
        config, bundle = container.config, self.bundle(container.id)
        options = ConmonOptions(
            container.id, config.metadata.name, bundle, self.runc_of(container).binary, container.log_path, tty=config.tty, stdin=config.stdin, stdin_once=config.stdin_once
        )
        if container.log_path:
            await self._workers.run(lambda: os.makedirs(os.path.dirname(container.log_path), exist_ok=True))
        try:
            container.held = await self._conmon.create(options)
        except CreateFault as error:
            raise CreateFault(f"OCI runtime create failed: {error}") from error
        await self._save(container)
        # Watched before it is let go: a process that ends at once must not be missed.
        self._watch(container)
        try:
            await self.runc_of(container).start(container.id, f"{bundle}/runc.log")
        except RuncFault as error:
            raise CreateFault(f"OCI runtime start failed: {error}") from error

    async def _failed(self, container: Container, message: str) -> None:
        container.held = None
        container.started_at_ns = 0
        container.finished_at_ns = time.time_ns()
        container.exit_code, container.reason, container.message = _EXIT_CANNOT_START, "StartError", message
        container.cleaned = True
        await self._save_fact(container)
        live = self._live[container.id]
        live.ended.set()
        live.dropped.set()
        self._publish("STOPPED", container)

    async def _kill_leftovers(self, container: Container) -> None:
        """Take back a start that did not come to its end: conmon, process, groups, mount."""
        if container.held is not None:
            process.kill(container.held.conmon.pid, container.held.conmon.started, signal.SIGKILL)
            container.held = None
        else:
            await self._workers.run(lambda: kill_strays(container.id))
        await self._drop(container)

    # The end

    def _watch(self, container: Container) -> None:
        self._tasks.spawn(self._until_end(container), f"container {container.id[:13]}")

    async def _until_end(self, container: Container) -> None:
        held = container.held
        if held is None:
            return
        await self._conmon.wait(held.conmon)
        if container.held is not held:
            return  # the start was taken back, and with it this watch
        found = self._conmon.exit_file(container.id)
        if found is None:
            found = await self._orphaned(container, held)
            if container.held is not held:
                return
        container.exit_code, container.finished_at_ns = found
        if container.started_at_ns:
            container.finished_at_ns = max(container.finished_at_ns, container.started_at_ns)
        self._explain(container)
        await self._save_fact(container)
        live = self._live.get(container.id)
        if live is not None:
            live.ended.set()
        if live is None:
            return
        told = live.announced
        if told:
            self._publish("STOPPED", container)
        async with live.lock:
            if container.held is not held:
                return  # the start failed meanwhile and has told the end itself
            if not told:
                # It ended before its start was told; with the lock in our hands that is done now, so the order is right.
                container.started_at_ns = container.started_at_ns or container.finished_at_ns
                self._publish("STOPPED", container)
            await self._drop(container)

    async def _orphaned(self, container: Container, held: Held) -> tuple[int, int]:
        """conmon died without an exit file: nobody holds the process's streams any more, so it is ended too."""
        code = _EXIT_UNKNOWN
        if process.kill(held.container.pid, held.container.started, signal.SIGKILL):
            code = 128 + signal.SIGKILL
            await self._conmon.wait(held.container)
        container.message = "the process that held the container's streams (conmon) was killed"
        return code, time.time_ns()

    def _explain(self, container: Container) -> None:
        # As in containerd, one killed process of the container is enough, whatever the first one made of it.
        if self._cgroups.oom_kills(container.cgroup) > 0:
            container.reason = "OOMKilled"
        else:
            container.reason = "Completed" if container.exit_code == 0 else "Error"

    async def _drop(self, container: Container) -> None:
        """Drop what the run left in the kernel: the OCI runtime's state, processes in shared namespaces, groups, the mounts."""
        if self.runc_of(container).name != "runc" or container.hooks:
            try:
                await self.runc_of(container).delete(container.id)
            except RuntimeFault as error:
                log.warning("the OCI runtime could not delete", container=container.id, error=error)
        await self._workers.run(lambda: self._drop_blocking(container))
        container.cleaned = True
        if container.complete and container.id in self._containers:
            await self._save_fact(container)
        if (live := self._live.get(container.id)) is not None:
            live.dropped.set()

    def _drop_blocking(self, container: Container) -> None:
        """What `runc delete` does, without a process, and also for a container whose state it cannot read any more."""
        if self._cgroups.exists(container.cgroup):
            self._cgroups.kill(container.cgroup)
            self._cgroups.remove(container.cgroup)
        self._runc.forget(container.id)
        self._roots.unmount(self.bundle(container.id))

    # Stop, remove, update

    async def stop(self, container: Container, timeout_seconds: float, signal_name: str = "") -> None:
        """Stop signal, then KILL after the timeout; returns when the end is recorded. Idempotent."""
        live = self._live[container.id]
        if container.state is not ContainerState.RUNNING or container.held is None:
            return
        pid, started = container.held.container.pid, container.held.container.started
        if timeout_seconds > 0:
            await _until_executed(pid, min(timeout_seconds, _EXECUTE_SECONDS))
            process.kill(pid, started, signal_number(signal_name or container.stop_signal))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout_seconds):
                    await live.ended.wait()
                    return
        process.kill(pid, started, signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_SECONDS):
                await live.ended.wait()
        except TimeoutError:
            # Its process is gone but a child in a shared PID namespace may still hold conmon; or it hangs in the kernel.
            await self._workers.run(lambda: self._cgroups.kill(container.cgroup))
            process.kill(container.held.conmon.pid, container.held.conmon.started, signal.SIGKILL)
            try:
                async with asyncio.timeout(_KILL_SECONDS):
                    await live.ended.wait()
            except TimeoutError as error:
                raise RuntimeFault(f'container "{container.id}" does not end: its process {pid} hangs in the kernel') from error

    async def wait_ended(self, container: Container) -> int:
        """Wait for the recorded end; returns the exit code."""
        live = self._live.get(container.id)
        if live is not None and not container.finished_at_ns:
            await live.ended.wait()
        return container.exit_code

    async def wait_dropped(self, containers: Iterable[Container]) -> None:
        """Wait until nothing of these containers' runs is left in the kernel."""
        for container in containers:
            live = self._live.get(container.id)
            if live is not None and container.held is not None:
                await live.dropped.wait()

    async def remove(self, container: Container) -> None:
        """Kill if it runs, and forget. Idempotent."""
        live = self._live.get(container.id)
        if live is None:
            return
        await self.stop(container, 0)
        if container.held is not None:
            await live.dropped.wait()
        async with live.lock:
            if container.id not in self._containers:
                return
            await self._forget(container)
        self._publish("DELETED", container)

    async def _forget(self, container: Container) -> None:
        """Remove every trace."""
        bundle, directory = self.bundle(container.id), self.directory(container.id)
        if (live := self._live.get(container.id)) is not None:
            live.removed = True
            async with live.saving:
                pass  # a write under way has ended

        def clean() -> None:
            self._roots.unmount(bundle)
            self._roots.unmount(directory)
            # The record goes first: without it the rest is a leftover, whatever happens now.
            disk.remove_tree(os.path.join(directory, "container.json"))
            self._conmon.forget(container.id)
            self._runc.forget(container.id)
            if self._cgroups.exists(container.cgroup):
                self._cgroups.kill(container.cgroup)
                self._cgroups.remove(container.cgroup)
            disk.remove_tree(bundle)
            disk.remove_tree(directory)

        await self._workers.run(clean)
        await self._images.release(container.id)
        self._containers.pop(container.id, None)
        self._live.pop(container.id, None)
        if (siblings := self.by_sandbox.get(container.sandbox_id)) is not None:
            siblings.discard(container.id)
            if not siblings:
                del self.by_sandbox[container.sandbox_id]

    async def update(self, container: Container, wanted: LinuxResources) -> None:
        """Change limits of a running or created container."""
        async with self._live[container.id].lock:
            if container.state is ContainerState.EXITED:
                raise RuntimeFault(f'container "{container.id}" is in EXITED state')
            if container.state is ContainerState.RUNNING:
                document = resources(wanted, self._cgroups.version)
                await self.runc_of(container).update(container.id, document, self.bundle(container.id))
            else:
                path = os.path.join(self.bundle(container.id), "config.json")
                await self._workers.run(lambda: change_resources(path, resources(wanted, self._cgroups.version)))
            merge_resources(container.config.resources, wanted)
            await self._save(container)

    def reopen_log(self, container: Container) -> None:
        """Let conmon open its log file anew, after it was moved away."""
        if container.state is not ContainerState.RUNNING:
            raise RuntimeFault(f'container "{container.id}" is not running')
        if not conmon.control(self.bundle(container.id), 2):
            raise RuntimeFault(f'container "{container.id}": conmon does not answer')

    # Recovery

    async def recover(self) -> None:
        """Find everything again after a restart, including ends that happened meanwhile; half-made containers are removed."""
        await self._workers.run(lambda: disk.make_directories(self._root, self._state))
        names = await self._workers.run(lambda: os.listdir(self._root))
        for container_id in names:
            try:
                await self._recover_one(container_id)
            except (OSError, RuntimeFault) as error:
                log.error("container could not be recovered", container=container_id, error=error)
        for container_id in await self._workers.run(lambda: os.listdir(self._state)):
            if container_id not in self._containers:
                await self._remove_stray(container_id)
        sandboxes = {sandbox.id for sandbox in self._sandboxes.all()}
        for container_id in self._runc.known():
            if container_id not in self._containers and container_id not in sandboxes:
                await self._remove_stray(container_id)
        for container_id in os.listdir(self._conmon.exit_dir):
            if container_id not in self._containers:
                self._conmon.forget(container_id)

    async def _remove_stray(self, container_id: str) -> None:
        await self._workers.run(lambda: kill_strays(container_id))
        with contextlib.suppress(RuntimeFault):
            await self._runc.delete(container_id)
        for path in (self.bundle(container_id), self.directory(container_id)):
            await self._workers.run(lambda path=path: self._roots.unmount(path))  # type: ignore[misc]
            await self._workers.run(lambda path=path: disk.remove_tree(path))  # type: ignore[misc]
        self._conmon.forget(container_id)

    async def _recover_one(self, container_id: str) -> None:
        path = os.path.join(self.directory(container_id), "container.json")
        try:
            record = await self._workers.run(lambda: disk.read_record(path))
            container = records.from_record(Container, record) if record is not None else None
        except (disk.BadRecord, TypeError, ValueError, KeyError) as error:
            log.warning("unreadable container record", container=container_id, error=error)
            container = None
        if container is None or not container.complete:
            await self._remove_stray(container_id)
            return
        self._register(container)
        self._images.hold(container.id, container.chain)
        live = self._live[container.id]
        live.announced = True
        if container.finished_at_ns:
            live.ended.set()
            if not container.cleaned:
                await self._drop(container)
            live.dropped.set()
        elif container.held is not None and container.started_at_ns:
            self._watch(container)
        else:
            await self._recover_starting(container)

    async def _recover_starting(self, container: Container) -> None:
        """Killed while it was being started: adopt it if the process was let go, else take the start back."""
        state = await self.runc_of(container).state(container.id)
        ran = state.get("status") != "created" if state is not None else self._conmon.exit_file(container.id) is not None
        if container.held is not None and ran:
            container.started_at_ns = time.time_ns()
            self._watch(container)
            return
        # Its program never ran: it stays created, and who wanted it makes another one.
        if container.held is not None or state is not None or os.path.exists(f"{self.bundle(container.id)}/conmon.pid"):
            await self._kill_leftovers(container)
            await self._save(container)

    async def _save(self, container: Container) -> None:
        live = self._live.get(container.id)
        if live is None:
            return
        async with live.saving:
            if live.removed:
                return
            record, path = records.encode(container), os.path.join(self.directory(container.id), "container.json")
            writing = asyncio.ensure_future(self._workers.run(lambda: disk.write_record(path, record)))
            try:
                await asyncio.shield(writing)
            except asyncio.CancelledError:
                # The thread goes on; the next write must not overtake it.
                await asyncio.wait({writing})
                raise

    async def _save_fact(self, container: Container) -> None:
        """Save what has happened already: a full disk must hide neither a start nor an end. A restart finds both again by the runtime's state."""
        try:
            await self._save(container)
        except OSError as error:
            log.error("what happened to a container could not be recorded", container=container.id, state=container.state.value, error=error)

    def _publish(self, kind: Any, container: Container) -> None:
        self._events.publish(ContainerEvent(kind, container.id, container.sandbox_id, time.time_ns()))


async def _until_executed(pid: int, seconds: float) -> None:
    """Wait for the moment in which a process just started becomes the container's program.

    Until then it is the OCI runtime's own, which would take a stop signal for itself and end with a code of its own. The kernel tells
    nobody of an execve without tracing, so it is looked for; it comes within a few milliseconds.
    """
    for _ in range(int(seconds / 0.002)):
        try:
            with open(f"/proc/{pid}/comm") as file:
                if not file.read().startswith("runc:["):
                    return
        except OSError:
            return
        await asyncio.sleep(0.002)
