"""Compiling and running expressions: the face of the package.

An `Environment` holds functions and types; `compile` gives a `Program` that can be evaluated any number of times, each time
under a budget. Used by admission (match conditions, policies) and by custom resource validation rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from knarr.api.cel import extensions, stdlib
from knarr.api.cel import types as T
from knarr.api.cel.ast import Node
from knarr.api.cel.checker import check
from knarr.api.cel.errors import CompileError, EvalError, Issue, ResultTypeError
from knarr.api.cel.evaluator import Budget, Code, Compiler
from knarr.api.cel.parser import parse
from knarr.api.cel.types import Overload, Type

PER_CALL_LIMIT = 1_000_000
"""Most that one expression may cost."""
TOTAL_LIMIT = 10_000_000
"""Most that all expressions of one policy, or of one object's rules, may cost together."""


class Program:
    """A compiled expression."""

    __slots__ = ("_code", "node", "result_type", "source")

    def __init__(self, source: str, node: Node, result_type: Type, code: Code) -> None:
        self.source = source
        self.node = node
        self.result_type = result_type
        self._code = code

    def evaluate(self, variables: Mapping[str, Any], budget: Budget | None = None) -> Any:
        """Run it. Raises EvalError; CostExceeded when the budget (default: PER_CALL_LIMIT) runs out."""
        try:
            return self._code(variables, Budget(PER_CALL_LIMIT) if budget is None else budget)
        except RecursionError as error:
            raise EvalError("expression is nested too deeply") from error


class Environment:
    """Functions and struct types; immutable."""

    def __init__(
        self, declarations: Mapping[tuple[str, bool], list[Overload]], functions: Mapping[tuple[str, bool], Callable[..., Any]],
        structs: Mapping[str, Callable[[str, dict[str, Any]], Any]] | None = None,
    ) -> None:  # fmt: skip
        self.declarations = declarations
        self.functions = functions
        self.structs = structs or {}

    def extended(
        self, declarations: str, functions: Mapping[tuple[str, bool], Callable[..., Any]], *, namespaces: frozenset[str] = frozenset(),
        structs: Mapping[str, Callable[[str, dict[str, Any]], Any]] | None = None,
    ) -> Environment:  # fmt: skip
        """A further environment with more functions."""
        merged = {key: list(overloads) for key, overloads in self.declarations.items()}
        for key, overloads in T.parse_declarations(declarations, namespaces=namespaces).items():
            merged.setdefault(key, []).extend(overloads)
        return Environment(merged, {**self.functions, **functions}, {**self.structs, **(structs or {})})

    def compile(self, source: str, variables: Mapping[str, Type], *, result: Type | tuple[Type, ...] = T.DYN, exact: bool = False) -> Program:
        """Parse, check and compile.

        Args:
          variables: Name to type; "Name{}" declares a struct type that can be constructed.
          result: The type or types that the expression must have; dyn takes anything.
          exact: It must be known to have it: not even an expression that may have any type will do.

        Raises:
          CompileError
        """
        try:
            return self._compile(source, variables, result, exact)
        except RecursionError as error:
            raise CompileError(source[:200], [Issue(0, "expression recursion limit exceeded")]) from error

    def _compile(self, source: str, variables: Mapping[str, Type], result: Type | tuple[Type, ...], exact: bool) -> Program:
        node = parse(source)
        found = check(source, node, variables, self.declarations)
        wanted = result if isinstance(result, tuple) and result and not isinstance(result[0], str) else (result,)
        if isinstance(result, tuple) and result and isinstance(result[0], str) and result[0] not in ("list", "map", "optional", "type"):
            wanted = result
        if T.DYN not in wanted and (exact or found != T.DYN) and found not in wanted:
            raise ResultTypeError(source, T.shown(found), [T.shown(kind) for kind in wanted])
        compiler = Compiler(self.functions, {name: kind for name, kind in variables.items() if not name.endswith("{}")}, self.structs)
        return Program(source, node, found, compiler.compile(node))


@cache
def base() -> Environment:
    """Everything that Kubernetes offers to every expression."""
    declarations = T.parse_declarations(stdlib.DECLARATIONS, namespaces=stdlib.NAMESPACES)
    for key, overloads in _extension_declarations().items():
        declarations.setdefault(key, []).extend(overloads)
    return Environment(declarations, {**stdlib.FUNCTIONS, **extensions.FUNCTIONS})


def _extension_declarations() -> dict[tuple[str, bool], list[Overload]]:
    """format.X and ip.isCanonical are functions by name, but "format" and "ip" are types elsewhere: told apart line by line."""
    plain: list[str] = []
    named: list[str] = []
    for line in extensions.DECLARATIONS.strip().splitlines():
        is_function = line.startswith("ip.isCanonical") or (line.startswith("format.") and not line.startswith("format.validate"))
        (named if is_function else plain).append(line)
    out = T.parse_declarations("\n".join(plain), namespaces=extensions.NAMESPACES)
    for key, overloads in T.parse_declarations("\n".join(named), namespaces=frozenset({"ip", "format"})).items():
        out.setdefault(key, []).extend(overloads)
    return out
