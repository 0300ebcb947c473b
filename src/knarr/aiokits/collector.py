"""The cycle collector and the C library's heap, tuned for processes that hold many long-lived objects and make few cycles.

Python's defaults look at everything young after 700 allocations, and at the whole heap whenever it has grown by a quarter: for
caches of decoded objects, which are trees, that is work for nothing (6 % of a loaded API server). Callers: every process's main.
"""

from __future__ import annotations

import ctypes
import gc

_libc = ctypes.CDLL(None)
_set_option = getattr(_libc, "mallopt", None)
_trim = getattr(_libc, "malloc_trim", None)
"""glibc's; other libraries have none."""
_MOST_HEAPS = -8

_YOUNG_OBJECTS = 20_000
_OLDER_ROUNDS = 20


def relax() -> None:
    """Collect rarely. Cycles that became garbage may stay a little longer: a few megabytes at most."""
    gc.set_threshold(_YOUNG_OBJECTS, _OLDER_ROUNDS, _OLDER_ROUNDS)


def keep_one_heap() -> None:
    """For a process whose threads hardly run at the same time: a heap of the C library for each is memory for nothing."""
    if _set_option is not None:
        _set_option(_MOST_HEAPS, 1)


def give_back() -> None:
    """Collect all that is garbage now, and return what is free to the kernel. Takes some 20 ms: for after much has gone."""
    gc.collect()
    if _trim is not None:
        _trim(0)
