"""Schemas of built-in types in OpenAPI v3 form, from the facts. Pure; used by documents.py.

Only fields that a 1.35 server knows are shown; there are no descriptions, as the facts hold none.
"""

from collections.abc import Iterable, Iterator
from functools import cache
from typing import Any

from knarr.api import schema

REF = "#/components/schemas/"

_FORMS: dict[str, dict[str, Any]] = {
    "io.k8s.apimachinery.pkg.util.intstr.IntOrString": {"format": "int-or-string", "oneOf": [{"type": "integer"}, {"type": "string"}]},
    "io.k8s.apimachinery.pkg.api.resource.Quantity": {"oneOf": [{"type": "string"}, {"type": "number"}]},
    "io.k8s.apimachinery.pkg.apis.meta.v1.Time": {"type": "string", "format": "date-time"},
    "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime": {"type": "string", "format": "date-time"},
    "io.k8s.apimachinery.pkg.apis.meta.v1.FieldsV1": {"type": "object"},
    "io.k8s.apimachinery.pkg.apis.meta.v1.Patch": {"type": "object"},
    "io.k8s.apimachinery.pkg.runtime.RawExtension": {"type": "object"},
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSON": {},
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrArray": {},
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrBool": {},
    "io.k8s.apiextensions-apiserver.pkg.apis.apiextensions.v1.JSONSchemaPropsOrStringArray": {},
}


def group_version_kind(api_version: str, kind: str) -> dict[str, str]:
    """The x-kubernetes-group-version-kind entry."""
    group, slash, version = api_version.rpartition("/")
    return {"group": group if slash else "", "version": version, "kind": kind}


def _served_fields(name: str) -> set[str] | None:
    """JSON fields of a definition that a 1.35 server knows; None if there is no telling."""
    message = schema.message_of(name)
    return None if message is None else {*message.fields, "apiVersion", "kind"}


@cache
def references(name: str) -> tuple[str, ...]:
    """Names of the definitions that a definition refers to directly."""
    return tuple(dict.fromkeys(_find_references(definition(name))))


def _find_references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        ref = value.get("$ref")
        if isinstance(ref, str):
            yield ref.removeprefix(REF)
        for item in value.values():
            yield from _find_references(item)
    elif isinstance(value, list):
        for item in value:
            yield from _find_references(item)


def closure(names: Iterable[str]) -> list[str]:
    """The names and everything they refer to, sorted."""
    seen: set[str] = set()
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name not in seen and schema.definition(name) is not None:
            seen.add(name)
            waiting.extend(references(name))
    return sorted(seen)


def definition(name: str) -> dict[str, Any]:
    """The v3 schema of a built-in definition.

    Raises:
      KeyError: no such definition.
    """
    if name in _FORMS:
        return _FORMS[name]
    facts = schema.definition(name)
    if facts is None:
        raise KeyError(name)
    made: dict[str, Any] = {"type": facts.get("type", "object")}
    if facts.get("format"):
        made["format"] = facts["format"]
    served = _served_fields(name)
    fields = {key: _property(one) for key, one in facts.get("fields", {}).items() if served is None or key in served}
    for key, description in _DESCRIPTIONS.get(name, {}).items():
        if key in fields:
            fields[key] = _described(fields[key], description)
    if fields:
        made["properties"] = fields
    needed = [key for key in facts.get("required", ()) if key in fields]
    if needed:
        made["required"] = needed
    if "items" in facts:
        made["items"] = _property(facts["items"])
    if facts.get("mapType"):
        made["x-kubernetes-map-type"] = facts["mapType"]
    if facts.get("gvk"):
        made["x-kubernetes-group-version-kind"] = [{"group": g, "version": v, "kind": k} for g, v, k in facts["gvk"]]
    unions = [_union(union) for union in facts.get("unions", ())]
    if unions:
        made["x-kubernetes-unions"] = unions
    return made


_DESCRIPTIONS = {
    "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta": {
        "creationTimestamp": "CreationTimestamp is a timestamp: when the server stored the object first. Clients do not set it.",
        "name": "Name is unique within a namespace and kind, and cannot be changed.",
        "labels": "Labels are pairs of text by which objects are selected.",
        "annotations": "Annotations are pairs of text for tools; nothing selects by them.",
    },
}
"""The facts hold none; these few are what people ask `kubectl explain` about metadata."""


def _described(field: dict[str, Any], description: str) -> dict[str, Any]:
    if "$ref" in field:
        return {"allOf": [field], "description": description}
    return {**field, "description": description}


def _union(facts: dict[str, Any]) -> dict[str, Any]:
    union: dict[str, Any] = {"fields-to-discriminateBy": facts["fields"]}
    if facts.get("discriminator"):
        union["discriminator"] = facts["discriminator"]
    return union


_EXTENSIONS = {
    "listType": "x-kubernetes-list-type", "listMapKeys": "x-kubernetes-list-map-keys", "mapType": "x-kubernetes-map-type",
    "patchStrategy": "x-kubernetes-patch-strategy", "patchMergeKey": "x-kubernetes-patch-merge-key",
}


def _property(facts: dict[str, Any]) -> dict[str, Any]:
    made: dict[str, Any] = {}
    extensions = {name: facts[key] for key, name in _EXTENSIONS.items() if facts.get(key)}
    if "ref" in facts:
        ref = {"$ref": REF + facts["ref"]}
        if not extensions and "default" not in facts:
            return ref
        made["allOf"] = [ref]
    else:
        for key in ("type", "format", "enum"):
            if key in facts:
                made[key] = facts[key]
        if "items" in facts:
            made["items"] = _property(facts["items"])
        if "values" in facts:
            made["additionalProperties"] = _property(facts["values"])
    if "default" in facts:
        made["default"] = facts["default"]
    made.update(extensions)
    return made
