"""Expectations: creations and deletions that were asked for but not yet seen in the cache.

A controller that acts on a stale cache would create or delete twice; it does nothing for an
owner until what it did before has shown up, or five minutes passed.
Source: pkg/controller/controller_utils.go (UIDTrackingControllerExpectations).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knarr.aiokits import clock

_TIMEOUT_SECONDS = 300.0


@dataclass(slots=True)
class _Expected:
    creations: int = 0
    deletions: set[str] = field(default_factory=set)
    since: float = 0.0


class Expectations:
    """Expected creations (a number) and deletions (keys of objects) per owner key."""

    __slots__ = ("_owners",)

    def __init__(self) -> None:
        self._owners: dict[str, _Expected] = {}

    def satisfied(self, owner: str) -> bool:
        """Whether everything asked for was seen, or waited for long enough."""
        expected = self._owners.get(owner)
        if expected is None:
            return True
        if expected.creations <= 0 and not expected.deletions:
            return True
        return clock.now() - expected.since > _TIMEOUT_SECONDS

    def expect(self, owner: str, creations: int, deletions: set[str] | None = None) -> None:
        """Replace what is expected of the owner."""
        self._owners[owner] = _Expected(creations, deletions or set(), clock.now())

    def created(self, owner: str) -> None:
        expected = self._owners.get(owner)
        if expected is not None and expected.creations > 0:
            expected.creations -= 1

    def deleted(self, owner: str, key: str) -> None:
        expected = self._owners.get(owner)
        if expected is not None:
            expected.deletions.discard(key)

    def pending_creations(self, owner: str) -> int:
        expected = self._owners.get(owner)
        return expected.creations if expected is not None else 0

    def forget(self, owner: str) -> None:
        self._owners.pop(owner, None)
