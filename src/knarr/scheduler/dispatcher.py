"""Runs the scheduler's API calls beside the scheduling loop, a bounded number at a time.

A call is a coroutine function with its arguments; it waits in line without being a task yet, so
that thousands of assumed pods cost little. Calls about one pod run one after another, in order:
a condition that was written late must not overwrite the binding's.

Bound: the line is as long as the pods assumed or refused and not yet written; the loop that fills
it is slowed by `full`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks

log = get_logger(__name__)

Call = Callable[..., Awaitable[None]]


class Dispatcher:
    """See the module.

    Args:
      workers: calls under way at the same time, at most.
    """

    def __init__(self, workers: int) -> None:
        self._tasks = Tasks()
        self._limit = workers
        self._running = 0
        self._line: deque[tuple[str, Call, tuple[Any, ...]]] = deque()
        self._busy: dict[str, deque[tuple[str, Call, tuple[Any, ...]]]] = {}
        self.idle = asyncio.Event()
        """Set while no call is in line or under way."""
        self.idle.set()

    def submit(self, key: str, call: Call, *args: Any) -> None:
        """Put a call in line; calls with the same key never overlap."""
        self._line.append((key, call, args))
        if self._running < self._limit:
            self._running += 1
            self.idle.clear()
            self._tasks.spawn(self._work(), "scheduler-api-call")

    def __len__(self) -> int:
        return len(self._line)

    @property
    def full(self) -> bool:
        """The API cannot keep up: the loop had better let it."""
        return len(self._line) > 8 * self._limit

    async def _work(self) -> None:
        try:
            while self._line:
                entry = self._line.popleft()
                key = entry[0]
                waiting = self._busy.get(key)
                if waiting is not None:
                    waiting.append(entry)
                    continue
                waiting = self._busy[key] = deque()
                try:
                    await self._run(entry)
                    while waiting:
                        await self._run(waiting.popleft())
                finally:
                    del self._busy[key]
        finally:
            self._running -= 1
            if not self._running:
                self.idle.set()

    async def _run(self, entry: tuple[str, Call, tuple[Any, ...]]) -> None:
        try:
            await entry[1](*entry[2])
        except Exception as error:
            log.error("API call of the scheduler failed", key=entry[0], error=repr(error), exc_info=error)

    async def close(self) -> None:
        self._line.clear()
        await self._tasks.close()
