"""Patch: how each patch type makes the new object; the rest is update's loop.

Source: apiserver endpoints/handlers/patch.go.
"""

from __future__ import annotations

from knarr.api import errors
from knarr.api.defaulting import default as default_builtin
from knarr.api.patch import APPLY_PATCH, apply_patch, patch_type
from knarr.api.types import Object
from knarr.apiserver import machinery
from knarr.apiserver.call import Call
from knarr.apiserver.verbs.apply import apply
from knarr.apiserver.verbs.create import read_body
from knarr.apiserver.verbs.update import UpdateMode, answer, change_object, check_url_name

PATCH_TRIES = 12


async def patch(call: Call, mode: UpdateMode) -> None:
    """Answer a PATCH."""
    endpoint = call.endpoint
    content_type = call.request.headers.get("content-type", "")
    kind = patch_type(content_type, custom=endpoint.resource.custom)
    call.form()
    body = read_body(call)
    call.write_options("PatchOptions")
    force = call.boolean("force")
    mode.uid_precondition = False
    if kind == APPLY_PATCH:
        await apply(call, mode, body, force=bool(force))
        return
    if force is not None:
        raise errors.invalid("PatchOptions.meta.k8s.io", "", [errors.field_forbidden("force", "may not be specified for non-apply patch")])

    async def change(old: Object | None, attempt: int) -> Object:
        if old is None:
            # Where an update may create, an apply may, too, but not a patch, which changes something.
            raise errors.not_found(endpoint.resource, call.info.name)
        new, warnings = apply_patch(endpoint.resource, old, body, content_type, call.field_validation or "Warn", call.start_over())
        call.warnings += warnings
        _complete(call, new)
        call.log_object = new
        check_url_name(call, new)
        return new

    result, created = await change_object(call, mode, change, tries=PATCH_TRIES)
    await answer(call, 201 if created else 200, result)


def _complete(call: Call, new: Object) -> None:
    schema = call.endpoint.schema
    if schema is None:
        default_builtin(call.endpoint.resource, new)
    else:
        call.warnings += machinery.complete(call.endpoint, new)
