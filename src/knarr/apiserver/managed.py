"""Managed fields on the write paths: who set what, tracked by knarr.api.apply.

Source: apimachinery util/managedfields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.api.types import Object

if TYPE_CHECKING:
    from knarr.apiserver.call import Call


def track_update(call: Call, obj: Object, old: Object | None, subresource: str = "") -> None:
    """Keep what is tracked already; until the tracker is in place nothing is added."""
    if old is not None and "managedFields" not in obj["metadata"] and "managedFields" in old["metadata"]:
        obj["metadata"]["managedFields"] = old["metadata"]["managedFields"]
