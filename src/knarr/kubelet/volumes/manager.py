"""Mounts what a pod's containers need and takes it away after the pod's end.

Caller: pod_sync (mount before the first container, refresh when something that a volume refers to changed, unmount at the
end). State is the disk: <pods>/<uid>/volumes/kubernetes.io~<kind>/<name>; a restarted kubelet finds everything by looking.
Invariants: a volume that no container mounts is not set up; a failed volume leaves the others; nothing of a pod is removed
while one of its mounts is still there. Source: pkg/kubelet/volumemanager.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.images import ImageManager
from knarr.kubelet.volumes import atomic_writer, claims, host, mounts, ownership, payloads, wellknown
from knarr.kubelet.volumes.model import MountedVolume, VolumeError
from knarr.kubelet.volumes.subpath_mounts import SubPaths
from knarr.runtime import disk

log = get_logger(__name__)

Event = Callable[[Object, str, str, str], None]
"""(pod, type, reason, message)"""

_KINDS = {
    "emptyDir": "kubernetes.io~empty-dir",
    "configMap": "kubernetes.io~configmap",
    "secret": "kubernetes.io~secret",
    "downwardAPI": "kubernetes.io~downward-api",
    "projected": "kubernetes.io~projected",
}
_RETRY_FIRST_SECONDS = 0.5
_RETRY_MAX_SECONDS = 122.0


class MountsFailed(Exception):
    """Some volumes are not there; try again after retry_seconds or when something changes."""

    def __init__(self, message: str, retry_seconds: float) -> None:
        super().__init__(message)
        self.retry_seconds = retry_seconds


@dataclass(slots=True)
class PodVolumes:
    """What is mounted for one pod."""

    volumes: dict[str, MountedVolume] = field(default_factory=dict)
    renew_at: float | None = None
    """When a token in a volume wants to be renewed."""
    failures: int = 0
    groups: list[int] = field(default_factory=list)
    """Supplemental groups that persistent volumes ask for."""


class Volumes:
    """The volumes of this node's pods."""

    def __init__(
        self,
        config: KubeletConfig,
        context: Callable[[Sequence[str]], payloads.PayloadContext],
        claim_mounter: claims.Claims,
        images: ImageManager,
        event: Event,
        memory_allocatable_bytes: Callable[[], int],
    ) -> None:
        self._config = config
        self._context = context
        self._claims = claim_mounter
        self._images = images
        self._event = event
        self._memory = memory_allocatable_bytes
        self._pods: dict[str, PodVolumes] = {}
        self.subpaths = SubPaths(config.pods_dir)

    def of(self, pod_uid: str) -> PodVolumes:
        return self._pods.get(pod_uid) or PodVolumes()

    def pod_dir(self, pod_uid: str) -> str:
        return os.path.join(self._config.pods_dir, pod_uid)

    def sure_to_mount(self, pod: Object) -> bool:
        """Whether nothing can be missing: only empty directories, the pod's own data, and objects already in the cache."""
        return all(self._is_sure(pod, v) for v in pod["spec"].get("volumes") or [])

    def _is_sure(self, pod: Object, volume: Object) -> bool:
        parts = (volume.get("projected") or {}).get("sources") or [volume]
        for part in parts:
            if "configMap" in part:
                source, plural = part["configMap"], "configmaps"
            elif "secret" in part:
                source, plural = part["secret"], "secrets"
            elif {"emptyDir", "downwardAPI", "serviceAccountToken"} & set(part):
                continue
            else:
                return False
            name = source.get("secretName") or source.get("name") or ""
            if not source.get("optional") and not self._context(()).objects.has(plural, pod["metadata"].get("namespace", ""), name):
                return False
        return True

    async def mount(self, pod: Object, ips: Sequence[str], pull_secrets: Sequence[Object] = ()) -> PodVolumes:
        """Bring all needed volumes to their wanted content; quick when nothing changed.

        Raises:
          MountsFailed: events have been sent; what could be mounted is mounted.
        """
        uid = podutil.uid(pod)
        state = self._pods.setdefault(uid, PodVolumes())
        os.makedirs(os.path.join(self.pod_dir(uid), "volumes"), 0o750, exist_ok=True)
        used = _used_names(pod)
        wanted = [v for v in pod["spec"].get("volumes") or [] if v["name"] in used]
        context = self._context(ips)
        state.renew_at = None
        jobs = [self._mount_one(pod, volume, state, context, pull_secrets) for volume in wanted]
        results = await asyncio.gather(*jobs, return_exceptions=True)
        failed = []
        for volume, result in zip(wanted, results, strict=True):
            if isinstance(result, (VolumeError, OSError, atomic_writer.PayloadPathError)):
                failed.append(volume["name"])
                fault = result if isinstance(result, VolumeError) else VolumeError(str(result))
                self._event(pod, "Warning", fault.reason, f'{fault.step} failed for volume "{volume["name"]}" : {result}')
            elif isinstance(result, BaseException):
                raise result
        if failed:
            delay = min(_RETRY_FIRST_SECONDS * 2**state.failures, _RETRY_MAX_SECONDS)
            state.failures = min(state.failures + 1, 10)
            raise MountsFailed(f"unmounted volumes=[{' '.join(failed)}]", delay)
        state.failures = 0
        return state

    async def _mount_one(
        self, pod: Object, volume: Object, state: PodVolumes, context: payloads.PayloadContext, pull_secrets: Sequence[Object]
    ) -> None:
        name, uid = volume["name"], podutil.uid(pod)
        if any(kind in volume for kind in payloads.KINDS):
            state.volumes[name] = await self._mount_payload(pod, volume, state, context)
        elif "hostPath" in volume:
            source = volume["hostPath"]
            path = wellknown.own(self._config.root_dir, source["path"])
            host.check_host_path(path, source.get("type") or "")
            state.volumes[name] = MountedVolume(name, path)
        elif "emptyDir" in volume or not any(k for k in volume if k != "name"):
            path = os.path.join(self.pod_dir(uid), "volumes", _KINDS["emptyDir"], name)
            if name not in state.volumes:
                host.make_empty_dir(pod, volume.get("emptyDir") or {}, path, self._memory())
                await self._own(pod, path, read_only=False)
            state.volumes[name] = MountedVolume(name, path)
        elif "image" in volume:
            state.volumes[name] = await self._mount_image(pod, volume, pull_secrets)
        elif (held := state.volumes.get(name)) is None or (held.again_at is not None and held.again_at <= clock.now()):
            mounted, groups = await self._claims.mount(pod, volume, self.pod_dir(uid))
            if not mounted.block and held is None:
                await self._own_claim(pod, mounted)
            state.volumes[name] = mounted
            state.groups += [g for g in groups if g not in state.groups]
        again_at = state.volumes[name].again_at
        if again_at is not None:
            state.renew_at = again_at if state.renew_at is None else min(state.renew_at, again_at)

    async def _mount_payload(self, pod: Object, volume: Object, state: PodVolumes, context: payloads.PayloadContext) -> MountedVolume:
        name, uid = volume["name"], podutil.uid(pod)
        kind = next(k for k in payloads.KINDS if k in volume)
        payload = await payloads.collect(pod, volume, context)
        path = os.path.join(self.pod_dir(uid), "volumes", _KINDS[kind], name)
        fresh = not os.path.isdir(path)
        os.makedirs(path, 0o755, exist_ok=True)
        if kind != "configMap":
            if fresh or (name not in state.volumes and not mounts.is_mount_point(path)):
                # Secrets and tokens never reach a disk.
                mounts.tmpfs(path, mode=0o1777)
        elif fresh:
            os.chmod(path, 0o777)
        group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        atomic_writer.write(path, payload.files, group)
        if group is not None:
            os.chown(path, -1, group)
            os.chmod(path, 0o3777 if kind != "configMap" else 0o2777)
        if payload.renew_at is not None:
            state.renew_at = payload.renew_at if state.renew_at is None else min(state.renew_at, payload.renew_at)
        return MountedVolume(name, path, read_only=True)

    async def _mount_image(self, pod: Object, volume: Object, pull_secrets: Sequence[Object]) -> MountedVolume:
        source = volume["image"]
        if not source.get("reference"):
            raise VolumeError("image volume needs a reference")

        def event(kind: str, reason: str, message: str) -> None:
            self._event(pod, kind, reason, message)

        image = await self._images.ensure(pod, source["reference"], source.get("pullPolicy") or "", pull_secrets, event)
        return MountedVolume(volume["name"], "", read_only=True, image=image.id)

    async def _own(self, pod: Object, path: str, *, read_only: bool) -> None:
        context = pod["spec"].get("securityContext") or {}
        group = context.get("fsGroup")
        if group is not None:
            mismatch = context.get("fsGroupChangePolicy") == "OnRootMismatch"
            await asyncio.to_thread(ownership.give_to_group, path, group, read_only=read_only, only_on_mismatch=mismatch)

    async def _own_claim(self, pod: Object, mounted: MountedVolume) -> None:
        if mounted.read_only or not self._claims.takes_ownership(mounted):
            return
        await self._own(pod, mounted.path, read_only=False)

    def restore(self, pod: Object) -> None:
        """Remember what a kubelet before us mounted, so that a pod in its end can be cleaned up."""
        self._pods.setdefault(podutil.uid(pod), PodVolumes())

    async def unmount(self, pod_uid: str) -> None:
        """Take all volumes of a pod away; what was an emptyDir is gone with it. Idempotent.

        Raises:
          VolumeError: something is still busy; call again.
        """
        folder = self.pod_dir(pod_uid)
        self.subpaths.remove(pod_uid)
        await self._claims.unmount(pod_uid, folder)
        if os.path.isdir(folder):
            for point in mounts.mount_points(folder):
                mounts.unmount(point)
            left = mounts.mount_points(folder)
            if left:
                raise VolumeError(f"still mounted: {', '.join(left)}")
            volumes = os.path.join(folder, "volumes")
            if os.path.isdir(volumes):
                await _remove_tree(volumes)
        self._pods.pop(pod_uid, None)

    async def remove_pod_dir(self, pod_uid: str) -> None:
        """Remove the pod's folder. Raises VolumeError when a mount is left below it."""
        folder = self.pod_dir(pod_uid)
        if not os.path.isdir(folder):
            return
        if mounts.mount_points(folder):
            await self.unmount(pod_uid)
        await _remove_tree(folder)

    def usage_paths(self, pod: Object) -> Mapping[str, str]:
        """Name to path of volumes on this node's disk, for statistics and size limits."""
        state = self._pods.get(podutil.uid(pod))
        if state is None:
            return {}
        own = os.path.join(self.pod_dir(podutil.uid(pod)), "")
        return {n: v.path for n, v in state.volumes.items() if v.path.startswith(own)}


def _used_names(pod: Object) -> set[str]:
    used: set[str] = set()
    for container in podutil.all_containers(pod):
        used.update(m["name"] for m in container.get("volumeMounts") or [])
        used.update(d["name"] for d in container.get("volumeDevices") or [])
        used.update(e["valueFrom"]["fileKeyRef"]["volumeName"] for e in container.get("env") or [] if (e.get("valueFrom") or {}).get("fileKeyRef"))
    return used


async def _remove_tree(path: str) -> None:
    """Small trees at once, big ones without stopping the event loop."""
    count = 0
    for _, directories, files in os.walk(path):
        count += len(directories) + len(files)
        if count > 200:
            break
    if count > 200:
        await asyncio.to_thread(disk.remove_tree, path)
    else:
        disk.remove_tree(path)
