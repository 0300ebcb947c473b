"""The API server: builds its parts, starts and stops them in order. Callers: knarr.cluster, knarr.testing.

Order of start: store loaded, auth and admission built on the loaded caches, default objects written, then listening.
Order of stop: not ready, a delay if so configured, no new connections, watches ended, running requests get a grace period, store closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import Callable, Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.apiserver import bootstrap, celtimes, peers
from knarr.apiserver.activity import cache_lines, cluster_lines
from knarr.apiserver.aggregation.extension import Extensions
from knarr.apiserver.aggregation.registration import Registration
from knarr.apiserver.attributes import AdmissionChain, Attributes, Auth, ConnectHandler, Decision, ResourceKey, UserInfo
from knarr.apiserver.audit import Audit, no_audit
from knarr.apiserver.call import Call, respond_error
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.crd.controller import CustomResources
from knarr.apiserver.discovery import Discovery
from knarr.apiserver.features import metrics as feature_metrics
from knarr.apiserver.flow import FlowControl
from knarr.apiserver.metrics import Metrics
from knarr.apiserver.openapi import OpenAPI
from knarr.apiserver.paths import Paths, build_info
from knarr.apiserver.pipeline import Pipeline
from knarr.apiserver.registry import all as builtin
from knarr.apiserver.registry.sharedports import repair_for_ever
from knarr.apiserver.requestinfo import RequestInfo
from knarr.apiserver.storage import Storage
from knarr.apiserver.store import ResourceStore, new_uid
from knarr.apiserver.tables import table_of
from knarr.apiserver.tracing import Tracing
from knarr.apiserver.watching import Watcher, close_watchers
from knarr.http.anycertificate import ask_only
from knarr.http.server import HTTPServer, Request
from knarr.storage.factory import open_store
from knarr.storage.protocol import RevisionStore

if TYPE_CHECKING:
    from knarr.apiserver.encryption import Encryption

log = get_logger(__name__)
_NO_CHECK_TIME = 0x200000
"""OpenSSL's X509_V_FLAG_NO_CHECK_TIME, which the ssl module has no name for."""

BOOKMARK_SECONDS = 60.0
IDENTITY_SECONDS = 10.0
WITHDRAWAL_SECONDS = 3.0


class APIServer:
    """See the module's docstring. Implements Services of attributes.py."""

    def __init__(self, config: APIServerConfig) -> None:
        self.config = config
        self.tasks = Tasks()
        self.instance_id = new_uid()
        self.encryption: Encryption | None = None
        self.storage = Storage(self._open_store())
        self.registry = builtin.Registry()
        self.auth: Auth | None = None
        self.admission: AdmissionChain | None = None
        self.connects: dict[ResourceKey, ConnectHandler] = {}
        self.loop = asyncio.get_running_loop()
        """Kept because asking for it is a system call in Python 3.11."""
        self.metrics = Metrics(self.loop.time)
        self.flow = FlowControl(self)
        self.audit: Audit | None = Audit(config) if config.audit_policy else None
        self.tracing: Tracing | None = Tracing(config.tracing_config, self.instance_id) if config.tracing_config else None
        self.discovery = Discovery(self)
        self.openapi = OpenAPI(self)
        self.paths = Paths(self)
        self.pipeline = Pipeline(self)
        self.port = config.port
        self.stopping = False
        self.delegates: list[Callable[[Request, str, UserInfo], Coroutine[Any, Any, bool]]] = []
        """Asked in turn about paths nobody here serves (extension API servers): True when answered."""
        self._ready = False
        self._http: HTTPServer | None = None
        self._context: ssl.SSLContext | None = None
        self._watchers: set[Watcher] = set()
        self._bookmark_timer: asyncio.TimerHandle | None = None

    def _open_store(self) -> RevisionStore:
        config = self.config
        if not config.encryption_config:
            return open_store(config.store)
        from knarr.apiserver.encryption import Encryption, Measures, server_identity
        from knarr.storage.encryption import EncryptedStore

        measures = Measures(server_identity(config))
        store = EncryptedStore(open_store(config.store), config.encryption_config, measures)
        self.encryption = Encryption(config, store, measures)
        return store

    # -- life ------------------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Load, build, write what every cluster has, and listen.

        Raises:
          OSError: the address is taken, a file is missing.
          UnavailableError: the store cannot be opened.
        """
        config = self.config
        builtin.build(self.registry, self.storage, self, table_of, event_ttl_seconds=config.event_ttl_seconds, also=config.runtime_config)
        await self.storage.start()
        from knarr.apiserver.auth.setup import build_auth

        self.metrics.sources += [
            self.flow.metrics, self.storage.metrics, self.storage.activity.lines, lambda: cache_lines(self), lambda: cluster_lines(self), build_info, lambda: feature_metrics(config.feature_gates), celtimes.lines, lambda: self.metrics.deprecated(self._is_deprecated),
        ]  # fmt: skip
        if self.encryption is not None:
            self.metrics.sources.append(self.encryption.metrics)
            if self.encryption.reloads is not None:
                self.tasks.spawn_eternal(self.encryption.reloads.follow(), "configuration-reload")
        self.auth = auth = build_auth(self)
        self.metrics.sources += [auth.authenticator.metrics, *(one.metrics for one in auth.reloads)]
        self.paths.handlers.update(auth.paths)
        self._build_optional()
        # The socket is bound first, so that the port is known to the objects written below; nobody is answered before them.
        self._http = HTTPServer(self.pipeline.handle, fast=self.pipeline.fast, ssl_context=self._tls(), max_body_bytes=3 << 20)
        if config.listen_sock is not None:
            self.port = config.listen_sock.getsockname()[1]
        await bootstrap.bootstrap(self)
        await auth.start()
        if self.admission is not None:
            await self.admission.start()
        for start in self._starters:
            await start()
        if config.listen_sock is not None:
            await self._http.listen_socket(config.listen_sock)
        else:
            self.port = await self._http.listen(config.bind_address, config.port)
            if self.port != config.port:
                await bootstrap.kubernetes_service(self)
        self._ready = True
        self._bookmark_timer = asyncio.get_running_loop().call_later(BOOKMARK_SECONDS, self._bookmarks)
        self.tasks.spawn_eternal(self._renew_identity(), "identity-lease")
        if self.storage.shared:
            self.tasks.spawn_eternal(repair_for_ever(self.store("", "services")), "node-port-repair")
        log.info("API server is serving", port=self.port)

    def _build_optional(self) -> None:
        """Parts that other folders bring: admission, proxies to kubelets, custom resources, aggregation."""
        self._starters: list[Callable[[], Coroutine[Any, Any, None]]] = []
        from knarr.apiserver.admission.chain import build_admission
        from knarr.apiserver.proxy.setup import build_connect

        self.admission = chain = build_admission(self)
        self.metrics.sources.append(chain.metrics)
        self.metrics.sources.append(self.audit.metrics if self.audit is not None else no_audit)
        self.registration = Registration(self)
        self._starters += [self.flow.start, self.registration.start, CustomResources(self).start, Extensions(self).start]
        self.connects.update(build_connect(self))

    async def stop(self) -> None:
        """Stop serving; idempotent."""
        if self.stopping:
            return
        # From here on /readyz fails; everything else goes on for a while.
        self.stopping = True
        if self.storage.shared and self._ready:
            # New clients go to the other servers from now on.
            with contextlib.suppress(StatusError, TimeoutError):
                async with asyncio.timeout(WITHDRAWAL_SECONDS):
                    await bootstrap.publish_endpoints(self, await peers.withdraw(self))
        if self.config.shutdown_delay_seconds and self._ready:
            await asyncio.sleep(self.config.shutdown_delay_seconds)
        self._ready = False
        if self._bookmark_timer is not None:
            self._bookmark_timer.cancel()
        if self._http is not None:
            await self._http.stop_listening()
        for cache in self.storage.caches.values():
            close_watchers(cache)
        if self._http is not None:
            await self._http.close(grace_seconds=self.config.shutdown_grace_seconds)
        await self.tasks.close()
        if self.admission is not None:
            await self.admission.close()
        if self.auth is not None:
            await self.auth.close()
        if self.audit is not None:
            await self.audit.close()
        if self.tracing is not None:
            await self.tracing.close()
        await self.storage.close()

    def _tls(self) -> ssl.SSLContext | None:
        config = self.config
        if not config.serving_cert:
            return None
        self._context = context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(config.serving_cert, config.serving_key)
        if (config.client_ca or config.requestheader_client_ca) and not ask_only(context):
            for path in filter(None, (config.client_ca, config.requestheader_client_ca)):
                context.load_verify_locations(path)
            context.verify_mode = ssl.CERT_OPTIONAL
            # An expired certificate is answered with 401, as upstream does, not with a broken connection: auth.authenticate looks at time.
            context.verify_flags |= ssl.VerifyFlags(_NO_CHECK_TIME)
        context.set_alpn_protocols(["http/1.1"])
        return context

    # -- Services ----------------------------------------------------------------------------------------------------------------
    def store(self, group: str, resource: str) -> ResourceStore:
        return self.registry.stores[group, resource]

    def _is_deprecated(self, group: str, version: str, resource: str) -> bool:
        endpoint = self.registry.endpoints.get((group, version, resource))
        return endpoint is not None and bool(endpoint.warnings) and not endpoint.resource.custom

    def is_ready(self) -> bool:
        return self._ready

    def store_trouble(self) -> str:
        """Return why the store cannot be used, "" when it can."""
        return str(getattr(self.storage.store, "trouble", "") or "")

    @property
    def advertise_address(self) -> str:
        config = self.config
        if config.advertise_address:
            return config.advertise_address
        return config.bind_address if config.bind_address not in ("0.0.0.0", "::", "") else "127.0.0.1"

    def serving_renewed(self) -> None:
        """The files of the serving certificate have become others: new connections get it."""
        if self._context is not None:
            self._context.load_cert_chain(self.config.serving_cert, self.config.serving_key)

    async def move(self, address: str) -> None:
        """The machine has another address: tell clients in the cluster, and show the serving certificate that was written for it."""
        self.config.advertise_address = address
        self.serving_renewed()
        await bootstrap.publish_endpoints(self)
        log.info("API server has another address", address=address)

    @property
    def auditing(self) -> bool:
        return self.audit is not None

    @property
    def anonymous_everywhere(self) -> bool:
        return "*" in self.config.anonymous_paths

    # -- for the pipeline and the verbs --------------------------------------------------------------------------------------------
    async def decide(self, attributes: Attributes) -> tuple[Decision, str]:
        """Ask the authorizer, waiting if it must."""
        assert self.auth is not None
        decision, reason = self.auth.authorizer.authorize(attributes)
        if decision is Decision.ASK:
            decision, reason = await self.auth.authorizer.authorize_async(attributes)
        return decision, reason

    def forbidden(self, attributes: Attributes, reason: str) -> StatusError:
        from knarr.apiserver.auth.forbidden import forbidden_error

        return forbidden_error(attributes, reason)

    def admission_for(self, operation: str, resource: Resource, subresource: str) -> AdmissionChain | None:
        """Return the admission chain if it has anything to do with such an operation."""
        admission = self.admission
        return admission if admission is not None and admission.concerns(operation, resource, subresource) else None

    def spawn_call(self, call: Call, work: Coroutine[Any, Any, None]) -> None:
        """Go on with a call in a task of its own; its errors become the answer."""
        self.tasks.spawn(self._guard(call, work), "api-call")

    async def _guard(self, call: Call, work: Coroutine[Any, Any, None]) -> None:
        try:
            await work
        except StatusError as error:
            if not call.request.done:
                respond_error(call.request, error, call.warnings, call.audit_id)
        except Exception as error:
            log.error("request failed", path=call.request.path, exc_info=error)
            if not call.request.done:
                respond_error(call.request, errors.internal(str(error)), call.warnings, call.audit_id)

    def watch_started(self, call: Call, watcher: Watcher) -> None:
        self._watchers.add(watcher)
        call.request.lasting = True
        self.metrics.watching(call.info, 1)

    def watch_ended(self, call: Call) -> Callable[[], None]:
        info, metrics, audit, request = call.info, self.metrics, self.audit, call.request

        def ended() -> None:
            metrics.watching(info, -1)
            metrics.observe(info, request)
            if audit is not None:
                audit.watch_ended(request)

        return ended

    def _bookmarks(self) -> None:
        """Once a minute every watcher that wants them learns how far it has seen."""
        self._watchers = {watcher for watcher in self._watchers if not watcher.ended}
        for watcher in self._watchers:
            watcher.send_bookmark()
        now = monotonic()
        for cache in self.storage.caches.values():
            cache.trim(now)
        self._bookmark_timer = asyncio.get_running_loop().call_later(BOOKMARK_SECONDS, self._bookmarks)

    async def delegate(self, request: Request, info: RequestInfo, user: UserInfo) -> bool:
        """Let somebody else answer for a group this server does not have; False when there is nobody."""
        for other in self.delegates:
            if await other(request, f"{info.group}/{info.version}", user):
                return True
        return False

    async def delegate_path(self, request: Request, user: UserInfo) -> bool:
        """The same for a discovery path."""
        parts = request.path.strip("/").split("/")
        if parts[0] != "apis" or len(parts) < 2:
            return False
        for other in self.delegates:
            if await other(request, "/".join(parts[1:3]), user):
                return True
        return False

    async def _renew_identity(self) -> None:
        while True:
            with contextlib.suppress(StatusError):
                await bootstrap.renew_identity(self)
                await bootstrap.forget_old_identities(self)
                if self.storage.shared and not self.stopping:
                    await bootstrap.publish_endpoints(self)
            await asyncio.sleep(IDENTITY_SECONDS)
