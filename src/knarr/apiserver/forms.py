"""Forms: how cached objects become answers in one media type, version and shape.

A form belongs to one served resource (group, version, plural) and is shared by all its requests. It renders a single
object, a list and watch frames; what it makes per object is kept in CachedObject.forms, so a second reader pays only
for concatenation.

    Form            JSON in the stored version: bytes as they lie in the cache
      ConvertedForm JSON in another version of the same kind
      PartialForm   PartialObjectMetadata
      TableForm     Table rows (kept for the second they were made in: cells show ages)
      ProtobufForm  the protobuf encoding (protoforms.py)
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.api.encode import trimmed
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.cache import CachedObject

_serial = itertools.count()
Converter = Callable[[Object], Object]
JSON = "application/json"
INITIAL_EVENTS_END = "k8s.io/initial-events-end"


def list_metadata(revision: int, continue_token: str, remaining: int | None) -> Object:
    """Return a ListMeta as upstream orders it."""
    metadata: Object = {"resourceVersion": str(revision)}
    if continue_token:
        metadata["continue"] = continue_token
        if remaining is not None:
            metadata["remainingItemCount"] = remaining
    return metadata


class Form:
    """JSON in the stored version."""

    name = "json"
    content_type = JSON
    watch_content_type = JSON
    special_first = False
    """The first frames of a watch differ from later ones (first_frames)."""

    def __init__(self, resource: Resource) -> None:
        self.resource = resource
        # Upstream writes custom objects with sorted keys ("apiVersion" first) and keeps the kind in list items.
        self.head = (
            b'{"apiVersion":%b,"kind":%b,' if resource.custom else b'{"kind":%b,"apiVersion":%b,'
        ) % (
            (orjson.dumps(resource.api_version), orjson.dumps(resource.kind)) if resource.custom
            else (orjson.dumps(resource.kind), orjson.dumps(resource.api_version))
        )  # fmt: skip
        self.list_head = b'{"kind":%b,"apiVersion":%b,"metadata":' % (orjson.dumps(resource.list_kind), orjson.dumps(resource.api_version))
        self.id: Any = (self.name, resource.api_version)

    def item(self, cached: CachedObject) -> bytes:
        """Return the object as JSON without kind and apiVersion, beginning with a brace."""
        return cached.item

    def single(self, cached: CachedObject) -> bytes:
        """Return the body of an answer that is this object."""
        return b"%b%b\n" % (self.head, self.item(cached)[1:])

    def list(self, objects: Sequence[CachedObject], revision: int, continue_token: str = "", remaining: int | None = None) -> bytes:
        """Return the body of a list."""
        if self.resource.custom:
            return self._custom_list(objects, revision, continue_token, remaining)
        items = self._items(objects)
        metadata = orjson.dumps(list_metadata(revision, continue_token, remaining))
        return b'%b%b,"items":[%b]}\n' % (self.list_head, metadata, items)

    def _custom_list(self, objects: Sequence[CachedObject], revision: int, continue_token: str, remaining: int | None) -> bytes:
        """Lists of custom objects are untyped upstream: keys in order, items with their kind, continue always there."""
        head, item = self.head, self.item
        items = b",".join([head + item(cached)[1:] for cached in objects])
        metadata = orjson.dumps({"continue": continue_token, **list_metadata(revision, continue_token, remaining)})
        kinds = orjson.dumps(self.resource.api_version), items, orjson.dumps(self.resource.list_kind), metadata
        return b'{"apiVersion":%b,"items":[%b],"kind":%b,"metadata":%b}\n' % kinds

    def _items(self, objects: Sequence[CachedObject]) -> bytes:
        return b",".join([cached.item for cached in objects])

    def frame(self, type: str, cached: CachedObject) -> bytes:
        """Return one watch event."""
        return b'{"type":"%b","object":%b%b}\n' % (type.encode(), self.head, self.item(cached)[1:])

    def first_frames(self, data: bytes) -> bytes:
        """Return what a watcher gets as its first frames, when that differs."""
        return data

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        """Return a BOOKMARK event; initial_end marks the end of a watch list's initial objects."""
        return self.event_of("BOOKMARK", bookmark_object(self.resource, revision, initial_end))

    def event_of(self, type: str, obj: Object) -> bytes:
        """Return a watch event around a plain object (Status of an ERROR, bookmark)."""
        return b'{"type":"%b","object":%b}\n' % (type.encode(), orjson.dumps(obj))

    def body_of(self, obj: Object) -> bytes:
        """Return the body of an answer that is a plain object of this resource with kind and apiVersion."""
        return orjson.dumps(obj) + b"\n"


def bookmark_object(resource: Resource, revision: int, initial_end: bool) -> Object:
    metadata: Object = {"resourceVersion": str(revision), "creationTimestamp": None}
    if initial_end:
        metadata["annotations"] = {INITIAL_EVENTS_END: "true"}
    return {"kind": resource.kind, "apiVersion": resource.api_version, "metadata": metadata}


class ConvertedForm(Form):
    """JSON in a version other than the stored one."""

    name = "converted"

    def __init__(self, resource: Resource, convert: Converter, stored_head: bytes = b"{") -> None:
        super().__init__(resource)
        self._convert = convert
        self._stored_head = stored_head
        # Another schema of the same version makes another form: what is kept beside an object must not be mixed up.
        self.id = (self.name, resource.api_version, next(_serial))

    def item(self, cached: CachedObject) -> bytes:
        forms = cached.forms
        if forms is None:
            forms = cached.forms = {}
        made: bytes | None = forms.get(self.id)
        if made is None:
            made = forms[self.id] = self._make(cached)
        return made

    def _make(self, cached: CachedObject) -> bytes:
        obj = orjson.loads(self._stored_head + cached.item[1:])
        if cached.version:
            obj["apiVersion"] = cached.version
        made = item_of(self._convert(obj))
        # Mostly nothing changes: then the same bytes serve both.
        return cached.item if made == cached.item else made

    def _items(self, objects: Sequence[CachedObject]) -> bytes:
        return b",".join([self.item(cached) for cached in objects])


def item_of(obj: Object) -> bytes:
    """Encode an object as an item: metadata first, no kind, no apiVersion."""
    return trimmed(orjson.dumps({"metadata": obj["metadata"], **{k: v for k, v in obj.items() if k not in ("kind", "apiVersion", "metadata")}}))


class PartialForm(ConvertedForm):
    """PartialObjectMetadata: kind and apiVersion of the meta group, the metadata of the object."""

    name = "partial"

    def __init__(self, resource: Resource, version: str = "v1") -> None:
        super().__init__(resource, lambda obj: obj)
        self.head = b'{"kind":"PartialObjectMetadata","apiVersion":"meta.k8s.io/%b",' % version.encode()
        self.list_head = b'{"kind":"PartialObjectMetadataList","apiVersion":"meta.k8s.io/%b","metadata":' % version.encode()
        self.version = version
        self.id = ("partial", version)

    def _make(self, cached: CachedObject) -> bytes:
        metadata = orjson.loads(cached.item)["metadata"]
        if self.resource.plural == "daemonsets":
            # Upstream keeps the template generation in a field of its internal type: it is no annotation there.
            (metadata.get("annotations") or {}).pop("deprecated.daemonset.template.generation", None)
            if metadata.get("annotations") == {}:
                del metadata["annotations"]
        return trimmed(orjson.dumps({"metadata": metadata}))

    def list(self, objects: Sequence[CachedObject], revision: int, continue_token: str = "", remaining: int | None = None) -> bytes:
        items = b"[%b]" % b",".join([self.head + self.item(cached)[1:] for cached in objects]) if objects else b"null"
        metadata = orjson.dumps(list_metadata(revision, continue_token, remaining))
        return b'%b%b,"items":%b}\n' % (self.list_head, metadata, items)

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        obj = bookmark_object(self.resource, revision, initial_end)
        obj["kind"], obj["apiVersion"] = "PartialObjectMetadata", f"meta.k8s.io/{self.version}"
        return self.event_of("BOOKMARK", obj)

    def body_of(self, obj: Object) -> bytes:
        return self.head + orjson.dumps({"metadata": obj["metadata"]})[1:] + b"\n"


RowFunction = Callable[[Object, str], Object]
"""(object with kind and apiVersion, includeObject) -> row: {cells, conditions?, object}."""


class TableForm(Form):
    """A server-side Table.

    Args:
      columns: columnDefinitions.
      row: Row function of the kind.
      include: "None", "Metadata" (the default) or "Object": what rows carry as `object`.
    """

    name = "table"
    special_first = True

    def __init__(self, resource: Resource, version: str, columns: list[Object], row: RowFunction, include: str, single_form: Form) -> None:
        super().__init__(resource)
        self._version = version
        self._columns = columns
        self._column_bytes = orjson.dumps(columns)
        # Kinds without columns of their own come from another converter upstream, whose tables without rows have none at all.
        self._no_rows = b"null" if not resource.custom and [column["name"] for column in columns] == ["Name", "Created At"] else b"[]"
        self._row = row
        self._include = include
        self._single_form = single_form
        self._head = b'{"kind":"Table","apiVersion":"meta.k8s.io/%b","metadata":' % version.encode()
        self.id = ("table", resource.api_version, version, include)

    def row(self, cached: CachedObject) -> bytes:
        second = int(clock.now())
        forms = cached.forms
        if forms is None:
            forms = cached.forms = {}
        kept: tuple[int, bytes] | None = forms.get(self.id)
        if kept is not None and kept[0] == second:
            return kept[1]
        row = self._row_of(orjson.loads(self._single_form.single(cached)))
        forms[self.id] = (second, row)
        return row

    def _row_of(self, obj: Object) -> bytes:
        out = self._row(obj, self._include)
        if self._include == "Metadata" and self._version != "v1":
            out["object"] = {**out["object"], "apiVersion": f"meta.k8s.io/{self._version}"}
        return trimmed(orjson.dumps(out))

    def _table(self, metadata: bytes, rows: bytes, columns: bytes) -> bytes:
        return b'%b%b,"columnDefinitions":%b,"rows":[%b]}' % (self._head, metadata, columns, rows)

    def single(self, cached: CachedObject) -> bytes:
        metadata = orjson.dumps({"resourceVersion": str(cached.revision)})
        return self._table(metadata, self.row(cached), self._column_bytes) + b"\n"

    def list(self, objects: Sequence[CachedObject], revision: int, continue_token: str = "", remaining: int | None = None) -> bytes:
        metadata = orjson.dumps(list_metadata(revision, continue_token, remaining))
        if not objects:
            return b'%b%b,"columnDefinitions":%b,"rows":%b}\n' % (self._head, metadata, self._column_bytes, self._no_rows)
        return self._table(metadata, b",".join([self.row(cached) for cached in objects]), self._column_bytes) + b"\n"

    def frame(self, type: str, cached: CachedObject) -> bytes:
        metadata = orjson.dumps({"resourceVersion": str(cached.revision)})
        return b'{"type":"%b","object":%b}\n' % (type.encode(), self._table(metadata, self.row(cached), b"null"))

    def first_frames(self, data: bytes) -> bytes:
        # Column definitions come with the first event of a watch; before them in a frame stand only type and metadata.
        return data.replace(b'"columnDefinitions":null', b'"columnDefinitions":' + self._column_bytes, 1)

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        row: Object = {"cells": [], "object": bookmark_object(self.resource, revision, initial_end)}
        metadata = orjson.dumps({"resourceVersion": str(revision)})
        return b'{"type":"BOOKMARK","object":%b}\n' % self._table(metadata, orjson.dumps(row), b"null")

    def body_of(self, obj: Object) -> bytes:
        metadata = {key: obj["metadata"][key] for key in ("resourceVersion", "continue", "remainingItemCount") if key in obj["metadata"]}
        return self._table(orjson.dumps(metadata), self._row_of(obj), self._column_bytes) + b"\n"
