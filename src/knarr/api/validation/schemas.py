"""Schemas of custom resource definitions: structural, with valid defaults, in the part of OpenAPI that is supported.

Rules in CEL are compiled by the API server, which knows their variables; what else can be said about them is said here.

Source: apiextensions-apiserver pkg/apiserver/schema/validation.go, defaulting/validation.go,
pkg/apis/apiextensions/validation/validation.go (ValidateCustomResourceDefinitionOpenAPISchema).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from knarr.api.errors import field_forbidden, invalid_value, not_supported, required
from knarr.api.meta import deep_copy
from knarr.api.structural import compiled
from knarr.api.structural.explain import explain
from knarr.api.structural.formats import PatternError, go_regex
from knarr.api.validation.metadata import Errors, Object

_TYPES = ("array", "boolean", "integer", "number", "object", "string")
_REASONS = ("FieldValueDuplicate", "FieldValueForbidden", "FieldValueInvalid", "FieldValueRequired")
_ROOT, _ITEM, _FIELD = "at the root", "for specified array items", "for specified object fields"
_NOT_SUPPORTED = " is not supported"
_INT_OR_STRING = [{"type": "integer"}, {"type": "string"}]
_AT_ROOT_WITH_STATUS = frozenset(
    "description type format title maximum exclusiveMaximum minimum exclusiveMinimum maxLength minLength pattern maxItems minItems "
    "uniqueItems multipleOf required items properties externalDocs example x-kubernetes-preserve-unknown-fields "
    "x-kubernetes-validations".split()
)
_ROOT_FIELDS = (
    "Description Type Format Title Maximum ExclusiveMaximum Minimum ExclusiveMinimum MaxLength MinLength Pattern MaxItems MinItems "
    "UniqueItems MultipleOf Required Items Properties ExternalDocs Example XPreserveUnknownFields XValidations"
)
_STEP = re.compile(r"\.([a-zA-Z_][a-zA-Z0-9_]*)|\['((?:[^'\\]|\\.)*)'\]")
_META = {"apiVersion": {"type": "string"}, "kind": {"type": "string"}}
_OBJECT_META = {"type": "object", "properties": {"name": {"type": "string"}, "generateName": {"type": "string"}}}


def validate_schema(schema: Object, path: str, errors: Errors, *, has_status: bool) -> None:
    """Check the schema of one version; path ends in openAPIV3Schema."""
    before = len(errors)
    if has_status:
        _check_root_with_status(schema, path, errors)
    if schema.get("nullable"):
        errors.append(field_forbidden(f"{path}.nullable", "nullable cannot be true at the root"))
    open_api: Errors = []
    _open_api(schema, path, open_api, root=True, no_default="", inside_meta=False)
    # What is not supported at all has no structural form to judge.
    if not any((error.detail or "").endswith(_NOT_SUPPORTED) for error in open_api):
        structural: Errors = []
        _invariants(schema, _ROOT, path, structural)
        _completeness(schema, path, structural)
        errors.extend(structural)
        if not structural:
            _defaults(schema, path, errors, inside_meta=False, root=True)
    errors.extend(open_api)
    if len(errors) == before and not isinstance(schema.get("properties") or {}, dict):
        errors.append(invalid_value(path, "", "error building validator"))


def _check_root_with_status(schema: Object, path: str, errors: Errors) -> None:
    for key, value in schema.items():
        if not value and value != 0:
            continue
        if key == "type" and value != "object":
            message = 'only "object" is allowed as the type at the root of the schema if the status subresource is enabled'
            errors.append(invalid_value(f"{path}.type", value, message))
            return
        if key not in _AT_ROOT_WITH_STATUS:
            message = f"only [{_ROOT_FIELDS}] fields are allowed at the root of the schema if the status subresource is enabled"
            errors.append(invalid_value(path, schema, message))
            return


# --- structural ---------------------------------------------------------------------------------------------------------


def _invariants(schema: Object, level: str, path: str, errors: Errors) -> None:
    kind, items = schema.get("type") or "", schema.get("items")
    properties: Object = schema.get("properties") or {}
    if kind == "array" and items is None:
        errors.append(required(f"{path}.items", "must be specified"))
    if isinstance(items, dict):
        _invariants(items, _ITEM, f"{path}.items", errors)
    for key, part in properties.items():
        _invariants(part, _FIELD, f"{path}.properties[{key}]", errors)
    more = schema.get("additionalProperties")
    if more is not None:
        if level == _ROOT:
            errors.append(field_forbidden(f"{path}.additionalProperties", "must not be used at the root"))
        if isinstance(more, dict):
            _invariants(more, _FIELD, f"{path}.additionalProperties", errors)
    int_or_string = bool(schema.get("x-kubernetes-int-or-string"))
    keeps, embedded = bool(schema.get("x-kubernetes-preserve-unknown-fields")), bool(schema.get("x-kubernetes-embedded-resource"))
    for given, key in ((keeps, "x-kubernetes-preserve-unknown-fields"), (embedded, "x-kubernetes-embedded-resource")):
        if int_or_string and given:
            errors.append(invalid_value(f"{path}.{key}", True, "must be false if x-kubernetes-int-or-string is true"))
    first = (schema.get("allOf") or [{}])[0]
    _value_validation(
        schema, path, errors, skip_any_of=schema.get("anyOf") == _INT_OR_STRING, skip_first_any_of=first.get("anyOf") == _INT_OR_STRING
    )
    if embedded and kind != "object":
        message = "must be object if x-kubernetes-embedded-resource is true"
        errors.append(invalid_value(f"{path}.type", kind, message) if kind else required(f"{path}.type", message))
    elif not kind and not int_or_string and not keeps:
        errors.append(required(f"{path}.type", f"must not be empty {level}"))
    if embedded and more is not None:
        errors.append(field_forbidden(f"{path}.additionalProperties", "must not be used if x-kubernetes-embedded-resource is set"))
    if level == _ROOT and kind and kind != "object":
        errors.append(invalid_value(f"{path}.type", kind, "must be object at the root"))
    if level == _ROOT or embedded:
        for key, wanted in (("kind", "string"), ("apiVersion", "string"), ("metadata", "object")):
            if key in properties and (properties[key].get("type") or "") != wanted:
                given_type = properties[key].get("type") or ""
                errors.append(invalid_value(f"{path}.properties[{key}].type", given_type, f"must be {wanted}"))
    if level == _ROOT and "metadata" in properties:
        own = {key: value for key, value in properties["metadata"].items() if value and key not in ("type", "default")}
        if set(own.get("properties") or ()) <= {"name", "generateName"}:
            own.pop("properties", None)
        if own:
            message = "must not specify anything other than name and generateName, but metadata is implicitly specified"
            errors.append(field_forbidden(f"{path}.properties[metadata]", message))
    if embedded and not keeps and not properties:
        message = "must not be empty if x-kubernetes-embedded-resource is true without x-kubernetes-preserve-unknown-fields"
        errors.append(required(f"{path}.properties", message))


def _junctors(schema: Object, path: str) -> Iterator[tuple[str, int, Object, str]]:
    for key in ("anyOf", "allOf", "oneOf"):
        for index, part in enumerate(schema.get(key) or ()):
            yield key, index, part, f"{path}.{key}[{index}]"
    if schema.get("not"):
        yield "not", 0, schema["not"], f"{path}.not"


def _value_validation(schema: Object, path: str, errors: Errors, *, skip_any_of: bool, skip_first_any_of: bool) -> None:
    for key, index, part, own in _junctors(schema, path):
        if key == "anyOf" and skip_any_of:
            continue
        _nested(part, own, errors, skip_any_of=key == "allOf" and index == 0 and skip_first_any_of)
    pattern = schema.get("pattern")
    if pattern:
        try:
            go_regex(pattern)
        except (PatternError, re.error) as error:
            errors.append(invalid_value(f"{path}.pattern", pattern, f"must be a valid regular expression, but isn't: {error}"))


_NESTED = (
    ("type", "must be empty to be structural"), ("additionalProperties", "must be undefined to be structural"),
    ("default", "must be undefined to be structural"), ("title", "must be empty to be structural"),
    ("description", "must be empty to be structural"), ("nullable", "must be false to be structural"),
    ("x-kubernetes-preserve-unknown-fields", "must be false to be structural"),
    ("x-kubernetes-embedded-resource", "must be false to be structural"),
    ("x-kubernetes-int-or-string", "must be false to be structural"), ("x-kubernetes-list-map-keys", "must be empty to be structural"),
    ("x-kubernetes-list-type", "must be undefined to be structural"), ("x-kubernetes-map-type", "must be undefined to be structural"),
    ("x-kubernetes-validations", "must be empty to be structural"),
)  # fmt: skip


def _nested(schema: Object, path: str, errors: Errors, *, skip_any_of: bool = False) -> None:
    _value_validation(schema, path, errors, skip_any_of=skip_any_of, skip_first_any_of=False)
    if isinstance(schema.get("items"), dict):
        _nested(schema["items"], f"{path}.items", errors)
    for key, part in (schema.get("properties") or {}).items():
        _nested(part, f"{path}.properties[{key}]", errors)
    for key, message in _NESTED:
        value = schema.get(key)
        if value or (key in ("default", "additionalProperties") and value is not None):
            errors.append(field_forbidden(f"{path}.{key}", message))
    if "metadata" in (schema.get("properties") or {}):
        errors.append(field_forbidden(f"{path}.properties[metadata]", "must not be specified in a nested context"))


def _completeness(schema: Object, path: str, errors: Errors) -> None:
    """What a junctor at the root speaks of must be specified outside of it too."""
    for _, _, part, own in _junctors(schema, path):
        _complete(part, schema, own, path, errors)


def _complete(part: Object, schema: Object | None, own: str, path: str, errors: Errors) -> None:
    if schema is None:
        errors.append(required(path, f"because it is defined in {own}"))
        return
    for _, _, inner, inner_path in _junctors(part, own):
        _complete(inner, schema, inner_path, path, errors)
    if isinstance(part.get("items"), dict):
        _complete(part["items"], schema.get("items"), f"{own}.items", f"{path}.items", errors)
    for key, inner in (part.get("properties") or {}).items():
        declared = (schema.get("properties") or {}).get(key)
        _complete(inner, declared, f"{own}.properties[{key}]", f"{path}.properties[{key}]", errors)


def _defaults(schema: Object, path: str, errors: Errors, *, inside_meta: bool, root: bool = False) -> None:
    embedded = root or bool(schema.get("x-kubernetes-embedded-resource"))
    if embedded:
        inside_meta = False
    default = schema.get("default")
    if default is not None:
        own = f"{path}.default"
        if not inside_meta:
            pruned = deep_copy(default) if isinstance(default, dict | list) else default
            prune = compiled.pruner(schema, root=embedded)
            if prune is not None and isinstance(pruned, dict | list):
                prune(pruned)
            if pruned != default:
                errors.append(invalid_value(own, default, "must not have unknown fields"))
        errors.extend(explain(schema, default, path=own))
    if isinstance(schema.get("items"), dict):
        _defaults(schema["items"], f"{path}.items", errors, inside_meta=inside_meta)
    for key, part in (schema.get("properties") or {}).items():
        meta = inside_meta or (embedded and key in ("metadata", "apiVersion", "kind"))
        _defaults(part, f"{path}.properties[{key}]", errors, inside_meta=meta)


# --- OpenAPI ------------------------------------------------------------------------------------------------------------


def _open_api(schema: Object, path: str, errors: Errors, *, root: bool, no_default: str, inside_meta: bool) -> None:
    _unsupported(schema, path, errors, no_default, inside_meta=inside_meta)
    properties, more, items = schema.get("properties") or {}, schema.get("additionalProperties"), schema.get("items")
    if schema.get("uniqueItems"):
        message = "uniqueItems cannot be set to true since the runtime complexity becomes quadratic"
        errors.append(field_forbidden(f"{path}.uniqueItems", message))
    if more is not None:
        if properties and more is not True:
            errors.append(field_forbidden(f"{path}.additionalProperties", "additionalProperties and properties are mutual exclusive"))
        if isinstance(more, dict):
            reason = "inside additionalProperties applying to object metadata" if inside_meta else no_default
            _open_api(more, f"{path}.additionalProperties", errors, root=False, no_default=reason, inside_meta=inside_meta)
    for key, part in properties.items():
        meta, reason = inside_meta, no_default
        if (root or schema.get("x-kubernetes-embedded-resource")) and key in ("metadata", "kind", "apiVersion"):
            meta, reason = True, f"in top-level {key}" if root else no_default
        _open_api(part, f"{path}.properties[{key}]", errors, root=False, no_default=reason, inside_meta=meta)
    for _, _, part, own in _junctors(schema, path):
        _open_api(part, own, errors, root=False, no_default=no_default, inside_meta=inside_meta)
    if isinstance(items, dict):
        _open_api(items, f"{path}.items", errors, root=False, no_default=no_default, inside_meta=inside_meta)
    _extensions(schema, path, errors)
    _rules(schema, path, errors, root=root)


def _unsupported(schema: Object, path: str, errors: Errors, no_default: str, *, inside_meta: bool) -> None:
    kind = schema.get("type") or ""
    if kind and kind not in _TYPES:
        errors.append(not_supported(f"{path}.type", kind, _TYPES))
    if no_default and schema.get("default") is not None:
        errors.append(field_forbidden(f"{path}.default", f"must not be set {no_default}"))
    for key in ("id", "additionalItems", "patternProperties", "definitions", "dependencies", "$ref"):
        if schema.get(key) or (key in ("additionalItems", "dependencies", "$ref") and schema.get(key) is not None):
            errors.append(field_forbidden(f"{path}.{key}", f"{key}{_NOT_SUPPORTED}"))
    if kind == "null":
        errors.append(field_forbidden(f"{path}.type", "type cannot be set to null, use nullable as an alternative"))
    if isinstance(schema.get("items"), list) and schema["items"]:
        errors.append(field_forbidden(f"{path}.items", "items must be a schema object and not an array"))
    if inside_meta and schema.get("x-kubernetes-embedded-resource"):
        errors.append(field_forbidden(f"{path}.x-kubernetes-embedded-resource", "must not be used inside of resource meta"))


def _extensions(schema: Object, path: str, errors: Errors) -> None:
    kind = schema.get("type") or ""
    list_type, map_type = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-map-type")
    if schema.get("x-kubernetes-preserve-unknown-fields") is False:
        errors.append(invalid_value(f"{path}.x-kubernetes-preserve-unknown-fields", False, "must be true or undefined"))
    for given, wanted, key in ((map_type, "object", "x-kubernetes-map-type"), (list_type, "array", "x-kubernetes-list-type")):
        if given is not None and kind != wanted:
            message = f"must be {wanted} if {key} is specified"
            errors.append(invalid_value(f"{path}.type", kind, message) if kind else required(f"{path}.type", message))
    if map_type is not None and map_type not in ("atomic", "granular"):
        errors.append(not_supported(f"{path}.x-kubernetes-map-type", map_type, ("atomic", "granular")))
    items = schema.get("items") if isinstance(schema.get("items"), dict) else None
    if list_type == "set" and kind == "array" and items is not None:
        for item_type, key in (("array", "x-kubernetes-list-type"), ("object", "x-kubernetes-map-type")):
            given = items.get(key)
            if items.get("type") == item_type and given != "atomic" and (given is not None or item_type == "object"):
                message = "must be atomic as item of a list with x-kubernetes-list-type=set"
                errors.append(invalid_value(f"{path}.items.{key}", items.get("x-kubernetes-list-type"), message))
    if list_type is not None and list_type not in ("atomic", "set", "map"):
        errors.append(not_supported(f"{path}.x-kubernetes-list-type", list_type, ("atomic", "set", "map")))
    keys = schema.get("x-kubernetes-list-map-keys") or []
    if keys and list_type != "map":
        message = "must be map if x-kubernetes-list-map-keys is non-empty"
        own = f"{path}.x-kubernetes-list-type"
        errors.append(required(own, message) if list_type is None else invalid_value(own, list_type, message))
    if list_type == "map":
        _map_keys(schema, items, keys, path, errors)
    if list_type in ("set", "map") and items is not None:
        if items.get("nullable"):
            errors.append(field_forbidden(f"{path}.items.nullable", f"cannot be nullable when x-kubernetes-list-type is {list_type}"))
        for key in keys if list_type == "map" else ():
            one = (items.get("properties") or {}).get(key)
            if one is None:
                continue
            own = f"{path}.items.properties[{key}]"
            if key not in (items.get("required") or ()) and one.get("default") is None:
                message = "this property is in x-kubernetes-list-map-keys, so it must have a default or be a required property"
                errors.append(required(f"{own}.default", message))
            if one.get("nullable"):
                message = "this property is in x-kubernetes-list-map-keys, so it cannot be nullable"
                errors.append(field_forbidden(f"{own}.nullable", message))


def _map_keys(schema: Object, items: Object | None, keys: list[str], path: str, errors: Errors) -> None:
    own = f"{path}.x-kubernetes-list-map-keys"
    if not keys:
        errors.append(required(own, "must not be empty if x-kubernetes-list-type is map"))
    if schema.get("items") is None:
        errors.append(required(f"{path}.items", "must have a schema if x-kubernetes-list-type is map"))
    elif items is None:
        errors.append(invalid_value(f"{path}.items", schema["items"], "must only have a single schema if x-kubernetes-list-type is map"))
    elif items.get("type") != "object":
        message = "must be object if parent array's x-kubernetes-list-type is map"
        errors.append(invalid_value(f"{path}.items.type", items.get("type") or "", message))
    else:
        for index, key in enumerate(keys):
            one = (items.get("properties") or {}).get(key)
            if one is None:
                errors.append(invalid_value(own, keys, "entries must all be names of item properties"))
            elif one.get("type") in ("array", "object"):
                message = "must be a scalar type if parent array's x-kubernetes-list-type is map"
                errors.append(invalid_value(f"{path}.items.properties[{key}].type", items.get("type"), message))
            if key in keys[:index]:
                errors.append(invalid_value(own, keys, "must not contain duplicate entries"))


def _rules(schema: Object, path: str, errors: Errors, *, root: bool) -> None:
    for index, rule in enumerate(schema.get("x-kubernetes-validations") or ()):
        own = f"{path}.x-kubernetes-validations[{index}]"
        text, message, expression = ((rule.get(key) or "").strip() for key in ("rule", "message", "messageExpression"))
        if not text:
            errors.append(required(f"{own}.rule", "rule is not specified"))
        elif rule.get("message") and not message:
            errors.append(invalid_value(f"{own}.message", rule["message"], "must be non-empty if specified"))
        elif _has_breaks(message):
            errors.append(invalid_value(f"{own}.message", rule["message"], "must not contain line breaks"))
        elif _has_breaks(text) and not message:
            errors.append(required(f"{own}.message", "message must be specified if rule contains line breaks"))
        if rule.get("messageExpression") and not expression:
            errors.append(required(f"{own}.messageExpression", "messageExpression must be non-empty if specified"))
        reason, field = rule.get("reason"), rule.get("fieldPath") or ""
        if reason is not None and reason not in _REASONS:
            errors.append(not_supported(f"{own}.reason", reason, _REASONS))
        if field and not field.strip():
            errors.append(invalid_value(f"{own}.fieldPath", field, "must be non-empty if specified"))
        if _has_breaks(field):
            errors.append(invalid_value(f"{own}.fieldPath", field, "must not contain line breaks"))
        if field and schema_at(schema, field, root=root) is None:
            errors.append(invalid_value(f"{own}.fieldPath", field, "must be a valid path"))


def _has_breaks(text: str) -> bool:
    return "\n" in text or "\r" in text


def schema_at(schema: Object, path: str, *, root: bool) -> Any:
    """Return the schema a path such as .spec.replicas or .spec['a b'] leads to, None if there is none."""
    position = 0
    here: Any = schema
    while position < len(path):
        match = _STEP.match(path, position)
        if match is None or not isinstance(here, dict):
            return None
        key = match[1] if match[1] is not None else re.sub(r"\\(.)", r"\1", match[2])
        properties = here.get("properties") or {}
        if position == 0 and root:
            properties = {**properties, **_META, "metadata": _OBJECT_META}
        here = properties.get(key, here.get("additionalProperties") if not properties else None)
        position = match.end()
    return here if isinstance(here, dict) and path else None
