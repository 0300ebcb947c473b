"""Removes what pods leave behind: surplus dead containers, unused images, leftovers of a kubelet before us, oversized logs.

Caller: kubelet (`remove_leftovers` once at the start, `run` eternal: containers and logs every minute, images every five).
Invariant: the newest dead container of each name stays as long as its pod does: its log and state are still asked for.
Source: pkg/kubelet/kuberuntime/kuberuntime_gc.go, pkg/kubelet/images/image_gc_manager.go, pkg/kubelet/logs.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable

from knarr.aiokits import clock, collector
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import logs, machine, podutil
from knarr.kubelet.node import Node
from knarr.kubelet.pods import PodWorkers
from knarr.runtime.cri import ContainerState, Image, RuntimeFault

log = get_logger(__name__)

_PERIOD_SECONDS = 60.0
_IMAGE_ROUNDS = 5
LOG_PERIOD_SECONDS = 10.0
_MANY_PODS = 20
"""So many pods leave enough behind in memory to be worth collecting."""


class GarbageCollector:
    """The node's clean-up."""

    def __init__(self, node: Node, workers: PodWorkers, reference: Callable[[], Object]) -> None:
        self._node = node
        self._workers = workers
        self._reference = reference
        self._first_seen: dict[str, float] = {}
        self._started = clock.now()
        self._given_back = 0
        """How many pods had been removed when memory was last given back."""

    async def run(self) -> None:
        """Collect for ever."""
        round_number = 0
        while True:
            for _ in range(int(_PERIOD_SECONDS / LOG_PERIOD_SECONDS)):
                await asyncio.sleep(LOG_PERIOD_SECONDS)
                await self._guard("log rotation", self.rotate_logs())
                if self._workers.removed - self._given_back >= _MANY_PODS:
                    self._given_back = self._workers.removed
                    collector.give_back()
            round_number += 1
            await self._guard("container garbage", self.collect_containers())
            if round_number % _IMAGE_ROUNDS == 0:
                await self._guard("image garbage", self.collect_images())

    async def _guard(self, what: str, work: object) -> None:
        try:
            await work  # type: ignore[misc]
        except (RuntimeFault, OSError) as e:
            log.warning("clean-up failed", what=what, error=str(e))

    async def remove_leftovers(self) -> None:
        """Pod folders and cgroups of pods that nobody knows, after a start."""
        node = self._node
        known = {w.uid for w in self._workers.workers()}
        api = {e for e in os.listdir(node.config.pods_dir) if e not in known}
        for uid in api:
            try:
                await node.volumes.unmount(uid)
                await node.volumes.remove_pod_dir(uid)
            except Exception as e:
                log.warning("folder of an unknown pod not removed", uid=uid, error=str(e))
        if node.config.cgroups_per_qos:
            for uid, path in node.cgroups.pod_groups().items():
                if uid not in known:
                    try:
                        await node.cgroups.remove_path(path)
                    except OSError as e:
                        log.warning("cgroup of an unknown pod not removed", path=path, error=str(e))
        for entry in os.listdir(node.config.logs_dir):
            if entry.rpartition("_")[2] not in known:
                shutil.rmtree(os.path.join(node.config.logs_dir, entry), ignore_errors=True)

    async def collect_containers(self) -> None:
        """Keep one dead container per pod and name; drop sandboxes that were replaced."""
        node = self._node
        containers = await node.runtime.list_containers()
        containers.sort(key=lambda c: c.created_at_ns, reverse=True)
        newest: set[tuple[str, str]] = set()
        used: set[str] = set()
        for container in containers:
            uid = container.labels.get(podutil.POD_UID_LABEL, "")
            key = (uid, container.metadata.name)
            running = container.state is not ContainerState.EXITED
            dead_before = key in newest
            worker = self._workers.get(uid)
            if worker is not None and not running and dead_before and not self._is_last_state(containers, container.id, key):
                await node.runtime.remove_container(container.id)
                worker.messages.pop(container.id, None)
                self._remove_log(container.log_path)
                continue
            newest.add(key)
            used.add(container.sandbox_id)
        for sandbox in await node.runtime.list_pod_sandboxes():
            worker = self._workers.get(sandbox.metadata.uid)
            if worker is None or sandbox.state.name == "READY" or sandbox.id in used:
                continue
            newer = [s for s in await node.runtime.list_pod_sandboxes({podutil.POD_UID_LABEL: worker.uid}) if s.created_at_ns > sandbox.created_at_ns]
            if newer:
                await node.runtime.remove_pod_sandbox(sandbox.id)

    @staticmethod
    def _is_last_state(containers: list, container_id: str, key: tuple[str, str]) -> bool:  # type: ignore[type-arg]
        """Whether this is the second newest of its name, whose end is shown as lastState."""
        same = [c.id for c in containers if (c.labels.get(podutil.POD_UID_LABEL, ""), c.metadata.name) == key]
        return container_id in same[:2]

    @staticmethod
    def _remove_log(path: str) -> None:
        folder, name = os.path.split(path)
        if not name or not os.path.isdir(folder):
            return
        for entry in os.listdir(folder):
            if entry == name or entry.startswith(name + "."):
                os.unlink(os.path.join(folder, entry))

    async def rotate_logs(self) -> None:
        """Rotate the logs of running containers that have grown over their size."""
        node, limit = self._node, self._node.config.container_log_max_size_bytes
        for container in await node.runtime.list_containers():
            if container.state is not ContainerState.RUNNING or not container.log_path:
                continue
            try:
                if os.stat(container.log_path).st_size < limit:
                    continue
            except FileNotFoundError:
                continue
            container_id = container.id

            async def reopen(container_id: str = container_id) -> None:
                await node.runtime.reopen_container_log(container_id)

            await logs.rotate(container.log_path, reopen, node.config.container_log_max_files)

    async def collect_images(self) -> None:
        """Remove the images unused for longest when the disk is too full. Raises RuntimeFault."""
        node, config = self._node, self._node.config
        await self._remove_old_images()
        usage = await node.image_service.image_fs_info()
        space = machine.disk(usage.mountpoint)
        if not space.capacity:
            return
        percent = 100 - space.available * 100 // space.capacity
        if percent < config.image_gc_high_threshold_percent:
            await self._note_images()
            return
        wanted = space.capacity * (100 - config.image_gc_low_threshold_percent) // 100 - space.available
        freed = await self.free_images(wanted)
        if freed < wanted:
            message = (
                f"Failed to garbage collect required amount of images. Attempted to free {wanted} bytes, but only found {freed} bytes eligible to free."
            )
            node.event(self._reference(), "Warning", "FreeDiskSpaceFailed", message)

    async def _note_images(self) -> list[tuple[float, Image]]:
        node, now = self._node, clock.now()
        in_use = {c.image_id for c in await node.runtime.list_containers()}
        images = await node.image_service.list_images()
        node.images.records.prune({image.id for image in images}, now)
        for image in images:
            self._first_seen.setdefault(image.id, now)
            if image.id in in_use:
                node.images.used_at[image.id] = now
        present = {i.id for i in images}
        for known in [k for k in self._first_seen if k not in present]:
            del self._first_seen[known]
            node.images.used_at.pop(known, None)
        free: list[tuple[float, Image]] = []
        for image in images:
            if image.id in in_use or image.pinned:
                continue
            if now - self._first_seen[image.id] >= node.config.image_minimum_gc_age_seconds:
                free.append((node.images.used_at.get(image.id, 0.0), image))
        free.sort(key=lambda pair: pair[0])
        return free

    async def free_unused(self) -> None:
        """Remove all that nobody needs: dead containers, and every image that is not in use. Raises RuntimeFault."""
        await self.collect_containers()
        await self.free_images(1 << 63)

    async def _remove_old_images(self) -> None:
        """Remove images that nobody has used for too long."""
        most, now = self._node.config.image_maximum_gc_age_seconds, clock.now()
        if not most or now - self._started < most:
            # When images were used before this start is not known.
            return
        for used_at, image in await self._note_images():
            if now - max(used_at, self._first_seen[image.id]) > most:
                await self._node.image_service.remove_image(image.id)

    async def free_images(self, wanted_bytes: int) -> int:
        """Remove unused images until so many bytes are free; returns how many were."""
        freed = 0
        for _, image in await self._note_images():
            if freed >= wanted_bytes:
                break
            try:
                await self._node.image_service.remove_image(image.id)
                freed += image.size_bytes
            except RuntimeFault as e:
                log.warning("image not removed", error=str(e))
        return freed
