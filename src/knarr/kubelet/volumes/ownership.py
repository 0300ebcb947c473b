"""fsGroup: gives a volume's files to the pod's group. Called by volumes.manager; synchronous, run in a thread for big trees.

Source: pkg/volume/volume_linux.go SetVolumeOwnership.
"""

from __future__ import annotations

import os
import stat

from knarr.runtime import disk

_HANDLE = os.O_PATH | os.O_CLOEXEC


def give_to_group(root: str, group: int, *, read_only: bool = False, only_on_mismatch: bool = False) -> None:
    """Make `group` the owner group of a tree and let it read (and write); new files inherit the group.

    Links are never followed, not even one that a container puts in the place of a file meanwhile. Raises OSError.
    """
    if only_on_mismatch and _root_fits(root, group, read_only=read_only):
        return
    fd = os.open(root, _HANDLE)
    try:
        _give_one(fd, group, read_only=read_only)
    finally:
        os.close(fd)
    if not os.path.isdir(root):
        return
    for folder, entries in disk.walk(root):
        for entry in entries:
            try:
                fd = os.open(entry.name, _HANDLE | os.O_NOFOLLOW, dir_fd=folder)
            except FileNotFoundError:
                continue
            try:
                _give_one(fd, group, read_only=read_only)
            finally:
                os.close(fd)


def _bits(info: os.stat_result, *, read_only: bool) -> int:
    bits = 0o440 if read_only else 0o660
    if stat.S_ISDIR(info.st_mode):
        bits |= 0o110 | stat.S_ISGID
    return bits


def _root_fits(root: str, group: int, *, read_only: bool) -> bool:
    info = os.lstat(root)
    bits = _bits(info, read_only=read_only)
    return info.st_gid == group and info.st_mode & bits == bits


def _give_one(fd: int, group: int, *, read_only: bool) -> None:
    """Give away what an open handle stands for, whatever its name means by now."""
    info, path = os.fstat(fd), f"/proc/self/fd/{fd}"
    if stat.S_ISLNK(info.st_mode):
        return
    if info.st_gid != group:
        os.chown(path, -1, group)
    bits = _bits(info, read_only=read_only)
    if info.st_gid != group or info.st_mode & bits != bits:
        os.chmod(path, stat.S_IMODE(info.st_mode) | bits)
