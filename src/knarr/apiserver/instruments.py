"""Counters and histograms with labels, rendered as Prometheus' text; for whatever is not counted by metrics.py itself.

A caller that counts often keeps the `Histogram` of its labels, so that an observation costs one call and a few additions.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

MOST_SERIES = 5000


def label_text(names: Sequence[str], values: Sequence[str]) -> str:
    """Return `name="value",…`, escaped."""
    return ",".join(f'{name}="{_escaped(value)}"' for name, value in zip(names, values, strict=True))


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


class Histogram:
    """Observations of one series."""

    __slots__ = ("bounds", "buckets", "count", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.count = 0
        self.total = 0.0
        self.buckets = [0] * (len(bounds) + 1)

    def observe(self, value: float, times: int = 1) -> None:
        self.count += times
        self.total += value * times
        self.buckets[bisect_left(self.bounds, value)] += times


class Histograms:
    """One metric: a histogram for each combination of labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str], bounds: Sequence[float]) -> None:
        self.name = name
        self._text = text
        self._labels = labels
        self._bounds = bounds
        self._series: dict[tuple[str, ...], Histogram] = {}
        if not labels:
            self._series[()] = Histogram(bounds)

    def at(self, *values: str) -> Histogram:
        """Return the histogram of these label values; beyond very many of them one that is not shown."""
        found = self._series.get(values)
        if found is None:
            found = Histogram(self._bounds)
            if len(self._series) < MOST_SERIES:
                self._series[values] = found
        return found

    def series(self) -> list[tuple[str, Histogram]]:
        """Return (labels as text, what was observed) of each series with observations."""
        return [(label_text(self._labels, values), one) for values, one in self._series.items() if one.count]

    def put(self, histogram: Histogram, *values: str) -> None:
        """Show a histogram that is kept elsewhere."""
        self._series[values] = histogram

    def lines(self) -> list[str]:
        shown = {values: series for values, series in self._series.items() if series.count or not self._labels}
        if not shown:
            return []
        name = self.name
        lines = [f"# HELP {name} {self._text}", f"# TYPE {name} histogram"]
        for values, series in shown.items():
            labels = label_text(self._labels, values)
            before = f"{labels}," if labels else ""
            running = 0
            for bound, count in zip(self._bounds, series.buckets, strict=False):
                running += count
                lines.append(f'{name}_bucket{{{before}le="{bound}"}} {running}')
            lines.append(f'{name}_bucket{{{before}le="+Inf"}} {series.count}')
            whole = f"{{{labels}}}" if labels else ""
            lines += [f"{name}_sum{whole} {series.total:.9f}", f"{name}_count{whole} {series.count}"]
        return lines


class Counters:
    """One metric: a number for each combination of labels."""

    def __init__(self, name: str, text: str, labels: Sequence[str] = (), *, kind: str = "counter") -> None:
        self.name = name
        self._text = text
        self._labels = labels
        self._kind = kind
        self._series: dict[tuple[str, ...], float] = {} if labels else {(): 0}

    def add(self, *values: str, by: float = 1) -> None:
        if values in self._series or len(self._series) < MOST_SERIES:
            self._series[values] = self._series.get(values, 0) + by

    def set(self, number: float, *values: str) -> None:
        self._series[values] = number

    def lines(self) -> list[str]:
        if not self._series:
            return []
        lines = [f"# HELP {self.name} {self._text}", f"# TYPE {self.name} {self._kind}"]
        for values, number in self._series.items():
            labels = label_text(self._labels, values)
            lines.append(f"{self.name}{{{labels}}} {number}" if labels else f"{self.name} {number}")
        return lines
