"""Merge behaviour of built-in types: patch strategies, merge keys, list and map types, from facts/schema.json.

Used by patch/strategic.py, apply/ and openapi/. Entries are read one by one on first use.
"""

from dataclasses import dataclass
from functools import cache
from typing import Any

from knarr.api import typeinfo
from knarr.api.facts import FactLines

DEFINITIONS = FactLines("schema.json")


@dataclass(frozen=True, slots=True)
class FieldSchema:
    """How one field merges.

    ref is the definition of the value, of the list elements or of the map values, "" for scalars; kind is "list",
    "map" or "" (a struct or scalar); strategies are the strategic merge patch's; list_type is "atomic", "set", "map" or
    "" (atomic in server-side apply); map_type "atomic", "granular" or "".
    """

    ref: str
    kind: str
    scalar: str
    strategies: tuple[str, ...]
    merge_key: str
    list_type: str
    list_map_keys: tuple[str, ...]
    map_type: str


@cache
def definition(name: str) -> dict[str, Any] | None:
    """The facts of an OpenAPI definition, None if unknown."""
    return DEFINITIONS.get(name)


@cache
def field_schema(name: str, field: str) -> FieldSchema | None:
    """How a field of a definition merges; None if the definition has no such field."""
    facts = definition(name)
    one = facts and facts.get("fields", {}).get(field)
    if not one:
        return None
    kind, inner = "", one
    if one.get("type") == "array":
        kind, inner = "list", one.get("items") or {}
    elif "values" in one:
        kind, inner = "map", one["values"]
    ref = inner.get("ref", "")
    target = (definition(ref) or {}) if ref else {}
    map_type = one.get("mapType") or (target.get("mapType", "") if not kind else "")
    if target.get("type") == "array":
        kind = kind or "list"
    return FieldSchema(
        ref=ref, kind=kind, scalar=inner.get("type", ""), strategies=tuple(filter(None, one.get("patchStrategy", "").split(","))),
        merge_key=one.get("patchMergeKey", ""), list_type=one.get("listType", ""), list_map_keys=tuple(one.get("listMapKeys", ())),
        map_type=map_type,
    )


@cache
def message_of(name: str) -> typeinfo.Message | None:
    """The type facts of an OpenAPI definition, None for one that a 1.35 server does not have or that has no protobuf form."""
    proto = "k8s.io." + name.removeprefix("io.k8s.")
    for openapi, protobuf in (("apiextensions-apiserver", "apiextensions_apiserver"), ("kube-aggregator", "kube_aggregator")):
        proto = proto.replace(openapi, protobuf)
    try:
        return typeinfo.message(proto)
    except KeyError:
        return None


@cache
def definition_name(api_version: str, kind: str) -> str:
    """OpenAPI definition of a top-level kind: "io.k8s.api.apps.v1.Deployment".

    Raises:
      KeyError: not a built-in kind.
    """
    return typeinfo.message(typeinfo.message_name(api_version, kind)).openapi
