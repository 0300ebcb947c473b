"""/openapi/v2 and /openapi/v3 over HTTP: negotiation, hashes, caching headers; the content is knarr.api.openapi's.

Rendering a document takes long the first time, so it happens in a thread; the rendered bytes are kept compressed.

Source: kube-openapi handler, handler3.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import TYPE_CHECKING, TypeVar

import orjson

from knarr.api import errors
from knarr.api.types import Object
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.call import GZIP_BYTES, audit_id, gzipped
from knarr.http.server import Headers, Request

if TYPE_CHECKING:
    from knarr.api.openapi.documents import CustomAPI, OpenAPIDocuments
    from knarr.apiserver.server import APIServer

V2_PROTOBUF = "application/com.github.proto-openapi.spec.v2@v1.0+protobuf"
# The name that is asked for is no valid media type, so answers carry another.
V2_PROTOBUF_ANSWER = "application/com.github.proto-openapi.spec.v2.v1.0+protobuf"
AGGREGATOR = UserInfo("system:aggregator", groups=("system:masters", "system:authenticated"))
T = TypeVar("T")
PassOn = Callable[[Request, str, UserInfo], Awaitable[bool]]


class OpenAPI:
    """See the module's docstring."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        self._documents: OpenAPIDocuments | None = None
        self._busy = asyncio.Lock()
        self._foreign: Mapping[str, Object] = {}
        self._pass_on: PassOn | None = None

    def follow(self, published: Mapping[str, Object], pass_on: PassOn) -> None:
        """Show the documents of extension servers too: `published` maps "apis/GROUP/VERSION" to their entry of the index."""
        self._foreign, self._pass_on = published, pass_on

    @property
    def documents(self) -> OpenAPIDocuments:
        if self._documents is None:
            from knarr.api.openapi.documents import OpenAPIDocuments

            self._documents = OpenAPIDocuments(self._server.config.runtime_config)
        return self._documents

    def set_custom(self, apis: Iterable[CustomAPI]) -> None:
        """Publish the schemas of custom resources."""
        self.documents.set_custom(apis)

    async def take_swagger(self, path: str, body: bytes) -> None:
        """Merge an extension server's Swagger 2.0 document, as far as it is about the path. Raises ValueError."""
        await self._off_loop(lambda: self.documents.set_foreign(path, orjson.loads(body)))

    def drop_swagger(self, path: str) -> None:
        """Take an extension server's part off again."""
        if self._documents is not None:
            self._documents.set_foreign(path, None)

    async def handle(self, request: Request) -> None:
        """Answer. Raises 404."""
        path = request.path.rstrip("/")
        if path == "/openapi/v2":
            binary = any(name in request.headers.get("accept", "") for name in (V2_PROTOBUF, V2_PROTOBUF_ANSWER))
            document = await self._off_loop(self.documents.v2_protobuf if binary else self.documents.v2)
            self._respond(request, document.body, document.hash, V2_PROTOBUF_ANSWER if binary else "application/json")
        elif path == "/openapi/v3":
            index = await self._off_loop(self.documents.v3_index)
            if self._foreign:
                index = orjson.dumps({"paths": {**orjson.loads(index)["paths"], **self._foreign}})
            self._respond(request, index, "")
        elif path.startswith("/openapi/v3/"):
            key = path[len("/openapi/v3/"):]
            if key in self._foreign and self._pass_on is not None and await self._pass_on(request, key.removeprefix("apis/"), AGGREGATOR):
                return
            found = await self._off_loop(lambda: self.documents.v3(key))
            if found is None:
                raise errors.route_not_found()
            self._respond(request, found.body, found.hash)
        else:
            raise errors.route_not_found()

    async def _off_loop(self, work: Callable[[], T]) -> T:
        async with self._busy:
            return await asyncio.get_running_loop().run_in_executor(None, work)

    def _respond(self, request: Request, body: bytes, etag: str, content_type: str = "application/json") -> None:
        headers: Headers = [("Audit-Id", audit_id(request)), ("Content-Type", content_type), ("Vary", "Accept-Encoding"), ("Vary", "Accept")]
        if etag:
            headers.append(("ETag", f'"{etag}"'))
            if "hash" in request.query:
                headers += [("Cache-Control", "public, immutable"), ("Expires", "Fri, 01 Jan 2100 00:00:00 GMT")]
            else:
                headers.append(("Cache-Control", "no-cache, private"))
            if etag in request.headers.get("if-none-match", ""):
                request.respond(304, headers, b"")
                return
        else:
            headers.append(("Cache-Control", "no-cache, private"))
        if len(body) > GZIP_BYTES and "gzip" in request.headers.get("accept-encoding", ""):
            headers.append(("Content-Encoding", "gzip"))
            body = gzipped(body)
        request.respond(200, headers, body)
