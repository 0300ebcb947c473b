"""Container events for any number of readers.

Role: the runtime publishes, the kubelet listens. Each reader has a bounded queue; one that lags behind sees its stream end and
must list again, which is always correct because the state itself is never in the events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

from knarr.runtime.cri import ContainerEvent

_BOUND = 4096


class Events:
    """A fan-out of events; `publish` never waits."""

    def __init__(self) -> None:
        self._readers: set[asyncio.Queue[ContainerEvent | None]] = set()
        self._closed = False

    def publish(self, event: ContainerEvent) -> None:
        for queue in list(self._readers):
            if queue.qsize() >= _BOUND:
                self._readers.discard(queue)
                queue.put_nowait(None)
            else:
                queue.put_nowait(event)

    def subscribe(self) -> AsyncIterator[ContainerEvent]:
        """Events from this call on (not from the first read on)."""
        queue: asyncio.Queue[ContainerEvent | None] = asyncio.Queue()
        if self._closed:
            queue.put_nowait(None)
        else:
            self._readers.add(queue)
        return self._read(queue)

    async def _read(self, queue: asyncio.Queue[ContainerEvent | None]) -> AsyncIterator[ContainerEvent]:
        try:
            while (event := await queue.get()) is not None:
                yield event
        finally:
            self._readers.discard(queue)

    def close(self) -> None:
        """End all streams."""
        self._closed = True
        for queue in self._readers:
            queue.put_nowait(None)
        self._readers.clear()
