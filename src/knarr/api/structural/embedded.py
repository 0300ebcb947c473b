"""Two properties of custom objects that lie beside the schema: embedded resources, and lists of type set and map.

Used by custom.py. Source: apiextensions-apiserver apiserver/schema/objectmeta, apiserver/schema/listtype.
"""

from collections.abc import Callable, Iterator
from typing import Any

from knarr.api import decode, errors
from knarr.api.errors import FieldError, StatusError, bad_request
from knarr.api.patch.json_patch import equal
from knarr.api.structural.explain import list_key
from knarr.api.types import Object

Check = Callable[[Any], list[FieldError]]


def has_embedded(schema: Any) -> bool:
    """Whether a schema has embedded resources below its root."""
    return any(_embeds(one) for one in _below(schema))


def _embeds(schema: Any) -> bool:
    return isinstance(schema, dict) and (bool(schema.get("x-kubernetes-embedded-resource")) or has_embedded(schema))


def _below(schema: Any) -> Iterator[Any]:
    if isinstance(schema, dict):
        yield from (schema.get("properties") or {}).values()
        for key in ("additionalProperties", "items"):
            if isinstance(schema.get(key), dict):
                yield schema[key]


def _members(schema: Object, value: Any, path: str) -> Iterator[tuple[Object, Any, str]]:
    """(schema, value, path) of what lies directly below."""
    if isinstance(value, dict):
        properties, additional = schema.get("properties") or {}, schema.get("additionalProperties")
        for key, member in value.items():
            if key in properties:
                yield properties[key], member, f"{path}.{key}" if path else key
            elif isinstance(additional, dict):
                yield additional, member, f"{path}[{key}]"
    elif isinstance(value, list) and isinstance(schema.get("items"), dict):
        for index, member in enumerate(value):
            yield schema["items"], member, f"{path}[{index}]"


def _objects(schema: Object, value: Any, path: str = "") -> Iterator[tuple[Object, str]]:
    """(embedded object, path) of all embedded resources."""
    for below, member, where in _members(schema, value, path):
        if below.get("x-kubernetes-embedded-resource") and isinstance(member, dict):
            yield member, where
        yield from _objects(below, member, where)


def coerce(schema: Object, obj: Object) -> list[str]:
    """Type-check and prune the metadata of embedded objects in place.

    Returns:
      The paths of unknown metadata fields.

    Raises:
      StatusError: 400, apiVersion, kind or metadata of the wrong type.
    """
    unknown: list[str] = []
    for embedded, path in _objects(schema, obj):
        for key in ("apiVersion", "kind"):
            if key in embedded and not isinstance(embedded[key], str):
                raise bad_request(str(errors.invalid_value(f"{path}.{key}", embedded[key], "must be a string")))
        if "metadata" in embedded:
            given = embedded["metadata"]
            try:
                found = decode.check_metadata(embedded, f"{path}.metadata")
            except StatusError as error:
                raise bad_request(str(errors.invalid_value(f"{path}.metadata", given, error.message))) from None
            unknown += [text.removeprefix('unknown field "').removesuffix('"') for text in found]
    return unknown


def validate(schema: Object, obj: Object) -> list[FieldError]:
    """Broken rules of embedded objects' type meta and metadata."""
    from knarr.api.validation import metadata, strings

    found: list[FieldError] = []
    for embedded, path in _objects(schema, obj):
        for key in ("apiVersion", "kind"):
            value = embedded.get(key)
            if key not in embedded:
                found.append(errors.required(f"{path}.{key}"))
            elif not isinstance(value, str):
                found.append(errors.invalid_value(f"{path}.{key}", value, "must be a string"))
            elif not value:
                found.append(errors.invalid_value(f"{path}.{key}", value, "must not be empty"))
            elif key == "apiVersion" and value.count("/") > 1:
                found.append(errors.invalid_value(f"{path}.{key}", value, f"unexpected GroupVersion string: {value}"))
            elif key == "kind":
                problems = strings.dns_1035_label(value.lower())
                if problems:
                    found.append(errors.invalid_value(
                        f"{path}.{key}", value, f"may have mixed case, but should otherwise match: {','.join(problems)}"))
        if isinstance(embedded.get("metadata"), dict):
            meta = {"name": "fakename", **{k: v for k, v in embedded["metadata"].items() if k != "name" or v}}
            metadata.validate_object_meta(
                meta, bool(meta.get("namespace")), strings.path_segment, found, f"{path}.metadata", core_finalizers=False,
            )
    return found


# --- lists of type set and map ----------------------------------------------------------------------------------------


def list_type_checker(schema: Any) -> Check | None:
    """A function that finds duplicates in sets and keyed lists, None if the schema has neither."""
    return (lambda value: _check(schema, value, "")) if _has_list_types(schema) else None


def _has_list_types(schema: Any) -> bool:
    if not isinstance(schema, dict):
        return False
    return schema.get("x-kubernetes-list-type") in ("set", "map") or any(_has_list_types(one) for one in _below(schema))


def _check(schema: Object, value: Any, path: str) -> list[FieldError]:
    found: list[FieldError] = []
    if isinstance(value, list):
        kind = schema.get("x-kubernetes-list-type")
        if kind == "set":
            found += _check_set(value, path)
        elif kind == "map":
            found += _check_map(schema, value, path)
    for below, member, where in _members(schema, value, path):
        if isinstance(member, dict | list):
            found += _check(below, member, where)
    return found


def _check_set(items: list[Any], path: str) -> list[FieldError]:
    return [
        errors.duplicate(f"{path}[{index}]", item)
        for index, item in enumerate(items)
        if any(equal(item, other) for other in items[:index]) and not any(equal(item, other) for other in _reported(items, index))
    ]


def _reported(items: list[Any], index: int) -> list[Any]:
    """Items before the index that were duplicates already: upstream reports each value once."""
    return [item for i, item in enumerate(items[:index]) if any(equal(item, other) for other in items[:i])]


def _check_map(schema: Object, items: list[Any], path: str) -> list[FieldError]:
    seen: set[Any] = set()
    reported: set[Any] = set()
    found: list[FieldError] = []
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            return [errors.invalid_value(f"{path}[{index}]", item, "must be an object for an array of list-type map")]
        key = list_key(schema, item)
        if key is None:
            continue
        if key in seen and key not in reported:
            reported.add(key)
            found.append(errors.duplicate(f"{path}[{index}]", {name: value for name, _, value in key if value is not None}))
        seen.add(key)
    return found
