"""The process of simulated nodes and of what happens to pods on them; it exists only in clusters that simulate."""

from __future__ import annotations

from knarr.client.rest import Client
from knarr.cluster.config import ClusterConfig
from knarr.cluster.processes import common
from knarr.cluster.supervisor import Announce

NAME = "simulator"


def main(config: ClusterConfig, announce: Announce) -> None:
    """Simulate what the cluster's simulation.json declares, until stopped."""
    from knarr.cluster import simverbs
    from knarr.simulate import stages
    from knarr.simulate.simulator import Simulator, SimulatorConfig

    wanted = simverbs.load(config)
    settings = SimulatorConfig(wanted.nodes, tainted=wanted.tainted, stages=simverbs.stages_text(config) or stages.DEFAULT)

    async def simulate() -> None:
        client = Client(common.client_config(config, common.pair(config, "admin"), "knarr-simulator"))
        try:
            await Simulator(client, settings).run()
        finally:
            await client.close()

    common.run(simulate)
