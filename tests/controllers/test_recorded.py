"""The behaviour of the real controllers, recorded once and asked from ours.

All scenarios but one are played side by side, once, in virtual time: every one of them has to agree, whatever the machine's load.
The one was recorded while other nodes' evictions had used up the zone's ration, so it is played beside nodes that do that.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.resources import NODES
from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.testing.apiserver import running_apiserver
from tests import virtualtime
from tests.controllers.hollow import NODE, HollowNode, ready_conditions
from tests.controllers.replay import Replay, scenarios

_SCENARIOS = {scenario["scenario"]: scenario for scenario in scenarios()}
_RATIONED = "node-lifecycle-unreachable"
# More healthy nodes than silent ones: a zone that is mostly gone has no evictions at all.
_HEALTHY = (NODE, "hollow-b", "hollow-c", "hollow-d")

Outcomes = dict[str, list[str]]


async def _outcome(replay: Replay) -> list[str]:
    try:
        await replay.play()
    except TimeoutError as error:
        return [str(error)]
    return replay.outcome()


async def _make_silent(client: Client) -> None:
    """Two nodes that are heard once: each takes one eviction of the one in ten seconds that a zone has."""
    for name in ("silent-a", "silent-b"):
        await client.create(NODES, {"metadata": {"name": name}})
        await client.patch(NODES, name, None, {"status": {"conditions": ready_conditions()}}, subresource="status")


async def _play(names: list[str], nodes: Sequence[str] = (NODE,), silent: bool = False) -> Outcomes:
    """Play scenarios side by side, each in a namespace of its own."""
    async with running_apiserver() as server, Tasks() as tasks:
        key = Path(server.server.config.service_account_key).read_bytes()
        manager = ControllerManager(server.client, ControllersConfig(service_account_key=key))
        tasks.spawn(manager.run(), "controllers")
        await manager.wait_ready()
        async with HollowNode(server.client, names=nodes) as node:
            if silent:
                await _make_silent(server.client)
            found = await asyncio.gather(*(_outcome(Replay(server.client, node, _SCENARIOS[name])) for name in names))
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    crowd = virtualtime.run(_play(sorted(_SCENARIOS.keys() - {_RATIONED})))
    return {**crowd, **virtualtime.run(_play([_RATIONED], _HEALTHY, silent=True))}


@pytest.mark.parametrize("name", sorted(_SCENARIOS))
def test_controllers_do_what_was_recorded(name: str, outcomes: Outcomes) -> None:
    assert outcomes[name] == []
