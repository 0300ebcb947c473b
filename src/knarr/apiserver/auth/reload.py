"""Configuration files that are read again when they change: who may issue tokens, which webhooks are asked about access, how objects are encrypted.

A file that is not valid any more changes nothing and is told of. Loop: one per file; a look at its size and time every RELOAD_SECONDS.

Source: pkg/kubeapiserver/options/{authentication,authorization}.go, apiserver server/options/{authenticationconfig,authorizationconfig}.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import Awaitable, Callable

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.apiserver.instruments import Counters

log = get_logger(__name__)

RELOAD_SECONDS = 5.0
RETRY_SECONDS = 60.0
"""After which a file that could not be taken is tried again, although it is the same: what it names may be there by then."""


class Reloads:
    """Follows one file, and counts."""

    def __init__(self, kind: str, path: str, apply: Callable[[str], Awaitable[None]], server: str, *, stability: str = "BETA") -> None:
        """Args:
        kind: "authentication", "authorization" or "encryption".
        apply: Takes the path and puts the file's content into force; raises ValueError or OSError when it cannot.
        server: The server's identity, for the metrics.
        """
        self._kind = kind
        self._path = path
        self._apply = apply
        self._server = f"sha256:{hashlib.sha256(server.encode()).hexdigest()}"
        self._seen = self._look()
        prefix = f"apiserver_{kind}_config_controller_automatic_reload"
        split = f"of {kind} configuration split by status and apiserver identity."
        labels = ("apiserver_id_hash", "status")
        self._count = Counters(f"{prefix}s_total", f"[{stability}] Total number of automatic reloads {split}", labels)
        self._last = Counters(f"{prefix}_last_timestamp_seconds", f"[{stability}] Timestamp of the last automatic reload {split}", labels, kind="gauge")

    def _look(self) -> tuple[int, int, int] | None:
        try:
            found = os.stat(self._path)
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    async def follow(self) -> None:
        """Apply each change, for ever."""
        loop = asyncio.get_running_loop()
        again_at: float | None = None
        while True:
            await asyncio.sleep(RELOAD_SECONDS)
            seen = self._look()
            if seen == self._seen and (again_at is None or loop.time() < again_at):
                continue
            self._seen, again_at = seen, None
            status = "success"
            try:
                await self._apply(self._path)
                log.info("configuration file is read again", kind=self._kind, path=self._path)
            except (ValueError, OSError) as error:
                status, again_at = "failure", loop.time() + RETRY_SECONDS
                log.error("configuration file cannot be taken, the earlier one stays", kind=self._kind, path=self._path, error=str(error))
            self._count.add(self._server, status)
            self._last.set(clock.now(), self._server, status)

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        return [*self._count.lines(), *self._last.lines()]
