"""Update, and the loop under update, patch and apply: read, change, admit, prepare, validate, compare and swap.

The change function gets the present object and returns the new one; it runs again when another writer was faster. An
update that changes nothing is answered from the store and writes nothing, unless what is stored is of an older version or under
an older key: then it is written anew, which is how stored objects are migrated. An update that takes the last finalizer off an
object that is being deleted, deletes it.

Source: apiserver endpoints/handlers/update.go, registry/generic/registry/store.go Update, registry/rest/update.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from knarr.api import errors
from knarr.api.errors import FieldError, StatusError
from knarr.api.types import Object
from knarr.apiserver import machinery
from knarr.apiserver.attributes import Attributes, Decision
from knarr.apiserver.cache import CachedObject
from knarr.apiserver.call import Call
from knarr.apiserver.managed import track_update
from knarr.apiserver.store import UPDATE_TRIES, same
from knarr.apiserver.verbs.create import admission_request, check_namespace, create_object, dedup_owner_references, read_body

MODIFIED = "the object has been modified; please apply your changes to the latest version and try again"

Change = Callable[[Object | None, int], Awaitable[Object]]
"""(present object or None, attempt) -> new object. Both private."""
Prepare = Callable[[Call, Object, Object], None]


@dataclass(slots=True)
class UpdateMode:
    """What one kind of update may do."""

    prepare: Prepare
    subresource: str = ""
    may_create: bool = False
    unconditional: bool = True
    tracks: bool = True
    """Managed fields are tracked by comparing old and new (apply brings its own)."""
    validate: Callable[[Call, Object, Object], list[FieldError]] | None = None
    admit: bool = True
    uid_precondition: bool = True
    """A uid in the body must be that of the stored object, else Conflict (PUT); patches get it checked as a field."""


def mode_of(call: Call, subresource: str = "", *, may_create: bool = False) -> UpdateMode:
    """Return the mode of a plain or status update of the call's endpoint."""
    strategy = call.endpoint.strategy
    if subresource == "status":
        return UpdateMode(
            strategy.prepare_status, "status", unconditional=strategy.unconditional_update, validate=strategy.validate_status
        )
    return UpdateMode(
        strategy.prepare_update, may_create=may_create or strategy.create_on_update, unconditional=strategy.unconditional_update,
        validate=strategy.validate_update,
    )


async def update(call: Call, mode: UpdateMode) -> None:
    """Answer a PUT."""
    call.form()
    body = read_body(call)
    call.write_options("UpdateOptions")
    content_type = call.request.headers.get("content-type", "")
    endpoint = call.endpoint

    def decoded() -> Object:
        obj, warnings = machinery.decode(endpoint, body, content_type, call.field_validation, call.start_over())
        call.warnings += warnings
        return obj

    first = decoded()
    call.log_object = first
    check_names(call, first)

    async def change(old: Object | None, attempt: int) -> Object:
        # The object is changed on its way; a further attempt starts from the body again.
        return first if attempt == 0 else decoded()

    result, created = await change_object(call, mode, change)
    await answer(call, 201 if created else 200, result)


async def answer(call: Call, status: int, result: CachedObject | Object) -> None:
    """Answer with what an update made."""
    if isinstance(result, CachedObject) and call.endpoint.converter is not None:
        await call.endpoint.prepare([result])
    if isinstance(result, CachedObject):
        call.answer_cached(status, result)
    else:
        call.answer_object(status, result)


def check_names(call: Call, obj: Object) -> None:
    """Name and namespace of a body must be those of the URL. Raises 400."""
    metadata = obj.get("metadata")
    if not isinstance(metadata, dict):
        metadata = obj["metadata"] = {}
    check_namespace(call, metadata)
    check_url_name(call, obj)


def check_url_name(call: Call, obj: Object) -> None:
    """The name of an object must be that of the URL. Raises 400."""
    metadata = obj.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    if not name:
        raise errors.bad_request(f"the name of the object ({call.info.name} based on URL) was undeterminable: name must be provided")
    if name != call.info.name:
        raise errors.bad_request(f"the name of the object ({name}) does not match the name on the URL ({call.info.name})")


async def change_object(call: Call, mode: UpdateMode, change: Change, *, tries: int = UPDATE_TRIES) -> tuple[CachedObject | Object, bool]:
    """Run the loop; returns (stored object, or a plain one for a dry run; whether it was created).

    Raises:
      StatusError: NotFound, Conflict, Invalid, and whatever admission says.
    """
    endpoint = call.endpoint
    store = endpoint.live_store
    key = f"{call.namespace}/{call.info.name}" if call.namespace else call.info.name
    cached = await store.live(key)
    for attempt in range(tries):
        if cached is None:
            if not mode.may_create:
                raise errors.not_found(endpoint.resource, call.info.name)
            await _authorize_create(call)
            created = await change(None, attempt)
            try:
                return await create_object(call, created, name=call.info.name, tracked=not mode.tracks), True
            except StatusError as error:
                if not errors.is_already_exists(error):
                    raise
            cached = await store.refresh(key)
            continue
        outcome = await _try_update(call, mode, change, cached, attempt)
        if outcome is not None:
            return outcome, False
        cached = await store.refresh(key)
    raise errors.conflict(endpoint.resource, call.info.name, MODIFIED)


async def _authorize_create(call: Call) -> None:
    """A PUT or apply that creates also needs the right to create."""
    info = call.info
    attributes = Attributes(
        call.user, "create", info.group, info.version, info.resource, info.subresource, info.namespace, info.name, call.request.path,
    )
    decision, reason = await call.server.decide(attributes)
    if decision is not Decision.ALLOW:
        raise call.server.forbidden(attributes, reason)


async def _try_update(call: Call, mode: UpdateMode, change: Change, cached: CachedObject, attempt: int) -> CachedObject | Object | None:
    """One attempt; None when another writer was faster."""
    endpoint = call.endpoint
    store = endpoint.live_store
    old = await endpoint.load(cached)
    shown = old
    new = await change(await endpoint.load(cached), attempt)
    metadata, old_metadata = new["metadata"], old["metadata"]
    _check_preconditions(call, mode, metadata, old_metadata)
    dedup_owner_references(call, metadata)
    if mode.tracks:
        track_update(call, new, old, mode.subresource)
    admission = call.server.admission_for("UPDATE", endpoint.resource, mode.subresource) if mode.admit else None
    request = None
    finish = None
    stored = False
    try:
        if admission is not None:
            request = admission_request(call, "UPDATE", new, shown, mode.subresource)
            waiting = admission.admit(request)
            if waiting is not None:
                await waiting
            if request.object is not None:
                new = request.object
            dedup_owner_references(call, new["metadata"], after_admission=True)
        if not mode.subresource and endpoint.claims_on_update:
            finish = await endpoint.strategy.begin_update(call, new, old)
        _prepare(call, mode, new, old)
        found = machinery.validate_update(endpoint, new, old, mode.subresource)
        if mode.validate is not None:
            found += mode.validate(call, new, old)
        if found:
            raise errors.invalid(store.resource, call.info.name, found)
        call.warnings += machinery.warnings_of(endpoint, new, old, mode.subresource)
        endpoint.strategy.canonicalize(new)
        if admission is not None and request is not None:
            request.object = new
            waiting = admission.validate(request)
            if waiting is not None:
                await waiting
        if _unchanged(new, old) and not store.is_stale(cached):
            return cached
        if _finished(new, old) and endpoint.strategy.may_delete_on_update(new, old):
            if call.dry_run:
                return new
            gone = await store.remove(cached)
            if gone is None:
                return None
            stored = True
            endpoint.strategy.after_delete(old)
            # Clients expect the object they sent back, though it exists no more.
            new["metadata"]["resourceVersion"] = str(gone.revision)
            return new
        if call.dry_run:
            new["metadata"]["resourceVersion"] = str(cached.revision)
            return new
        dumped = new if endpoint.stored_as_is else await endpoint.dump(new)
        written = await store.put(cached.key, dumped, cached.revision, endpoint.form_of_written(new, dumped))
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


def _unchanged(new: Object, old: Object) -> bool:
    """Nothing is to be written; times of managed fields alone are no change, and are taken back."""
    if not same(old, new):
        _ignore_timestamps(new, old)
    return same(old, new) and not _finished(new, old)


def _check_preconditions(call: Call, mode: UpdateMode, metadata: Object, old: Object) -> None:
    resource = call.endpoint.resource
    name = call.info.name
    uid = metadata.get("uid")
    if mode.uid_precondition and uid and uid != old.get("uid"):
        key = f"{call.endpoint.go_key.removeprefix('/registry') if call.dry_run else call.endpoint.go_key}{call.namespace + '/' if call.namespace else ''}{name}"
        raise errors.conflict(resource, name, (
            f"StorageError: invalid object, Code: 4, Key: {key}, ResourceVersion: 0, AdditionalErrorMsg: Precondition failed: "
            f"UID in precondition: {uid}, UID in object meta: {old.get('uid', '')}"))
    version = metadata.get("resourceVersion") or ""
    if not version or version == "0":
        if not mode.unconditional:
            group_kind = f"{resource.plural}.{resource.group}" if resource.group else resource.plural
            raise errors.invalid(group_kind, name, [errors.invalid_value("metadata.resourceVersion", 0, "must be specified for an update")])
        metadata["resourceVersion"] = old["resourceVersion"]
    elif version != old["resourceVersion"]:
        if not version.isdecimal():
            raise StatusError(500, "", (
                f"strconv.ParseUint: parsing {errors.go_quote(version)}: invalid syntax"))
        raise errors.conflict(resource, name, MODIFIED)


def _prepare(call: Call, mode: UpdateMode, new: Object, old: Object) -> None:
    """The part of an update that is the same for every kind, around the kind's own."""
    metadata, before = new["metadata"], old["metadata"]
    check_namespace(call, metadata)
    if "generation" in before:
        metadata["generation"] = before["generation"]
    else:
        metadata.pop("generation", None)
    mode.prepare(call, new, old)
    metadata = new["metadata"]
    machinery.fill_status(call.endpoint.resource, new)
    if not call.dry_run:
        # Storing drops it; who only tries sees it again.
        metadata.pop("selfLink", None)
    if not metadata.get("uid"):
        metadata["uid"] = before.get("uid", "")
    if before.get("creationTimestamp"):
        metadata["creationTimestamp"] = before["creationTimestamp"]
    if before.get("deletionTimestamp"):
        metadata["deletionTimestamp"] = before["deletionTimestamp"]
        if "deletionGracePeriodSeconds" in before and "deletionGracePeriodSeconds" not in metadata:
            metadata["deletionGracePeriodSeconds"] = before["deletionGracePeriodSeconds"]


def _ignore_timestamps(new: Object, old: Object) -> None:
    """An update whose only effect is a newer time in managedFields is no change."""
    mine, theirs = new["metadata"].get("managedFields"), old["metadata"].get("managedFields")
    if not mine or not theirs or len(mine) != len(theirs) or mine == theirs:
        return
    def timeless(entries: list[Object]) -> list[Object]:
        return [{key: value for key, value in entry.items() if key != "time"} for entry in entries]
    if timeless(mine) != timeless(theirs):
        return
    trial = {**new, "metadata": {**new["metadata"], "managedFields": theirs}}
    if same(old, trial):
        new["metadata"]["managedFields"] = theirs


def _finished(new: Object, old: Object) -> bool:
    """Whether this update takes the last finalizer off an object whose deletion waits for nothing else."""
    metadata = new["metadata"]
    # Namespaces have theirs in spec, too.
    held = bool(old["metadata"].get("finalizers")) or bool((old.get("spec") or {}).get("finalizers"))
    return (
        bool(metadata.get("deletionTimestamp")) and not metadata.get("finalizers") and held
        and not metadata.get("deletionGracePeriodSeconds")
    )  # fmt: skip
