"""One reconcile loop for every controller: keys in, one place that decides on outcomes.

Callers subclass or instantiate `Controller` with an async `reconcile(key)`; informer handlers
call `controller.queue.add(key)`. Invariants: one key at a time per controller; workers exist
only while there is work, so an idle controller costs nothing; a failure of one key leaves the
others alone.
Source: controller-runtime pkg/internal/controller (reconcileHandler).
"""

from __future__ import annotations

import asyncio
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from weakref import WeakSet

from knarr.aiokits.backoff import ItemBackoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.client.workqueue import WorkQueue
from knarr.http.errors import HTTPError

log = get_logger(__name__)

# A reconcile that hangs on a dead connection must not block its key for ever.
_RECONCILE_SECONDS = 300.0


@dataclass(frozen=True, slots=True)
class Result:
    """What a reconcile asks for besides success."""

    requeue_after_seconds: float | None = None
    """Run the key again after this long; None: only when something changes."""


class TerminalError(Exception):
    """Trying again cannot help: the failure is logged and the key forgotten."""


class WorkTimes:
    """How long keys were worked on, in upstream's buckets; and since when the present ones are."""

    __slots__ = ("counts", "running", "seconds")

    BOUNDS = tuple(1e-8 * 10**power for power in range(10))

    def __init__(self) -> None:
        self.counts = [0] * (len(self.BOUNDS) + 1)
        self.seconds = 0.0
        self.running: dict[str, float] = {}

    def end(self, key: str) -> None:
        took = time.monotonic() - self.running.pop(key)
        self.seconds += took
        self.counts[bisect_left(self.BOUNDS, took)] += 1


LIVE: WeakSet[Controller] = WeakSet()
"""All controllers of this process that have not gone, for its metrics."""


class Controller:
    """A work queue and the loop that works it.

    Args:
      name: upstream's name, for logs and metrics.
      reconcile: works one key ("namespace/name" or "name"); returns None or a Result.
      workers: keys worked on at the same time, at most.
      max_retries: failures in a row after which the key is dropped until it changes; None retries for ever.
    """

    def __init__(
        self,
        name: str,
        reconcile: Callable[[str], Awaitable[Result | None]],
        *,
        workers: int = 5,
        max_retries: int | None = None,
        backoff: ItemBackoff | None = None,
    ) -> None:
        self.name = name
        self.queue = WorkQueue(backoff)
        self.errors_total = 0
        self.reconciles_total = 0
        self.times = WorkTimes()
        self._reconcile = reconcile
        self._workers = workers
        self._max_retries = max_retries
        self._running = 0
        self._tasks = Tasks()
        self._started = False
        LIVE.add(self)

    def start(self) -> None:
        """Begin to work; call once caches are synced. Keys added before wait until now."""
        self._started = True
        self.queue.on_ready = self._ready
        for _ in range(min(len(self.queue), self._workers)):
            self._ready()

    def _ready(self) -> None:
        if self._started and self._running < self._workers:
            self._running += 1
            self._tasks.spawn(self._work(), f"{self.name}-worker")

    async def _work(self) -> None:
        try:
            while (key := self.queue.get_nowait()) is not None:
                self.times.running[key] = time.monotonic()
                try:
                    await self._handle(key)
                finally:
                    self.times.end(key)
                    self.queue.done(key)
        finally:
            self._running -= 1

    async def _handle(self, key: str) -> None:
        self.reconciles_total += 1
        try:
            async with asyncio.timeout(_RECONCILE_SECONDS):
                result = await self._reconcile(key)
        except TerminalError as error:
            self.errors_total += 1
            log.error("reconcile failed for good", controller=self.name, key=key, error=error)
            self.queue.forget(key)
        except Exception as error:
            self._failed(key, error)
        else:
            self.queue.forget(key)
            if result is not None and result.requeue_after_seconds is not None:
                self.queue.add_after(key, result.requeue_after_seconds)

    def _failed(self, key: str, error: Exception) -> None:
        self.errors_total += 1
        if self._max_retries is not None and self.queue.requeues(key) >= self._max_retries:
            log.warning("reconcile failed, giving up until the object changes", controller=self.name, key=key, error=error)
            self.queue.forget(key)
            return
        if isinstance(error, errors.StatusError) and (errors.is_conflict(error) or errors.is_not_found(error)):
            # The cache is behind; the coming event and a short back-off settle it.
            log.debug("reconcile met a newer object", controller=self.name, key=key, error=error)
        elif isinstance(error, errors.StatusError | HTTPError | OSError):
            log.info("reconcile failed, will retry", controller=self.name, key=key, error=error)
        else:
            log.error("reconcile failed, will retry", controller=self.name, key=key, error=repr(error), exc_info=error)
        self.queue.add_rate_limited(key)

    async def run(self) -> None:
        """Work until cancelled."""
        self.start()
        try:
            await asyncio.get_running_loop().create_future()
        finally:
            await self.stop()

    async def stop(self) -> None:
        """Cancel work in progress and join."""
        self._started = False
        self.queue.shutdown()
        await self._tasks.close()
