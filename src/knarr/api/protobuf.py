"""Kubernetes' protobuf encoding, both ways, compiled from the type facts: objects, envelopes, lists and watch frames.

Callers: decode.py for request bodies, the API server's protobuf forms, the client if asked to. Functions per message are
made on first use. Encoding walks the keys an object has, decoding the fields on the wire; what Go would leave out or
fill in is then done by typeinfo's pruner, so both encodings of an object decode to the same dict.

Longer than usual: encoder and decoder are two tables over the same few kinds of fields.

Source: apimachinery runtime/serializer/protobuf, runtime/generated.proto (Unknown), meta/v1 time_proto.go.
"""

import struct
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Iterable
from typing import Any

import orjson

from knarr.api import times, typeinfo
from knarr.api.typeinfo import Field, Message, message
from knarr.api.types import Object

MEDIA_TYPE = "application/vnd.kubernetes.protobuf"
MAGIC = b"k8s\x00"


class ProtobufError(ValueError):
    """Bytes that are not such a message, or an object that has no protobuf form."""


# --- writing ----------------------------------------------------------------------------------------------------------

Encoder = Callable[[Any], bytes]
Appender = Callable[[list[bytes], Any], None]


def varint(value: int) -> bytes:
    """A base-128 varint; negative numbers as 64-bit two's complement."""
    if 0 <= value < 128:
        return _SMALL[value]
    value &= 0xFFFFFFFFFFFFFFFF
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    out.append(value)
    return bytes(out)


_SMALL = [bytes([n]) for n in range(128)]


def _tag(number: int, wire_type: int) -> bytes:
    return varint(number << 3 | wire_type)


def _delimited(tag: bytes, body: bytes) -> bytes:
    size = len(body)
    return tag + (_SMALL[size] if size < 128 else varint(size)) + body


def _scalar_encoder(type_name: str) -> tuple[int, Encoder]:
    """(wire type, encoder of the value without tag; length included for strings and bytes)."""
    match type_name:
        case "string":
            return 2, _encode_text
        case "bytes":
            return 2, _encode_base64
        case "bool":
            return 0, lambda value: b"\x01" if value else b"\x00"
        case "int32" | "int64":
            return 0, varint
        case "double":
            return 1, lambda value: struct.pack("<d", value)
    raise KeyError(type_name)


def _encode_text(value: Any) -> bytes:
    body: bytes = value.encode()
    size = len(body)
    return (_SMALL[size] if size < 128 else varint(size)) + body


def _encode_base64(value: Any) -> bytes:
    body = a2b_base64(value)
    return varint(len(body)) + body


_TAG1, _TAG2, _TAG3 = _tag(1, 2), _tag(2, 2), _tag(3, 2)


def _encode_time(value: Any) -> bytes:
    seconds, _nanos = times.to_epoch(value)
    return b"\x08" + varint(seconds) + b"\x10\x00"


def _encode_micro_time(value: Any) -> bytes:
    seconds, nanos = times.to_epoch(value)
    return b"\x08" + varint(seconds) + b"\x10" + varint(nanos // 1000 * 1000)


def _encode_int_or_string(value: Any) -> bytes:
    if value.__class__ is str:
        return b"\x08\x01\x10\x00" + _delimited(_TAG3, value.encode())
    return b"\x08\x00\x10" + varint(value) + b"\x1a\x00"


_FORM_ENCODERS: dict[str, Encoder] = {
    "quantity": lambda value: _delimited(_TAG1, value.encode()),
    "int-or-string": _encode_int_or_string,
    "rfc3339-seconds": _encode_time,
    "rfc3339-micros": _encode_micro_time,
    "go-duration": lambda value: b"\x08" + varint(times.parse_duration(value)),
    "raw-json": lambda value: _delimited(_TAG1, orjson.dumps(value)),
    "bare-list": lambda value: b"".join(_delimited(_TAG1, item.encode()) for item in value),
}


def _schema_or_encoder(info: Message) -> Encoder:
    """The JSONSchemaPropsOr… messages: a schema, or the alternative."""
    schema_tag = _tag(info.fields["schema"].number, 2)
    schema_type = info.fields["schema"].type

    def encode(value: Any) -> bytes:
        schema = encoder(schema_type)
        if value.__class__ is dict:
            allows = b"\x08\x01" if info.form == "schema-or-bool" else b""
            return allows + _delimited(schema_tag, schema(value))
        if info.form == "schema-or-bool":
            return b"\x08\x01" if value else b"\x08\x00"
        if info.form == "schema-or-array":
            return b"".join(_delimited(_TAG2, schema(item)) for item in value)
        return b"".join(_delimited(_TAG2, item.encode()) for item in value)

    return encode


def _value_encoder(type_name: str) -> Encoder:
    """Encoder of a message's or form's body, without tag and length."""
    info = message(type_name)
    if not info.form:
        return encoder(type_name)
    return _FORM_ENCODERS[info.form] if info.form in _FORM_ENCODERS else _schema_or_encoder(info)


def _appender(one: Field) -> Appender:
    """A function that appends a field's wire form to a list of chunks."""
    if "." not in one.type:
        wire_type, encode = _scalar_encoder(one.type)
        tag = _tag(one.number, wire_type)
        if one.label == "optional":
            return lambda out, value: out.append(tag + encode(value))
        if one.label == "repeated":
            return lambda out, value: out.extend([tag + encode(item) for item in value])
        return _map_appender(_tag(one.number, 2), lambda value: _tag(2, wire_type) + encode(value))
    body = _value_encoder(one.type)
    tag = _tag(one.number, 2)
    if one.label == "optional":
        return lambda out, value: out.append(_delimited(tag, body(value)))
    if one.label == "repeated":
        return lambda out, value: out.extend([_delimited(tag, body(item) if item is not None else b"") for item in value])
    return _map_appender(tag, lambda value: _delimited(_TAG2, body(value)))


def _map_appender(tag: bytes, entry_value: Encoder) -> Appender:
    def append(out: list[bytes], value: Any) -> None:
        for key in sorted(value):
            item = value[key]
            out.append(_delimited(tag, _delimited(_TAG1, key.encode()) + (entry_value(item) if item is not None else b"")))

    return append


_encoders: dict[str, Encoder] = {}


def encoder(name: str) -> Encoder:
    """The compiled encoder of a message: encoder(name)(obj) gives its bytes, without envelope."""
    found = _encoders.get(name)
    if found is None:
        # A recursive type meets itself while being compiled: late binding then.
        _encoders[name] = lambda value: _encoders[name](value)
        found = _encoders[name] = _compile_encoder(message(name))
    return found


def _compile_encoder(info: Message) -> Encoder:
    plain: dict[str, Appender] = {}
    nested: dict[str, tuple[bytes, str, str]] = {}
    for one, inlined in info.own:
        if inlined:
            tag = _tag(one.number, 2)
            for key in message(one.type).fields:
                nested[key] = (tag, one.type, key)
        else:
            plain[one.json] = _appender(one)
    get = plain.get

    def encode(obj: Any) -> bytes:
        out: list[bytes] = []
        inner: dict[bytes, tuple[str, Object]] | None = None
        for key, value in obj.items():
            if value is None:
                continue
            append = get(key)
            if append is not None:
                append(out, value)
            elif nested and key in nested:
                tag, type_name, _ = nested[key]
                if inner is None:
                    inner = {}
                inner.setdefault(tag, (type_name, {}))[1][key] = value
        if inner is not None:
            for tag, (type_name, members) in inner.items():
                out.append(_delimited(tag, encoder(type_name)(members)))
        return b"".join(out)

    return encode


def encode_message(api_version: str, kind: str, obj: Object) -> bytes:
    """The bytes of an object's message, without envelope; for lists and for wrapping later.

    Raises:
      ProtobufError: not a built-in kind, or a value that does not fit its type.
    """
    try:
        return encoder(typeinfo.message_name(api_version, kind))(obj)
    except (KeyError, AttributeError, TypeError, ValueError, Base64Error) as error:
        raise ProtobufError(f"cannot encode {api_version} {kind}: {error!r}") from error


def envelope(api_version: str, kind: str, raw: bytes) -> bytes:
    """Wrap a message into the envelope that carries its type."""
    identity = _delimited(_TAG1, api_version.encode()) + _delimited(_TAG2, kind.encode())
    return b"".join((MAGIC, _delimited(_TAG1, identity), _TAG2, varint(len(raw)), raw, b"\x1a\x00\x22\x00"))


def encode(obj: Object) -> bytes:
    """An object with its envelope, by its own apiVersion and kind.

    Raises:
      ProtobufError: it has no protobuf form.
    """
    api_version, kind = obj.get("apiVersion") or "", obj.get("kind") or ""
    return envelope(api_version, kind, encode_message(api_version, kind, obj))


def encode_list(api_version: str, list_kind: str, metadata: Object, items: Iterable[bytes]) -> bytes:
    """A list with its envelope.

    Args:
      metadata: ListMeta.
      items: The messages of the items, without envelopes.
    """
    chunks = [_delimited(_TAG1, encoder("k8s.io.apimachinery.pkg.apis.meta.v1.ListMeta")(metadata))]
    for item in items:
        chunks.append(_TAG2 + varint(len(item)))
        chunks.append(item)
    return envelope(api_version, list_kind, b"".join(chunks))


def watch_frame(event_type: str, object_envelope: bytes) -> bytes:
    """A frame of a watch: length, then a WatchEvent message that holds an object with its envelope."""
    event = _delimited(_TAG1, event_type.encode()) + _delimited(_TAG2, _delimited(_TAG1, object_envelope))
    return struct.pack(">I", len(event)) + event


# --- reading ----------------------------------------------------------------------------------------------------------

Decoder = Callable[[bytes, int, int], Any]
"""(buffer, start, end) -> value."""


def _read_varint(buffer: bytes, position: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = buffer[position]
        position += 1
        result |= (byte & 127) << shift
        if byte < 128:
            return result, position
        shift += 7
        if shift > 63:
            raise ProtobufError("proto: integer overflow")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value


def _signed32(value: int) -> int:
    value &= 0xFFFFFFFF
    return value - (1 << 32) if value >= 1 << 31 else value


def _text(buffer: bytes, start: int, end: int) -> str:
    return buffer[start:end].decode("utf-8", "replace")


def _simple_fields(buffer: bytes, start: int, end: int) -> dict[int, Any]:
    """Number -> last raw value (int, or (start, end)) of a small fixed message."""
    found: dict[int, Any] = {}
    position = start
    while position < end:
        tag, position = _read_varint(buffer, position)
        wire_type = tag & 7
        if wire_type == 0:
            found[tag >> 3], position = _read_varint(buffer, position)
        elif wire_type == 2:
            size, position = _read_varint(buffer, position)
            found[tag >> 3] = (position, position + size)
            position += size
        else:
            position = _skip(buffer, position, wire_type)
        if position > end:
            raise ProtobufError("unexpected EOF")
    return found


def _decode_time(buffer: bytes, start: int, end: int) -> Any:
    if start == end:
        return None
    fields = _simple_fields(buffer, start, end)
    return times.from_epoch(_signed(fields.get(1, 0)))


def _decode_micro_time(buffer: bytes, start: int, end: int) -> Any:
    if start == end:
        return None
    fields = _simple_fields(buffer, start, end)
    return times.from_epoch(_signed(fields.get(1, 0)), _signed32(fields.get(2, 0)), micros=True)


def _decode_quantity(buffer: bytes, start: int, end: int) -> Any:
    fields = _simple_fields(buffer, start, end)
    span = fields.get(1)
    return _text(buffer, *span) or "0" if span else "0"


def _decode_int_or_string(buffer: bytes, start: int, end: int) -> Any:
    fields = _simple_fields(buffer, start, end)
    if fields.get(1, 0):
        span = fields.get(3)
        return _text(buffer, *span) if span else ""
    return _signed32(fields.get(2, 0))


def _decode_duration(buffer: bytes, start: int, end: int) -> Any:
    return times.format_duration(_signed(_simple_fields(buffer, start, end).get(1, 0)))


def _decode_raw_json(buffer: bytes, start: int, end: int) -> Any:
    span = _simple_fields(buffer, start, end).get(1)
    if not span or span[0] == span[1]:
        return None
    raw = buffer[span[0] : span[1]]
    if raw.startswith(MAGIC):
        return decode(raw)
    try:
        return orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise ProtobufError(f"raw JSON: {error}") from None


def _decode_bare_list(buffer: bytes, start: int, end: int) -> Any:
    found: list[str] = []
    position = start
    while position < end:
        tag, position = _read_varint(buffer, position)
        if tag == 10:
            size, position = _read_varint(buffer, position)
            found.append(_text(buffer, position, position + size))
            position += size
        else:
            position = _skip(buffer, position, tag & 7)
    return found


_FORM_DECODERS: dict[str, Decoder] = {
    "quantity": _decode_quantity, "int-or-string": _decode_int_or_string, "rfc3339-seconds": _decode_time,
    "rfc3339-micros": _decode_micro_time, "go-duration": _decode_duration, "raw-json": _decode_raw_json, "bare-list": _decode_bare_list,
}


def _schema_or_decoder(info: Message) -> Decoder:
    fields = {one.number << 3 | (0 if one.type == "bool" else 2): one for one in info.fields.values()}
    schema_type = info.fields["schema"].type

    def decode_one(buffer: bytes, start: int, end: int) -> Any:
        result: Any = False if info.form == "schema-or-bool" else []
        position = start
        while position < end:
            tag, position = _read_varint(buffer, position)
            one = fields.get(tag)
            if one is None:
                position = _skip(buffer, position, tag & 7)
                continue
            number, position = _read_varint(buffer, position)
            if one.type == "bool":
                result = bool(number) if result.__class__ is not dict else result
                continue
            stop = position + number
            if one.json == "schema":
                result = decoder(schema_type)(buffer, position, stop)
            elif one.type == "string":
                result.append(_text(buffer, position, stop))
            else:
                result.append(decoder(schema_type)(buffer, position, stop))
            position = stop
        return result

    return decode_one


def _skip(buffer: bytes, position: int, wire_type: int) -> int:
    match wire_type:
        case 0:
            return _read_varint(buffer, position)[1]
        case 1:
            return position + 8
        case 2:
            size, position = _read_varint(buffer, position)
            return position + size
        case 5:
            return position + 4
    raise ProtobufError(f"proto: illegal wireType {wire_type}")


def _body_decoder(type_name: str) -> Decoder:
    """Decoder of a length-delimited value."""
    if type_name == "string":
        return _text
    if type_name == "bytes":
        return lambda buffer, start, end: b2a_base64(buffer[start:end], newline=False).decode()
    info = message(type_name)
    if not info.form:
        return decoder(type_name)
    return _FORM_DECODERS[info.form] if info.form in _FORM_DECODERS else _schema_or_decoder(info)


_STRING, _SCALAR, _SINGLE, _LIST, _SCALAR_LIST, _MAP, _INLINE = range(7)
_CONVERTERS: dict[str, Callable[[int], Any]] = {"bool": bool, "int32": _signed32, "int64": _signed}

_decoders: dict[str, Decoder] = {}


def decoder(name: str) -> Decoder:
    """The compiled decoder of a message: decoder(name)(buffer, start, end) gives a dict with what is on the wire."""
    found = _decoders.get(name)
    if found is None:
        _decoders[name] = lambda buffer, start, end: _decoders[name](buffer, start, end)
        found = _decoders[name] = _compile_decoder(message(name))
    return found


def _plan(one: Field, inlined: bool) -> tuple[int, tuple[int, str, Any]]:
    """(tag, (kind, JSON key, helper)) of a field."""
    delimited = one.number << 3 | 2
    if inlined:
        return delimited, (_INLINE, one.json, _body_decoder(one.type))
    if one.label == "map":
        return delimited, (_MAP, one.json, _map_value(one.type))
    if one.type in _CONVERTERS:
        kind = _SCALAR_LIST if one.label == "repeated" else _SCALAR
        return one.number << 3, (kind, one.json, _CONVERTERS[one.type])
    if one.type == "double":
        return one.number << 3 | 1, (_SCALAR, one.json, None)
    if one.label == "repeated":
        return delimited, (_LIST, one.json, _body_decoder(one.type))
    if one.type == "string":
        return delimited, (_STRING, one.json, None)
    return delimited, (_SINGLE, one.json, _body_decoder(one.type))


def _map_value(type_name: str) -> tuple[Decoder, Callable[[], Any]]:
    zero = {"string": str, "bytes": str}.get(type_name) or typeinfo.zero_of(type_name)
    return _body_decoder(type_name), zero


def _compile_decoder(info: Message) -> Decoder:
    plans = dict(_plan(one, inlined) for one, inlined in info.own)
    find = plans.get

    def decode_one(buffer: bytes, position: int, end: int) -> Any:
        obj: Object = {}
        while position < end:
            tag = buffer[position]
            position += 1
            if tag > 127:
                tag = tag & 127 | buffer[position] << 7
                position += 1
                if tag > 16383:
                    tag, position = _read_varint(buffer, position - 2)
            plan = find(tag)
            if plan is None:
                position = _skip(buffer, position, tag & 7)
                continue
            kind, key, helper = plan
            if tag & 7 == 1:
                obj[key] = struct.unpack_from("<d", buffer, position)[0]
                position += 8
                continue
            size = buffer[position]
            position += 1
            if size > 127:
                size, position = _read_varint(buffer, position - 1)
            if kind == _SCALAR:
                obj[key] = helper(size)
                continue
            if kind == _SCALAR_LIST:
                obj.setdefault(key, []).append(helper(size))
                continue
            stop = position + size
            if stop > end:
                raise ProtobufError("unexpected EOF")
            if kind == _STRING:
                obj[key] = buffer[position:stop].decode("utf-8", "replace")
            elif kind == _SINGLE:
                obj[key] = helper(buffer, position, stop)
            elif kind == _LIST:
                found = obj.get(key)
                if found is None:
                    found = obj[key] = []
                found.append(helper(buffer, position, stop))
            elif kind == _MAP:
                _read_entry(buffer, position, stop, obj.setdefault(key, {}), helper)
            else:
                obj.update(helper(buffer, position, stop))
            position = stop
        return obj

    return decode_one


def _read_entry(buffer: bytes, position: int, end: int, into: Object, helper: tuple[Decoder, Callable[[], Any]]) -> None:
    key, value = "", None
    value_decoder, zero = helper
    while position < end:
        tag, position = _read_varint(buffer, position)
        if tag not in (10, 18):
            position = _skip(buffer, position, tag & 7)
            continue
        size, position = _read_varint(buffer, position)
        if tag == 10:
            key = _text(buffer, position, position + size)
        else:
            value = value_decoder(buffer, position, position + size)
        position += size
    into[key] = zero() if value is None else value


def open_envelope(body: bytes) -> tuple[str, str, bytes]:
    """(apiVersion, kind, message bytes) of an envelope.

    Raises:
      ProtobufError: not an envelope.
    """
    if not body.startswith(MAGIC):
        raise ProtobufError(f"provided data does not appear to be a protobuf message, expected prefix {list(MAGIC)}".replace(",", ""))
    try:
        fields = _simple_fields(body, len(MAGIC), len(body))
        identity = _simple_fields(body, *fields[1]) if 1 in fields else {}
        api_version = _text(body, *identity[1]) if 1 in identity else ""
        kind = _text(body, *identity[2]) if 2 in identity else ""
        raw = body[fields[2][0] : fields[2][1]] if 2 in fields else b""
    except (IndexError, TypeError) as error:
        raise ProtobufError("unexpected EOF") from error
    return api_version, kind, raw


def decode_message(api_version: str, kind: str, raw: bytes) -> Object:
    """The object of a message without envelope, in canonical form, with apiVersion and kind.

    Raises:
      ProtobufError: malformed, or not a built-in kind.
    """
    try:
        name = typeinfo.message_name(api_version, kind)
    except KeyError:
        raise ProtobufError(f'no kind "{kind}" is registered for version "{api_version}"') from None
    try:
        obj: Object = decoder(name)(raw, 0, len(raw))
        typeinfo.normalize_message(name, obj)
    except (IndexError, struct.error) as error:
        raise ProtobufError("unexpected EOF") from error
    except (RecursionError, ValueError, typeinfo.Mismatch) as error:
        raise error if isinstance(error, ProtobufError) else ProtobufError(f"malformed message: {error!r}") from error
    return {"kind": kind, "apiVersion": api_version, **obj}


def decode(body: bytes, default: tuple[str, str] = ("", "")) -> Object:
    """The object of an envelope, in canonical form.

    Args:
      default: (api_version, kind) for an envelope that names none.

    Raises:
      ProtobufError: malformed, or not a built-in kind.
    """
    api_version, kind, raw = open_envelope(body)
    return decode_message(api_version or default[0], kind or default[1], raw)


def decode_watch_frames(buffer: bytes) -> tuple[list[tuple[str, Object]], bytes]:
    """Read whole frames of a watch.

    Returns:
      ([(event type, object)], rest): rest is the beginning of a frame that is not complete yet.
    """
    events: list[tuple[str, Object]] = []
    position = 0
    while len(buffer) - position >= 4:
        (size,) = struct.unpack_from(">I", buffer, position)
        if len(buffer) - position - 4 < size:
            break
        start = position + 4
        fields = _simple_fields(buffer, start, start + size)
        raw = _simple_fields(buffer, *fields[2])
        events.append((_text(buffer, *fields[1]), decode(buffer[raw[1][0] : raw[1][1]])))
        position = start + size
    return events, buffer[position:]
