"""Health answers of the proxy: one port per Service with a healthCheckNodePort, and the proxy's own /healthz and /livez.

Role: external load balancers ask a Service's port whether this node has endpoints (externalTrafficPolicy Local), and the
proxy's port whether the node takes new connections at all. Owned by `service_proxy`.
Invariants: a port that cannot be bound costs that Service its answer and is reported, nothing else.
Source: pkg/proxy/healthcheck/service_health.go, proxy_health.go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from knarr.aiokits.clock import now, rfc3339
from knarr.api.encode import to_json
from knarr.network.plainhttp import NOT_FOUND, Answer, PlainServer
from knarr.network.proxy.metrics import ProxyMetrics

LATE_SECONDS = 60.0
"""A change that has waited so long makes the proxy unhealthy."""
_HEADERS = [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """What one health port answers."""

    namespace: str
    name: str
    local_endpoints: int


class HealthServers:
    """The listening ports, kept in step with what is wanted.

    Args:
      on_problem: Told of a Service ("namespace/name") whose port cannot be opened, and why.
      node_eligible: Whether the node is to get new connections (not about to be removed).
    """

    def __init__(self, on_problem: Callable[[str, str], None], node_eligible: Callable[[], bool], metrics: ProxyMetrics) -> None:
        self._on_problem = on_problem
        self._eligible = node_eligible
        self._metrics = metrics
        self._wanted: dict[int, ServiceHealth] = {}
        self._servers: dict[int, PlainServer] = {}
        self._own = PlainServer(self._own_answer)
        self._updated_at: float | None = None
        self._waiting_since: float | None = None

    def queued(self) -> None:
        """Note a change that is not in the kernel yet."""
        if self._waiting_since is None:
            self._waiting_since = now()

    def updated(self) -> None:
        """Note that all changes are in the kernel."""
        self._waiting_since = None
        self._updated_at = now()

    @property
    def healthy(self) -> bool:
        """Whether changes reach the kernel in time; while the first load is under way, too."""
        return self._updated_at is None or self._waiting_since is None or now() - self._waiting_since < LATE_SECONDS

    async def sync(self, wanted: Mapping[int, ServiceHealth]) -> None:
        """Open and close ports so that exactly these answer."""
        self._wanted = dict(wanted)
        for port in [port for port in self._servers if port not in wanted]:
            self._servers.pop(port).close()
        for port, health in wanted.items():
            if port in self._servers:
                continue
            server = PlainServer(lambda _path, port=port: self._answer(port))  # type: ignore[misc]
            try:
                await server.listen(None, port)
            except OSError as error:
                self._on_problem(f"{health.namespace}/{health.name}", f"health check node port {port} cannot be opened: {error}")
                continue
            self._servers[port] = server

    def _answer(self, port: int) -> Answer:
        health = self._wanted.get(port)
        if health is None:
            return NOT_FOUND
        healthy = self.healthy
        body = to_json(
            {
                "service": {"namespace": health.namespace, "name": health.name},
                "localEndpoints": health.local_endpoints,
                "serviceProxyHealthy": healthy,
            }
        )
        headers = [*_HEADERS, ("X-Load-Balancing-Endpoint-Weight", str(health.local_endpoints))]
        return (200 if health.local_endpoints and healthy else 503), headers, body

    async def listen_own(self, host: str, port: int) -> None:
        """Serve /healthz and /livez of the proxy itself. Raises OSError when the port is taken."""
        await self._own.listen(host, port)

    def _own_answer(self, path: str) -> Answer:
        if path not in ("/healthz", "/livez"):
            return NOT_FOUND
        healthy, eligible = self.healthy, self._eligible()
        good = healthy and (eligible or path == "/livez")
        updated = rfc3339(now() if good else self._updated_at or 0.0)
        answer: dict[str, Any] = {"lastUpdated": updated, "currentTime": rfc3339(now()), "healthy": healthy}
        if path == "/healthz":
            answer["nodeEligible"] = eligible
        if self._updated_at is not None:
            # One table serves both families.
            state = {"lastUpdated": rfc3339(self._updated_at), "healthy": healthy}
            answer["status"] = {"IPv4": state, "IPv6": state}
        status = 200 if good else 503
        self._metrics.asked(path.strip("/"), status)
        return status, _HEADERS, to_json(answer)

    def close(self) -> None:
        """Stop answering."""
        for server in self._servers.values():
            server.close()
        self._servers = {}
        self._own.close()
