"""Create.

Order, as upstream's: decode and default, clean metadata, name, mutating admission, strategy, validation, validating
admission, claim (addresses, ports), store, answer.

Source: apiserver endpoints/handlers/create.go, registry/generic/registry/store.go Create, registry/rest/create.go.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.meta import deep_copy
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver import machinery
from knarr.apiserver.attributes import AdmissionRequest
from knarr.apiserver.cache import CachedObject
from knarr.apiserver.call import Call
from knarr.apiserver.managed import track_update
from knarr.apiserver.store import new_uid, object_key
from knarr.http.errors import BodyTooLarge

NAME_LETTERS = "bcdfghjklmnpqrstvwxz2456789"
NAME_TRIES = 8
MAX_GENERATED_BASE = 58
OPTIONS = {"CREATE": "CreateOptions", "UPDATE": "UpdateOptions", "DELETE": "DeleteOptions"}


def generated_name(base: str) -> str:
    """Return base with five random letters that form no words, the whole at most 63 long."""
    return base[:MAX_GENERATED_BASE] + "".join(random.choices(NAME_LETTERS, k=5))


def read_body(call: Call) -> bytes:
    """Return the request's body. Raises StatusError 413."""
    try:
        body = call.request.whole_body()
    except BodyTooLarge as error:
        raise errors.too_large(f"limit is {error.limit_bytes}") from error
    info = call.info
    call.server.storage.activity.body(info.group, info.resource, "delete_collection" if info.verb == "deletecollection" else info.verb, len(body))
    return body


async def create(call: Call) -> None:
    """Answer a POST to a collection."""
    call.form()  # 406 before anything is done
    body = read_body(call)
    call.write_options("CreateOptions")
    content_type = call.request.headers.get("content-type", "")
    obj, warnings = machinery.decode(call.endpoint, body, content_type, call.field_validation, call.start_over())
    call.warnings += warnings
    call.log_object = obj
    result = await create_object(call, obj)
    if isinstance(result, CachedObject):
        if call.endpoint.converter is not None:
            await call.endpoint.prepare([result])
        call.answer_cached(201, result)
    else:
        call.answer_object(201, result)


def check_namespace(call: Call, metadata: Object) -> None:
    """Put the request's namespace into metadata. Raises 400 if another is there."""
    given = metadata.get("namespace")
    if call.endpoint.resource.namespaced:
        if not given:
            metadata["namespace"] = call.namespace
        elif given != call.namespace:
            raise errors.bad_request("the namespace of the provided object does not match the namespace sent on the request")
    elif "namespace" in metadata:
        # Cluster-scoped: whatever is there is dropped.
        del metadata["namespace"]


def dedup_owner_references(call: Call, metadata: Object, *, after_admission: bool = False) -> None:
    """Drop owner references that repeat another's uid, with a warning."""
    references = metadata.get("ownerReferences")
    if not references or len(references) < 2:
        return
    kept: list[Object] = []
    twice: list[str] = []
    for reference in references:
        if reference in kept:
            twice.append(reference.get("uid") or "")
        else:
            kept.append(reference)
    if not twice:
        return
    metadata["ownerReferences"] = kept
    when = " after mutating admission happens" if after_admission else ""
    call.warnings.append(
        f".metadata.ownerReferences contains duplicate entries{when}; API server dedups owner references in 1.20+, and may reject such "
        f"requests as early as 1.24; please fix your requests; duplicate UID(s) observed: {', '.join(twice)}"
    )


async def create_object(call: Call, obj: Object, *, name: str = "", tracked: bool = False) -> CachedObject | Object:
    """Carry a decoded object through admission, strategy and validation into the store.

    Args:
      obj: Private; changed and given away.
      name: The name from the URL (create by PUT or apply); "" takes the object's.
      tracked: Managed fields are there already (apply).

    Returns:
      What was stored; a plain object for a dry run.
    """
    endpoint = call.endpoint
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict):
        metadata = obj["metadata"] = {}
    for field in ("uid", "creationTimestamp", "deletionTimestamp", "deletionGracePeriodSeconds", "selfLink"):
        metadata.pop(field, None)
    if name or not metadata.get("resourceVersion"):
        metadata.pop("resourceVersion", None)
    check_namespace(call, metadata)
    metadata["uid"] = new_uid()
    metadata["creationTimestamp"] = clock.now_rfc3339()
    dedup_owner_references(call, metadata)
    generated = not metadata.get("name") and bool(metadata.get("generateName"))
    if generated:
        makes_names = endpoint.strategy.makes_names
        metadata["name"] = generated_name(metadata["generateName"]) if makes_names else metadata["generateName"]
    if not tracked:
        track_update(call, obj, None)
    pristine = deep_copy(obj) if generated else None
    for attempt in range(NAME_TRIES):
        result = await _try_create(call, obj)
        if result is not None:
            return result
        if pristine is None or not endpoint.strategy.makes_names or attempt == NAME_TRIES - 1:
            break
        # The generated name was taken: the same object again under another one.
        obj = deep_copy(pristine)
        obj["metadata"]["name"] = generated_name(obj["metadata"]["generateName"])
    if generated:
        raise errors.generate_name_conflict(endpoint.resource, obj["metadata"]["name"])
    raise errors.already_exists(endpoint.resource, obj["metadata"].get("name", ""))


async def _try_create(call: Call, obj: Object) -> CachedObject | Object | None:
    """One attempt; None when the name is taken."""
    endpoint = call.endpoint
    strategy = endpoint.strategy
    store = endpoint.live_store
    admission = call.server.admission_for("CREATE", endpoint.resource, "")
    request: AdmissionRequest | None = None
    finish: Callable[[bool], None] | None = None
    stored = False
    try:
        if admission is not None:
            request = admission_request(call, "CREATE", obj, None)
            waiting = admission.admit(request)
            if waiting is not None:
                await waiting
            if request.object is not obj and request.object is not None:
                obj = request.object
            dedup_owner_references(call, obj["metadata"], after_admission=True)
            check_namespace(call, obj["metadata"])
        # Claims come before validation, which wants to see what was claimed.
        if endpoint.claims_on_create:
            finish = await strategy.begin_create(call, obj)
        strategy.prepare_create(call, obj)
        machinery.fill_status(endpoint.resource, obj)
        found = machinery.validate_create(endpoint, obj) + strategy.validate_create(call, obj)
        if found:
            raise errors.invalid(_group_kind(store.resource, obj), obj["metadata"].get("name") or "", found)
        call.warnings += machinery.warnings_of(endpoint, obj, None)
        strategy.canonicalize(obj)
        metadata = obj["metadata"]
        key = object_key(metadata.get("namespace") or "", metadata["name"])
        if admission is not None and request is not None:
            request.object = obj
            request.name = metadata["name"]
            waiting = admission.validate(request)
            if waiting is not None:
                await waiting
        if call.dry_run:
            return None if await store.live(key) is not None else obj
        given_version = metadata.pop("resourceVersion", "")
        if given_version.isdecimal() and 0 < int(given_version) < 1 << 64:
            # Upstream's storage refuses it: after admission has had its say, and unnoticed by a dry run.
            raise StatusError(500, "", "resourceVersion should not be set on objects to be created")
        if key in store.cache.objects and await store.live(key) is not None:
            return None
        dumped = obj if endpoint.stored_as_is else await endpoint.dump(obj)
        written = await store.put(key, dumped, 0, endpoint.form_of_written(obj, dumped))
        stored = written is not None
        return written
    finally:
        if finish is not None:
            finish(stored)
        if request is not None:
            call.warnings += request.warnings
            call.annotations.update(request.audit_annotations)
            if not stored:
                for undo in reversed(request.undo):
                    undo()


def _group_kind(resource: Resource, obj: Object) -> Resource | str:
    """What an object is called in errors: a custom one may claim another kind than its resource's."""
    kind = obj.get("kind")
    return f"{kind}.{resource.group}" if resource.custom and kind and kind != resource.kind else resource


def admission_request(call: Call, operation: str, obj: Object | None, old: Object | None, subresource: str = "") -> AdmissionRequest:
    """Describe an operation to admission."""
    resource = call.endpoint.resource
    metadata = (obj or old or {}).get("metadata") or {}
    options: Object = {"kind": OPTIONS[operation], "apiVersion": "meta.k8s.io/v1"}
    if call.dry_run:
        options["dryRun"] = ["All"]
    if call.field_manager:
        options["fieldManager"] = call.field_manager
    if call.parameter("fieldValidation"):
        options["fieldValidation"] = call.field_validation
    return AdmissionRequest(
        operation=operation, resource=resource, subresource=subresource, kind=(resource.group, resource.version, resource.kind),
        namespace=call.namespace or (call.info.name or metadata.get("name", "") if resource.plural == "namespaces" and not resource.group else ""),
        name=call.info.name or metadata.get("name") or "", object=obj, old_object=old, user=call.user, dry_run=call.dry_run, options=options,
    )

