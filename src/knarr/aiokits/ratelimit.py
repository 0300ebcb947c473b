"""A token bucket on the event loop's clock."""

from __future__ import annotations

import asyncio


class RateLimit:
    """Token bucket: `per_second` tokens flow in, at most `burst` are held.

    `try_take` never waits; `take` waits its turn in the order of calls.
    """

    __slots__ = ("_tokens", "_updated", "burst", "per_second")

    def __init__(self, per_second: float, burst: int) -> None:
        self.per_second = per_second
        self.burst = burst
        self._tokens = float(burst)
        self._updated: float | None = None

    def _refill(self) -> None:
        present = asyncio.get_running_loop().time()
        if self._updated is not None:
            self._tokens = min(float(self.burst), self._tokens + (present - self._updated) * self.per_second)
        self._updated = present

    def try_take(self) -> bool:
        """Take a token if one is there."""
        self._refill()
        if self._tokens < 1.0:
            return False
        self._tokens -= 1.0
        return True

    def reserve_seconds(self) -> float:
        """Take a token in advance and give the seconds until it is really there (0: now)."""
        self._refill()
        self._tokens -= 1.0
        return max(0.0, -self._tokens / self.per_second)

    async def take(self) -> None:
        """Wait for a token. A cancelled wait gives its token back."""
        delay = self.reserve_seconds()
        if delay > 0:
            try:
                await asyncio.sleep(delay)
            except asyncio.CancelledError:
                self._tokens += 1.0
                raise
