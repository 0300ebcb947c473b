"""Syntax tree to closures, and their evaluation under a cost budget.

Each node becomes a function of (variables, budget). Costs follow Kubernetes' runtime costs: one for each name, selection and
call, more for what is made and for what walks over strings and lists.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from knarr.api.cel.ast import Call, Comprehension, Ident, ListNode, Literal, MapNode, Node, Select, StructNode
from knarr.api.cel.checker import qualified_name
from knarr.api.cel.errors import CostExceeded, EvalError
from knarr.api.cel.values import NONE, Optional, TypeValue, no_overload, type_name

Variables = Mapping[str, Any]
Code = Callable[[Variables, "Budget"], Any]
Function = Callable[..., Any]

LIST_COST, MAP_COST, STRUCT_COST = 10, 30, 40
# A function that walks its operand costs a tenth of its size, as upstream counts.
WALKING = frozenset({
    "contains", "startsWith", "endsWith", "matches", "find", "findAll", "replace", "split", "join", "indexOf", "lastIndexOf", "lowerAscii",
    "upperAscii", "trim", "substring", "sum", "min", "max", "isSorted", "string", "bytes", "_+_", "@in", "quantity", "url", "ip", "cidr", "validate",
    "_==_", "_!=_", "sets.contains", "sets.equivalent", "sets.intersects", "distinct", "flatten", "sort", "reverse", "format",
})  # fmt: skip
_TYPES = frozenset({"int", "uint", "double", "bool", "string", "bytes", "list", "map", "null_type", "type", "google.protobuf.Timestamp", "google.protobuf.Duration"})


class Budget:
    """What an evaluation may still cost."""

    __slots__ = ("left", "limit")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.left = limit

    def spend(self, amount: int) -> None:
        self.left -= amount
        if self.left < 0:
            raise CostExceeded()

    @property
    def spent(self) -> int:
        return self.limit - self.left


def _walk_cost(args: list[Any]) -> int:
    total = 0
    for arg in args:
        if isinstance(arg, str | bytes):
            total += len(arg) // 10
        elif isinstance(arg, list | tuple | Mapping):
            total += len(arg)
    return total


class Compiler:
    """Makes closures; knows the functions and the names bound inside macros."""

    def __init__(self, functions: Mapping[tuple[str, bool], Function], declared: Mapping[str, Any], structs: Mapping[str, Function]) -> None:
        self._functions = functions
        self._declared = declared
        self._structs = structs
        self._bound: list[str] = []

    def compile(self, node: Node) -> Code:
        if isinstance(node, Literal):
            value = node.value
            return lambda variables, budget: value
        if isinstance(node, Ident):
            return self._ident(node)
        if isinstance(node, Select):
            return self._select(node)
        if isinstance(node, Call):
            return self._call(node)
        if isinstance(node, ListNode):
            return self._list(node)
        if isinstance(node, MapNode):
            return self._map(node)
        if isinstance(node, StructNode):
            return self._struct(node)
        assert isinstance(node, Comprehension)
        return self._comprehension(node)

    def _known(self, name: str) -> bool:
        return name in self._bound or name in self._declared

    def _ident(self, node: Ident) -> Code:
        name = node.name
        if not self._known(name) and name in _TYPES:
            value = TypeValue(name)
            return lambda variables, budget: value

        def ident(variables: Variables, budget: Budget) -> Any:
            budget.spend(1)
            try:
                return variables[name]
            except KeyError:
                raise EvalError(f"no such attribute(s): {name}") from None

        return ident

    def _select(self, node: Select) -> Code:
        qualified = qualified_name(node)
        if qualified is not None and not self._known(qualified.split(".")[0]):
            if qualified in _TYPES:
                value = TypeValue(qualified)
                return lambda variables, budget: value
            if qualified in self._declared:
                full = qualified
                return lambda variables, budget: variables[full]
        operand = self.compile(node.operand)
        name = node.name
        if node.test:

            def test(variables: Variables, budget: Budget) -> bool:
                budget.spend(1)
                container = operand(variables, budget)
                if isinstance(container, Optional):
                    return container.present and name in container.value
                if isinstance(container, Mapping):
                    return name in container
                raise no_overload("has", container)

            return test

        optional = node.optional

        def select(variables: Variables, budget: Budget) -> Any:
            budget.spend(1)
            container = operand(variables, budget)
            if isinstance(container, Mapping):
                found = container.get(name, _MISSING)
                if found is not _MISSING:
                    return Optional(found) if optional else found
                if optional:
                    return NONE
                raise EvalError(f"no such key: {name}")
            if isinstance(container, Optional):
                if not container.present or not isinstance(container.value, Mapping) or name not in container.value:
                    return NONE
                return Optional(container.value[name])
            if optional and container is None:
                return NONE
            raise EvalError(f"no such overload: {type_name(container)}.{name}" if container is not None else "no such overload: null")

        return select

    # -- calls -----------------------------------------------------------------------------------------------------------
    def _call(self, node: Call) -> Code:
        name = node.function
        if name == "_&&_":
            return _and(self.compile(node.args[0]), self.compile(node.args[1]))
        if name == "_||_":
            return _or(self.compile(node.args[0]), self.compile(node.args[1]))
        if name == "_?_:_":
            return _conditional(*(self.compile(arg) for arg in node.args))
        target = node.target
        if target is not None:
            prefix = qualified_name(target)
            if prefix is not None and not self._known(prefix.split(".")[0]) and (f"{prefix}.{name}", False) in self._functions:
                full = f"{prefix}.{name}"
                return self._apply(full, self._functions[(full, False)], [self.compile(arg) for arg in node.args])
            codes = [self.compile(target), *(self.compile(arg) for arg in node.args)]
            function = self._functions.get((name, True))
        else:
            codes = [self.compile(arg) for arg in node.args]
            function = self._functions.get((name, False))
        if function is None:
            return _raiser(EvalError(f"no such overload: {name}"))
        return self._apply(name, function, codes)

    @staticmethod
    def _apply(name: str, function: Function, codes: list[Code]) -> Code:
        walks = name in WALKING

        def apply(variables: Variables, budget: Budget) -> Any:
            args = [code(variables, budget) for code in codes]
            budget.spend(1 + _walk_cost(args) if walks else 1)
            try:
                return function(*args)
            except (TypeError, AttributeError) as error:
                # The implementation met a type it has no overload for.
                raise no_overload(name, *args) from error

        return apply

    # -- literals of containers ------------------------------------------------------------------------------------------
    def _list(self, node: ListNode) -> Code:
        items = [(self.compile(item), index in node.optional) for index, item in enumerate(node.items)]

        def make(variables: Variables, budget: Budget) -> list[Any]:
            budget.spend(LIST_COST)
            out: list[Any] = []
            for code, optional in items:
                value = code(variables, budget)
                if not optional:
                    out.append(value)
                elif value.present:
                    out.append(value.value)
            return out

        return make

    def _map(self, node: MapNode) -> Code:
        entries = [(self.compile(key), self.compile(value), optional) for key, value, optional in node.entries]

        def make(variables: Variables, budget: Budget) -> dict[Any, Any]:
            budget.spend(MAP_COST)
            out: dict[Any, Any] = {}
            for key_code, value_code, optional in entries:
                key = key_code(variables, budget)
                if not isinstance(key, str | int | bool):
                    raise EvalError(f"unsupported key type: {type_name(key)}")
                if key in out:
                    raise EvalError(f"Failed with repeated key {key}")
                value = value_code(variables, budget)
                if not optional:
                    out[key] = value
                elif value.present:
                    out[key] = value.value
            return out

        return make

    def _struct(self, node: StructNode) -> Code:
        factory = self._structs.get(node.name)
        if factory is None:
            return _raiser(EvalError(f"unknown type: {node.name}"))
        make = factory
        fields = [(name, self.compile(value), optional) for name, value, optional in node.fields]
        name = node.name

        def build(variables: Variables, budget: Budget) -> Any:
            budget.spend(STRUCT_COST)
            values: dict[str, Any] = {}
            for field, code, optional in fields:
                value = code(variables, budget)
                if not optional:
                    values[field] = value
                elif value.present:
                    values[field] = value.value
            return make(name, values)

        return build

    # -- macros ----------------------------------------------------------------------------------------------------------
    def _comprehension(self, node: Comprehension) -> Code:
        target = self.compile(node.target)
        self._bound += node.variables
        condition = self.compile(node.condition) if node.condition is not None else None
        result = self.compile(node.result) if node.result is not None else None
        del self._bound[len(self._bound) - len(node.variables) :]
        return _MACROS[node.kind](target, node.variables, condition, result)


_MISSING = object()


def _raiser(error: EvalError) -> Code:
    def fail(variables: Variables, budget: Budget) -> Any:
        raise error

    return fail


def _and(left: Code, right: Code) -> Code:
    return _shortcut(left, right, "_&&_", False)


def _or(left: Code, right: Code) -> Code:
    return _shortcut(left, right, "_||_", True)


def _shortcut(left: Code, right: Code, name: str, decisive: bool) -> Code:
    """One side that decides is enough, whichever it is, even when the other side fails."""

    def evaluate(variables: Variables, budget: Budget) -> bool:
        failure: EvalError | None = None
        try:
            first: object = left(variables, budget)
            if first is decisive:
                return decisive
            if not isinstance(first, bool):
                failure = no_overload(name, first)
        except CostExceeded:
            raise
        except EvalError as error:
            failure = error
        second: object = right(variables, budget)
        if second is decisive:
            return decisive
        if failure is not None:
            raise failure
        if not isinstance(second, bool):
            raise no_overload(name, second)
        return not decisive

    return evaluate


def _conditional(condition: Code, then: Code, other: Code) -> Code:
    def evaluate(variables: Variables, budget: Budget) -> Any:
        chosen = condition(variables, budget)
        if chosen is True:
            return then(variables, budget)
        if chosen is False:
            return other(variables, budget)
        raise no_overload("_?_:_", chosen)

    return evaluate


def _pairs(container: Any, names: list[str]) -> list[tuple[Any, ...]]:
    """What the variables take on in turn."""
    if isinstance(container, Mapping):
        return [(key, value) for key, value in container.items()] if len(names) == 2 else [(key,) for key in container]
    if isinstance(container, list | tuple):
        return list(enumerate(container)) if len(names) == 2 else [(item,) for item in container]
    raise EvalError(f"no such overload: {type_name(container)} cannot be iterated")


def _truth(value: Any) -> bool:
    if not isinstance(value, bool):
        raise no_overload("_&&_", value)
    return value


def _quantifier(decisive: bool) -> Callable[..., Code]:
    def make(target: Code, names: list[str], condition: Code | None, result: Code | None) -> Code:
        assert condition is not None
        test = condition

        def evaluate(variables: Variables, budget: Budget) -> bool:
            local = dict(variables)
            failure: EvalError | None = None
            for values in _pairs(target(variables, budget), names):
                budget.spend(1)
                local.update(zip(names, values, strict=True))
                try:
                    if _truth(test(local, budget)) is decisive:
                        return decisive
                except CostExceeded:
                    raise
                except EvalError as error:
                    failure = error
            if failure is not None:
                raise failure
            return not decisive

        return evaluate

    return make


def _exists_one(target: Code, names: list[str], condition: Code | None, result: Code | None) -> Code:
    assert condition is not None
    test = condition

    def evaluate(variables: Variables, budget: Budget) -> bool:
        local = dict(variables)
        count = 0
        for values in _pairs(target(variables, budget), names):
            budget.spend(1)
            local.update(zip(names, values, strict=True))
            count += _truth(test(local, budget))
        return count == 1

    return evaluate


def _collect(kind: str) -> Callable[..., Code]:
    def make(target: Code, names: list[str], condition: Code | None, result: Code | None) -> Code:
        def evaluate(variables: Variables, budget: Budget) -> Any:
            local = dict(variables)
            items: list[Any] = []
            mapping: dict[Any, Any] = {}
            for values in _pairs(target(variables, budget), names):
                budget.spend(1)
                local.update(zip(names, values, strict=True))
                if condition is not None and not _truth(condition(local, budget)):
                    continue
                if kind == "filter":
                    items.append(values[0])
                    continue
                assert result is not None
                made = result(local, budget)
                if kind == "list":
                    items.append(made)
                elif kind == "map":
                    mapping[values[0]] = made
                else:
                    for key, value in made.items():
                        if key in mapping:
                            raise EvalError(f"insert failed: key {key} already exists")
                        mapping[key] = value
            return mapping if kind in ("map", "entries") else items

        return evaluate

    return make


def _optional_map(flat: bool) -> Callable[..., Code]:
    def make(target: Code, names: list[str], condition: Code | None, result: Code | None) -> Code:
        assert result is not None
        body = result

        def evaluate(variables: Variables, budget: Budget) -> Any:
            option = target(variables, budget)
            if not isinstance(option, Optional):
                raise no_overload("optFlatMap" if flat else "optMap", option)
            if not option.present:
                return NONE
            made = body({**variables, names[0]: option.value}, budget)
            return made if flat else Optional(made)

        return evaluate

    return make


_MACROS: dict[str, Callable[..., Code]] = {
    "all": _quantifier(False), "exists": _quantifier(True), "existsOne": _exists_one, "filter": _collect("filter"), "map": _collect("list"),
    "transformList": _collect("list"), "transformMap": _collect("map"), "transformMapEntry": _collect("entries"),
    "optMap": _optional_map(False), "optFlatMap": _optional_map(True),
}  # fmt: skip
