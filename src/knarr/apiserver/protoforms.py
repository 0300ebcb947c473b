"""Forms in protobuf: what client-go asks for. The message of each object is encoded once and kept beside its JSON.

Source: apimachinery serializer/protobuf, framer, meta/v1 generated.proto.
"""

from __future__ import annotations

from collections.abc import Sequence

import orjson

from knarr.api import protobuf, typeinfo
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.cache import CachedObject
from knarr.apiserver.forms import Form, bookmark_object, list_metadata
from knarr.apiserver.negotiation import PROTOBUF

META = "k8s.io.apimachinery.pkg.apis.meta.v1."


def encode_envelope(obj: Object) -> bytes:
    """Encode any built-in object with kind and apiVersion."""
    return protobuf.encode(obj)


class ProtobufForm(Form):
    """Protobuf of a built-in kind, made from a JSON form of the same version."""

    name = "protobuf"
    content_type = PROTOBUF
    watch_content_type = PROTOBUF + ";stream=watch"

    def __init__(self, resource: Resource, json: Form) -> None:
        super().__init__(resource)
        self._json = json
        self._types = (resource.api_version, resource.kind, resource.list_kind)
        self._message = typeinfo.message_name(resource.api_version, resource.kind)
        self.id = ("protobuf", resource.api_version)

    def item(self, cached: CachedObject) -> bytes:
        """Return the object's message without an envelope."""
        forms = cached.forms
        if forms is None:
            forms = cached.forms = {}
        made: bytes | None = forms.get(self.id)
        if made is None:
            made = forms[self.id] = self._encode(orjson.loads(self._json.item(cached)))
        return made

    def _encode(self, obj: Object) -> bytes:
        return protobuf.encoder(self._message)(obj)

    def _wrap(self, message: bytes) -> bytes:
        return protobuf.envelope(self._types[0], self._types[1], message)

    def single(self, cached: CachedObject) -> bytes:
        return self._wrap(self.item(cached))

    def list(self, objects: Sequence[CachedObject], revision: int, continue_token: str = "", remaining: int | None = None) -> bytes:
        item = self.item
        metadata = list_metadata(revision, continue_token, remaining)
        return protobuf.encode_list(self._types[0], self._types[2], metadata, [item(cached) for cached in objects])

    def frame(self, type: str, cached: CachedObject) -> bytes:
        return protobuf.watch_frame(type, self.single(cached))

    def bookmark(self, revision: int, *, initial_end: bool = False) -> bytes:
        obj = bookmark_object(self.resource, revision, initial_end)
        return protobuf.watch_frame("BOOKMARK", self._wrap(self._encode({"metadata": obj["metadata"]})))

    def event_of(self, type: str, obj: Object) -> bytes:
        return protobuf.watch_frame(type, protobuf.encode(obj))

    def body_of(self, obj: Object) -> bytes:
        return protobuf.encode(obj)


class ProtobufPartialForm(ProtobufForm):
    """PartialObjectMetadata in protobuf, of built-in and custom kinds."""

    name = "protobuf-partial"

    def __init__(self, resource: Resource, version: str) -> None:
        Form.__init__(self, resource)
        self._types = (f"meta.k8s.io/{version}", "PartialObjectMetadata", "PartialObjectMetadataList")
        self._message = META + "PartialObjectMetadata"
        self.id = ("protobuf-partial", version)

    def item(self, cached: CachedObject) -> bytes:
        forms = cached.forms
        if forms is None:
            forms = cached.forms = {}
        made: bytes | None = forms.get(self.id)
        if made is None:
            made = forms[self.id] = self._encode({"metadata": orjson.loads(cached.item)["metadata"]})
        return made

    def body_of(self, obj: Object) -> bytes:
        return self._wrap(self._encode({"metadata": obj["metadata"]}))
