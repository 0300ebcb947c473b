"""Static cost: the most that an expression can cost, told from the largest values its variables can have.

A `Size` describes a variable's values: how long, and what their parts are. Walking the tree with sizes in the place of values
gives each part's greatest cost, and the size of its result. Where nothing is known, a size is UNKNOWN and what walks over it
costs more than any budget. The numbers are a promise to authors of custom resources: what is accepted, stays accepted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from knarr.api.cel.ast import Call, Comprehension, Ident, ListNode, Literal, MapNode, Node, Select, StructNode

LIMIT = 2**64 - 1
_TRAVERSAL = (1, 10)
_REGEX = (1, 4)
_LIST, _MAP, _STRUCT = 10, 30, 40


@dataclass(slots=True)
class Size:
    """Values of one kind: scalar, string, bytes, list, map, object or dyn.

    Attributes:
      least, most: Characters, bytes, items or entries.
      value: Of lists and maps, what the items or values are.
      key: Of maps, what the keys are.
      fields: Of objects.
    """

    kind: str
    least: int = 0
    most: int = LIMIT
    value: Size | None = None
    key: Size | None = None
    fields: Mapping[str, Size] = field(default_factory=dict)


UNKNOWN = Size("dyn")
SCALAR = Size("scalar", 1, 1)


def string(most: int = LIMIT, least: int = 0) -> Size:
    return Size("string", least, most)


def listed(most: int, value: Size, least: int = 0) -> Size:
    return Size("list", least, most, value)


def _times(size: int, factor: tuple[int, int]) -> int:
    return min(-(-size * factor[0] // factor[1]), LIMIT) if size < LIMIT else LIMIT


def _walk(size: Size) -> int:
    """Cost of going through a string once."""
    return _times(size.most, _TRAVERSAL)


def _union(one: Size | None, other: Size | None) -> Size | None:
    if one is None or other is None:
        return one or other
    if one is other:
        return one
    kind = one.kind if one.kind == other.kind else "dyn"
    fields = one.fields
    if other.fields and other.fields is not one.fields:
        fields = {**one.fields, **other.fields}
    return Size(kind, min(one.least, other.least), max(one.most, other.most), _union(one.value, other.value), _union(one.key, other.key), fields)


def _joined(sizes: list[Size]) -> Size:
    out: Size | None = None
    for size in sizes:
        out = _union(out, size)
    return out if out is not None else Size("dyn", 0, 0)


Found = tuple[int, Size]
_ONE = frozenset(
    # Accessors, and what looks at a few bytes only.
    "serviceAccount path group resource subresource namespace name allowed reason error errored masked prefixLength family isUnspecified "
    "isLoopback isLinkLocalMulticast isLinkLocalUnicast isGlobalUnicast sign asInteger isInteger asApproximateFloat isGreaterThan isLessThan "
    "compareTo add sub major minor patch getScheme getHostname getHost getPort getEscapedPath".split()
)
_PARSERS = frozenset("url isURL cidr isIP isCIDR ip quantity isQuantity semver isSemver".split())
_NAMESPACES = frozenset("sets ip format strings lists optional math jsonpatch cel".split())
_COMPARED = frozenset({"_<_", "_<=_", "_>_", "_>=_"})
_OVER_STRINGS = ("string", "bytes", "dyn")


class _Coster:
    def __init__(self, variables: Mapping[str, Size]) -> None:
        self._scopes: list[Mapping[str, Size]] = [variables]

    def cost(self, node: Node) -> Found:
        if isinstance(node, Literal):
            return 0, _literal(node.value)
        if isinstance(node, Ident):
            return 1, self._lookup(node.name)
        if isinstance(node, Select):
            return self._select(node)
        if isinstance(node, Call):
            return self._call(node)
        if isinstance(node, ListNode):
            found = [self.cost(item) for item in node.items]
            return sum(cost for cost, _ in found) + _LIST, listed(len(found), _joined([size for _, size in found]), len(found))
        if isinstance(node, MapNode):
            keys = [self.cost(key) for key, _, _ in node.entries]
            values = [self.cost(value) for _, value, _ in node.entries]
            size = Size("map", len(keys), len(keys), _joined([one for _, one in values]), _joined([one for _, one in keys]))
            return sum(cost for cost, _ in keys + values) + _MAP, size
        if isinstance(node, StructNode):
            fields = {name: self.cost(value) for name, value, _ in node.fields}
            return sum(cost for cost, _ in fields.values()) + _STRUCT, Size("object", 0, 0, fields={name: size for name, (_, size) in fields.items()})
        assert isinstance(node, Comprehension)
        return self._comprehension(node)

    def _lookup(self, name: str) -> Size:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return UNKNOWN

    def _scoped(self, variables: Mapping[str, Size], node: Node) -> Found:
        self._scopes.append(variables)
        try:
            return self.cost(node)
        finally:
            self._scopes.pop()

    def _select(self, node: Select) -> Found:
        cost, operand = self.cost(node.operand)
        if node.test:
            return cost, SCALAR
        size = operand.fields.get(node.name) or operand.value or UNKNOWN
        if operand.kind == "map" and size.kind == "scalar":
            size = SCALAR
        return cost + (1 if node.optional or operand.kind in ("map", "object") else 0), size

    def _call(self, node: Call) -> Found:
        given = [self.cost(arg) for arg in node.args]
        name = self._qualified(node)
        target = self.cost(node.target) if node.target is not None and name == node.function else None
        costs = [cost for cost, _ in given]
        sizes = [size for _, size in given]
        if name == "_?_:_":
            return costs[0] + max(costs[1], costs[2]), _union(sizes[1], sizes[2]) or UNKNOWN
        before = sum(costs) + (target[0] if target is not None else 0)
        if name in ("_&&_", "_||_"):
            return before, SCALAR
        cost, size = _operator(name, sizes) if node.target is None else (None, None)
        if cost is None:
            cost, size = self._function(node, name, target[1] if target is not None else None, sizes)
        return min(before + cost, LIMIT), size if size is not None else UNKNOWN

    def _qualified(self, node: Call) -> str:
        """A function's name: "sets.contains" is one, and no method of something named sets."""
        first = node.target
        if isinstance(first, Ident) and first.name in _NAMESPACES and not any(first.name in scope for scope in self._scopes):
            return f"{first.name}.{node.function}"
        return node.function

    def _function(self, node: Call, name: str, target: Size | None, sizes: list[Size]) -> tuple[int, Size | None]:
        if name in _ONE:
            return 1, UNKNOWN
        if target is None:
            return _global(name, sizes)
        rule = _METHODS.get(name)
        return rule(node, target, sizes) if rule is not None else (1, _method_result(name, target, sizes))

    def _comprehension(self, node: Comprehension) -> Found:
        before, over = self.cost(node.target)
        if node.kind in ("optMap", "optFlatMap"):
            assert node.result is not None
            cost, size = self._scoped({node.variables[0]: over}, node.result)
            return min(before + 1 + before + 1 + _LIST + cost + (1 if node.kind == "optMap" else 0), LIMIT), size
        value = over.value or UNKNOWN
        key = over.key or (SCALAR if over.kind == "list" else UNKNOWN)
        if len(node.variables) == 2:
            variables = {node.variables[0]: key, node.variables[1]: value}
        else:
            variables = {node.variables[0]: key if over.kind == "map" else value}
        condition = self._scoped(variables, node.condition)[0] if node.condition is not None else 0
        result, made = self._scoped(variables, node.result) if node.result is not None else (0, UNKNOWN)
        each, once = {
            "all": (3 + condition, 1), "exists": (4 + condition, 1), "existsOne": (2 + condition, 2), "filter": (13 + condition, 1 + _LIST),
            "map": (12 + condition + result, 1 + _LIST), "transformList": (12 + condition + result, 1 + _LIST),
        }.get(node.kind, (3 + condition + result, 1 + _MAP))  # fmt: skip
        size = {
            "all": SCALAR, "exists": SCALAR, "existsOne": SCALAR, "filter": listed(over.most, next(iter(variables.values()))),
            "map": listed(over.most, made), "transformList": listed(over.most, made),
        }.get(node.kind) or Size("map", 0, over.most, made, key)  # fmt: skip
        return min(before + once + over.most * each, LIMIT), size


def _literal(value: object) -> Size:
    if isinstance(value, str):
        return string(len(value), len(value))
    if isinstance(value, bytes):
        return Size("bytes", len(value), len(value))
    return SCALAR


def _operator(name: str, sizes: list[Size]) -> tuple[int | None, Size | None]:
    """Cost of an operator; None for what is none, or costs as any call."""
    if name in ("_==_", "_!=_"):
        return _times(min(sizes[0].most, sizes[1].most), _TRAVERSAL), SCALAR
    if name in _COMPARED:
        if any(size.kind in _OVER_STRINGS for size in sizes):
            return _times(min(sizes[0].most, sizes[1].most), _TRAVERSAL), SCALAR
        return 1, SCALAR
    if name == "_+_":
        least, most = min(sizes[0].least + sizes[1].least, LIMIT), min(sizes[0].most + sizes[1].most, LIMIT)
        if any(size.kind in ("string", "bytes") for size in sizes) or all(size.kind == "dyn" for size in sizes):
            return _times(most, _TRAVERSAL), Size(sizes[0].kind, least, most)
        if any(size.kind == "list" for size in sizes):
            return 1, listed(most, _union(sizes[0].value, sizes[1].value) or UNKNOWN, least)
        return 1, SCALAR
    if name in ("_in_", "@in", "in"):
        return (sizes[1].most if sizes[1].kind in ("list", "dyn") else 1), SCALAR
    if name in ("_[_]", "_[?_]"):
        return 1, sizes[0].value or UNKNOWN
    if name in ("_-_", "_*_", "_/_", "_%_", "-_", "!_"):
        return 1, SCALAR
    return None, None


def _global(name: str, sizes: list[Size]) -> tuple[int, Size | None]:
    first = sizes[0] if sizes else UNKNOWN
    if name == "dyn":
        return 1, first
    if name == "bytes":
        return _walk(first), Size("bytes", first.least, min(first.most * 4, LIMIT))
    if name == "string":
        # Of scalars a short text, of which nothing is promised.
        return (_walk(first), string(first.most, first.least // 4)) if first.kind in ("bytes", "dyn", "string") else (1, UNKNOWN)
    if name in _PARSERS:
        return _walk(first), first if name == "url" else SCALAR
    if name == "strings.quote":
        return _walk(first), string(min(first.most * 2 + 2, LIMIT), first.least + 2)
    if name == "ip.isCanonical":
        return _times(first.most, (1, 5)), SCALAR
    if name == "jsonpatch.escapeKey":
        return _walk(first), first
    if name.startswith("sets."):
        return min(1 + first.most * sizes[1].most * (2 if name == "sets.equivalent" else 1), LIMIT), SCALAR
    if name in ("size", "int", "uint", "double", "bool", "duration", "timestamp", "type"):
        return 1, SCALAR
    if name == "optional.of":
        return 1, first
    return 1, UNKNOWN


def _method_result(name: str, target: Size, sizes: list[Size]) -> Size:
    if name in ("orValue", "or"):
        return _union(target, sizes[0] if sizes else None) or UNKNOWN
    if name in ("value", "slice", "distinct", "sort", "reverse"):
        return target
    if name == "size" or name.startswith(("get", "is", "has")):
        return SCALAR
    return UNKNOWN


def _affix(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return _walk(sizes[0]), SCALAR


def _contains(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return min(_walk(target) * _walk(sizes[0]), LIMIT), SCALAR


def _regex_cost(target: Size, pattern: Size) -> int:
    return min(_times(min(target.most + 1, LIMIT), _TRAVERSAL) * _times(pattern.most, _REGEX), LIMIT)


def _matches(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return _regex_cost(target, sizes[0]), SCALAR


def _find(node: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    piece = string(target.most)
    return _regex_cost(target, sizes[0]), piece if node.function == "find" else listed(target.most, piece)


def _over_list(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    if target.kind in ("string", "bytes"):
        return _walk(target), SCALAR
    item = target.value
    each = 1 + (_walk(item) if item is not None and item.kind in ("string", "bytes") else 0)
    return min(target.most * each, LIMIT), item or UNKNOWN


def _converted(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return _walk(target), target


def _formatted(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return _walk(target), UNKNOWN


def _replace(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    old, new = sizes[0], sizes[1]
    if old.least == 0:
        most = min((target.most + 1) * new.most + target.most, LIMIT)
    elif new.most <= old.least:
        most = target.most
    else:
        most = min(-(-target.most // old.least) * new.most, LIMIT)
    return _times(target.most, (1, 5)), string(most)


def _split(node: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    most = target.most
    if len(node.args) > 1 and isinstance(node.args[1], Literal) and isinstance(node.args[1].value, int) and node.args[1].value >= 0:
        most = node.args[1].value
    return _times(target.most, (1, 5)), listed(most, string(target.most))


def _join(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    most = target.most * (target.value.most if target.value is not None else LIMIT)
    if sizes:
        most += sizes[0].most * max(target.most - 1, 0)
    made = string(min(most, LIMIT))
    return _walk(made), made


def _check(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return 350_000, UNKNOWN


def _selector(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return _walk(sizes[0]), UNKNOWN


def _validate(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return min(_walk(sizes[0]) * 32, LIMIT), UNKNOWN


def _contains_address(_: Call, target: Size, sizes: list[Size]) -> tuple[int, Size]:
    return 4 + (_walk(sizes[0]) if sizes[0].kind in _OVER_STRINGS else 0), SCALAR


_METHODS: dict[str, Callable[[Call, Size, list[Size]], tuple[int, Size]]] = {
    "startsWith": _affix, "endsWith": _affix, "contains": _contains, "matches": _matches, "find": _find, "findAll": _find,
    "lowerAscii": _converted, "upperAscii": _converted, "substring": _converted, "trim": _converted, "format": _formatted,
    "replace": _replace, "split": _split, "join": _join, "check": _check, "fieldSelector": _selector, "labelSelector": _selector,
    "validate": _validate, "containsIP": _contains_address, "containsCIDR": _contains_address,
    **dict.fromkeys(("isSorted", "sum", "max", "min", "indexOf", "lastIndexOf"), _over_list),
}  # fmt: skip


def greatest_cost(node: Node, variables: Mapping[str, Size]) -> int:
    """Return the most that an expression can cost; LIMIT when there is no bound."""
    return min(_Coster(variables).cost(node)[0], LIMIT)
