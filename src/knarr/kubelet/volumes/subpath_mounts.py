"""subPath mounts: what was checked inside the volume is pinned by a bind mount of its own, and that is given to the runtime.

Caller: containers. Layout as upstream: <pod>/volume-subpaths/<volume>/<container>/<index>. A container that owns the volume
may swap names at any time; because the file descriptor found by the safe walk is what gets mounted, a swap after the check
changes nothing. Source: pkg/volume/util/subpath/subpath_linux.go.
"""

from __future__ import annotations

import os
import stat

from knarr.aiokits.log import get_logger
from knarr.kubelet.volumes import mounts, subpath
from knarr.kubelet.volumes.model import MountedVolume

log = get_logger(__name__)


class SubPathError(Exception):
    """The subPath cannot be mounted; the text tells the user no detail of the host."""


class SubPaths:
    """Makes and removes subPath mounts below the pod directories."""

    def __init__(self, pods_dir: str) -> None:
        self._pods_dir = pods_dir

    def prepare(self, pod_uid: str, container: str, index: int, volume: MountedVolume, sub_path: str, mount_name: str) -> str:
        """Pin volume/sub_path (made if missing) and return the path to hand to the runtime.

        Raises:
          SubPathError: missing and not to be made, or it leaves the volume.
          ValueError: not a path inside a volume at all.
        """
        subpath.check_text(sub_path)
        try:
            fd = self._open(volume, sub_path)
        except OSError as e:
            log.warning("subPath not usable", pod_uid=pod_uid, container=container, error=str(e))
            raise SubPathError(f'failed to create subPath directory for volumeMount "{mount_name}" of container "{container}"') from e
        try:
            target = os.path.join(self._pods_dir, pod_uid, "volume-subpaths", volume.name, container, str(index))
            self._pin(fd, target)
            return target
        except OSError as e:
            log.warning("subPath not mounted", pod_uid=pod_uid, container=container, error=str(e))
            raise SubPathError(f'failed to prepare subPath for volumeMount "{mount_name}" of container "{container}"') from e
        finally:
            os.close(fd)

    def _open(self, volume: MountedVolume, sub_path: str) -> int:
        try:
            return subpath.open_beneath(volume.path, sub_path, os.O_PATH)
        except FileNotFoundError:
            subpath.make_directories(volume.path, sub_path, stat.S_IMODE(os.stat(volume.path).st_mode))
            return subpath.open_beneath(volume.path, sub_path, os.O_PATH)

    def _pin(self, fd: int, target: str) -> None:
        os.makedirs(os.path.dirname(target), 0o750, exist_ok=True)
        while mounts.unmount(target):
            # The mount of an earlier start of this container, maybe of another target.
            pass
        is_directory = stat.S_ISDIR(os.fstat(fd).st_mode)
        if os.path.lexists(target) and os.path.isdir(target) != is_directory:
            os.rmdir(target) if os.path.isdir(target) else os.unlink(target)
        if is_directory:
            os.makedirs(target, 0o750, exist_ok=True)
        elif not os.path.exists(target):
            os.close(os.open(target, os.O_WRONLY | os.O_CREAT, 0o640))
        mounts.bind(f"/proc/self/fd/{fd}", target, recursive=True)

    def remove(self, pod_uid: str) -> None:
        """Unmount and remove all of a pod's subPath mounts. Never removes what lies inside of a volume."""
        root = os.path.join(self._pods_dir, pod_uid, "volume-subpaths")
        if not os.path.isdir(root):
            return
        for point in mounts.mount_points(root):
            mounts.unmount(point)
        for folder, directories, files in os.walk(root, topdown=False):
            for name in files:
                os.unlink(os.path.join(folder, name))
            for name in directories:
                os.rmdir(os.path.join(folder, name))
        os.rmdir(root)
