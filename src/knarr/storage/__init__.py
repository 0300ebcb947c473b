"""RevisionStore: bytes under keys with one revision counter; memory, SQLite, etcd.

Floor below the API server's watch cache. It knows keys, bytes, revisions and leases, and nothing of Kubernetes
objects. `open_store` picks the implementation by the scheme of a URL; `knarr.storage.protocol` is the contract.
"""

from knarr.storage.errors import CompactedError, FutureRevisionError, SlowWatcherError, StoreError, UnavailableError
from knarr.storage.factory import open_store
from knarr.storage.protocol import ANY, Event, EventStream, Page, Put, RevisionStore, Stored, Subscriber

__all__ = [
    "ANY", "CompactedError", "Event", "EventStream", "FutureRevisionError", "Page", "Put", "RevisionStore",
    "SlowWatcherError", "StoreError", "Stored", "Subscriber", "UnavailableError", "open_store",
]
