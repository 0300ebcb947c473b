"""Lists: which objects, at which revision, page by page.

Source: apiserver storage (GetList), storage/continue.go, apis/meta/internalversion/validation.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import orjson

from knarr.api import errors
from knarr.api.errors import FieldError, StatusError
from knarr.apiserver.cache import CachedObject, ResourceCache
from knarr.apiserver.storage import Storage
from knarr.apiserver.watching import Selection
from knarr.storage.errors import CompactedError, FutureRevisionError

GONE_CONTINUE = (
    "The provided continue parameter is too old to display a consistent list result. You can start a new list without the continue "
    "parameter, or use the continue token in this response to retrieve the remainder of the results. Continuing with the provided "
    "token results in an inconsistent list - objects that were created, modified, or deleted between the time the first chunk was "
    "returned and now may show up in the list."
)
GONE_CONTINUE_PLAIN = (
    "The provided continue parameter is too old to display a consistent list result. You must start a new list without the continue parameter."
)

Prepare = Callable[[Sequence[CachedObject]], Awaitable[None]]


@dataclass(slots=True)
class ListOptions:
    """The options of a list or watch, checked."""

    selection: Selection
    limit: int = 0
    continue_token: str = ""
    revision: int | None = None
    """None: not given (the newest)."""
    exact: bool = False
    match: str = ""


@dataclass(slots=True)
class ListResult:
    """A page."""

    objects: list[CachedObject]
    revision: int
    continue_token: str = ""
    remaining: int | None = None


def encode_continue(key: str, revision: int) -> str:
    """Make the token that goes on behind a key."""
    data = orjson.dumps({"v": "meta.k8s.io/v1", "rv": revision, "start": key + "\0"})
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def decode_continue(token: str) -> tuple[str, int]:
    """Return (key to go on behind, revision; below 0 means "at the newest").

    Raises:
      StatusError: 400, not a token of ours.
    """
    wrong = re.search(r"[^A-Za-z0-9_-]", token)
    at = wrong.start() if wrong is not None else len(token) - 1 if len(token) % 4 == 1 else -1
    if at >= 0:
        raise errors.bad_request(f"invalid continue token: continue key is not valid: illegal base64 data at input byte {at}")
    try:
        data = orjson.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
        version, revision, start = data["v"], data["rv"], data["start"]
        if not isinstance(revision, int) or not isinstance(start, str):
            raise TypeError("wrong types")
    except (ValueError, KeyError, TypeError) as error:
        raise errors.bad_request(f"invalid continue token: continue key is not valid: {error}") from error
    if version != "meta.k8s.io/v1":
        raise errors.bad_request(f"invalid continue token: continue key is not valid: server does not recognize this encoded version {version}")
    if revision == 0:
        raise errors.bad_request(
            "invalid continue token: continue key is not valid: incorrect encoded start resourceVersion (version meta.k8s.io/v1)")
    if not start or ".." in start.split("/"):
        raise errors.bad_request("invalid continue token: continue key is not valid: encoded start key empty (version meta.k8s.io/v1)")
    return start.removesuffix("\0"), revision


def validate_options(
    *, watch: bool, version: str, match: str, continue_token: str, send_initial_events: bool | None,
) -> list[FieldError]:  # fmt: skip
    """Return what is wrong with the combination of list options."""
    found: list[FieldError] = []

    def forbid(field: str, text: str) -> None:
        found.append(errors.field_forbidden(field, text))

    if watch:
        if send_initial_events is not None and match != "NotOlderThan":
            forbid("resourceVersionMatch", "sendInitialEvents requires setting resourceVersionMatch to NotOlderThan")
        if match:
            if send_initial_events is None:
                forbid("resourceVersionMatch", "resourceVersionMatch is forbidden for watch unless sendInitialEvents is provided")
            if match != "NotOlderThan":
                found.append(errors.not_supported("resourceVersionMatch", match, ["NotOlderThan"]))
            if continue_token:
                forbid("resourceVersionMatch", "resourceVersionMatch is forbidden when continue is provided")
        return found
    if match:
        if not version:
            forbid("resourceVersionMatch", "resourceVersionMatch is forbidden unless resourceVersion is provided")
        if continue_token:
            forbid("resourceVersionMatch", "resourceVersionMatch is forbidden when continue is provided")
        if match not in ("Exact", "NotOlderThan"):
            found.append(errors.not_supported("resourceVersionMatch", match, ["Exact", "NotOlderThan", ""]))
        if match == "Exact" and version == "0":
            forbid("resourceVersionMatch", 'resourceVersionMatch "exact" is forbidden for resourceVersion "0"')
    if send_initial_events is not None:
        forbid("sendInitialEvents", "sendInitialEvents is forbidden for list")
    return found


def parse_revision(text: str, *, for_list: bool = False) -> int | None:
    """Return the revision of a resourceVersion parameter, None for "".

    Raises:
      StatusError: 400 for lists, else 500, as upstream.
    """
    if not text:
        return None
    if not text.isdecimal() or int(text) >= 1 << 64:
        why = "value out of range" if text.isdecimal() else "invalid syntax"
        detail = f"resourceVersion: Invalid value: {errors.go_quote(text)}: strconv.ParseUint: parsing {errors.go_quote(text)}: {why}"
        if not for_list:
            # Only lists check it before the storage layer does, whose error has no reason.
            raise StatusError(500, "", detail)
        raise StatusError(400, "BadRequest", f"invalid resource version: {detail}")
    return int(text)


def too_large_version(revision: int, current: int) -> StatusError:
    """504 for a revision that is still to come."""
    error = StatusError(
        504, "Timeout", f"Timeout: Too large resource version: {revision}, current: {current}",
        {"causes": [{"reason": "ResourceVersionTooLarge", "message": "Too large resource version"}], "retryAfterSeconds": 1},
    )  # fmt: skip
    error.headers.append(("Retry-After", "1"))
    return error


def list_nowait(storage: Storage, cache: ResourceCache, options: ListOptions) -> ListResult | None:
    """List from memory; None when that needs an older revision than the cache shows, or a later one."""
    revision = storage.revision
    # A revision that is compacted has expired for every resource alike, also for those that have not changed since.
    compacted = storage.store.compacted
    after = ""
    at = options.revision
    if options.continue_token:
        after, at = decode_continue(options.continue_token)
        if options.selection.namespace:
            after = f"{options.selection.namespace}/{after}"
        if at > 0 and (cache.revision > at or at < compacted):
            return None
        if at > revision:
            return None
        shown = at if at > 0 else revision
    else:
        if at is not None and at > revision:
            return None
        if at and (options.exact or (options.limit and options.match != "NotOlderThan")):
            # Paging with a revision is served at exactly that revision, as upstream does for compatibility.
            if cache.revision > at or at < compacted:
                return None
            shown = at
        else:
            shown = revision
    page = _page(cache, options, after, shown)
    cache.lists += 1
    cache.listed += len(page.objects)
    return page


def _page(cache: ResourceCache, options: ListOptions, after: str, shown: int) -> ListResult:
    selection = options.selection
    limit = options.limit
    if selection.name and not after:
        key = f"{selection.namespace}/{selection.name}" if selection.namespace else selection.name
        found = cache.objects.get(key)
        if found is not None or selection.namespace:
            return ListResult([found] if found is not None and selection.matches(found) else [], shown)
    if selection.always:
        start, end = cache.range(selection.namespace, after)
        if not limit or end - start <= limit:
            return ListResult(_objects(cache, start, end), shown)
        objects = _objects(cache, start, start + limit)
        return ListResult(objects, shown, encode_continue(_relative(objects[-1].key, selection), shown), end - start - limit)
    start, end = cache.range(selection.namespace, after)
    chosen: list[CachedObject] = []
    matches = selection.matches
    table = cache.objects
    for key in cache.keys[start:end]:
        cached = table[key]
        if matches(cached):
            if limit and len(chosen) == limit:
                return ListResult(chosen, shown, encode_continue(_relative(chosen[-1].key, selection), shown))
            chosen.append(cached)
    return ListResult(chosen, shown)


def _relative(key: str, selection: Selection) -> str:
    """Tokens hold the key relative to the listed prefix, as upstream's do."""
    return key[len(selection.namespace) + 1:] if selection.namespace else key


def _objects(cache: ResourceCache, start: int, end: int) -> list[CachedObject]:
    objects = cache.objects
    return [objects[key] for key in (cache.keys if start == 0 and end == len(cache.keys) else cache.keys[start:end])]


async def list_at(storage: Storage, cache: ResourceCache, options: ListOptions, prepare: Prepare | None = None) -> ListResult:
    """List at an older revision, from the store's history.

    Args:
      prepare: Awaited with the objects before selectors look at them.

    Raises:
      StatusError: 410 when the revision is compacted, 504 when it does not exist yet.
    """
    after, revision = "", options.revision or 0
    if options.continue_token:
        after, revision = decode_continue(options.continue_token)
    selection = options.selection
    prefix = cache.prefix + (selection.namespace + "/" if selection.namespace else "")
    chosen: list[CachedObject] = []
    position: str | None = prefix + after if after else None
    limit = options.limit
    try:
        while True:
            page = await storage.store.scan(prefix, at=revision, limit=limit, after=position)
            made = [cache.make(item.key[len(cache.prefix):], item.value, item.revision) for item in page.items]
            if prepare is not None and not selection.always:
                await prepare(made)
            for item, cached in zip(page.items, made, strict=True):
                if selection.always or selection.matches(cached):
                    chosen.append(cached)
                    if limit and len(chosen) == limit:
                        more = page.after is not None or item is not page.items[-1]
                        if not more:
                            return ListResult(chosen, revision)
                        # Only without selectors is it known how many of the rest will be chosen.
                        left = page.remaining + len(page.items) - page.items.index(item) - 1 if selection.always else None
                        return ListResult(chosen, revision, encode_continue(item.key[len(prefix):], revision), left)
            if page.after is None:
                return ListResult(chosen, revision)
            position = page.after
    except CompactedError as error:
        if options.continue_token:
            fresh = encode_continue(after, -1)
            raise errors.expired(GONE_CONTINUE, fresh) from error
        raise errors.expired("The resourceVersion for the provided list is too old.") from error
    except FutureRevisionError as error:
        raise too_large_version(revision, error.current) from error
