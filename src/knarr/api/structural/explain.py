"""Says what is wrong with a custom object, in upstream's words and order, once compiled.py has found it invalid.

Slow and exact: walks schema and value together, counts matches to pick the best failing alternative of anyOf and oneOf,
and forgives what an update did not change (ratcheting).

Source: kube-openapi validation/validate and validation/errors; apiextensions-apiserver validation (validation.go,
ratcheting.go).
"""

from dataclasses import dataclass, field
from typing import Any

from knarr.api import errors
from knarr.api.errors import FieldError, go_json, go_quote
from knarr.api.patch.json_patch import equal
from knarr.api.structural import compiled, formats
from knarr.api.types import Object

_NO_OLD: Any = object()


@dataclass
class Result:
    """Findings of one schema on one value; matches is upstream's MatchCount."""

    errors: list[FieldError] = field(default_factory=list)
    matches: int = 0

    def merge(self, other: "Result") -> None:
        self.add(*other.errors)
        self.matches += other.matches

    def add(self, *found: FieldError) -> None:
        for error in found:
            if error not in self.errors:
                self.errors.append(error)


def explain(schema: Object, value: Any, old: Any = None, *, path: str = "", has_old: bool = False) -> list[FieldError]:
    """All schema violations of a value.

    Args:
      old: The value before, if has_old: what did not change is not reported.
      path: Where the value stands, "" for a whole object.
    """
    return _check(schema, value, "", old if has_old else _NO_OLD, path).errors


def _field(path: str, prefix: str) -> str:
    name = path.removeprefix(".")
    if not name:
        return prefix
    return f"{prefix}.{name}" if prefix else name


def _check(schema: Object, value: Any, path: str, old: Any, prefix: str) -> Result:
    result = _check_value(schema, value, path, old, prefix)
    if result.errors and old is not _NO_OLD and equal(value, old):
        return Result([], result.matches)
    return result


def _type_names(schema: Object) -> tuple[str, ...]:
    if schema.get("x-kubernetes-int-or-string"):
        return ("integer", "string")
    return (schema["type"],) if schema.get("type") else ()


def _type_of(value: Any) -> str:
    match value:
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "number"
        case list():
            return "array"
        case dict():
            return "object"
    return "null"


def _type_error(path: str, prefix: str, names: str, actual: str) -> FieldError:
    message = f"{path} in body must be of type {names}: {go_quote(actual)}"
    return errors.type_invalid(_field(path, prefix), actual, message)


def _check_value(schema: Object, value: Any, path: str, old: Any, prefix: str) -> Result:
    result = Result()
    names = _type_names(schema)
    if value is None:
        if names and not schema.get("nullable"):
            result.add(_type_error(path, prefix, ",".join(names), "null"))
        if schema.get("enum") and None not in schema["enum"]:
            result.add(_enum_error(schema, value, path, prefix))
        return result
    if names:
        actual = _type_of(value)
        fits = actual in names or (actual == "number" and "integer" in names and value.is_integer()) or (
            actual == "integer" and "number" in names)
        if not fits:
            result.add(_type_error(path, prefix, ",".join(names), actual))
        else:
            result.matches += 1
        result.matches += 1
    result.merge(_logic(schema, value, path, old, prefix))
    result.matches += 1
    match value:
        case bool():
            pass
        case str():
            _string(schema, value, path, prefix, result)
        case int() | float():
            _number(schema, value, path, prefix, result)
        case list():
            _list(schema, value, path, old, prefix, result)
        case dict():
            _object(schema, value, path, old, prefix, result)
    if schema.get("enum"):
        if not compiled.in_enum(value, schema["enum"]):
            result.add(_enum_error(schema, value, path, prefix))
        result.matches += 1
    result.matches += 1
    return result


def _enum_error(schema: Object, value: Any, path: str, prefix: str) -> FieldError:
    shown = [one if isinstance(one, str) else go_json(one) for one in schema["enum"]]
    return errors.not_supported(_field(path, prefix), "" if value is None else value, shown)


def _invalid(path: str, prefix: str, value: Any, rule: str) -> FieldError:
    return errors.invalid_value(_field(path, prefix), value, f"{path} in body {rule}")


def _string(schema: Object, value: str, path: str, prefix: str, result: Result) -> None:
    longest, shortest, pattern = schema.get("maxLength"), schema.get("minLength"), schema.get("pattern")
    if longest is not None and len(value) > longest:
        result.add(errors.too_long(_field(path, prefix), longest))
    elif shortest is not None and len(value) < shortest:
        result.add(_invalid(path, prefix, value, f"should be at least {shortest} chars long"))
    elif pattern:
        try:
            if formats.go_regex(pattern).search(value) is None:
                result.add(_invalid(path, prefix, value, f"should match '{pattern}'"))
        except formats.PatternError as error:
            result.add(_invalid(path, prefix, value, f"should match '{pattern}, but pattern is invalid: {error}'"))
    result.matches += 1
    name = schema.get("format") or ""
    fits = formats.format_check(name)
    if fits is not None:
        if not fits(value):
            result.add(_type_error(path, prefix, name, value))
        result.matches += 1


def _number_text(value: Any) -> str:
    return str(int(value)) if isinstance(value, float) and value.is_integer() else repr(value)


def _number(schema: Object, value: Any, path: str, prefix: str, result: Result) -> None:
    factor, low, high = schema.get("multipleOf"), schema.get("minimum"), schema.get("maximum")
    if factor is not None and not compiled.is_multiple(value, factor):
        result.add(_invalid(path, prefix, value, f"should be a multiple of {_number_text(factor)}"))
    if low is not None:
        strict = bool(schema.get("exclusiveMinimum"))
        if value < low or (strict and value == low):
            word = "greater than" if strict else "greater than or equal to"
            result.add(_invalid(path, prefix, value, f"should be {word} {_number_text(low)}"))
    if high is not None:
        strict = bool(schema.get("exclusiveMaximum"))
        if value > high or (strict and value == high):
            word = "less than" if strict else "less than or equal to"
            result.add(_invalid(path, prefix, value, f"should be {word} {_number_text(high)}"))
    result.matches += 2


def _list(schema: Object, value: list[Any], path: str, old: Any, prefix: str, result: Result) -> None:
    items = schema.get("items")
    if isinstance(items, dict):
        before = _old_items(schema, old)
        for index, item in enumerate(value):
            result.merge(_check(items, item, f"{path}[{index}]", _old_item(schema, before, item), prefix))
    least, most = schema.get("minItems"), schema.get("maxItems")
    if least is not None and len(value) < least:
        result.add(_invalid(path, prefix, len(value), f"should have at least {least} items"))
    if most is not None and len(value) > most:
        result.add(errors.too_many(_field(path, prefix), len(value), most))
    if schema.get("uniqueItems") and compiled.has_duplicates(value):
        result.add(_invalid(path, prefix, "", "shouldn't contain duplicates"))
    result.matches += 2


def list_key(schema: Object, item: Any) -> tuple[Any, ...] | None:
    """The identity of an item of a list of type map, None if it has none."""
    if not isinstance(item, dict):
        return None
    properties = (schema.get("items") or {}).get("properties") or {}
    found = []
    for key in schema.get("x-kubernetes-list-map-keys") or ():
        value = item.get(key, properties.get(key, {}).get("default"))
        if isinstance(value, dict | list):
            return None
        found.append((key, type(value).__name__, value))
    return tuple(found)


def _old_items(schema: Object, old: Any) -> dict[Any, Any]:
    """The old items by key; only lists of type map can be matched up."""
    if old is _NO_OLD or not isinstance(old, list) or schema.get("x-kubernetes-list-type") != "map":
        return {}
    return {list_key(schema, item): item for item in old}


def _old_item(schema: Object, before: dict[Any, Any], item: Any) -> Any:
    return before.get(list_key(schema, item), _NO_OLD) if before else _NO_OLD


def _old_member(old: Any, key: str, path: str) -> Any:
    if old is _NO_OLD or not isinstance(old, dict) or (not path and key in ("apiVersion", "kind")):
        return _NO_OLD
    return old.get(key, _NO_OLD)


def _object(schema: Object, value: Object, path: str, old: Any, prefix: str, result: Result) -> None:
    properties = schema.get("properties") or {}
    least, most = schema.get("minProperties"), schema.get("maxProperties")
    if least is not None and len(value) < least:
        result.add(_invalid(path, prefix, len(value), f"should have at least {least} properties"))
    if most is not None and len(value) > most:
        result.add(errors.too_many(_field(path, prefix), len(value), most))
    additional = schema.get("additionalProperties")
    for key, member in value.items():
        if key in properties:
            continue
        here = f"{path}.{key}"
        if additional is False:
            result.add(errors.invalid_value(_field(path, prefix), key, f"{path}.{key} in body is a forbidden property"))
        elif isinstance(additional, dict):
            result.merge(_check(additional, member, here, _old_member(old, key, path), prefix))
    for key, one in properties.items():
        if key in value:
            result.merge(_check(one, value[key], f"{path}.{key}" if path else key, _old_member(old, key, path), prefix))
    for key in schema.get("required") or ():
        if key not in value:
            result.add(errors.required(_field(f"{path}.{key}", prefix)))
    result.matches += 1


def _composite(text: str, prefix: str) -> FieldError:
    return errors.invalid_value(prefix or "<nil>", "", text)


def _best(failures: list[Result]) -> Result:
    best = failures[0]
    for one in failures[1:]:
        if one.matches > best.matches:
            best = one
    return best


def _logic(schema: Object, value: Any, path: str, old: Any, prefix: str) -> Result:
    result = Result()
    shown = go_quote(path)
    if schema.get("anyOf"):
        results = [_check(one, value, path, old, prefix) for one in schema["anyOf"]]
        good = next((one for one in results if not one.errors), None)
        if good is None:
            result.add(_composite(f"{shown} must validate at least one schema (anyOf)", prefix))
            result.merge(_best(results))
        else:
            result.merge(good)
    if schema.get("oneOf"):
        results = [_check(one, value, path, old, prefix) for one in schema["oneOf"]]
        matching = [one for one in results if not one.errors]
        if len(matching) == 1:
            result.merge(matching[0])
        else:
            why = f"Found {len(matching)} valid alternatives" if matching else "Found none valid"
            result.add(_composite(f"{shown} must validate one and only one schema (oneOf). {why}", prefix))
            if not matching:
                result.merge(_best(results))
    if schema.get("allOf"):
        results = [_check(one, value, path, old, prefix) for one in schema["allOf"]]
        for one in results:
            result.merge(one)
        if any(one.errors for one in results):
            none = ". None validated" if all(one.errors for one in results) else ""
            result.add(_composite(f"{shown} must validate all the schemas (allOf){none}", prefix))
    if isinstance(schema.get("not"), dict) and not _check(schema["not"], value, path, old, prefix).errors:
        result.add(_composite(f"{shown} must not validate the schema (not)", prefix))
    result.matches += 1
    return result
