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
from knarr.apiserver.verbs.create import read_body
from knarr.apiserver.verbs.update import UpdateMode, answer, change_object

PATCH_TRIES = 12


async def patch(call: Call, mode: UpdateMode) -> None:
    """Answer a PATCH."""
    endpoint = call.endpoint
    content_type = call.request.headers.get("content-type", "")
    kind = patch_type(content_type, custom=endpoint.resource.custom)
    call.form()
    body = await read_body(call)
    call.write_options("PatchOptions")
    force = call.boolean("force")
    if kind == APPLY_PATCH:
        from knarr.apiserver.verbs.apply import apply

        await apply(call, mode, body, force=bool(force))
        return
    if force is not None:
        raise errors.invalid("PatchOptions.meta.k8s.io", "", [errors.field_forbidden("force", "may not be specified for non-apply patch")])

    async def change(old: Object | None, attempt: int) -> Object:
        assert old is not None
        new, warnings = apply_patch(endpoint.resource, old, body, content_type, call.field_validation or "Warn")
        call.warnings += warnings
        _complete(call, new)
        call.log_object = new
        metadata = new.get("metadata")
        if isinstance(metadata, dict) and metadata.get("name") != call.info.name:
            raise errors.bad_request(
                f"the name of the object ({metadata.get('name') or ''}) does not match the name on the URL ({call.info.name})")
        return new

    result, created = await change_object(call, mode, change, tries=PATCH_TRIES)
    answer(call, 201 if created else 200, result)


def _complete(call: Call, new: Object) -> None:
    schema = call.endpoint.schema
    if schema is None:
        default_builtin(call.endpoint.resource, new)
    else:
        call.warnings += machinery.complete(call.endpoint, new)


def apply_plain(call: Call, current: Object, body: bytes, content_type: str, kind: tuple[str, str]) -> Object:
    """Patch an object that is not the endpoint's own kind (a Scale)."""
    if patch_type(content_type) == APPLY_PATCH:
        from knarr.apiserver.verbs.create import decode_apply

        given = decode_apply(body)
        return {**current, "spec": given.get("spec") or {}}
    new, warnings = apply_patch(kind, current, body, content_type, call.field_validation or "Warn")
    call.warnings += warnings
    return new
