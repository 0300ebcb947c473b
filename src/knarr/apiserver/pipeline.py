"""The way of a request through the API server, as one list of stages in one file.

    fast path (plain function, tried first; answers reads of known users from memory)
    1 request info         method and path -> what is asked for
    2 authentication       who asks (401)
    3 impersonation        whom they act as (403)
    4 audit                the request is noted, its answer too
    5 flow control         how many at once, and of whom first (429)
    6 authorization        may they (403)
    7 route                verb -> verbs/*, subresources, discovery, health, proxies
    any exception          -> Status (StatusError as it is; anything else 500, logged)

The fast path runs the same stages for the common case: known user, nothing to wait for. It returns False, having done
nothing, as soon as a stage would have to wait.
"""

from __future__ import annotations

import asyncio
from time import perf_counter
from typing import TYPE_CHECKING, Any

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.scheme import SCHEME
from knarr.api.times import parse_duration
from knarr.apiserver.attributes import ANONYMOUS, Attributes, ConnectRequest, Decision, ResourceKey, UserInfo
from knarr.apiserver.call import Call, respond_error, respond_no_such_path
from knarr.apiserver.flow import Seat, is_long_running
from knarr.apiserver.metrics import VERBS
from knarr.apiserver.requestinfo import RequestInfo, parse
from knarr.apiserver.tracing import CURRENT, inside
from knarr.apiserver.verbs import componentstatus, create, delete, patch, read, subresources, update
from knarr.http.errors import HTTPError
from knarr.http.server import Request

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

log = get_logger(__name__)

BUILTIN_GROUPS = frozenset(group.name for group in SCHEME.groups())
SLOW_SECONDS = 0.5
"""Requests that take longer are told in the log, as upstream's traces are."""
SPANS = {"create": "Create", "update": "Update", "patch": "Patch", "delete": "Delete", "deletecollection": "Delete", "get": "Get", "list": "List"}
READS = {"get": read.get, "list": read.list_, "watch": read.watch}


class Pipeline:
    """See the module's docstring."""

    def __init__(self, server: APIServer) -> None:
        self.server = server

    # -- the fast path -------------------------------------------------------------------------------------------------------
    def fast(self, request: Request) -> bool:
        """Answer a read from memory; False when anything is to be waited for."""
        if request.method != "GET" or request.upgrade_wanted:
            return False
        server = self.server
        if server.auth is None or server.auditing or server.tracing is not None:
            return False
        info = parse("GET", request.path, request.raw_path, request.query_string)
        if not info.is_resource or info.subresource or info.verb not in READS:
            return False
        if "timeout=" in request.query_string and info.verb != "watch":
            return False
        endpoint = server.registry.endpoints.get((info.group, info.version, info.resource))
        if endpoint is None or endpoint.store is None:
            return False
        if info.namespace:
            if not endpoint.resource.namespaced and info.resource != "namespaces":
                return False
        elif info.name and endpoint.resource.namespaced:
            return False
        if impersonates(request) or (server.storage.shared and wants_newest(request, info)):
            return False
        begin = perf_counter()
        user = server.auth.authenticator.authenticate_nowait(request)
        if user is None:
            return False
        known = perf_counter()
        attributes = attributes_of(request, info, user)
        decision, _ = server.auth.authorizer.authorize(attributes)
        if decision is not Decision.ALLOW:
            return False
        server.storage.activity.let_in(user.name, begin, known, perf_counter())
        call = Call(server, request, info, endpoint, user)
        request.answer_headers = server.flow.headers_for(attributes)
        try:
            READS[info.verb](call)
        except StatusError as error:
            if not request.done:
                respond_error(request, error, call.warnings, call.audit_id)
        if not request.lasting:
            server.metrics.observe(info, request)
        return True

    # -- the whole way ---------------------------------------------------------------------------------------------------------
    async def handle(self, request: Request) -> None:
        """Answer a request, whatever happens."""
        server = self.server
        info = parse(request.method, request.path, request.raw_path, request.query_string)
        server.metrics.begin(info)
        try:
            if is_long_running(request, info):
                await self._stages(request, info)
            else:
                await self._within(self._seconds_for(request), request, info)
        except TimeoutError:
            server.metrics.terminated(info, request, 504)
            self._refuse(request, errors.timeout("request did not complete within the allotted timeout"))
        except StatusError as error:
            self._refuse(request, error)
        except (ConnectionError, HTTPError) as error:
            self._refuse(request, errors.service_unavailable(f"error trying to reach service: {error}"))
        except Exception as error:
            if type(error).__name__ == "ImpersonationWithoutUser":
                text = f"Internal Server Error: {request.raw_path!r}: {error}\n"
                request.respond(500, [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")], text.encode())
                return
            log.error("request failed", method=request.method, path=request.path, exc_info=error)
            self._refuse(request, errors.internal(str(error) or type(error).__name__))
        finally:
            server.metrics.end(info)
            if not request.lasting:
                server.metrics.observe(info, request)
            seconds = server.loop.time() - request.received_at
            if seconds > SLOW_SECONDS and not is_long_running(request, info):
                trace_slow(request, info, seconds)

    async def _within(self, seconds: float, request: Request, info: RequestInfo) -> None:
        """Run the stages under the request's time limit. Raises TimeoutError.

        What asyncio.timeout does, without its two look-ups of the running loop, which are system calls in Python 3.11.
        """
        if not info.is_resource:
            await self._stages(request, info)
            return
        loop = self.server.loop
        task = asyncio.current_task(loop)
        assert task is not None
        expired = False

        def expire() -> None:
            nonlocal expired
            expired = True
            task.cancel()

        timer = loop.call_later(seconds, expire)
        try:
            await self._stages(request, info)
        except asyncio.CancelledError as error:
            if expired and task.uncancel() == 0:
                raise TimeoutError from error
            raise
        finally:
            timer.cancel()

    def _seconds_for(self, request: Request) -> float:
        """Return how long a request may take: a client may ask for less than the server's limit. Raises StatusError."""
        limit = self.server.config.request_timeout_seconds
        text = request.query.get("timeout", ("",))[0] if request.query_string else ""
        if not text:
            return limit
        try:
            wanted = parse_duration(text) / 1e9
        except ValueError as error:
            raise errors.bad_request(f"invalid timeout specified in the request URL - time: invalid duration {errors.go_quote(text)}") from error
        return min(wanted, limit) if wanted > 0 else limit

    def _refuse(self, request: Request, error: StatusError) -> None:
        if not request.done:
            respond_error(request, error)

    async def _stages(self, request: Request, info: RequestInfo) -> None:
        server = self.server
        assert server.auth is not None
        user = await self._authenticated(request)
        original = user
        if impersonates(request):
            user = await server.auth.impersonate(request, user)
        attributes = attributes_of(request, info, user)
        trace = server.audit.begin(request, info, original, user) if server.audit is not None else None
        span = server.tracing.begin(request, info, original) if server.tracing is not None else None
        token = CURRENT.set(span) if span is not None else None
        try:
            seat = server.flow.admit(request, info, attributes)
            if seat is not None and not seat.enter_nowait():
                await self._enter(seat, request, info)
            try:
                decision, reason = await self._decide(attributes)
                if trace is not None:
                    trace.authorized(decision, reason)
                if decision is not Decision.ALLOW:
                    if user.name == ANONYMOUS.name and user is ANONYMOUS and not server.anonymous_everywhere:
                        raise errors.unauthorized()
                    raise server.forbidden(attributes, reason)
                await self._route(request, info, attributes, user)
            finally:
                if seat is not None:
                    seat.leave(server.loop.time())
        except StatusError as error:
            if trace is not None:
                trace.failed(error)
            if span is not None:
                span.attributes["http.status_code"] = error.code
            raise
        finally:
            if token is not None and span is not None:
                CURRENT.reset(token)
                span.attributes.setdefault("http.status_code", request.status)
                span.end()
            if trace is not None:
                trace.finish(request)

    async def _authenticated(self, request: Request) -> UserInfo:
        """Return who asks. Raises 401."""
        server = self.server
        assert server.auth is not None
        authenticator, activity = server.auth.authenticator, server.storage.activity
        begin = perf_counter()
        user: UserInfo | None = None
        try:
            user = authenticator.authenticate_nowait(request) or await authenticator.authenticate(request)
        finally:
            (activity.known if user is not None else activity.unknown).observe(perf_counter() - begin)
        if user is None:
            raise errors.unauthorized()
        activity.came_in(user.name)
        return user

    async def _decide(self, attributes: Attributes) -> tuple[Decision, str]:
        server = self.server
        assert server.auth is not None
        authorizer, activity = server.auth.authorizer, server.storage.activity
        begin = perf_counter()
        decision, reason = authorizer.authorize(attributes)
        if decision is Decision.ASK:
            decision, reason = await authorizer.authorize_async(attributes)
        told = activity.allowed if decision is Decision.ALLOW else activity.denied if decision is Decision.DENY else activity.not_allowed
        told.observe(perf_counter() - begin)
        return decision, reason

    async def _enter(self, seat: Seat, request: Request, info: RequestInfo) -> None:
        """Wait for a seat. Raises 429."""
        server = self.server
        begin = server.loop.time()
        try:
            await seat.enter()
        except StatusError as error:
            server.metrics.terminated(info, request, error.code)
            raise
        finally:
            request.aside_seconds += server.loop.time() - begin

    async def _route(self, request: Request, info: RequestInfo, attributes: Attributes, user: UserInfo) -> None:
        server = self.server
        if not info.is_resource:
            await server.paths.handle(request, user)
            return
        endpoint = server.registry.find(info.group, info.version, info.resource)
        if endpoint is None:
            if await server.delegate(request, info, user):
                return
            if info.group not in BUILTIN_GROUPS:
                respond_no_such_path(request)
                return
            raise errors.route_not_found()
        if request.method == "HEAD" and not info.subresource:
            respond_no_such_path(request, 405)
            return
        if info.namespace and not endpoint.resource.namespaced and not (info.resource == "namespaces" and info.group == ""):
            if endpoint.resource.custom:
                respond_no_such_path(request)
                return
            raise errors.route_not_found()
        connect = server.connects.get(ResourceKey(info.group, info.resource, info.subresource))
        if connect is not None:
            await connect(ConnectRequest(request, attributes, endpoint.resource, info.rest))
            return
        call = Call(server, request, info, endpoint, user)
        request.context = call
        try:
            if server.tracing is None:
                await self._verb(call, info)
            else:
                with inside(SPANS.get(info.verb, info.verb), {"resource": info.resource, "audit-id": call.audit_id}):
                    await self._verb(call, info)
        except StatusError as error:
            if request.done:
                raise
            respond_error(request, error, call.warnings, call.audit_id)
            if server.audit is not None:
                raise

    async def _verb(self, call: Call, info: RequestInfo) -> None:
        server = self.server
        endpoint = call.endpoint
        resource = endpoint.resource
        if info.subresource:
            if info.subresource not in resource.subresources:
                # What is not there is not deprecated.
                call.warnings = []
            await subresources.handle(call)
            return
        verb = info.verb
        if not info.name and verb in ("update", "patch"):
            raise errors.method_not_allowed()
        if endpoint.store is None and verb in ("get", "list") and resource.plural == "componentstatuses":
            await componentstatus.read(call)
            return
        if verb == "create" and endpoint.store is None:
            await subresources.review(call)
            return
        if verb not in resource.verbs and not (verb == "get" and "get" in resource.verbs):
            raise errors.method_not_allowed()
        if resource.namespaced and not info.namespace and verb in ("get", "create", "update", "patch", "delete", "deletecollection"):
            if info.name or verb == "deletecollection":
                raise errors.route_not_found() if info.name else errors.method_not_allowed()
            if verb == "create":
                raise errors.method_not_allowed()
        if server.storage.shared and wants_newest(call.request, info):
            await server.storage.catch_up()
        if verb in READS:
            READS[verb](call)
        elif verb == "create":
            if info.name:
                raise errors.method_not_allowed()
            await create.create(call)
        elif verb == "update":
            await update.update(call, update.mode_of(call))
        elif verb == "patch":
            await patch.patch(call, update.mode_of(call))
        elif verb == "delete":
            await delete.delete(call)
        elif verb == "deletecollection":
            await delete.delete_collection(call)
        else:
            raise errors.method_not_allowed()


def wants_newest(request: Request, info: RequestInfo) -> bool:
    """Whether a request is to see all that is stored: reads that name no revision, or one that may not have come yet."""
    if info.verb not in READS:
        return info.verb == "deletecollection"
    if not request.query_string:
        return True
    version = request.query.get("resourceVersion", ("",))[0]
    return version != "0" and not (version and info.verb == "watch") and not request.query.get("continue", ("",))[0]


def trace_slow(request: Request, info: RequestInfo, seconds: float) -> None:
    """Tell of a slow request, by the names of upstream's traces."""
    call = request.context
    fields: dict[str, Any] = {
        "verb": VERBS.get(info.verb) or request.method, "audit-id": call.audit_id if isinstance(call, Call) else "",
        "client": request.peer[0], "api-group": info.group, "api-version": info.version, "name": info.name, "subresource": info.subresource,
        "namespace": info.namespace, "protocol": f"HTTP/{request.version}", "resource": info.resource, "url": request.path,
        "user-agent": request.headers.get("user-agent", ""), "status": request.status, "total-time-ms": round(1000 * seconds),
    }  # fmt: skip
    log.info("trace", **fields)


def impersonates(request: Request) -> bool:
    """Whether a request has any Impersonate-* header; most have none."""
    for name in request.headers:
        if name.startswith("impersonate-"):
            return True
    return False


def attributes_of(request: Request, info: RequestInfo, user: UserInfo) -> Attributes:
    """Describe a request for authorization."""
    if not info.is_resource:
        return Attributes(user, info.verb, path=request.path, is_resource=False)
    name = info.name
    field_selector = label_selector = ""
    if request.query_string and info.verb in ("list", "watch", "deletecollection"):
        query = request.query
        field_selector = query.get("fieldSelector", [""])[0]
        label_selector = query.get("labelSelector", [""])[0]
        if not name and field_selector.startswith("metadata.name=") and "," not in field_selector:
            name = field_selector[14:].lstrip("=")
    return Attributes(
        user, info.verb, info.group, info.version, info.resource, info.subresource, info.namespace, name, "", True, field_selector, label_selector,
    )  # fmt: skip
