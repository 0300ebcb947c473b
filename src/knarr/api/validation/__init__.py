"""Validation of objects, as pure functions: one module per API group, a table of kinds in `registry`.

Called by the API server after defaulting and mutating admission. Objects are complete (decoded,
type-checked and defaulted); nothing here mutates them. Errors come in upstream's order with
upstream's paths, types and words.
"""

from knarr.api.errors import FieldError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.api.validation import kinds  # noqa: F401
from knarr.api.validation.registry import create_errors, update_errors

__all__ = ["validate_create", "validate_update"]


def validate_create(resource: Resource, obj: Object) -> list[FieldError]:
    """Check a new object; an empty list means valid."""
    return create_errors(resource, obj)


def validate_update(resource: Resource, new: Object, old: Object, subresource: str = "") -> list[FieldError]:
    """Check an object that is to replace another.

    Args:
      subresource: "" for the object itself, else e.g. "status", "ephemeralcontainers", "resize".
    """
    return update_errors(resource, new, old, subresource)
