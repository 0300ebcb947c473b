"""Sets of completion indexes, written "0-3,5,7-9".

Source: pkg/controller/job/indexed_job_utils.go.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from knarr.api import meta
from knarr.api.types import Object

INDEX = "batch.kubernetes.io/job-completion-index"


class Indexes:
    """An immutable ordered set of intervals."""

    __slots__ = ("_intervals",)

    def __init__(self, intervals: Iterable[tuple[int, int]] = ()) -> None:
        merged: list[tuple[int, int]] = []
        for first, last in sorted(intervals):
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        self._intervals = merged

    @classmethod
    def parse(cls, text: str, completions: int) -> Indexes:
        """Read the written form; indexes from `completions` on, and what is no number, are left out."""
        intervals = []
        for part in text.split(",") if text else ():
            low, _, high = part.partition("-")
            if not low.isdigit() or (high and not high.isdigit()):
                continue
            first, last = int(low), int(high or low)
            if first < completions:
                intervals.append((first, min(last, completions - 1)))
        return cls(intervals)

    @classmethod
    def of(cls, indexes: Iterable[int]) -> Indexes:
        return cls((index, index) for index in indexes)

    def __or__(self, other: Indexes) -> Indexes:
        return Indexes([*self._intervals, *other._intervals])

    def __contains__(self, index: int) -> bool:
        position = bisect_left(self._intervals, index, key=lambda interval: interval[1])
        return position < len(self._intervals) and self._intervals[position][0] <= index

    def __len__(self) -> int:
        return sum(last - first + 1 for first, last in self._intervals)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return iter(self._intervals)

    def __str__(self) -> str:
        parts = []
        for first, last in self._intervals:
            parts.append(str(first) if first == last else f"{first},{last}" if last == first + 1 else f"{first}-{last}")
        return ",".join(parts)

    def overlap(self, other: Indexes) -> int:
        """How many indexes are in both."""
        return sum(max(0, min(b, d) - max(a, c) + 1) for a, b in self for c, d in other)

    def first_missing(self, count: int, completions: int) -> list[int]:
        """The lowest `count` indexes below `completions` that are not in here."""
        missing: list[int] = []
        candidate = 0
        for first, last in self._intervals:
            while candidate < min(first, completions) and len(missing) < count:
                missing.append(candidate)
                candidate += 1
            candidate = max(candidate, last + 1)
        while candidate < completions and len(missing) < count:
            missing.append(candidate)
            candidate += 1
        return missing


def completion_index(pod: Object) -> int | None:
    """The index of an indexed Job's pod, None without a valid one."""
    text = meta.annotations(pod).get(INDEX, "")
    return int(text) if text.isdigit() else None
