"""The API facts as package data: plain JSON read from upstream's published API, no code. See the loaders in `knarr.api`.

The big files keep one entry a line, sorted; `FactLines` finds single entries without parsing the rest, so that a
process pays only for the types it meets, and the pages of the mapped file are shared by all processes.
"""

import mmap
import os.path
from collections.abc import Iterator
from typing import Any

import orjson

_FOLDER = os.path.dirname(os.path.abspath(__file__))


def fact_path(name: str) -> str:
    """Absolute path of a fact file."""
    return os.path.join(_FOLDER, name)


def read_fact(name: str) -> bytes:
    """The bytes of a fact file such as "discovery.json"."""
    with open(fact_path(name), "rb") as file:
        return file.read()


class FactLines:
    """Entries of a mapped fact file by key; nothing is read before the first look-up."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._map: mmap.mmap | None = None

    def _mapped(self) -> mmap.mmap:
        if self._map is None:
            with open(fact_path(self._name), "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return self._map

    def get(self, key: str) -> dict[str, Any] | None:
        """The entry, parsed anew at each call; None if there is none."""
        data = self._mapped()
        mark = b'\n"' + key.encode() + b'":'
        start = data.find(mark)
        if start < 0:
            return None
        end = data.find(b"\n", start + 1)
        line = data[start + len(mark) : end].rstrip(b",")
        entry: dict[str, Any] = orjson.loads(line)
        return entry

    def keys(self) -> Iterator[str]:
        """All keys, in order."""
        for line in self._mapped()[:].split(b"\n"):
            if line.startswith(b'"') and (end := line.find(b'":')) > 0:
                yield line[1:end].decode()
