"""How values merge in server-side apply: type descriptions made from the facts or from a CRD schema, on first use.

A Kind describes a value: scalar, map (struct fields and/or elements of one type) and list, any of these where the
schema leaves it open. Used by walk.py.

Source: kube-openapi schemaconv, structured-merge-diff schema.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from knarr.api import schema
from knarr.api.types import Object

UNTYPED, STRING, NUMERIC, BOOLEAN = "untyped", "string", "numeric", "boolean"
ABSENT: Any = object()
"""No value at all, as opposed to null."""


class Kind:
    """A type. Fields resolve lazily, since types may contain themselves.

    scalar: one of the scalar words, "" if it cannot be one.
    is_map, atomic_map, element: element is the Kind of values whose key is no declared field, None if there are none.
    is_list, atomic_list, item, keys, key_defaults: keys empty for a set; key_defaults fills keys that an item leaves out.
    """

    __slots__ = (
        "_fields", "_maker", "atomic_list", "atomic_map", "element", "is_list", "is_map", "item", "key_defaults", "keys", "scalar",
    )

    def __init__(self, scalar: str = "") -> None:
        self.scalar = scalar
        self.is_map = self.is_list = False
        self.atomic_map = self.atomic_list = False
        self.element: Kind | None = None
        self.item: Kind | None = None
        self.keys: tuple[str, ...] = ()
        self.key_defaults: dict[str, Any] = {}
        self._fields: dict[str, Kind] = {}
        self._maker: Callable[[str], Kind | None] | None = None

    def field(self, key: str) -> "Kind | None":
        """The Kind of a declared field, None if it is not declared."""
        found = self._fields.get(key)
        if found is None and self._maker is not None:
            found = self._maker(key)
            if found is not None:
                self._fields[key] = found
        return found

    def with_atomic_map(self, atomic: bool = True) -> "Kind":
        made = _copy(self)
        made.atomic_map = atomic
        return made


def _copy(kind: Kind) -> Kind:
    made = Kind()
    for slot in Kind.__slots__:
        setattr(made, slot, getattr(kind, slot))
    return made


def _scalar_of(type_name: str, format_name: str = "") -> str:
    if format_name == "int-or-string":
        return UNTYPED
    return {"string": STRING, "integer": NUMERIC, "number": NUMERIC, "boolean": BOOLEAN}.get(type_name, UNTYPED)


SCALARS = {word: Kind(word) for word in (UNTYPED, STRING, NUMERIC, BOOLEAN)}

ATOMIC = Kind(UNTYPED)
"""Anything, owned as a whole."""
ATOMIC.is_map = ATOMIC.is_list = ATOMIC.atomic_map = ATOMIC.atomic_list = True
ATOMIC.element = ATOMIC.item = ATOMIC

DEDUCED = Kind(UNTYPED)
"""Anything, maps owned key by key and lists as a whole: what has no schema."""
DEDUCED.is_map = DEDUCED.is_list = DEDUCED.atomic_list = True
DEDUCED.element = DEDUCED
DEDUCED.item = ATOMIC


def list_kind(item: Kind, list_type: str, keys: tuple[str, ...] = (), defaults: dict[str, Any] | None = None) -> Kind:
    """A list; list_type is "set", "map" or anything else for atomic."""
    made = Kind()
    made.is_list = True
    made.item = item
    made.atomic_list = list_type not in ("set", "map")
    made.keys = keys if list_type == "map" else ()
    made.key_defaults = defaults or {}
    return made


def map_kind(element: Kind, atomic: bool = False) -> Kind:
    """A map with values of one type."""
    made = Kind()
    made.is_map = True
    made.element = element
    made.atomic_map = atomic
    return made


# --- built-in types ---------------------------------------------------------------------------------------------------

_UNTYPED_DEFINITIONS = {
    "io.k8s.apimachinery.pkg.api.resource.Quantity", "io.k8s.apimachinery.pkg.apis.meta.v1.Time",
    "io.k8s.apimachinery.pkg.apis.meta.v1.MicroTime",
}
_ANY_TYPE = "io.k8s.apimachinery.pkg.util.intstr.IntOrString"
"""Its definition names no single type, so merging takes anything; that it is neither list nor map is found when it is decoded."""


@cache
def builtin(name: str) -> Kind:
    """The Kind of an OpenAPI definition of the facts."""
    facts = schema.definition(name)
    if name in _UNTYPED_DEFINITIONS:
        return SCALARS[UNTYPED]
    if name == _ANY_TYPE:
        return DEDUCED
    if facts is None or facts.get("type") is None or (facts["type"] == "object" and "fields" not in facts):
        return ATOMIC
    if facts["type"] != "object":
        return SCALARS[_scalar_of(facts["type"], facts.get("format", ""))]
    made = Kind()
    made.is_map = True
    made.atomic_map = facts.get("mapType") == "atomic"
    message = schema.message_of(name)
    known = None if message is None else {*message.fields, "apiVersion", "kind"}

    def make(key: str) -> Kind | None:
        if known is not None and key not in known:
            return None
        return _builtin_field(name, key)

    made._maker = make
    return made


def _builtin_field(name: str, key: str) -> Kind | None:
    one = schema.field_schema(name, key)
    if one is None:
        return None
    inner = builtin(one.ref) if one.ref else SCALARS[_scalar_of(one.scalar)] if one.scalar and one.scalar != "object" else DEDUCED
    if one.kind == "list":
        list_type, keys = one.list_type, one.list_map_keys
        if not list_type and "merge" in one.strategies:
            list_type, keys = ("map", (one.merge_key,)) if one.merge_key else ("set", ())
        return list_kind(inner, list_type, keys, _key_defaults(one.ref, keys))
    if one.kind == "map":
        return map_kind(inner, one.map_type == "atomic")
    if one.map_type == "atomic" and not inner.atomic_map:
        return inner.with_atomic_map()
    if one.map_type == "granular" and inner.atomic_map:
        # The field says otherwise than its type.
        return inner.with_atomic_map(False)
    return inner


def _key_defaults(ref: str, keys: tuple[str, ...]) -> dict[str, Any]:
    """Key fields have their declared default, or the zero value if Go always writes them."""
    facts = (schema.definition(ref) or {}).get("fields", {}) if ref else {}
    message = schema.message_of(ref) if ref else None
    # A name that may be left out in JSON, yet has a default for the sake of merging.
    found: dict[str, Any] = {"name": ""} if ref.endswith(".core.v1.LocalObjectReference") else {}
    for key in keys:
        one = facts.get(key, {})
        if "default" in one:
            found[key] = one["default"]
        elif message is not None and key in message.fields and message.fields[key].keep and not message.fields[key].pointer:
            found[key] = {"string": "", "integer": 0, "boolean": False}.get(one.get("type", ""), None)
    return {key: value for key, value in found.items() if value is not None}


# --- custom types -----------------------------------------------------------------------------------------------------

_OBJECT_META = "io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"


def custom(open_api_schema: Object | None) -> Kind:
    """The Kind of a custom object: its CRD schema, with type meta and metadata as every object has them."""
    made = _from_schema(open_api_schema) if open_api_schema else _copy(DEDUCED)
    made = _copy(made)
    made.is_list, made.scalar = False, ""
    made._fields = {**made._fields, **_meta_fields()}
    return made


def _meta_fields() -> dict[str, Kind]:
    return {"apiVersion": SCALARS[STRING], "kind": SCALARS[STRING], "metadata": builtin(_OBJECT_META)}


def _from_schema(one: Object) -> Kind:
    if one.get("x-kubernetes-int-or-string"):
        return DEDUCED
    preserve = bool(one.get("x-kubernetes-preserve-unknown-fields"))
    match one.get("type"):
        case "object":
            made = Kind()
            made.is_map = True
            made.atomic_map = one.get("x-kubernetes-map-type") == "atomic"
            properties = one.get("properties") or {}
            made._fields = {key: _from_schema(value) for key, value in properties.items()}
            if one.get("x-kubernetes-embedded-resource"):
                made._fields.update(_meta_fields())
            additional = one.get("additionalProperties")
            if isinstance(additional, dict):
                made.element = _from_schema(additional)
            elif additional or preserve or not properties:
                made.element = DEDUCED
            return made
        case "array":
            items = one.get("items")
            item = _from_schema(items) if isinstance(items, dict) else DEDUCED
            keys = tuple(one.get("x-kubernetes-list-map-keys") or ())
            properties = (items or {}).get("properties") or {} if isinstance(items, dict) else {}
            defaults = {key: properties[key]["default"] for key in keys if "default" in properties.get(key, {})}
            return list_kind(item, one.get("x-kubernetes-list-type") or "", keys, defaults)
        case str() as name:
            return SCALARS[_scalar_of(name, one.get("format") or "")]
    return DEDUCED
