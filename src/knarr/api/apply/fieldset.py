"""Sets of field paths: the contents of managedFields. Pure values, never changed once made.

A set is a trie of plain dicts: path element -> subtree. The key MEMBER marks that the path which leads to a node is in
the set. Path elements are texts as in FieldsV1: "f:name", 'k:{"name":"c"}', "v:1", "i:0".

Source: structured-merge-diff fieldpath (set.go, serialize.go, element.go), KEP-555.
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import orjson

from knarr.api.errors import go_quote

MEMBER = "."
FieldSet = dict[str, Any]
EMPTY: FieldSet = {}
_IN: FieldSet = {MEMBER: True}


@lru_cache(maxsize=16384)
def key_element(*pairs: tuple[str, Any]) -> str:
    """The element of a list item with these key fields."""
    return "k:" + orjson.dumps(dict(pairs), option=orjson.OPT_SORT_KEYS).decode()


def value_element(value: Any) -> str:
    """The element of a set item."""
    return "v:" + orjson.dumps(value).decode()


_ORDER = {"f": "0", "k": "1", "v": "2", "i": "3"}


@lru_cache(maxsize=16384)
def canonical_element(element: str) -> str:
    """A path element with its JSON rewritten compactly.

    Raises:
      ValueError: not a path element.
    """
    kind, colon, rest = element.partition(":")
    if not colon:
        raise ValueError(f"missing colon: {element}")
    if kind == "k":
        return "k:" + orjson.dumps(orjson.loads(rest), option=orjson.OPT_SORT_KEYS).decode()
    if kind == "v":
        return "v:" + orjson.dumps(orjson.loads(rest)).decode()
    return element


def of_paths(*paths: tuple[str, ...]) -> FieldSet:
    """A set of field name paths: of_paths(("metadata", "name"), ("status",))."""
    root: FieldSet = {}
    for path in paths:
        node = root
        for name in path:
            node = node.setdefault(f"f:{name}", {})
        node[MEMBER] = True
    return root


def from_json(fields: Any) -> FieldSet:
    """Read FieldsV1.

    Raises:
      ValueError: not a FieldsV1 object.
    """
    if not isinstance(fields, dict):
        raise ValueError("fields are not an object")
    node: FieldSet = {}
    for element, child in fields.items():
        if element == MEMBER:
            node[MEMBER] = True
        elif element[1:2] == ":" and element[0] not in _ORDER:
            # What a later version may know is left out.
            continue
        else:
            node[canonical_element(element)] = from_json(child) if child else _IN
    return node


def _sort_key(element: str) -> str:
    return _ORDER.get(element[0], "4") + element


def to_json(node: FieldSet) -> dict[str, Any]:
    """Write FieldsV1."""
    made: dict[str, Any] = {}
    if MEMBER in node:
        made[MEMBER] = {}
    elements = [e for e in node if e != MEMBER]
    if len(elements) > 1:
        elements.sort(key=_sort_key)
    for element in elements:
        child = node[element]
        made[element] = {} if len(child) == 1 and MEMBER in child else to_json(child)
    return made


def union(a: FieldSet, b: FieldSet) -> FieldSet:
    if not a or a is b:
        return b
    if not b:
        return a
    made = dict(a)
    for element, child in b.items():
        mine = made.get(element)
        made[element] = child if mine is None or element == MEMBER else union(mine, child)
    return made


def intersection(a: FieldSet, b: FieldSet) -> FieldSet:
    made: FieldSet = {}
    for element, child in a.items():
        other = b.get(element)
        if other is None:
            continue
        if element == MEMBER:
            made[MEMBER] = True
        else:
            both = intersection(child, other)
            if both:
                made[element] = both
    return made


def difference(a: FieldSet, b: FieldSet) -> FieldSet:
    """Paths of a that are not in b; a path in b does not take along what lies below it."""
    if not a or not b:
        return a
    made: FieldSet = {}
    for element, child in a.items():
        other = b.get(element)
        if element == MEMBER:
            if other is None:
                made[MEMBER] = True
        elif other is None:
            made[element] = child
        else:
            rest = difference(child, other)
            if rest:
                made[element] = rest
    return made


def recursive_difference(a: FieldSet, b: FieldSet) -> FieldSet:
    """Paths of a that neither are in b nor lie below a path in b."""
    if not a or not b:
        return a
    made: FieldSet = {}
    for element, child in a.items():
        other = b.get(element)
        if element == MEMBER:
            if other is None:
                made[MEMBER] = True
        elif other is None:
            made[element] = child
        elif MEMBER not in other:
            rest = recursive_difference(child, other)
            if rest:
                made[element] = rest
    return made


def only_below(a: FieldSet, prefixes: FieldSet) -> FieldSet:
    """Paths of a that are in prefixes, lie below one of them, or lead to one; "*" in prefixes stands for any element."""
    made: FieldSet = {}
    for element, child in a.items():
        if element == MEMBER:
            continue
        other = prefixes.get(element) or prefixes.get("*")
        if other is None:
            continue
        if MEMBER in other:
            made[element] = child
        else:
            rest = only_below(child, other)
            if rest:
                made[element] = rest
    return made


def paths(node: FieldSet, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """All member paths, as tuples of elements, in serialization order."""
    if MEMBER in node:
        yield prefix
    for element in sorted((e for e in node if e != MEMBER), key=_sort_key):
        yield from paths(node[element], (*prefix, element))


def has(node: FieldSet, path: tuple[str, ...]) -> bool:
    """Whether a path is in the set."""
    here: FieldSet | None = node
    for element in path:
        here = here.get(element) if here else None
    return bool(here) and here is not None and MEMBER in here


def path_text(path: tuple[str, ...]) -> str:
    """A path for people: `.spec.containers[name="c"].image`."""
    return "".join(element_text(element) for element in path)


def element_text(element: str) -> str:
    kind, _, rest = element.partition(":")
    match kind:
        case "f":
            return f".{rest}"
        case "k":
            return "[" + ",".join(f"{k}={_value_text(v)}" for k, v in sorted(orjson.loads(rest).items())) + "]"
        case "v":
            return f"[={_value_text(orjson.loads(rest))}]"
    return f"[{rest}]"


def _value_text(value: Any) -> str:
    if isinstance(value, str):
        return go_quote(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    return orjson.dumps(value).decode()
