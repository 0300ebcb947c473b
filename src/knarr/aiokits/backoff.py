"""Exponential delays between attempts, for one thing or per key.

Callers: reconnecting loops (`Backoff`), work queues (`ItemBackoff`). No jitter unless asked
for; the random source is injected so that tests are repeatable.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Hashable


class Backoff:
    """Growing delay for one retried activity.

    Args:
      initial_seconds: first delay.
      maximum_seconds: the delay never exceeds this (before jitter).
      factor: growth per attempt.
      reset_after_seconds: a pause this long between calls starts over; None never does.
      jitter: adds up to this fraction of the delay.
    """

    __slots__ = ("_current", "_last", "_random", "factor", "initial_seconds", "jitter", "maximum_seconds", "reset_after_seconds")

    def __init__(
        self,
        initial_seconds: float = 0.8,
        maximum_seconds: float = 30.0,
        factor: float = 2.0,
        reset_after_seconds: float | None = 120.0,
        *,
        jitter: float = 0.0,
        randomness: random.Random | None = None,
    ) -> None:
        self.initial_seconds = initial_seconds
        self.maximum_seconds = maximum_seconds
        self.factor = factor
        self.reset_after_seconds = reset_after_seconds
        self.jitter = jitter
        self._random = randomness or random.Random()
        self._current = 0.0
        self._last: float | None = None

    def next_seconds(self) -> float:
        """Count a failure and give the delay before the next attempt."""
        present = asyncio.get_running_loop().time()
        if self._last is not None and self.reset_after_seconds is not None and present - self._last > self.reset_after_seconds:
            self._current = 0.0
        self._current = min(self._current * self.factor, self.maximum_seconds) if self._current else self.initial_seconds
        self._last = present
        return self._current * (1 + self.jitter * self._random.random())

    def reset(self) -> None:
        self._current = 0.0

    async def sleep(self) -> None:
        """Wait for the next delay."""
        await asyncio.sleep(self.next_seconds())


class ItemBackoff:
    """Growing delay per key; keys live until `forget`."""

    __slots__ = ("_failures", "factor", "initial_seconds", "maximum_seconds")

    def __init__(self, initial_seconds: float = 0.005, maximum_seconds: float = 1000.0, factor: float = 2.0) -> None:
        self.initial_seconds = initial_seconds
        self.maximum_seconds = maximum_seconds
        self.factor = factor
        self._failures: dict[Hashable, int] = {}

    def next_seconds(self, key: Hashable) -> float:
        """Count a failure of the key and give its delay."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        # Beyond 60 doublings the power overflows nothing useful; the maximum rules anyway.
        return float(min(self.initial_seconds * self.factor ** min(failures, 60), self.maximum_seconds))

    def failures(self, key: Hashable) -> int:
        return self._failures.get(key, 0)

    def forget(self, key: Hashable) -> None:
        self._failures.pop(key, None)
