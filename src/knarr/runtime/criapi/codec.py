"""Protobuf encoding of the CRI messages, driven by a table of wire numbers (messages.json).

Role: dictionaries to bytes and back, for client.py. Field names are those of api.proto; enums travel as their names; unset
fields are absent after decoding, unknown ones are skipped. A hand-made codec of this size loads at once, where generated
modules of the whole API cost 20 MB.
Source: protobuf encoding specification; k8s.io/cri-api/pkg/apis/runtime/v1/api.proto.
"""

from __future__ import annotations

import os
import struct
from functools import cache
from typing import Any

import orjson

Fields = dict[str, tuple[int, str, str]]
_VARINTS = {"int64", "int32", "uint32", "uint64", "bool"}


class CodecError(ValueError):
    """Bytes that are no such message, or a value that does not fit its field."""


@cache
def _facts() -> dict[str, Any]:
    with open(os.path.join(os.path.dirname(__file__), "messages.json"), "rb") as file:
        facts: dict[str, Any] = orjson.loads(file.read())
    return facts


def method(name: str) -> tuple[str, str, str]:
    """(service, request message, response message) of a call."""
    service, request, response = _facts()["methods"][name]
    return service, request, response


@cache
def _by_number(message: str) -> dict[int, tuple[str, str, str]]:
    fields: Fields = _facts()["messages"][message]
    return {number: (name, kind, label) for name, (number, kind, label) in fields.items()}


@cache
def _enum_names(kind: str) -> dict[int, str]:
    return {number: name for name, number in _facts()["enums"][kind].items()}


def _varint(value: int) -> bytes:
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        if position >= len(data) or shift > 63:
            raise CodecError("malformed varint")
        byte = data[position]
        result |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return result, position
        shift += 7


def encode(message: str, value: dict[str, Any]) -> bytes:
    """Bytes of a message. None, zero and empty values are left out; an empty dict of a message type is sent."""
    fields: Fields = _facts()["messages"][message]
    parts: list[bytes] = []
    for name, item in value.items():
        if item is None:
            continue
        try:
            number, kind, label = fields[name]
        except KeyError:
            raise CodecError(f"{message} has no field {name}") from None
        if kind.startswith("map<"):
            value_kind = kind[4:-1].partition(",")[2]
            for key, entry in item.items():
                body = _field(1, "string", key) + _field(2, value_kind, entry)
                parts.append(_varint(number << 3 | 2) + _varint(len(body)) + body)
        elif label == "repeated":
            parts += [_field(number, kind, entry, always=True) for entry in item]
        else:
            parts.append(_field(number, kind, item))
    return b"".join(parts)


def _field(number: int, kind: str, value: Any, *, always: bool = False) -> bytes:
    facts = _facts()
    if kind in facts["enums"]:
        value = facts["enums"][kind][value]
    elif kind not in _VARINTS:
        if kind == "double":
            return _varint(number << 3 | 1) + struct.pack("<d", value)
        body = value if kind == "bytes" else value.encode("utf-8", "surrogateescape") if kind == "string" else encode(kind, value)
        if not body and not always and kind in ("string", "bytes"):
            return b""
        return _varint(number << 3 | 2) + _varint(len(body)) + body
    return _varint(number << 3) + _varint(int(value)) if value or always else b""


def decode(message: str, data: bytes) -> dict[str, Any]:
    """The fields that are set. Raises CodecError."""
    known, found, position = _by_number(message), dict[str, Any](), 0
    while position < len(data):
        tag, position = _read_varint(data, position)
        raw: Any
        wire = tag & 7
        if wire == 0:
            raw, position = _read_varint(data, position)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
            raw, position = data[position : position + size], position + size
        elif wire == 2:
            size, position = _read_varint(data, position)
            raw, position = data[position : position + size], position + size
            if len(raw) != size:
                raise CodecError("truncated message")
        else:
            raise CodecError(f"wire type {wire}")
        if (field := known.get(tag >> 3)) is not None:
            _store(found, *field, wire, raw)
    return found


def _store(found: dict[str, Any], name: str, kind: str, label: str, wire: int, raw: Any) -> None:
    if kind.startswith("map<"):
        _, _, value_kind = kind[4:-1].partition(",")
        key, value, position = "", "" if value_kind == "string" else 0, 0
        while position < len(raw):
            tag, position = _read_varint(raw, position)
            size, position = _read_varint(raw, position)
            text = raw[position : position + size].decode("utf-8", "surrogateescape")
            position += size
            if tag >> 3 == 1:
                key = text
            else:
                value = text
        found.setdefault(name, {})[key] = value
        return
    if label == "repeated":
        values = found.setdefault(name, [])
        if wire == 2 and (kind in _VARINTS or kind in _facts()["enums"]):  # packed
            position = 0
            while position < len(raw):
                item, position = _read_varint(raw, position)
                values.append(_value(kind, item))
        else:
            values.append(_value(kind, raw))
        return
    found[name] = _value(kind, raw)


def _value(kind: str, raw: Any) -> Any:
    if kind == "string":
        return raw.decode("utf-8", "surrogateescape")
    if kind == "bytes":
        return raw
    if kind == "bool":
        return bool(raw)
    if kind == "double":
        return struct.unpack("<d", raw)[0]
    if kind in ("int64", "int32"):
        return raw - (1 << 64) if raw >> 63 else raw
    if kind in _VARINTS:
        return raw
    if kind in _facts()["enums"]:
        return _enum_names(kind).get(raw, str(raw))
    return decode(kind, raw)
