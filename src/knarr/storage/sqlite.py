"""The embedded durable store: one SQLite file, one writer thread, group commit.

How a write goes: the compare-and-swap and the new revision are decided at once on the event loop, against an index in
memory (key to revision) that includes writes still on their way. The row joins the batch that is being collected; when
the writer thread has finished its present commit, the whole batch becomes the next one: one transaction, one fsync.
Then, on the event loop and in this order: the durable revision moves, subscribers get the batch, the writers' futures
resolve. Everything that arrives during one commit shares the next.

If a commit fails (disk full, read only), its writers and those queued behind it get UnavailableError, the index goes back to
what is on disk and nothing is published; the next write tries again.

The table is append-only: the row id is the revision, a row names the row it replaces (`previous`), a removal is a row
without value. Revisions are gapless, because the one writer gives each row its id. Compaction deletes rows that were superseded
up to a revision, in short transactions between the commits, on a timer and as soon as the history outgrows its limits. Freed pages are
used again; what is free beyond that is given back in small steps, and in a quiet moment the write-ahead log is emptied.

Loops: the writer thread (input: batches, one at a time; bound: what arrives during one commit), two reader threads
(get, scan and history, at most READERS at a time), one compaction timer. kill -9 at any moment loses nothing acknowledged: WAL with
synchronous=FULL.

Source: shape of k3s-io/kine's log table; PATTERNS of etcd's mvcc for compaction semantics.
"""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TypeVar

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.storage.errors import CompactedError, FutureRevisionError, UnavailableError
from knarr.storage.leases import Leases
from knarr.storage.protocol import ANY, Event, EventStream, Page, Put, Stored, Subscriber
from knarr.storage.retention import History, Retention
from knarr.storage.sqlite_file import CompactionStep, Loaded, Reader, Row, Writer
from knarr.storage.streams import Publisher, Streams

log = get_logger(__name__)
T = TypeVar("T")

READERS = 2
COMPACTION_INTERVAL_SECONDS = 10.0
QUIET_REVISIONS = 1000
"""Fewer writes than these since the last look at the file: a quiet moment."""


class _Pending:
    """Writes collected for the next commit, in revision order."""

    __slots__ = ("events", "futures", "leases", "rows", "undo", "value_bytes")

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.events: list[Event] = []
        self.futures: list[asyncio.Future[Put]] = []
        self.undo: list[tuple[str, int]] = []
        self.leases: list[tuple[str, int, float]] = []
        self.value_bytes = 0


class SQLiteStore:
    """RevisionStore in one SQLite file."""

    def __init__(self, path: Path, *, retention: Retention | None = None) -> None:
        self._path = path
        self._limits = retention or Retention()
        self._revision = 0
        self._last = 0
        self._compacted = 0
        self._compacting = False
        """Whether the timer's work is under way, so that no second one begins."""
        self._settled = 0
        """The revision when the file was last looked at for free pages and an outgrown log."""
        self._index: dict[str, int] = {}
        self._pending = _Pending()
        self._committing: _Pending | None = None
        self._flush_planned = False
        self._publisher = Publisher()
        self._streams = Streams(self._publisher, self._history)
        self._leases = Leases(self._expire, clock=clock.now)
        self._retention = History(self._limits, clock.now(), 0)
        self._writer: Writer | None = None
        self._writer_thread: ThreadPoolExecutor | None = None
        self._readers: ThreadPoolExecutor | None = None
        self._reader_local = threading.local()
        self._open_readers: list[Reader] = []
        self._compaction_timer: asyncio.TimerHandle | None = None
        self._closed = True
        self._idle: asyncio.Event = asyncio.Event()

    # -- life ------------------------------------------------------------------------------------------------------
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
        return self._writer.size_bytes() if self._writer is not None else 0

    async def catch_up(self) -> None:
        return

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._writer_thread = ThreadPoolExecutor(1, "store-writer")
        self._readers = ThreadPoolExecutor(READERS, "store-reader")
        try:
            self._writer, loaded = await self._on_writer(self._open)
        except (sqlite3.Error, OSError) as error:
            self._writer_thread.shutdown()
            self._readers.shutdown()
            raise UnavailableError(f"cannot open {self._path}: {error}") from error
        self._index = loaded.live
        self._revision = self._last = loaded.revision
        self._compacted = loaded.compacted
        self._retention = History(self._limits, clock.now(), loaded.revision)
        for key, revision, expires_at in loaded.leases:
            self._leases.add(key, revision, expires_at)
        self._closed = False
        self._idle.set()
        self._plan_compaction()

    def _open(self) -> tuple[Writer, Loaded]:
        writer = Writer(self._path)
        return writer, writer.load()

    async def wait_lost(self) -> None:
        await asyncio.get_running_loop().create_future()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self._compaction_timer is not None:
            self._compaction_timer.cancel()
        self._leases.close()
        self._streams.close()
        await self._idle.wait()
        assert self._writer is not None
        assert self._writer_thread is not None
        assert self._readers is not None
        readers = self._readers
        await asyncio.get_running_loop().run_in_executor(None, readers.shutdown)
        for reader in self._open_readers:
            reader.close()
        await self._on_writer(self._writer.close)
        self._writer_thread.shutdown()

    async def _on_writer(self, work: Callable[[], T]) -> T:
        assert self._writer_thread is not None
        return await asyncio.get_running_loop().run_in_executor(self._writer_thread, work)

    async def _on_reader(self, work: Callable[[Reader], T]) -> T:
        """Run on a reader thread; each has its own connection, so that reads never wait for the writer."""

        def run() -> T:
            reader = getattr(self._reader_local, "reader", None)
            if reader is None:
                reader = self._reader_local.reader = Reader(self._path)
                self._open_readers.append(reader)
            return work(reader)

        if self._readers is None or self._closed:
            raise UnavailableError("the store is closed")
        try:
            return await asyncio.get_running_loop().run_in_executor(self._readers, run)
        except (sqlite3.Error, OSError) as error:
            raise UnavailableError(f"cannot read {self._path}: {error}") from error

    # -- reading -----------------------------------------------------------------------------------------------------
    def _check_at(self, at: int) -> None:
        if at > self._revision:
            raise FutureRevisionError(at, self._revision)
        if at < self._compacted:
            raise CompactedError(at, self._compacted)

    async def get(self, key: str, *, at: int | None = None) -> Stored | None:
        revision = self._revision if at is None else at
        self._check_at(revision)
        if at is None and key not in self._index and self._committing is None:
            return None
        found = await self._on_reader(lambda reader: reader.get(key, revision))
        if at is not None:
            self._check_at(at)
        elif revision < self._compacted:
            return await self.get(key)
        return found

    async def scan(self, prefix: str, *, at: int | None = None, limit: int = 0, after: str | None = None) -> Page:
        revision = self._revision if at is None else at
        self._check_at(revision)
        items, remaining = await self._on_reader(lambda reader: reader.scan(prefix, revision, limit, after))
        # Compaction may have run meanwhile; then what was read may have holes.
        self._check_at(revision)
        return Page(revision, items, items[-1].key if remaining else None, remaining)

    async def _history(self, prefix: str, since: int) -> Sequence[Event]:
        self._check_at(since)
        until = self._revision
        events = await self._on_reader(lambda reader: reader.history(prefix, since, until))
        self._check_at(since)
        return events

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        return self._publisher.subscribe(subscriber)

    def watch(self, prefix: str, *, since: int) -> AbstractAsyncContextManager[EventStream]:
        return self._streams.watch(prefix, since=since)

    # -- writing -----------------------------------------------------------------------------------------------------
    async def put(self, key: str, value: bytes, *, expected: int, lease_seconds: int = 0) -> Put:
        return await self._write(key, value, expected, lease_seconds)

    async def remove(self, key: str, *, expected: int) -> Put:
        return await self._write(key, None, expected, 0)

    async def _write(self, key: str, value: bytes | None, expected: int, lease_seconds: int) -> Put:
        future = self._submit(key, value, expected, lease_seconds)
        if future is not None:
            return await future
        # Lost. The winner may be still on its way to the disk: nobody may see its value before it is durable.
        if self._committing is not None or self._pending.rows:
            await self._barrier()
        current = await self.get(key)
        return Put(False, current.revision if current is not None else 0, current)

    def _submit(self, key: str, value: bytes | None, expected: int, lease_seconds: int) -> asyncio.Future[Put] | None:
        """Decide the compare-and-swap and queue the row; None means lost."""
        if self._closed:
            raise UnavailableError("the store is closed")
        index = self._index
        current = index.get(key, 0)
        if (expected != current and expected != ANY) or (value is None and not current):
            return None
        self._last = revision = self._last + 1
        expires_at = clock.now() + lease_seconds if lease_seconds else 0.0
        pending = self._pending
        pending.rows.append((revision, key, current, value is None, expires_at, value))
        pending.events.append(Event(key, value, revision, current, None))
        pending.undo.append((key, current))
        if value is None:
            del index[key]
        else:
            index[key] = revision
            pending.value_bytes += len(value)
            if lease_seconds:
                pending.leases.append((key, revision, expires_at))
        loop = self._loop
        future: asyncio.Future[Put] = loop.create_future()
        pending.futures.append(future)
        if self._committing is None and not self._flush_planned:
            # Not at once: whatever else this turn of the loop brings belongs to the same commit.
            self._flush_planned = True
            self._idle.clear()
            loop.call_soon(self._flush)
        return future

    async def _barrier(self) -> None:
        """Wait until everything queued now is committed or failed."""
        batch = self._pending if self._pending.rows else self._committing
        if batch is not None and batch.futures:
            await asyncio.wait((batch.futures[-1],))

    def _flush(self) -> None:
        self._flush_planned = False
        if not self._pending.rows:
            self._idle.set()
            return
        batch, self._pending = self._pending, _Pending()
        self._committing = batch
        assert self._writer_thread is not None
        assert self._writer is not None
        loop = asyncio.get_running_loop()
        self._writer_thread.submit(self._commit_on_writer, loop, self._writer, batch)

    def _commit_on_writer(self, loop: asyncio.AbstractEventLoop, writer: Writer, batch: _Pending) -> None:
        error: BaseException | None = None
        removed: dict[int, bytes] = {}
        try:
            removed = writer.commit(batch.rows)
        except (sqlite3.Error, OSError) as failure:
            error = failure
        loop.call_soon_threadsafe(self._committed, batch, removed, error)

    def _committed(self, batch: _Pending, removed: dict[int, bytes], error: BaseException | None) -> None:
        self._committing = None
        if error is not None:
            self._fail(batch, error)
        else:
            self._revision = batch.rows[-1][0]
            events = batch.events
            if removed:
                events = [event if event.value is not None else event._replace(previous_value=removed.get(event.revision)) for event in events]
            self._publisher.publish(events)
            for event, future in zip(events, batch.futures, strict=True):
                if not future.done():
                    future.set_result(Put(True, event.revision, None))
            for lease in batch.leases:
                self._leases.add(*lease)
            if self._retention.note(clock.now(), self._revision, batch.value_bytes) and not self._compacting and not self._closed:
                self._compact_due()
        if self._pending.rows:
            self._flush()
        else:
            self._idle.set()

    def _fail(self, batch: _Pending, error: BaseException) -> None:
        """Take back a failed batch and all that was decided on top of it."""
        follower, self._pending = self._pending, _Pending()
        for failed in (follower, batch):
            for key, previous in reversed(failed.undo):
                if previous:
                    self._index[key] = previous
                else:
                    self._index.pop(key, None)
        self._last = self._revision
        log.error("store commit failed", path=str(self._path), error=str(error), writes=len(batch.rows) + len(follower.rows))
        for future in (*batch.futures, *follower.futures):
            if not future.done():
                future.set_exception(UnavailableError(f"the store cannot write: {error}"))

    async def skip_to(self, revision: int) -> None:
        """Go on behind a revision, in a store that holds nothing yet (restore): revisions never go back for those who saw the old one."""
        if self._index or self._pending.rows or self._committing is not None:
            raise UnavailableError("the store is not empty")
        if revision <= self._last:
            return
        assert self._writer is not None
        writer = self._writer
        await self._on_writer(lambda: writer.skip_to(revision))
        self._last = self._revision = self._compacted = revision
        self._retention = History(self._limits, clock.now(), revision)

    def _expire(self, key: str, revision: int) -> None:
        if self._closed:
            return
        future = self._submit(key, None, revision, 0)
        if future is not None:
            # Nobody waits for it; should the disk be full, the key goes at the next start.
            future.add_done_callback(lambda done: done.cancelled() or done.exception())

    # -- compaction --------------------------------------------------------------------------------------------------
    def _plan_compaction(self) -> None:
        self._compacting = False
        if not self._closed:
            loop = asyncio.get_running_loop()
            self._compaction_timer = loop.call_later(COMPACTION_INTERVAL_SECONDS, self._compact_due)

    def _compact_due(self) -> None:
        self._compacting = True
        if self._compaction_timer is not None:
            self._compaction_timer.cancel()
        target = self._retention.compactable(clock.now(), self._revision)
        if target > self._compacted:
            self._begin_compaction(target, self._give_back)
        else:
            self._give_back()

    def _give_back(self) -> None:
        """Return free pages, a few at a time in turn with commits, until few are left; then plan the next compaction."""
        writer, thread, loop = self._writer, self._writer_thread, self._loop
        assert writer is not None
        assert thread is not None
        quiet = self._revision - self._settled < QUIET_REVISIONS
        self._settled = self._revision

        def step() -> None:
            more = False
            try:
                more = writer.give_back(quiet=quiet)
            except sqlite3.Error as error:
                log.warning("store file was not tidied", path=str(self._path), error=str(error))
            loop.call_soon_threadsafe(after, more)

        def after(more: bool) -> None:
            if more and not self._closed:
                submit()
            else:
                self._plan_compaction()

        def submit() -> None:
            try:
                thread.submit(step)
            except RuntimeError:
                self._plan_compaction()

        submit()

    async def compact(self, revision: int) -> None:
        if revision > self._revision:
            raise FutureRevisionError(revision, self._revision)
        if revision <= self._compacted:
            return
        loop = asyncio.get_running_loop()
        finished: asyncio.Future[None] = loop.create_future()
        self._begin_compaction(revision, lambda: None if finished.done() else finished.set_result(None))
        await finished

    def _begin_compaction(self, target: int, then: Callable[[], None]) -> None:
        """Refuse older reads from now on, then delete in steps that take turns with commits on the writer thread."""
        done = self._compacted
        self._compacted = target
        loop = asyncio.get_running_loop()

        def stepped(step: CompactionStep | None) -> None:
            if step is None or step.done >= target or self._closed:
                then()
            else:
                start(step.done)

        def start(after: int) -> None:
            writer, thread = self._writer, self._writer_thread
            assert writer is not None
            assert thread is not None

            def run() -> None:
                step: CompactionStep | None = None
                try:
                    step = writer.compact_step(after, target)
                except sqlite3.Error as error:
                    log.warning("store compaction failed", path=str(self._path), error=str(error))
                loop.call_soon_threadsafe(stepped, step)

            try:
                thread.submit(run)
            except RuntimeError:
                then()

        start(done)
