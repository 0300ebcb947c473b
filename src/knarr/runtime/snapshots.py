"""A container's root file system: image layers below, a writable directory on top, joined by overlayfs.

Role: mounts and unmounts roots, below containers and image volumes. Callers: container.py. Invariants: a snapshot's writable
files live in its own directory and go with it; the mount point is in the volatile state folder.
Where overlayfs cannot stand on the data folder (a folder that is itself an overlay, some network file systems) the layers are
copied instead: slower and larger, the same to the container.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from knarr.runtime import disk, syscalls
from knarr.runtime.cri import RuntimeFault

Driver = Literal["overlay", "copy"]


@dataclass(frozen=True, slots=True)
class Root:
    """What one root file system is made of.

    `layers` are numbers of directories below `<images>/layers`, lowest first; `base` replaces that folder when the layers are
    seen through an owner-shifting mount; `owner` is the host uid and gid of the container's root.
    """

    layers: Sequence[int]
    data: str
    mountpoint: str
    base: str = ""
    owner: tuple[int, int] = (0, 0)


class Snapshots:
    """Makes roots. All methods block: run them in worker threads, whose working directory is their own."""

    def __init__(self, layers_root: str, probe_dir: str) -> None:
        self._layers_root = layers_root
        self._probe_dir = probe_dir
        self._volatile = ""
        self.driver: Driver = "overlay"

    def probe(self) -> None:
        """Find out what the kernel and the data folder's file system allow. Blocks."""
        base = os.path.join(self._probe_dir, "probe")
        disk.remove_tree(base)
        for name in ("lower", "upper", "work", "merged"):
            os.makedirs(os.path.join(base, name))
        try:
            for option in (",volatile", ""):
                data = f"lowerdir=lower,upperdir=upper,workdir=work{option}"
                os.chdir(base)
                try:
                    syscalls.mount("overlay", "merged", "overlay", 0, data)
                except OSError:
                    continue
                finally:
                    os.chdir("/")
                syscalls.unmount(os.path.join(base, "merged"))
                # "volatile" skips a sync of the whole disk on every unmount; a container's writes need not outlive the machine.
                self.driver, self._volatile = "overlay", option
                return
            self.driver = "copy"
        finally:
            disk.remove_tree(base)

    def mount(self, root: Root) -> None:
        """Mount a root on its mount point, making its directories. Raises RuntimeFault."""
        upper, work = os.path.join(root.data, "upper"), os.path.join(root.data, "work")
        os.makedirs(root.mountpoint, exist_ok=True)
        os.makedirs(upper, exist_ok=True)
        if root.owner != (0, 0):
            os.chown(upper, *root.owner)
        try:
            if self.driver == "copy":
                self._copy(root, upper)
                syscalls.bind(upper, root.mountpoint)
                return
            os.makedirs(work, exist_ok=True)
            # overlayfs shows the top directory's own attributes as those of "/".
            self._like_lowest(root, upper)
            base = root.base or self._layers_root
            os.chdir(base)
            try:
                lower = ":".join(f"{number}/fs" for number in reversed(root.layers)) or self._empty()
                data = f"lowerdir={lower},upperdir={_escape(upper)},workdir={_escape(work)}{self._volatile}"
                syscalls.mount("overlay", root.mountpoint, "overlay", 0, data)
            finally:
                os.chdir("/")
        except OSError as error:
            raise RuntimeFault(f"failed to mount rootfs: {error.strerror or error}") from error

    def mount_readonly(self, layers: Sequence[int], mountpoint: str) -> None:
        """Mount an image without a writable layer, for image volumes. Raises RuntimeFault."""
        os.makedirs(mountpoint, exist_ok=True)
        try:
            if self.driver == "copy" and len(layers) > 1:
                raise OSError(errno.ENOSYS, "image volumes need overlayfs on this file system")
            os.chdir(self._layers_root)
            try:
                if len(layers) == 1:
                    syscalls.bind(f"{layers[0]}/fs", mountpoint)
                    syscalls.mount("", mountpoint, flags=syscalls.MS_REMOUNT | syscalls.MS_BIND | syscalls.MS_RDONLY)
                else:
                    lower = ":".join(f"{number}/fs" for number in reversed(layers)) or self._empty()
                    # Two lower directories at least are needed where nothing is writable.
                    syscalls.mount("overlay", mountpoint, "overlay", syscalls.MS_RDONLY, f"lowerdir={lower}")
            finally:
                os.chdir("/")
        except OSError as error:
            raise RuntimeFault(f"failed to mount image: {error.strerror or error}") from error

    def unmount(self, mountpoint: str) -> None:
        """Unmount a root; not mounted is success."""
        with contextlib.suppress(FileNotFoundError):
            while syscalls.unmount(mountpoint):
                pass

    def _empty(self) -> str:
        path = os.path.join(self._layers_root, "empty")
        os.makedirs(path, exist_ok=True)
        return "empty"

    def _like_lowest(self, root: Root, upper: str) -> None:
        for number in reversed(root.layers):
            try:
                top = os.stat(os.path.join(self._layers_root, str(number), "fs"))
            except OSError:
                continue
            os.chmod(upper, stat.S_IMODE(top.st_mode))
            if root.owner == (0, 0):
                os.chown(upper, top.st_uid, top.st_gid)
            return

    def _copy(self, root: Root, target: str) -> None:
        if os.listdir(target):
            return
        for number in root.layers:
            copy_layer(os.path.join(self._layers_root, str(number), "fs"), target)


def copy_layer(source: str, target: str) -> None:
    """Apply one unpacked layer onto a directory: whiteouts remove, everything else is copied with all attributes."""
    if os.path.lexists(target) and not os.path.isdir(target):
        os.unlink(target)
    os.makedirs(target, exist_ok=True)
    for entry in os.scandir(source):
        there = os.path.join(target, entry.name)
        info = entry.stat(follow_symlinks=False)
        if stat.S_ISCHR(info.st_mode) and info.st_rdev == 0:
            disk.remove_tree(there)
        elif entry.is_dir(follow_symlinks=False):
            with contextlib.suppress(OSError):
                if os.getxattr(entry.path, "trusted.overlay.opaque", follow_symlinks=False) == b"y":
                    disk.remove_tree(there)
            if os.path.islink(there):
                os.unlink(there)
            copy_layer(entry.path, there)
        else:
            disk.remove_tree(there)
            if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                shutil.copy2(entry.path, there, follow_symlinks=False)
            else:
                os.mknod(there, info.st_mode, info.st_rdev)
        if not entry.is_dir(follow_symlinks=False) and os.path.lexists(there):
            _attributes(info, there)
    _attributes(os.stat(source), target)


def _attributes(info: os.stat_result, path: str) -> None:
    os.chown(path, info.st_uid, info.st_gid, follow_symlinks=False)
    if not stat.S_ISLNK(info.st_mode):
        os.chmod(path, stat.S_IMODE(info.st_mode))
    os.utime(path, ns=(info.st_atime_ns, info.st_mtime_ns), follow_symlinks=False)


def _escape(path: str) -> str:
    """A path inside overlayfs's option string."""
    return path.replace("\\", "\\\\").replace(",", "\\,").replace(":", "\\:")
