"""Records on disk: versioned JSON, replaced atomically, and file trees removed without following links.

Invariant: a reader sees the old record or the new one, never a part. A record of an unknown version is an error, not a guess.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from typing import Any

import orjson

VERSION = 1


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
    """Remove a file or directory tree; nothing there is success. Links are removed, not followed."""
    with contextlib.suppress(FileNotFoundError):
        if os.path.isdir(path) and not os.path.islink(path):
            shutil.rmtree(path)
        else:
            os.unlink(path)


def make_directories(*paths: str, mode: int = 0o711) -> None:
    """Make directories and their parents; there already is success."""
    for path in paths:
        os.makedirs(path, mode=mode, exist_ok=True)


def tree_usage(path: str) -> tuple[int, int]:
    """(allocated bytes, inodes) below a directory; files that vanish meanwhile are skipped, hard links count once."""
    total, seen, stack = 0, set[tuple[int, int]](), [path]
    inodes = 0
    while stack:
        try:
            entries = list(os.scandir(stack.pop()))
        except OSError:
            continue
        for entry in entries:
            try:
                info = entry.stat(follow_symlinks=False)
            except OSError:
                continue
            if info.st_nlink > 1 and not entry.is_dir(follow_symlinks=False):
                if (info.st_dev, info.st_ino) in seen:
                    continue
                seen.add((info.st_dev, info.st_ino))
            inodes += 1
            total += info.st_blocks * 512
            if entry.is_dir(follow_symlinks=False):
                stack.append(entry.path)
    return total, inodes
