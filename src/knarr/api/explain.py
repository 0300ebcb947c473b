"""Says what is wrong with a body, after the fast path found that something is: slow, exact, in upstream's words.

Called by decode.py only. It walks the freshly parsed body in document order along the type facts and collects unknown
and duplicate fields, and the first type error.

Source: sigs.k8s.io/json (decode.go, kubernetes_patch.go), encoding/json for the texts of type errors.
"""

import json
from dataclasses import dataclass, field
from typing import Any

from knarr.api import quantity, times, typeinfo
from knarr.api.errors import go_quote
from knarr.api.typeinfo import Field, Message, message

MAX_STRICT_ERRORS = 100


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

    def add(self, kind: str, path: str) -> None:
        text = f"{kind} {go_quote(path)}"
        if len(self.strict) < MAX_STRICT_ERRORS and text not in self.strict:
            self.strict.append(text)

    def fail(self, text: str) -> None:
        if not self.type_error:
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


def go_type(one: Field) -> str:
    """Go's name of a field's type, pointers left out."""
    base = _go_base(one.type)
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

    def mismatch(self, value: Any, type_name: str, context: Context, *, show_number: bool = False) -> None:
        word = _json_word(value)
        if show_number and word == "number":
            word = f"number {json.dumps(value)}"
        struct, names = context
        if names:
            self.findings.fail(f"json: cannot unmarshal {word} into Go struct field {struct}.{'.'.join(names)} of type {type_name}")
        else:
            self.findings.fail(f"json: cannot unmarshal {word} into Go value of type {type_name}")

    def struct(self, value: Any, info: Message, path: str, context: Context, root: bool = False) -> None:
        if value is None:
            return
        if not isinstance(value, dict):
            self.mismatch(value, info.go_name, context)
            return
        repeated = getattr(value, "repeated", {})
        struct = info.name.rpartition(".")[2]
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
            self.field(item, one, here, (struct, (*context[1], key)))

    def field(self, value: Any, one: Field, path: str, context: Context) -> None:
        if value is None:
            return
        if one.label == "repeated":
            if not isinstance(value, list):
                self.mismatch(value, go_type(one), context)
                return
            for index, item in enumerate(value):
                self.single(item, one.type, f"{path}[{index}]", context)
        elif one.label == "map":
            if not isinstance(value, dict):
                self.mismatch(value, go_type(one), context)
                return
            repeated = getattr(value, "repeated", {})
            for key, item in value.items():
                for _ in range(repeated.get(key, 0)):
                    self.findings.add("duplicate field", f"{path}.{key}")
                self.single(item, one.type, f"{path}.{key}", context)
        else:
            self.single(value, one.type, path, context)

    def single(self, value: Any, type_name: str, path: str, context: Context) -> None:
        if value is None:
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
                    findings.fail(str(error))
            case "int-or-string":
                if isinstance(value, str):
                    return
                if isinstance(value, bool) or not isinstance(value, int) or not -(2**31) <= value < 2**31:
                    self.mismatch(value, "int32", ("", ()), show_number=True)
            case "rfc3339-seconds" | "rfc3339-micros":
                self.time(value, info.form)
            case "go-duration":
                if not isinstance(value, str):
                    self.mismatch(value, "string", ("", ()))
                    return
                try:
                    times.parse_duration(value)
                except ValueError:
                    findings.fail(f"time: invalid duration {go_quote(value)}")
            case "bare-list":
                self.field(value, Field("", 0, "repeated", "string"), path, context)
            case "schema-or-array":
                if isinstance(value, list):
                    for index, item in enumerate(value):
                        self.struct(item, message(info.fields["schema"].type), f"{path}[{index}]", context)
                elif isinstance(value, dict):
                    self.struct(value, message(info.fields["schema"].type), path, context)
                else:
                    findings.fail(f"json: cannot unmarshal {_json_word(value)} into Go value of type {info.go_name}")
            case "schema-or-bool" | "schema-or-strings":
                if isinstance(value, dict):
                    self.struct(value, message(info.fields["schema"].type), path, context)
                elif info.form == "schema-or-bool" and not isinstance(value, bool):
                    findings.fail("boolean or JSON schema expected")
                elif info.form == "schema-or-strings":
                    self.field(value, Field("", 0, "repeated", "string"), path, context)
            case "raw-json":
                explain_untyped(value, findings, path)

    def time(self, value: Any, form: str) -> None:
        if not isinstance(value, str):
            self.mismatch(value, "string", ("", ()))
            return
        layout = "2006-01-02T15:04:05.000000Z07:00" if form == "rfc3339-micros" else "2006-01-02T15:04:05Z07:00"
        try:
            (times.canonical_micros if form == "rfc3339-micros" else times.canonical_seconds)(value)
        except ValueError:
            self.findings.fail(f"parsing time {go_quote(value)} as {go_quote(layout)}: cannot parse {go_quote(value)} as \"2006\"")


def _bad_base64_position(text: str) -> int:
    alphabet = set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/")
    for index, character in enumerate(text):
        if character not in alphabet and character not in "\r\n":
            if character == "=" and text[index:].strip("=\r\n") == "" and index % 4 >= 2:
                continue
            return index
    return len(text) - len(text) % 4
