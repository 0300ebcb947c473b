"""Chooses a store by URL: memory://, sqlite:///path/to/file, etcd3://host:port,host:port?ca=…&cert=…&key=…."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

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
        return SQLiteStore(Path("/" + parts.path.lstrip("/")))
    if parts.scheme in ("etcd3", "etcd3s", "etcd"):
        from knarr.storage.etcd import EtcdConfig, EtcdStore

        options = {name: values[-1] for name, values in parse_qs(parts.query).items()}
        endpoints = tuple(endpoint for endpoint in parts.netloc.split(",") if endpoint)
        if not endpoints:
            raise ValueError(f"store {url!r} names no endpoint")
        return EtcdStore(EtcdConfig(
            endpoints=endpoints, prefix=parts.path.rstrip("/"), tls=parts.scheme == "etcd3s" or "ca" in options,
            ca=options.get("ca", ""), cert=options.get("cert", ""), key=options.get("key", ""),
        ))
    raise ValueError(f"no store for {url!r}: memory://, sqlite:///FILE and etcd3://HOST:PORT are known")
