"""Writes a set of files so that readers see the old set or the new one, never a mixture.

Callers: the payload volumes (configMap, secret, downwardAPI, projected). Layout as upstream: files in a time-stamped folder,
`..data` a link to it that is renamed over the old one, and one visible link per top-level name. Invariant: a mount of the
volume's root stays valid over any number of updates. Source: pkg/volume/util/atomic_writer.go.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass

_DATA = "..data"
_DATA_NEW = "..data_tmp"
_MAX_PATH = 255


@dataclass(frozen=True, slots=True)
class FileProjection:
    """One file: content, permission bits, and a numeric owner (None keeps root)."""

    data: bytes
    mode: int
    uid: int | None = None


class PayloadPathError(ValueError):
    """A path of the payload would leave the volume or hide its own machinery."""


def check_path(path: str) -> None:
    """Raises PayloadPathError for paths that are empty, absolute, too long, or have `..` at a dangerous place."""
    if not path:
        raise PayloadPathError("invalid path: must not be empty")
    if path.startswith("/"):
        raise PayloadPathError(f"invalid path: must be relative path: {path}")
    if len(path) > 4096:
        raise PayloadPathError("invalid path: too long")
    for part in path.split("/"):
        if part == "..":
            raise PayloadPathError(f"invalid path: must not contain '..': {path}")
        if len(part.encode()) > _MAX_PATH:
            raise PayloadPathError("invalid path: filename must be less than or equal to 255 characters")
    if path.startswith(".."):
        raise PayloadPathError(f"invalid path: must not start with '..': {path}")


def write(root: str, payload: Mapping[str, FileProjection], group: int | None = None) -> bool:
    """Make the volume hold exactly this payload.

    Args:
      group: owner group of files and folders (fsGroup); None keeps root.

    Returns: whether anything changed.

    Raises:
      PayloadPathError: a path is not allowed. OSError: the disk refused; the old content stays.
    """
    for path in payload:
        check_path(path)
    current = _current(root)
    if current is not None and _holds(os.path.join(root, current), payload, group):
        return False
    folder = tempfile.mkdtemp(prefix=time.strftime("..%Y_%m_%d_%H_%M_%S.", time.gmtime()), dir=root)
    try:
        os.chmod(folder, 0o755)
        for path, file in payload.items():
            _write_file(folder, path, file, group)
        if group is not None:
            _give_folders(folder, group)
        link = os.path.join(root, _DATA_NEW)
        if os.path.lexists(link):
            os.unlink(link)
        os.symlink(os.path.basename(folder), link)
        os.rename(link, os.path.join(root, _DATA))
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    _update_visible(root, {p.split("/", 1)[0] for p in payload})
    if current is not None:
        shutil.rmtree(os.path.join(root, current), ignore_errors=True)
    return True


def _current(root: str) -> str | None:
    try:
        name = os.readlink(os.path.join(root, _DATA))
    except OSError:
        return None
    return name if os.path.isdir(os.path.join(root, name)) else None


def _holds(folder: str, payload: Mapping[str, FileProjection], group: int | None) -> bool:
    found = {os.path.relpath(os.path.join(base, name), folder) for base, _, names in os.walk(folder) for name in names}
    if found != set(payload):
        return False
    for path, file in payload.items():
        full = os.path.join(folder, path)
        info = os.stat(full)
        if info.st_mode & 0o7777 != _mode(file.mode, group) or info.st_size != len(file.data):
            return False
        if file.uid is not None and info.st_uid != file.uid:
            return False
        with open(full, "rb") as handle:
            if handle.read() != file.data:
                return False
    return True


def _mode(mode: int, group: int | None) -> int:
    """With an fsGroup the group may read. Source: SetVolumeOwnership's masks."""
    return mode | 0o440 if group is not None else mode


def _write_file(folder: str, path: str, file: FileProjection, group: int | None) -> None:
    full = os.path.join(folder, path)
    parent = os.path.dirname(full)
    if parent != folder:
        os.makedirs(parent, 0o755, exist_ok=True)
    fd = os.open(full, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    try:
        view = memoryview(file.data)
        while view:
            view = view[os.write(fd, view) :]
        if file.uid is not None or group is not None:
            os.fchown(fd, -1 if file.uid is None else file.uid, -1 if group is None else group)
        os.fchmod(fd, _mode(file.mode, group))
    finally:
        os.close(fd)


def _give_folders(folder: str, group: int) -> None:
    for base, _, _ in os.walk(folder):
        os.chown(base, -1, group)
        os.chmod(base, 0o2755)


def _update_visible(root: str, names: set[str]) -> None:
    for name in names:
        link = os.path.join(root, name)
        target = f"{_DATA}/{name}"
        try:
            if os.readlink(link) == target:
                continue
            os.unlink(link)
        except FileNotFoundError:
            pass
        except OSError:
            shutil.rmtree(link, ignore_errors=True)
        os.symlink(target, link)
    for name in os.listdir(root):
        if name not in names and not name.startswith(".."):
            link = os.path.join(root, name)
            if os.path.islink(link) and os.readlink(link).startswith(_DATA + "/"):
                os.unlink(link)
