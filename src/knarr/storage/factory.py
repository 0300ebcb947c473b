"""Chooses a store by URL: memory://, sqlite:///path/to/file."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from knarr.storage.protocol import RevisionStore


def open_store(url: str) -> RevisionStore:
    """Make the store that a URL names; it still has to be started.

    Raises:
      ValueError: no store has this scheme, or the URL lacks something.
    """
    parts = urlsplit(url)
    if parts.scheme == "memory":
        from knarr.storage.memory import MemoryStore

        return MemoryStore()
    if parts.scheme == "sqlite":
        from knarr.storage.sqlite import SQLiteStore

        if not parts.path:
            raise ValueError(f"store {url!r} names no file")
        return SQLiteStore(Path(parts.path))
    raise ValueError(f"no store for {url!r}: memory:// and sqlite:///FILE are known")
