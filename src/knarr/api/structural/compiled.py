"""Fast functions over custom objects, compiled from a structural schema: prune, default, drop nulls, and "is it valid".

Used by custom.py. Functions change objects in place. `is_valid` says yes or no only; explain.py finds the words, so that
good objects pay nothing for messages.

Source: apiextensions-apiserver apiserver/schema (pruning, defaulting), kube-openapi validation/validate.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from knarr.api.meta import deep_copy
from knarr.api.patch.json_patch import equal
from knarr.api.structural import formats
from knarr.api.types import Object

Valid = Callable[[Any], bool]
Pruner = Callable[[Any], list[str] | None]
Changer = Callable[[Any], None]

META_FIELDS = frozenset({"apiVersion", "kind", "metadata"})


# --- prune ------------------------------------------------------------------------------------------------------------


def pruner(schema: Object, *, root: bool = False) -> Pruner | None:
    """A function that drops unspecified fields in place and returns their paths (None if there were none).

    Returns:
      The function, None where nothing ever needs pruning.
    """
    return _prune_node({**schema, "x-kubernetes-embedded-resource": True} if root else schema, root)


def _prune_node(schema: Object | None, root: bool = False) -> Pruner | None:
    if schema is None:
        return _prune_everything
    preserve = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
    embedded = bool(schema.get("x-kubernetes-embedded-resource"))
    properties: dict[str, Pruner | None] = {}
    for key, value in (schema.get("properties") or {}).items():
        properties[key] = _prune_node(value)
    additional = schema.get("additionalProperties")
    element: Pruner | None = None
    open_ended = preserve
    if isinstance(additional, dict):
        element, open_ended = _prune_node(additional), True
    elif additional:
        # additionalProperties: true is no structural schema; upstream prunes below it.
        element, open_ended = _prune_everything, True
    items = schema.get("items")
    item: Pruner | None = _skip_node(items) if preserve else _prune_node(items if isinstance(items, dict) else None)
    may_be_object = schema.get("type") in (None, "object")
    may_be_list = schema.get("type") in (None, "array")
    if not may_be_object and not may_be_list:
        # A scalar type: whatever else comes is refused by validation anyway.
        return None
    if open_ended and element is None and item is None and not any(properties.values()):
        return None
    return _make_pruner(properties, element, open_ended, item, META_FIELDS if embedded else frozenset(), root)


def _skip_node(schema: Any) -> Pruner | None:
    """Below preserve-unknown-fields only specified fields are looked into."""
    if not isinstance(schema, dict):
        return None
    return _prune_node({**schema, "x-kubernetes-preserve-unknown-fields": True})


def _prune_everything(value: Any) -> list[str] | None:
    if value.__class__ is dict:
        found = list(value)
        value.clear()
        return found or None
    if value.__class__ is list:
        return _each(value, _prune_everything)
    return None


def _each(items: list[Any], prune: Pruner) -> list[str] | None:
    found: list[str] | None = None
    for index, item in enumerate(items):
        if item.__class__ is dict or item.__class__ is list:
            below = prune(item)
            if below:
                found = found or []
                found.extend(f"[{index}]{path}" if path.startswith("[") else f"[{index}].{path}" for path in below)
    return found


def _make_pruner(
    properties: dict[str, Pruner | None], element: Pruner | None, open_ended: bool, item: Pruner | None, kept: frozenset[str], root: bool,
) -> Pruner:
    missing = object()
    get = properties.get
    specified = frozenset(properties)
    nested = tuple((key, inner) for key, inner in properties.items() if inner is not None)

    def prune(value: Any) -> list[str] | None:
        if value.__class__ is list:
            return _each(value, item) if item is not None else None
        if value.__class__ is not dict:
            return None
        found: list[str] | None = None
        if not kept and specified and value.keys() <= specified:
            # Nothing to drop here: only what has a structure of its own is looked into.
            for key, inner in nested:
                member = value.get(key)
                if (member.__class__ is dict or member.__class__ is list) and (paths := inner(member)):
                    found = found or []
                    found.extend(f"{key}{path}" if path.startswith("[") else f"{key}.{path}" for path in paths)
            return found
        dropped: list[str] | None = None
        for key, member in value.items():
            if kept and key in kept:
                continue
            below: Any = get(key, missing)
            if below is missing:
                if not open_ended:
                    dropped = dropped or []
                    dropped.append(key)
                    continue
                below = element
            if below is not None and (member.__class__ is dict or member.__class__ is list):
                paths = below(member)
                if paths:
                    found = found or []
                    found.extend(f"{key}{path}" if path.startswith("[") else f"{key}.{path}" for path in paths)
        if dropped:
            for key in dropped:
                del value[key]
            # Type meta and metadata at the root are never reported.
            reported = [key for key in dropped if not (root and key in META_FIELDS)]
            found = reported + (found or []) if reported else found
        return found

    return prune


# --- defaults and nulls -----------------------------------------------------------------------------------------------


def defaulter(schema: Object) -> Changer | None:
    """A function that fills in defaults in place, None if the schema has none."""
    defaults: dict[str, tuple[Any, bool, bool]] = {}
    below: dict[str, Changer] = {}
    for key, value in (schema.get("properties") or {}).items():
        if value.get("default") is not None:
            defaults[key] = (value["default"], bool(value.get("nullable")), isinstance(value["default"], dict | list))
        inner = defaulter(value)
        if inner is not None:
            below[key] = inner
    additional = schema.get("additionalProperties")
    element = _defaulted_member(additional) if isinstance(additional, dict) else None
    items = schema.get("items")
    item = _defaulted_member(items) if isinstance(items, dict) else None
    if not defaults and not below and element is None and item is None:
        return None
    known = frozenset(schema.get("properties") or ())

    def fill(value: Any) -> None:
        if value.__class__ is dict:
            for key, (default, nullable, nested) in defaults.items():
                if key not in value or (value[key] is None and not nullable):
                    value[key] = deep_copy(default) if nested else default
            for key, inner in below.items():
                member = value.get(key)
                if member.__class__ is dict or member.__class__ is list:
                    inner(member)
            if element is not None:
                for key in value:
                    if key not in known:
                        value[key] = element(value[key])
        elif value.__class__ is list and item is not None:
            for index, member in enumerate(value):
                value[index] = item(member)

    return fill


def _defaulted_member(schema: Object) -> Callable[[Any], Any] | None:
    """For values of maps and items of lists: a null that may not be one becomes the default."""
    inner = defaulter(schema)
    default, nullable = schema.get("default"), bool(schema.get("nullable"))
    if inner is None and default is None:
        return None

    def fill(value: Any) -> Any:
        if value is None and not nullable and default is not None:
            value = deep_copy(default)
        if inner is not None:
            inner(value)
        return value

    return fill


def null_dropper(schema: Object) -> Changer | None:
    """A function that removes, in place, null members that may be none and have no default."""
    droppable: set[str] = set()
    below: dict[str, Changer] = {}
    for key, value in (schema.get("properties") or {}).items():
        if not value.get("nullable") and value.get("default") is None:
            droppable.add(key)
        inner = null_dropper(value)
        if inner is not None:
            below[key] = inner
    additional = schema.get("additionalProperties")
    element = null_dropper(additional) if isinstance(additional, dict) else None
    drops_elements = isinstance(additional, dict) and not additional.get("nullable") and additional.get("default") is None
    items = schema.get("items")
    item = null_dropper(items) if isinstance(items, dict) else None
    if not droppable and not below and element is None and item is None and not drops_elements:
        return None
    known = frozenset(schema.get("properties") or ())

    def drop(value: Any) -> None:
        if value.__class__ is dict:
            nulls = [k for k, v in value.items() if v is None and (k in droppable or (drops_elements and k not in known))]
            for key in nulls:
                del value[key]
            for key, inner in below.items():
                member = value.get(key)
                if member.__class__ is dict or member.__class__ is list:
                    inner(member)
            if element is not None:
                for key, member in value.items():
                    if key not in known and (member.__class__ is dict or member.__class__ is list):
                        element(member)
        elif value.__class__ is list and item is not None:
            for member in value:
                item(member)

    return drop


# --- validity ---------------------------------------------------------------------------------------------------------


def is_integer(value: Any) -> bool:
    """Whether JSON Schema's integer fits: 3, and 3.0 as well."""
    return value.__class__ is int or (value.__class__ is float and value.is_integer())


_TYPES: dict[str, Valid] = {
    "string": lambda v: v.__class__ is str,
    "integer": is_integer,
    "number": lambda v: v.__class__ is int or v.__class__ is float,
    "boolean": lambda v: v is True or v is False,
    "object": lambda v: v.__class__ is dict,
    "array": lambda v: v.__class__ is list,
}


_CLASSES: dict[str, type] = {"string": str, "integer": int, "number": int, "boolean": bool, "object": dict, "array": list}
"""The class that values of a type mostly have."""


class Member(NamedTuple):
    """How one member is checked: a value of `expected` class by `rest` alone (None: it is valid), any other by `valid`."""

    valid: Valid
    expected: type | None
    rest: Valid | None


def validator(schema: Object) -> Valid | None:
    """A function that tells whether a value is valid, None if every value is."""
    made = _member(schema)
    return None if made is None else made.valid


def _member(schema: Object) -> Member | None:
    checks = [check for check in (_string_check(schema), _number_check(schema), _list_check(schema), _object_check(schema),
                                  _enum_check(schema), _logic_check(schema)) if check is not None]
    kind = schema.get("type")
    expected: type | None = None
    if schema.get("x-kubernetes-int-or-string"):
        is_type: Valid | None = lambda v: v.__class__ is str or is_integer(v)
        restricts_null = True
    else:
        is_type = _TYPES.get(kind) if kind else None
        expected = _CLASSES.get(kind) if kind else None
        restricts_null = bool(kind)
    nullable = bool(schema.get("nullable"))
    if is_type is None and not checks:
        return None
    enum = schema.get("enum")
    if not checks and is_type is not None and not nullable:
        return Member(is_type, expected, None)
    rest: Valid | None = None
    if checks:
        rest = checks[0] if len(checks) == 1 else lambda v: all(check(v) for check in checks)

    def valid(value: Any) -> bool:
        if value is None:
            return (nullable or not restricts_null) and (not enum or None in enum)
        return (is_type is None or is_type(value)) and (rest is None or rest(value))

    return Member(valid, expected, rest)


def _string_check(schema: Object) -> Valid | None:
    longest, shortest, pattern = schema.get("maxLength"), schema.get("minLength"), schema.get("pattern")
    fits = formats.format_check(schema.get("format") or "")
    search = None
    if pattern:
        try:
            search = formats.go_regex(pattern).search
        except formats.PatternError:
            return lambda v: v.__class__ is not str
    if longest is None and not shortest and search is None and fits is None:
        return None

    def check(value: Any) -> bool:
        if value.__class__ is not str:
            return True
        size = len(value)
        return (
            (longest is None or size <= longest) and (not shortest or size >= shortest)
            and (search is None or search(value) is not None) and (fits is None or fits(value))
        )

    return check


def _number_check(schema: Object) -> Valid | None:
    low, high, factor = schema.get("minimum"), schema.get("maximum"), schema.get("multipleOf")
    above, below = bool(schema.get("exclusiveMinimum")), bool(schema.get("exclusiveMaximum"))
    if low is None and high is None and factor is None:
        return None

    def check(value: Any) -> bool:
        if value.__class__ is not int and value.__class__ is not float:
            return True
        return (
            (low is None or (value > low if above else value >= low)) and (high is None or (value < high if below else value <= high))
            and (factor is None or is_multiple(value, factor))
        )

    return check


def is_multiple(value: Any, factor: Any) -> bool:
    """Whether a number is a multiple, as upstream computes it: in integers for integers, otherwise in floats."""
    if factor <= 0:
        return False
    if value.__class__ is int and float(factor).is_integer():
        return bool(value % int(factor) == 0)
    quotient = 1 / factor * value if factor < 1 else value / factor
    return bool(abs(quotient - round(quotient)) < 1e-9 * max(1.0, abs(quotient)))


def _list_check(schema: Object) -> Valid | None:
    most, least, unique = schema.get("maxItems"), schema.get("minItems"), schema.get("uniqueItems")
    items = schema.get("items")
    item = _member(items) if isinstance(items, dict) else None
    if most is None and not least and not unique and item is None:
        return None
    if item is None:
        item = Member(lambda v: True, None, None)
    valid, expected, rest = item

    def check(value: Any) -> bool:
        if value.__class__ is not list:
            return True
        if (most is not None and len(value) > most) or (least and len(value) < least):
            return False
        for member in value:
            if member.__class__ is not expected:
                if not valid(member):
                    return False
            elif rest is not None and not rest(member):
                return False
        return not (unique and has_duplicates(value))

    return check


def has_duplicates(items: list[Any]) -> bool:
    return any(equal(a, b) for index, a in enumerate(items) for b in items[:index])


def _object_check(schema: Object) -> Valid | None:
    members = {}
    for key, value in (schema.get("properties") or {}).items():
        inner = _member(value)
        if inner is not None:
            members[key] = inner
    known = frozenset(schema.get("properties") or ())
    required = tuple(schema.get("required") or ())
    most, least = schema.get("maxProperties"), schema.get("minProperties")
    additional = schema.get("additionalProperties")
    element = validator(additional) if isinstance(additional, dict) else None
    closed = additional is False
    if not members and not required and most is None and not least and element is None and not closed:
        return None
    get = members.get

    def check(value: Any) -> bool:
        if value.__class__ is not dict:
            return True
        for key in required:
            if key not in value:
                return False
        if (most is not None and len(value) > most) or (least and len(value) < least):
            return False
        for key, member in value.items():
            inner = get(key)
            if inner is not None:
                valid, expected, rest = inner
                if member.__class__ is not expected:
                    if not valid(member):
                        return False
                elif rest is not None and not rest(member):
                    return False
            elif element is not None and key not in known:
                if not element(member):
                    return False
            elif closed and key not in known:
                return False
        return True

    return check


def _enum_check(schema: Object) -> Valid | None:
    enum = schema.get("enum")
    if not enum:
        return None
    texts = {value for value in enum if isinstance(value, str)}
    others = [value for value in enum if not isinstance(value, str)]
    return lambda v: v in texts if v.__class__ is str else in_enum(v, others)


def in_enum(value: Any, allowed: list[Any]) -> bool:
    """Equality as upstream sees it: 1 and 1.0 are the same, true and 1 are not."""
    for other in allowed:
        if equal(value, other):
            return True
        numbers = isinstance(value, int | float) and isinstance(other, int | float)
        if numbers and not isinstance(value, bool) and not isinstance(other, bool) and value == other:
            return True
    return False


def _logic_check(schema: Object) -> Valid | None:
    def compiled(key: str) -> list[Valid]:
        return [validator(one) or (lambda v: True) for one in schema.get(key) or ()]

    all_of, any_of, one_of = compiled("allOf"), compiled("anyOf"), compiled("oneOf")
    negated = None
    if isinstance(schema.get("not"), dict):
        negated = validator(schema["not"]) or (lambda v: True)
    if not all_of and not any_of and not one_of and negated is None:
        return None

    def check(value: Any) -> bool:
        return (
            all(one(value) for one in all_of) and (not any_of or any(one(value) for one in any_of))
            and (not one_of or sum(one(value) for one in one_of) == 1) and (negated is None or not negated(value))
        )

    return check
