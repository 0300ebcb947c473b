"""The service proxy of one node: watches Services and EndpointSlices, keeps the nftables table true.

Role: cluster wires one per node. `run` lists, loads everything in one transaction, then applies each burst of changes
as one more. Nothing polls: an event marks a Service, a task renders and commits what is marked; while a commit runs in
the worker thread further events gather for the next.
Invariants: only Services whose rendering changed reach the kernel. A Service that the kernel refuses is left out with
an event and tried again later; the others are unaffected. When the table is found changed by somebody else, it is
loaded anew. Ending `run` leaves the rules in place (traffic goes on while a node process restarts); `cleanup` removes
them.
Source: pkg/proxy/nftables/proxier.go.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.clock import now, parse_rfc3339
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, NODES, SERVICES
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.network.direct.services import NOTHING, DirectServices
from knarr.network.machine import Machine, internal_addresses
from knarr.network.nftables import NftError, StateMismatch
from knarr.network.objects import object_key, slice_service
from knarr.network.plainhttp import NOT_FOUND, Answer, PlainServer, plain, prometheus
from knarr.network.proxy.health import HealthServers, ServiceHealth
from knarr.network.proxy.memory import Flows, changed_flows, changed_sticky, forget_clients, forget_flows, udp_frontends
from knarr.network.proxy.metrics import ProxyMetrics
from knarr.network.proxy.model import Rendered, render_service
from knarr.network.proxy.table import EMPTY, ProxyTable
from knarr.network.proxy.topology import NodeView
from knarr.network.tablewatch import TableWatch

log = get_logger(__name__)
T = TypeVar("T")

_ZONE = "topology.kubernetes.io/zone"
_TRIGGER = "endpoints.kubernetes.io/last-change-trigger-time"
_TO_BE_DELETED = "ToBeDeletedByClusterAutoscaler"


class ServiceProxy:
    """See the module.

    Args:
      client: For events.
      informers: Shared informers of the node process.
      node_name: This node; its endpoints are local, its zone label counts for hints.
      table: Name of the nftables table; one owner per name.
      pod_cidrs: The cluster's pod CIDRs: traffic from elsewhere to a cluster IP is masqueraded.
      node_port_addresses: CIDRs of node addresses where node ports answer; empty means all, with 127.0.0.1 for the node's own processes.
      netns: Path of the node's network namespace; None is the process's.
      health_address, health_port: Where /healthz answers; port 0 opens none.
      metrics_address, metrics_port: Where /metrics and /proxyMode answer; port 0 opens none.
      machine: The machine with several nodes: when this node is the machine itself, it serves external addresses for all of them.
      direct: Leads sockets to endpoints before the table has to, where the kernel can; it is closed with the proxy.
    """

    def __init__(
        self,
        client: Client,
        informers: Informers,
        *,
        node_name: str,
        table: str = "knarr",
        pod_cidrs: Sequence[str] = ("10.244.0.0/16",),
        node_port_addresses: Sequence[str] = (),
        netns: str | None = None,
        health_address: str = "0.0.0.0",
        health_port: int = 0,
        metrics_address: str = "127.0.0.1",
        metrics_port: int = 0,
        machine: Machine | None = None,
        direct: DirectServices | None = None,
    ) -> None:
        self._informers = informers
        self._services = informers.get(SERVICES)
        self._slices = informers.get(ENDPOINT_SLICES)
        self._node = informers.get(NODES, field_selector=f"metadata.name={node_name}")
        self._machine = machine
        self._nodes = informers.get(NODES) if machine is not None and machine.node == node_name else None
        self._siblings: frozenset[str] = frozenset()
        self._slices.add_index("service", slice_service)
        self._recorder = EventRecorder(client, "kube-proxy", node_name, api="events.k8s.io/v1")
        self._view = NodeView(node_name)
        self._addresses: tuple[str, ...] = ()
        self._told_addresses: tuple[str, ...] = ()
        self._table = ProxyTable(table, pod_cidrs, node_port_addresses=node_port_addresses, netns=netns)
        self._direct = direct
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="proxy")
        self.metrics = ProxyMetrics()
        self.further_metrics: list[Callable[[], bytes]] = []
        """Metrics of neighbours (policies) that are shown with ours."""
        self._health = HealthServers(self._report, self._node_eligible, self.metrics)
        self._health_place = (health_address, health_port)
        self._status = PlainServer(self._tell)
        self._status_place = (metrics_address, metrics_port)
        self._triggered: list[float] = []
        """Times of what triggered the endpoint changes that wait."""
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._failed: dict[str, Exception] = {}
        self._local_ones: set[str] = set()
        """Services with a health check port, or without an endpoint here though they want one."""
        self._reported: dict[str, str] = {}
        self._loaded = asyncio.Event()
        self._handling = False
        self._lost = False
        self._busy = True
        self._watch = TableWatch(table, self._table_lost, wanted=lambda: self.synced, netns=netns)
        self.commits = 0

    @property
    def synced(self) -> bool:
        """Whether the first complete load is in the kernel."""
        return self._loaded.is_set()

    @property
    def idle(self) -> bool:
        """Whether everything seen so far is in the kernel, stale flows included."""
        return not (self._busy or self._dirty or self._wake.is_set())

    async def wait_synced(self) -> None:
        """Wait for the first complete load."""
        await self._loaded.wait()

    @property
    def rendered(self) -> dict[str, Rendered]:
        """What each Service contributes, for `why` and tests; not to be changed."""
        return self._table.rendered

    async def run(self) -> None:
        """Keep the table true until cancelled."""
        self._subscribe()
        await self._informers.start()
        for informer in (self._services, self._slices, self._node, *([self._nodes] if self._nodes is not None else ())):
            await informer.wait_synced()
        self._read_node()
        for (host, port), listen in ((self._health_place, self._health.listen_own), (self._status_place, self._status.listen)):
            try:
                if port:
                    await listen(host, port)
            except OSError as error:
                log.warning("a port of the proxy for health or metrics cannot be opened", port=port, error=str(error))
        async with Tasks() as tasks:
            try:
                self._watch.start()
                await self._load_until_done()
                tasks.spawn_eternal(self._retry_failed(), "proxy: retry refused services")
                await self._follow()
            finally:
                self._watch.close()
                self._health.close()
                self._status.close()
                await self._recorder.close()

    def _subscribe(self) -> None:
        if self._handling:
            return
        self._handling = True
        self._services.add_handler(self._service_seen, lambda _old, new: self._service_seen(new), self._service_seen)
        self._slices.add_handler(self._slice_seen, self._slice_changed, self._slice_seen)
        self._node.add_handler(lambda _obj: self._node_changed(), lambda _old, _new: self._node_changed())
        if self._nodes is not None:
            self._nodes.add_handler(self._neighbour_seen, self._neighbour_changed, self._neighbour_gone)

    def _table_lost(self) -> None:
        self._lost = True
        self._wake.set()

    def _mark(self, services: Iterable[str]) -> None:
        self._dirty.update(services)
        self._health.queued()
        self.metrics.last_queued.set(now())
        self._wake.set()

    def _service_seen(self, obj: Object) -> None:
        self.metrics.service_changed()
        self._mark([object_key(obj)])

    def _slice_seen(self, obj: Object) -> None:
        self.metrics.endpoints_changed()
        trigger = (obj["metadata"].get("annotations") or {}).get(_TRIGGER)
        # What was there before the first load was triggered long ago.
        if trigger and self.synced:
            with contextlib.suppress(ValueError):
                self._triggered.append(parse_rfc3339(trigger))
        self._mark(slice_service(obj))

    def _slice_changed(self, old: Object, new: Object) -> None:
        if (
            old.get("endpoints") != new.get("endpoints")
            or old.get("ports") != new.get("ports")
            or old["metadata"].get("labels") != new["metadata"].get("labels")
        ):
            self._slice_seen(new)
            self._mark(slice_service(old))

    def _read_node(self) -> None:
        node = self._node.get(None, self._view.name)
        labels = (node["metadata"].get("labels") or {}) if node else {}
        self._view = NodeView(self._view.name, labels.get(_ZONE, ""), self._siblings)
        self._addresses = internal_addresses(node) if node else ()

    def _neighbour_seen(self, node: Object) -> None:
        assert self._machine is not None
        self._count_sibling(node, self._machine.holds(node))

    def _neighbour_changed(self, old: Object, new: Object) -> None:
        # Heartbeats change a node's status all the time.
        if internal_addresses(old) != internal_addresses(new):
            self._neighbour_seen(new)

    def _neighbour_gone(self, node: Object) -> None:
        self._count_sibling(node, held=False)

    def _count_sibling(self, node: Object, held: bool) -> None:
        name = {node["metadata"]["name"]}
        siblings = self._siblings | name if held else self._siblings - name
        if siblings != self._siblings:
            self._siblings = siblings
            self._node_changed()

    def _node_eligible(self) -> bool:
        """Whether load balancers may send this node new connections: it is not about to be removed."""
        node = self._node.get(None, self._view.name)
        if node is None or node["metadata"].get("deletionTimestamp"):
            return False
        return all(taint.get("key") != _TO_BE_DELETED for taint in (node.get("spec") or {}).get("taints") or ())

    def _tell(self, path: str) -> Answer:
        if path == "/metrics":
            return prometheus(b"".join([self.metrics.render(), *(render() for render in self.further_metrics)]))
        if path == "/proxyMode":
            return plain(200, "nftables")
        if path in ("/healthz", "/livez"):
            return plain(200, "ok")
        return NOT_FOUND

    def _node_changed(self) -> None:
        before = self._view, self._addresses
        self._read_node()
        if before != (self._view, self._addresses) and self.synced:
            self._mark(self._all_keys())

    def _all_keys(self) -> list[str]:
        return [object_key(obj) for obj in self._services.list()]

    def _render(self, key: str) -> Rendered:
        namespace, _slash, name = key.partition("/")
        service = self._services.get(namespace, name)
        if service is None:
            return EMPTY
        try:
            rendered = render_service(service, self._slices.by_index("service", key), self._view)
        except (ValueError, KeyError, TypeError) as error:
            # The API server checks what it stores; whatever slipped through must not stop the others.
            self._report(key, f"cannot be served: {error!r}")
            return EMPTY
        if rendered.problems:
            self._report(key, "; ".join(rendered.problems))
        return rendered

    def _report(self, key: str, message: str) -> None:
        if self._reported.get(key) == message:
            return
        self._reported[key] = message
        log.warning("service is not fully served", service=key, reason=message)
        namespace, _slash, name = key.partition("/")
        service = self._services.get(namespace, name)
        if service is not None:
            self._recorder.event(service, "Warning", "FailedToProxy", message, action="SyncServiceRules")

    def _tell_node(self, why: str) -> None:
        """No Service is served here: that is the node's trouble."""
        node = self._node.get(None, self._view.name)
        if node is not None and self._reported.get("") != why:
            self._reported[""] = why
            self._recorder.event(node, "Warning", "FailedToProxy", f"the service rules cannot be loaded: {why}", action="SyncServiceRules")

    async def _in_worker(self, function: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, function))

    async def _load_until_done(self) -> None:
        backoff = Backoff(0.2, 30.0)
        while True:
            try:
                await self._load()
                return
            except (NftError, OSError, StateMismatch) as error:
                self.metrics.failed()
                log.error("the service table cannot be loaded, will retry", table=self._table.name, error=str(error))
                self._tell_node(str(error))
                await backoff.sleep()

    async def _load(self) -> None:
        started = time.perf_counter()
        self._dirty.clear()
        self._local_ones.clear()
        self.metrics.taken()
        wanted = {}
        for count, key in enumerate(self._all_keys()):
            wanted[key] = self._render(key)
            if count % 200 == 199:
                await asyncio.sleep(0)
        self._note(await self._in_worker(lambda: self._write(wanted, whole=True)), wanted)
        self.metrics.synced(time.perf_counter() - started, now(), whole=True)
        await self._forget(udp_frontends(wanted.values()))
        await self._after_commit()
        self._loaded.set()

    def _write(self, wanted: dict[str, Rendered], *, whole: bool) -> dict[str, Exception]:
        failures = self._table.load(wanted) if whole else self._table.change(wanted)
        self._told_addresses = addresses = self._addresses
        if self._direct is not None:
            offers = {key: NOTHING if key in failures else rendered.offer for key, rendered in wanted.items()}
            try:
                self._direct.set_node_addresses(addresses)
                if whole:
                    self._direct.load(offers)
                    self._direct.attach()
                else:
                    self._direct.change(offers)
            except OSError as error:
                log.warning("sockets are not led to endpoints, all connections to Services are translated", error=str(error))
                self._direct.close()
                self._direct = None
        return failures

    async def _forget(self, flows: Flows) -> None:
        if flows:
            started = time.perf_counter()
            self.metrics.forgot(await self._in_worker(lambda: forget_flows(self._table, flows)), time.perf_counter() - started)

    async def _follow(self) -> None:
        backoff = Backoff(0.2, 30.0)
        while True:
            self._busy = False
            await self._wake.wait()
            self._busy = True
            self._wake.clear()
            # One turn of the loop lets the rest of a burst in.
            await asyncio.sleep(0)
            if not self._dirty and not self._lost:
                continue
            try:
                if self._lost:
                    self._lost = False
                    await self._load()
                else:
                    await self._apply_dirty()
                backoff.reset()
            except (NftError, OSError, StateMismatch) as error:
                log.warning("the service table was changed by somebody else or cannot be written; loading it anew", error=str(error))
                await backoff.sleep()
                await self._load_until_done()

    async def _apply_dirty(self) -> None:
        started = time.perf_counter()
        keys, self._dirty = self._dirty, set()
        triggered, self._triggered = self._triggered, []
        self.metrics.taken()
        wanted = {}
        former = {}
        for key in keys:
            rendered = self._render(key)
            old = self._table.rendered.get(key, EMPTY)
            if rendered != old:
                wanted[key], former[key] = rendered, old
            if not rendered.problems and key not in self._failed:
                self._reported.pop(key, None)
        if not wanted and self._addresses == self._told_addresses:
            self._health.updated()
            return
        self._note(await self._in_worker(lambda: self._write(wanted, whole=False)), wanted)
        self.metrics.synced(time.perf_counter() - started, now(), whole=False)
        for trigger in triggered:
            self.metrics.programmed(now() - trigger)
        await self._forget(changed_flows(former, wanted))
        if sticky := changed_sticky(former, wanted):
            await self._in_worker(lambda: forget_clients(self._table, sticky))
        await self._after_commit()

    def _note(self, failures: dict[str, Exception], wanted: dict[str, Rendered]) -> None:
        for key, rendered in wanted.items():
            self._failed.pop(key, None)
            if rendered.health_port or rendered.no_local:
                self._local_ones.add(key)
            else:
                self._local_ones.discard(key)
        for key, error in failures.items():
            self.metrics.failed()
            self._failed[key] = error
            self._report(key, f"the kernel refused its rules: {error}")
        self.commits += 1

    async def _after_commit(self) -> None:
        self._health.updated()
        ports = {}
        no_local = {"internal": 0, "external": 0}
        for key in self._local_ones:
            rendered = self._table.rendered.get(key, EMPTY)
            if rendered.health_port:
                namespace, _slash, name = key.partition("/")
                ports[rendered.health_port] = ServiceHealth(namespace, name, rendered.local_endpoints)
            for policy in rendered.no_local:
                no_local[policy] += 1
        for policy, count in no_local.items():
            self.metrics.no_local(policy, count)
        await self._health.sync(ports)

    async def _retry_failed(self) -> None:
        while True:
            await asyncio.sleep(30)
            if self._failed:
                self._mark(list(self._failed))

    async def cleanup(self) -> None:
        """Remove the table and close; call after `run` has ended."""
        await self._in_worker(self._table.remove)
        await self.close()

    async def close(self) -> None:
        """Close sockets and the worker; the table stays."""
        await self._in_worker(self._table.close)
        if self._direct is not None:
            self._direct.close()
        self._worker.shutdown(wait=False)
