"""Static types and the signatures of functions, as the checker knows them.

A type is a hashable value: a word ("int", "dyn", "quantity"), ("list", T), ("map", K, V), ("optional", T), ("type", T),
("param", name), or an ObjectType with named fields.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Type = Any
DYN, BOOL, INT, UINT, DOUBLE, STRING, BYTES, NULL = "dyn", "bool", "int", "uint", "double", "string", "bytes", "null_type"
DURATION, TIMESTAMP = "google.protobuf.Duration", "google.protobuf.Timestamp"
ERROR = "error"


@dataclass(frozen=True, eq=False)
class ObjectType:
    """An object whose fields are known; `fields` may be filled in later (recursive types)."""

    name: str
    fields: Mapping[str, Type] = field(default_factory=dict)


def shown(kind: Type) -> str:
    """A type as messages show it: list(int), map(string, dyn)."""
    if isinstance(kind, tuple):
        if kind[0] == "param":
            return str(kind[1])
        name = {"optional": "optional_type"}.get(kind[0], kind[0])
        return f"{name}({', '.join(shown(part) for part in kind[1:])})"
    return kind.name if isinstance(kind, ObjectType) else str(kind)


@dataclass(frozen=True, slots=True)
class Overload:
    """One signature; for methods the target is the first parameter."""

    params: tuple[Type, ...]
    result: Type


_WORDS = {
    "duration": DURATION, "timestamp": TIMESTAMP, "null": NULL, "quantity": "kubernetes.Quantity", "url": "kubernetes.URL", "ip": "net.IP",
    "cidr": "net.CIDR", "semver": "kubernetes.Semver", "format": "kubernetes.NamedFormat", "authorizer": "kubernetes.authorization.Authorizer",
    "pathcheck": "kubernetes.authorization.PathCheck", "groupcheck": "kubernetes.authorization.GroupCheck",
    "resourcecheck": "kubernetes.authorization.ResourceCheck", "decision": "kubernetes.authorization.Decision",
}  # fmt: skip
_PART = re.compile(r"\s*([A-Za-z_.]+|[(),])")


def parse_type(text: str) -> Type:
    """Read a type: int, list(A), map(string, dyn)."""
    tokens = _PART.findall(text)
    position = 0

    def read() -> Type:
        nonlocal position
        word = tokens[position]
        position += 1
        if position < len(tokens) and tokens[position] == "(" and word in ("list", "map", "optional", "type"):
            position += 1
            parts = [read()]
            while tokens[position] == ",":
                position += 1
                parts.append(read())
            position += 1
            return (word, *parts)
        if len(word) == 1 and word.isupper():
            return ("param", word)
        return _WORDS.get(word, word)

    return read()


def split_top(text: str) -> list[str]:
    """Split at commas outside parentheses."""
    parts: list[str] = []
    depth, start = 0, 0
    for index, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return [part.strip() for part in parts if part.strip()]


_SIGNATURE = re.compile(r"(?:(?P<target>[A-Za-z_]+(?:\([^)]*\))?)\.)?(?P<name>[A-Za-z_.@?\[\]:!&|<>=*/%+\-]+)\((?P<args>.*)\) (?P<result>\S.*)")


def parse_declarations(text: str, *, namespaces: frozenset[str] = frozenset()) -> dict[tuple[str, bool], list[Overload]]:
    """Read signatures, one a line: "size(string) int", "string.contains(string) bool".

    Args:
      namespaces: First words that belong to a function's name ("sets" in sets.contains), not to a target type.
    """
    out: dict[tuple[str, bool], list[Overload]] = {}
    for line in text.strip().splitlines():
        line = line.strip()
        if not line:
            continue
        head = line.split("(", 1)[0]
        first, dot, _ = head.partition(".")
        if dot and first in namespaces:
            name_end = len(head)
            arguments, _, result = line[name_end + 1 :].rpartition(") ")
            params = tuple(parse_type(part) for part in split_top(arguments))
            out.setdefault((head, False), []).append(Overload(params, parse_type(result)))
            continue
        match = _SIGNATURE.fullmatch(line)
        assert match is not None, line
        params = tuple(parse_type(part) for part in split_top(match["args"]))
        if match["target"]:
            params = (parse_type(match["target"]), *params)
        out.setdefault((match["name"], bool(match["target"])), []).append(Overload(params, parse_type(match["result"])))
    return out
