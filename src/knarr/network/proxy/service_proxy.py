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
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.clock import now
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import ENDPOINT_SLICES, NODES, SERVICES
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.network import conntrack
from knarr.network.nftables import NftError, StateMismatch
from knarr.network.objects import object_key, slice_service
from knarr.network.proxy.health import HealthServers, ServiceHealth
from knarr.network.proxy.model import Rendered, UdpFlow, render_service
from knarr.network.proxy.table import EMPTY, ProxyTable
from knarr.network.proxy.topology import NodeView
from knarr.network.tablewatch import TableWatch

log = get_logger(__name__)
T = TypeVar("T")

_ZONE = "topology.kubernetes.io/zone"


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
    ) -> None:
        self._informers = informers
        self._services = informers.get(SERVICES)
        self._slices = informers.get(ENDPOINT_SLICES)
        self._node = informers.get(NODES, field_selector=f"metadata.name={node_name}")
        self._slices.add_index("service", slice_service)
        self._recorder = EventRecorder(client, "kube-proxy", node_name, api="events.k8s.io/v1")
        self._view = NodeView(node_name)
        self._table = ProxyTable(table, pod_cidrs, node_port_addresses=node_port_addresses, netns=netns)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="proxy")
        self._health = HealthServers(lambda: self.synced, self._report)
        self._health_place = (health_address, health_port)
        self._dirty: set[str] = set()
        self._wake = asyncio.Event()
        self._failed: dict[str, Exception] = {}
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
        for informer in (self._services, self._slices, self._node):
            await informer.wait_synced()
        self._read_node()
        if self._health_place[1]:
            try:
                await self._health.listen_own(*self._health_place)
            except OSError as error:
                log.warning("the proxy's health port cannot be opened", port=self._health_place[1], error=str(error))
        async with Tasks() as tasks:
            try:
                self._watch.start()
                await self._load_until_done()
                tasks.spawn_eternal(self._retry_failed(), "proxy: retry refused services")
                await self._follow()
            finally:
                self._watch.close()
                await self._health.close()
                await self._recorder.close()

    def _subscribe(self) -> None:
        if self._handling:
            return
        self._handling = True
        self._services.add_handler(self._service_seen, lambda _old, new: self._service_seen(new), self._service_seen)
        self._slices.add_handler(self._slice_seen, self._slice_changed, self._slice_seen)
        self._node.add_handler(lambda _obj: self._node_changed(), lambda _old, _new: self._node_changed())

    def _table_lost(self) -> None:
        self._lost = True
        self._wake.set()

    def _mark(self, services: Iterable[str]) -> None:
        self._dirty.update(services)
        self._wake.set()

    def _service_seen(self, obj: Object) -> None:
        self._mark([object_key(obj)])

    def _slice_seen(self, obj: Object) -> None:
        self._mark(slice_service(obj))

    def _slice_changed(self, old: Object, new: Object) -> None:
        if (
            old.get("endpoints") != new.get("endpoints")
            or old.get("ports") != new.get("ports")
            or old["metadata"].get("labels") != new["metadata"].get("labels")
        ):
            self._mark({*slice_service(old), *slice_service(new)})

    def _read_node(self) -> None:
        node = self._node.get(None, self._view.name)
        labels = (node["metadata"].get("labels") or {}) if node else {}
        self._view = NodeView(self._view.name, labels.get(_ZONE, ""))

    def _node_changed(self) -> None:
        before = self._view
        self._read_node()
        if before != self._view and self.synced:
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

    async def _in_worker(self, function: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, function))

    async def _load_until_done(self) -> None:
        backoff = Backoff(0.2, 30.0)
        while True:
            try:
                await self._load()
                return
            except (NftError, OSError, StateMismatch) as error:
                log.error("the service table cannot be loaded, will retry", table=self._table.name, error=str(error))
                await backoff.sleep()

    async def _load(self) -> None:
        self._dirty.clear()
        wanted = {}
        for count, key in enumerate(self._all_keys()):
            wanted[key] = self._render(key)
            if count % 200 == 199:
                await asyncio.sleep(0)
        self._note(await self._in_worker(lambda: self._table.load(wanted)), wanted)
        flows = _udp_frontends(wanted.values())
        if flows:
            await self._in_worker(lambda: _forget(self._table, flows))
        await self._after_commit()
        self._loaded.set()

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
        keys, self._dirty = self._dirty, set()
        wanted = {}
        former = {}
        for key in keys:
            rendered = self._render(key)
            old = self._table.rendered.get(key, EMPTY)
            if rendered != old:
                wanted[key], former[key] = rendered, old
            if not rendered.problems and key not in self._failed:
                self._reported.pop(key, None)
        if not wanted:
            return
        self._note(await self._in_worker(lambda: self._table.change(wanted)), wanted)
        flows = _changed_flows(former, wanted)
        sticky = _changed_sticky(former, wanted)
        if flows:
            await self._in_worker(lambda: _forget(self._table, flows))
        if sticky:
            await self._in_worker(lambda: _forget_clients(self._table, sticky))
        await self._after_commit()

    def _note(self, failures: dict[str, Exception], wanted: dict[str, Any]) -> None:
        for key in wanted:
            self._failed.pop(key, None)
        for key, error in failures.items():
            self._failed[key] = error
            self._report(key, f"the kernel refused its rules: {error}")
        self.commits += 1

    async def _after_commit(self) -> None:
        self._health.updated_at = now()
        ports = {}
        for key, rendered in self._table.rendered.items():
            if rendered.health_port:
                namespace, _slash, name = key.partition("/")
                ports[rendered.health_port] = ServiceHealth(namespace, name, rendered.local_endpoints)
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
        self._worker.shutdown(wait=False)


def _udp_frontends(rendered: Iterable[Rendered]) -> dict[UdpFlow, frozenset[tuple[str, int]]]:
    flows: dict[UdpFlow, frozenset[tuple[str, int]]] = {}
    for item in rendered:
        flows.update(item.udp)
    return flows


def _changed_flows(former: dict[str, Rendered], wanted: dict[str, Rendered]) -> dict[UdpFlow, frozenset[tuple[str, int]]]:
    """UDP frontends that lost an endpoint, got their first, or are gone, with the endpoints that may stay."""
    flows: dict[UdpFlow, frozenset[tuple[str, int]]] = {}
    for key, new in wanted.items():
        old = former[key]
        for flow in old.udp.keys() | new.udp.keys():
            before, after = old.udp.get(flow, frozenset()), new.udp.get(flow, frozenset())
            if before - after or (after and not before):
                flows[flow] = after
    return flows


def _changed_sticky(former: dict[str, Rendered], wanted: dict[str, Rendered]) -> dict[tuple[str, bytes], frozenset[bytes]]:
    changed: dict[tuple[str, bytes], frozenset[bytes]] = {}
    for key, new in wanted.items():
        for place, before in former[key].sticky.items():
            after = new.sticky.get(place, frozenset())
            if before - after:
                changed[place] = after
    return changed


def _forget(table: ProxyTable, flows: dict[UdpFlow, frozenset[tuple[str, int]]]) -> None:
    """Delete tracked UDP flows that lead where the frontend does not any more."""
    ports = {port: places for (address, port), places in flows.items() if not address}

    def is_stale(flow: conntrack.Flow) -> bool:
        places = flows.get((flow.target_address, flow.target_port))
        if places is None:
            places = ports.get(flow.target_port)
            # A port number alone may also be some foreign server's: only what was translated, or aimed at this node, is ours.
            if places is None or flow.reply_address == flow.target_address:
                return False
        return (flow.reply_address, flow.reply_port) not in places

    from knarr.network.netlink import NetlinkError

    try:
        conntrack.forget_stale(table.socket(), is_stale)
    except NetlinkError as error:
        log.warning("stale UDP flows cannot be deleted", error=str(error))


def _forget_clients(table: ProxyTable, sticky: dict[tuple[str, bytes], frozenset[bytes]]) -> None:
    """Make session affinity forget clients that were sent to endpoints which are gone."""
    for version in {name[-1] for name, _key in sticky}:
        length = 4 if version == "4" else 16
        stale = []
        for key, data in table.elements(f"affinity{version}"):
            frontend = key[length:]
            allowed = sticky.get((f"sticky{version}", frontend))
            if allowed is None and (f"service{version}", frontend) not in table.rendered_keys():
                allowed = sticky.get((f"port_sticky{version}", frontend[length:]))
            if allowed is not None and data not in allowed:
                stale.append(key)
        table.delete_elements(f"affinity{version}", stale)
