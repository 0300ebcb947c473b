"""Watching without holes, for every store that can subscribe and read its history.

Order: subscribe first, read the backlog second, hand that out, then pass live events, dropping those at or below the
last revision handed out. The buffer of a stream is bounded: a reader that falls behind is cut off and must list again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from knarr.storage.errors import SlowWatcherError, UnavailableError
from knarr.storage.protocol import Event, Subscriber


class Publisher:
    """The subscribers of one store."""

    def __init__(self) -> None:
        self._subscribers: tuple[Subscriber, ...] = ()

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        self._subscribers = (*self._subscribers, subscriber)

        def cancel() -> None:
            self._subscribers = tuple(other for other in self._subscribers if other is not subscriber)

        return cancel

    def publish(self, events: Sequence[Event]) -> None:
        for subscriber in self._subscribers:
            subscriber(events)


class Stream:
    """An EventStream: one reader, fed from the event loop."""

    def __init__(self, prefix: str, buffer_events: int) -> None:
        self._prefix = prefix
        self._buffer_events = buffer_events
        self._batches: deque[Sequence[Event]] = deque()
        self._buffered = 0
        self._since = 0
        self._wakeup = asyncio.Event()
        self._failure: Exception | None = None

    def feed(self, events: Sequence[Event]) -> None:
        if self._failure is not None:
            return
        prefix = self._prefix
        mine = [event for event in events if event.key.startswith(prefix)]
        if not mine:
            return
        self._buffered += len(mine)
        if self._buffered > self._buffer_events:
            self.fail(SlowWatcherError(f"more than {self._buffer_events} events behind"))
            return
        self._batches.append(mine)
        self._wakeup.set()

    def fail(self, failure: Exception) -> None:
        self._failure = failure
        self._batches.clear()
        self._wakeup.set()

    def start(self, backlog: Sequence[Event], since: int) -> None:
        """Put the backlog in front of what came live meanwhile."""
        self._since = since
        if backlog:
            self._batches.appendleft(backlog)
            self._wakeup.set()

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        while True:
            while self._batches:
                batch = self._batches.popleft()
                self._buffered = max(0, self._buffered - len(batch))
                if batch[0].revision <= self._since:
                    batch = [event for event in batch if event.revision > self._since]
                if batch:
                    self._since = batch[-1].revision
                    yield batch
            if self._failure is not None:
                raise self._failure
            self._wakeup.clear()
            await self._wakeup.wait()


class Streams:
    """Opens streams over a publisher and a history; `close` ends them all."""

    def __init__(self, publisher: Publisher, history: Callable[[str, int], Awaitable[Sequence[Event]]], *, buffer_events: int = 10_000) -> None:
        self._publisher = publisher
        self._history = history
        self._buffer_events = buffer_events
        self._open: set[Stream] = set()

    @asynccontextmanager
    async def watch(self, prefix: str, *, since: int) -> AsyncIterator[Stream]:
        stream = Stream(prefix, self._buffer_events)
        cancel = self._publisher.subscribe(stream.feed)
        self._open.add(stream)
        try:
            stream.start(await self._history(prefix, since), since)
            yield stream
        finally:
            cancel()
            self._open.discard(stream)

    def close(self) -> None:
        for stream in tuple(self._open):
            stream.fail(UnavailableError("the store is closed"))
