"""Job: pods that run to completion, each counted exactly once.

`indexes` and `policies` are pure, `tracking` keeps what the cache does not show yet, `sync` works
one Job, `controller` wires events.
"""
