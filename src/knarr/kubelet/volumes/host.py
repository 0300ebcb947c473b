"""Volumes that live on this host: emptyDir and hostPath. Called by volumes.manager; synchronous and quick.

Source: pkg/volume/emptydir, pkg/volume/hostpath.
"""

from __future__ import annotations

import os
import stat

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet.resources import pod_totals
from knarr.kubelet.volumes import mounts
from knarr.kubelet.volumes.model import VolumeError


def memory_size(pod: Object, source: Object, allocatable_bytes: int) -> int:
    """How large a memory-backed emptyDir may grow: the least of its own limit, the pod's and the node's."""
    sizes = [allocatable_bytes] if allocatable_bytes else []
    limit = pod_totals(pod)[1]["memory"]
    if limit:
        sizes.append(limit)
    if source.get("sizeLimit"):
        own = quantity.value(source["sizeLimit"])
        if own > 0:
            sizes.append(own)
    return min(sizes, default=0)


def make_empty_dir(pod: Object, source: Object, path: str, allocatable_bytes: int) -> None:
    """Make the directory, or mount the tmpfs or hugetlbfs, once; content survives restarts of containers and kubelet.

    Raises:
      VolumeError: the kernel refused.
    """
    medium = source.get("medium") or ""
    fresh = not os.path.isdir(path)
    os.makedirs(path, 0o755, exist_ok=True)
    try:
        if medium == "Memory":
            if fresh or not mounts.is_mount_point(path):
                mounts.tmpfs(path, size_bytes=memory_size(pod, source, allocatable_bytes), mode=0o1777)
        elif medium.startswith("HugePages"):
            if fresh or not mounts.is_mount_point(path):
                mounts.mount("nodev", path, "hugetlbfs", 0, _huge_options(pod, medium))
                os.chmod(path, 0o777)
        elif medium:
            raise VolumeError(f'unknown storage medium "{medium}"')
        elif fresh:
            os.chmod(path, 0o777)
    except OSError as e:
        raise VolumeError(f"mount failed: {e}") from e


def _huge_options(pod: Object, medium: str) -> str:
    size = medium.partition("-")[2]
    if not size:
        sizes = {
            name.removeprefix("hugepages-")
            for c in pod["spec"].get("containers") or []
            for name in ((c.get("resources") or {}).get("requests") or {})
            if name.startswith("hugepages-")
        }
        if len(sizes) != 1:
            raise VolumeError("medium HugePages needs exactly one page size among the containers' requests")
        size = sizes.pop()
    return f"pagesize={quantity.value(size)}"


_TYPE_CHECKS = {
    "Directory": (stat.S_ISDIR, "is not a directory"),
    "DirectoryOrCreate": (stat.S_ISDIR, "is not a directory"),
    "File": (stat.S_ISREG, "is not a file"),
    "FileOrCreate": (stat.S_ISREG, "is not a file"),
    "Socket": (stat.S_ISSOCK, "is not a socket file"),
    "CharDevice": (stat.S_ISCHR, "is not a character device"),
    "BlockDevice": (stat.S_ISBLK, "is not a block device"),
}


def check_host_path(path: str, kind: str) -> None:
    """Hold a host path to its type, making it for the OrCreate types.

    Raises:
      VolumeError: text as upstream's.
    """
    if ".." in path.split("/"):
        raise VolumeError(f"path must not contain '..': {path}")
    if not kind:
        return
    check = _TYPE_CHECKS.get(kind)
    if check is None:
        raise VolumeError(f"hostPath type check failed: {path} has unknown type {kind}")
    try:
        if kind == "DirectoryOrCreate" and not os.path.exists(path):
            os.makedirs(path, 0o755)
        elif kind == "FileOrCreate" and not os.path.exists(path):
            os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o644))
        mode = os.stat(path).st_mode
    except OSError as e:
        if kind in ("DirectoryOrCreate", "FileOrCreate"):
            raise VolumeError(f"hostPath type check failed: {e.strerror}: {path}") from e
        raise VolumeError(f"hostPath type check failed: {path} {check[1]}") from e
    if not check[0](mode):
        raise VolumeError(f"hostPath type check failed: {path} {check[1]}")
