"""Says what is wrong with the types of a strategically merged object, in upstream's words.

Such a merge ends in maps that upstream copies into Go structs by reflection, whose errors are others than those of a JSON
decoder. Called by the package only, for objects that the fast path refused. Walks in the order of Go's fields; the first
error is told.

Source: apimachinery runtime/converter.go fromUnstructured; structured-merge-diff value/reflectcache.go FromUnstructured.
"""

from __future__ import annotations

from typing import Any

from knarr.api import explain
from knarr.api.explain import GO_TYPES
from knarr.api.typeinfo import Field, Message, message

_KINDS = {str: "string", bool: "bool", int: "int64", float: "float64", list: "slice", dict: "map"}
_NUMBERS = {"int32": "int32", "int64": "int64", "uint32": "uint32", "uint64": "uint64"}


def restore_error(value: Any, message_name: str) -> str:
    """Return the error, "" if the value fits its type."""
    return _struct(value, message(message_name))


def _kind(value: Any) -> str:
    return _KINDS.get(value.__class__, "interface")


def _struct(value: Any, info: Message) -> str:
    if not isinstance(value, dict):
        return f"cannot restore struct from: {_kind(value)}"
    named = GO_TYPES.get(info.name) or {}
    for one in sorted(info.fields.values(), key=lambda field: field.number):
        item = value.get(one.json)
        if item is not None and (error := _field(item, one, named.get(one.json, ""))):
            return error
    return ""


def _field(value: Any, one: Field, named: str) -> str:
    if one.label == "repeated":
        if not isinstance(value, list):
            return f"cannot restore slice from {_kind(value)}"
        return next((error for item in value if item is not None and (error := _single(item, one.type, named))), "")
    if one.label == "map":
        if not isinstance(value, dict):
            return f"cannot restore map from {_kind(value)}"
        return next((error for item in value.values() if item is not None and (error := _single(item, one.type, ""))), "")
    return _single(value, one.type, named)


def _single(value: Any, type_name: str, named: str) -> str:
    if "." not in type_name:
        return _scalar(value, type_name, named)
    info = message(type_name)
    if not info.form:
        return _struct(value, info)
    # These types read themselves from JSON.
    findings = explain.Findings()
    explain._Walk(findings).form(value, info, "", ("", ()))
    return findings.type_error


def _scalar(value: Any, type_name: str, named: str) -> str:
    kind = _kind(value)
    if type_name == "string":
        if kind == "string":
            return ""
        return f"cannot convert int64 to {named or 'string'}" if kind == "int64" else "unrecognized type: string"
    if type_name == "bool":
        return "" if kind == "bool" else "unrecognized type: bool"
    if type_name in _NUMBERS:
        if kind == "int64" or (kind == "float64" and value.is_integer()):
            return ""
        return f"cannot convert float64 to {type_name}" if kind == "float64" else f"unrecognized type: {type_name}"
    if type_name == "double":
        return "" if kind in ("int64", "float64") else "unrecognized type: float64"
    return "" if kind == "string" else f"cannot restore slice from {kind}"
