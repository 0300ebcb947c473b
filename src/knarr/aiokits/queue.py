"""A bounded queue that says what happens when it is full.

`put_nowait` answers False instead of blocking: the producer (a watch fan-out, a log pump)
decides whether that closes the slow consumer or drops the item. One consumer, any producers.
"""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

T = TypeVar("T")


class QueueClosed(Exception):
    """The queue was closed and everything in it has been taken."""


class BoundedQueue(Generic[T]):
    """FIFO for one consumer, holding at most `capacity` items."""

    __slots__ = ("_closed", "_items", "_waiter", "capacity")

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._items: deque[T] = deque()
        self._closed = False
        self._waiter: asyncio.Future[None] | None = None

    def __len__(self) -> int:
        return len(self._items)

    @property
    def closed(self) -> bool:
        return self._closed

    def put_nowait(self, item: T) -> bool:
        """Append an item; False when the queue is full or closed (the item is not taken)."""
        if self._closed or len(self._items) >= self.capacity:
            return False
        self._items.append(item)
        self._wake()
        return True

    def close(self) -> None:
        """Take nothing more; the consumer drains what is there and then gets QueueClosed."""
        self._closed = True
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> T:
        """Wait for the next item.

        Raises:
          QueueClosed: closed and empty.
        """
        await self._wait()
        return self._items.popleft()

    async def get_many(self) -> list[T]:
        """Wait until something is there and take everything at once.

        Raises:
          QueueClosed: closed and empty.
        """
        await self._wait()
        items = list(self._items)
        self._items.clear()
        return items

    async def _wait(self) -> None:
        while not self._items:
            if self._closed:
                raise QueueClosed
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
