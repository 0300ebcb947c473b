"""JSON patch as the library behind upstream applies it, its departures from RFC 6902 included. Pure.

Departures: replacing a missing member adds it, a path without a leading slash loses its first part, negative indices
count from the end.

Source: gopkg.in/evanphx/json-patch.v4 patch.go.
"""

import re
from typing import Any

import orjson

from knarr.api.meta import deep_copy

MAX_COPIED_BYTES = 3 * 1024 * 1024
_INDEX = re.compile(r"[+-]?[0-9]+", re.ASCII)


class JSONPatchError(ValueError):
    """The patch cannot be applied; the message is upstream's, the document may be half patched."""


def apply(document: Any, operations: list[Any]) -> Any:
    """Apply operations in order to a document, in place where possible.

    Returns:
      The patched document (another one only if the root was replaced).

    Raises:
      JSONPatchError: an operation does not apply or a test failed.
    """
    state = _State(document)
    for operation in operations:
        fields = operation if isinstance(operation, dict) else {}
        kind = fields.get("op")
        run = _OPERATIONS.get(kind if isinstance(kind, str) else "")
        if run is None:
            raise JSONPatchError(f"Unexpected kind: {kind if isinstance(kind, str) else 'unknown'}")
        run(state, fields)
    return state.document


class _State:
    def __init__(self, document: Any) -> None:
        self.document = document
        self.copied_bytes = 0

    def find(self, path: str) -> tuple[Any, str]:
        """(container, key) of a path; container None if it is not there."""
        split = path.split("/")
        if len(split) < 2:
            return None, ""
        here = self.document
        for part in split[1:-1]:
            try:
                here = _get(here, _unescape(part))
            except JSONPatchError:
                return None, ""
            if not isinstance(here, dict | list):
                return None, ""
        return here, _unescape(split[-1])


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")


def _index(key: str) -> int:
    if not _INDEX.fullmatch(key):
        raise JSONPatchError(f'strconv.Atoi: parsing "{key}": invalid syntax')
    return int(key)


def _position(key: str, size: int, *, grow: bool = False) -> int:
    """The list position a key names."""
    index = _index(key)
    limit = size + 1 if grow else size
    if index >= limit or index < -limit:
        raise JSONPatchError(f"Unable to access invalid index: {index}: invalid index referenced")
    return index + limit if index < 0 else index


def _get(container: Any, key: str) -> Any:
    """A member; a missing one of an object is None, as upstream does not tell these apart."""
    if isinstance(container, dict):
        return container.get(key)
    return container[_position(key, len(container))]


def _add_to(container: Any, key: str, value: Any) -> None:
    if isinstance(container, dict):
        container[key] = value
    elif key == "-":
        container.append(value)
    else:
        container.insert(_position(key, len(container), grow=True), value)


def _remove_from(container: Any, key: str) -> None:
    if isinstance(container, dict):
        if key not in container:
            raise JSONPatchError(f"Unable to remove nonexistent key: {key}: missing value")
        del container[key]
    else:
        del container[_position(key, len(container))]


def _text(fields: dict[str, Any], name: str, operation: str) -> str:
    text = fields.get(name)
    if not isinstance(text, str):
        raise JSONPatchError(f"{operation} operation failed to decode {name}: missing value")
    return text


def _container(state: _State, path: str, message: str) -> tuple[Any, str]:
    container, key = state.find(path)
    if container is None:
        raise JSONPatchError(f"{message}: {path}: missing value")
    return container, key


def _add(state: _State, fields: dict[str, Any]) -> None:
    path = _text(fields, "path", "add")
    container, key = _container(state, path, "add operation does not apply: doc is missing path")
    _add_to(container, key, deep_copy(fields.get("value")))


def _remove(state: _State, fields: dict[str, Any]) -> None:
    path = _text(fields, "path", "remove")
    container, key = _container(state, path, "remove operation does not apply: doc is missing path")
    _remove_from(container, key)


def _replace(state: _State, fields: dict[str, Any]) -> None:
    path = _text(fields, "path", "replace")
    value = deep_copy(fields.get("value"))
    if path == "":
        if not isinstance(value, dict | list):
            raise JSONPatchError("replace operation value must be object or array")
        state.document = value
        return
    container, key = _container(state, path, "replace operation does not apply: doc is missing path")
    if isinstance(container, dict):
        container[key] = value
    else:
        container[_position(key, len(container))] = value


def _move(state: _State, fields: dict[str, Any]) -> None:
    source = _text(fields, "from", "move")
    container, key = _container(state, source, "move operation does not apply: doc is missing from path")
    value = _get(container, key)
    _remove_from(container, key)
    path = _text(fields, "path", "move")
    container, key = _container(state, path, "move operation does not apply: doc is missing destination path")
    _add_to(container, key, value)


def _copy(state: _State, fields: dict[str, Any]) -> None:
    source = _text(fields, "from", "copy")
    container, key = _container(state, source, "copy operation does not apply: doc is missing from path")
    value = _get(container, key)
    path = _text(fields, "path", "copy")
    container, key = _container(state, path, "copy operation does not apply: doc is missing destination path")
    state.copied_bytes += len(orjson.dumps(value))
    if state.copied_bytes > MAX_COPIED_BYTES:
        raise JSONPatchError(
            f"Unable to complete the copy, the accumulated size increase of copy is {state.copied_bytes}, exceeding the limit "
            f"{MAX_COPIED_BYTES}"
        )
    _add_to(container, key, deep_copy(value))


def _test(state: _State, fields: dict[str, Any]) -> None:
    path = _text(fields, "path", "test")
    if path == "":
        found = state.document
    else:
        container, key = _container(state, path, "test operation does not apply: is missing path")
        found = _get(container, key)
    if not equal(found, fields.get("value")):
        raise JSONPatchError(f"testing value {path} failed: test failed")


def equal(left: Any, right: Any) -> bool:
    """Equality of JSON values that tells true from 1 and 1 from 1.0."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(value, right[key]) for key, value in left.items())
    if isinstance(left, list):
        return len(left) == len(right) and all(equal(a, b) for a, b in zip(left, right, strict=True))
    return bool(left == right)


_OPERATIONS = {"add": _add, "remove": _remove, "replace": _replace, "move": _move, "copy": _copy, "test": _test}
