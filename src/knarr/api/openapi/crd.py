"""OpenAPI definitions of custom resources, from their CRD schemas. Pure; used by documents.py.

Source: apiextensions-apiserver controller/openapi/builder.
"""

from typing import Any

from knarr.api.meta import deep_copy
from knarr.api.openapi.definitions import REF
from knarr.api.scheme import Resource
from knarr.api.types import Object

_META = "io.k8s.apimachinery.pkg.apis.meta.v1."


def definition_name(resource: Resource) -> str:
    """ "com.example.stable.v1.CronTab" of stable.example.com/v1 CronTab."""
    return f"{'.'.join(reversed(resource.group.split('.')))}.{resource.version}.{resource.kind}"


def _identity(resource: Resource, kind: str) -> list[dict[str, str]]:
    return [{"group": resource.group, "version": resource.version, "kind": kind}]


def definition(resource: Resource, open_api_schema: Object | None) -> dict[str, Any]:
    """The v3 schema of a custom kind: the CRD's, with type meta and metadata filled in."""
    made: dict[str, Any] = deep_copy(open_api_schema) if open_api_schema else {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    made.setdefault("type", "object")
    properties = made.setdefault("properties", {})
    _embed_meta(properties.setdefault("apiVersion", {"type": "string"}), properties.setdefault("kind", {"type": "string"}))
    properties["metadata"] = {"allOf": [{"$ref": f"{REF}{_META}ObjectMeta"}], "description": METADATA}
    for key, value in properties.items():
        if key not in ("apiVersion", "kind", "metadata"):
            _embedded_resources(value)
    made["x-kubernetes-group-version-kind"] = _identity(resource, resource.kind)
    return made


API_VERSION = "APIVersion defines which version of its schema this object is written in."
KIND = "Kind is the name of the type that this object has."
METADATA = "Standard object's metadata."


def _embed_meta(api_version: dict[str, Any], kind: dict[str, Any]) -> None:
    for field, description in ((api_version, API_VERSION), (kind, KIND)):
        field["type"] = "string"
        field["description"] = description


def _embedded_resources(value: Any) -> None:
    """An embedded resource shows type meta and metadata as well."""
    if not isinstance(value, dict):
        return
    if value.get("x-kubernetes-embedded-resource"):
        properties = value.setdefault("properties", {})
        properties.setdefault("apiVersion", {"type": "string"})
        properties.setdefault("kind", {"type": "string"})
        properties["metadata"] = {"allOf": [{"$ref": f"{REF}{_META}ObjectMeta"}]}
    for key in ("properties", "patternProperties"):
        for item in (value.get(key) or {}).values():
            _embedded_resources(item)
    for key in ("items", "additionalProperties"):
        _embedded_resources(value.get(key))


def list_definition(resource: Resource, name: str) -> dict[str, Any]:
    """The schema of a custom list kind."""
    return {
        "type": "object", "required": ["items"],
        "properties": {
            "apiVersion": {"type": "string"}, "kind": {"type": "string"},
            "items": {"type": "array", "items": {"allOf": [{"$ref": REF + name}]}},
            "metadata": {"allOf": [{"$ref": f"{REF}{_META}ListMeta"}]},
        },
        "x-kubernetes-group-version-kind": _identity(resource, resource.list_kind),
    }
