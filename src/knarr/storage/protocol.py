"""The contract of every store: one revision counter over keys and bytes, compare-and-swap, history, watch.

Callers: the API server's watch cache and object store. Implementations: memory, sqlite, etcd; all run the suite in
tests/storage.

Invariants that callers build on:
- Revisions are positive, grow by exactly one per write in the embedded stores, and never go back, not even after a
  crash. (etcd counts the writes of others too.)
- A write is acknowledged only when it is durable, and only after every subscriber has been handed its event. So
  whoever has the answer finds the write in the cache.
- Subscribers get every event exactly once, in revision order, one call per commit.
- Reading at a revision sees the world exactly as it was, until that revision is compacted.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import NamedTuple, Protocol

ANY = -1
"""As `expected`: write whatever the current revision is."""


class Stored(NamedTuple):
    """One key's value; `revision` is that of its last write."""

    key: str
    value: bytes
    revision: int


class Event(NamedTuple):
    """One write. `value` is None for a removal; `previous_revision` is 0 when the key did not exist before.

    `previous_value` holds the last value for removals, and for every event read from history (`watch` from an old
    revision); live updates leave it None, because a subscriber knows it already.
    """

    key: str
    value: bytes | None
    revision: int
    previous_revision: int
    previous_value: bytes | None


class Put(NamedTuple):
    """Outcome of a write: won at `revision`, or lost against `current` (None: the key does not exist)."""

    won: bool
    revision: int
    current: Stored | None


class Page(NamedTuple):
    """Part of a scan: `revision` it was read at, `items` in key order, `after` to go on (None: the end), items left."""

    revision: int
    items: list[Stored]
    after: str | None
    remaining: int


Subscriber = Callable[[Sequence[Event]], None]


class EventStream(Protocol):
    """Events of one prefix in revision order, in batches of at least one."""

    def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        """Iterate batches.

        Raises:
          SlowWatcherError: the reader fell behind further than the buffer holds.
          UnavailableError: the store closed.
        """
        ...


class RevisionStore(Protocol):
    """See the module's docstring."""

    @property
    def revision(self) -> int:
        """The newest revision that subscribers have seen; 0 for a new store."""
        ...

    @property
    def compacted(self) -> int:
        """Reads below this revision are refused."""
        ...

    @property
    def shared(self) -> bool:
        """Whether others may write to the same data: then subscribers may be behind what is stored, and `catch_up` helps."""
        ...

    @property
    def size_bytes(self) -> int:
        """Bytes that the data take on disk, as far as is known now; 0 without a disk."""
        ...

    def is_stale(self, key: str) -> bool:
        """Whether a key's value may be stored in another way than a write would store it now (under an older encryption key)."""
        ...

    async def catch_up(self) -> None:
        """Wait until subscribers have seen all that was stored before this call. Raises UnavailableError."""
        ...

    async def start(self) -> None:
        """Open the store and load what it needs. Raises UnavailableError."""
        ...

    async def wait_lost(self) -> None:
        """Wait until events were lost, so that what was learnt from this store can no longer be right; mostly for ever."""
        ...

    async def close(self) -> None:
        """Finish pending writes and release everything. Idempotent."""
        ...

    async def get(self, key: str, *, at: int | None = None) -> Stored | None:
        """Read one key, now or at a revision. Raises CompactedError, FutureRevisionError, UnavailableError."""
        ...

    async def scan(self, prefix: str, *, at: int | None = None, limit: int = 0, after: str | None = None) -> Page:
        """Read one consistent page of the keys under a prefix.

        Args:
          prefix: Ends in "/" as a rule; "" means everything.
          at: Revision to read at; None means the current one.
          limit: Most items; 0 means no limit.
          after: Only keys behind this one.

        Raises:
          CompactedError, FutureRevisionError, UnavailableError
        """
        ...

    async def put(self, key: str, value: bytes, *, expected: int, lease_seconds: int = 0) -> Put:
        """Write a key if its revision is `expected` (0: does not exist; ANY: whatever).

        Args:
          lease_seconds: The key removes itself after that time; 0 means never. A later put without one lifts it.

        Raises:
          UnavailableError: nothing was stored.

        Cancellation: the write may or may not happen.
        """
        ...

    async def remove(self, key: str, *, expected: int) -> Put:
        """Remove a key if its revision is `expected` (ANY: whatever). An absent key loses with `current=None`."""
        ...

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        """Hand every later batch of events to a plain function on the event loop; returns the way to stop that.

        The function must neither block nor raise.
        """
        ...

    def watch(self, prefix: str, *, since: int) -> AbstractAsyncContextManager[EventStream]:
        """All events of a prefix after revision `since`, from history and then live, without hole or repeat.

        Raises (on entering):
          CompactedError, FutureRevisionError
        """
        ...

    async def compact(self, revision: int) -> None:
        """Forget what was superseded up to `revision`. Raises FutureRevisionError; older than compacted does nothing."""
        ...
