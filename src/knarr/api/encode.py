"""JSON out: the only place where objects become bytes. Called by the API server and the client."""

from typing import Any

import orjson


def to_json(value: Any) -> bytes:
    """Encode a JSON value compactly, in the order of its keys, as UTF-8."""
    return orjson.dumps(value, option=orjson.OPT_PASSTHROUGH_SUBCLASS)


def trimmed(encoded: bytes) -> bytes:
    """Copy what the encoder made, for keeping: orjson gives its buffer away with the result, some ten times as long, 4 KB at least."""
    return bytes(memoryview(encoded))


def to_json_sorted(value: Any) -> bytes:
    """Encode a JSON value with sorted keys: equal values give equal bytes."""
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def to_json_pretty(value: Any) -> bytes:
    """Encode a JSON value with an indentation of two spaces and a final newline, as `?pretty=true` answers."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2 | orjson.OPT_APPEND_NEWLINE)
