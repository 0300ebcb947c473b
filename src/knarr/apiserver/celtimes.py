"""How long expressions take to compile and to evaluate, by upstream's metric names; one count for the process, as there.

Source: apiserver pkg/cel/metrics.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter

from knarr.apiserver.instruments import Histogram, Histograms

_BOUNDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
_compilations = Histograms("apiserver_cel_compilation_duration_seconds", "[BETA] CEL compilation time in seconds.", (), _BOUNDS)
_evaluations = Histograms("apiserver_cel_evaluation_duration_seconds", "[BETA] CEL evaluation time in seconds.", (), _BOUNDS)
COMPILATION = _compilations.at()
EVALUATION = _evaluations.at()


@contextmanager
def timed(times: Histogram) -> Iterator[None]:
    """Count how long the body takes."""
    begin = perf_counter()
    try:
        yield
    finally:
        times.observe(perf_counter() - begin)


def lines() -> list[str]:
    """Return lines of the exposition format."""
    return [*_compilations.lines(), *_evaluations.lines()]
