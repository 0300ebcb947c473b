"""The REST client: verbs on resources as plain dicts, errors as StatusError.

Every component talks to the API server through one `Client`. Invariants: what is returned is
freshly decoded and belongs to the caller; a request is retried only when the server asks for
it (429 or 5xx with Retry-After) or when it cannot have been seen.
Source: client-go rest/request.go, rest/with_retry.go, dynamic/simple.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any
from urllib.parse import quote, urlencode

import orjson

from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.config import ClientConfig, Credentials
from knarr.http.client import HTTPClient, Response

_PATCH_TYPES = {
    "merge": "application/merge-patch+json",
    "strategic": "application/strategic-merge-patch+json",
    "json": "application/json-patch+json",
    "apply": "application/apply-patch+yaml",
}
_MAX_RETRIES = 10
_JSON = "application/json"

Query = Mapping[str, str | int | bool | Sequence[str] | None]


class Client:
    """A connection pool to one API server with its credentials.

    Args:
      config: where and who.
      max_connections: requests at the same time, at most; watches count too.
    """

    def __init__(self, config: ClientConfig, *, max_connections: int = 512) -> None:
        self.config = config
        self._credentials = Credentials(config)
        self._max_connections = max_connections
        self._refreshing: asyncio.Lock | None = None
        self._retired: list[HTTPClient] = []
        self._http = self._connect()

    def _connect(self) -> HTTPClient:
        certificate = self._credentials.certificate
        context = self.config.ssl_context(*certificate) if certificate else self.config.ssl_context()
        self._base_headers = [("User-Agent", self.config.user_agent)]
        self._headers_changed()
        options: dict[str, Any] = {"server_hostname": self.config.tls_server_name} if self.config.tls_server_name else {}
        return HTTPClient(self.config.server, ssl_context=context, max_connections=self._max_connections, **options)

    def _headers_changed(self) -> None:
        credentials = self._credentials.headers()
        self._get_headers = [*self._base_headers, ("Accept", _JSON), *credentials]
        self._body_headers = [*self._get_headers, ("Content-Type", _JSON)]

    async def _refresh(self) -> None:
        if self._refreshing is None:
            self._refreshing = asyncio.Lock()
        async with self._refreshing:
            if not self._credentials.due():
                return
            if await self._credentials.refresh():
                # Streams on the old pool go on with the old certificate; it is closed with the client.
                self._retired.append(self._http)
                self._http = self._connect()
            self._headers_changed()

    def use_certificate(self, certificate: bytes, key: bytes) -> None:
        """Authenticate with this PEM pair from now on; what is under way on old connections ends as it began (see `close_retired`)."""
        self._credentials.certificate = (certificate, key)
        self._retired.append(self._http)
        self._http = self._connect()

    async def close_retired(self) -> None:
        """Close connections made with earlier certificates; watches on them resume on new ones."""
        retired, self._retired = self._retired, []
        for http in retired:
            await http.close()

    async def close(self) -> None:
        """Close all connections; requests in progress fail."""
        for http in (self._http, *self._retired):
            await http.close()
        self._retired.clear()

    @property
    def http(self) -> HTTPClient:
        """The connection pool, for upgrades (exec, port-forward)."""
        return self._http

    async def headers(self, *, accept: str = _JSON, content_type: str = "") -> list[tuple[str, str]]:
        """Give request headers with fresh credentials, for use with `http`."""
        if self._credentials.due():
            await self._refresh()
        headers = [*self._base_headers, ("Accept", accept), *self._credentials.headers()]
        if content_type:
            headers.append(("Content-Type", content_type))
        return headers

    # Raw requests

    async def request(
        self, method: str, path: str, query: Query | None = None, body: bytes | Object | None = None, headers: Mapping[str, str] | None = None
    ) -> Response:
        """Send one request; any status below 400 is returned.

        Args:
          path: URL path, already escaped; the server's path prefix is put in front.
          query: values of None and "" are left out, lists are repeated.
          body: bytes as they are, or an object sent as JSON.
          headers: added to, or replacing, the client's own.

        Raises:
          StatusError: the server said no (its Status, or one made from the HTTP status).
          HTTPError: it cannot be reached, or the connection broke.
        """
        target = path
        if query and (encoded := encode_query(query)):
            target += "?" + encoded
        if body is not None and not isinstance(body, bytes | bytearray):
            body = orjson.dumps(body)
        attempt = 0
        while True:
            if self._credentials.due():
                await self._refresh()
            sent = self._body_headers if body is not None else self._get_headers
            if headers:
                sent = _override(sent, headers)
            response = await self._http.request(method, target, sent, body)
            status = response.status
            if status < 400:
                return response
            attempt += 1
            if status == 401 and attempt == 1 and (self.config.exec_plugin or self.config.token_file):
                self._credentials.invalidate()
                continue
            delay = _retry_after_seconds(response)
            if delay is None or attempt > _MAX_RETRIES:
                raise status_error(response.status, response.body, method, path, _header_map(response.headers))
            await asyncio.sleep(delay)

    async def _json(self, method: str, path: str, query: Query | None = None, body: bytes | Object | None = None) -> Object:
        response = await self.request(method, path, query, body)
        result: Object = orjson.loads(response.body)
        return result

    # Verbs

    async def get(
        self, res: Resource, name: str, namespace: str | None = None, *, subresource: str = "", resource_version: str | None = None
    ) -> Object:
        """Read one object.

        Raises:
          StatusError: NotFound and whatever else the server says.
        """
        query = {"resourceVersion": resource_version} if resource_version is not None else None
        return await self._json("GET", res.path(namespace, name, subresource), query)

    async def list(
        self,
        res: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        limit: int = 0,
        continue_token: str = "",
        resource_version: str | None = None,
        resource_version_match: str = "",
    ) -> Object:
        """Read a list object with "items"; one page when a limit is given (then see metadata.continue)."""
        query = {
            "labelSelector": label_selector,
            "fieldSelector": field_selector,
            "limit": limit or None,
            "continue": continue_token,
            "resourceVersion": resource_version,
            "resourceVersionMatch": resource_version_match,
        }
        return await self._json("GET", res.path(namespace), query)

    async def create(
        self,
        res: Resource,
        obj: Object,
        namespace: str | None = None,
        *,
        subresource: str = "",
        name: str = "",
        dry_run: bool = False,
        field_manager: str = "",
    ) -> Object:
        """Create an object, or POST to a subresource of `name`.

        Args:
          namespace: None takes the object's own.
        """
        if namespace is None and res.namespaced:
            namespace = obj.get("metadata", {}).get("namespace")
        path = res.path(namespace, name or None, subresource)
        query = {"dryRun": "All" if dry_run else None, "fieldManager": field_manager}
        return await self._json("POST", path, query, obj)

    async def update(self, res: Resource, obj: Object, *, subresource: str = "", dry_run: bool = False, field_manager: str = "") -> Object:
        """Replace an object; its metadata names it. With a resourceVersion only that version is replaced."""
        meta = obj["metadata"]
        path = res.path(meta.get("namespace"), meta["name"], subresource)
        query = {"dryRun": "All" if dry_run else None, "fieldManager": field_manager}
        return await self._json("PUT", path, query, obj)

    async def patch(
        self,
        res: Resource,
        name: str,
        namespace: str | None,
        patch: Object | Sequence[Any],
        *,
        type: str = "merge",
        subresource: str = "",
        field_manager: str = "",
        force: bool = False,
        dry_run: bool = False,
    ) -> Object:
        """Change an object.

        Args:
          patch: a dict (merge, strategic, apply) or a list of operations (json).
          type: "merge", "strategic", "json" or "apply".
          field_manager: required for apply.
          force: take over fields of other managers (apply).
        """
        query = {"fieldManager": field_manager, "force": "true" if force else None, "dryRun": "All" if dry_run else None}
        response = await self.request(
            "PATCH", res.path(namespace, name, subresource), query, orjson.dumps(patch), {"Content-Type": _PATCH_TYPES[type]}
        )
        result: Object = orjson.loads(response.body)
        return result

    async def delete(
        self,
        res: Resource,
        name: str,
        namespace: str | None = None,
        *,
        grace_period_seconds: int | None = None,
        propagation_policy: str | None = None,
        uid: str | None = None,
        resource_version: str | None = None,
    ) -> Object:
        """Delete an object; answers the object (still there, with finalizers or grace) or a Status.

        Args:
          uid, resource_version: preconditions; Conflict when they do not hold.
        """
        options = _delete_options(grace_period_seconds, propagation_policy, uid, resource_version)
        return await self._json("DELETE", res.path(namespace, name), None, options)

    async def delete_collection(
        self,
        res: Resource,
        namespace: str | None = None,
        *,
        label_selector: str = "",
        field_selector: str = "",
        grace_period_seconds: int | None = None,
        propagation_policy: str | None = None,
    ) -> Object:
        """Delete all objects that the selectors match."""
        query = {"labelSelector": label_selector, "fieldSelector": field_selector}
        options = _delete_options(grace_period_seconds, propagation_policy, None, None)
        return await self._json("DELETE", res.path(namespace), query, options)

    async def watch(
        self,
        res: Resource,
        namespace: str | None = None,
        *,
        resource_version: str | None = None,
        label_selector: str = "",
        field_selector: str = "",
        allow_bookmarks: bool = True,
        timeout_seconds: int | None = None,
        accept: str = "",
    ) -> AsyncGenerator[tuple[str, Object], None]:
        """Yield (type, object) per event: ADDED, MODIFIED, DELETED, BOOKMARK; ends when the server ends it.

        Args:
          accept: another representation, e.g. metadata only; "" for the whole objects.

        Raises:
          StatusError: also for an ERROR event, e.g. Expired (410): list again.
          HTTPError: the connection broke: resume from the last resourceVersion.
        """
        query = {
            "watch": "true",
            "resourceVersion": resource_version,
            "labelSelector": label_selector,
            "fieldSelector": field_selector,
            "allowWatchBookmarks": "true" if allow_bookmarks else None,
            "timeoutSeconds": timeout_seconds,
        }
        if self._credentials.due():
            await self._refresh()
        path = res.path(namespace)
        target = f"{path}?{encode_query(query)}"
        headers = _override(self._get_headers, {"Accept": accept}) if accept else self._get_headers
        async with self._http.stream("GET", target, headers) as stream:
            if stream.status >= 400:
                body = b"".join([chunk async for chunk in stream.iter_chunks()])
                if stream.status == 401:
                    self._credentials.invalidate()
                raise status_error(stream.status, body, "GET", path, _header_map(stream.headers))
            loads = orjson.loads
            async for line in stream.iter_lines():
                if not line:
                    continue
                event = loads(line)
                kind = event["type"]
                if kind == "ERROR":
                    raise StatusError.from_status(event["object"])
                yield kind, event["object"]


def encode_query(query: Query) -> str:
    """Encode query parameters; None and "" are left out, lists are repeated."""
    pairs: list[tuple[str, str]] = []
    for name, value in query.items():
        if value is None or value == "":
            continue
        if isinstance(value, str):
            pairs.append((name, value))
        elif isinstance(value, bool):
            pairs.append((name, "true" if value else "false"))
        elif isinstance(value, int):
            pairs.append((name, str(value)))
        else:
            pairs += [(name, item) for item in value]
    return urlencode(pairs, quote_via=quote)


def _override(headers: list[tuple[str, str]], own: Mapping[str, str]) -> list[tuple[str, str]]:
    lowered = {name.lower() for name in own}
    return [pair for pair in headers if pair[0].lower() not in lowered] + list(own.items())


def _delete_options(grace: int | None, policy: str | None, uid: str | None, resource_version: str | None) -> Object:
    options: Object = {"apiVersion": "v1", "kind": "DeleteOptions"}
    if grace is not None:
        options["gracePeriodSeconds"] = grace
    if policy is not None:
        options["propagationPolicy"] = policy
    preconditions = {name: value for name, value in (("uid", uid), ("resourceVersion", resource_version)) if value is not None}
    if preconditions:
        options["preconditions"] = preconditions
    return options


def _header_map(headers: Mapping[str, str] | Sequence[tuple[str, str]]) -> dict[str, str]:
    pairs = headers.items() if isinstance(headers, Mapping) else headers
    return {name.lower(): value for name, value in pairs}


def _retry_after_seconds(response: Response) -> float | None:
    if response.status != 429 and response.status < 500:
        return None
    value = _header_map(response.headers).get("retry-after")
    if value is None:
        return None
    if response.status == 429 and b'"DisruptionBudget"' in response.body:
        # An eviction refused by a budget is an answer to the caller, not a matter of load.
        return None
    try:
        return float(value)
    except ValueError:
        return 1.0


def status_error(status: int, body: bytes, method: str, path: str, headers: Mapping[str, str]) -> StatusError:
    """Make the error of an answer: its Status when it has one, else one from the HTTP status."""
    try:
        content = orjson.loads(body)
    except ValueError:
        content = None
    if isinstance(content, dict) and content.get("kind") == "Status":
        content.setdefault("code", status)
        return StatusError.from_status(content)
    reason = {
        400: "BadRequest", 401: "Unauthorized", 403: "Forbidden", 404: "NotFound", 405: "MethodNotAllowed", 409: "Conflict",
        410: "Gone", 413: "RequestEntityTooLarge", 415: "UnsupportedMediaType", 422: "Invalid", 429: "TooManyRequests",
        500: "InternalError", 503: "ServiceUnavailable", 504: "Timeout",
    }.get(status, "")  # fmt: skip
    text = body.decode(errors="replace").strip()[:2048]
    details: Object = {}
    if text:
        details["causes"] = [{"reason": "UnexpectedServerResponse", "message": text}]
    if (retry := headers.get("retry-after", "")).isdigit():
        details["retryAfterSeconds"] = int(retry)
    message = f"the server answered {method} {path} with status {status}" + (f": {text}" if text else "")
    return StatusError.from_status({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": status, "reason": reason, "message": message, "details": details})
