"""Every recorded scenario of a real cluster's scheduler, played on our API server, controllers and scheduler.

All scenarios run at once, each in its own namespace with its own nodes. Where the real scheduler
draws lots between equal nodes, only the shape of the outcome is compared.
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.scheduler import Scheduler
from knarr.testing.apiserver import running_apiserver

from . import replay

CONTROLLERS = (
    "namespace-controller,serviceaccount-controller,replicaset-controller,persistentvolume-binder-controller,disruption-controller"
)

DRAWN_BY_LOT = {
    "pod-affinity-zone",
    "pod-affinity-preferred",
    "pod-anti-affinity-hostname",
    "spread-mindomains",
    "spread-replicaset-default",
    "spread-scheduleanyway",
    "spread-zone-donotschedule",
}
"""Scenarios in which several nodes are equally good, or pods have names that are not known beforehand."""

States = dict[str, list[tuple[Any, ...]]]


async def _play(names: set[str]) -> list[tuple[str, States, States, Any]]:
    """Play the scenarios; an error takes the place of None when one did not reach its end."""
    async with running_apiserver() as server:
        clients = [Client(server.client_config) for _ in range(2)]
        scheduler = Scheduler(clients[0], SchedulerConfig())
        controllers = ControllerManager(clients[1], ControllersConfig(enabled=CONTROLLERS))
        tasks = [asyncio.create_task(scheduler.run()), asyncio.create_task(controllers.run())]
        world = replay.World(server.client)
        try:
            await world.start()
            await scheduler.ready.wait()
            runs = [replay.Replay(world, scenario) for name, scenario in replay.load().items() if name in names]
            ended = await asyncio.gather(*(run.run() for run in runs), return_exceptions=True)
            await _agrees(scheduler, server.client)
            return [(run.scenario["scenario"], run.seen(), run.recorded(), error) for run, error in zip(runs, ended, strict=True)]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await world.close()
            for client in clients:
                await client.close()


async def _agrees(scheduler: Scheduler, client: Client) -> None:
    """Wait until the node table holds exactly the pods that the API server shows on nodes, and nothing is left assumed."""
    for _ in range(50):
        pods = (await client.list(replay.by_plural("pods")))["items"]
        wanted = {
            (pod["spec"]["nodeName"], pod["metadata"]["uid"])
            for pod in pods
            if pod["spec"].get("nodeName") and (pod.get("status") or {}).get("phase") not in ("Succeeded", "Failed")
        }
        table = scheduler.handle.table
        names = {node["metadata"]["name"] for node in (await client.list(replay.by_plural("nodes")))["items"]}
        held = {(name, uid) for name in names if (info := table.get(name)) is not None for uid in info.pods}
        if held == wanted and not scheduler.handlers.assumed:
            text = scheduler.exposition().decode()
            assert f'scheduler_cache_size{{type="nodes"}} {float(len(names))}' in text
            assert 'scheduler_cache_size{type="assumed_pods"} 0.0' in text
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"the node table differs: {held ^ wanted}")


def _placed_anywhere(states: States) -> list[list[tuple[Any, ...]]]:
    """The states without the names of pods and nodes."""
    return sorted(
        [(deleted, deleting, node is not None, conditions) for deleted, deleting, node, _, conditions in seen] for seen in states.values()
    )


@pytest.mark.timeout(120)
async def test_pods_pass_through_the_recorded_states() -> None:
    played = await _play(set(replay.load()))
    assert len(played) > 40
    assert {name: repr(error) for name, _, _, error in played if error is not None} == {}
    exact = [run for run in played if run[0] not in DRAWN_BY_LOT]
    assert {name: seen for name, seen, _, _ in exact} == {name: recorded for name, _, recorded, _ in exact}
    for name, seen, recorded, _ in played:
        assert _placed_anywhere(seen) == _placed_anywhere(recorded), name
