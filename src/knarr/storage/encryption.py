"""Encryption at rest: a store around another one that keeps the values of some resources encrypted.

The first provider of a resource writes, all read; so a key is rotated by putting the new one first, or by the key management service.
What still lies under an old key, or in the clear, is written anew in the background: after the start, after another key has taken over, and after
the configuration has been read again. Nothing waits for a key management service but what needs a seed that it has not given yet.

Source: apiserver pkg/server/options/encryptionconfig, pkg/storage/value/transformer.go.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.storage.ciphers import MARK, DecryptionError, Transformer
from knarr.storage.encryption_config import Configuration, load_configuration
from knarr.storage.errors import CompactedError, StoreError, UnavailableError
from knarr.storage.kms import KMSProvider, Observer
from knarr.storage.protocol import Event, EventStream, Page, Put, RevisionStore, Stored, Subscriber

log = get_logger(__name__)

__all__ = ["DecryptionError", "EncryptedStore"]

_PAUSE_BETWEEN_REWRITES_SECONDS = 0.002
_RETRY_SECONDS = 10.0
_START_SECONDS = 60.0
"""How long the start waits for a key management service that holds the seed of something stored."""
_LEAST_TRIAL_SECONDS = 10.0
_EVENT_TRIES = 30


class _Concern(NamedTuple):
    """What is done about one resource."""

    resource: str
    transformers: tuple[Transformer, ...]
    plugins: tuple[KMSProvider, ...]
    """Those among them that must be asked for seeds."""


def _key_parts(key: str) -> tuple[str, str]:
    """(plural, group) of /registry/<group or core>/<plural>/...; ("", "") for other keys."""
    parts = key.split("/", 4)
    if len(parts) < 4 or parts[1] != "registry":
        return "", ""
    return parts[3], "" if parts[2] == "core" else parts[2]


class EncryptedStore:
    """RevisionStore that encrypts what its rules name, over another store."""

    def __init__(self, inner: RevisionStore, path: str | Path, observer: Observer | None = None) -> None:
        """Args:
        path: of the EncryptionConfiguration.

        Raises:
          ValueError, OSError: as load_configuration.
        """
        self._inner = inner
        self._path = path
        self._observer = observer or Observer()
        self._configuration = load_configuration(path, self._observer)
        self._concerns: dict[str, _Concern | None] = {}
        self._tasks = Tasks()
        self._subscribers: list[_Turn] = []
        self._rotating = True
        """Until every value is known to be under the first key."""
        self._rotate = asyncio.Event()

    def _concern(self, key: str) -> _Concern | None:
        """What is done about a key's value; None when it is kept as it is. Remembered per resource."""
        end = key.find("/", key.find("/", 10) + 1)
        prefix = key[:end] if end > 0 else key
        try:
            return self._concerns[prefix]
        except KeyError:
            plural, group = _key_parts(prefix + "/")
            transformers = self._configuration.transformers_of(plural, group) if plural else ()
            plugins = tuple(one for one in transformers if isinstance(one, KMSProvider))
            found = _Concern(f"{plural}.{group}" if group else plural, transformers, plugins) if transformers else None
            self._concerns[prefix] = found
            return found

    def _encrypt(self, key: str, value: bytes) -> bytes:
        concern = self._concern(key)
        if concern is None:
            return value
        first, begin = concern.transformers[0], perf_counter()
        failed = True
        try:
            stored = first.encrypt(key, value)
            failed = False
        finally:
            self._observer.transformed(concern.resource, "to_storage", first.label, failed, perf_counter() - begin)
        return stored

    def _decrypt(self, key: str, stored: bytes) -> bytes:
        concern = self._concern(key)
        if concern is None:
            return stored
        begin = perf_counter()
        trouble: DecryptionError | None = None
        for transformer in concern.transformers:
            if not transformer.prefix or not stored.startswith(transformer.prefix):
                continue
            try:
                value = transformer.decrypt(key, stored)
            except DecryptionError as error:
                # Another secret may go by the same name further below.
                trouble = error
            self._observer.transformed(concern.resource, "from_storage", transformer.label, trouble is not None, perf_counter() - begin)
            if trouble is None:
                return value
        if trouble is not None:
            raise trouble
        if stored.startswith(MARK):
            self._observer.transformed(concern.resource, "from_storage", "unknown", True, perf_counter() - begin)
            raise DecryptionError(f"{key}: no matching prefix found: the value's key is not configured")
        # Data from before encryption was switched on is read, whether identity is listed or not, and rewritten.
        self._observer.transformed(concern.resource, "from_storage", "identity", False, perf_counter() - begin)
        return stored

    def _wants(self, values: Iterable[tuple[str, bytes | None]]) -> dict[KMSProvider, list[bytes]]:
        """Return of which values the seed has to be asked for."""
        wanted: dict[KMSProvider, list[bytes]] = {}
        if not self._configuration.plugins:
            return wanted
        for key, value in values:
            concern = self._concern(key) if value is not None else None
            for plugin in concern.plugins if concern is not None else ():
                if value is not None and value.startswith(plugin.prefix) and plugin.lacks(value):
                    wanted.setdefault(plugin, []).append(value)
        return wanted

    async def _prepare(self, values: Iterable[tuple[str, bytes | None]]) -> None:
        """Ask for the seeds of values that shall be decrypted. Raises UnavailableError."""
        for plugin, stored in self._wants(values).items():
            for value in stored:
                if plugin.lacks(value):
                    await plugin.fetch(value)

    async def _open(self, stored: Stored | None) -> Stored | None:
        if stored is None:
            return None
        await self._prepare([(stored.key, stored.value)])
        return Stored(stored.key, self._decrypt(stored.key, stored.value), stored.revision)

    def _open_event(self, event: Event) -> Event:
        if self._concern(event.key) is None:
            return event
        value = None if event.value is None else self._decrypt(event.key, event.value)
        previous = None if event.previous_value is None else self._decrypt(event.key, event.previous_value)
        return event._replace(value=value, previous_value=previous)

    async def open_events(self, events: Sequence[Event]) -> list[Event]:
        """Return events decrypted. Raises DecryptionError, UnavailableError."""
        await self._prepare(_values(events))
        return [self._open_event(event) for event in events]

    # -- RevisionStore ---------------------------------------------------------------------------------------------
    @property
    def revision(self) -> int:
        return self._inner.revision

    @property
    def compacted(self) -> int:
        return self._inner.compacted

    def is_stale(self, key: str) -> bool:
        return self._rotating and self._concern(key) is not None

    @property
    def shared(self) -> bool:
        return self._inner.shared

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    async def catch_up(self) -> None:
        await self._inner.catch_up()
        for one in self._subscribers:
            await one.caught_up()

    async def start(self) -> None:
        await self._inner.start()
        await self._start_plugins(self._configuration)
        if self._configuration.plugins:
            await self._fetch_all()
        self._rotate.set()
        self._tasks.spawn_eternal(self._rewrite_forever(), "store-reencryption")

    async def _start_plugins(self, configuration: Configuration) -> None:
        for one in configuration.plugins:
            one.rotated = self._rotate.set
            await one.start()

    async def _fetch_all(self) -> None:
        """Ask for the seeds of all that is stored, which the caches want at once. Raises UnavailableError: a plugin does not come."""
        deadline = asyncio.get_running_loop().time() + _START_SECONDS
        after: str | None = None
        while True:
            page = await self._inner.scan("/registry/", limit=500, after=after)
            try:
                await self._prepare((item.key, item.value) for item in page.items)
            except UnavailableError as error:
                if asyncio.get_running_loop().time() > deadline:
                    raise
                log.warning("waiting for a key management service that has the key of stored values", error=str(error))
                await asyncio.sleep(1)
                continue
            if page.after is None:
                return
            after = page.after

    # -- configuration -----------------------------------------------------------------------------------------------
    @property
    def configuration_hash(self) -> str:
        return self._configuration.hash

    @property
    def has_plugins(self) -> bool:
        return bool(self._configuration.plugins)

    async def health(self) -> str:
        """Return what is wrong with key management services, "" when all are well."""
        troubles = [(index, await one.health()) for index, one in enumerate(self._configuration.plugins)]
        told = [f"kms-provider-{index}: {trouble}" for index, trouble in troubles if trouble]
        return "" if not told else told[0] if len(told) == 1 else f"[{', '.join(told)}]"

    async def reload(self) -> bool:
        """Read the configuration again and put it into force; False when it is the same.

        Raises:
          ValueError, OSError: as load_configuration, or a key management service that it names is not well; then the old one stays.
        """
        new = load_configuration(self._path, self._observer)
        old = self._configuration
        if new.hash == old.hash:
            return False
        try:
            await self._start_plugins(new)
            await self._wait_well(new)
        except BaseException:
            for one in new.plugins:
                await one.close()
            raise
        self._configuration = new
        self._concerns.clear()
        self._rotating = True
        self._rotate.set()
        if old.plugins:
            self._tasks.spawn(_close_later(old), "kms-close")
        return True

    @staticmethod
    async def _wait_well(configuration: Configuration) -> None:
        trouble = ""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(_LEAST_TRIAL_SECONDS, configuration.grace_seconds)):
                for one in configuration.plugins:
                    while trouble := await one.health():
                        await asyncio.sleep(0.1)
        if trouble:
            raise ValueError(f"health check for new transformers failed: {trouble}")

    async def wait_lost(self) -> None:
        await self._inner.wait_lost()

    async def close(self) -> None:
        await self._tasks.close()
        for one in self._configuration.plugins:
            await one.close()
        await self._inner.close()

    async def get(self, key: str, *, at: int | None = None) -> Stored | None:
        return await self._open(await self._inner.get(key, at=at))

    async def scan(self, prefix: str, *, at: int | None = None, limit: int = 0, after: str | None = None) -> Page:
        page = await self._inner.scan(prefix, at=at, limit=limit, after=after)
        await self._prepare((item.key, item.value) for item in page.items)
        try:
            return page._replace(items=[Stored(item.key, self._decrypt(item.key, item.value), item.revision) for item in page.items])
        except DecryptionError as error:
            if at is None or at >= self.revision:
                raise
            # Of a time before a key was given up: as good as compacted.
            raise CompactedError(at, self.revision) from error

    async def put(self, key: str, value: bytes, *, expected: int, lease_seconds: int = 0) -> Put:
        put = await self._inner.put(key, self._encrypt(key, value), expected=expected, lease_seconds=lease_seconds)
        return put if put.current is None else put._replace(current=await self._open(put.current))

    async def remove(self, key: str, *, expected: int) -> Put:
        put = await self._inner.remove(key, expected=expected)
        return put if put.current is None else put._replace(current=await self._open(put.current))

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        turn = _Turn(self, subscriber, self._tasks)
        self._subscribers.append(turn)
        cancel = self._inner.subscribe(turn)

        def end() -> None:
            cancel()
            self._subscribers.remove(turn)

        return end

    def opened_or_less(self, events: Sequence[Event]) -> list[Event]:
        """Return what can be read of events; the rest, by a server with other keys, only an operator can mend."""
        opened: list[Event] = []
        for event in events:
            try:
                opened.append(self._open_event(event))
            except DecryptionError as error:
                log.error("event cannot be decrypted", error=str(error))
        return opened

    def must_wait(self, events: Sequence[Event]) -> bool:
        """Whether a key management service has to be asked before events can be read."""
        return bool(self._wants(_values(events)))

    def watch(self, prefix: str, *, since: int) -> AbstractAsyncContextManager[EventStream]:
        return self._watch(prefix, since)

    @asynccontextmanager
    async def _watch(self, prefix: str, since: int) -> AsyncIterator[EventStream]:
        async with self._inner.watch(prefix, since=since) as stream:
            yield _OpenedStream(stream, self)

    async def compact(self, revision: int) -> None:
        await self._inner.compact(revision)

    # -- rotation --------------------------------------------------------------------------------------------------
    async def _rewrite_forever(self) -> None:
        while True:
            await self._rotate.wait()
            self._rotate.clear()
            self._rotating = True
            try:
                self._rotating = not await self._rewrite_stale()
            except StoreError as error:
                log.warning("values not encrypted anew, it is tried again", error=str(error))
                await asyncio.sleep(_RETRY_SECONDS)
                self._rotate.set()

    async def _rewrite_stale(self) -> bool:
        """Bring every value of the encrypted resources under the first key; False when some cannot be. Raises UnavailableError."""
        rewritten = failed = 0
        after: str | None = None
        while True:
            page = await self._inner.scan("/registry/", limit=500, after=after)
            for item in page.items:
                concern = self._concern(item.key)
                if concern is None or concern.transformers[0].is_current(item.value):
                    continue
                try:
                    opened = await self._open(item)
                    assert opened is not None
                    # Somebody who writes it meanwhile writes it under the first key.
                    await self._inner.put(item.key, self._encrypt(item.key, opened.value), expected=item.revision)
                except DecryptionError as error:
                    log.warning("value not encrypted anew", error=str(error))
                    failed += 1
                    continue
                rewritten += 1
                await asyncio.sleep(_PAUSE_BETWEEN_REWRITES_SECONDS)
            if page.after is None:
                break
            after = page.after
        if rewritten:
            log.info("values encrypted under the first key", count=rewritten)
        return not failed


async def _close_later(configuration: Configuration) -> None:
    """Let calls that are under way with its plugins end."""
    try:
        await asyncio.sleep(configuration.grace_seconds)
    finally:
        for one in configuration.plugins:
            await one.close()


def _values(events: Sequence[Event]) -> Iterable[tuple[str, bytes | None]]:
    for event in events:
        yield event.key, event.value
        yield event.key, event.previous_value


class _Turn:
    """One subscriber: events at once while they can be read, else in their turn when a key management service has answered."""

    def __init__(self, store: EncryptedStore, subscriber: Subscriber, tasks: Tasks) -> None:
        self._store = store
        self._subscriber = subscriber
        self._tasks = tasks
        self._waiting: deque[Sequence[Event]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def __call__(self, events: Sequence[Event]) -> None:
        if self._waiting or self._store.must_wait(events):
            self._waiting.append(events)
            if self._idle.is_set():
                self._idle.clear()
                self._tasks.spawn(self._go_on(), "store-events")
            return
        self._subscriber(self._store.opened_or_less(events))

    async def _go_on(self) -> None:
        while self._waiting:
            events = self._waiting[0]
            for _ in range(_EVENT_TRIES):
                try:
                    await self._store.open_events(events)
                    break
                except UnavailableError as error:
                    log.warning("events wait for a key management service", error=str(error))
                    await asyncio.sleep(1)
                except DecryptionError:
                    break
            self._subscriber(self._store.opened_or_less(events))
            self._waiting.popleft()
        self._idle.set()

    async def caught_up(self) -> None:
        """Wait until the subscriber has all that came."""
        await self._idle.wait()


class _OpenedStream:
    """An EventStream whose events are decrypted on the way; those under a key that has been given up are as good as compacted."""

    def __init__(self, inner: EventStream, store: EncryptedStore) -> None:
        self._inner = inner
        self._store = store

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        async for batch in self._inner:
            try:
                opened = await self._store.open_events(batch)
            except DecryptionError as error:
                raise CompactedError(batch[0].revision, batch[-1].revision) from error
            yield opened
