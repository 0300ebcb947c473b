"""`knarr backup` and `knarr restore`: the cluster's store to a file and back.

The file holds every API object. Keys and certificates stay in the cluster's data directory: a backup is restored into the
cluster it came from, or into one with the same keys.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from urllib.parse import urlsplit

from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError, is_running
from knarr.storage import StoreError
from knarr.storage import backup as copies


def backup(config: ClusterConfig, path: Path) -> copies.Summary:
    """Write the store to a file; the cluster may be running. Raises CommandError."""
    try:
        return asyncio.run(copies.backup(config.store_url, path))
    except (StoreError, OSError) as error:
        raise CommandError(f"backup failed: {error}") from error


def restore(config: ClusterConfig, path: Path) -> copies.Summary:
    """Put a backup in the place of the store of a cluster that is down; the old store file is kept beside it. Raises CommandError."""
    if is_running(config):
        raise CommandError(f"cluster {config.name} is running; stop it first: knarr down --name {config.name}")
    try:
        copies.read(path)
        kept = _put_aside(config.store_url)
        try:
            return asyncio.run(copies.restore(config.store_url, path))
        except BaseException:
            if kept is not None:
                kept.replace(urlsplit(config.store_url).path)
            raise
    except (StoreError, OSError) as error:
        raise CommandError(f"restore failed: {error}") from error


def _put_aside(url: str) -> Path | None:
    """Move an embedded store's file out of the way; None for other stores and when there is none."""
    parts = urlsplit(url)
    file = Path(parts.path)
    if parts.scheme != "sqlite" or not file.exists():
        return None
    asyncio.run(_settle(url))
    kept = file.with_name(file.name + ".before-restore")
    file.replace(kept)
    for suffix in ("-wal", "-shm"):
        file.with_name(file.name + suffix).unlink(missing_ok=True)
    return kept


async def _settle(url: str) -> None:
    """Open and close the store, so that its file alone holds everything."""
    from knarr.storage import open_store

    store = open_store(url)
    await store.start()
    await store.close()
