"""The one source of wall-clock time, and its forms on the wire.

Callers use `now()` for epoch seconds and plain asyncio for timers. With `follow_loop()`
installed, `now()` advances with the event loop's clock, so that virtual time (looptime)
moves timestamps and timers together.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import UTC, datetime

_source: Callable[[], float] = time.time


def now() -> float:
    """Give the present as seconds since the epoch."""
    return _source()


def follow_loop(start: float | None = None) -> None:
    """Make `now()` advance with the running loop's clock, from `start` (default: the real present)."""
    global _source
    loop = asyncio.get_running_loop()
    base = (time.time() if start is None else start) - loop.time()
    _source = lambda: base + loop.time()


def follow_system() -> None:
    """Make `now()` the system's clock again."""
    global _source
    _source = time.time


_cached: tuple[int, str] = (0, "1970-01-01T00:00:00Z")


def rfc3339(seconds: float) -> str:
    """Format epoch seconds as Time is on the wire: whole seconds, "Z"."""
    global _cached
    whole = int(seconds // 1)
    if _cached[0] != whole:
        _cached = (whole, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(whole)))
    return _cached[1]


def micro(seconds: float) -> str:
    """Format epoch seconds as MicroTime is on the wire: six digits of fraction, "Z"."""
    micros = round(seconds * 1_000_000)
    whole, rest = divmod(micros, 1_000_000)
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(whole)) + f".{rest:06d}Z"


def now_rfc3339() -> str:
    return rfc3339(now())


def now_micro() -> str:
    return micro(now())


def parse_rfc3339(text: str) -> float:
    """Parse a Time or MicroTime into epoch seconds.

    Raises:
      ValueError: the text is no RFC 3339 time with a zone.
    """
    parsed = datetime.fromisoformat(text)
    if parsed.tzinfo is None:
        raise ValueError(f"time {text!r} has no zone")
    return parsed.astimezone(UTC).timestamp()
