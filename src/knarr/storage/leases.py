"""Removes keys whose lease has run out, in the embedded stores (etcd does it by itself).

One heap and one timer per store. A key that was written again since is left alone: its heap entry names the revision.
"""

from __future__ import annotations

import asyncio
import heapq
import time
from collections.abc import Callable

# Expiry is no precise business; collecting the due ones of a second in one commit is kinder to the disk.
_GRAIN_SECONDS = 1.0


class Leases:
    """The expiry times of one store's keys; `expire(key, revision)` is called on the event loop when due."""

    def __init__(self, expire: Callable[[str, int], None], *, clock: Callable[[], float] = time.time) -> None:
        self._expire = expire
        self._clock = clock
        self._heap: list[tuple[float, int, str]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._timer_at = 0.0
        self._closed = False

    def add(self, key: str, revision: int, expires_at: float) -> None:
        """Remember that this revision of the key ends at an epoch time."""
        heapq.heappush(self._heap, (expires_at, revision, key))
        if self._heap[0][1] == revision or self._timer is None:
            self._arm()

    def _arm(self) -> None:
        if self._closed or not self._heap:
            return
        due = self._heap[0][0]
        if self._timer is not None:
            if self._timer_at <= due:
                return
            self._timer.cancel()
        self._timer_at = due
        self._timer = asyncio.get_running_loop().call_later(max(due - self._clock(), 0) + _GRAIN_SECONDS / 2, self._fire)

    def _fire(self) -> None:
        self._timer = None
        limit = self._clock() + _GRAIN_SECONDS / 2
        while self._heap and self._heap[0][0] <= limit:
            _, revision, key = heapq.heappop(self._heap)
            self._expire(key, revision)
        self._arm()

    def close(self) -> None:
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
