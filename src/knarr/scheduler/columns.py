"""Columns over node rows: growable arrays, label values as codes, sets of taints as codes.

Every fact about nodes that plugins compare is a column indexed by the node's row, so that a
plugin decides for all nodes in a few array operations. Rows of removed nodes are reused.
Caller: `nodes`. Nothing here knows pods.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from knarr.scheduler.terms import NodeSelector, NodeTerm, Requirement, compare_integers

Ints = npt.NDArray[np.int64]
Codes = npt.NDArray[np.int32]
Bools = npt.NDArray[np.bool_]
Rows = npt.NDArray[np.intp]


def grown_ints(array: Ints, capacity: int, fill: int = 0) -> Ints:
    """Copy the array into a longer one along its last axis."""
    result = np.full((*array.shape[:-1], capacity), fill, dtype=np.int64)
    result[..., : array.shape[-1]] = array
    return result


class LabelColumn:
    """One label key over all rows: a small integer per distinct value, -1 where the label is absent."""

    __slots__ = ("_shared", "_uses", "codes", "numbers", "values")

    def __init__(self, capacity: int) -> None:
        self.codes: Codes = np.full(capacity, -1, dtype=np.int32)
        self.values: list[str] = []
        self.numbers: dict[str, int] = {}
        self._uses: list[int] = []
        self._shared = 0

    def grow(self, capacity: int) -> None:
        codes = np.full(capacity, -1, dtype=np.int32)
        codes[: len(self.codes)] = self.codes
        self.codes = codes

    def set(self, row: int, value: str | None) -> None:
        old = int(self.codes[row])
        if value is None:
            code = -1
        else:
            found = self.numbers.get(value)
            if found is None:
                found = self.numbers[value] = len(self.values)
                self.values.append(value)
                self._uses.append(0)
            code = found
            self._uses[code] += 1
            self._shared += self._uses[code] == 2
        if old >= 0:
            self._shared -= self._uses[old] == 2
            self._uses[old] -= 1
        self.codes[row] = code

    @property
    def size(self) -> int:
        """Number of codes ever given."""
        return len(self.values)

    @property
    def is_unique(self) -> bool:
        """No two nodes share a value (as with the host name): a domain is a row."""
        return not self._shared

    def where(self, values: Iterable[str]) -> Bools:
        """Rows whose value is one of these."""
        wanted = [self.numbers[v] for v in values if v in self.numbers]
        if not wanted:
            return np.zeros(len(self.codes), dtype=np.bool_)
        if len(wanted) == 1:
            same: Bools = self.codes == wanted[0]
            return same
        return np.isin(self.codes, np.array(wanted, dtype=np.int32))

    def compare(self, operator: str, bounds: tuple[str, ...]) -> Bools:
        wanted = [v for v in self.values if compare_integers(v, operator, bounds)]
        return self.where(wanted)

    def sums(self, per_row: npt.NDArray[Any], where: Bools | None = None) -> Ints:
        """Sum a column per value: result[code] for each code (rows without the label are left out)."""
        present = self.codes >= 0
        if where is not None:
            present &= where
        chosen = np.flatnonzero(present)
        return np.bincount(self.codes[chosen], weights=per_row[chosen], minlength=self.size).astype(np.int64)


class LabelColumns:
    """The label columns that somebody asked for, made on first use and kept current."""

    def __init__(self) -> None:
        self.capacity = 0
        self._columns: dict[str, LabelColumn] = {}
        self._labels: dict[int, dict[str, str]] = {}
        self._names: dict[int, str] = {}

    def grow(self, capacity: int) -> None:
        self.capacity = capacity
        for column in self._columns.values():
            column.grow(capacity)

    def set(self, row: int, name: str, labels: dict[str, str]) -> None:
        self._labels[row], self._names[row] = labels, name
        for key, column in self._columns.items():
            column.set(row, name if key == "" else labels.get(key))

    def clear(self, row: int) -> None:
        del self._labels[row], self._names[row]
        for column in self._columns.values():
            column.set(row, None)

    def column(self, key: str) -> LabelColumn:
        """Give the column of a label key; "" is the node's name."""
        column = self._columns.get(key)
        if column is None:
            column = self._columns[key] = LabelColumn(self.capacity)
            source = self._names.items() if key == "" else ((row, labels.get(key)) for row, labels in self._labels.items())
            for row, value in source:
                if value is not None:
                    column.set(row, value)
        return column

    def _requirement(self, requirement: Requirement) -> Bools:
        if requirement.field and requirement.key != "metadata.name":
            return np.zeros(self.capacity, dtype=np.bool_)
        column = self.column("" if requirement.field else requirement.key)
        if requirement.operator == "In":
            return column.where(requirement.values)
        if requirement.operator == "NotIn":
            return ~column.where(requirement.values)
        if requirement.operator == "Exists":
            return column.codes >= 0
        if requirement.operator == "DoesNotExist":
            return column.codes < 0
        if requirement.operator in ("Gt", "Lt"):
            return column.compare(requirement.operator, requirement.values)
        return np.zeros(self.capacity, dtype=np.bool_)

    def term(self, term: NodeTerm) -> Bools:
        """Rows that match one node selector term."""
        if not term.requirements:
            return np.zeros(self.capacity, dtype=np.bool_)
        result = self._requirement(term.requirements[0])
        for requirement in term.requirements[1:]:
            result = result & self._requirement(requirement)
        return result

    def matching(self, wanted: NodeSelector) -> Bools:
        """Rows that match nodeSelector and required affinity."""
        result = np.ones(self.capacity, dtype=np.bool_)
        for key, value in wanted.equal:
            result &= self.column(key).where((value,))
        if wanted.terms is not None:
            any_term = np.zeros(self.capacity, dtype=np.bool_)
            for term in wanted.terms:
                any_term |= self.term(term)
            result &= any_term
        return result
