"""What dashboards ask of an API server beside its requests: who comes in, what the store is asked, what caches and watchers get.

By upstream's names. Counted where it happens, on the hot paths by plain additions; gauges are worked out when somebody asks.

Source: apiserver endpoints/filters/metrics.go, endpoints/metrics, storage/{cacher,etcd3}/metrics; registry/core/service/{ipallocator,portallocator}.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from knarr.apiserver.instruments import Counters, Histogram, Histograms
from knarr.apiserver.metrics import BUCKETS, family

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

_AUTH_BOUNDS = tuple(0.001 * 2**power for power in range(15))
_BODY_BOUNDS = tuple(50_000 + 100_000 * step for step in range(31))
_EVENT_BOUNDS = tuple(1024 * 2**power for power in range(8))
_MOST_NAMES = 1000
_TOLD_USERS = frozenset({"admin", "client", "kube_proxy", "kubelet", "system:serviceaccount:kube-system:default"})


class Activity:
    """See the module's docstring. Owner: APIServer."""

    def __init__(self) -> None:
        self._authentications = Histograms(
            "authentication_duration_seconds", "[ALPHA] Authentication duration in seconds broken out by result.", ("result",), _AUTH_BOUNDS
        )
        self._authorizations = Histograms(
            "authorization_duration_seconds", "[ALPHA] Authorization duration in seconds broken out by result.", ("result",), _AUTH_BOUNDS
        )
        self.known = self._authentications.at("success")
        self.unknown = self._authentications.at("failure")
        self.allowed = self._authorizations.at("allowed")
        self.not_allowed = self._authorizations.at("no-opinion")
        self.denied = self._authorizations.at("denied")
        self._users: dict[str, int] = {}
        self._names: dict[str, int] = {}
        self._quick = 0
        """Requests whose authentication and authorization both were quicker than the first bound, which are told later."""
        self._quick_known = self._quick_allowed = 0.0
        self._bodies = Histograms(
            "apiserver_request_body_size_bytes", "[ALPHA] Apiserver request body size in bytes broken out by resource and verb.",
            ("group", "resource", "verb"), _BODY_BOUNDS,
        )  # fmt: skip
        self._stored = Histograms(
            "etcd_request_duration_seconds", "[ALPHA] Etcd request latency in seconds for each operation and object type.",
            ("group", "operation", "resource"), BUCKETS,
        )  # fmt: skip
        self._failed = Counters(
            "etcd_request_errors_total", "[ALPHA] Etcd failed request counts for each operation and object type.", ("group", "operation", "resource")
        )

    def let_in(self, name: str, asked: float, known: float, allowed: float) -> None:
        """Count a request that was let in: by whom, and the times when that began, was known, was decided. On the path of every read."""
        authentication, authorization = known - asked, allowed - known
        if authentication > _AUTH_BOUNDS[0] or authorization > _AUTH_BOUNDS[0]:
            self.known.observe(authentication)
            self.allowed.observe(authorization)
        else:
            self._quick += 1
            self._quick_known += authentication
            self._quick_allowed += authorization
        names = self._names
        names[name] = names.get(name, 0) + 1
        if len(names) > _MOST_NAMES:
            self._fold()

    def came_in(self, name: str) -> None:
        """Count a request of a known user."""
        self._names[name] = self._names.get(name, 0) + 1

    def _fold(self) -> None:
        """Bring what was counted quickly to where it is told; only few names are told apart."""
        for series, seconds in ((self.known, self._quick_known), (self.allowed, self._quick_allowed)):
            series.count += self._quick
            series.total += seconds
            series.buckets[0] += self._quick
        self._quick, self._quick_known, self._quick_allowed = 0, 0.0, 0.0
        for name, count in self._names.items():
            told = name if name in _TOLD_USERS else "email_id" if "@" in name else "other"
            self._users[told] = self._users.get(told, 0) + count
        self._names.clear()

    def body(self, group: str, resource: str, verb: str, size: int) -> None:
        self._bodies.at(group, resource, verb).observe(size)

    def stored(self, operation: str, group: str, resource: str) -> Histogram:
        """Return where the durations of an operation ("create", "update", "delete", "get") on the store are noted."""
        return self._stored.at(group, operation, resource)

    def not_stored(self, operation: str, group: str, resource: str) -> None:
        self._failed.add(group, operation, resource)

    def lines(self) -> list[str]:
        """Return lines of the exposition format."""
        self._fold()
        attempts, decisions, requests = (_counts(one) for one in (self._authentications, self._authorizations, self._stored))
        return [
            *family("authenticated_user_requests", "counter", "[ALPHA] Counter of authenticated requests broken out by username.",
                    [(f'username="{name}"', count) for name, count in self._users.items()]),
            *family("authentication_attempts", "counter", "[ALPHA] Counter of authenticated attempts.", attempts),
            *self._authentications.lines(),
            *family("authorization_attempts_total", "counter", "[ALPHA] Counter of authorization attempts broken down by result. It can be either "
                    "'allowed', 'denied', 'no-opinion' or 'error'.", decisions),
            *self._authorizations.lines(),
            *self._bodies.lines(),
            *family("etcd_requests_total", "counter", "[ALPHA] Etcd request counts for each operation and object type.", requests),
            *self._stored.lines(),
            *self._failed.lines(),
        ]  # fmt: skip


def _counts(histograms: Histograms) -> list[tuple[str, float]]:
    return [(labels, series.count) for labels, series in histograms.series()]


class EventSizes:
    """What was sent to the watchers of one resource in one version."""

    __slots__ = ("buckets", "count", "total")

    def __init__(self) -> None:
        self.count = self.total = 0
        self.buckets = [0] * (len(_EVENT_BOUNDS) + 1)

    def add(self, sizes: Iterable[int], watchers: int = 1) -> None:
        for size in sizes:
            self.count += watchers
            self.total += size * watchers
            # The bounds double from 1024 on.
            self.buckets[min(max(0, (size - 1).bit_length() - 10), len(_EVENT_BOUNDS))] += watchers

    def histogram(self) -> Histogram:
        made = Histogram(_EVENT_BOUNDS)
        made.count, made.total, made.buckets = self.count, self.total, self.buckets
        return made


def cache_lines(server: APIServer) -> list[str]:
    """Return what the watch caches and their watchers have got."""
    received: list[tuple[str, float]] = []
    capacity: list[tuple[str, float]] = []
    initialized: list[tuple[str, float]] = []
    lists: list[tuple[str, float]] = []
    returned: list[tuple[str, float]] = []
    sizes = Histograms("apiserver_watch_events_sizes", "[ALPHA] Watch event size distribution in bytes", ("group", "resource", "version"), _EVENT_BOUNDS)
    for prefix, cache in server.storage.caches.items():
        group, plural = prefix.removeprefix("/registry/").strip("/").split("/", 1)
        group = "" if group == "core" else group
        labels = f'group="{group}",resource="{plural}"'
        initialized.append((labels, 1))
        capacity.append((labels, cache.capacity))
        if cache.published:
            received.append((labels, cache.published))
        if cache.lists:
            lists.append((f'group="{group}",index="",resource="{plural}"', cache.lists))
            returned.append((labels, cache.listed))
        for version, sent in cache.sent.items():
            sizes.put(sent.histogram(), group, plural, version)
    broken = "broken by resource type."
    events = [(labels, series.count) for labels, series in sizes.series()]
    return [
        *family("apiserver_storage_events_received_total", "counter", "[ALPHA] Number of etcd events received split by kind.", received),
        *family("apiserver_watch_cache_events_received_total", "counter", f"[ALPHA] Counter of events received in watch cache {broken}", received),
        *family("apiserver_watch_cache_events_dispatched_total", "counter", f"[ALPHA] Counter of events dispatched in watch cache {broken}", received),
        *family("apiserver_watch_cache_initializations_total", "counter", f"[ALPHA] Counter of watch cache initializations {broken}", initialized),
        *family("watch_cache_capacity", "gauge", f"[ALPHA] Total capacity of watch cache {broken}", capacity),
        *family("apiserver_cache_list_total", "counter", "[ALPHA] Number of LIST requests served from watch cache", lists),
        *family("apiserver_cache_list_returned_objects_total", "counter", "[ALPHA] Number of objects returned for a LIST request from watch cache", returned),
        *family("apiserver_watch_events_total", "counter", "[ALPHA] Number of events sent in watch clients", events),
        *sizes.lines(),
    ]  # fmt: skip


def cluster_lines(server: APIServer) -> list[str]:
    """Return gauges of what Services hold, of extension servers, and which versions this server is compatible with."""
    held: dict[str, int] = {}
    free: dict[str, int] = {}
    taken = [ipaddress.ip_address(one["metadata"]["name"]) for one in server.store("networking.k8s.io", "ipaddresses").list_nowait()]
    for one in server.store("networking.k8s.io", "servicecidrs").list_nowait():
        for text in (one.get("spec") or {}).get("cidrs") or ():
            network = ipaddress.ip_network(text)
            held[text] = sum(address in network for address in taken)
            # Neither the network's own address nor the broadcast address is given away.
            free[text] = max(0, min(network.num_addresses - (2 if network.version == 4 else 1), 2**62)) - held[text]
    first, last = server.config.node_port_range
    ports = {
        port["nodePort"] for service in server.store("", "services").list_nowait() for port in service["spec"].get("ports") or () if port.get("nodePort")
    }  # fmt: skip
    unavailable = [
        (f'name="{service["metadata"]["name"]}"', 0 if _is_true(service, "Available") else 1)
        for service in server.store("apiregistration.k8s.io", "apiservices").list_nowait()
    ]  # fmt: skip
    allocated, gauge = "[ALPHA] Gauge measuring the number of", "gauge"
    return [
        *family("kube_apiserver_clusterip_allocator_allocated_ips", gauge, f"{allocated} allocated IPs for Services", _by_network(held)),
        *family("kube_apiserver_clusterip_allocator_available_ips", gauge, f"{allocated} available IPs for Services", _by_network(free)),
        *family("kube_apiserver_nodeport_allocator_allocated_ports", gauge, f"{allocated} allocated NodePorts for Services", [("", len(ports))]),
        *family("kube_apiserver_nodeport_allocator_available_ports", gauge, f"{allocated} available NodePorts for Services",
                [("", last - first + 1 - len(ports))]),
        *family("aggregator_unavailable_apiservice", gauge,
                "[ALPHA] Gauge of APIServices which are marked as unavailable broken down by APIService name.", unavailable),
        *family("version_info", gauge, "[ALPHA] Provides the compatibility version info of the component. The component label is the name of the "
                "component, usually kube, but is relevant for aggregated-apiservers.",
                [('binary="1.35.0",component="kube",emulation="1.35",min_compat="1.34"', 1)]),
    ]  # fmt: skip


def _by_network(counts: dict[str, int]) -> Sequence[tuple[str, float]]:
    return [(f'cidr="{network}"', count) for network, count in counts.items()]


def _is_true(obj: dict[str, object], condition: str) -> bool:
    status = obj.get("status")
    conditions = status.get("conditions") if isinstance(status, dict) else None
    return any(one.get("type") == condition and one.get("status") == "True" for one in conditions or ())
