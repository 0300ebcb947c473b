"""Says what is wrong with a body, after the fast path found that something is: slow, exact, in upstream's words.

Called by decode.py only. It walks the freshly parsed body in document order along the type facts and collects unknown
and duplicate fields, and the first type error.

Source: sigs.k8s.io/json (decode.go, kubernetes_patch.go), encoding/json for the texts of type errors.
"""

import json
import re
from dataclasses import dataclass, field
from typing import Any

from knarr.api import quantity, times, typeinfo
from knarr.api.errors import go_quote
from knarr.api.facts import FactLines
from knarr.api.typeinfo import Field, Message, message

MAX_STRICT_ERRORS = 100
GO_TYPES = FactLines("go-types.json")
"""Message -> field -> the Go type that its strings (or the whole map) are declared with."""


class Pairs(dict[str, Any]):
    """A JSON object that remembers which of its keys came more than once."""

    repeated: dict[str, int]


def parse_with_duplicates(body: bytes) -> Any:
    """Parse JSON, objects as `Pairs` whose `repeated` maps a key to how often it was repeated."""

    def build(pairs: list[tuple[str, Any]]) -> Pairs:
        built = Pairs()
        built.repeated = {}
        for key, value in pairs:
            if key in built:
                built.repeated[key] = built.repeated.get(key, 0) + 1
            built[key] = value
        return built

    return json.loads(body, object_pairs_hook=build)


@dataclass
class Findings:
    """strict: texts such as `unknown field "spec.foo"`, in order, no repeats; type_error: the first one, or ""."""

    strict: list[str] = field(default_factory=list)
    type_error: str = ""
    aborted: bool = False

    def add(self, kind: str, path: str) -> None:
        text = f"{kind} {go_quote(path)}"
        if len(self.strict) < MAX_STRICT_ERRORS and text not in self.strict:
            self.strict.append(text)

    def fail(self, text: str) -> None:
        """Note a type error; reading goes on, the first one is told."""
        if not self.type_error:
            self.type_error = text

    def abort(self, text: str) -> None:
        """Note an error of a type that reads itself: Go stops there and tells it instead of what it noted before."""
        if not self.aborted:
            self.aborted = True
            self.type_error = text


def explain(value: Any, message_name: str, *, root: bool = True) -> Findings:
    """Walk a parsed body (objects may be `Pairs`) along a type."""
    findings = Findings()
    _Walk(findings).struct(value, message(message_name), "", ("", ()), root)
    return findings


def explain_untyped(value: Any, findings: Findings, path: str = "") -> None:
    """Duplicate fields anywhere in an untyped value."""
    if isinstance(value, dict):
        for key, item in value.items():
            here = f"{path}.{key}" if path else key
            for _ in range(getattr(value, "repeated", {}).get(key, 0)):
                findings.add("duplicate field", here)
            explain_untyped(item, findings, here)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            explain_untyped(item, findings, f"{path}[{index}]")


Context = tuple[str, tuple[str, ...]]
"""(name of the innermost Go struct, JSON field names from the root)."""


_EMBEDDED: dict[str, tuple[tuple[str, ...], frozenset[str]]] = {
    **{name: (("LocalObjectReference",), frozenset({"name"})) for name in (
        "SecretProjection", "ConfigMapVolumeSource", "ConfigMapProjection", "ConfigMapKeySelector", "SecretKeySelector", "ConfigMapEnvSource",
        "SecretEnvSource")},
    **{name: (("DeviceConfiguration",), frozenset({"opaque"})) for name in (
        "DeviceClaimConfiguration", "DeviceAllocationConfiguration", "DeviceClassConfiguration")},
    "IngressRule": (("IngressRuleValue",), frozenset({"http"})),
    "Probe": (("ProbeHandler",), frozenset({"exec", "httpGet", "tcpSocket", "grpc"})),
    "RuleWithOperations": (("Rule",), frozenset({"apiGroups", "apiVersions", "resources", "scope"})),
    "NamedRuleWithOperations": (("RuleWithOperations", "Rule"), frozenset({"apiGroups", "apiVersions", "resources", "scope"})),
}
"""Go struct -> the structs embedded in it, which Go's paths name, and the fields that they bring."""
_NOT_EMBEDDED = {
    "Volume": ("VolumeSource", frozenset({"name"})), "EphemeralContainer": ("EphemeralContainerCommon", frozenset({"targetContainerName"})),
    "PersistentVolumeSpec": ("PersistentVolumeSource", frozenset({
        "capacity", "accessModes", "claimRef", "persistentVolumeReclaimPolicy", "storageClassName", "mountOptions", "volumeMode", "nodeAffinity",
        "volumeAttributesClassName"})),
}  # fmt: skip
"""The same where the fields that are not brought are fewer."""


def _embedding(struct: str, key: str) -> tuple[str, ...]:
    names, fields = _EMBEDDED.get(struct, ((), frozenset()))
    if key in fields:
        return names
    if struct == "NamedRuleWithOperations" and key == "operations":
        return ("RuleWithOperations",)
    name, own = _NOT_EMBEDDED.get(struct, ("", frozenset()))
    return (name,) if name and key not in own else ()


def go_type(one: Field, named: str = "") -> str:
    """Go's name of a field's type, pointers left out; named is that of its elements, or of a map as a whole."""
    if named and one.label == "map":
        return named
    base = named or _go_base(one.type)
    if one.label == "repeated":
        return f"[]{base}"
    if one.label == "map":
        return f"map[{one.key_type}]{base}"
    return base


def _go_base(type_name: str) -> str:
    if "." not in type_name:
        return {"double": "float64", "bytes": "[]uint8"}.get(type_name, type_name)
    return message(type_name).go_name


def _json_word(value: Any) -> str:
    match value:
        case bool():
            return "bool"
        case int() | float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
        case dict():
            return "object"
    return "null"


class _Walk:
    def __init__(self, findings: Findings) -> None:
        self.findings = findings

    def mismatch(self, value: Any, type_name: str, context: Context, *, show_number: bool = False, aborts: bool = False) -> None:
        word = _json_word(value)
        if show_number and word == "number":
            word = f"number {json.dumps(value)}"
        struct, names = context
        note = self.findings.abort if aborts else self.findings.fail
        if names:
            note(f"json: cannot unmarshal {word} into Go struct field {struct}.{'.'.join(names)} of type {type_name}")
        else:
            note(f"json: cannot unmarshal {word} into Go value of type {type_name}")

    def struct(self, value: Any, info: Message, path: str, context: Context, root: bool = False) -> None:
        if value is None:
            return
        if not isinstance(value, dict):
            self.mismatch(value, info.go_name, context)
            return
        repeated = getattr(value, "repeated", {})
        struct = info.name.rpartition(".")[2]
        named = GO_TYPES.get(info.name)
        for key, item in value.items():
            here = f"{path}.{key}" if path else key
            one = info.fields.get(key)
            if one is None:
                if key in ("apiVersion", "kind") and (root or info.type_meta):
                    one = Field(key, 0, "optional", "string")
                else:
                    self.findings.add("unknown field", here)
                    continue
            for _ in range(repeated.get(key, 0)):
                self.findings.add("duplicate field", here)
            self.field(item, one, here, (struct, (*context[1], *_embedding(struct, key), key)), (named or {}).get(key, ""))

    def field(self, value: Any, one: Field, path: str, context: Context, named: str = "") -> None:
        if value is None:
            return
        if one.label == "repeated":
            if not isinstance(value, list):
                self.mismatch(value, go_type(one, named), context)
                return
            for index, item in enumerate(value):
                self.single(item, one.type, f"{path}[{index}]", context, named)
        elif one.label == "map":
            if not isinstance(value, dict):
                self.mismatch(value, go_type(one, named), context)
                return
            repeated = getattr(value, "repeated", {})
            for key, item in value.items():
                for _ in range(repeated.get(key, 0)):
                    self.findings.add("duplicate field", f"{path}.{key}")
                self.single(item, one.type, f"{path}.{key}", context)
        else:
            self.single(value, one.type, path, context, named)

    def single(self, value: Any, type_name: str, path: str, context: Context, named: str = "") -> None:
        if value is None:
            return
        if type_name == "string" and named:
            if not isinstance(value, str):
                self.mismatch(value, named, context)
            return
        if "." not in type_name:
            self.scalar(value, type_name, context)
            return
        info = message(type_name)
        if info.form:
            self.form(value, info, path, context)
        else:
            self.struct(value, info, path, context)

    def scalar(self, value: Any, type_name: str, context: Context) -> None:
        match type_name:
            case "string":
                if not isinstance(value, str):
                    self.mismatch(value, "string", context)
            case "bool":
                if not isinstance(value, bool):
                    self.mismatch(value, "bool", context)
            case "int32" | "int64":
                low, high = typeinfo.INT_RANGES[type_name]
                if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                    self.mismatch(value, type_name, context, show_number=True)
            case "double":
                if isinstance(value, bool) or not isinstance(value, int | float):
                    self.mismatch(value, "float64", context)
            case "bytes":
                if not isinstance(value, str):
                    self.mismatch(value, "[]uint8", context)
                    return
                try:
                    typeinfo.canonical_base64(value)
                except typeinfo.Mismatch:
                    self.findings.fail(f"illegal base64 data at input byte {_bad_base64_position(value)}")

    def form(self, value: Any, info: Message, path: str, context: Context) -> None:
        findings = self.findings
        match info.form:
            case "quantity":
                # Go hands the raw JSON to the quantity's own parser, whatever it is.
                try:
                    if isinstance(value, bool | list | dict):
                        raise quantity.QuantityError(str(quantity._MESSAGE_FORMAT))
                    quantity.canonical(value)
                except quantity.QuantityError as error:
                    findings.abort(str(error))
            case "int-or-string":
                if isinstance(value, str):
                    return
                if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
                    self.mismatch(value, "int32", context, show_number=True, aborts=True)
            case "rfc3339-seconds" | "rfc3339-micros":
                self.time(value, info.form, context)
            case "go-duration":
                if not isinstance(value, str):
                    self.mismatch(value, "string", context, aborts=True)
                    return
                try:
                    times.parse_duration(value)
                except ValueError:
                    findings.abort(f"time: invalid duration {go_quote(value)}")
            case "bare-list":
                self.field(value, Field("", 0, "repeated", "string"), path, context)
            case "schema-or-array":
                if isinstance(value, list):
                    for index, item in enumerate(value):
                        self.struct(item, message(info.fields["schema"].type), f"{path}[{index}]", context)
                elif isinstance(value, dict):
                    self.struct(value, message(info.fields["schema"].type), path, context)
                else:
                    findings.abort(f"json: cannot unmarshal {_json_word(value)} into Go value of type {info.go_name}")
            case "schema-or-bool" | "schema-or-strings":
                if isinstance(value, dict):
                    self.struct(value, message(info.fields["schema"].type), path, context)
                elif info.form == "schema-or-bool" and not isinstance(value, bool):
                    findings.abort("boolean or JSON schema expected")
                elif info.form == "schema-or-strings":
                    self.field(value, Field("", 0, "repeated", "string"), path, context)
            case "raw-json":
                explain_untyped(value, findings, path)

    def time(self, value: Any, form: str, context: Context) -> None:
        if not isinstance(value, str):
            self.mismatch(value, "string", context, aborts=True)
            return
        layout = "2006-01-02T15:04:05.000000Z07:00" if form == "rfc3339-micros" else "2006-01-02T15:04:05Z07:00"
        try:
            (times.canonical_micros if form == "rfc3339-micros" else times.canonical_seconds)(value)
        except ValueError:
            self.findings.abort(f"parsing time {go_quote(value)} as {go_quote(layout)}: {_time_problem(value, micros=form == 'rfc3339-micros')}")


_TIME_PARTS = (
    ("2006", r"\d{4}"), ("-", "-"), ("01", r"\d\d"), ("-", "-"), ("02", r"\d\d"), ("T", "T"), ("15", r"\d\d"), (":", ":"), ("04", r"\d\d"),
    (":", ":"), ("05", r"\d\d"), (".000000", r"\.\d{6}"), ("Z07:00", r"Z|[+-]\d\d:\d\d"),
)
"""Parts of Go's layouts, and what each takes."""


def _time_problem(text: str, *, micros: bool) -> str:
    """Which part of the layout a time does not fit, as Go tells it."""
    position = 0
    for name, pattern in _TIME_PARTS:
        if name == ".000000" and not micros:
            # Go takes a fraction where the layout has none.
            fraction = re.compile(r"[.,]\d+").match(text, position)
            position = fraction.end() if fraction else position
            continue
        found = re.compile(pattern).match(text, position)
        if found is None:
            return f"cannot parse {go_quote(text[position:])} as {go_quote(name)}"
        position = found.end()
    return f"extra text: {go_quote(text[position:])}" if position < len(text) else "out of range"


def _bad_base64_position(text: str) -> int:
    alphabet = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
    for index, character in enumerate(text):
        if character not in alphabet and character not in "\r\n":
            if character == "=" and text[index:].strip("=\r\n") == "" and index % 4 >= 2:
                continue
            return index
    return len(text) - len(text) % 4
