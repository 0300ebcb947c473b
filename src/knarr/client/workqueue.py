"""The work queue of controllers: keys, each at most once, never two workers on one key.

A key added while it is being worked on runs once more afterwards. Keys with a higher
priority come first, else first in, first out. Bound: the number of distinct keys, which the
informers' stores bound already; nothing is ever dropped.
Source: client-go util/workqueue; controller-runtime pkg/controller/priorityqueue.
"""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable

from knarr.aiokits.backoff import ItemBackoff


class QueueShutDown(Exception):
    """The queue takes and gives nothing more."""


class WorkQueue:
    """A deduplicating queue of string keys with delays, back-off and priorities."""

    __slots__ = ("_backoff", "_dirty", "_heap", "_processing", "_sequence", "_shut", "_timers", "_waiters", "_waiting", "adds_total", "on_ready", "retries_total")

    def __init__(self, backoff: ItemBackoff | None = None) -> None:
        self._backoff = backoff or ItemBackoff()
        self._waiting: dict[str, int] = {}
        self._heap: list[tuple[int, int, str]] = []
        self._processing: set[str] = set()
        self._dirty: dict[str, int] = {}
        self._timers: dict[str, tuple[float, asyncio.TimerHandle]] = {}
        self._waiters: list[asyncio.Future[None]] = []
        self._sequence = 0
        self._shut = False
        self.adds_total = 0
        self.retries_total = 0
        self.on_ready: Callable[[], None] | None = None
        """Called after a key became ready; lets an owner start workers on demand."""

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def busy(self) -> bool:
        """Whether a key waits or is being worked on; delayed keys do not count."""
        return bool(self._waiting or self._processing)

    def add(self, key: str, priority: int = 0) -> None:
        """Let the key be worked on soon."""
        if self._shut:
            return
        if key in self._processing:
            if priority > self._dirty.get(key, priority - 1):
                self._dirty[key] = priority
            return
        known = self._waiting.get(key)
        if known is not None and known >= priority:
            return
        self._waiting[key] = priority
        self.adds_total += known is None
        self._sequence += 1
        # A raised priority leaves the old heap entry behind; pop skips it.
        heapq.heappush(self._heap, (-priority, self._sequence, key))
        if known is None:
            self._wake()

    def add_after(self, key: str, seconds: float) -> None:
        """Add the key after a delay; of several delays the one that ends first rules."""
        if self._shut:
            return
        if seconds <= 0:
            self.add(key)
            return
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        # When it ends is kept beside: for less than a millisecond the loop gives a handle that knows no time.
        if (known := self._timers.get(key)) is not None:
            if known[0] <= due:
                return
            known[1].cancel()
        self._timers[key] = due, loop.call_later(seconds, self._fire, key)

    def _fire(self, key: str) -> None:
        self._timers.pop(key, None)
        self.add(key)

    def add_rate_limited(self, key: str) -> None:
        """Count a failure of the key and add it after its back-off."""
        self.retries_total += 1
        self.add_after(key, self._backoff.next_seconds(key))

    def forget(self, key: str) -> None:
        """The key succeeded: its back-off starts over."""
        self._backoff.forget(key)

    def requeues(self, key: str) -> int:
        return self._backoff.failures(key)

    def get_nowait(self) -> str | None:
        """Take the next key, or None when nothing is ready. Pair with `done`."""
        while self._heap:
            priority, _, key = heapq.heappop(self._heap)
            if self._waiting.get(key) == -priority:
                del self._waiting[key]
                self._processing.add(key)
                return key
        return None

    async def get(self) -> str:
        """Wait for the next key. Pair with `done`.

        Raises:
          QueueShutDown: shut down and nothing is left.
        """
        while (key := self.get_nowait()) is None:
            if self._shut:
                raise QueueShutDown
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.append(waiter)
            try:
                await waiter
            except asyncio.CancelledError:
                if waiter in self._waiters:
                    self._waiters.remove(waiter)
                elif self._waiting:
                    # Woken and cancelled at once: the wake-up belongs to someone else.
                    self._wake()
                raise
        return key

    def done(self, key: str) -> None:
        """Say that work on the key ended; it may be handed out again."""
        self._processing.discard(key)
        priority = self._dirty.pop(key, None)
        if priority is not None:
            self.add(key, priority)

    def shutdown(self) -> None:
        """Take nothing more, drop delayed keys, let waiting getters drain and end."""
        self._shut = True
        for _due, timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._waiters.clear()

    def _wake(self) -> None:
        while self._waiters:
            waiter = self._waiters.pop(0)
            if not waiter.done():
                waiter.set_result(None)
                return
        if self.on_ready is not None:
            self.on_ready()
