"""/metrics, /health and /ready of the DNS server, under the names that dashboards for CoreDNS know.

Role: owned by `server`. Small on purpose: numbers come from one callback when asked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence

from knarr.network.dns.wire import TYPE_NAMES

_CODES = {0: "NOERROR", 1: "FORMERR", 2: "SERVFAIL", 3: "NXDOMAIN", 4: "NOTIMP", 5: "REFUSED"}
_SECONDS = 10


def render(counts: Mapping[str, int]) -> str:
    """Prometheus text of the server's counters."""
    lines = [
        "# HELP coredns_dns_requests_total Counter of DNS requests made per type, answers from the cache of whole answers not included.",
        "# TYPE coredns_dns_requests_total counter",
    ]
    for key, count in sorted(counts.items()):
        if key.startswith("type "):
            name = TYPE_NAMES.get(int(key[5:]), "other")
            lines.append(f'coredns_dns_requests_total{{server="dns://:53",zone=".",type="{name}"}} {count}')
    lines += ["# HELP coredns_dns_responses_total Counter of response status codes.", "# TYPE coredns_dns_responses_total counter"]
    for key, count in sorted(counts.items()):
        if key.startswith("code "):
            lines.append(f'coredns_dns_responses_total{{server="dns://:53",zone=".",rcode="{_CODES.get(int(key[5:]), key[5:])}"}} {count}')
    for name, key, kind, words in (
        ("coredns_cache_hits_total", "hits", "counter", "The count of cache hits."),
        ("coredns_cache_entries", "answers cached", "gauge", "The number of elements in the cache."),
        ("coredns_forward_requests_total", "forward misses", "counter", "Counter of requests made per upstream."),
        ("coredns_forward_cache_hits_total", "forward hits", "counter", "Forwarded names answered from the cache."),
        ("coredns_forward_healthcheck_failures_total", "forward failures", "counter", "Questions that no upstream answered."),
    ):
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}", f"{name} {counts.get(key, 0)}"]
    return "\n".join(lines) + "\n"


class MetricsServer:
    """Plain HTTP on the given ports; 0 opens none."""

    def __init__(self, counts: Callable[[], Mapping[str, int]], ready: Callable[[], bool]) -> None:
        self._counts = counts
        self._ready = ready
        self._servers: list[asyncio.Server] = []

    async def listen(self, addresses: Sequence[str], *ports: int) -> None:
        """Open the ports. Raises OSError."""
        for port in filter(None, ports):
            for address in addresses:
                self._servers.append(await asyncio.start_server(self._serve, address, port, limit=16384))

    async def close(self) -> None:
        """Stop serving."""
        for server in self._servers:
            server.close()
        self._servers = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                path = [*head.split(b"\r\n", 1)[0].split(b" "), b"", b""][1]
                status, body = self._answer(path.split(b"?")[0])
                writer.write(
                    f"HTTP/1.1 {status}\r\nContent-Type: text/plain; version=0.0.4; charset=utf-8\r\n"
                    f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode()
                    + body
                )
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return
        finally:
            writer.close()

    def _answer(self, path: bytes) -> tuple[str, bytes]:
        if path == b"/metrics":
            return "200 OK", render(self._counts()).encode()
        if path == b"/ready":
            return ("200 OK", b"OK") if self._ready() else ("503 Service Unavailable", b"kubernetes")
        if path in (b"/health", b"/healthz", b"/livez"):
            return "200 OK", b"OK"
        return "404 Not Found", b"404 page not found\n"
