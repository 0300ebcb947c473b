"""What a CRD's rules can cost at most, so that no object can be written that makes the API server work for minutes.

Each rule's greatest cost, by the limits that the schema sets (maxItems, maxProperties, maxLength; else by what fits into a
request), times how often its place in the schema can occur in one object. A rule, and all rules of a version, have a limit.

Source: KEP-2876, apiextensions-apiserver pkg/apis/apiextensions/validation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.api import cel, errors
from knarr.api.cel import cost
from knarr.api.cel.cost import Size
from knarr.api.errors import FieldError
from knarr.api.types import Object
from knarr.apiserver.crd.escaping import escape

RULE_LIMIT = 10_000_000
TOTAL_LIMIT = 100_000_000
REQUEST_BYTES = 3 * 1024 * 1024
_TIMES = {"duration": (32, 3), "date": (12, 12), "date-time": (32, 21)}
"""Longest text, and the least number of bytes in JSON, of strings of these formats."""

Measured = tuple[Size, int]
"""The sizes of a schema's values, and the fewest bytes that one of them takes in JSON."""


def _measure(schema: Object, *, is_root: bool = False) -> Measured | None:
    """Return the sizes of a schema's values; None for what expressions cannot see."""
    if schema.get("x-kubernetes-int-or-string"):
        return Size("dyn", 0, _length(schema)), 1
    kind = schema.get("type")
    if kind == "array":
        items = _measure(schema.get("items") or {}, is_root=_embedded(schema.get("items")))
        if items is None:
            return None
        return cost.listed(_limit(schema, "maxItems", (REQUEST_BYTES - 2) // (items[1] + 1)), items[0]), 2
    if kind == "object":
        more = schema.get("additionalProperties")
        if isinstance(more, dict) and not is_root:
            values = _measure(more, is_root=_embedded(more))
            if values is None:
                return None
            most = _limit(schema, "maxProperties", (REQUEST_BYTES - 2) // (values[1] + 6))
            return Size("map", 0, most, values[0], cost.string(0)), 2
        return _measure_object(schema, is_root)
    if kind == "string":
        limits = _TIMES.get(schema.get("format") or "")
        if limits is not None:
            return Size("scalar", 0, limits[0]), limits[1]
        if schema.get("format") == "byte":
            return Size("bytes", 0, _limit(schema, "maxLength", REQUEST_BYTES - 2)), 2
        return cost.string(_length(schema)), 2
    least = {"boolean": 4, "number": 1, "integer": 1}.get(kind or "")
    return (Size("scalar", 0, 0), least) if least is not None else None


def _measure_object(schema: Object, is_root: bool) -> Measured:
    required = set(schema.get("required") or ())
    fields: dict[str, Size] = {}
    least = 2
    for name, part in (schema.get("properties") or {}).items():
        found = _measure(part, is_root=_embedded(part))
        if found is None:
            continue
        escaped = escape(name)
        if escaped is not None:
            fields[escaped] = found[0]
        if name in required and part.get("default") is None:
            least += len(name) + found[1] + 4
    if is_root:
        text = cost.string(REQUEST_BYTES - 2)
        fields |= {"apiVersion": text, "kind": text, "metadata": Size("object", 0, 0, fields={"name": text, "generateName": text})}
    return Size("object", 0, 0, fields=fields), least


def _embedded(schema: Any) -> bool:
    return isinstance(schema, dict) and bool(schema.get("x-kubernetes-embedded-resource"))


def _limit(schema: Object, name: str, otherwise: int) -> int:
    given = schema.get(name)
    return max(int(given), 0) if given is not None else otherwise


def _length(schema: Object) -> int:
    if schema.get("maxLength") is not None:
        return max(int(schema["maxLength"]), 0) * 4
    if schema.get("enum") and not schema.get("x-kubernetes-int-or-string"):
        return max((len(value.encode()) for value in schema["enum"] if isinstance(value, str)), default=0)
    return REQUEST_BYTES - 2


@dataclass(slots=True)
class Place:
    """A schema node: what its values are, and how often they can occur; None: as often as fits into a request."""

    schema: Object
    size: Size
    least_bytes: int
    often: int | None

    def child(self, schema: Object, name: str | None) -> Place | None:
        """The place of a property."""
        return _place(schema, self.often) if name is not None else None

    def each(self, schema: Object) -> Place | None:
        """The place of an item, or of a map's value."""
        most = self.schema.get("maxItems" if self.schema.get("type") == "array" else "maxProperties")
        often = self.often * max(int(most), 0) if self.often is not None and most is not None else None
        return _place(schema, often)

    @property
    def occurrences(self) -> int:
        return self.often if self.often is not None else REQUEST_BYTES // (self.least_bytes + 1)


def _place(schema: Object, often: int | None, *, is_root: bool = False) -> Place | None:
    found = _measure(schema, is_root=is_root or _embedded(schema))
    return Place(schema, found[0], found[1], often) if found is not None else None


def root(schema: Object) -> Place | None:
    """The place of the object itself."""
    return _place(schema, 1, is_root=True)


@dataclass(slots=True)
class Bill:
    """The costs of one version's rules."""

    total: int = 0
    dear: list[tuple[int, str]] = field(default_factory=list)
    """(cost, field path) of each rule that takes a hundredth of the limit or more."""

    def charge(self, place: Place, path: str, rule: cel.Program | None, message: cel.Program | None) -> list[FieldError]:
        """Add a rule; returns what is wrong with its cost."""
        sizes = {"self": place.size, "oldSelf": place.size}
        found: list[FieldError] = []
        if rule is not None:
            found += self._add(_greatest(rule, sizes) * place.occurrences, f"{path}.rule", "estimated rule cost")
        if message is not None:
            found += self._add(_greatest(message, sizes), f"{path}.messageExpression", "estimated messageExpression cost")
        return found

    def _add(self, amount: int, path: str, what: str) -> list[FieldError]:
        amount = min(amount, cost.LIMIT)
        self.total = min(self.total + amount, cost.LIMIT)
        if amount >= TOTAL_LIMIT // 100:
            self.dear = sorted([*self.dear, (amount, path)], reverse=True)[:4]
        return [errors.field_forbidden(path, _message(what, amount, RULE_LIMIT))] if amount > RULE_LIMIT else []

    def errors(self, path: str) -> list[FieldError]:
        """Return what is wrong with the sum."""
        if self.total <= TOTAL_LIMIT:
            return []
        each = "contributed to estimated rule cost total exceeding cost limit for entire OpenAPIv3 schema"
        whole = _message("x-kubernetes-validations estimated rule cost total for entire OpenAPIv3 schema", self.total, TOTAL_LIMIT)
        return [*(errors.field_forbidden(own, each) for _, own in self.dear), errors.field_forbidden(path, whole)]


def _greatest(program: cel.Program, sizes: Mapping[str, Size]) -> int:
    return cost.greatest_cost(program.node, sizes)


def _message(what: str, amount: int, limit: int) -> str:
    factor = amount / limit
    shown = "more than 100x" if factor > 100 else f"{factor:f}x" if factor < 1.5 else f"{factor:.1f}x"
    advice = "try simplifying the rule, or adding maxItems, maxProperties, and maxLength where arrays, maps, and strings are declared"
    return f"{what} exceeds budget by factor of {shown} ({advice})"
