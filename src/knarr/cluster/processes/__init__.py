"""The component processes: what each one is made of, and the order in which the supervisor forks them.

Role: the only place where components are wired to each other's addresses, folders and credentials. Components themselves never
meet: each gets a Client of its own and finds the rest through the API.
"""

from __future__ import annotations

import functools
import socket
from typing import Any

from knarr.cluster import simverbs, supervisor
from knarr.cluster.config import ClusterConfig, load


def supervise(config: ClusterConfig, listener: socket.socket | None, announce_fd: int) -> None:
    """Be the supervisor of a cluster until it is stopped; without a listener of a machine that joined one, which runs its node alone."""
    # What every component needs is imported before the forks, so that its pages are shared; what only one needs (numpy,
    # netlink) is imported by that one, at the same time as the others import theirs.
    import knarr.api.resources
    import knarr.client.informer
    import knarr.client.rest  # noqa: F401
    from knarr.cluster.processes import node

    boss = supervisor.Supervisor(config, announce_fd)
    if listener is not None:
        from knarr.cluster.processes import apiserver, control

        boss.add("apiserver", functools.partial(apiserver.main, config, listener))
    for entry in config.nodes:
        if not entry.stopped:
            boss.add(entry.name, functools.partial(node.main, config, entry), functools.partial(node.orderly_seconds, config))
    if listener is not None:
        boss.add("control", functools.partial(control.main, config))

    def start_node(arguments: dict[str, Any]) -> None:
        """Start a node that the command line has written into the configuration."""
        stored = load(config.name, config.data_dir)
        assert stored is not None
        config.nodes = stored.nodes
        entry = next(entry for entry in config.nodes if entry.name == arguments["node"])
        if entry.name in boss.components:
            boss.start_component(entry.name)
        else:
            boss.add(entry.name, functools.partial(node.main, config, entry), functools.partial(node.orderly_seconds, config))

    def start_simulator(_: dict[str, Any]) -> None:
        """Start the simulator, or start it anew with what is declared now."""
        from knarr.cluster.processes import simulator

        if simulator.NAME in boss.components:
            boss.forget(simulator.NAME)
        boss.add(simulator.NAME, functools.partial(simulator.main, config))

    if listener is not None and simverbs.load(config).nodes:
        start_simulator({})
    boss.handlers["start-node"] = start_node
    boss.handlers["simulate"] = start_simulator
    boss.handlers["forget"] = lambda arguments: boss.forget(arguments["component"])
    boss.run()
