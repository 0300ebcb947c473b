"""Extension API servers: requests for their groups are passed on with the caller's identity in headers.

Owner: APIServer. An APIService with a Service is checked when it changes and every half minute: the Service must have an
endpoint and the server must answer discovery. What it serves is merged into our discovery documents.

Source: kube-aggregator pkg/apiserver/handler_proxy.go, pkg/controllers/status, pkg/apiserver/handler_discovery.go.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import ssl
from typing import TYPE_CHECKING
from urllib.parse import quote

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.apply import manager_for
from knarr.api.resources import API_SERVICES
from knarr.api.types import Object
from knarr.apiserver.aggregation.registration import GROUP, local_status
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.instruments import Counters
from knarr.apiserver.proxy.locations import Location, endpoint_of
from knarr.apiserver.proxy.relay import relay_http, relay_upgrade
from knarr.http.client import HTTPClient
from knarr.http.errors import HTTPError
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

log = get_logger(__name__)
CHECK_SECONDS = 30.0
FIRST_CHECKS_SECONDS = 1.0
AGGREGATED = "application/json;g=apidiscovery.k8s.io;v=v2;as=APIGroupDiscoveryList,application/json"


class Extensions:
    """See the module's docstring."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        self._store = server.registry.stores[GROUP, "apiservices"]
        self._clients: dict[str, HTTPClient] = {}
        self._dirty: dict[str, None] = {}
        self._wakeup = asyncio.Event()
        self._unavailable = Counters(
            "aggregator_unavailable_apiservice_total",
            "[ALPHA] Counter of APIServices which are marked as unavailable broken down by APIService name and reason.", ("name", "reason"),
        )  # fmt: skip
        server.metrics.sources.append(self._unavailable.lines)
        self._published: dict[str, Object] = {}
        self._tags: dict[str, str] = {}
        """Entity tags of the Swagger documents that were taken over, by path."""

    async def start(self) -> None:
        """Follow the APIServices."""
        self._store.add_handler(self._on_event)
        for obj in self._store.list_nowait():
            if (obj.get("spec") or {}).get("service"):
                self._dirty[obj["metadata"]["name"]] = None
        self._server.delegates.append(self.handle)
        self._server.openapi.follow(self._published, self.handle)
        self._server.tasks.spawn_eternal(self._run(), "api-services")
        self._wakeup.set()

    def _on_event(self, type: str, obj: Object, old: Object | None) -> None:
        if old is None or old.get("spec") != obj.get("spec") or type == "DELETED":
            self._dirty[obj["metadata"]["name"]] = None
            self._wakeup.set()

    # -- requests --------------------------------------------------------------------------------------------------------------
    async def handle(self, request: Request, group_version: str, user: UserInfo) -> bool:
        """Pass a request on; False when no APIService with a Service is there for it. Raises 503."""
        group, _, version = group_version.partition("/")
        service = self._service_for(group, version)
        if service is None:
            return False
        if not _available(service):
            raise errors.service_unavailable("service unavailable")
        location, client = self._connection(service)
        self._identify(request, user)
        path = request.raw_path + (f"?{request.query_string}" if request.query_string else "")
        if request.upgrade_wanted:
            await relay_upgrade(request, _WithHeaders(client, self._identity(user)), path)  # type: ignore[arg-type]
        else:
            await relay_http(request, _WithHeaders(client, self._identity(user)), location, path, "")  # type: ignore[arg-type]
        return True

    def _service_for(self, group: str, version: str) -> Object | None:
        if version:
            found = self._store.get_nowait("", f"{version}.{group}")
            return found if found is not None and found["spec"].get("service") else None
        for obj in self._store.list_nowait():
            if obj["spec"].get("group") == group and obj["spec"].get("service"):
                return obj
        return None

    def _connection(self, service: Object) -> tuple[Location, HTTPClient]:
        spec = service["spec"]
        reference = spec["service"]
        namespace, name, port = reference["namespace"], reference["name"], reference.get("port") or 443
        target = self._server.store("", "services").get_nowait(namespace, name)
        if target is None:
            raise errors.service_unavailable(f"service/{name} in \"{namespace}\" is not present")
        ports = [entry for entry in target["spec"].get("ports") or () if entry.get("port") == port]
        if target["spec"].get("type") == "ExternalName":
            dial: tuple[str, int] | None = (target["spec"].get("externalName", ""), port)
        else:
            dial = endpoint_of(self._server.store("discovery.k8s.io", "endpointslices"), namespace, name, ports[0].get("name") or "") if ports else None
        if dial is None:
            raise errors.service_unavailable(f"no endpoints available for service {name!r}")
        key = hashlib.sha256(orjson.dumps([spec, list(dial)])).hexdigest()
        client = self._clients.get(key)
        if client is None:
            if len(self._clients) > 64:
                self._clients.clear()
            client = self._clients[key] = HTTPClient(
                f"https://{name}.{namespace}.svc:{port}", self._tls(spec), max_connections=256, connect_to=dial, timeout_seconds=60,
            )
        return Location("https", dial[0], dial[1]), client

    def _tls(self, spec: Object) -> ssl.SSLContext:
        config = self._server.config
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if spec.get("insecureSkipTLSVerify"):
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif spec.get("caBundle"):
            context.load_verify_locations(cadata=base64.b64decode(spec["caBundle"]).decode())
        else:
            context.load_default_certs()
        if config.proxy_client_cert:
            context.load_cert_chain(config.proxy_client_cert, config.proxy_client_key)
        return context

    @staticmethod
    def _identify(request: Request, user: UserInfo) -> None:
        """Nobody may bring identity headers along: ours are the only ones."""
        request.header_list = [(name, value) for name, value in request.header_list if not name.startswith("x-remote-")]

    @staticmethod
    def _identity(user: UserInfo) -> list[tuple[str, str]]:
        headers = [("X-Remote-User", user.name)]
        if user.uid:
            headers.append(("X-Remote-Uid", user.uid))
        headers += [("X-Remote-Group", group) for group in user.groups]
        for key, values in user.extra.items():
            headers += [(f"X-Remote-Extra-{quote(key, safe='')}", value) for value in values]
        return headers

    # -- availability and discovery --------------------------------------------------------------------------------------------
    async def _run(self) -> None:
        delay = CHECK_SECONDS
        while True:
            try:
                async with asyncio.timeout(delay):
                    await self._wakeup.wait()
            except TimeoutError:
                for obj in self._store.list_nowait():
                    if obj["spec"].get("service"):
                        self._dirty[obj["metadata"]["name"]] = None
            self._wakeup.clear()
            waiting = False
            while self._dirty:
                name = next(iter(self._dirty))
                del self._dirty[name]
                try:
                    waiting |= not await self._check(name)
                except Exception as error:
                    log.error("checking an APIService failed", name=name, exc_info=error)
            # A server that is coming up is looked at often.
            delay = FIRST_CHECKS_SECONDS if waiting else CHECK_SECONDS

    async def _check(self, name: str) -> bool:
        """Set the Available condition and take discovery; whether it is available."""
        obj = self._store.get_nowait("", name)
        if obj is None:
            self._forget(name)
            return True
        if not obj["spec"].get("service"):
            if not (obj.get("status") or {}).get("conditions"):
                await self._store.update("", name, lambda current: {**current, "status": local_status()})
            return True
        status, reason, message = await self._probe(obj)

        def change(current: Object) -> Object | None:
            conditions = [c for c in (current.get("status") or {}).get("conditions") or [] if c.get("type") != "Available"]
            before = next((c for c in (current.get("status") or {}).get("conditions") or [] if c.get("type") == "Available"), None)
            condition = {"type": "Available", "status": status, "lastTransitionTime": clock.now_rfc3339(), "reason": reason, "message": message}
            if status == "False" and (before is None or before["status"] == "True"):
                self._unavailable.add(name, reason)
            if before is not None:
                if before["status"] == status:
                    condition["lastTransitionTime"] = before["lastTransitionTime"]
                if before == condition:
                    return None
            place = [c.get("type") for c in (current.get("status") or {}).get("conditions") or []]
            index = place.index("Available") if "Available" in place else len(conditions)
            conditions.insert(index, condition)
            changed = {**current, "metadata": {**current["metadata"]}, "status": {**(current.get("status") or {}), "conditions": conditions}}
            manager_for(API_SERVICES, "status").update(current, changed, "kube-apiserver")
            return changed

        try:
            await self._store.update("", name, change)
        except errors.StatusError as error:
            if not errors.is_not_found(error):
                raise
        return status == "True"

    async def _probe(self, obj: Object) -> tuple[str, str, str]:
        spec = obj["spec"]
        group, version = spec["group"], spec["version"]
        try:
            _, client = self._connection(obj)
        except errors.StatusError as error:
            reason = "ServiceNotFound" if "not present" in error.message else "MissingEndpoints"
            return "False", reason, error.message
        headers = {name: value for name, value in self._identity(UserInfo("system:kube-aggregator", groups=("system:masters",)))}
        try:
            answer = await client.request("GET", f"/apis/{group}/{version}", {**headers, "Accept": "application/json"}, timeout_seconds=5)
        except HTTPError as error:
            return "False", "FailedDiscoveryCheck", f"failing or missing response from https://{spec['service']['name']}: {error}"
        if answer.status >= 300:
            return "False", "FailedDiscoveryCheck", f"bad status from https://{spec['service']['name']}: {answer.status}"
        try:
            self._take(obj["metadata"]["name"], group, version, orjson.loads(answer.body))
        except (ValueError, KeyError) as error:
            return "False", "FailedDiscoveryCheck", f"unreadable discovery: {error}"
        await self._take_schema(client, f"apis/{group}/{version}", headers)
        await self._take_swagger(client, f"apis/{group}/{version}", headers)
        return "True", "Passed", "all checks passed"

    def _take(self, name: str, group: str, version: str, document: Object) -> None:
        """Merge an extension server's resources into our discovery."""
        discovery = self._server.discovery
        discovery.set_foreign(group, version, document.get("resources") or [])

    async def _take_schema(self, client: HTTPClient, path: str, headers: dict[str, str]) -> None:
        """Take over where the server shows its OpenAPI document. A server without one is none the worse for it."""
        try:
            answer = await client.request("GET", "/openapi/v3", {**headers, "Accept": "application/json"}, timeout_seconds=5)
            entry = orjson.loads(answer.body)["paths"].get(path) if answer.status == 200 else None
        except (HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("no OpenAPI of an extension server", path=path, error=repr(error))
            return
        if entry is not None:
            self._published[path] = entry

    async def _take_swagger(self, client: HTTPClient, path: str, headers: dict[str, str]) -> None:
        """Merge the server's older kind of document, unless it is the one that is known."""
        asked = {**headers, "Accept": "application/json"} | ({"If-None-Match": self._tags[path]} if path in self._tags else {})
        try:
            answer = await client.request("GET", "/openapi/v2", asked, timeout_seconds=10)
            if answer.status != 200:
                return
            await self._server.openapi.take_swagger(path, answer.body)
        except (HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning("no Swagger document of an extension server", path=path, error=repr(error))
            return
        if "etag" in answer.headers:
            self._tags[path] = answer.headers["etag"]

    def _forget(self, name: str) -> None:
        version, _, group = name.partition(".")
        path = f"apis/{group}/{version}"
        self._published.pop(path, None)
        self._tags.pop(path, None)
        self._server.openapi.drop_swagger(path)
        self._server.discovery.drop_foreign(group, version)


class _WithHeaders:
    """A client whose requests carry further headers."""

    def __init__(self, client: HTTPClient, headers: list[tuple[str, str]]) -> None:
        self._client = client
        self._headers = headers

    def stream(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None):  # type: ignore[no-untyped-def]
        return self._client.stream(method, path, [*headers, *self._headers], body)

    async def upgrade(self, method: str, path: str, headers: list[tuple[str, str]], body: bytes | None, **options: float):  # type: ignore[no-untyped-def]
        return await self._client.upgrade(method, path, [*headers, *self._headers], body, **options)


def _available(service: Object) -> bool:
    return any(c.get("type") == "Available" and c.get("status") == "True" for c in (service.get("status") or {}).get("conditions") or [])
