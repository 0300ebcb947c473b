"""Remembers which fields a new object sets, by its shape: most objects of a kind are alike, and working it out is slow.

Used by FieldManager.update on create. The shape holds everything that FieldsV1 of a create can depend on: all keys, and
inside of lists also the scalars, since items are known by their keys or values. Pure, bounded.
"""

from __future__ import annotations

from typing import Any

from knarr.api.types import Object

MOST_SHAPES = 1024


def shape(value: Any, listed: bool = False) -> Any:
    """Return a hashable that is equal for objects whose creation sets the same fields."""
    kind = value.__class__
    if kind is dict and not listed:
        # In C: keys in order, classes of values (None is not the same as a value), which of them are zero (those are as good as
        # not set where Go always writes the field), then the shapes of what is nested.
        values = value.values()
        classes = tuple(map(type, values))
        if dict in classes or list in classes:
            nested = [shape(each) for each in values if each.__class__ is dict or each.__class__ is list]
            return (tuple(value), classes, tuple(map(bool, values)), *nested)
        return (tuple(value), classes, tuple(map(bool, values)))
    if kind is dict:
        out: list[Any] = []
        for key, each in value.items():
            inner = each.__class__
            out.append(key)
            # 1 and True are equal, yet not the same field value.
            out.append(shape(each, True) if inner is dict or inner is list else (inner, each))
        return tuple(out)
    if kind is list:
        classes = tuple(map(type, value))
        if dict not in classes and list not in classes:
            return (list, classes, tuple(value))
        return (list, *[shape(each, True) for each in value])
    return (kind, value) if listed else value is None


class Shapes:
    """FieldsV1 by shape. What it gives is shared: never to be changed."""

    __slots__ = ("_known",)

    def __init__(self) -> None:
        self._known: dict[Any, Object] = {}

    def get(self, key: Any) -> Object | None:
        return self._known.get(key)

    def put(self, key: Any, fields: Object) -> None:
        if len(self._known) >= MOST_SHAPES:
            self._known.clear()
        self._known[key] = fields
