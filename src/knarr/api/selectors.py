"""Label and field selectors, compiled once, matched often.

Used by lists and watches, controllers, services and the scheduler. Matching takes plain mappings and allocates
nothing. Errors carry upstream's text; the caller makes the Status of it.

Source: apimachinery labels/selector.go, fields/selector.go, meta/v1/helpers.go (LabelSelectorAsSelector).
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from knarr.api.errors import go_json, go_quote


class SelectorError(ValueError):
    """The selector cannot be parsed; the message is upstream's."""


_LABEL_VALUE = re.compile(r"(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?", re.ASCII)
_QUALIFIED_NAME = re.compile(r"([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]", re.ASCII)
_SUBDOMAIN = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*", re.ASCII)
_VALUE_RULE = (
    "a valid label must be an empty string or consist of alphanumeric characters, '-', '_' or '.', and must start and end with an "
    "alphanumeric character (e.g. 'MyValue',  or 'my_value',  or '12345', regex used for validation is "
    "'(([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9])?')"
)
_NAME_RULE = (
    "name part must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character "
    "(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]')"
)
_PREFIX_RULE = (
    "prefix part a lowercase RFC 1123 subdomain must consist of lower case alphanumeric characters, '-' or '.', and must start and end "
    "with an alphanumeric character (e.g. 'example.com', regex used for validation is "
    "'[a-z0-9]([-a-z0-9]*[a-z0-9])?(\\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*')"
)
_KEY_SHAPE_RULE = (
    "a valid label key must consist of alphanumeric characters, '-', '_' or '.', and must start and end with an alphanumeric character "
    "(e.g. 'MyName',  or 'my.name',  or '123-abc', regex used for validation is '([A-Za-z0-9][-A-Za-z0-9_.]*)?[A-Za-z0-9]') "
    "with an optional DNS subdomain prefix and '/' (e.g. 'example.com/MyName')"
)


@lru_cache(maxsize=8192)
def label_key_errors(key: str) -> tuple[str, ...]:
    """What is wrong with a qualified name such as a label key; empty if nothing."""
    errors: list[str] = []
    parts = key.split("/")
    if len(parts) > 2:
        return (_KEY_SHAPE_RULE,)
    name = parts[-1]
    if len(parts) == 2:
        prefix = parts[0]
        if not prefix:
            errors.append("prefix part must be non-empty")
        else:
            if len(prefix) > 253:
                errors.append("prefix part must be no more than 253 bytes")
            if not _SUBDOMAIN.fullmatch(prefix):
                errors.append(_PREFIX_RULE)
    if not name:
        errors.append("name part must be non-empty")
    elif len(name.encode()) > 63:
        errors.append("name part must be no more than 63 bytes")
    if not _QUALIFIED_NAME.fullmatch(name):
        errors.append(_NAME_RULE)
    return tuple(errors)


@lru_cache(maxsize=8192)
def label_value_errors(value: str) -> tuple[str, ...]:
    """What is wrong with a label value; empty if nothing."""
    errors: list[str] = []
    if len(value.encode()) > 63:
        errors.append("must be no more than 63 bytes")
    if not _LABEL_VALUE.fullmatch(value):
        errors.append(_VALUE_RULE)
    return tuple(errors)


@dataclass(frozen=True, slots=True)
class Requirement:
    """One term: operator is "in", "notin", "=", "==", "!=", "exists", "!", "gt" or "lt"."""

    key: str
    operator: str
    values: tuple[str, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        value = labels.get(self.key)
        match self.operator:
            case "in" | "=" | "==":
                return value is not None and value in self.values
            case "notin" | "!=":
                return value is None or value not in self.values
            case "exists":
                return value is not None
            case "!":
                return value is None
            case _:
                number = _int64(value)
                bound = _int64(self.values[0])
                if number is None or bound is None:
                    return False
                return number > bound if self.operator == "gt" else number < bound

    def __str__(self) -> str:
        match self.operator:
            case "exists":
                return self.key
            case "!":
                return f"!{self.key}"
            case "in" | "notin":
                return f"{self.key} {self.operator} ({','.join(sorted(self.values))})"
            case "gt":
                return f"{self.key}>{self.values[0]}"
            case "lt":
                return f"{self.key}<{self.values[0]}"
            case _:
                return f"{self.key}{self.operator}{self.values[0]}"


def _int64(text: str | None) -> int | None:
    if text is None or not re.fullmatch(r"[+-]?[0-9]+", text, re.ASCII):
        return None
    number = int(text)
    return number if -(2**63) <= number < 2**63 else None


class LabelSelector:
    """A conjunction of requirements; without any it matches everything, with nothing=True nothing."""

    __slots__ = ("_equal", "_rest", "nothing", "requirements")

    def __init__(self, requirements: Iterable[Requirement] = (), *, nothing: bool = False) -> None:
        self.requirements = tuple(requirements)
        self.nothing = nothing
        self._equal = tuple((r.key, r.values[0]) for r in self.requirements if r.operator in ("=", "==", "in") and len(r.values) == 1)
        self._rest = tuple(r for r in self.requirements if not (r.operator in ("=", "==", "in") and len(r.values) == 1))

    @property
    def empty(self) -> bool:
        """True if everything matches."""
        return not self.requirements and not self.nothing

    def matches(self, labels: Mapping[str, str] | None) -> bool:
        """Whether an object with these labels is selected (None: no labels)."""
        if self.nothing:
            return False
        if labels is None:
            labels = {}
        get = labels.get
        for key, value in self._equal:
            if get(key) != value:
                return False
        for requirement in self._rest:
            if not requirement.matches(labels):
                return False
        return True

    def __str__(self) -> str:
        return ",".join(str(r) for r in sorted(self.requirements, key=lambda r: r.key))


EVERYTHING = LabelSelector()
NOTHING = LabelSelector(nothing=True)


def new_requirement(key: str, operator: str, values: Iterable[str] = (), *, path: str = "") -> Requirement:
    """Check and make a requirement.

    Raises:
      SelectorError: bad key, operator or values, in upstream's words.
    """
    values = tuple(values)
    errors: list[str] = []

    def add(field: str, value: Any, rule: str) -> None:
        shown = go_quote(value) if isinstance(value, str) else go_json(value)
        errors.append(f"{f'{path}.' if path else ''}{field}: Invalid value: {shown}: {rule}")

    key_errors = label_key_errors(key)
    if key_errors:
        add("key", key, "; ".join(key_errors))
    if operator in ("in", "notin"):
        if not values:
            add("values", [], "for 'in', 'notin' operators, values set can't be empty")
    elif operator in ("=", "==", "!="):
        if len(values) != 1:
            add("values", list(values), "exact-match compatibility requires one single value")
    elif operator in ("exists", "!"):
        if values:
            add("values", list(values), "values set must be empty for exists and does not exist")
    elif operator in ("gt", "lt"):
        if len(values) != 1:
            add("values", list(values), "for 'Gt', 'Lt' operators, exactly one value is required")
        for index, value in enumerate(values):
            if _int64(value) is None:
                add(f"values[{index}]", value, "for 'Gt', 'Lt' operators, the value must be an integer")
    for index, value in enumerate(values):
        value_errors = label_value_errors(value)
        if value_errors:
            add(f"values[{index}][{key}]", value, "; ".join(value_errors))
    if errors:
        raise SelectorError(errors[0] if len(errors) == 1 else f"[{', '.join(errors)}]")
    return Requirement(key, operator, values)


_OPERATOR_TOKENS = {")", ",", "!", "==", "=", ">", "in", "<", "!=", "notin", "("}
_BINARY_OPERATORS = "in, notin, =, ==, !=, gt, lt"


def _lex(text: str) -> list[tuple[str, str]]:
    """Tokens as (kind, literal): kind is the operator itself, "id", "error" or "" at the end."""
    tokens: list[tuple[str, str]] = []
    position, end = 0, len(text)
    while True:
        while position < end and text[position] in " \t\r\n":
            position += 1
        if position >= end:
            tokens.append(("", ""))
            return tokens
        if text[position] in "=!(),><":
            stop, found = position, ""
            while stop < end and text[stop] in "=!(),><":
                stop += 1
                if text[position:stop] in _OPERATOR_TOKENS:
                    found = text[position:stop]
                elif found:
                    break
            if not found:
                tokens.append(("error", f"error expected: keyword found '{text[position:stop]}'"))
                position = stop
                continue
            tokens.append((found, found))
            position += len(found)
            continue
        stop = position
        while stop < end and text[stop] not in "=!(),>< \t\r\n":
            stop += 1
        word = text[position:stop]
        tokens.append((word if word in ("in", "notin") else "id", word))
        position = stop


class _Parser:
    def __init__(self, text: str) -> None:
        self.tokens = _lex(text)
        self.position = 0

    def look(self, values: bool = True) -> tuple[str, str]:
        kind, literal = self.tokens[min(self.position, len(self.tokens) - 1)]
        return ("id", literal) if values and kind in ("in", "notin") else (kind, literal)

    def take(self, values: bool = True) -> tuple[str, str]:
        token = self.look(values)
        self.position += 1
        return token

    def parse(self) -> list[Requirement]:
        requirements: list[Requirement] = []
        while True:
            kind, literal = self.look()
            if kind == "":
                return requirements
            if kind not in ("id", "!"):
                raise SelectorError(f"found '{literal}', expected: !, identifier, or 'end of string'")
            try:
                requirements.append(self.requirement())
            except SelectorError as error:
                raise SelectorError(f"unable to parse requirement: {error}") from None
            kind, literal = self.take()
            if kind == "":
                return requirements
            if kind != ",":
                raise SelectorError(f"found '{literal}', expected: ',' or 'end of string'")
            kind, literal = self.look()
            if kind not in ("id", "!"):
                raise SelectorError(f"found '{literal}', expected: identifier after ','")

    def requirement(self) -> Requirement:
        kind, key = self.take()
        negated = kind == "!"
        if negated:
            kind, key = self.take()
        if kind != "id":
            raise SelectorError(f"found '{key}', expected: identifier")
        key_errors = label_key_errors(key)
        if key_errors:
            raise SelectorError(f"<nil>: Invalid value: {go_quote(key)}: {'; '.join(key_errors)}")
        if negated:
            # An operator after "!key" makes upstream fail at the comma, which the caller's loop reports.
            return new_requirement(key, "!")
        if self.look()[0] in ("", ","):
            return new_requirement(key, "exists")
        operator, literal = self.take(values=False)
        names = {"in": "in", "notin": "notin", "=": "=", "==": "==", "!=": "!=", ">": "gt", "<": "lt"}
        if operator not in names:
            raise SelectorError(f"found '{literal}', expected: {_BINARY_OPERATORS}")
        values = self.values() if operator in ("in", "notin") else self.exact_value()
        return new_requirement(key, names[operator], sorted(values))

    def exact_value(self) -> set[str]:
        if self.look()[0] in ("", ","):
            return {""}
        kind, literal = self.take()
        if kind != "id":
            raise SelectorError(f"found '{literal}', expected: identifier")
        return {literal}

    def values(self) -> set[str]:
        kind, literal = self.take()
        if kind != "(":
            raise SelectorError(f"found '{literal}' expected: '('")
        kind, literal = self.look()
        if kind == ")":
            self.take()
            return {""}
        if kind not in ("id", ","):
            raise SelectorError(f"found '{literal}', expected: ',', ')' or identifier")
        values = self.identifiers()
        if self.take()[0] != ")":
            raise SelectorError(f"found '{literal}', expected: ')'")
        return values

    def identifiers(self) -> set[str]:
        found: set[str] = set()
        while True:
            kind, literal = self.take()
            if kind == "id":
                found.add(literal)
                following, next_literal = self.look()
                if following == ")":
                    return found
                if following != ",":
                    raise SelectorError(f"found '{next_literal}', expected: ',' or ')'")
            elif kind == ",":
                if not found:
                    found.add("")
                following = self.look()[0]
                if following == ")":
                    found.add("")
                    return found
                if following == ",":
                    found.add("")
            else:
                raise SelectorError(f"found '{literal}', expected: ',', or identifier")


@lru_cache(maxsize=2048)
def parse_label_selector(text: str) -> LabelSelector:
    """Compile "a=b,c in (d,e),!f"; the empty text selects everything.

    Raises:
      SelectorError: cannot be parsed.
    """
    return LabelSelector(sorted(_Parser(text).parse(), key=lambda r: r.key)) if text else EVERYTHING


_OPERATORS = {"In": "in", "NotIn": "notin", "Exists": "exists", "DoesNotExist": "!"}


def from_label_selector(obj: Mapping[str, Any] | None) -> LabelSelector:
    """Compile a meta/v1 LabelSelector; None selects nothing, an empty one everything.

    Raises:
      SelectorError: bad operator, key or value.
    """
    if obj is None:
        return NOTHING
    requirements = [new_requirement(key, "=", (value,)) for key, value in (obj.get("matchLabels") or {}).items()]
    for expression in obj.get("matchExpressions") or ():
        operator = _OPERATORS.get(expression.get("operator") or "")
        if operator is None:
            raise SelectorError(f"{go_quote(expression.get('operator') or '')} is not a valid label selector operator")
        requirements.append(new_requirement(expression.get("key") or "", operator, expression.get("values") or ()))
    return LabelSelector(requirements)


def from_map(labels: Mapping[str, str] | None) -> LabelSelector:
    """Compile a plain map as Services and ReplicationControllers carry it; empty or None selects everything."""
    return LabelSelector(Requirement(key, "=", (value,)) for key, value in (labels or {}).items())


@dataclass(frozen=True, slots=True)
class FieldTerm:
    """field=value, or field!=value if negated."""

    field: str
    value: str
    negated: bool = False


class FieldSelector:
    """A conjunction of field terms; fields are dotted paths such as "metadata.name"."""

    __slots__ = ("terms",)

    def __init__(self, terms: Iterable[FieldTerm] = ()) -> None:
        self.terms = tuple(terms)

    @property
    def empty(self) -> bool:
        return not self.terms

    def matches(self, fields: "Mapping[str, str] | Callable[[str], str]") -> bool:
        """Whether an object with these field values is selected; an absent field counts as ""."""
        get: Callable[[str], str] = fields if callable(fields) else (lambda name: fields.get(name) or "")
        return all((get(term.field) == term.value) != term.negated for term in self.terms)

    def required_value(self, field: str) -> str | None:
        """The value a field must have, None if the selector does not demand one."""
        for term in self.terms:
            if term.field == field and not term.negated:
                return term.value
        return None

    def __str__(self) -> str:
        return ",".join(f"{t.field}{'!=' if t.negated else '='}{_escape(t.value)}" for t in self.terms)


def _escape(value: str) -> str:
    return value.replace("\\", "\\\\").replace(",", "\\,").replace("=", "\\=")


def _unescape(text: str) -> str:
    out: list[str] = []
    index = 0
    while index < len(text):
        character = text[index]
        if character == "\\":
            following = text[index + 1 : index + 2]
            if following not in ("\\", ",", "=") or not following:
                raise SelectorError(f"invalid field selector: invalid escape sequence: {text[index:index + 2]}")
            out.append(following)
            index += 2
            continue
        if character in ",=":
            raise SelectorError(f"invalid field selector: unescaped character in value: {ord(character)}")
        out.append(character)
        index += 1
    return "".join(out)


@lru_cache(maxsize=2048)
def parse_field_selector(text: str) -> FieldSelector:
    """Compile "metadata.name=a,spec.nodeName!=b"; the empty text selects everything.

    Raises:
      SelectorError: cannot be parsed. Whether a resource supports a field is the caller's to check.
    """
    terms: list[FieldTerm] = []
    for part in sorted(re.findall(r"(?:\\.|[^,\\])+|\\$", text)):
        match = re.match(r"(.*?)(!=|==|=)(.*)", part, re.DOTALL)
        if part.endswith("\\") and not part.endswith("\\\\"):
            raise SelectorError("invalid field selector: invalid escape sequence: \\")
        if match is None:
            raise SelectorError(f"invalid selector: '{text}'; can't understand '{part}'")
        term = FieldTerm(match[1], _unescape(match[3]), match[2] == "!=")
        if term.field or term.value or term.negated:
            terms.append(term)
    return FieldSelector(terms)
