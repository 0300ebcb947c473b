"""Server-side apply: the patch is merged by ownership, everything else is update's loop.

Source: apiserver endpoints/handlers/patch.go applyPatcher; KEP-555.
"""

from __future__ import annotations

from knarr.api import errors
from knarr.api.apply import apply_body
from knarr.api.types import Object
from knarr.apiserver import machinery
from knarr.apiserver.call import Call
from knarr.apiserver.managed import field_manager
from knarr.apiserver.verbs.update import UpdateMode, answer, change_object, check_url_name


async def apply(call: Call, mode: UpdateMode, body: bytes, *, force: bool) -> None:
    """Answer a PATCH of type apply."""
    if not call.field_manager:
        raise errors.invalid("PatchOptions.meta.k8s.io", "", [errors.required("fieldManager", "is required for apply patch")])
    mode.tracks = False
    mode.may_create = not mode.subresource
    manager = field_manager(call.endpoint, mode.subresource)

    async def change(old: Object | None, attempt: int) -> Object:
        new, warnings = apply_body(manager, old, body, call.field_manager, force=force, field_validation=call.field_validation or "Warn")
        call.warnings += warnings
        if call.endpoint.schema is not None:
            machinery.complete(call.endpoint, new)
        call.log_object = new
        check_url_name(call, new)
        if old is None and new["metadata"].get("uid"):
            raise errors.conflict(call.endpoint.resource, call.info.name, (
                f"uid mismatch: the provided object specified uid {new['metadata']['uid']}, and no existing object was found"))
        return new

    result, created = await change_object(call, mode, change)
    await answer(call, 201 if created else 200, result)
