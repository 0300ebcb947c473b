"""A store in memory, for tests and throw-away clusters: the same contract as the others, nothing survives.

Writes take effect, are published and are acknowledged in one step. History is a list of versions per key, cut by
compaction when it grows over a bound.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractAsyncContextManager
from itertools import islice

from knarr.aiokits import clock
from knarr.storage.errors import CompactedError, FutureRevisionError, UnavailableError
from knarr.storage.leases import Leases
from knarr.storage.protocol import ANY, Event, EventStream, Page, Put, Stored, Subscriber
from knarr.storage.retention import History, Retention
from knarr.storage.streams import Publisher, Streams


class MemoryStore:
    """RevisionStore over dicts."""

    def __init__(self, *, retention: Retention | None = None) -> None:
        self._revision = 0
        self._compacted = 0
        self._live: dict[str, Stored] = {}
        self._versions: dict[str, list[tuple[int, bytes | None]]] = {}
        self._log: deque[Event] = deque()
        self._publisher = Publisher()
        self._streams = Streams(self._publisher, self._history)
        self._leases = Leases(self._expire, clock=clock.now)
        self._retention = History(retention or Retention(revisions=20_000, history_bytes=64 << 20), clock.now(), 0)
        self._closed = False

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def compacted(self) -> int:
        return self._compacted

    def is_stale(self, key: str) -> bool:
        return False

    @property
    def shared(self) -> bool:
        return False

    @property
    def size_bytes(self) -> int:
        return 0

    async def catch_up(self) -> None:
        return

    async def start(self) -> None:
        self._closed = False

    async def wait_lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        self._closed = True
        self._leases.close()
        self._streams.close()

    def _check_at(self, at: int) -> None:
        if at > self._revision:
            raise FutureRevisionError(at, self._revision)
        if at < self._compacted:
            raise CompactedError(at, self._compacted)

    def _version(self, key: str, at: int) -> Stored | None:
        versions = self._versions.get(key)
        if versions is None:
            return None
        position = bisect_right(versions, at, key=lambda version: version[0])
        if position == 0:
            return None
        revision, value = versions[position - 1]
        return None if value is None else Stored(key, value, revision)

    async def get(self, key: str, *, at: int | None = None) -> Stored | None:
        if at is None:
            return self._live.get(key)
        self._check_at(at)
        return self._version(key, at)

    async def scan(self, prefix: str, *, at: int | None = None, limit: int = 0, after: str | None = None) -> Page:
        revision = self._revision if at is None else at
        self._check_at(revision)
        names = self._live if revision == self._revision else self._versions
        keys = sorted(key for key in names if key.startswith(prefix) and (after is None or key > after))
        found = (stored for key in keys if (stored := self._version(key, revision)) is not None)
        items = list(islice(found, limit)) if limit else list(found)
        remaining = sum(1 for _ in found) if limit else 0
        return Page(revision, items, items[-1].key if remaining else None, remaining)

    async def put(self, key: str, value: bytes, *, expected: int, lease_seconds: int = 0) -> Put:
        put = self._write(key, value, expected)
        if put.won and lease_seconds:
            self._leases.add(key, put.revision, clock.now() + lease_seconds)
        return put

    async def remove(self, key: str, *, expected: int) -> Put:
        return self._write(key, None, expected)

    def _write(self, key: str, value: bytes | None, expected: int) -> Put:
        if self._closed:
            raise UnavailableError("the store is closed")
        current = self._live.get(key)
        current_revision = current.revision if current is not None else 0
        if (expected not in (ANY, current_revision)) or (value is None and current is None):
            return Put(False, current_revision, current)
        self._revision = revision = self._revision + 1
        if value is None:
            del self._live[key]
        else:
            self._live[key] = Stored(key, value, revision)
        self._versions.setdefault(key, []).append((revision, value))
        previous = current.value if current is not None else None
        # History keeps the previous value of each event; it is a reference to bytes that the versions hold anyway.
        self._log.append(Event(key, value, revision, current_revision, previous))
        self._publisher.publish((Event(key, value, revision, current_revision, previous if value is None else None),))
        self._retain(len(value or b""))
        return Put(True, revision, None)

    def _retain(self, written_bytes: int) -> None:
        now = clock.now()
        self._retention.note(now, self._revision, written_bytes)
        if self._revision % 1000 == 0:
            self._compact(self._retention.compactable(now, self._revision))

    def _expire(self, key: str, revision: int) -> None:
        if not self._closed:
            self._write(key, None, revision)

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        return self._publisher.subscribe(subscriber)

    def watch(self, prefix: str, *, since: int) -> AbstractAsyncContextManager[EventStream]:
        return self._streams.watch(prefix, since=since)

    async def _history(self, prefix: str, since: int) -> Sequence[Event]:
        self._check_at(since)
        first = max(0, len(self._log) - (self._revision - since))
        return [event for event in islice(self._log, first, None) if event.key.startswith(prefix)]

    async def compact(self, revision: int) -> None:
        if revision > self._revision:
            raise FutureRevisionError(revision, self._revision)
        self._compact(revision)

    def _compact(self, revision: int) -> None:
        if revision <= self._compacted:
            return
        touched: set[str] = set()
        while self._log and self._log[0].revision <= revision:
            touched.add(self._log.popleft().key)
        for key in touched:
            versions = self._versions[key]
            keep = bisect_right(versions, revision, key=lambda version: version[0]) - 1
            if keep >= 0 and versions[keep][1] is None:
                keep += 1
            if keep > 0:
                del versions[:keep]
            if not versions:
                del self._versions[key]
        self._compacted = revision
