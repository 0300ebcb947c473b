"""The cycle collector, tuned for processes that hold many long-lived objects and make few cycles.

Python's defaults look at everything young after 700 allocations, and at the whole heap whenever it has grown by a quarter: for
caches of decoded objects, which are trees, that is work for nothing (6 % of a loaded API server). Callers: every process's main.
"""

from __future__ import annotations

import gc

_YOUNG_OBJECTS = 20_000
_OLDER_ROUNDS = 20


def relax() -> None:
    """Collect rarely. Cycles that became garbage may stay a little longer: a few megabytes at most."""
    gc.set_threshold(_YOUNG_OBJECTS, _OLDER_ROUNDS, _OLDER_ROUNDS)
