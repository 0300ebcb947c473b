"""Health answers of the proxy: one port per Service with a healthCheckNodePort, and the proxy's own /healthz and /livez.

Role: external load balancers ask a Service's port whether this node has endpoints (externalTrafficPolicy Local). Owned
by `service_proxy`.
Invariants: a port that cannot be bound costs that Service its answer and is reported, nothing else. Requests are
bounded in size and time.
Source: pkg/proxy/healthcheck/service_health.go, proxy_health.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass

from knarr.aiokits.clock import now, rfc3339
from knarr.aiokits.log import get_logger
from knarr.api.encode import to_json

log = get_logger(__name__)

_LIMIT_BYTES = 16 * 1024
_SECONDS = 10
_REASONS = {200: "OK", 400: "Bad Request", 503: "Service Unavailable", 404: "Not Found"}


@dataclass(frozen=True, slots=True)
class ServiceHealth:
    """What one health port answers."""

    namespace: str
    name: str
    local_endpoints: int


Answer = tuple[int, list[tuple[str, str]], bytes]


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, answer: Callable[[str], Answer]) -> None:
    try:
        async with asyncio.timeout(_SECONDS):
            head = await reader.readuntil(b"\r\n\r\n")
            parts = head.split(b"\r\n", 1)[0].split(b" ")
            status, headers, body = answer(parts[1].decode("latin-1").split("?")[0]) if len(parts) == 3 else (400, [], b"")
            lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}", f"Content-Length: {len(body)}", "Connection: close"]
            lines += [f"{name}: {content}" for name, content in headers]
            writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if parts[0] == b"HEAD" else body))
            await writer.drain()
    except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return
    finally:
        writer.close()


class HealthServers:
    """The listening ports, kept in step with what is wanted."""

    def __init__(self, healthy: Callable[[], bool], on_problem: Callable[[str, str], None]) -> None:
        self._healthy = healthy
        self._on_problem = on_problem
        self._wanted: dict[int, ServiceHealth] = {}
        self._servers: dict[int, asyncio.Server] = {}
        self._own: asyncio.Server | None = None
        self.updated_at = now()

    async def sync(self, wanted: Mapping[int, ServiceHealth]) -> None:
        """Open and close ports so that exactly these answer."""
        self._wanted = dict(wanted)
        for port in [port for port in self._servers if port not in wanted]:
            self._servers.pop(port).close()
        for port, health in wanted.items():
            if port in self._servers:
                continue
            try:
                self._servers[port] = await asyncio.start_server(self._handler(port), None, port, limit=_LIMIT_BYTES)
            except OSError as error:
                self._on_problem(f"{health.namespace}/{health.name}", f"health check node port {port} cannot be opened: {error}")

    def _handler(self, port: int) -> Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]:
        async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await _serve(reader, writer, lambda _path: self._answer(port))

        return handle

    def _answer(self, port: int) -> Answer:
        health = self._wanted.get(port)
        if health is None:
            return 404, [], b""
        healthy = self._healthy()
        body = to_json(
            {
                "service": {"namespace": health.namespace, "name": health.name},
                "localEndpoints": health.local_endpoints,
                "serviceProxyHealthy": healthy,
            }
        )
        headers = [
            ("Content-Type", "application/json"),
            ("X-Content-Type-Options", "nosniff"),
            ("X-Load-Balancing-Endpoint-Weight", str(health.local_endpoints)),
        ]
        return (200 if health.local_endpoints and healthy else 503), headers, body

    async def listen_own(self, host: str, port: int) -> None:
        """Serve /healthz and /livez of the proxy itself. Raises OSError when the port is taken."""
        self._own = await asyncio.start_server(self._handle_own, host, port, limit=_LIMIT_BYTES)

    async def _handle_own(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await _serve(reader, writer, self._own_answer)

    def _own_answer(self, path: str) -> Answer:
        if path not in ("/healthz", "/livez"):
            return 404, [], b""
        healthy = self._healthy()
        body = to_json({"lastUpdated": rfc3339(self.updated_at), "currentTime": rfc3339(now()), "nodeEligible": healthy})
        headers = [("Content-Type", "application/json"), ("X-Content-Type-Options", "nosniff")]
        return (200 if healthy else 503), headers, body

    async def close(self) -> None:
        """Stop answering."""
        for server in self._servers.values():
            server.close()
        self._servers = {}
        if self._own is not None:
            self._own.close()
            self._own = None
