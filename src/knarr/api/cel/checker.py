"""Static checking: every name is declared, every call has an overload that fits, and the result has the wanted type.

`dyn` fits everything, so expressions over untyped objects are checked for names and for what is known (literals, conversions,
declared variables); with typed variables (custom resource schemas) fields are checked too.
"""

from __future__ import annotations

from collections.abc import Mapping

from knarr.api.cel import types as T
from knarr.api.cel.ast import Call, Comprehension, Ident, ListNode, Literal, MapNode, Node, Select, StructNode
from knarr.api.cel.errors import CompileError, Issue
from knarr.api.cel.types import Overload, Type
from knarr.api.cel.values import UInt

Bindings = dict[str, Type]
_TYPE_NAMES = {
    "int": T.INT, "uint": T.UINT, "double": T.DOUBLE, "bool": T.BOOL, "string": T.STRING, "bytes": T.BYTES, "list": ("list", T.DYN),
    "map": ("map", T.DYN, T.DYN), "null_type": T.NULL, "type": ("type", T.DYN),
}  # fmt: skip


def _nullable(kind: Type) -> bool:
    return isinstance(kind, T.ObjectType) or kind in (T.DURATION, T.TIMESTAMP) or (isinstance(kind, tuple) and kind[0] == "optional")


def fits(param: Type, given: Type, bindings: Bindings) -> bool:
    """Whether a given type may stand where a parameter type is wanted; binds type parameters."""
    if given in (T.DYN, T.ERROR) or param == T.DYN:
        return True
    if isinstance(param, tuple) and param[0] == "param":
        bound = bindings.get(param[1])
        if bound is None or bound == T.DYN:
            bindings[param[1]] = given
            return True
        if fits(bound, given, bindings):
            return True
        if fits(given, bound, bindings):
            bindings[param[1]] = given
            return True
        return (given == T.NULL and _nullable(bound)) or (bound == T.NULL and _nullable(given))
    if isinstance(param, tuple) and isinstance(given, tuple):
        return param[0] == given[0] and len(param) == len(given) and all(fits(p, g, bindings) for p, g in zip(param[1:], given[1:], strict=True))
    if isinstance(given, T.ObjectType) and isinstance(param, tuple) and param[0] == "map":
        # Objects from schemas are maps where a map is wanted.
        return False
    if given == T.NULL and _nullable(param):
        return True
    return bool(param == given)


def _resolve(kind: Type, bindings: Bindings) -> Type:
    if isinstance(kind, tuple):
        if kind[0] == "param":
            return bindings.get(kind[1], T.DYN)
        return (kind[0], *(_resolve(part, bindings) for part in kind[1:]))
    return kind


class Checker:
    """Checks one expression; collects all issues."""

    def __init__(self, source: str, variables: Mapping[str, Type], functions: Mapping[tuple[str, bool], list[Overload]]) -> None:
        self._source = source
        self._scopes: list[Mapping[str, Type]] = [variables]
        self._functions = functions
        self.issues: list[Issue] = []

    def fail(self, node: Node, message: str) -> Type:
        self.issues.append(Issue(node.offset, message))
        return T.ERROR

    def _lookup(self, name: str) -> Type | None:
        for scope in reversed(self._scopes):
            if name in scope:
                return scope[name]
        return None

    def check(self, node: Node) -> Type:
        if isinstance(node, Literal):
            return _literal_type(node.value)
        if isinstance(node, Ident):
            return self._ident(node)
        if isinstance(node, Select):
            return self._select(node)
        if isinstance(node, Call):
            return self._call(node)
        if isinstance(node, ListNode):
            kinds = [self._element(self.check(item), index in node.optional) for index, item in enumerate(node.items)]
            return ("list", _join(kinds))
        if isinstance(node, MapNode):
            keys = [self.check(key) for key, _, _ in node.entries]
            values = [self._element(self.check(value), optional) for _, value, optional in node.entries]
            return ("map", _join(keys), _join(values))
        if isinstance(node, StructNode):
            return self._struct(node)
        assert isinstance(node, Comprehension)
        return self._comprehension(node)

    @staticmethod
    def _element(kind: Type, optional: bool) -> Type:
        return kind[1] if optional and isinstance(kind, tuple) and kind[0] == "optional" else kind

    def _ident(self, node: Ident) -> Type:
        found = self._lookup(node.name)
        if found is not None:
            return found
        if node.name in _TYPE_NAMES:
            return ("type", _TYPE_NAMES[node.name])
        return self.fail(node, f"undeclared reference to '{node.name}' (in container '')")

    def _select(self, node: Select) -> Type:
        qualified = qualified_name(node)
        if qualified is not None and self._lookup(qualified.split(".")[0]) is None:
            found = self._lookup(qualified)
            if found is not None:
                return found
            if qualified in ("google.protobuf.Timestamp", "google.protobuf.Duration"):
                return ("type", qualified)
        operand = self.check(node.operand)
        result = self._field(node, operand)
        if node.test:
            return T.BOOL
        if node.optional:
            return result if isinstance(result, tuple) and result[0] == "optional" else ("optional", result)
        return result

    def _field(self, node: Select, operand: Type) -> Type:
        if operand in (T.DYN, T.ERROR):
            return T.DYN
        if isinstance(operand, tuple) and operand[0] == "optional":
            return ("optional", self._field(node, operand[1]))
        if isinstance(operand, tuple) and operand[0] == "map":
            return operand[2]
        if isinstance(operand, T.ObjectType):
            found = operand.fields.get(node.name)
            return found if found is not None else self.fail(node, f"undefined field '{node.name}'")
        return self.fail(node, f"type '{T.shown(operand)}' does not support field selection")

    def _struct(self, node: StructNode) -> Type:
        kind = self._lookup(f"{node.name}{{}}")
        if kind is None:
            return self.fail(node, f"undeclared reference to '{node.name}' (in container '')")
        for name, value, optional in node.fields:
            given = self._element(self.check(value), optional)
            wanted = kind.fields.get(name) if isinstance(kind, T.ObjectType) else T.DYN
            if wanted is None:
                self.fail(value, f"undefined field '{name}'")
            elif not fits(wanted, given, {}):
                self.fail(value, f"expected type of field '{name}' is '{T.shown(wanted)}' but provided type is '{T.shown(given)}'")
        return kind

    def _call(self, node: Call) -> Type:
        name = node.function
        if name in ("_&&_", "_||_"):
            return self._logic(node)
        if name == "_?_:_":
            return self._conditional(node)
        target = node.target
        if target is not None:
            prefix = qualified_name(target)
            if prefix is not None and self._lookup(prefix.split(".")[0]) is None:
                full = f"{prefix}.{name}"
                if (full, False) in self._functions:
                    return self._overload(node, full, False, [self.check(arg) for arg in node.args])
            given = [self.check(target), *(self.check(arg) for arg in node.args)]
            return self._overload(node, name, True, given)
        return self._overload(node, name, False, [self.check(arg) for arg in node.args])

    def _overload(self, node: Call, name: str, method: bool, given: list[Type]) -> Type:
        overloads = self._functions.get((name, method))
        if overloads is None:
            return self.fail(node, f"undeclared reference to '{name}' (in container '')")
        results: list[Type] = []
        for overload in overloads:
            bindings: Bindings = {}
            if len(overload.params) == len(given) and all(fits(p, g, bindings) for p, g in zip(overload.params, given, strict=True)):
                results.append(_resolve(overload.result, bindings))
        if not results:
            if T.ERROR in given:
                return T.ERROR
            shown = ", ".join(T.shown(kind) for kind in (given[1:] if method else given))
            applied = f"{T.shown(given[0])}.({shown})" if method else f"({shown})"
            return self.fail(node, f"found no matching overload for '{name}' applied to '{applied}'")
        first = results[0]
        return first if all(result == first for result in results) else T.DYN

    def _logic(self, node: Call) -> Type:
        given = [self.check(arg) for arg in node.args]
        if any(kind not in (T.BOOL, T.DYN, T.ERROR) for kind in given):
            return self.fail(node, f"found no matching overload for '{node.function}' applied to '({', '.join(T.shown(kind) for kind in given)})'")
        return T.BOOL

    def _conditional(self, node: Call) -> Type:
        condition, then, other = (self.check(arg) for arg in node.args)
        bindings: Bindings = {}
        parameter = ("param", "A")
        if condition not in (T.BOOL, T.DYN, T.ERROR) or not (fits(parameter, then, bindings) and fits(parameter, other, bindings)):
            shown = ", ".join(T.shown(kind) for kind in (condition, then, other))
            return self.fail(node, f"found no matching overload for '_?_:_' applied to '({shown})'")
        return T.DYN if T.DYN in (then, other) else _resolve(parameter, bindings)

    def _comprehension(self, node: Comprehension) -> Type:
        target = self.check(node.target)
        if node.kind in ("optMap", "optFlatMap"):
            inner = target[1] if isinstance(target, tuple) and target[0] == "optional" else T.DYN
            if target not in (T.DYN, T.ERROR) and not (isinstance(target, tuple) and target[0] == "optional"):
                self.fail(node, f"found no matching overload for '{node.kind}' applied to '{T.shown(target)}'")
            assert node.result is not None
            result = self._scoped({node.variables[0]: inner}, node.result)
            return ("optional", result) if node.kind == "optMap" else result
        key, value = self._range(node, target)
        variables = {node.variables[0]: key, node.variables[1]: value} if len(node.variables) == 2 else {node.variables[0]: key if _is_map(target) else value}
        if node.condition is not None:
            condition = self._scoped(variables, node.condition)
            if condition not in (T.BOOL, T.DYN, T.ERROR):
                self.fail(node.condition, f"expected type 'bool' but found '{T.shown(condition)}'")
        if node.kind in ("all", "exists", "existsOne"):
            return T.BOOL
        if node.kind == "filter":
            return ("list", variables[node.variables[0]])
        assert node.result is not None
        result = self._scoped(variables, node.result)
        if node.kind in ("map", "transformList"):
            return ("list", result)
        if node.kind == "transformMap":
            return ("map", key, result)
        return result if isinstance(result, tuple) and result[0] == "map" else T.DYN

    def _scoped(self, variables: Mapping[str, Type], node: Node) -> Type:
        self._scopes.append(variables)
        try:
            return self.check(node)
        finally:
            self._scopes.pop()

    def _range(self, node: Comprehension, target: Type) -> tuple[Type, Type]:
        """Types of (key or index, value) of what is iterated."""
        if target in (T.DYN, T.ERROR):
            return T.DYN, T.DYN
        if isinstance(target, tuple) and target[0] == "list":
            return T.INT, target[1]
        if isinstance(target, tuple) and target[0] == "map":
            return target[1], target[2]
        self.fail(node.target, f"expression of type '{T.shown(target)}' cannot be range of a comprehension (must be list, map, or dynamic)")
        return T.ERROR, T.ERROR


def _is_map(kind: Type) -> bool:
    return isinstance(kind, tuple) and kind[0] == "map"


def _join(kinds: list[Type]) -> Type:
    if not kinds:
        return T.DYN
    first = kinds[0]
    return first if all(kind == first for kind in kinds) else T.DYN


def _literal_type(value: object) -> Type:
    if value is None:
        return T.NULL
    if isinstance(value, bool):
        return T.BOOL
    if isinstance(value, UInt):
        return T.UINT
    for kind, name in ((int, T.INT), (float, T.DOUBLE), (str, T.STRING), (bytes, T.BYTES)):
        if isinstance(value, kind):
            return name
    return T.DYN


def qualified_name(node: Node) -> str | None:
    """a.b.c as text, None for anything but names and selections."""
    if isinstance(node, Ident):
        return node.name
    if isinstance(node, Select) and not node.test and not node.optional:
        prefix = qualified_name(node.operand)
        return f"{prefix}.{node.name}" if prefix is not None else None
    return None


def check(
    source: str, node: Node, variables: Mapping[str, Type], functions: Mapping[tuple[str, bool], list[Overload]],
) -> Type:  # fmt: skip
    """Return the expression's type. Raises CompileError with every issue."""
    checker = Checker(source, variables, functions)
    result = checker.check(node)
    if checker.issues:
        raise CompileError(source, checker.issues)
    return result
