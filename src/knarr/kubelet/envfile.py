"""Environment files in volumes (fileKeyRef): NAME=VALUE lines that an init container has written.

Caller: env. The file is a container's work: links stay inside the volume, and only a regular file of bounded lines is read.
Source: pkg/kubelet/util/env/env_util.go (ParseEnv).
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator
from typing import IO

from knarr.runtime import syscalls

_LINE_BYTES = 64 * 1024
_FILE_BYTES = 4 << 20


class EnvFileError(Exception):
    """The file is none, or not in the format; the text says where."""


def read(root: str, path: str, key: str) -> str:
    """The value of `key` in the file at `path` of a volume, "" when it is not there.

    Raises:
      OSError: no such file. EnvFileError: not a file of this format.
    """
    fd = syscalls.open_in_root(root, path, os.O_RDONLY | os.O_NONBLOCK)
    with os.fdopen(fd, "rb") as file:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise EnvFileError(f"{path} is no regular file")
        return find(_lines(file), key)


def _lines(file: IO[bytes]) -> Iterator[str]:
    size = 0
    while line := file.readline(_LINE_BYTES + 1):
        size += len(line)
        if len(line) > _LINE_BYTES or size > _FILE_BYTES:
            raise EnvFileError("token too long")
        yield line.decode("utf-8", "surrogateescape").rstrip("\r\n")


def find(lines: Iterable[str], key: str) -> str:
    """The first value given to `key`. A backslash at a line's end goes on in the next one. Raises EnvFileError."""
    begun: str | None = None
    for number, raw in enumerate(lines, 1):
        line = raw.lstrip(" \t")
        if not line or line.startswith("#"):
            if begun is not None:
                raise EnvFileError(f"line {number}: {'comment' if line else 'blank line'} in continuation")
            continue
        text = line.rstrip(" \t")
        goes_on = text.endswith("\\")
        if goes_on:
            text = text[:-1].rstrip(" \t")
        if begun is not None:
            text = f"{begun} {text}"
        if goes_on:
            begun = text
            continue
        begun = None
        name, sign, value = text.partition("=")
        if not sign or not name.strip():
            raise EnvFileError(f"invalid environment variable format at line {number}")
        if name.strip() == key:
            return value.strip()
    if begun is not None:
        raise EnvFileError("unexpected end of file: unfinished line continuation")
    return ""
