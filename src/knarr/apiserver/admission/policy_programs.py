"""A ValidatingAdmissionPolicy compiled: its expressions in order, each knowing the variables before it.

Used by the plugin that enforces policies and by the check of policies when they are written.
Source: apiserver pkg/admission/plugin/policy/validating, pkg/admission/plugin/cel/composition.go.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from knarr.api import cel
from knarr.api.cel import types as T
from knarr.api.cel.admission import NAMESPACE
from knarr.api.types import Object
from knarr.apiserver.admission.expressions import CONDITION_VARIABLES, environment
from knarr.apiserver.celtimes import COMPILATION, timed


@dataclass(slots=True)
class Expression:
    """One compiled expression, or why it does not compile."""

    path: str
    """Field path inside the policy, e.g. spec.validations[0].expression."""
    source: str
    program: cel.Program | None
    error: cel.CompileError | None

    def evaluate(self, variables: Mapping[str, Any], budget: cel.Budget) -> Any:
        """Raises CELError."""
        if self.error is not None:
            raise self.error
        assert self.program is not None
        return self.program.evaluate(variables, budget)


@dataclass(slots=True)
class Validation:
    expression: Expression
    message: str
    message_expression: Expression | None
    reason: str


class Policy:
    """All expressions of one policy."""

    def __init__(self, obj: Object) -> None:
        spec = obj.get("spec") or {}
        self.name: str = obj["metadata"].get("name") or ""
        self.spec = spec
        self.failure_policy = spec.get("failurePolicy") or "Fail"
        # Field types of `variables` grow as they are compiled: one may use those before it.
        self._fields: dict[str, T.Type] = {}
        known = {**CONDITION_VARIABLES, "namespaceObject": NAMESPACE, "variables": T.ObjectType("kubernetes.variables", self._fields)}
        if spec.get("paramKind"):
            known["params"] = T.DYN
        self.variables: dict[str, Expression] = {}
        for index, variable in enumerate(spec.get("variables") or ()):
            made = _compile(f"spec.variables[{index}].expression", variable.get("expression") or "", known, T.DYN)
            self.variables[variable.get("name") or ""] = made
            self._fields[variable.get("name") or ""] = made.program.result_type if made.program is not None else T.DYN
        no_authorizer = {name: kind for name, kind in known.items() if not name.startswith("authorizer")}
        self.validations = [
            Validation(
                _compile(f"spec.validations[{index}].expression", one.get("expression") or "", known, cel.BOOL), (one.get("message") or "").strip(),
                _compile(f"spec.validations[{index}].messageExpression", one["messageExpression"], no_authorizer, cel.STRING)
                if (one.get("messageExpression") or "").strip() else None,
                one.get("reason") or "",
            )
            for index, one in enumerate(spec.get("validations") or ())
        ]  # fmt: skip
        self.audit_annotations = [
            (one.get("key") or "", _compile(f"spec.auditAnnotations[{index}].valueExpression", one.get("valueExpression") or "", known, (cel.STRING, T.NULL)))
            for index, one in enumerate(spec.get("auditAnnotations") or ())
        ]
        conditions = {name: kind for name, kind in known.items() if name != "variables"}
        self.conditions = [
            (one.get("name") or "", _compile(f"spec.matchConditions[{index}].expression", one.get("expression") or "", conditions, cel.BOOL))
            for index, one in enumerate(spec.get("matchConditions") or ())
        ]

    def expressions(self) -> Iterator[Expression]:
        """Every expression, in the order of the fields."""
        yield from (expression for _, expression in self.conditions)
        yield from self.variables.values()
        for validation in self.validations:
            yield validation.expression
            if validation.message_expression is not None:
                yield validation.message_expression
        yield from (expression for _, expression in self.audit_annotations)


def _compile(path: str, source: str, variables: Mapping[str, T.Type], result: T.Type | tuple[T.Type, ...]) -> Expression:
    try:
        with timed(COMPILATION):
            return Expression(path, source, environment().compile(source, variables, result=result, exact=True), None)
    except cel.CompileError as error:
        return Expression(path, source, None, error)


class LazyVariables(Mapping[str, Any]):
    """`variables`: each is evaluated when first asked for, once, and its error is remembered too."""

    def __init__(self, policy: Policy, activation: dict[str, Any], budget: cel.Budget) -> None:
        self._policy = policy
        self._activation = activation
        self._budget = budget
        self._known: dict[str, Any] = {}

    def __getitem__(self, name: str) -> Any:
        if name not in self._known:
            expression = self._policy.variables[name]
            try:
                self._known[name] = expression.evaluate(self._activation, self._budget)
            except cel.CompileError as error:
                self._known[name] = cel.EvalError(f"composited variable '{name}' fails to compile: {error}")
            except cel.EvalError as error:
                self._known[name] = cel.EvalError(f"composited variable '{name}' fails to evaluate: {error}")
        found = self._known[name]
        if isinstance(found, cel.EvalError):
            raise found
        return found

    def __iter__(self) -> Iterator[str]:
        return iter(self._policy.variables)

    def __len__(self) -> int:
        return len(self._policy.variables)

    def __contains__(self, name: object) -> bool:
        return name in self._policy.variables

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._policy.variables else default
