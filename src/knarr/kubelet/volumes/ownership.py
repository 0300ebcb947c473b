"""fsGroup: gives a volume's files to the pod's group. Called by volumes.manager; synchronous, run in a thread for big trees.

Source: pkg/volume/volume_linux.go SetVolumeOwnership.
"""

from __future__ import annotations

import os
import stat


def give_to_group(root: str, group: int, *, read_only: bool = False, only_on_mismatch: bool = False) -> None:
    """Make `group` the owner group of a tree and let it read (and write); new files inherit the group.

    Links are never followed. Raises OSError.
    """
    if only_on_mismatch and _root_fits(root, group, read_only=read_only):
        return
    _give_one(root, group, os.lstat(root), read_only=read_only)
    stack = [root]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except FileNotFoundError:
                    continue
                _give_one(entry.path, group, info, read_only=read_only)
                if stat.S_ISDIR(info.st_mode):
                    stack.append(entry.path)


def _bits(info: os.stat_result, *, read_only: bool) -> int:
    bits = 0o440 if read_only else 0o660
    if stat.S_ISDIR(info.st_mode):
        bits |= 0o110 | stat.S_ISGID
    return bits


def _root_fits(root: str, group: int, *, read_only: bool) -> bool:
    info = os.lstat(root)
    bits = _bits(info, read_only=read_only)
    return info.st_gid == group and info.st_mode & bits == bits


def _give_one(path: str, group: int, info: os.stat_result, *, read_only: bool) -> None:
    try:
        os.lchown(path, -1, group)
        if not stat.S_ISLNK(info.st_mode):
            os.chmod(path, stat.S_IMODE(info.st_mode) | _bits(info, read_only=read_only))
    except FileNotFoundError:
        return
