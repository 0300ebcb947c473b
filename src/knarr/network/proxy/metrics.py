"""Metrics of the proxy under kube-proxy's names. Source: pkg/proxy/metrics/metrics.go, in nftables mode.

Both families share one table and are committed together; their figures carry the label of the first one.
"""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import generate_latest

_SYNC_BUCKETS = [0.001 * 2**i for i in range(15)]
_PROGRAMMING_BUCKETS = [0.25, 0.5, *range(1, 60), *range(60, 120, 5), *range(120, 301, 30)]
_FAMILY = "IPv4"


class ProxyMetrics:
    """One registry per proxy, so that several can live in one process."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        prefix = "kubeproxy_sync_proxy_rules_"

        def seconds(name: str, text: str, buckets: list[float]) -> Histogram:
            return Histogram(name, text, ["ip_family"], buckets=buckets, registry=registry).labels(_FAMILY)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["ip_family"], registry=registry).labels(_FAMILY)

        self._sync = seconds(prefix + "duration_seconds", "SyncProxyRules latency in seconds", _SYNC_BUCKETS)
        self._full = seconds("kubeproxy_sync_full_proxy_rules_duration_seconds", "Latency of loads of the whole table in seconds", _SYNC_BUCKETS)
        self._partial = seconds("kubeproxy_sync_partial_proxy_rules_duration_seconds", "Latency of single changes in seconds", _SYNC_BUCKETS)
        self._programming = seconds(
            "kubeproxy_network_programming_duration_seconds", "From the trigger of an endpoint's change to the kernel, in seconds", _PROGRAMMING_BUCKETS
        )
        self.last_sync = gauge(prefix + "last_timestamp_seconds", "The last time proxy rules were successfully synced")
        self.last_queued = gauge(prefix + "last_queued_timestamp_seconds", "The last time a sync of proxy rules was queued")
        self._failures = Counter(prefix + "nftables_sync_failures", "Cumulative proxy nftables sync failures", ["ip_family"], registry=registry).labels(_FAMILY)
        self._endpoint_changes = Counter(prefix + "endpoint_changes", "Cumulative proxy rules Endpoint changes", registry=registry)
        self._endpoint_pending = Gauge(prefix + "endpoint_changes_pending", "Pending proxy rules Endpoint changes", registry=registry)
        self._service_changes = Counter(prefix + "service_changes", "Cumulative proxy rules Service changes", registry=registry)
        self._service_pending = Gauge(prefix + "service_changes_pending", "Pending proxy rules Service changes", registry=registry)
        self._no_local = Gauge(
            prefix + "no_local_endpoints_total", "Number of services with a Local traffic policy and no endpoints", ["traffic_policy", "ip_family"], registry=registry
        )
        self._health = {
            kind: Counter(f"kubeproxy_proxy_{kind}", f"Cumulative proxy {kind} HTTP status", ["code"], registry=registry) for kind in ("healthz", "livez")
        }
        self._forgotten = Counter(
            "kubeproxy_conntrack_reconciler_deleted_entries", "Cumulative conntrack flows deleted", ["ip_family"], registry=registry
        ).labels(_FAMILY)
        self._forgetting = seconds("kubeproxy_conntrack_reconciler_sync_duration_seconds", "Latency of looking for stale flows in seconds", _SYNC_BUCKETS)

    def endpoints_changed(self) -> None:
        """An EndpointSlice came, changed or went."""
        self._endpoint_changes.inc()
        self._endpoint_pending.inc()

    def service_changed(self) -> None:
        """A Service came, changed or went."""
        self._service_changes.inc()
        self._service_pending.inc()

    def taken(self) -> None:
        """All that waited is being rendered."""
        self._endpoint_pending.set(0)
        self._service_pending.set(0)

    def synced(self, seconds: float, at: float, *, whole: bool) -> None:
        """A commit succeeded."""
        self._sync.observe(seconds)
        (self._full if whole else self._partial).observe(seconds)
        self.last_sync.set(at)

    def programmed(self, seconds: float) -> None:
        """An endpoint's change is in force so long after what triggered it."""
        self._programming.observe(seconds)

    def failed(self) -> None:
        """A commit was refused."""
        self._failures.inc()

    def no_local(self, policy: str, count: int) -> None:
        """How many Services of a traffic policy ("internal", "external") have no endpoint here."""
        self._no_local.labels(policy, _FAMILY).set(count)

    def forgot(self, flows: int, seconds: float) -> None:
        """Stale flows were looked for and deleted."""
        self._forgotten.inc(flows)
        self._forgetting.observe(seconds)

    def asked(self, kind: str, code: int) -> None:
        """Somebody asked for "healthz" or "livez"."""
        self._health[kind].labels(str(code)).inc()

    def render(self) -> bytes:
        """The text format."""
        return bytes(generate_latest(self.registry))
