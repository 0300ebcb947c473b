"""Folders of the local path provisioner's volumes on this node: made at their first mount, removed when they are released.

Callers: claims (ensure), node_status (tells where), server (remove, asked by the provisioner). Invariant: nothing outside the
folder is touched; a name is that of a provisioned volume and never a path.
"""

from __future__ import annotations

import asyncio
import os
import re

from knarr.api.types import Object
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.volumes.model import VolumeError
from knarr.runtime import disk

FOLDER_ANNOTATION = "knarr.io/local-path-folder"
_PROVISIONED_BY, _PROVISIONER = "pv.kubernetes.io/provisioned-by", "knarr.io/local-path"
_NAME = re.compile(r"pvc-[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")


def folder(config: KubeletConfig) -> str:
    """Where this node keeps them."""
    return os.path.join(os.path.dirname(config.root_dir.rstrip("/")), "local-path")


def ensure(persistent: Object) -> None:
    """Make the folder of a volume of ours, open to every user as a fresh file system would be by fsGroup. Raises VolumeError."""
    if (persistent["metadata"].get("annotations") or {}).get(_PROVISIONED_BY) != _PROVISIONER or "local" not in persistent["spec"]:
        return
    path = persistent["spec"]["local"]["path"]
    if not _NAME.fullmatch(os.path.basename(path)):
        raise VolumeError(f'"{path}" is not the folder of a provisioned volume')
    try:
        if not os.path.isdir(path):
            os.makedirs(path)
            os.chmod(path, 0o777)
    except OSError as error:
        raise VolumeError(f"folder {path} not made: {error.strerror}") from error


async def remove(config: KubeletConfig, name: str) -> bool:
    """Delete a volume's folder with all that is in it; False when there is none. Raises OSError."""
    path = os.path.join(folder(config), name)
    if not _NAME.fullmatch(name) or os.path.islink(path) or not os.path.isdir(path):
        return False
    await asyncio.to_thread(disk.remove_tree, path)
    return True
