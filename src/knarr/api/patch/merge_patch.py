"""JSON merge patch (RFC 7386) as upstream's library does it. Pure.

Source: gopkg.in/evanphx/json-patch.v4 merge.go.
"""

from typing import Any

from knarr.api.types import Object


def apply(document: Object, patch: Object) -> Object:
    """Merge a patch into a document in place, and return it; null removes a member."""
    for key, value in patch.items():
        if value is None:
            document.pop(key, None)
            continue
        current = document.get(key)
        if current is None:
            document[key] = _without_nulls(value)
        elif isinstance(current, dict) and isinstance(value, dict):
            apply(current, value)
        elif isinstance(current, dict):
            document[key] = value
        else:
            document[key] = _without_nulls(value)
    return document


def _without_nulls(value: Any) -> Any:
    """Null members removed, at any depth; null elements of lists stay."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value


def create(original: Object, modified: Object) -> Object:
    """The patch that makes modified of original."""
    patch: Object = {}
    for key, value in modified.items():
        before = original.get(key)
        if key in original and isinstance(before, dict) and isinstance(value, dict):
            inner = create(before, value)
            if inner:
                patch[key] = inner
        elif key not in original or before != value or type(before) is not type(value):
            patch[key] = value
    for key in original:
        if key not in modified:
            patch[key] = None
    return patch
