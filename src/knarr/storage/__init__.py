"""RevisionStore: bytes under keys with one revision counter; memory, SQLite, etcd."""
