"""The few messages of etcd's v3 API that the store needs, encoded and decoded by hand.

Own code instead of generated classes: five requests do not justify the protobuf package in the API server's memory. Field numbers are
those of etcd's rpc.proto and kv.proto.

Source: etcd api/etcdserverpb/rpc.proto, api/mvccpb/kv.proto.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

Value = int | bytes


class KeyValue(NamedTuple):
    key: bytes
    value: bytes
    create_revision: int
    mod_revision: int


class RangeAnswer(NamedTuple):
    revision: int
    items: list[KeyValue]
    total: int


class TxnAnswer(NamedTuple):
    revision: int
    succeeded: bool
    found: KeyValue | None
    """What the range of the failure branch saw."""


class WatchEvent(NamedTuple):
    deleted: bool
    item: KeyValue
    previous: KeyValue | None


class WatchAnswer(NamedTuple):
    revision: int
    created: bool
    cancelled: bool
    compact_revision: int
    reason: str
    fragment: bool
    events: list[WatchEvent]


# -- encoding --------------------------------------------------------------------------------------------------------------
def _varint(value: int) -> bytes:
    value &= (1 << 64) - 1
    out = bytearray()
    while value > 0x7F:
        out.append((value & 0x7F) | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def integer(number: int, value: int) -> bytes:
    """A varint field; zero is left out."""
    return _varint(number << 3) + _varint(value) if value else b""


def data(number: int, value: bytes) -> bytes:
    """A length-delimited field; empty is left out."""
    return _varint(number << 3 | 2) + _varint(len(value)) + value if value else b""


def message(number: int, body: bytes) -> bytes:
    """An embedded message; kept even when empty."""
    return _varint(number << 3 | 2) + _varint(len(body)) + body


def range_request(key: bytes, *, range_end: bytes = b"", limit: int = 0, revision: int = 0, count_only: bool = False) -> bytes:
    return data(1, key) + data(2, range_end) + integer(3, limit) + integer(4, revision) + integer(9, int(count_only))


def compare_mod(key: bytes, revision: int) -> bytes:
    """key's mod revision == revision (0: it does not exist)."""
    # The member of the oneof is sent even when it is zero, or etcd would see no comparison.
    return integer(2, 2) + data(3, key) + _varint(6 << 3) + _varint(revision)


def compare_exists(key: bytes) -> bytes:
    """key's version > 0."""
    return integer(1, 1) + data(3, key) + _varint(4 << 3) + _varint(0)


def put_operation(key: bytes, value: bytes, lease: int) -> bytes:
    return message(2, data(1, key) + data(2, value) + integer(3, lease))


def delete_operation(key: bytes) -> bytes:
    return message(3, data(1, key))


def range_operation(key: bytes) -> bytes:
    return message(1, range_request(key))


def txn_request(compares: list[bytes], success: list[bytes], failure: list[bytes]) -> bytes:
    return (
        b"".join(message(1, one) for one in compares) + b"".join(message(2, one) for one in success) + b"".join(message(3, one) for one in failure)
    )


def compaction_request(revision: int) -> bytes:
    return integer(1, revision)


def lease_grant_request(seconds: int) -> bytes:
    return integer(1, seconds)


def watch_create_request(key: bytes, range_end: bytes, start_revision: int) -> bytes:
    body = data(1, key) + data(2, range_end) + integer(3, start_revision) + integer(4, 1) + integer(6, 1)
    return message(1, body)


def watch_progress_request() -> bytes:
    return message(3, b"")


# -- decoding --------------------------------------------------------------------------------------------------------------
def _read_varint(body: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = body[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
        shift += 7


def fields(body: bytes) -> Iterator[tuple[int, Value]]:
    """All (number, value) of a message; fixed-width fields come as bytes."""
    position, end = 0, len(body)
    while position < end:
        tag, position = _read_varint(body, position)
        kind = tag & 7
        if kind == 0:
            value, position = _read_varint(body, position)
            yield tag >> 3, value
            continue
        if kind == 2:
            length, position = _read_varint(body, position)
        else:
            length = 8 if kind == 1 else 4
        yield tag >> 3, body[position : position + length]
        position += length


def _revision(header: Value) -> int:
    assert isinstance(header, bytes)
    return next((int(value) for number, value in fields(header) if number == 3 and isinstance(value, int)), 0)


def key_value(body: Value) -> KeyValue:
    assert isinstance(body, bytes)
    key = value = b""
    created = modified = 0
    for number, field in fields(body):
        if number == 1 and isinstance(field, bytes):
            key = field
        elif number == 5 and isinstance(field, bytes):
            value = field
        elif number == 2 and isinstance(field, int):
            created = field
        elif number == 3 and isinstance(field, int):
            modified = field
    return KeyValue(key, value, created, modified)


def range_answer(body: bytes) -> RangeAnswer:
    revision = count = 0
    items: list[KeyValue] = []
    for number, field in fields(body):
        if number == 1:
            revision = _revision(field)
        elif number == 2:
            items.append(key_value(field))
        elif number == 4 and isinstance(field, int):
            count = field
    return RangeAnswer(revision, items, count)


def txn_answer(body: bytes) -> TxnAnswer:
    revision = 0
    succeeded = False
    found: KeyValue | None = None
    for number, field in fields(body):
        if number == 1:
            revision = _revision(field)
        elif number == 2:
            succeeded = bool(field)
        elif number == 3 and isinstance(field, bytes):
            for kind, inner in fields(field):
                if kind == 1 and isinstance(inner, bytes):
                    items = range_answer(inner).items
                    found = items[0] if items else None
    return TxnAnswer(revision, succeeded, found)


def lease_id(body: bytes) -> int:
    return next((int(field) for number, field in fields(body) if number == 2 and isinstance(field, int)), 0)


def status_size(body: bytes) -> int:
    """Return the bytes of the database that a StatusResponse tells of."""
    return next((int(field) for number, field in fields(body) if number == 3 and isinstance(field, int)), 0)


def _watch_event(body: Value) -> WatchEvent:
    assert isinstance(body, bytes)
    deleted = False
    item = KeyValue(b"", b"", 0, 0)
    previous: KeyValue | None = None
    for number, field in fields(body):
        if number == 1:
            deleted = bool(field)
        elif number == 2:
            item = key_value(field)
        elif number == 3:
            previous = key_value(field)
    return WatchEvent(deleted, item, previous)


def watch_answer(body: bytes) -> WatchAnswer:
    revision = compact_revision = 0
    created = cancelled = fragment = False
    reason = ""
    events: list[WatchEvent] = []
    for number, field in fields(body):
        if number == 1:
            revision = _revision(field)
        elif number == 3:
            created = bool(field)
        elif number == 4:
            cancelled = bool(field)
        elif number == 5 and isinstance(field, int):
            compact_revision = field
        elif number == 6 and isinstance(field, bytes):
            reason = field.decode()
        elif number == 7:
            fragment = bool(field)
        elif number == 11:
            events.append(_watch_event(field))
    return WatchAnswer(revision, created, cancelled, compact_revision, reason, fragment, events)
