"""What a store may raise; a lost compare is no error but a `Put` with `won=False`.

StoreError
  CompactedError        the asked revision is no longer kept: list again
  FutureRevisionError   the asked revision does not exist yet
  SlowWatcherError      the stream's reader fell too far behind: list again
  UnavailableError      the write or read did not happen (disk full, read only, etcd away): try again later
"""

from __future__ import annotations


class StoreError(Exception):
    """Base of everything that a store raises."""


class CompactedError(StoreError):
    """The asked revision is older than the compacted one."""

    def __init__(self, asked: int, compacted: int) -> None:
        super().__init__(f"revision {asked} is compacted; the oldest kept is {compacted}")
        self.asked = asked
        self.compacted = compacted


class FutureRevisionError(StoreError):
    """The asked revision is newer than the current one."""

    def __init__(self, asked: int, current: int) -> None:
        super().__init__(f"revision {asked} does not exist yet; the current one is {current}")
        self.asked = asked
        self.current = current


class SlowWatcherError(StoreError):
    """The stream's bounded buffer ran full and the stream was closed."""


class UnavailableError(StoreError):
    """The store could not do it now; a write that fails so is not stored."""
