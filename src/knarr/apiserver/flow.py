"""How many requests run at once. Long-running ones (watches, streams) do not count.

Reads answered from memory never queue, since they do not wait for anything; the pipeline asks here only for the others.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator

from knarr.api import errors
from knarr.apiserver.attributes import Attributes
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.requestinfo import RequestInfo
from knarr.http.server import Request

LONG_SUBRESOURCES = frozenset({"exec", "attach", "portforward", "log", "proxy"})
MUTATING = frozenset({"create", "update", "patch", "delete", "deletecollection", "post", "put"})


class _Gate:
    """A bounded number inside, a bounded queue before it."""

    def __init__(self, seats: int, queue: int) -> None:
        self.seats = seats
        self.inside = 0
        self._queue_limit = queue
        self._queue: deque[asyncio.Future[None]] = deque()

    async def enter(self) -> None:
        if self.inside < self.seats:
            self.inside += 1
            return
        if len(self._queue) >= self._queue_limit:
            raise errors.too_many_requests("too many requests, please try again later", 1)
        waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._queue.append(waiter)
        try:
            await waiter
        except BaseException:
            if waiter.done() and not waiter.cancelled():
                self.leave()
            raise

    def leave(self) -> None:
        while self._queue:
            waiter = self._queue.popleft()
            if not waiter.done():
                waiter.set_result(None)
                return
        self.inside -= 1


class FlowControl:
    """Two gates, for reads and for writes, as --max-requests-inflight and --max-mutating-requests-inflight set them."""

    busy = False
    """Whether even reads from memory must go through `admit`."""

    def __init__(self, config: APIServerConfig) -> None:
        self._reads = _Gate(config.max_requests_inflight, 4 * config.max_requests_inflight)
        self._writes = _Gate(config.max_mutating_requests_inflight, 20 * config.max_mutating_requests_inflight)

    @contextlib.asynccontextmanager
    async def admit(self, request: Request, info: RequestInfo, attributes: Attributes) -> AsyncIterator[None]:
        """Hold a seat while the request runs. Raises 429 when the queue is full."""
        if info.verb == "watch" or info.subresource in LONG_SUBRESOURCES or not info.is_resource or "system:masters" in attributes.user.groups:
            yield
            return
        gate = self._writes if info.verb in MUTATING else self._reads
        await gate.enter()
        try:
            yield
        finally:
            gate.leave()
