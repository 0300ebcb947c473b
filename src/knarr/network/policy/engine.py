"""Network policy of one node: watches Pods, Namespaces and NetworkPolicies, keeps the policy table true.

Role: cluster runs one per node beside the proxy. Events change `PolicyState`; a task commits what has gathered as one
transaction in a worker thread.
Invariants: as long as `run` has not loaded once, nothing is filtered. A policy with a part that cannot be enforced
allows less, never more, and says so in an event. Ending `run` leaves the table in force; `cleanup` removes it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.api.resources import NAMESPACES, NETWORK_POLICIES, PODS
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.network.nftables import StateMismatch
from knarr.network.objects import object_key
from knarr.network.policy.model import compile_policy, read_pod
from knarr.network.policy.state import PolicyState
from knarr.network.policy.table import OnIsolate, PolicyTable
from knarr.network.tablewatch import TableWatch

log = get_logger(__name__)
T = TypeVar("T")


def trim_pod(obj: Object) -> Object:
    """Keep of a Pod what policies, `why` and the DNS server read; a node holds every pod of the cluster here."""
    meta, spec, status = obj["metadata"], obj.get("spec") or {}, obj.get("status") or {}
    containers = [
        {"name": container.get("name", ""), "ports": container["ports"]}
        for container in spec.get("containers") or ()
        if container.get("ports")
    ]
    sidecars = [
        {"name": container.get("name", ""), "ports": container["ports"], "restartPolicy": "Always"}
        for container in spec.get("initContainers") or ()
        if container.get("ports") and container.get("restartPolicy") == "Always"
    ]
    kept_meta = {name: meta[name] for name in ("name", "namespace", "uid", "labels", "resourceVersion") if name in meta}
    kept_spec = {name: spec[name] for name in ("nodeName", "hostNetwork", "dnsConfig") if name in spec}
    if spec.get("dnsPolicy") not in (None, "ClusterFirst"):
        kept_spec["dnsPolicy"] = spec["dnsPolicy"]
    kept_status = {name: status[name] for name in ("phase", "podIP", "podIPs") if name in status}
    return {"metadata": kept_meta, "spec": {**kept_spec, "containers": containers, "initContainers": sidecars}, "status": kept_status}


class PolicyMetrics:
    """What the engine tells of itself; there are no names of others to follow."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        buckets = [0.001 * 2**i for i in range(15)]
        self.sync = Histogram("knarr_policy_sync_duration_seconds", "Seconds to bring the policy table up to date", buckets=buckets, registry=registry)
        self.failures = Counter("knarr_policy_sync_failures", "Refused changes of the policy table", registry=registry)
        self.policies = Gauge("knarr_policy_policies", "NetworkPolicies known", registry=registry)
        self.isolated = Gauge("knarr_policy_isolated_addresses", "Addresses of this node's pods that some policy isolates", registry=registry)

    def render(self) -> bytes:
        """The text format."""
        return bytes(generate_latest(self._registry))


class PolicyEngine:
    """See the module.

    Args:
      table: Name of the nftables table; one owner per name.
      netns: Path of the node's network namespace; None is the process's.
      on_isolate: See PolicyTable.
    """

    def __init__(
        self,
        client: Client,
        informers: Informers,
        *,
        node_name: str,
        table: str = "knarr-policy",
        netns: str | None = None,
        on_isolate: OnIsolate | None = None,
    ) -> None:
        self._informers = informers
        self._pods = informers.get(PODS, transform=trim_pod)
        self._namespaces = informers.get(NAMESPACES)
        self._policies = informers.get(NETWORK_POLICIES)
        self._recorder = EventRecorder(client, "knarr-policy", node_name)
        self.state = PolicyState(node_name)
        self._table = PolicyTable(table, netns=netns, on_isolate=on_isolate)
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="policy")
        self._wake = asyncio.Event()
        self._loaded = asyncio.Event()
        self._subscribed = False
        self._lost = False
        self._watch = TableWatch(table, self._table_lost, wanted=lambda: self.synced, netns=netns)
        self.metrics = PolicyMetrics()
        self._early: dict[str, list[str]] = {}
        """Addresses of this node's pods that the API does not know yet."""
        self._commits = 0
        self._committed = asyncio.Condition()

    @property
    def synced(self) -> bool:
        """Whether the first complete load is in the kernel."""
        return self._loaded.is_set()

    async def wait_synced(self) -> None:
        """Wait for the first complete load."""
        await self._loaded.wait()

    async def run(self) -> None:
        """Keep the table true until cancelled."""
        self._subscribe()
        await self._informers.start()
        for informer in (self._namespaces, self._policies, self._pods):
            await informer.wait_synced()
        backoff = Backoff(0.2, 30.0)
        load = True
        self._watch.start()
        try:
            while True:
                self._wake.clear()
                load, self._lost = load or self._lost, False
                wanted = self.state.wanted()
                started = time.perf_counter()
                try:
                    if load:
                        await self._in_worker(lambda: self._table.load(wanted))  # noqa: B023
                    else:
                        await self._in_worker(lambda: self._table.change(wanted))  # noqa: B023
                except (OSError, StateMismatch) as error:
                    self.metrics.failures.inc()
                    log.warning("policies are not in force as they should, will load anew", error=str(error))
                    load = True
                    await backoff.sleep()
                    continue
                load = False
                backoff.reset()
                self.metrics.sync.observe(time.perf_counter() - started)
                self.metrics.policies.set(len(self.state.policies))
                self.metrics.isolated.set(len(wanted.isolated))
                self._loaded.set()
                self._commits += 1
                async with self._committed:
                    self._committed.notify_all()
                await self._wake.wait()
                # One turn of the loop lets the rest of a burst in.
                await asyncio.sleep(0)
        finally:
            self._watch.close()
            await self._recorder.close()

    def _table_lost(self) -> None:
        self._lost = True
        self._wake.set()

    async def admit(self, namespace: str, name: str, ips: Sequence[str], timeout_seconds: float = 1.0) -> None:
        """Put the policies of a pod of this node in force before its containers start.

        The pod network calls it with a pod's fresh addresses; the API learns them only later. Waits only for pods that some policy isolates, and
        never longer than the timeout: a pod must not hang on us.
        """
        obj = self._pods.get(namespace, name)
        key = f"{namespace}/{name}"
        if obj is None or not self.synced:
            return
        self._early[key] = list(ips)
        self._pod_seen(obj)
        if not self.state.isolated(key):
            return
        # A commit that is under way may have begun before us; the one after it has us for certain.
        wanted = self._commits + 2
        self._wake.set()
        try:
            async with asyncio.timeout(timeout_seconds), self._committed:
                await self._committed.wait_for(lambda: self._commits >= wanted or self._idle_since(wanted))
        except TimeoutError:
            log.warning("policies of a new pod are late", pod=key)

    def _idle_since(self, wanted: int) -> bool:
        return self._commits >= wanted - 1 and not self._wake.is_set()

    def _subscribe(self) -> None:
        if self._subscribed:
            return
        self._subscribed = True
        self._namespaces.add_handler(self._namespace_seen, lambda _old, new: self._namespace_seen(new), self._namespace_gone)
        self._policies.add_handler(self._policy_seen, lambda _old, new: self._policy_seen(new), self._policy_gone)
        self._pods.add_handler(self._pod_seen, lambda _old, new: self._pod_seen(new), self._pod_gone)

    def _namespace_seen(self, obj: Object) -> None:
        self.state.set_namespace(obj["metadata"]["name"], obj["metadata"].get("labels") or {})
        self._wake.set()

    def _namespace_gone(self, obj: Object) -> None:
        self.state.drop_namespace(obj["metadata"]["name"])

    def _pod_seen(self, obj: Object) -> None:
        key = object_key(obj)
        early = self._early.get(key)
        if early is not None:
            if (obj.get("status") or {}).get("podIP"):
                del self._early[key]
            else:
                obj = {**obj, "status": {**(obj.get("status") or {}), "podIPs": [{"ip": address} for address in early]}}
        pod = read_pod(obj)
        if pod is None:
            if key not in self.state.pods:
                return
            self.state.drop_pod(key)
        elif self.state.pods.get(key) == pod:
            return
        else:
            self.state.set_pod(pod)
        self._wake.set()

    def _pod_gone(self, obj: Object) -> None:
        self._early.pop(object_key(obj), None)
        self.state.drop_pod(object_key(obj))
        self._wake.set()

    def _policy_seen(self, obj: Object) -> None:
        policy = compile_policy(obj)
        known = self.state.policies.get(policy.key)
        if policy.problems and (known is None or known.problems != policy.problems):
            self._recorder.event(obj, "Warning", "PolicyNotEnforceable", "; ".join(policy.problems))
        self.state.set_policy(policy)
        self._wake.set()

    def _policy_gone(self, obj: Object) -> None:
        self.state.drop_policy(object_key(obj))
        self._wake.set()

    async def _in_worker(self, function: Callable[[], T]) -> T:
        return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, function))

    async def cleanup(self) -> None:
        """Remove the table and close; call after `run` has ended."""
        await self._in_worker(self._table.remove)
        await self.close()

    async def close(self) -> None:
        """Close sockets and the worker; the table stays in force."""
        await self._in_worker(self._table.close)
        self._worker.shutdown(wait=False)
