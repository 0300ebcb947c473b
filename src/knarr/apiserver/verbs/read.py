"""Get, list and watch, answered from the watch cache.

These are plain functions on the hot path: a GET costs one dictionary look-up and one concatenation. What needs the store's
history (an exact old revision, a continue token of the past) goes to a task.
"""

from __future__ import annotations

import random

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.selectors import EVERYTHING, FieldSelector, FieldTerm, SelectorError, parse_field_selector, parse_label_selector
from knarr.apiserver import listing, websocketwatch
from knarr.apiserver.cache import ADDED, CachedObject, ResourceCache
from knarr.apiserver.call import Call
from knarr.apiserver.forms import JSON
from knarr.apiserver.listing import ListOptions
from knarr.apiserver.watching import Prepare, Selection, Watcher, all_states, group_for
from knarr.http import websocket
from knarr.http.server import ResponseStream

NO_FIELDS = FieldSelector()


def get(call: Call) -> None:
    """Answer with one object."""
    endpoint = call.endpoint
    store = endpoint.live_store
    cached = store.find(call.namespace, call.info.name)
    if call.request.query_string:
        try:
            version = listing.parse_revision(call.parameter("resourceVersion"))
        except StatusError as error:
            raise _known_form(call, error) from None
        if version is not None and version > store.storage.revision:
            raise listing.too_large_version(version, store.storage.revision)
    if cached is None:
        raise errors.not_found(endpoint.resource, call.info.name)
    if endpoint.converter is not None and endpoint.unprepared([cached]):
        call.server.spawn_call(call, _get_converted(call, cached))
        return
    form, yaml, pretty = call.form()
    call.answer_bytes(200, form.single(cached), form.content_type, yaml, pretty)


async def _get_converted(call: Call, cached: CachedObject) -> None:
    await call.endpoint.prepare([cached])
    call.answer_cached(200, cached)


def selection_of(call: Call) -> Selection:
    """Compile the label and field selectors of a list, watch or deletecollection. Raises StatusError."""
    cache = call.endpoint.live_store.cache
    labels, fields = EVERYTHING, NO_FIELDS
    if call.query:
        text = call.parameter("labelSelector")
        if text:
            try:
                labels = parse_label_selector(text)
            except SelectorError as error:
                raise errors.bad_request(str(error)) from error
        text = call.parameter("fieldSelector")
        if text:
            try:
                fields = parse_field_selector(text)
            except SelectorError as error:
                raise errors.bad_request(str(error)) from error
            fields = _known_fields(call, cache, fields)
    if call.info.name:
        fields = _with_name(call.info.name, fields)
    return Selection(cache, call.namespace, labels, fields, call.endpoint.resource.api_version if call.endpoint.converter is not None else "")


def _known_fields(call: Call, cache: ResourceCache, fields: FieldSelector) -> FieldSelector:
    strategy = call.endpoint.strategy
    versioned = strategy.versioned_fields.get(call.endpoint.resource.group)
    terms: list[FieldTerm] = []
    for term in fields.terms:
        name = strategy.field_aliases.get(term.field, term.field) if versioned is None else versioned.get(term.field, "")
        custom = call.endpoint.resource.custom
        known = strategy.field_names if custom else cache.field_index
        if name not in known and name not in ("metadata.name", "metadata.namespace"):
            if custom:
                raise errors.bad_request(f"field label not supported: {term.field}")
            raise errors.bad_request(_unsupported_field(call, term.field))
        terms.append(FieldTerm(name, term.value, term.negated) if name != term.field else term)
    return FieldSelector(terms)


def _unsupported_field(call: Call, field: str) -> str:
    if call.endpoint.strategy.field_names:
        return f"field label not supported: {field}"
    return f'"{field}" is not a known field selector: only "metadata.name", "metadata.namespace"'


def _with_name(name: str, fields: FieldSelector) -> FieldSelector:
    if fields.terms:
        if fields.required_value("metadata.name") != name:
            raise errors.bad_request("fieldSelector metadata.name doesn't match requested name")
        return fields
    return FieldSelector([FieldTerm("metadata.name", name)])


def list_options(call: Call, *, watch: bool) -> ListOptions:
    """Read and check the options of a list or watch. Raises StatusError."""
    if not call.query:
        return ListOptions(selection_of(call))
    limit = call.integer("limit") or 0
    call.integer("timeoutSeconds")
    selection = selection_of(call)
    version = call.parameter("resourceVersion")
    match = call.parameter("resourceVersionMatch")
    token = call.parameter("continue")
    initial = call.boolean("sendInitialEvents")
    if watch and initial is None and not match and version in ("", "0"):
        initial, match = True, "NotOlderThan"
    found = listing.validate_options(watch=watch, version=version, match=match, continue_token=token, send_initial_events=initial)
    if found:
        raise errors.invalid("ListOptions.meta.k8s.io", "", found)
    if token and not watch:
        listing.decode_continue(token)
        if version not in ("", "0"):
            raise errors.bad_request("specifying resource version is not allowed when using continue")
    revision = listing.parse_revision(version, for_list=not watch)
    if revision == 0 and not watch:
        # "Any version will do" is answered from the cache, which upstream's never pages.
        limit = 0
    if token and revision:
        raise errors.bad_request("specifying resource version is not allowed when using continue")
    return ListOptions(selection, max(0, limit), token, revision, match == "Exact", match)


def _known_form(call: Call, error: StatusError) -> StatusError:
    """Return what is told of a request that is wrong in itself: first of all that nobody could read the answer."""
    try:
        call.form()
    except StatusError as refused:
        if not refused.message.startswith("you requested"):
            return refused
    return error


def list_(call: Call) -> None:
    """Answer with a list."""
    try:
        options = list_options(call, watch=False)
    except StatusError as error:
        raise _known_form(call, error) from None
    store = call.endpoint.live_store
    if call.endpoint.converter is not None:
        call.server.spawn_call(call, _list_converted(call, options))
        return
    result = listing.list_nowait(store.storage, store.cache, options)
    if result is None:
        revision = options.revision
        if revision is not None and revision > store.storage.revision:
            raise listing.too_large_version(revision, store.storage.revision)
        call.server.spawn_call(call, _list_past(call, options))
    else:
        _answer_list(call, result)


def _answer_list(call: Call, result: listing.ListResult) -> None:
    form, yaml, pretty = call.form(many=True)
    body = form.list(result.objects, result.revision, result.continue_token, result.remaining)
    call.answer_bytes(200, body, form.content_type, yaml, pretty)


async def _list_past(call: Call, options: ListOptions) -> None:
    store = call.endpoint.live_store
    _answer_list(call, await listing.list_at(store.storage, store.cache, options))


async def chosen(call: Call, options: ListOptions) -> listing.ListResult:
    """List what may have to be converted first: selectors look at the version asked for. Raises StatusError."""
    store, endpoint = call.endpoint.live_store, call.endpoint
    if endpoint.converter is not None and not options.selection.always:
        while waiting := endpoint.unprepared(store.cache.in_order(call.namespace)):
            await endpoint.prepare(waiting)
    result = listing.list_nowait(store.storage, store.cache, options)
    if result is None:
        revision = options.revision
        if revision is not None and revision > store.storage.revision:
            raise listing.too_large_version(revision, store.storage.revision)
        result = await listing.list_at(store.storage, store.cache, options, endpoint.prepare)
    return result


async def _list_converted(call: Call, options: ListOptions) -> None:
    result = await chosen(call, options)
    await call.endpoint.prepare(result.objects)
    _answer_list(call, result)


async def _watch_converted(call: Call) -> None:
    """Start a watch once all that it begins with has been converted; what came meanwhile is looked at again."""
    while True:
        cache = call.endpoint.live_store.cache
        shown = [*cache.in_order(), *all_states(cache.ring)]
        if not call.endpoint.unprepared(shown):
            break
        await call.endpoint.prepare(shown)
    _start_watch(call)


def watch(call: Call) -> None:
    """Start a watch: its past first, then whatever comes."""
    if call.endpoint.converter is not None:
        call.server.spawn_call(call, _watch_converted(call))
    else:
        _start_watch(call)


def _start_watch(call: Call) -> None:
    options = list_options(call, watch=True)
    form, _, _ = call.form(watch=True)
    store = call.endpoint.live_store
    cache, storage = store.cache, store.storage
    selection = options.selection
    initial = call.boolean("sendInitialEvents")
    bookmarks = bool(call.boolean("allowWatchBookmarks"))
    timeout = call.integer("timeoutSeconds") or 0
    least = call.server.config.min_request_timeout_seconds
    seconds = float(max(0, timeout)) if timeout else least * (1 + random.random())
    prepare = None
    if call.endpoint.converter is not None:
        prepare = Prepare(call.endpoint.prepare, call.server.tasks.spawn, call.endpoint.json.id)
    group = group_for(cache, call.endpoint.resource.namespaced, selection, form, prepare)
    revision = options.revision
    frames: list[bytes] = []
    error: StatusError | None = None
    if initial is None:
        # Without a revision, or with "0", a watch begins with what there is.
        initial = not revision
    if initial:
        if revision is not None and revision > storage.revision:
            error = listing.too_large_version(revision, storage.revision)
        else:
            frames = [form.frame(ADDED, cached) for cached in _present(cache, selection)]
            if bookmarks and call.boolean("sendInitialEvents"):
                frames.append(form.bookmark(storage.revision, initial_end=True))
    elif revision is None or revision == 0:
        pass  # sendInitialEvents=false: from now on
    elif revision > storage.revision:
        pass  # nothing has happened since: whatever comes will be later still
    else:
        events = cache.events_after(revision)
        if events is None:
            error = errors.expired(f"too old resource version: {revision} ({cache.ring_start})")
        elif events:
            frames = group.frames(_in_scope(events, selection.namespace))
    if error is not None:
        raise error
    stream: ResponseStream | websocketwatch.WebSocketStream | None
    if websocket.is_upgrade(call.request):
        stream = websocketwatch.start(call.request, binary=form.watch_content_type != JSON, spawn=call.server.tasks.spawn)
        if stream is None:
            return
    else:
        stream = call.request.start_stream_nowait(200, [
            ("Audit-Id", call.audit_id), ("Cache-Control", "no-cache, private"), ("Content-Type", form.watch_content_type),
        ])
    data = form.first_frames(b"".join(frames)) if frames else b""
    stream.write(data)
    group.sent.add(map(len, frames))
    watcher = Watcher(
        group, stream, bookmarks=bookmarks, timeout_seconds=seconds, allowance_bytes=len(data),
        current_revision=lambda: storage.revision, on_end=call.server.watch_ended(call),
    )
    call.server.watch_started(call, watcher)


def _present(cache: ResourceCache, selection: Selection) -> list[CachedObject]:
    objects = cache.in_order(selection.namespace)
    return objects if selection.always else [cached for cached in objects if selection.matches(cached)]


def _in_scope(events: list, namespace: str) -> list:  # type: ignore[type-arg]
    return [event for event in events if event.current.namespace == namespace] if namespace else events
