"""Delete and deletecollection: preconditions, graceful deletion, finalizers, propagation.

Source: apiserver endpoints/handlers/delete.go, registry/generic/registry/store.go Delete, registry/rest/delete.go.
"""

from __future__ import annotations

import asyncio

from knarr.aiokits import clock
from knarr.api import decode as decoding
from knarr.api import errors
from knarr.api.errors import FieldError
from knarr.api.types import Object
from knarr.apiserver.cache import CachedObject
from knarr.apiserver.call import Call, check_dry_run
from knarr.apiserver.registry.base import ORPHAN, UNSUPPORTED
from knarr.apiserver.verbs.create import admission_request, read_body
from knarr.apiserver.verbs.read import chosen, list_options

ORPHAN_FINALIZER = "orphan"
FOREGROUND_FINALIZER = "foregroundDeletion"
DELETE_WORKERS = 16
ORPHAN_WARNING = (
    "child pods are preserved by default when jobs are deleted; set propagationPolicy=Background to remove them or set "
    "propagationPolicy=Orphan to suppress this warning"
)


async def read_options(call: Call) -> Object:
    """Return the DeleteOptions of the body, else of the query, checked. Raises StatusError."""
    body = read_body(call)
    if body:
        content_type = call.request.headers.get("content-type", "")
        options, _ = decoding.decode(_options_type(call, body), body, content_type, "Ignore")
    else:
        options = {}
        grace = call.integer("gracePeriodSeconds")
        if grace is not None:
            options["gracePeriodSeconds"] = grace
        orphan = call.boolean("orphanDependents")
        if orphan is not None:
            options["orphanDependents"] = orphan
        if "propagationPolicy" in call.query:
            options["propagationPolicy"] = call.parameter("propagationPolicy")
        if call.query.get("dryRun"):
            options["dryRun"] = call.query["dryRun"]
    found = _check(options)
    if found:
        raise errors.invalid("DeleteOptions.meta.k8s.io", "", found)
    if options.get("dryRun"):
        call.dry_run = True
    return options


def _options_type(call: Call, body: bytes) -> tuple[str, str]:
    """DeleteOptions come as v1 or, from old clients, in the version of the group or of meta.k8s.io."""
    for version in ("meta.k8s.io/v1", call.endpoint.resource.api_version, "policy/v1"):
        if version != "v1" and b'"%b"' % version.encode() in body:
            return version, "DeleteOptions"
    return "v1", "DeleteOptions"


def _check(options: Object) -> list[FieldError]:
    found: list[FieldError] = []
    policy = options.get("propagationPolicy")
    if policy is not None and options.get("orphanDependents") is not None:
        found.append(errors.invalid_value("propagationPolicy", policy, "orphanDependents and deletionPropagation cannot be both set"))
    if policy is not None and policy not in ("Foreground", "Background", "Orphan"):
        found.append(errors.not_supported("propagationPolicy", policy, ["Foreground", "Background", "Orphan", "nil"]))
    if options.get("dryRun"):
        found += check_dry_run(options["dryRun"])
    return found


async def delete(call: Call) -> None:
    """Answer a DELETE of one object."""
    call.form()
    options = await read_options(call)
    warn_about_orphans(call, options)
    gone, obj = await delete_object(call, call.info.name, options)
    code = 202 if not gone and options.get("orphanDependents") is False else 200
    if obj is not None:
        if isinstance(obj, CachedObject):
            await call.endpoint.prepare([obj])
            call.answer_cached(code, obj)
        else:
            call.answer_object(code, obj)
        return
    call.answer_status(success(call, options, code))


def warn_about_orphans(call: Call, options: Object) -> None:
    """Kinds that orphan their dependents unless told otherwise say so."""
    if call.endpoint.strategy.warns_of_orphans and options.get("propagationPolicy") is None and options.get("orphanDependents") is None:
        call.warnings.append(ORPHAN_WARNING)


def success(call: Call, options: Object, code: int, uid: str = "") -> Object:
    """Return the Status of a deletion that leaves nothing to show."""
    resource = call.endpoint.resource
    details: Object = {"name": call.info.name, "group": resource.group, "kind": resource.plural, "uid": uid or call.annotations.pop("uid", "")}
    return {
        "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success",
        "details": {key: value for key, value in details.items() if value},
    }  # fmt: skip


async def delete_object(call: Call, name: str, options: Object) -> tuple[bool, CachedObject | Object | None]:
    """Delete an object, or mark it as being deleted.

    Returns:
      (gone, object to answer with; None: a Status).

    Raises:
      StatusError: NotFound, Conflict, and whatever admission says.
    """
    endpoint = call.endpoint
    store = endpoint.live_store
    key = f"{call.namespace}/{name}" if call.namespace else name
    cached = await store.live(key)
    asked_grace = options.get("gracePeriodSeconds")
    for _ in range(64):
        if cached is None:
            raise errors.not_found(endpoint.resource, name)
        # Each attempt decides anew: the strategy writes the grace period it settles on into the options.
        tried = dict(options)
        if asked_grace is not None:
            tried["gracePeriodSeconds"] = asked_grace
        outcome = await _try_delete(call, cached, tried)
        if outcome is not None:
            options.update(tried)
            return outcome
        cached = await store.refresh(key)
    raise errors.conflict(endpoint.resource, name, "the object has been modified; please apply your changes to the latest version and try again")


async def _try_delete(call: Call, cached: CachedObject, options: Object) -> tuple[bool, CachedObject | Object | None] | None:
    endpoint = call.endpoint
    store = endpoint.live_store
    strategy = endpoint.strategy
    old = store.cache.private(cached)
    _check_preconditions(call, options, cached)
    undo = []
    admission = call.server.admission_for("DELETE", endpoint.resource, "")
    if admission is not None:
        shown = await endpoint.load(cached)
        request = admission_request(call, "DELETE", None, shown)
        request.name = cached.name
        request.options = {"kind": "DeleteOptions", "apiVersion": "meta.k8s.io/v1", **options}
        await admission.run(request)
        call.warnings += request.warnings
        undo = request.undo
    obj = store.cache.private(cached)
    replaced = strategy.before_delete(call, obj)
    if replaced is not None:
        written = cached if replaced is obj and replaced == old else await _store(call, cached, replaced)
        return None if written is None else (False, written)
    metadata = obj["metadata"]
    was = dict(metadata)
    graceful, pending = _graceful(call, obj, options)
    if pending:
        return False, cached
    changed = _set_gc_finalizers(call, metadata, options)
    waits = bool(metadata.get("finalizers"))
    if graceful or waits:
        if not graceful:
            _mark(metadata, was)
        if waits or (metadata.get("deletionGracePeriodSeconds") or 0) > 0:
            written = await _store(call, cached, obj) if graceful or changed or metadata != was else cached
            return None if written is None else (False, written)
        # Marked as deleted first, then deleted: watchers see both, as with upstream.
        marked = await _store(call, cached, obj)
        if marked is None:
            return None
        if isinstance(marked, CachedObject):
            cached = marked
    if call.dry_run:
        call.annotations["uid"] = cached.uid
        return True, obj if strategy.returns_deleted else None
    gone = await store.remove(cached)
    if gone is None:
        for step in reversed(undo):
            step()
        return None
    strategy.after_delete(old)
    call.annotations["uid"] = cached.uid
    return True, gone if strategy.returns_deleted else None


async def _store(call: Call, cached: CachedObject, obj: Object) -> CachedObject | Object | None:
    if call.dry_run:
        return obj
    return await call.endpoint.live_store.put(cached.key, obj, cached.revision)


def _check_preconditions(call: Call, options: Object, cached: CachedObject) -> None:
    wanted = options.get("preconditions") or {}
    resource = call.endpoint.resource
    kind = resource.group_kind
    uid = wanted.get("uid")
    if uid is not None and uid != cached.uid:
        raise errors.conflict(kind, cached.name, (
            f"the UID in the precondition ({uid}) does not match the UID in record ({cached.uid}). The object might have been deleted and then recreated"))
    version = wanted.get("resourceVersion")
    if version is not None and version != str(cached.revision):
        raise errors.conflict(kind, cached.name, (
            f"the ResourceVersion in the precondition ({version}) does not match the ResourceVersion in record ({cached.revision}). "
            "The object might have been modified"))


def _graceful(call: Call, obj: Object, options: Object) -> tuple[bool, bool]:
    """Return (the deletion waits for someone else, it is already waiting as asked); sets the deletion's metadata."""
    metadata = obj["metadata"]
    strategy = call.endpoint.strategy
    grace = options.get("gracePeriodSeconds")
    if grace is not None and grace < 0:
        options["gracePeriodSeconds"] = grace = 1
    if not strategy.graceful:
        return False, False
    if metadata.get("deletionTimestamp"):
        running = metadata.get("deletionGracePeriodSeconds")
        if not running:
            return False, False
        if grace is None:
            return False, True
        if grace >= running:
            return False, True
        # The period can only be shortened: back by the old one, forward by the new one, never into the past.
        at = clock.parse_rfc3339(metadata["deletionTimestamp"]) - running + grace
        now = clock.now()
        if at < now:
            at = now
            if grace:
                grace = 1
        metadata["deletionTimestamp"] = clock.rfc3339(at)
        metadata["deletionGracePeriodSeconds"] = grace
        return True, False
    if not strategy.check_graceful(call, obj, options):
        return False, False
    grace = options["gracePeriodSeconds"]
    metadata["deletionTimestamp"] = clock.rfc3339(clock.now() + grace)
    metadata["deletionGracePeriodSeconds"] = grace
    if metadata.get("generation"):
        metadata["generation"] += 1
    return True, False


def _mark(metadata: Object, was: Object) -> None:
    """Mark as being deleted, for the finalizers to see."""
    if not was.get("deletionTimestamp") and metadata.get("generation"):
        metadata["generation"] += 1
    now = clock.now()
    stamp = metadata.get("deletionTimestamp")
    if not stamp or clock.parse_rfc3339(stamp) > now:
        metadata["deletionTimestamp"] = clock.rfc3339(now)
    metadata["deletionGracePeriodSeconds"] = 0


def _set_gc_finalizers(call: Call, metadata: Object, options: Object) -> bool:
    """Put on or take off the finalizers through which the garbage collector orphans or deletes dependents."""
    strategy = call.endpoint.strategy
    present = metadata.get("finalizers") or []
    policy = options.get("propagationPolicy")
    orphans = options.get("orphanDependents")
    orphan = foreground = False
    if strategy.default_gc != UNSUPPORTED:
        if orphans is not None:
            orphan = bool(orphans)
        elif policy is not None:
            orphan, foreground = policy == "Orphan", policy == "Foreground"
        elif ORPHAN_FINALIZER in present:
            orphan = True
        elif FOREGROUND_FINALIZER in present:
            foreground = True
        else:
            orphan = strategy.default_gc == ORPHAN
    wanted = [f for f in present if f not in (ORPHAN_FINALIZER, FOREGROUND_FINALIZER)]
    if orphan:
        wanted.append(ORPHAN_FINALIZER)
    if foreground:
        wanted.append(FOREGROUND_FINALIZER)
    if set(wanted) == set(present):
        return False
    if wanted:
        metadata["finalizers"] = wanted
    else:
        metadata.pop("finalizers", None)
    return True


async def delete_collection(call: Call) -> None:
    """Answer a DELETE of a collection: every selected object, several at a time; the answer lists them."""
    call.form(many=True)
    listed = list_options(call, watch=False)
    options = await read_options(call)
    warn_about_orphans(call, options)
    result = await chosen(call, listed)
    todo = list(reversed(result.objects))

    async def worker() -> None:
        while todo:
            cached = todo.pop()
            try:
                await delete_object(_for(call, cached), cached.name, dict(options))
            except errors.StatusError as error:
                if not errors.is_not_found(error):
                    raise

    try:
        async with asyncio.TaskGroup() as group:
            for number in range(min(DELETE_WORKERS, len(todo))):
                group.create_task(worker(), name=f"delete-collection-{number}")
    except ExceptionGroup as failed:
        # One refusal is the answer to the whole request; what was deleted before it stays deleted.
        raise failed.exceptions[0] from None
    await call.endpoint.prepare(result.objects)
    form, yaml, pretty = call.form(many=True)
    body = form.list(result.objects, result.revision, result.continue_token, result.remaining)
    call.answer_bytes(200, body, form.content_type, yaml, pretty)


def _for(call: Call, cached: CachedObject) -> Call:
    """A call of its own per object: the workers run at the same time."""
    single = Call(call.server, call.request, call.info._replace(name=cached.name, namespace=cached.namespace), call.endpoint, call.user)
    single.namespace = cached.namespace
    single.dry_run = call.dry_run
    single.warnings = call.warnings
    return single
