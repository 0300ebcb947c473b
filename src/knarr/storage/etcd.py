"""A store in etcd (3.4 or newer) over gRPC, for several API servers on one set of data.

A write is one transaction: compare the key's revision, put or delete, or read what stands there instead. One watch over everything feeds the
subscribers; a write is acknowledged only when that watch has delivered its revision, so that the writer finds it in the cache. Leases are
shared by keys of nearly the same lifetime, as upstream does. Old revisions are compacted every five minutes by whichever server is first.

Loops: the main watch (input: etcd's stream; reconnects from the last revision, with backoff), one task per open `watch` (bound: the
stream's buffer; full means cut off), one compaction timer.

Source: apiserver pkg/storage/etcd3/{store,watcher,compact,lease_manager}.go.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from knarr.aiokits import clock
from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.storage import etcd_wire as wire
from knarr.storage.errors import CompactedError, FutureRevisionError, StoreError, UnavailableError
from knarr.storage.protocol import ANY, Event, Page, Put, Stored, Subscriber
from knarr.storage.streams import Publisher, Stream

log = get_logger(__name__)

COMPACTION_SECONDS = 300.0
SIZE_SECONDS = 30.0
CALL_TIMEOUT_SECONDS = 10.0
_COMPACT_KEY = b"compact_rev_key"
_LEASE_REUSE_SECONDS = 60.0
_LEASE_REUSE_SHARE = 0.05
_LEASE_MOST_KEYS = 1000
_BUFFER_EVENTS = 10_000
_OPTIONS = [("grpc.max_receive_message_length", 1 << 30), ("grpc.max_send_message_length", 64 << 20), ("grpc.keepalive_time_ms", 30_000)]


@dataclass(frozen=True, slots=True, kw_only=True)
class EtcdConfig:
    """Where etcd is and how to log in."""

    endpoints: tuple[str, ...]
    """host:port of each member; the first one that answers is used."""
    prefix: str = ""
    """Put before every key."""
    tls: bool = False
    ca: str = ""
    cert: str = ""
    key: str = ""
    """PEM files."""


@dataclass(slots=True)
class _Lease:
    id: int
    expires_at: float
    keys: int


def _end(prefix: bytes) -> bytes:
    """The first key behind all that start with the prefix."""
    for index in range(len(prefix) - 1, -1, -1):
        if prefix[index] < 0xFF:
            return prefix[:index] + bytes([prefix[index] + 1])
    return b"\0"


class EtcdStore:
    """RevisionStore over etcd."""

    def __init__(self, config: EtcdConfig) -> None:
        self._config = config
        self._prefix = config.prefix.encode()
        self._channel: Any = None
        self._endpoint = 0
        self._revision = 0
        self._compacted = 0
        self._publisher = Publisher()
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []
        self._waiters = 0
        self._leases: dict[int, _Lease] = {}
        self._lease_turn = asyncio.Lock()
        self._streams: set[Stream] = set()
        self._tasks = Tasks()
        self._closed = True
        self._broken: StoreError | None = None
        self._lost = asyncio.Event()
        self._main_watch: Any = None
        self._main_turn = asyncio.Lock()
        self._size = 0
        self._sized_at = 0.0
        self._index_read: asyncio.Task[StoreError | None] | None = None
        """A question for etcd's newest revision that has not been sent yet: whoever asks now may share it."""

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
        return True

    async def start(self) -> None:
        failure: UnavailableError | None = None
        for _ in self._config.endpoints:
            self._open()
            try:
                answer = wire.range_answer(await self._call("KV/Range", wire.range_request(b"\0", count_only=True)))
                break
            except UnavailableError as error:
                failure = error
                await self._rotate()
        else:
            raise failure or UnavailableError("no etcd endpoint is configured")
        self._revision = answer.revision
        self._closed = False
        ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._tasks.spawn(self._follow(ready), "etcd-watch")
        await ready
        await self._ask_size()
        self._tasks.spawn(self._compact_for_ever(), "etcd-compaction")

    def _open(self) -> None:
        config = self._config
        target = config.endpoints[self._endpoint % len(config.endpoints)]
        if config.tls:
            pem = [Path(path).read_bytes() if path else None for path in (config.ca, config.key, config.cert)]
            self._channel = grpc.aio.secure_channel(target, grpc.ssl_channel_credentials(*pem), options=_OPTIONS)
        else:
            self._channel = grpc.aio.insecure_channel(target, options=_OPTIONS)

    async def _rotate(self) -> None:
        """Turn to the next member."""
        old = self._channel
        self._endpoint += 1
        self._open()
        if old is not None:
            await old.close()

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        await self._tasks.close()
        for stream in tuple(self._streams):
            stream.fail(UnavailableError("the store is closed"))
        for _, _, future in self._waiting:
            if not future.done():
                future.set_exception(UnavailableError("the store is closed"))
        if self._channel is not None:
            await self._channel.close()

    # -- calls -----------------------------------------------------------------------------------------------------
    async def _call(self, method: str, request: bytes) -> bytes:
        """One unary call. Raises UnavailableError, CompactedError, FutureRevisionError."""
        if self._broken is not None:
            raise self._broken
        call = self._channel.unary_unary(f"/etcdserverpb.{method}")
        try:
            answer: bytes = await call(request, timeout=CALL_TIMEOUT_SECONDS)
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._revision, self._compacted) from error
        return answer

    async def _read(self, request: bytes) -> wire.RangeAnswer:
        """A Range; tried once more at another member, as reading twice does no harm."""
        try:
            return wire.range_answer(await self._call("KV/Range", request))
        except UnavailableError:
            if self._closed or len(self._config.endpoints) < 2:
                raise
            await self._rotate()
            return wire.range_answer(await self._call("KV/Range", request))

    def _key(self, key: str) -> bytes:
        return self._prefix + key.encode()

    def _stored(self, item: wire.KeyValue) -> Stored:
        return Stored(item.key[len(self._prefix) :].decode(), item.value, item.mod_revision)

    # -- reading ---------------------------------------------------------------------------------------------------
    async def get(self, key: str, *, at: int | None = None) -> Stored | None:
        try:
            answer = await self._read(wire.range_request(self._key(key), revision=at or 0))
        except CompactedError as error:
            raise CompactedError(at or 0, error.compacted) from error
        return self._stored(answer.items[0]) if answer.items else None

    async def scan(self, prefix: str, *, at: int | None = None, limit: int = 0, after: str | None = None) -> Page:
        # The published revision, not etcd's newest: what is read fits with what subscribers have been handed.
        revision = self._revision if at is None else at
        first, end = self._key(prefix), _end(self._key(prefix))
        if after is not None:
            first = max(first, self._key(after) + b"\0")
        if first >= end and end != b"\0":
            return Page(revision, [], None, 0)
        try:
            answer = await self._read(wire.range_request(first or b"\0", range_end=end, limit=limit, revision=revision))
        except CompactedError as error:
            raise CompactedError(revision, error.compacted) from error
        items = [self._stored(item) for item in answer.items]
        remaining = answer.total - len(items)
        return Page(revision, items, items[-1].key if remaining else None, remaining)

    @property
    def size_bytes(self) -> int:
        """As of the last question, at most SIZE_SECONDS ago while somebody asks."""
        now = clock.now()
        if not self._closed and now - self._sized_at > SIZE_SECONDS:
            self._sized_at = now
            self._tasks.spawn(self._ask_size(), "etcd-size")
        return self._size

    async def _ask_size(self) -> None:
        try:
            self._size = wire.status_size(await self._call("Maintenance/Status", b""))
        except StoreError as error:
            log.warning("etcd does not tell its size", error=str(error))

    async def catch_up(self) -> None:
        # The answer must be younger than the call: a question that is under way already is of no use, one still to be sent is.
        if self._index_read is None:
            self._index_read = self._tasks.spawn(self._catch_up(), "etcd-read-index")
        failure = await asyncio.shield(self._index_read)
        if failure is not None:
            raise failure

    async def _catch_up(self) -> StoreError | None:
        """Ask for the newest revision, by quorum, and wait until the main watch has come so far."""
        self._index_read = None
        try:
            revision = (await self._read(wire.range_request(b"\0", count_only=True))).revision
            if revision > self._revision and self._prefix:
                # Writes of others under another prefix raise the revision too; of these the watch tells only when asked.
                await self._ask_progress()
            async with asyncio.timeout(CALL_TIMEOUT_SECONDS):
                await self._published(revision)
        except TimeoutError:
            return UnavailableError("etcd: the watch does not keep up")
        except StoreError as error:
            return error
        return None

    async def _ask_progress(self) -> None:
        async with self._main_turn:
            if self._main_watch is not None:
                try:
                    await self._main_watch.write(wire.watch_progress_request())
                except (grpc.aio.AioRpcError, asyncio.InvalidStateError) as error:
                    raise UnavailableError(f"etcd: the watch is interrupted: {error}") from error

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        return self._publisher.subscribe(subscriber)

    # -- writing ---------------------------------------------------------------------------------------------------
    async def put(self, key: str, value: bytes, *, expected: int, lease_seconds: int = 0) -> Put:
        name = self._key(key)
        lease = await self._lease(lease_seconds) if lease_seconds else 0
        compares = [] if expected == ANY else [wire.compare_mod(name, expected)]
        return await self._txn(compares, wire.put_operation(name, value, lease), name)

    async def remove(self, key: str, *, expected: int) -> Put:
        name = self._key(key)
        compares = [wire.compare_exists(name)]
        if expected != ANY:
            compares.append(wire.compare_mod(name, expected))
        return await self._txn(compares, wire.delete_operation(name), name)

    async def _txn(self, compares: list[bytes], operation: bytes, key: bytes) -> Put:
        if self._closed:
            raise UnavailableError("the store is closed")
        request = wire.txn_request(compares, [operation], [wire.range_operation(key)])
        answer = wire.txn_answer(await self._call("KV/Txn", request))
        if answer.succeeded:
            await self._published(answer.revision)
            return Put(True, answer.revision, None)
        if answer.found is not None:
            # Whoever lost should find the winner in the cache.
            await self._published(answer.found.mod_revision)
        current = self._stored(answer.found) if answer.found is not None else None
        return Put(False, current.revision if current is not None else 0, current)

    async def _published(self, revision: int) -> None:
        """Wait until subscribers have been handed a revision."""
        if revision <= self._revision:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiters += 1
        heapq.heappush(self._waiting, (revision, self._waiters, future))
        await future

    async def _lease(self, seconds: int) -> int:
        """Return a lease that lasts at least so long, shared among keys of about the same lifetime."""
        async with self._lease_turn:
            now = clock.now()
            known = self._leases.get(seconds)
            if known is not None and known.keys < _LEASE_MOST_KEYS and known.expires_at >= now + seconds:
                known.keys += 1
                return known.id
            reuse = min(_LEASE_REUSE_SECONDS, seconds * _LEASE_REUSE_SHARE)
            granted = wire.lease_id(await self._call("Lease/LeaseGrant", wire.lease_grant_request(int(seconds + reuse))))
            self._leases[seconds] = _Lease(granted, now + int(seconds + reuse), 1)
            return granted

    # -- watching --------------------------------------------------------------------------------------------------
    async def _events(self, prefix: bytes, since: int, *, main: bool = False) -> AsyncIterator[wire.WatchAnswer]:
        """Answers of one watch over a prefix from a revision on."""
        call = self._channel.stream_stream("/etcdserverpb.Watch/Watch")()
        try:
            await call.write(wire.watch_create_request(prefix or b"\0", _end(prefix) if prefix else b"\0", since + 1))
            if main:
                self._main_watch = call
            while True:
                body = await call.read()
                if body is grpc.aio.EOF:
                    raise UnavailableError("etcd ended the watch")
                answer = wire.watch_answer(body)
                if answer.compact_revision:
                    raise CompactedError(since, answer.compact_revision)
                if answer.cancelled:
                    raise UnavailableError(f"etcd cancelled the watch: {answer.reason}")
                yield answer
        except grpc.aio.AioRpcError as error:
            raise _translated(error, self._revision, self._compacted) from error
        finally:
            if main:
                self._main_watch = None
            call.cancel()

    def _convert(self, events: Sequence[wire.WatchEvent]) -> list[Event]:
        out: list[Event] = []
        cut = len(self._prefix)
        for event in events:
            item, previous = event.item, event.previous
            before = previous.mod_revision if previous is not None else 0
            key = item.key[cut:].decode()
            value = None if event.deleted else item.value
            out.append(Event(key, value, item.mod_revision, before, previous.value if previous is not None else None))
        return out

    async def _follow(self, ready: asyncio.Future[None]) -> None:
        """The main watch: hands everything to subscribers, for ever."""
        backoff = Backoff(initial_seconds=0.1, maximum_seconds=5.0, factor=2.0, reset_after_seconds=30.0)
        while True:
            try:
                async for answer in self._events(self._prefix, self._revision, main=True):
                    if not ready.done():
                        ready.set_result(None)
                    self._take(answer)
            except CompactedError as error:
                # Events are lost for good: caches above cannot be right any more, and only a restart fills them again.
                self._broken = UnavailableError(f"the watch fell behind etcd's compaction: {error}")
                log.error("etcd watch is lost", error=str(error))
                self._lost.set()
                return
            except UnavailableError as error:
                log.warning("etcd watch interrupted", error=str(error))
                await backoff.sleep()
                if len(self._config.endpoints) > 1:
                    await self._rotate()

    def _take(self, answer: wire.WatchAnswer) -> None:
        if answer.events:
            events = self._convert(answer.events)
            self._revision = events[-1].revision
            self._publisher.publish(events)
        elif not answer.created and not answer.fragment and answer.revision > self._revision:
            # Progress: nothing of ours happened up to here.
            self._revision = answer.revision
        waiting = self._waiting
        while waiting and waiting[0][0] <= self._revision:
            _, _, future = heapq.heappop(waiting)
            if not future.done():
                future.set_result(None)

    @asynccontextmanager
    async def watch(self, prefix: str, *, since: int) -> AsyncIterator[Stream]:
        if since > self._revision:
            raise FutureRevisionError(since, self._revision)
        # etcd says only after the watch has been made that its start is compacted; a read says it at once.
        try:
            await self._read(wire.range_request(self._key(prefix) or b"\0", revision=max(since, 1), count_only=True))
        except CompactedError as error:
            raise CompactedError(since, max(error.compacted, self._compacted)) from error
        stream = Stream(prefix, _BUFFER_EVENTS)
        opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        task = self._tasks.spawn(self._feed(stream, self._key(prefix), since, opened), "etcd-stream")
        self._streams.add(stream)
        try:
            await opened
            yield stream
        finally:
            task.cancel()
            self._streams.discard(stream)

    async def _feed(self, stream: Stream, prefix: bytes, since: int, opened: asyncio.Future[None]) -> None:
        try:
            async for answer in self._events(prefix, since):
                if answer.events:
                    stream.feed(self._convert(answer.events))
                if not opened.done():
                    opened.set_result(None)
        except StoreError as error:
            if opened.done():
                stream.fail(error)
            else:
                opened.set_exception(error)

    # -- compaction --------------------------------------------------------------------------------------------------
    async def compact(self, revision: int) -> None:
        if revision > self._revision:
            raise FutureRevisionError(revision, self._revision)
        if revision <= self._compacted:
            return
        try:
            await self._call("KV/Compact", wire.compaction_request(revision))
        except CompactedError as error:
            # Another server was faster.
            self._compacted = max(self._compacted, error.compacted, revision)
            return
        self._compacted = revision

    async def _compact_for_ever(self) -> None:
        """Compact to what was current one interval ago; the server that moves the shared key first does it for all."""
        marked, turn = self._revision, 0
        while True:
            await asyncio.sleep(COMPACTION_SECONDS)
            try:
                marked, turn = await self._compact_turn(marked, turn)
            except StoreError as error:
                log.warning("etcd compaction failed", error=str(error))

    async def _compact_turn(self, marked: int, turn: int) -> tuple[int, int]:
        request = wire.txn_request(
            [wire.compare_mod(_COMPACT_KEY, turn)], [wire.put_operation(_COMPACT_KEY, str(self._revision).encode(), 0)],
            [wire.range_operation(_COMPACT_KEY)],
        )  # fmt: skip
        answer = wire.txn_answer(await self._call("KV/Txn", request))
        if not answer.succeeded:
            # Somebody else compacts; remember their turn, in case they go away.
            return self._revision, answer.found.mod_revision if answer.found is not None else 0
        if marked > self._compacted:
            await self.compact(marked)
        return self._revision, answer.revision


def _translated(error: Any, revision: int, compacted: int) -> StoreError:
    text = error.details() or ""
    if "has been compacted" in text:
        return CompactedError(0, compacted)
    if "future revision" in text:
        return FutureRevisionError(revision + 1, revision)
    return UnavailableError(f"etcd: {text or error.code()}")
