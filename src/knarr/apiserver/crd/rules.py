"""x-kubernetes-validations: the CEL rules of a CRD version, compiled once, run on every write.

A tree of the schema's nodes that have rules at or below them. Rules see `self` and, where the old value can be told to be
the same one, `oldSelf`; rules that use oldSelf run only then. An unchanged part that breaks a rule does not fail an update
(ratcheting). All rules of one object share one cost budget.

Source: apiextensions-apiserver pkg/apiserver/schema/cel/validation.go, KEP-2876, KEP-4008.
"""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

from knarr.api import cel, errors
from knarr.api.cel import types as T
from knarr.api.cel.errors import CompileError, CostExceeded, EvalError, ResultTypeError
from knarr.api.cel.values import Optional, parse_duration, parse_timestamp
from knarr.api.errors import OMIT_VALUE, FieldError
from knarr.api.types import Object
from knarr.apiserver.celtimes import COMPILATION, EVALUATION, timed
from knarr.apiserver.crd import costs
from knarr.apiserver.crd.escaping import escape

NO_MORE = "no further validation rules will be run"


_METADATA = T.ObjectType("ObjectMeta", {"name": T.STRING, "generateName": T.STRING})


def type_of(schema: Object, name: str = "object", *, root: bool = False) -> T.Type:
    """Return the CEL type of a schema's values."""
    if schema.get("x-kubernetes-int-or-string") or (schema.get("x-kubernetes-preserve-unknown-fields") and not schema.get("properties")):
        return T.DYN
    kind = schema.get("type")
    if root or schema.get("x-kubernetes-embedded-resource"):
        fields = _fields(schema, name)
        fields |= {"apiVersion": T.STRING, "kind": T.STRING, "metadata": _METADATA}
        return T.ObjectType(name, fields)
    if kind == "object":
        if schema.get("properties"):
            return T.ObjectType(name, _fields(schema, name))
        more = schema.get("additionalProperties")
        return ("map", T.STRING, type_of(more, name + ".@prop")) if isinstance(more, dict) else T.DYN
    if kind == "array":
        return ("list", type_of(schema.get("items") or {}, name + ".@idx"))
    if kind == "string":
        return T.DYN if schema.get("format") in ("date", "date-time", "duration", "byte") else T.STRING
    simple: dict[str, T.Type] = {"integer": T.INT, "number": T.DYN, "boolean": T.BOOL}
    return simple.get(kind or "", T.DYN)


def _fields(schema: Object, name: str) -> dict[str, T.Type]:
    out: dict[str, T.Type] = {}
    for key, part in (schema.get("properties") or {}).items():
        escaped = escape(key)
        if escaped is not None:
            out[escaped] = type_of(part, f"{name}.{escaped}")
    return out


def value_of(schema: Object, value: Any, *, root: bool = False) -> Any:
    """Return a value as CEL sees it: properties under their escaped names, numbers as doubles, times as times."""
    if isinstance(value, dict):
        properties = schema.get("properties") or {}
        more = schema.get("additionalProperties")
        out = {}
        for key, each in value.items():
            if key in properties:
                escaped = escape(key)
                if escaped is not None:
                    out[escaped] = value_of(properties[key], each)
            elif isinstance(more, dict):
                out[key] = value_of(more, each)
            else:
                out[key] = each
        return out
    if isinstance(value, list):
        items = schema.get("items") or {}
        return [value_of(items, each) for each in value]
    if isinstance(value, int) and not isinstance(value, bool) and schema.get("type") == "number":
        return float(value)
    if isinstance(value, str) and schema.get("type") == "string" and schema.get("format") in _CONVERT:
        try:
            return _CONVERT[schema["format"]](value)
        except (EvalError, ValueError):
            return value
    return value


_CONVERT: dict[str, Callable[[str], Any]] = {
    "date-time": parse_timestamp, "duration": parse_duration, "byte": lambda text: b64decode(text, validate=True),
}


class _Rule:
    """One rule, compiled."""

    __slots__ = ("broken", "broken_message", "field_path", "given", "message", "message_program", "optional", "program", "reason", "text", "uses_old")

    def __init__(self, rule: Object, self_type: T.Type) -> None:
        self.given = rule
        self.text = rule.get("rule") or ""
        self.uses_old = re.search(r"\boldSelf\b", self.text) is not None
        self.optional = bool(rule.get("optionalOldSelf"))
        self.message = (rule.get("message") or "").strip() or f"failed rule: {self.text.strip()}"
        self.reason = rule.get("reason") or "FieldValueInvalid"
        self.field_path = rule.get("fieldPath") or ""
        variables: dict[str, T.Type] = {"self": self_type}
        if self.uses_old or self.optional:
            variables["oldSelf"] = ("optional", self_type) if self.optional else self_type
        self.broken: CompileError | None = None
        self.broken_message: CompileError | None = None
        self.program: cel.Program | None = None
        self.message_program: cel.Program | None = None
        try:
            with timed(COMPILATION):
                self.program = cel.base().compile(self.text, variables, result=cel.BOOL, exact=True)
        except CompileError as error:
            self.broken = error
        try:
            if rule.get("messageExpression"):
                self.message_program = cel.base().compile(rule["messageExpression"], variables, result=cel.STRING, exact=True)
        except CompileError as error:
            self.broken_message = error

    @property
    def shown(self) -> Object:
        """The rule as upstream prints it, with the names of its internal type."""
        texts = {name: self.given.get(key) or "" for name, key in (("Rule", "rule"), ("Message", "message"), ("MessageExpression", "messageExpression"))}
        rest = {"FieldPath": self.field_path, "OptionalOldSelf": self.given.get("optionalOldSelf")}
        return texts | {"Reason": self.given.get("reason")} | rest


class _Node:
    """A schema node with rules at or below it."""

    def __init__(self, schema: Object, *, root: bool = False) -> None:
        self.schema = schema
        self.root = root
        self_type = type_of(schema, root=root)
        self.rules = [_Rule(rule, self_type) for rule in schema.get("x-kubernetes-validations") or []]
        self.properties: dict[str, _Node] = {}
        for key, part in (schema.get("properties") or {}).items():
            node = _node(part)
            if node is not None:
                self.properties[key] = node
        self.items = _node(schema.get("items"))
        more = schema.get("additionalProperties")
        self.more = _node(more) if isinstance(more, dict) else None

    @property
    def empty(self) -> bool:
        return not (self.rules or self.properties or self.items or self.more)


def _node(schema: Object | None) -> _Node | None:
    if not isinstance(schema, dict):
        return None
    node = _Node(schema, root=bool(schema.get("x-kubernetes-embedded-resource")))
    return None if node.empty else node


class Rules:
    """All rules of one version; callable as knarr.api.structural wants it."""

    def __init__(self, schema: Object) -> None:
        self._root = _Node(schema, root=True)

    @property
    def empty(self) -> bool:
        return self._root.empty

    def __call__(self, obj: Object, old: Object | None) -> list[FieldError]:
        """Return the broken rules of an object that is otherwise valid."""
        found: list[FieldError] = []
        budget = cel.Budget(cel.TOTAL_LIMIT)
        with timed(EVALUATION), suppress(_Stop):
            _run(self._root, "", obj, old, found, budget, parent_unchanged=False)
        return found


class _Stop(Exception):
    """The budget is used up: what was found stands, nothing more is run."""


def _run(node: _Node, path: str, value: Any, old: Any, found: list[FieldError], budget: cel.Budget, *, parent_unchanged: bool) -> None:
    if value is None:
        return
    unchanged = parent_unchanged or (old is not None and old == value)
    if node.rules:
        _run_rules(node, path, value, old, found, budget, unchanged)
    if isinstance(value, dict):
        before = old if isinstance(old, dict) else {}
        for key, each in value.items():
            child = node.properties.get(key)
            if child is not None:
                _run(child, f"{path}.{key}" if path else key, each, before.get(key), found, budget, parent_unchanged=unchanged)
            elif node.more is not None and key not in (node.schema.get("properties") or {}):
                _run(node.more, f"{path}[{key}]", each, before.get(key), found, budget, parent_unchanged=unchanged)
    elif isinstance(value, list) and node.items is not None:
        matches = list(_correlated(node.schema, value, old))
        for index, each in enumerate(value):
            _run(node.items, f"{path}[{index}]", each, matches[index], found, budget, parent_unchanged=unchanged)


def _correlated(schema: Object, value: list[Any], old: Any) -> Iterator[Any]:
    """The old item of each item: by key in lists that have keys, else none can be told."""
    keys = schema.get("x-kubernetes-list-map-keys") if schema.get("x-kubernetes-list-type") == "map" else None
    if not keys or not isinstance(old, list):
        yield from [None] * len(value)
        return
    defaults = {key: ((schema.get("items") or {}).get("properties") or {}).get(key, {}).get("default") for key in keys}

    def identity(item: Any) -> tuple[Any, ...] | None:
        return tuple(item.get(key, defaults[key]) for key in keys) if isinstance(item, dict) else None

    index = {identity(item): item for item in old}
    for item in value:
        yield index.get(identity(item))


def _run_rules(node: _Node, path: str, value: Any, old: Any, found: list[FieldError], budget: cel.Budget, unchanged: bool) -> None:
    shown = node.schema.get("type", "")
    where = path or "<nil>"
    variables = {"self": _visible(node, value)}
    for rule in node.rules:
        if rule.uses_old and old is None and not rule.optional:
            continue
        if rule.program is None:
            found.append(errors.invalid_value(where, shown, f"rule compile error: {rule.broken}"))
            continue
        inputs = variables
        if rule.uses_old or rule.optional:
            before = _visible(node, old) if old is not None else None
            inputs = {**variables, "oldSelf": _optional(before) if rule.optional else before}
        try:
            own = cel.Budget(min(cel.PER_CALL_LIMIT, budget.left))
            result = rule.program.evaluate(inputs, own)
            budget.spend(own.spent)
        except CostExceeded as error:
            if budget.left < cel.PER_CALL_LIMIT:
                found.append(errors.invalid_value(where, shown, f"validation failed due to running out of cost budget, {NO_MORE}"))
            else:
                found.append(errors.invalid_value(where, shown, (
                    f"'{error}': {NO_MORE} due to call cost exceeds limit for rule: {rule.text}")))
            raise _Stop from None
        except EvalError as error:
            if not unchanged:
                found.append(errors.invalid_value(where, shown, f"{error} evaluating rule: {rule.text}"))
            continue
        if result is True or (unchanged and not rule.uses_old):
            continue
        found.append(_failure(node, rule, path, value, inputs))


def _visible(node: _Node, value: Any) -> Any:
    out = value_of(node.schema, value)
    if node.root and isinstance(value, dict):
        metadata = value.get("metadata") or {}
        out = {
            **out, "apiVersion": value.get("apiVersion", ""), "kind": value.get("kind", ""),
            "metadata": {key: metadata[key] for key in ("name", "generateName") if key in metadata},
        }
    return out


def _optional(value: Any) -> Optional:
    return Optional(value, present=value is not None)


def _failure(node: _Node, rule: _Rule, path: str, value: Any, inputs: dict[str, Any]) -> FieldError:
    detail = rule.message
    if rule.message_program is not None:
        try:
            text = rule.message_program.evaluate(inputs)
            if isinstance(text, str) and text.strip() and "\n" not in text and len(text) <= 5 * 1024:
                detail = text.strip()
        except EvalError:
            pass
    where = (path + rule.field_path).lstrip(".") or "<nil>"
    shown = OMIT_VALUE if node.schema.get("type") in ("object", "array") else value
    return FieldError(rule.reason, where, detail, shown)


def compile_errors(schema: Object, path: str) -> list[FieldError]:
    """Return what is wrong with the rules themselves, for the validation of a CRD.

    Args:
      path: Field path of the schema.
    """
    found: list[FieldError] = []
    root, bill = _Node(schema, root=True), costs.Bill()
    _compile_errors(root, path, found)
    place = costs.root(schema)
    if place is not None:
        found += _charge(root, path, place, bill)
    return found + bill.errors(path)


def _charge(node: _Node, path: str, place: costs.Place, bill: costs.Bill) -> list[FieldError]:
    """Which rules cost too much; adds all to the bill."""
    found: list[FieldError] = []
    for index, rule in enumerate(node.rules):
        found += bill.charge(place, f"{path}.x-kubernetes-validations[{index}]", rule.program, rule.message_program)
    below = [(child, f"properties[{key}]", place.child(child.schema, escape(key))) for key, child in node.properties.items()]
    if node.items is not None:
        below.append((node.items, "items", place.each(node.items.schema)))
    if node.more is not None:
        below.append((node.more, "additionalProperties", place.each(node.more.schema)))
    for child, name, at in below:
        if at is not None:
            found += _charge(child, f"{path}.{name}", at, bill)
    return found


def _compile_errors(node: _Node, path: str, found: list[FieldError], uncorrelated: str = "") -> None:
    for index, rule in enumerate(node.rules):
        own = f"{path}.x-kubernetes-validations[{index}]"
        if rule.broken is not None:
            wrong = isinstance(rule.broken, ResultTypeError)
            message = "cel expression must evaluate to a bool" if wrong else f"compilation failed: {rule.broken}"
            found.append(errors.invalid_value(f"{own}.rule", rule.shown, message))
        if rule.broken_message is not None:
            wrong = isinstance(rule.broken_message, ResultTypeError)
            message = "messageExpression must evaluate to a string" if wrong else f"messageExpression compilation failed: {rule.broken_message}"
            found.append(errors.invalid_value(f"{own}.messageExpression", rule.shown, message))
        # What a rule that cannot be compiled uses is not known.
        uses_old = rule.uses_old and rule.broken is None
        if not uses_old and rule.given.get("optionalOldSelf") is not None:
            message = "may not be set if oldSelf is not used in rule"
            found.append(errors.invalid_value(f"{own}.optionalOldSelf", rule.given["optionalOldSelf"], message))
        elif uses_old and uncorrelated:
            message = f"oldSelf cannot be used on the uncorrelatable portion of the schema within {uncorrelated}"
            found.append(errors.invalid_value(f"{own}.rule", rule.text, message))
    # The old one of a part can be told in maps that merge and in lists with keys.
    in_map = path if node.schema.get("x-kubernetes-map-type") == "atomic" else uncorrelated
    for key, child in node.properties.items():
        _compile_errors(child, f"{path}.properties[{key}]", found, in_map)
    if node.items is not None:
        _compile_errors(node.items, f"{path}.items", found, uncorrelated if node.schema.get("x-kubernetes-list-type") == "map" else path)
    if node.more is not None:
        _compile_errors(node.more, f"{path}.additionalProperties", found, uncorrelated)
