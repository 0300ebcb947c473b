"""Owned tasks, bounded queues, rate limits, back-off, the clock; knows nothing of Kubernetes."""
