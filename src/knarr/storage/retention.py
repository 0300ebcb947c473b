"""How much history an embedded store keeps: by age, by count and by size, whichever is reached first.

Pure bookkeeping: the store notes each commit and asks, once in a while, up to which revision it may compact.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Retention:
    """Limits of the history."""

    seconds: float = 300.0
    """Revisions younger than this are kept, unless one of the other limits says no. Upstream compacts each 5 minutes."""
    revisions: int = 100_000
    """Most revisions of history kept."""
    history_bytes: int = 64 << 20
    """Most bytes of values kept as history."""


class History:
    """Marks of (time, revision, bytes written so far), at most one a second or a thousand revisions."""

    def __init__(self, retention: Retention, now: float, revision: int) -> None:
        self._retention = retention
        self._bytes = 0
        self._marks: deque[tuple[float, int, int]] = deque([(now, revision, 0)])

    def note(self, now: float, revision: int, written_bytes: int) -> bool:
        """Remember a commit; True when the history is larger than allowed by a tenth, so that compaction should not wait for its timer."""
        self._bytes += written_bytes
        last_time, last_revision, _ = self._marks[-1]
        if now - last_time < 1.0 and revision - last_revision < 1000:
            return False
        self._marks.append((now, revision, self._bytes))
        _, oldest, written = self._marks[0]
        return revision - oldest > 1.1 * self._retention.revisions or self._bytes - written > 1.1 * self._retention.history_bytes

    def compactable(self, now: float, revision: int) -> int:
        """The newest marked revision that no limit protects; 0 when there is none."""
        retention = self._retention
        found = 0
        while self._marks:
            at, marked, written = self._marks[0]
            old = now - at > retention.seconds
            many = revision - marked > retention.revisions
            large = self._bytes - written > retention.history_bytes
            if not (old or many or large):
                break
            found = marked
            if len(self._marks) == 1:
                break
            self._marks.popleft()
        return found
