"""Dataclasses to JSON and back, for the state that sandboxes and containers keep on disk.

Role: generic and small; the classes of cri.py are stored as they are. Unknown fields of a record are ignored and missing ones
take their defaults, so that a newer version of us may read an older record.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from enum import Enum
from functools import cache
from typing import Any, TypeVar

import orjson

T = TypeVar("T")


def encode(value: Any) -> bytes:
    """The JSON object of a dataclass (enums as their value, tuples as lists)."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS)


def to_record(value: Any) -> Any:
    """Plain JSON values of a dataclass."""
    return orjson.loads(encode(value))


def from_record(kind: type[T], record: Any) -> T:
    """Rebuild a dataclass from its record. Raises TypeError, ValueError or KeyError for one that does not fit."""
    result: T = _build(kind, record)
    return result


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = typing.get_type_hints(kind)
    return {item.name: hints[item.name] for item in dataclasses.fields(kind)}


def _build(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        hints = _hints(kind)
        return kind(**{name: _build(hints[name], item) for name, item in value.items() if name in hints})
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        if value is None:
            return None
        return _build(next(item for item in arguments if item is not type(None)), value)
    if origin is list:
        return [_build(arguments[0], item) for item in value]
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(_build(arguments[0], item) for item in value)
        return tuple(_build(item, part) for item, part in zip(arguments, value, strict=True))
    if origin is dict:
        return {key: _build(arguments[1], item) for key, item in value.items()}
    if isinstance(kind, type) and issubclass(kind, Enum):
        return kind(value)
    return value
