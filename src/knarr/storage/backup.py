"""Whole stores to files and back: one consistent revision, as gzip'd JSON lines.

First line: {"format", "version", "revision", "keys"}; then {"k": key, "v": value in base64, "e": expiry in epoch seconds where there is one}.
Values are kept as they are stored, so encrypted ones stay encrypted. A restored embedded store goes on behind the revision of the
backup, so no client ever sees a resourceVersion go back.

Callers: the command line, with the cluster running (backup) or down (restore).
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import gzip
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

from knarr.aiokits import clock
from knarr.storage.errors import StoreError
from knarr.storage.factory import open_store
from knarr.storage.protocol import RevisionStore

FORMAT, VERSION = "knarr-backup", 1
_PAGE = 1000


class BackupError(StoreError):
    """The file is no backup, or the store is not one that can be backed up or restored."""


class Summary(NamedTuple):
    """What was copied."""

    revision: int
    keys: int


class Entry(NamedTuple):
    key: str
    value: bytes
    expires_at: float


async def backup(url: str, path: Path) -> Summary:
    """Write everything that a store holds now to a file; the store may be in use. The file appears whole or not at all.

    Raises:
      BackupError: the store is in memory.
      StoreError: it cannot be read.
    """
    scheme = urlsplit(url).scheme
    if scheme == "sqlite":
        revision, entries = _sqlite_entries(Path(urlsplit(url).path))
        return await asyncio.to_thread(_write, path, revision, entries)
    if scheme == "memory":
        raise BackupError("a store in memory cannot be backed up from outside")
    store = open_store(url)
    await store.start()
    try:
        revision = store.revision
        found = [entry async for entry in _scanned(store, revision)]
    finally:
        await store.close()
    return await asyncio.to_thread(_write, path, revision, iter(found))


async def _scanned(store: RevisionStore, revision: int) -> AsyncIterator[Entry]:
    after: str | None = None
    while True:
        page = await store.scan("/registry/", at=revision, limit=_PAGE, after=after)
        for item in page.items:
            # Leases do not travel: what had one (events) would never end.
            if not item.key.startswith("/registry/core/events/"):
                yield Entry(item.key, item.value, 0.0)
        if page.after is None:
            return
        after = page.after


def _sqlite_entries(path: Path) -> tuple[int, Iterator[Entry]]:
    from knarr.storage.sqlite_file import snapshot

    if not path.exists():
        raise BackupError(f"{path} does not exist")
    revision, rows = snapshot(path)
    return revision, (Entry(*row) for row in rows)


def _write(path: Path, revision: int, entries: Iterator[Entry]) -> Summary:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    count = 0
    try:
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as raw:
            with gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=5, mtime=0) as file:
                file.write(orjson.dumps({"format": FORMAT, "version": VERSION, "revision": revision}) + b"\n")
                for entry in entries:
                    line: dict[str, Any] = {"k": entry.key, "v": base64.b64encode(entry.value).decode()}
                    if entry.expires_at:
                        line["e"] = entry.expires_at
                    file.write(orjson.dumps(line) + b"\n")
                    count += 1
                file.write(orjson.dumps({"keys": count}) + b"\n")
            raw.flush()
            os.fsync(raw.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return Summary(revision, count)


def read(path: Path) -> tuple[int, list[Entry]]:
    """Read a backup whole. Raises BackupError when it is malformed or cut short."""
    try:
        with gzip.open(path, "rb") as file:
            lines = file.read().splitlines()
        header, end = orjson.loads(lines[0]), orjson.loads(lines[-1])
        if header.get("format") != FORMAT or header.get("version") != VERSION:
            raise BackupError(f"{path} is no backup of format {FORMAT} {VERSION}")
        entries = [Entry(one["k"], base64.b64decode(one["v"], validate=True), float(one.get("e") or 0)) for one in map(orjson.loads, lines[1:-1])]
    except (OSError, EOFError, IndexError, KeyError, TypeError, AttributeError, orjson.JSONDecodeError, binascii.Error) as error:
        raise BackupError(f"{path} is no backup or is damaged: {error}") from error
    if end.get("keys") != len(entries):
        raise BackupError(f"{path} is cut short: {len(entries)} of {end.get('keys')} keys")
    return int(header["revision"]), entries


async def restore(url: str, path: Path) -> Summary:
    """Fill an empty store from a backup; nobody else may use the store meanwhile.

    Raises:
      BackupError: the file is damaged, or the store is not empty.
      StoreError: the store cannot be written.
    """
    revision, entries = await asyncio.to_thread(read, path)
    store = open_store(url)
    await store.start()
    try:
        if (await store.scan("", limit=1)).items:
            raise BackupError("the store is not empty: restore only into a new one")
        skip = getattr(store, "skip_to", None)
        if skip is not None:
            await skip(revision)
        elif store.revision < revision:
            raise BackupError(f"the store is at revision {store.revision}, the backup at {revision}: resource versions would go back")
        now = clock.now()
        alive = [entry for entry in entries if not entry.expires_at or entry.expires_at > now]
        for start in range(0, len(alive), _PAGE):
            part = alive[start : start + _PAGE]
            await asyncio.gather(*(
                store.put(entry.key, entry.value, expected=0, lease_seconds=max(1, round(entry.expires_at - now)) if entry.expires_at else 0)
                for entry in part
            ))  # fmt: skip
        return Summary(store.revision, len(alive))
    finally:
        await store.close()
