"""Watchers, grouped: everyone who wants the same (scope, selectors, form) shares one rendering of each event.

Owner: the watch handler makes Watchers; a WatchGroup lives in its ResourceCache while it has members. Per member there is
one stream write per commit. Bounded: a member whose unsent bytes pass its allowance is cut off and must list again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from typing import Any, NamedTuple

from knarr.aiokits.log import get_logger
from knarr.api.selectors import FieldSelector, LabelSelector
from knarr.apiserver.cache import ADDED, DELETED, MODIFIED, CachedObject, Event, ResourceCache, item_at
from knarr.apiserver.forms import Form
from knarr.apiserver.websocketwatch import WebSocketStream
from knarr.http.server import ResponseStream

log = get_logger(__name__)
BUFFER_BYTES = 8 << 20
VIEW = "view"
"""(VIEW, apiVersion) in CachedObject.forms: labels and fields of an object converted into that version."""


class Prepare(NamedTuple):
    """How objects are made presentable in the group's version, where that needs waiting."""

    prepare: Callable[[Sequence[CachedObject]], Awaitable[None]]
    spawn: Callable[[Coroutine[Any, Any, None], str], asyncio.Task[None]]
    form_id: Any
    """Where an object keeps its converted item."""


class Selection:
    """Which objects of a cache a list or watch wants: namespace, name, label and field selectors. Hashable by text."""

    __slots__ = ("_terms", "_view", "always", "field_text", "label_text", "labels", "name", "namespace")

    def __init__(self, cache: ResourceCache, namespace: str, labels: LabelSelector, fields: FieldSelector, view: str = "") -> None:
        self._view = view
        """The version whose labels and fields count, when they are not those of the stored object."""
        self.namespace = namespace
        self.labels = labels
        self.label_text = str(labels) if not labels.empty else ""
        self.field_text = str(fields) if not fields.empty else ""
        self.name = fields.required_value("metadata.name") or ""
        terms: list[tuple[int, str, bool]] = []
        for term in fields.terms:
            if term.field == "metadata.name":
                terms.append((-1, term.value, term.negated))
            elif term.field == "metadata.namespace":
                terms.append((-2, term.value, term.negated))
            else:
                terms.append((cache.field_index[term.field], term.value, term.negated))
        self._terms = tuple(terms)
        self.always = labels.empty and not terms
        """Everything of the namespace is selected."""

    def matches(self, cached: CachedObject) -> bool:
        """Whether the selectors take the object; the namespace is not looked at."""
        labels, fields = cached.labels, cached.fields
        if self._view and cached.version != self._view:
            labels, fields = (cached.forms or {}).get((VIEW, self._view), (labels, fields))
        if not self.labels.empty and not self.labels.matches(labels):
            return False
        for index, value, negated in self._terms:
            if index >= 0:
                actual = fields[index] if fields is not None else ""
            else:
                actual = cached.name if index == -1 else cached.namespace
            if (actual == value) == negated:
                return False
        return True

    def scope(self, cache: ResourceCache, namespaced: bool) -> str:
        """Return the narrowest scope under which the cache finds every event that could matter."""
        if self.name and (self.namespace or not namespaced):
            return f"{self.namespace}/{self.name}" if self.namespace else self.name
        if self.namespace:
            return self.namespace + "/"
        if cache.trigger >= 0:
            for index, value, negated in self._terms:
                if index == cache.trigger and not negated:
                    return "\0" + value
        return ""


class WatchGroup:
    """The watchers of one cache with equal wishes."""

    __slots__ = ("_pending", "_prepare", "_task", "cache", "form", "key", "members", "scope", "selection", "sent")

    def __init__(self, cache: ResourceCache, key: Any, selection: Selection, form: Form, scope: str, prepare: Prepare | None) -> None:
        self._prepare = prepare
        self._pending: list[Event] = []
        self._task: asyncio.Task[None] | None = None
        self.cache = cache
        self.key = key
        self.selection = selection
        self.form = form
        self.scope = scope
        self.members: set[Watcher] = set()
        self.sent = cache.sent_in(form.resource.version)

    def deliver(self, events: Sequence[Event]) -> None:
        """Render what the group may see of these events once, and write it to every member."""
        if self._prepare is not None:
            self._pending += events
            if self._task is None:
                self._task = self._prepare.spawn(self._deliver_later(), "watch-conversion")
            return
        self._write(events)

    async def _deliver_later(self) -> None:
        """Events that must be converted first: in order, one batch after another."""
        assert self._prepare is not None
        try:
            while self._pending:
                events, self._pending = self._pending, []
                try:
                    await self._prepare.prepare(all_states(events))
                except Exception as error:
                    # Clients start over and meet the webhook's error there.
                    log.warning("converting for watchers failed", error=repr(error))
                    for member in list(self.members):
                        member.finish()
                    return
                self._write(events)
        finally:
            self._task = None

    def _write(self, events: Sequence[Event]) -> None:
        frames = self.frames(events)
        if not frames:
            return
        self.sent.add(map(len, frames), len(self.members))
        data = frames[0] if len(frames) == 1 else b"".join(frames)
        chunk = b"%x\r\n%b\r\n" % (len(data), data)
        if self.form.special_first:
            for member in list(self.members):
                if member.has_had_first:
                    member.send(chunk)
                else:
                    member.has_had_first = True
                    member.send_frame(self.form.first_frames(data))
            return
        for member in list(self.members):
            member.send(chunk)

    def frames(self, events: Sequence[Event]) -> list[bytes]:
        """Return the frames of those events that the group may see."""
        form = self.form
        selection = self.selection
        frames: list[bytes] = []
        for event in events:
            if selection.always:
                key = (form.id, event.type)
                frame = event.rendered.get(key)
                if frame is None:
                    frame = event.rendered[key] = form.frame(event.type, event.current)
                frames.append(frame)
                continue
            now = event.type != DELETED and selection.matches(event.current)
            before = event.previous is not None and selection.matches(event.previous)
            if now:
                frames.append(self._frame(event, MODIFIED if before else ADDED))
            elif before:
                frames.append(self._frame(event, DELETED))
        return frames

    def _frame(self, event: Event, type: str) -> bytes:
        # An object that leaves the selection shows its last selected state, as of this event's revision.
        left = type == DELETED and event.type != DELETED
        key = (self.form.id, "LEFT" if left else type)
        frame = event.rendered.get(key)
        if frame is None:
            shown = self._left(event, event.previous) if left and event.previous is not None else event.current
            frame = event.rendered[key] = self.form.frame(type, shown)
        return frame

    def _left(self, event: Event, previous: CachedObject) -> CachedObject:
        shown = previous.at_revision(event.revision)
        converted = previous.forms.get(self._prepare.form_id) if self._prepare is not None and previous.forms else None
        if self._prepare is not None and converted is not None:
            shown.forms = {self._prepare.form_id: item_at(converted, event.revision)}
        return shown

    def join(self, watcher: Watcher) -> None:
        if not self.members:
            self.cache.add_group(self, self.scope)
        self.members.add(watcher)

    def leave(self, watcher: Watcher) -> None:
        self.members.discard(watcher)
        if not self.members:
            self.cache.remove_group(self, self.scope)


def all_states(events: Iterable[Event]) -> list[CachedObject]:
    """Return every state of an object that events may have to show."""
    return [state for event in events for state in (event.current, event.previous) if state is not None]


def group_for(cache: ResourceCache, namespaced: bool, selection: Selection, form: Form, prepare: Prepare | None = None) -> WatchGroup:
    """Return the group of these wishes, a new one if nobody has them yet."""
    key = (selection.namespace, selection.label_text, selection.field_text, form.id)
    found = cache.groups.get(key)
    return found or WatchGroup(cache, key, selection, form, selection.scope(cache, namespaced), prepare)


class Watcher:
    """One client's watch."""

    __slots__ = ("_allowance", "_ended", "_timer", "bookmarks", "current_revision", "group", "has_had_first", "on_end", "stream")

    def __init__(
        self, group: WatchGroup, stream: ResponseStream | WebSocketStream, *, bookmarks: bool, timeout_seconds: float, allowance_bytes: int,
        current_revision: Callable[[], int], on_end: Callable[[], None],
    ) -> None:  # fmt: skip
        self.group = group
        self.stream = stream
        self.bookmarks = bookmarks
        self.current_revision = current_revision
        self.on_end = on_end
        self.has_had_first = allowance_bytes > 0
        self._allowance = allowance_bytes + BUFFER_BYTES
        self._ended = False
        loop = asyncio.get_running_loop()
        self._timer = loop.call_later(timeout_seconds, self._timed_out)
        stream.closed.add_done_callback(lambda _: self.end())
        group.join(self)

    @property
    def ended(self) -> bool:
        return self._ended

    def send(self, chunk: bytes) -> None:
        """Write rendered frames; cut the watcher off when it does not take them."""
        stream = self.stream
        stream.write_rendered(chunk)
        if stream.buffered_bytes > self._allowance:
            self.end()
            stream.abort()

    def send_frame(self, frame: bytes) -> None:
        self.send(b"%x\r\n%b\r\n" % (len(frame), frame))

    def send_bookmark(self) -> None:
        """Tell the client how far it has seen: every event up to the present revision has been sent."""
        if self.bookmarks:
            self.send_frame(self.group.form.bookmark(self.current_revision()))

    def _timed_out(self) -> None:
        self.send_bookmark()
        self.finish()

    def finish(self, frame: bytes = b"") -> None:
        """End the watch in order, with a last frame if given (an ERROR)."""
        if self._ended:
            return
        if frame:
            self.send_frame(frame)
        self.end()
        self.stream.close()

    def end(self) -> None:
        """Leave the group; idempotent."""
        if self._ended:
            return
        self._ended = True
        self._timer.cancel()
        self.group.leave(self)
        self.on_end()


def close_watchers(cache: ResourceCache) -> None:
    """End every watch of a cache: its resource is going away, or the server is."""
    for group in list(cache.groups.values()):
        for member in list(group.members):
            member.finish()
