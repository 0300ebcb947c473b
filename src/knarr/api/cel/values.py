"""Values of expressions: Python's own for the JSON types, small classes for the rest; equality, order and type names.

int is CEL's int; uint is UInt, so that 1u keeps its type. bool is no number here: every function asks for it first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from knarr.api.cel.errors import EvalError

INT_MIN, INT_MAX, UINT_MAX = -(1 << 63), (1 << 63) - 1, (1 << 64) - 1


class UInt(int):
    """An unsigned integer."""

    __slots__ = ()


class Duration(int):
    """Nanoseconds."""

    __slots__ = ()

    def __str__(self) -> str:
        seconds, rest = divmod(abs(int(self)), 1_000_000_000)
        fraction = f".{rest:09d}".rstrip("0") if rest else ""
        return f"{'-' if self < 0 else ''}{seconds}{fraction}s"


class Timestamp(int):
    """Nanoseconds since the epoch."""

    __slots__ = ()

    def datetime(self) -> datetime:
        seconds, rest = divmod(int(self), 1_000_000_000)
        return datetime.fromtimestamp(0, UTC) + timedelta(seconds=seconds, microseconds=rest // 1000)

    def __str__(self) -> str:
        rest = int(self) % 1_000_000_000
        fraction = f".{rest:09d}".rstrip("0") if rest else ""
        return self.datetime().strftime("%Y-%m-%dT%H:%M:%S") + fraction + "Z"


class TypeValue:
    """A type as a value, as type(x) gives it."""

    __slots__ = ("name",)

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TypeValue) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)


class Optional:
    """optional.of(x) or optional.none()."""

    __slots__ = ("present", "value")

    def __init__(self, value: Any = None, *, present: bool = True) -> None:
        self.value = value
        self.present = present


NONE = Optional(present=False)


class Opaque:
    """Base of extension values; `type_name` is what type() and messages show. Subclasses define __eq__."""

    __slots__ = ()
    type_name = "opaque"


_DURATION = re.compile(r"(?:(\d+(?:\.\d*)?|\.\d+)(ns|us|µs|ms|s|m|h))")
_UNITS = {"ns": 1, "us": 1_000, "µs": 1_000, "ms": 1_000_000, "s": 1_000_000_000, "m": 60_000_000_000, "h": 3_600_000_000_000}
_RFC3339 = re.compile(r"(\d{4}-\d\d-\d\d[Tt]\d\d:\d\d:\d\d)(?:\.(\d{1,9}))?([Zz]|[+-]\d\d:\d\d)")


def parse_duration(text: str) -> Duration:
    """Parse Go's form: 1h30m, -2.5s, 0. Raises EvalError."""
    sign = -1 if text.startswith("-") else 1
    body = text[1:] if text[:1] in ("+", "-") else text
    if body == "0":
        return Duration(0)
    total = 0
    position = 0
    for match in _DURATION.finditer(body):
        if match.start() != position:
            break
        whole, _, fraction = match[1].partition(".")
        unit = _UNITS[match[2]]
        total += int(whole or 0) * unit + (int(fraction) * unit // 10 ** len(fraction) if fraction else 0)
        position = match.end()
    if not body or position != len(body):
        raise EvalError(f'time: invalid duration "{text}"')
    if total > INT_MAX:
        raise EvalError("duration overflow")
    return Duration(sign * total)


def parse_timestamp(text: str) -> Timestamp:
    """Parse RFC 3339. Raises EvalError."""
    match = _RFC3339.fullmatch(text)
    if match is None:
        raise EvalError(f'parsing time "{text}" as "2006-01-02T15:04:05Z07:00": cannot parse')
    try:
        moment = datetime.fromisoformat(match[1].upper() + match[3].upper().replace("Z", "+00:00"))
    except ValueError as error:
        raise EvalError(f'parsing time "{text}": {error}') from error
    nanos = int((match[2] or "0").ljust(9, "0"))
    return Timestamp(round((moment - datetime.fromtimestamp(0, UTC)).total_seconds()) * 1_000_000_000 + nanos)


def type_name(value: Any) -> str:
    """The CEL name of a value's type."""
    if value is None:
        return "null_type"
    if isinstance(value, bool):
        return "bool"
    for kind, name in _NAMES:
        if isinstance(value, kind):
            return name
    return value.type_name if isinstance(value, Opaque) else type(value).__name__


_NAMES: tuple[tuple[type, str], ...] = (
    (UInt, "uint"), (Duration, "google.protobuf.Duration"), (Timestamp, "google.protobuf.Timestamp"), (int, "int"), (float, "double"),
    (str, "string"), (bytes, "bytes"), (list, "list"), (tuple, "list"), (Mapping, "map"), (TypeValue, "type"), (Optional, "optional_type"),
)  # fmt: skip


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool | Duration | Timestamp)


def equals(left: Any, right: Any) -> bool:
    """Heterogeneous equality: numbers compare by value whatever their type, other types only with themselves."""
    if left is right:
        return not (isinstance(left, float) and left != left)
    if left is None or right is None:
        return False
    if isinstance(left, bool) or isinstance(right, bool):
        return isinstance(left, bool) and isinstance(right, bool) and left == right
    if is_number(left) and is_number(right):
        return bool(left == right)
    if isinstance(left, str) or isinstance(right, str):
        return isinstance(left, str) and isinstance(right, str) and left == right
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(equals(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        return len(left) == len(right) and all(key in right and equals(value, right[key]) for key, value in left.items())
    if isinstance(left, Optional) and isinstance(right, Optional):
        return left.present == right.present and (not left.present or equals(left.value, right.value))
    return type(left) is type(right) and bool(left == right)


def compare(left: Any, right: Any) -> int:
    """Order of two values of one kind. Raises EvalError."""
    if is_number(left) and is_number(right):
        return bool(left > right) - bool(left < right)
    for kind in (bool, str, bytes, Duration, Timestamp):
        if isinstance(left, kind) and isinstance(right, kind):
            # Strings compare by code point, which is also the order of their UTF-8 bytes.
            a: Any = left
            b: Any = right
            return bool(a > b) - bool(a < b)
    raise no_overload("_<_", left, right)


def no_overload(function: str, *args: Any) -> EvalError:
    shown = ", ".join(type_name(arg) for arg in args)
    return EvalError(f"no such overload: {function}({shown})")


def size(value: Any) -> int:
    """Length of strings (code points), bytes, lists and maps. Raises EvalError."""
    if isinstance(value, str | bytes | list | tuple) or (isinstance(value, Mapping)):
        return len(value)
    raise no_overload("size", value)


def is_zero(value: Any) -> bool:
    """Whether a value is the empty one of its type (optional.ofNonZeroValue)."""
    if value is None:
        return True
    if isinstance(value, bool | int | float):
        return not value
    if isinstance(value, str | bytes | list | tuple | Mapping):
        return len(value) == 0
    return False
