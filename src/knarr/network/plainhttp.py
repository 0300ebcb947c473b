"""The small HTTP servers of the network's parts: health answers and metrics, one GET per connection.

Role: `proxy.health`, `proxy.status` and `dns.metrics` give a function from path to answer.
Invariants: requests are bounded in size and time; nothing of a request but its method and path is looked at.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_LIMIT_BYTES = 16 * 1024
_SECONDS = 10
_REASONS = {200: "OK", 400: "Bad Request", 503: "Service Unavailable", 404: "Not Found"}
Answer = tuple[int, list[tuple[str, str]], bytes]
"""Status, headers, body."""
NOT_FOUND: Answer = (404, [("Content-Type", "text/plain; charset=utf-8")], b"404 page not found\n")


def plain(status: int, body: bytes | str) -> Answer:
    """An answer of plain text."""
    text = body.encode() if isinstance(body, str) else body
    return status, [("Content-Type", "text/plain; charset=utf-8"), ("X-Content-Type-Options", "nosniff")], text


def prometheus(body: bytes) -> Answer:
    """Metrics in the text format."""
    return 200, [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")], body


class PlainServer:
    """Any number of listening places with one function behind."""

    def __init__(self, answer: Callable[[str], Answer]) -> None:
        self._answer = answer
        self._servers: list[asyncio.Server] = []

    async def listen(self, host: str | None, port: int) -> int:
        """Open a port (0 lets the kernel choose); returns it. Raises OSError when it is taken."""
        server = await asyncio.start_server(self._serve, host, port, limit=_LIMIT_BYTES)
        self._servers.append(server)
        return int(server.sockets[0].getsockname()[1])

    def close(self) -> None:
        """Stop answering."""
        for server in self._servers:
            server.close()
        self._servers = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            async with asyncio.timeout(_SECONDS):
                head = await reader.readuntil(b"\r\n\r\n")
                parts = head.split(b"\r\n", 1)[0].split(b" ")
                status, headers, body = self._answer(parts[1].decode("latin-1").split("?")[0]) if len(parts) == 3 else (400, [], b"")
                lines = [f"HTTP/1.1 {status} {_REASONS.get(status, '')}", f"Content-Length: {len(body)}", "Connection: close"]
                lines += [f"{name}: {content}" for name, content in headers]
                writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + (b"" if parts[0] == b"HEAD" else body))
                await writer.drain()
        except (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return
        finally:
            writer.close()
