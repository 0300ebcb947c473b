"""The Swagger 2.0 document in the binary form that discovery clients ask for.

Called by documents.py. A table gives each message's fields; values that have no field (extensions such as
x-kubernetes-group-version-kind) travel as named YAML texts, for which JSON is good enough.

Source: gnostic-models openapiv2/OpenAPIv2.proto.
"""

import struct
from collections.abc import Callable, Iterator
from typing import Any

import orjson

from knarr.api.protobuf import varint

MEDIA_TYPE = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"

# Message -> JSON key -> (number, type); a type in capitals is a message, "[...]" repeated, "ext" marks where extensions go.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Document": {
        "swagger": (1, "string"), "info": (2, "Info"), "paths": (8, "Paths"), "definitions": (9, "NamedSchemas"),
        "security": (12, "[SecurityRequirement]"), "securityDefinitions": (13, "SecurityDefinitions"), "ext": (16, ""),
    },
    "Info": {"title": (1, "string"), "version": (2, "string"), "description": (3, "string"), "ext": (7, "")},
    "PathItem": {
        "get": (2, "Operation"), "put": (3, "Operation"), "post": (4, "Operation"), "delete": (5, "Operation"), "options": (6, "Operation"),
        "head": (7, "Operation"), "patch": (8, "Operation"), "parameters": (9, "[ParametersItem]"), "ext": (10, ""),
    },
    "Operation": {
        "tags": (1, "[string]"), "summary": (2, "string"), "description": (3, "string"), "operationId": (5, "string"),
        "produces": (6, "[string]"), "consumes": (7, "[string]"), "parameters": (8, "[ParametersItem]"), "responses": (9, "Responses"),
        "schemes": (10, "[string]"), "deprecated": (11, "bool"), "ext": (13, ""),
    },
    "BodyParameter": {
        "description": (1, "string"), "name": (2, "string"), "in": (3, "string"), "required": (4, "bool"), "schema": (5, "Schema"),
        "ext": (6, ""),
    },
    "QueryParameter": {
        "required": (1, "bool"), "in": (2, "string"), "description": (3, "string"), "name": (4, "string"), "type": (6, "string"),
        "format": (7, "string"), "uniqueItems": (20, "bool"), "ext": (23, ""),
    },
    "PathParameter": {
        "required": (1, "bool"), "in": (2, "string"), "description": (3, "string"), "name": (4, "string"), "type": (5, "string"),
        "format": (6, "string"), "uniqueItems": (19, "bool"), "ext": (22, ""),
    },
    "Response": {"description": (1, "string"), "schema": (2, "SchemaItem"), "ext": (5, "")},
    "Schema": {
        "$ref": (1, "string"), "format": (2, "string"), "title": (3, "string"), "description": (4, "string"), "default": (5, "Any"),
        "multipleOf": (6, "double"), "maximum": (7, "double"), "exclusiveMaximum": (8, "bool"), "minimum": (9, "double"),
        "exclusiveMinimum": (10, "bool"), "maxLength": (11, "int"), "minLength": (12, "int"), "pattern": (13, "string"),
        "maxItems": (14, "int"), "minItems": (15, "int"), "uniqueItems": (16, "bool"), "maxProperties": (17, "int"),
        "minProperties": (18, "int"), "required": (19, "[string]"), "enum": (20, "[Any]"), "additionalProperties": (21, "Additional"),
        "type": (22, "TypeItem"), "items": (23, "ItemsItem"), "allOf": (24, "[Schema]"), "properties": (25, "NamedSchemas"),
        "example": (30, "Any"), "ext": (31, ""),
    },
    "ApiKeySecurity": {"type": (1, "string"), "name": (2, "string"), "in": (3, "string"), "description": (4, "string"), "ext": (5, "")},
}


def encode(document: dict[str, Any]) -> bytes:
    """The binary form of a Swagger 2.0 document."""
    return _message("Document", document)


def _delimited(number: int, body: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(body)) + body


def _text(number: int, text: str) -> bytes:
    return _delimited(number, text.encode())


def _any(value: Any) -> bytes:
    return _text(2, orjson.dumps(value).decode())


def _named(number: int, name: str, body: bytes) -> bytes:
    """An entry of a map: a message with a name and a value."""
    return _delimited(number, _text(1, name) + _delimited(2, body))


def _message(kind: str, value: dict[str, Any]) -> bytes:
    fields = _MESSAGES[kind]
    return b"".join(_chunks(fields, value))


def _chunks(fields: dict[str, tuple[int, str]], value: dict[str, Any]) -> Iterator[bytes]:
    extension = fields["ext"][0]
    for key, item in value.items():
        number, kind = fields.get(key, (0, ""))
        if not kind:
            if key.startswith("x-"):
                yield _named(extension, key, _any(item))
            continue
        for one in item if kind.startswith("[") else (item,):
            yield _field(number, kind.strip("[]"), one)


def _field(number: int, kind: str, value: Any) -> bytes:
    match kind:
        case "string":
            return _text(number, value)
        case "bool":
            return varint(number << 3) + (b"\x01" if value else b"\x00")
        case "int":
            return varint(number << 3) + varint(int(value))
        case "double":
            return varint(number << 3 | 1) + struct.pack("<d", value)
    special = _SPECIAL.get(kind)
    return _delimited(number, special(value) if special is not None else _message(kind, value))


def _parameters_item(value: dict[str, Any]) -> bytes:
    if "$ref" in value:
        return _delimited(2, _text(1, value["$ref"]))
    if value.get("in") == "body":
        return _delimited(1, _delimited(1, _message("BodyParameter", value)))
    number, kind = (4, "PathParameter") if value.get("in") == "path" else (3, "QueryParameter")
    return _delimited(1, _delimited(2, _delimited(number, _message(kind, value))))


def _additional(value: Any) -> bytes:
    if isinstance(value, bool):
        return b"\x10\x01" if value else b"\x10\x00"
    return _delimited(1, _message("Schema", value))


_SPECIAL: dict[str, Callable[[Any], bytes]] = {
    "Any": _any,
    "Paths": lambda value: b"".join(_named(2, path, _message("PathItem", item)) for path, item in value.items()),
    "NamedSchemas": lambda value: b"".join(_named(1, name, _message("Schema", one)) for name, one in value.items()),
    "ParametersItem": _parameters_item,
    "Responses": lambda value: b"".join(_named(1, code, _delimited(1, _message("Response", one))) for code, one in value.items()),
    "SchemaItem": lambda value: _delimited(1, _message("Schema", value)),
    "Additional": _additional,
    "TypeItem": lambda value: b"".join(_text(1, one) for one in (value if isinstance(value, list) else [value])),
    "ItemsItem": lambda value: _delimited(1, _message("Schema", value)),
    "SecurityDefinitions": lambda value: b"".join(
        _named(1, name, _delimited(2, _message("ApiKeySecurity", one))) for name, one in value.items()),
    "SecurityRequirement": lambda value: b"".join(
        _named(1, name, b"".join(_text(1, scope) for scope in scopes)) for name, scopes in value.items()),
}
