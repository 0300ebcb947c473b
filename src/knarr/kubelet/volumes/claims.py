"""Persistent volumes: claims resolved to a PersistentVolume, and the volume brought into the pod's folder.

Caller: volumes.manager. hostPath and local volumes are used in place or by a bind mount; NFS and other file systems go
through mount(8); CSI volumes through the driver's socket (csi.py). Source: pkg/volume, pkg/kubelet/volumemanager/populator.
"""

from __future__ import annotations

import base64
import os
import stat
from glob import escape, glob

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, SECRETS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet.volumes import devices, host, iscsi, local, mounts, wellknown
from knarr.kubelet.volumes.csi import CSIVolumes
from knarr.kubelet.volumes.growth import InUse
from knarr.kubelet.volumes.model import MountedVolume, VolumeError

log = get_logger(__name__)

_GID_ANNOTATION = "pv.beta.kubernetes.io/gid"


class Claims:
    """Mounts everything that is not a payload, an emptyDir or a plain hostPath."""

    def __init__(self, client: Client, csi: CSIVolumes, root: str) -> None:
        """`root` is the kubelet's folder."""
        self._client = client
        self._csi = csi
        self._root = root
        self._single: dict[str, str] = {}
        """Name of a volume for one pod at a time to the uid of that pod."""

    def takes_ownership(self, mounted: MountedVolume) -> bool:
        """Whether fsGroup is applied by us: not to hostPath, and not where the driver does it."""
        return "/kubernetes.io~" in mounted.path and not self._csi.owns(mounted.path)

    async def mount(self, pod: Object, volume: Object, pod_dir: str) -> tuple[MountedVolume, list[int]]:
        """Mount one volume; returns it and the supplemental groups that it asks for.

        Raises:
          VolumeError: not bound, not found, unsupported, or the mount failed.
        """
        name = volume["name"]
        if "persistentVolumeClaim" in volume or "ephemeral" in volume:
            return await self._mount_claim(pod, volume, pod_dir)
        if "csi" in volume:
            return await self._csi.mount_inline(pod, volume, pod_dir), []
        source = {k: v for k, v in volume.items() if k != "name"}
        return await self._mount_source(pod, name, name, source, pod_dir, read_only=_read_only(source), options=[]), []

    async def _mount_claim(self, pod: Object, volume: Object, pod_dir: str) -> tuple[MountedVolume, list[int]]:
        meta = pod["metadata"]
        if "ephemeral" in volume:
            claim_name, read_only = f"{meta['name']}-{volume['name']}", False
        else:
            claim_name = volume["persistentVolumeClaim"]["claimName"]
            read_only = bool(volume["persistentVolumeClaim"].get("readOnly"))
        claim, persistent = await self._resolve(pod, claim_name, ephemeral="ephemeral" in volume)
        spec = persistent["spec"]
        if spec.get("accessModes") == ["ReadWriteOncePod"]:
            self._claim_for_one(pod, persistent["metadata"]["name"])
        groups = []
        raw = (persistent["metadata"].get("annotations") or {}).get(_GID_ANNOTATION)
        if raw and raw.isdigit():
            groups.append(int(raw))
        if (claim["spec"].get("volumeMode") or "Filesystem") == "Block":
            return await self._block(pod, volume["name"], persistent, pod_dir, read_only=read_only), groups
        if "csi" in spec:
            mounted = await self._csi.mount_persistent(pod, volume["name"], persistent, pod_dir, read_only=read_only)
            return mounted, groups
        source = {k: v for k, v in spec.items() if k in _SOURCES}
        local.ensure(persistent)
        options = list(spec.get("mountOptions") or [])
        inner = persistent["metadata"]["name"]
        mounted = await self._mount_source(pod, volume["name"], inner, source, pod_dir, read_only=read_only or _read_only(source), options=options)
        if "local" in source:
            self._let_grow(pod, persistent, mounted.path)
        return mounted, groups

    def _let_grow(self, pod: Object, persistent: Object, target: str) -> None:
        """Have a file system of ours grow with its device while this pod uses it; a folder has no size of its own."""
        device = wellknown.own(self._root, persistent["spec"]["local"]["path"])
        if stat.S_ISBLK(os.stat(device).st_mode):

            async def grow(size: int) -> None:
                await devices.grow(device, target)

            self._csi.growth.use(InUse(pod, persistent["metadata"]["name"], grow))

    def _claim_for_one(self, pod: Object, volume: str) -> None:
        """Hold a volume for this pod alone. Raises VolumeError while another pod of this node has it."""
        uid = pod["metadata"]["uid"]
        holder = self._single.setdefault(volume, uid)
        if holder == uid:
            # A kubelet before this one may have given it to a pod that is still here.
            found = glob(os.path.join(escape(self._root), "pods", "*", "volume[sD]*", "*", escape(volume)))
            holder = next((other for path in found if (other := path.split("/")[-4]) != uid), uid)
        if holder != uid:
            if self._single[volume] == uid:
                del self._single[volume]
            raise VolumeError("volume uses the ReadWriteOncePod access mode and is already in use by another pod")

    async def _resolve(self, pod: Object, claim_name: str, *, ephemeral: bool) -> tuple[Object, Object]:
        namespace = pod["metadata"].get("namespace", "")
        try:
            claim = await self._client.get(PERSISTENT_VOLUME_CLAIMS, claim_name, namespace)
        except errors.StatusError as e:
            raise VolumeError(f"error processing PVC {namespace}/{claim_name}: {e.message}") from e
        if ephemeral and not any(o.get("uid") == pod["metadata"]["uid"] for o in claim["metadata"].get("ownerReferences") or []):
            raise VolumeError(f"PVC {namespace}/{claim_name} was not created for pod {pod['metadata']['name']} (pod is not owner)")
        if claim["metadata"].get("deletionTimestamp"):
            raise VolumeError("error processing PVC " + f"{namespace}/{claim_name}: PVC is being deleted")
        if (claim.get("status") or {}).get("phase") != "Bound" or not claim["spec"].get("volumeName"):
            raise VolumeError(f"error processing PVC {namespace}/{claim_name}: PVC is not bound")
        try:
            persistent = await self._client.get(PERSISTENT_VOLUMES, claim["spec"]["volumeName"])
        except errors.StatusError as e:
            raise VolumeError(f"error processing PVC {namespace}/{claim_name}: {e.message}") from e
        reference = persistent["spec"].get("claimRef") or {}
        if reference.get("uid") != claim["metadata"]["uid"]:
            raise VolumeError(f"error processing PVC {namespace}/{claim_name}: PV {persistent['metadata']['name']} is bound to another claim")
        return claim, persistent

    async def _block(self, pod: Object, name: str, persistent: Object, pod_dir: str, *, read_only: bool) -> MountedVolume:
        spec = persistent["spec"]
        if "csi" in spec:
            return await self._csi.publish_block(pod, name, persistent, pod_dir, read_only=read_only)
        path = wellknown.own(self._root, (spec.get("local") or spec.get("hostPath") or {}).get("path") or "")
        if not path or not os.path.exists(path) or not stat.S_ISBLK(os.stat(path).st_mode):
            raise VolumeError(f"{path} is not a block device")
        return MountedVolume(name, path, read_only=read_only, block=True)

    async def _mount_source(
        self, pod: Object, name: str, inner: str, source: Object, pod_dir: str, *, read_only: bool, options: list[str]
    ) -> MountedVolume:
        if "hostPath" in source:
            path = wellknown.own(self._root, source["hostPath"]["path"])
            host.check_host_path(path, source["hostPath"].get("type") or "")
            return MountedVolume(name, path, read_only=read_only)
        kind = next(iter(source), "")
        if kind == "local":
            return await self._mount_local(name, inner, source["local"], pod_dir, read_only=read_only, options=options)
        if kind == "nfs":
            target = os.path.join(pod_dir, "volumes", "kubernetes.io~nfs", inner)
            device = f"{source['nfs']['server']}:{source['nfs']['path']}"
            await devices.mount_program(device, target, "nfs", options + (["ro"] if read_only else []))
            return MountedVolume(name, target, read_only=read_only)
        if kind == "iscsi":
            target = os.path.join(pod_dir, "volumes", iscsi.FOLDER, inner)
            await iscsi.mount(source["iscsi"], await self._iscsi_secret(pod, source["iscsi"]), target, options, read_only=read_only)
            return MountedVolume(name, target, read_only=read_only)
        if kind == "flexVolume":
            raise VolumeError("flexVolume drivers are not supported by this kubelet; use a CSI driver")
        raise VolumeError(f"no volume plugin matched for {kind}; its CSI driver is needed")

    async def _iscsi_secret(self, pod: Object, source: Object) -> dict[str, str]:
        reference = source.get("secretRef")
        if not reference or not (source.get("chapAuthDiscovery") or source.get("chapAuthSession")):
            return {}
        try:
            found = await self._client.get(SECRETS, reference["name"], reference.get("namespace") or pod["metadata"].get("namespace", ""))
        except errors.StatusError as e:
            raise VolumeError(f"failed to get secret: {e.message}", step="MountVolume.NewMounter") from e
        return {key: base64.b64decode(value).decode(errors="replace") for key, value in (found.get("data") or {}).items()}

    async def _mount_local(self, name: str, inner: str, source: Object, pod_dir: str, *, read_only: bool, options: list[str]) -> MountedVolume:
        path = wellknown.own(self._root, source["path"])
        if not os.path.exists(path):
            raise VolumeError(f'path "{path}" does not exist')
        target = os.path.join(pod_dir, "volumes", "kubernetes.io~local-volume", inner)
        if stat.S_ISBLK(os.stat(path).st_mode):
            # Read-only for this pod only: others may have the same file system writable.
            await devices.format_and_mount(path, target, source.get("fsType") or "ext4", options)
            return MountedVolume(name, target, read_only=read_only)
        os.makedirs(target, 0o750, exist_ok=True)
        if not mounts.is_mount_point(target):
            try:
                mounts.bind(path, target, read_only=read_only)
            except OSError as e:
                raise VolumeError(f"mount of {path} failed: {e}") from e
        return MountedVolume(name, target, read_only=read_only)

    async def unmount(self, pod_uid: str, pod_dir: str) -> None:
        """Tell CSI drivers and iSCSI targets that the pod is gone; plain mounts are undone by the caller."""
        await iscsi.release(pod_dir)
        await self._csi.unmount(pod_uid, pod_dir)
        for volume in [name for name, holder in self._single.items() if holder == pod_uid]:
            del self._single[volume]


_SOURCES = (
    "hostPath", "local", "nfs", "iscsi", "fc", "rbd", "cephfs", "cinder", "glusterfs", "flexVolume", "azureDisk", "azureFile",
    "awsElasticBlockStore", "gcePersistentDisk", "vsphereVolume", "portworxVolume", "scaleIO", "storageos", "quobyte", "photonPersistentDisk", "flocker",
)  # fmt: skip


def _read_only(source: Object) -> bool:
    return any(isinstance(v, dict) and bool(v.get("readOnly")) for v in source.values())
