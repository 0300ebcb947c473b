"""Managed fields on the write paths: which FieldManager an endpoint's writes go to.

Source: apimachinery util/managedfields.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from knarr.api.apply import FieldManager, manager_for
from knarr.api.typeinfo import settle
from knarr.api.types import Object

if TYPE_CHECKING:
    from knarr.apiserver.call import Call
    from knarr.apiserver.endpoint import Endpoint


def field_manager(endpoint: Endpoint, subresource: str = "") -> FieldManager:
    """Return the shared FieldManager of an endpoint (custom resources bring theirs along with their schema)."""
    if endpoint.schema is not None:
        made: FieldManager = endpoint.schema.field_manager(subresource)
        return made
    return manager_for(endpoint.resource, subresource)


def track_update(call: Call, obj: Object, old: Object | None, subresource: str = "") -> None:
    """Record a create, update or patch in the object's managedFields."""
    field_manager(call.endpoint, subresource).update(old, obj, call.manager)
    if call.later:
        settle(call.later)
