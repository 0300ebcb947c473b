"""One measured row: a median with its spread, and the reference beside it when one was measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Row:
    name: str
    unit: str
    values: list[float]
    reference: list[float] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    def line(self) -> str:
        text = f"{self.name}: {number(self.median)} {self.unit} ({number(min(self.values))} to {number(max(self.values))}, {len(self.values)} runs)"
        if self.reference:
            theirs = statistics.median(self.reference)
            text += f", reference {number(theirs)}" + (f", ratio {self.median / theirs:.2f}" if theirs else "")
        return text + (f"  {self.note}" if self.note else "")

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "unit": self.unit,
            "median": self.median,
            "values": self.values,
            "reference": self.reference,
            "note": self.note,
        }


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def table(rows: Sequence[Row]) -> str:
    """A Markdown table of all rows."""
    lines = ["| work | median | spread | unit | reference | ratio |", "| --- | ---: | --- | --- | ---: | ---: |"]
    for row in rows:
        theirs = statistics.median(row.reference) if row.reference else 0.0
        ratio = f"{row.median / theirs:.2f}" if theirs else ""
        lines.append(
            f"| {row.name}{' (' + row.note + ')' if row.note else ''} | {number(row.median)} | {number(min(row.values))} to {number(max(row.values))} | {row.unit} | {number(theirs) if theirs else ''} | {ratio} |"
        )
    return "\n".join(lines)
