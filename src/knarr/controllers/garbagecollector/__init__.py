"""Garbage collection of dependents: `graph` knows who owns whom, `watcher` feeds it, `controller` acts."""
