"""Where audit events go: lines of a file, and lists of them to a web server.

Loop: the webhook's sender. Owner: the audit of an API server. Input: events; bound: BUFFER_EVENTS, further ones are dropped and
counted. A batch goes when it is full or its first event is BATCH_SECONDS old, at most RATE a second; a failed one is tried again.

Source: apiserver plugin/pkg/audit/{log,webhook,buffered}, pkg/server/options/audit.go for the defaults.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from pathlib import Path
from typing import IO

import orjson

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.errors import StatusError
from knarr.api.types import Object
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)

BUFFER_EVENTS, BATCH_EVENTS, BATCH_SECONDS, RATE = 10_000, 400, 30.0, 10.0
TRIES = 5
FIRST_PAUSE_SECONDS = 10.0
CLOSE_SECONDS = 5.0


class LogBackend:
    """One JSON line per event, written at once; the file is appended to, so that it can be rotated by renaming, too."""

    def __init__(self, path: str, *, max_bytes: int = 0, backups: int = 0) -> None:
        """Args: max_bytes: the file is put aside when it would grow beyond; 0: never. backups: so many of those are kept; 0: all."""
        self._path = path
        self._max_bytes = max_bytes
        self._backups = backups
        self._file: IO[bytes] | None = None
        self._size = 0

    def write(self, event: Object) -> None:
        line = orjson.dumps(event) + b"\n"
        if self._file is None:
            self._open()
        elif self._max_bytes and self._size + len(line) > self._max_bytes and self._path != "-":
            self._rotate()
        assert self._file is not None
        self._file.write(line)
        self._size += len(line)

    def _open(self) -> None:
        if self._path == "-":
            self._file = sys.stdout.buffer
            return
        self._file = open(self._path, "ab", buffering=0)
        self._size = os.fstat(self._file.fileno()).st_size

    def _rotate(self) -> None:
        assert self._file is not None
        self._file.close()
        path = Path(self._path)
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H-%M-%S", time.gmtime(now)) + f".{int(now * 1e6) % 1_000_000:06d}"
        path.rename(path.with_name(f"{path.stem}-{stamp}{path.suffix}"))
        old = sorted(path.parent.glob(f"{path.stem}-*{path.suffix}"))
        for one in old[: -self._backups] if self._backups else ():
            one.unlink(missing_ok=True)
        self._open()

    async def close(self) -> None:
        if self._file is not None and self._path != "-":
            self._file.close()
        self._file = None


class WebhookBackend:
    """Posts EventLists to the server of a kubeconfig."""

    def __init__(self, kubeconfig: str, *, batch_events: int = BATCH_EVENTS, batch_seconds: float = BATCH_SECONDS) -> None:
        self._config = ClientConfig.from_kubeconfig(Path(kubeconfig))
        self._batch_events = batch_events
        self._batch_seconds = batch_seconds
        self._client: Client | None = None
        self._events: list[bytes] = []
        self._wakeup = asyncio.Event()
        self._tasks = Tasks()
        self._sender: asyncio.Task[None] | None = None
        self._closing = False
        self.dropped = 0

    def write(self, event: Object) -> None:
        if len(self._events) >= BUFFER_EVENTS:
            if not self.dropped:
                log.warning("audit events are dropped: the webhook takes none")
            self.dropped += 1
            return
        # Encoded now: the event goes on to change with its request's stages.
        self._events.append(orjson.dumps(event))
        if self._sender is None:
            self._sender = self._tasks.spawn(self._send_for_ever(), "audit-webhook")
        if len(self._events) in (1, self._batch_events):
            self._wakeup.set()

    async def _send_for_ever(self) -> None:
        while not self._closing or self._events:
            if not self._events:
                self._wakeup.clear()
                await self._wakeup.wait()
                continue
            if len(self._events) < self._batch_events and not self._closing:
                self._wakeup.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(self._batch_seconds):
                        while len(self._events) < self._batch_events and not self._closing:
                            await self._wakeup.wait()
                            self._wakeup.clear()
            batch, self._events = self._events[: self._batch_events], self._events[self._batch_events :]
            await self._post(batch)
            await asyncio.sleep(0 if self._closing else 1 / RATE)

    async def _post(self, batch: list[bytes]) -> None:
        body = b'{"kind":"EventList","apiVersion":"audit.k8s.io/v1","metadata":{},"items":[' + b",".join(batch) + b"]}"
        if self._client is None:
            self._client = Client(self._config, max_connections=4)
        backoff = Backoff(initial_seconds=FIRST_PAUSE_SECONDS, maximum_seconds=300, factor=1.5, reset_after_seconds=3600)
        path = "" if "/" in self._config.server.split("://", 1)[-1].rstrip("/") else "/"
        for _ in range(1 if self._closing else TRIES):
            try:
                await self._client.request("POST", path, body=body, headers={"Content-Type": "application/json"})
            except StatusError as error:
                if error.code < 500 and error.code != 429:
                    log.warning("audit events are refused by the webhook", events=len(batch), error=str(error))
                    return
            except HTTPError as error:
                log.warning("audit webhook cannot be reached", events=len(batch), error=str(error))
            else:
                return
            if self._closing:
                break
            await backoff.sleep()
        log.warning("audit events are lost", events=len(batch))

    async def close(self) -> None:
        """Send what is left, if that goes quickly."""
        self._closing = True
        self._wakeup.set()
        if self._sender is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await asyncio.wait((self._sender,))
        await self._tasks.close()
        if self._client is not None:
            await self._client.close()
