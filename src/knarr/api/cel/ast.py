"""Syntax tree of an expression. Macros are nodes of their own: they bind variables and evaluate lazily."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class Node:
    """Base; offset is the place in the source that messages point at."""

    offset: int


@dataclass(slots=True)
class Literal(Node):
    value: Any


@dataclass(slots=True)
class Ident(Node):
    name: str


@dataclass(slots=True)
class Select(Node):
    """operand.name; `optional` for operand.?name; `test` for has(operand.name)."""

    operand: Node
    name: str
    optional: bool = False
    test: bool = False


@dataclass(slots=True)
class Call(Node):
    """A function, a method (target set) or an operator such as _+_ ."""

    function: str
    target: Node | None
    args: list[Node]


@dataclass(slots=True)
class ListNode(Node):
    items: list[Node]
    optional: frozenset[int] = field(default_factory=frozenset)


@dataclass(slots=True)
class MapNode(Node):
    entries: list[tuple[Node, Node, bool]]
    """(key, value, optional)."""


@dataclass(slots=True)
class StructNode(Node):
    name: str
    fields: list[tuple[str, Node, bool]]


@dataclass(slots=True)
class Comprehension(Node):
    """A macro over a list or map: all, exists, existsOne, filter, map, transformList, transformMap, optMap, optFlatMap."""

    kind: str
    target: Node
    variables: list[str]
    condition: Node | None
    """The predicate, or the filter of a three-argument map."""
    result: Node | None
