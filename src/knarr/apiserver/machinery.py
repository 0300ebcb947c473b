"""The one seam to the pure API functions: decode, default, check, validate, managed fields.

Verbs call these and nothing of knarr.api.decode, defaulting, validation or apply directly, so that custom resources (whose
functions are compiled from their CRD and hang on the endpoint's `schema`) and built-in kinds go one way.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from knarr.api import decode as decoding
from knarr.api import typeinfo
from knarr.api import warnings as texts
from knarr.api.defaulting import default as default_builtin
from knarr.api.errors import FieldError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.api.validation import validate_create as pure_validate_create
from knarr.api.validation import validate_update as pure_validate_update

if TYPE_CHECKING:
    from knarr.apiserver.endpoint import Endpoint


def decode(endpoint: Endpoint, body: bytes, content_type: str, field_validation: str, later: typeinfo.Later) -> tuple[Object, list[str]]:
    """Decode and default a body for an endpoint; (object, warnings). `later` is as in knarr.api.decode. Raises StatusError."""
    schema = endpoint.schema
    obj, warnings = decoding.decode(endpoint.resource, body, content_type, field_validation or "Warn", later)
    if schema is not None:
        warnings += schema.prune(obj, field_validation)
        # JSON that has no null spares the search for them.
        schema.default(obj, nulls=b"null" in body or not body.startswith(b"{"))
    else:
        default_builtin(endpoint.resource, obj)
    return obj, warnings


def complete(endpoint: Endpoint, obj: Object) -> list[str]:
    """Bring an object that a patch or a webhook made into canonical, defaulted form; returns unknown fields."""
    schema = endpoint.schema
    if schema is not None:
        found: list[str] = decoding.check_metadata(obj)
        found += schema.prune(obj, "Warn")
        schema.default(obj)
        return found
    found = decoding.check_object(endpoint.resource.api_version, endpoint.resource.kind, obj)
    default_builtin(endpoint.resource, obj)
    return found


@cache
def _status_zero(resource: Resource) -> Callable[[], Any] | None:
    try:
        info = typeinfo.message(typeinfo.message_name(resource.api_version, resource.kind))
    except KeyError:
        return None
    status = info.fields.get("status")
    if status is None or status.pointer or status.omit_zero:
        return None
    return typeinfo.zero_of(status.type)


def fill_status(resource: Resource, obj: Object) -> None:
    """Give an object without a status the empty one that Go would write."""
    if "status" not in obj:
        make = None if resource.custom else _status_zero(resource)
        if make is not None:
            obj["status"] = make()


def validate_create(endpoint: Endpoint, obj: Object) -> list[FieldError]:
    if endpoint.schema is not None:
        return list(endpoint.schema.validate(obj, None))
    return list(pure_validate_create(endpoint.resource, obj))


def validate_update(endpoint: Endpoint, obj: Object, old: Object, subresource: str = "") -> list[FieldError]:
    if endpoint.schema is not None:
        return list(endpoint.schema.validate(obj, old, subresource))
    return list(pure_validate_update(endpoint.resource, obj, old, subresource))


def warnings_of(endpoint: Endpoint, obj: Object, old: Object | None, subresource: str = "") -> list[str]:
    """Return the texts of Warning headers for a valid create (old None) or update."""
    if endpoint.schema is not None:
        return [] if subresource else texts.of_custom(obj, old)
    if subresource == "status":
        return texts.of_status(obj)
    return texts.of_change(obj, old) if not subresource else []
