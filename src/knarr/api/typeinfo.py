"""What a built-in type looks like, and fast per-type functions that bring decoded JSON into the form Go would write.

Callers: decode.py, defaulting.py, protobuf.py, patch/, openapi/. Facts come from `facts/protobuf.json` (what a 1.35
server knows; later additions are left out) and are compiled on first use of a type, never at import.

`prune(obj, state)` changes an object in place: checks types, drops unknown fields, nulls and what Go's omitempty would
leave out, adds what Go always writes, and puts quantities, times and base64 into canonical form. It knows no paths: on
any irregularity it raises Mismatch or marks the state, and explain.py walks the body again to say what is wrong, so that
good requests pay nothing for good messages.

This module is longer than most since the per-field handlers, all closures over small facts, belong together.
"""

from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from knarr.api import quantity, times
from knarr.api.facts import FactLines
from knarr.api.types import Object

MESSAGES = FactLines("protobuf.json")

_META = "k8s.io.apimachinery.pkg.apis.meta.v1."
_PACKAGES = {
    "": "k8s.io.api.core.",
    "apiextensions.k8s.io": "k8s.io.apiextensions_apiserver.pkg.apis.apiextensions.",
    "apiregistration.k8s.io": "k8s.io.kube_aggregator.pkg.apis.apiregistration.",
    "meta.k8s.io": "k8s.io.apimachinery.pkg.apis.meta.",
}
# Kinds of meta/v1 that every group version registers.
_META_KINDS = {"DeleteOptions", "ListOptions", "CreateOptions", "UpdateOptions", "PatchOptions", "GetOptions", "WatchEvent", "Status",
               "APIGroup", "APIGroupList", "APIResourceList", "APIVersions"}
_WITHOUT_TYPE_META = {"PodTemplateSpec", "JobTemplateSpec", "PersistentVolumeClaimTemplate", "ResourceClaimTemplateSpec"}

# Fields whose feature gate is off by default in 1.35: known, so nothing complains, but dropped as upstream's strategies do.
GATED_OFF: dict[str, frozenset[str]] = {
    "k8s.io.api.core.v1." + name: frozenset(fields.split())
    for name, fields in {
        "VolumeProjection": "clusterTrustBundle podCertificate", "EnvVarSource": "fileKeyRef",
        "Container": "restartPolicyRules", "EphemeralContainerCommon": "restartPolicyRules", "EphemeralContainer": "restartPolicyRules",
        "ContainerStatus": "allocatedResourcesStatus stopSignal", "Lifecycle": "stopSignal", "PodSpec": "hostnameOverride",
        "PodStatus": "extendedResourceClaimStatus",
    }.items()
} | {
    "k8s.io.api.resource.v1." + name: frozenset(fields.split())
    for name, fields in {
        "ResourceSliceSpec": "perDeviceNodeSelection sharedCounters",
        "Device": "consumesCounters nodeName nodeSelector allNodes bindsToNode bindingConditions bindingFailureConditions "
                  "allowMultipleAllocations",
        "DeviceCapacity": "requestPolicy", "ExactDeviceRequest": "capacity", "DeviceSubRequest": "capacity",
        "DeviceConstraint": "distinctAttribute", "AllocationResult": "allocationTimestamp",
        "DeviceRequestAllocationResult": "bindingConditions bindingFailureConditions shareID consumedCapacity",
        "DeviceClassSpec": "extendedResourceName", "AllocatedDeviceStatus": "shareID",
    }.items()
} | {"k8s.io.api.autoscaling.v2.HPAScalingRules": frozenset({"tolerance"})}

INT_RANGES = {"int32": (-(2**31), 2**31 - 1), "int64": (-(2**63), 2**63 - 1)}


class Mismatch(Exception):
    """A value has the wrong type; explain.py finds out where and how to say it."""


class State:
    """What a prune walk found: keys counts the keys of all known objects, unknown whether a field was dropped.

    `later` holds what upstream keeps until the owners of fields have been worked out, as (object, key, what stands there then): fields
    behind gates that are off go, empty lists become null.
    """

    __slots__ = ("keys", "later", "unknown")

    def __init__(self) -> None:
        self.keys = 0
        self.unknown = False
        self.later: Later = []


Later = list[tuple[Object, str, Any]]


def settle(later: Later) -> None:
    """Do what was put off; the list is empty then."""
    for holder, key, value in later:
        if value is DROP:
            holder.pop(key, None)
        elif key in holder:
            holder[key] = value
    later.clear()


Handler = Callable[[Any, State], Any]


class _KeepEmpty:
    """Returned by a handler: the value, an empty list or map, stays."""


KEEP_EMPTY = _KeepEmpty()
_JSON_STORED = ("k8s.io.apiextensions_apiserver.", "k8s.io.kube_aggregator.", "k8s.io.apimachinery.")


class _Drop:
    """Returned by a handler: leave the key out."""


DROP = _Drop()


class _NullLater:
    """Returned by a handler: the value, an empty list or map, stays for now and is null later."""


NULL_LATER = _NullLater()


class _DropLater:
    """Returned by a handler: the value goes later."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value


@dataclass(frozen=True, slots=True)
class Field:
    """One JSON field of a message, inlined members included.

    label is "optional", "repeated" or "map"; type a scalar or message name (for a map, of its values); key_type that of
    a map's keys; number its protobuf number (in `owner` if that is set: the inlined field's name path).
    """

    json: str
    number: int
    label: str
    type: str
    key_type: str = ""
    pointer: bool = False
    keep: bool = False
    omit_zero: bool = False


@dataclass(slots=True)
class Message:
    """Facts of one type. `fields` by JSON key; `own` keeps the wire layout with inlined members nested."""

    name: str
    form: str
    fields: dict[str, Field]
    own: list[tuple[Field, bool]]
    """(field, inlined) in wire order, for the protobuf codec."""
    openapi: str
    type_meta: bool
    go_name: str = field(default="")


@cache
def message(name: str) -> Message:
    """Facts of a message by its full protobuf name.

    Raises:
      KeyError: there is no such type in a 1.35 server.
    """
    facts = MESSAGES.get(name)
    if facts is None or facts.get("since"):
        raise KeyError(name)
    renamed = facts.get("json", {})
    newer = set(facts.get("new", ()))
    pointers, keeps = set(facts.get("ptr", ())), set(facts.get("keep", ()))
    omit_zero, inlined = set(facts.get("omitzero", ())), set(facts.get("inline", ()))
    fields: dict[str, Field] = {}
    own: list[tuple[Field, bool]] = []
    has_object_meta = False
    for field_name, (number, label, type_name) in facts["fields"].items():
        if field_name in newer:
            continue
        json_name = renamed.get(field_name, field_name)
        key_type = ""
        if label == "map":
            key_type, type_name = type_name.split("+", 1)
        one = Field(
            json_name, number, label, type_name, key_type, pointer=field_name in pointers, keep=json_name in keeps or field_name in keeps,
            omit_zero=field_name in omit_zero,
        )
        is_inlined = field_name in inlined
        own.append((one, is_inlined))
        if is_inlined:
            fields.update(message(type_name).fields)
        else:
            fields[json_name] = one
        has_object_meta |= json_name == "metadata" and type_name in (_META + "ObjectMeta", _META + "ListMeta")
    own.sort(key=lambda pair: pair[0].number)
    package, _, short = name.rpartition(".")
    form = facts.get("form", "")
    return Message(
        name, form, fields, own, facts["openapi"], has_object_meta and short not in _WITHOUT_TYPE_META,
        f"{package.rpartition('.')[2]}.{short}",
    )


@cache
def message_name(api_version: str, kind: str) -> str:
    """Full protobuf name of a top-level kind: message_name("apps/v1", "Deployment").

    Raises:
      KeyError: no such type.
    """
    group, slash, version = api_version.rpartition("/")
    if not slash:
        group = ""
    if kind in _META_KINDS:
        return _META + kind
    package = _PACKAGES.get(group) or f"k8s.io.api.{group.split('.', 1)[0]}."
    name = f"{package}{version}.{kind}"
    message(name)
    return name


# --- handlers: one per kind of value; each returns the canonical value or DROP ---------------------------------------


def _string(value: Any, state: State) -> Any:
    if value.__class__ is str:
        return value or DROP
    if value is None:
        return DROP
    raise Mismatch


def _string_kept(value: Any, state: State) -> Any:
    if value.__class__ is str:
        return value
    if value is None:
        return DROP
    raise Mismatch


def _integer(minimum: int, maximum: int, kept: bool) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is int and minimum <= value <= maximum:
            return value if value or kept else DROP
        if value is None:
            return DROP
        raise Mismatch

    return handle


def _boolean(value: Any, state: State) -> Any:
    if value is True:
        return value
    if value is False or value is None:
        return DROP
    raise Mismatch


def _boolean_kept(value: Any, state: State) -> Any:
    if value is True or value is False:
        return value
    if value is None:
        return DROP
    raise Mismatch


def _double(kept: bool) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is float or value.__class__ is int:
            if not value and not kept:
                return DROP
            return int(value) if value.__class__ is float and value.is_integer() and abs(value) < 1e21 else value
        if value is None:
            return DROP
        raise Mismatch

    return handle


def canonical_base64(text: str) -> str:
    """Check and rewrite standard base64, line breaks removed as Go ignores them.

    Raises:
      Mismatch: not base64.
    """
    try:
        raw = text.encode("ascii")
        if b"\n" in raw or b"\r" in raw:
            raw = raw.replace(b"\n", b"").replace(b"\r", b"")
        return b2a_base64(a2b_base64(raw, strict_mode=True), newline=False).decode()
    except (Base64Error, UnicodeEncodeError):
        raise Mismatch from None


def _bytes(kept: bool) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is str:
            return canonical_base64(value) if value else (value if kept else DROP)
        if value is None:
            return DROP
        raise Mismatch

    return handle


def _quantity(value: Any, state: State) -> Any:
    if value.__class__ is str or value.__class__ is int or value.__class__ is float:
        try:
            return quantity.canonical(value)
        except quantity.QuantityError:
            raise Mismatch from None
    if value is None:
        return DROP
    raise Mismatch


def _int_or_string(value: Any, state: State) -> Any:
    if value.__class__ is str:
        return value
    if value.__class__ is int and -(2**31) <= value < 2**31:
        return value
    if value is None:
        return DROP
    raise Mismatch


def _time(value: Any, state: State) -> Any:
    if value.__class__ is str:
        try:
            return times.canonical_seconds(value)
        except ValueError:
            raise Mismatch from None
    if value is None:
        return DROP
    raise Mismatch


def _micro_time(value: Any, state: State) -> Any:
    if value.__class__ is str:
        try:
            return times.canonical_micros(value)
        except ValueError:
            raise Mismatch from None
    if value is None:
        return DROP
    raise Mismatch


def _duration(value: Any, state: State) -> Any:
    if value.__class__ is str:
        try:
            return times.canonical_duration(value)
        except ValueError:
            raise Mismatch from None
    if value is None:
        return DROP
    raise Mismatch


def _count_keys(value: Any, state: State) -> None:
    if value.__class__ is dict:
        state.keys += len(value)
        for item in value.values():
            if item.__class__ is dict or item.__class__ is list:
                _count_keys(item, state)
    elif value.__class__ is list:
        for item in value:
            if item.__class__ is dict or item.__class__ is list:
                _count_keys(item, state)


def _raw(value: Any, state: State) -> Any:
    if value is None:
        return DROP
    _count_keys(value, state)
    return value


def _raw_kept(value: Any, state: State) -> Any:
    """apiextensions JSON: null is a value of its own."""
    _count_keys(value, state)
    return value


def _gated_off(inner: Handler) -> Handler:
    """A field behind a gate that is off: its type is checked and its owner noted, then it goes."""

    def handle(value: Any, state: State) -> Any:
        result = inner(value, state)
        return result if result is DROP else _DropLater(value if result is KEEP_EMPTY or result is NULL_LATER else result)

    return handle


def _string_list(empty: Any) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is list:
            if not value:
                return empty
            for index, item in enumerate(value):
                if item.__class__ is not str:
                    if item is not None:
                        raise Mismatch
                    value[index] = ""
            return value
        if value is None:
            return DROP
        raise Mismatch

    return handle


def _list(element: Handler, zero: Callable[[], Any], empty: Any) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is list:
            if not value:
                return empty
            for index, item in enumerate(value):
                result = element(item, state)
                if result is not item:
                    value[index] = zero() if result is DROP else result
            return value
        if value is None:
            return DROP
        raise Mismatch

    return handle


def _string_map(empty: Any) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is dict:
            if not value:
                return empty
            state.keys += len(value)
            for key, item in value.items():
                if item.__class__ is not str:
                    if item is not None:
                        raise Mismatch
                    value[key] = ""
            return value
        if value is None:
            return DROP
        raise Mismatch

    return handle


def _map(element: Handler, zero: Callable[[], Any], empty: Any) -> Handler:
    def handle(value: Any, state: State) -> Any:
        if value.__class__ is dict:
            if not value:
                return empty
            state.keys += len(value)
            for key, item in value.items():
                result = element(item, state)
                if result is not item:
                    value[key] = zero() if result is DROP else result
            return value
        if value is None:
            return DROP
        raise Mismatch

    return handle


def _schema_or(prune: Handler, alternative: Handler) -> Handler:
    """JSONSchemaPropsOrBool and its siblings: an object is a schema, anything else the alternative."""

    def handle(value: Any, state: State) -> Any:
        if value.__class__ is dict:
            return prune(value, state)
        if value is None:
            return DROP
        result = alternative(value, state)
        return value if result is DROP else result

    return handle


def zero_of(type_name: str, *, label: str = "optional") -> Callable[[], Any]:
    """A maker of the JSON that Go writes for the zero value of a non-pointer field."""
    if label != "optional":
        return lambda: None
    scalar = {"string": "", "int32": 0, "int64": 0, "bool": False, "double": 0, "bytes": None}
    if type_name in scalar:
        value = scalar[type_name]
        return lambda: value
    info = message(type_name)
    if info.form:
        zero: Any = {"quantity": "0", "int-or-string": 0, "go-duration": "0s"}.get(info.form)
        return lambda: zero
    makers = _always(info)
    if not makers:
        return dict
    return lambda: {key: make() for key, make in makers}


def _always(info: Message) -> tuple[tuple[str, Callable[[], Any]], ...]:
    """The fields Go writes even when nothing is set: scalars without omitempty, and structs held by value."""
    found: list[tuple[str, Callable[[], Any]]] = []
    for one in info.fields.values():
        is_message = one.label == "optional" and "." in one.type
        if one.pointer:
            # A pointer without omitempty is written as null.
            if one.keep:
                found.append((one.json, lambda: None))
        elif one.keep or (is_message and not one.omit_zero and message(one.type).form != "bare-list"):
            found.append((one.json, zero_of(one.type, label=one.label)))
    return tuple(found)


_FORMS: dict[str, Handler] = {
    "quantity": _quantity, "int-or-string": _int_or_string, "rfc3339-seconds": _time, "rfc3339-micros": _micro_time,
    "go-duration": _duration,
}
_INT32 = INT_RANGES["int32"]
_INT64 = INT_RANGES["int64"]


def _scalar_handler(type_name: str, kept: bool) -> Handler:
    match type_name:
        case "string":
            return _string_kept if kept else _string
        case "int32":
            return _integer(*_INT32, kept)
        case "int64":
            return _integer(*_INT64, kept)
        case "bool":
            return _boolean_kept if kept else _boolean
        case "double":
            return _double(kept)
        case "bytes":
            return _bytes(kept)
    raise KeyError(type_name)


def _element_handler(type_name: str, kept: bool) -> Handler:
    """Handler of a single value of this type."""
    if "." not in type_name:
        return _scalar_handler(type_name, kept)
    form = message(type_name).form
    if not form:
        return pruner(type_name)
    if form == "raw-json":
        return _raw_kept if type_name.endswith(".JSON") else _raw
    if form == "bare-list":
        return _string_list(None if kept else DROP)
    if form == "schema-or-array":
        schema = pruner(message(type_name).fields["schema"].type)
        return _schema_or(schema, _list(schema, dict, DROP))
    if form == "schema-or-bool":
        return _schema_or(pruner(message(type_name).fields["schema"].type), _boolean_kept)
    if form == "schema-or-strings":
        return _schema_or(pruner(message(type_name).fields["schema"].type), _string_list(DROP))
    return _FORMS[form]


def _field_handler(one: Field, in_json_storage: bool) -> Handler:
    kept = one.pointer or one.keep
    if one.label == "optional":
        return _element_handler(one.type, kept)
    # What Go keeps of an empty list or map is lost on the way through protobuf storage, except where storage is JSON.
    empty: Any = DROP if not one.keep else KEEP_EMPTY if in_json_storage else NULL_LATER
    if one.type == "string":
        return _string_map(empty) if one.label == "map" else _string_list(empty)
    element = _element_handler(one.type, True)
    make = _list if one.label == "repeated" else _map
    return make(element, zero_of(one.type), empty)


_pruners: dict[str, Handler] = {}
_in_progress: set[str] = set()


def pruner(name: str) -> Handler:
    """The compiled prune function of a message: pruner(name)(obj, state) changes obj in place and returns it.

    Raises (the function):
      Mismatch: a value has the wrong type.
    """
    found = _pruners.get(name)
    if found is not None:
        return found
    if name in _in_progress:
        # A recursive type (JSON schemas): bind late.
        return lambda value, state: _pruners[name](value, state)
    _in_progress.add(name)
    try:
        made = _pruners[name] = _compile(message(name))
    finally:
        _in_progress.discard(name)
    return made


def _compile(info: Message) -> Handler:
    handlers: dict[str, Handler] = {
        key: _field_handler(one, info.name.startswith(_JSON_STORED)) for key, one in info.fields.items()
    }
    if info.name == _META + "ObjectMeta":
        # An empty list asks to forget all ownership (knarr.api.apply reads and removes it).
        handlers["managedFields"] = _list(pruner(_META + "ManagedFieldsEntry"), dict, KEEP_EMPTY)
    if info.name == "k8s.io.api.autoscaling.v2.HPAScalingRules":
        # An empty list of policies is one that the defaults do not replace, and that validation refuses.
        handlers["policies"] = _list(pruner("k8s.io.api.autoscaling.v2.HPAScalingPolicy"), dict, KEEP_EMPTY)
    for key in GATED_OFF.get(info.name, ()):
        if key in handlers:
            handlers[key] = _gated_off(handlers[key])
    if info.type_meta:
        handlers["apiVersion"] = handlers["kind"] = _string
    always = _always(info)
    plain = {key: None for key, handler in handlers.items() if handler is _string or handler is _string_kept}
    get = handlers.get

    def prune(obj: Any, state: State) -> Any:
        if obj.__class__ is not dict:
            if obj is None:
                return DROP
            raise Mismatch
        state.keys += len(obj)
        dropped: list[str] | None = None
        for key, value in obj.items():
            # Most fields are non-empty strings: no call for those.
            if value.__class__ is str and value and key in plain:
                continue
            handler = get(key)
            if handler is None:
                state.unknown = True
                result: Any = DROP
            else:
                result = handler(value, state)
            if result is not value:
                if result is DROP:
                    if dropped is None:
                        dropped = [key]
                    else:
                        dropped.append(key)
                elif result is NULL_LATER:
                    state.later.append((obj, key, None))
                elif result.__class__ is _DropLater:
                    obj[key] = result.value
                    state.later.append((obj, key, DROP))
                elif result is not KEEP_EMPTY:
                    obj[key] = result
        if dropped is not None:
            for key in dropped:
                del obj[key]
        for key, make in always:
            if key not in obj:
                obj[key] = make()
        return obj

    return prune


def normalize_message(name: str, obj: Object) -> State:
    """Bring a message into canonical form in place. Raises Mismatch."""
    state = State()
    pruner(name)(obj, state)
    settle(state.later)
    return state


def normalize(api_version: str, kind: str, obj: Object) -> State:
    """Bring an object into canonical form in place, after a patch or a webhook changed it.

    Raises:
      KeyError: not a built-in kind.
      Mismatch: wrong type; `decode.check_object` says it in upstream's words.
    """
    return normalize_message(message_name(api_version, kind), obj)
