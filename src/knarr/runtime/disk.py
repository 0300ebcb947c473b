"""Records on disk: versioned JSON, replaced atomically, and file trees walked and removed without following links.

Invariants: a reader sees the old record or the new one, never a part. A record of an unknown version is an error, not a guess.
Trees may be a container's work: as deep as it likes, and changed while they are read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator
from typing import Any

import orjson

from knarr.runtime import syscalls

VERSION = 1
_LONG_PATH = 3000
"""The kernel takes 4,095 bytes, a name has up to 255."""


class BadRecord(Exception):
    """A record is unreadable: truncated, or written by another version."""


def write_record(path: str, record: dict[str, Any] | bytes, *, sync: bool = False) -> None:
    """Replace a record, given as a dictionary or as the JSON object of one that is not empty.

    `sync` waits for the disk, for records that must survive a loss of power.
    """
    data = record if isinstance(record, bytes) else orjson.dumps(record)
    temporary = f"{path}.{os.urandom(4).hex()}.new"
    try:
        with open(temporary, "wb") as file:
            file.write(b'{"version":%d,' % VERSION + data[1:])
            if sync:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def read_record(path: str) -> dict[str, Any] | None:
    """Read a record; None when there is none. Raises BadRecord."""
    try:
        with open(path, "rb") as file:
            record = orjson.loads(file.read())
    except FileNotFoundError:
        return None
    except orjson.JSONDecodeError as error:
        raise BadRecord(f"{path}: {error}") from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise BadRecord(f"{path}: not a record of version {VERSION}")
    return record


def remove_tree(path: str) -> None:
    """Remove a file or directory tree; nothing there is success. Links are removed, not followed. Raises OSError."""
    with contextlib.suppress(FileNotFoundError):
        if not os.path.isdir(path) or os.path.islink(path):
            os.unlink(path)
            return
        try:
            shutil.rmtree(path)
        except (RecursionError, OSError) as error:
            if isinstance(error, OSError) and error.errno not in (errno.ENAMETOOLONG, errno.EMFILE):
                raise
            _remove_deep_tree(path)


def _remove_deep_tree(path: str) -> None:
    """rm(1) goes as deep as a tree is; Python's way ends after a thousand folders."""
    done = subprocess.run(["rm", "-rf", "--one-file-system", "--", path], stdin=subprocess.DEVNULL, capture_output=True, check=False)
    if done.returncode != 0:
        raise OSError(errno.ENOTEMPTY, done.stderr.decode(errors="replace").strip()[:200] or "not removed", path)


def walk(root: str, *, one_device: bool = False) -> Iterator[tuple[int, list[os.DirEntry[str]]]]:
    """Every folder of a tree, top down, as (open file descriptor, entries); both are good until the next step.

    A link is never followed, not even one that takes a folder's place meanwhile; what vanishes meanwhile is left out.
    With `one_device` folders where something else is mounted are left out, too. Raises OSError when the root is no folder.
    """
    bases = [(os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), 0)]
    device = os.fstat(bases[0][0]).st_dev
    todo = ["."]
    fd = -1
    try:
        while todo:
            path = todo.pop()
            while len(todo) < bases[-1][1]:
                os.close(bases.pop()[0])  # all below it is done
            try:
                fd = syscalls.open_without_links(bases[-1][0], path, os.O_RDONLY | os.O_DIRECTORY)
                if one_device and os.fstat(fd).st_dev != device:
                    os.close(fd)
                    fd = -1
                    continue
                with os.scandir(fd) as found:
                    entries = list(found)
            except OSError:
                entries = []
            if fd >= 0:
                yield fd, entries
                below = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
                if len(path) > _LONG_PATH and below:
                    # Names below are counted from here: a path may be longer than the kernel takes at once.
                    bases.append((fd, len(todo)))
                    path = "."
                else:
                    os.close(fd)
                fd = -1
                todo += [f"{path}/{name}" for name in below]
    finally:
        for one in ([fd] if fd >= 0 else []) + [base for base, _ in bases]:
            os.close(one)


def make_directories(*paths: str, mode: int = 0o711) -> None:
    """Make directories and their parents; there already is success."""
    for path in paths:
        os.makedirs(path, mode=mode, exist_ok=True)


def tree_usage(path: str) -> tuple[int, int]:
    """(allocated bytes, inodes) below a directory, on its own device; files that vanish meanwhile are skipped, hard links count once."""
    total, inodes, seen = 0, 0, set[tuple[int, int]]()
    with contextlib.suppress(OSError):
        device = os.stat(path).st_dev
        for _, entries in walk(path, one_device=True):
            for entry in entries:
                try:
                    info = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                if stat.S_ISDIR(info.st_mode) and info.st_dev != device:
                    # Of folders only: on an overlay files may tell the devices below it.
                    continue
                if info.st_nlink > 1 and not stat.S_ISDIR(info.st_mode):
                    if (info.st_dev, info.st_ino) in seen:
                        continue
                    seen.add((info.st_dev, info.st_ino))
                inodes += 1
                total += info.st_blocks * 512
    return total, inodes
