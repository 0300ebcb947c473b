"""Figures of containers and sandboxes: CPU and memory from their groups, network from the namespace, disk from the layer.

Role: list_container_stats and list_pod_sandbox_stats of the runtime. Group files are read at each call; walking a writable
layer is dear, so its size is remembered for a while. Callers: embedded.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from knarr.runtime import disk, namespaces
from knarr.runtime.cgroups import Cgroups
from knarr.runtime.container import Containers
from knarr.runtime.container_model import Container
from knarr.runtime.cri import ContainerState, ContainerStats, InterfaceStats, SandboxStats
from knarr.runtime.sandbox import Sandbox, Sandboxes
from knarr.runtime.workers import Workers, run_in_thread

_DISK_SECONDS = 30.0


class Stats:
    """See the module."""

    def __init__(self, containers: Containers, sandboxes: Sandboxes, cgroups: Cgroups, workers: Workers) -> None:
        self._containers, self._sandboxes, self._cgroups, self._workers = containers, sandboxes, cgroups, workers
        self._disk: dict[str, tuple[float, int, int]] = {}

    async def containers(self, labels: Mapping[str, str] | None) -> list[ContainerStats]:
        wanted = (labels or {}).items()
        chosen = [
            item
            for item in self._containers.all()
            if item.state is ContainerState.RUNNING and all(item.config.labels.get(key) == value for key, value in wanted)
        ]
        known = {item.id for item in self._containers.all()}
        self._disk = {key: value for key, value in self._disk.items() if key in known}
        return await self._workers.run(lambda: [self._container(item) for item in chosen])

    def _container(self, container: Container) -> ContainerStats:
        usage = self._cgroups.usage(container.cgroup)
        layer_bytes, inodes = self._layer(container)
        return ContainerStats(
            container.id, container.sandbox_id, container.config.metadata, container.config.labels, time.time_ns(), usage.cpu_ns,
            usage.memory_bytes, usage.working_set_bytes, usage.rss_bytes, usage.page_faults, usage.major_page_faults,
            layer_bytes, inodes, usage.processes,
        )  # fmt: skip

    def _layer(self, container: Container) -> tuple[int, int]:
        now = time.monotonic()
        known = self._disk.get(container.id)
        if known is None or now - known[0] > _DISK_SECONDS:
            known = (now, *disk.tree_usage(os.path.join(self._containers.directory(container.id), "upper")))
            self._disk[container.id] = known
        return known[1], known[2]

    async def sandboxes(self) -> list[SandboxStats]:
        ready = [item for item in self._sandboxes.all() if item.ready]
        result = []
        for sandbox in ready:
            running = [item for item in self._containers.of_sandbox(sandbox.id) if item.state is ContainerState.RUNNING and item.held]
            groups = [item.cgroup for item in running]
            processes = await self._workers.run(lambda groups=groups: sum(self._cgroups.usage(group).processes for group in groups))  # type: ignore[misc]
            text = await self._network(sandbox, running)
            result.append(SandboxStats(sandbox.id, sandbox.config.metadata, time.time_ns(), interfaces(text), processes))
        return result

    async def _network(self, sandbox: Sandbox, running: list[Container]) -> str:
        if sandbox.host_network:
            return ""
        try:
            if running and running[0].held is not None:
                path = f"/proc/{running[0].held.container.pid}/net/dev"
                return await self._workers.run(lambda: _read(path))
            netns = self._sandboxes.namespace_path(sandbox, "net")
            return await run_in_thread(lambda: _read_inside(netns), "sandbox stats")
        except OSError:
            return ""


def _read_inside(netns: str) -> str:
    namespaces.enter(netns)
    return _read("/proc/thread-self/net/dev")


def _read(path: str) -> str:
    with open(path) as file:
        return file.read()


def interfaces(text: str) -> list[InterfaceStats]:
    """Parse /proc/net/dev; the loopback is left out, the pod's eth0 comes first."""
    found = []
    for line in text.splitlines()[2:]:
        name, _, rest = line.partition(":")
        fields = rest.split()
        if name.strip() != "lo" and len(fields) >= 12:
            numbers = [int(field) for field in fields]
            own = InterfaceStats(name.strip(), numbers[0], numbers[2], numbers[8], numbers[10], numbers[1], numbers[3], numbers[9], numbers[11])
            found.append(own)
    return sorted(found, key=lambda item: item.name != "eth0")
