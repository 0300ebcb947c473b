"""Memory is given back when it is asked for."""

from __future__ import annotations

import gc
import weakref

from knarr.aiokits import collector


class Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.itself = self


def test_garbage_in_cycles_goes_at_once_when_asked_for() -> None:
    gc.disable()
    try:
        knot = weakref.ref(Knot())
        assert knot() is not None
        collector.give_back()
        assert knot() is None
    finally:
        gc.enable()


def test_free_memory_returns_to_the_kernel() -> None:
    collector.keep_one_heap()
    held = [bytes(1000) for _ in range(100_000)]
    full = resident()
    last = held[-1]  # the top of the heap stays: what is below it goes all the same
    del held
    collector.give_back()
    assert resident() < full - (50 << 20)
    assert last


def resident() -> int:
    with open("/proc/self/smaps_rollup", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("Rss:")) * 1024
