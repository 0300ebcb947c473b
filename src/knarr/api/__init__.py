"""The Kubernetes API as data and pure functions; no I/O."""
