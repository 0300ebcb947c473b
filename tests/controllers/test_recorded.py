"""The behaviour of the real controllers, recorded once and asked from ours.

All scenarios are played side by side, once, in virtual time: every one of them has to agree, whatever the machine's load.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.testing.apiserver import running_apiserver
from tests import virtualtime
from tests.controllers.hollow import HollowNode
from tests.controllers.replay import Replay, scenarios

_SCENARIOS = {scenario["scenario"]: scenario for scenario in scenarios()}

Outcomes = dict[str, list[str]]


async def _outcome(replay: Replay) -> list[str]:
    try:
        await replay.play()
    except TimeoutError as error:
        return [str(error)]
    return replay.outcome()


async def _play(names: list[str]) -> Outcomes:
    """Play scenarios side by side, each in a namespace of its own."""
    async with running_apiserver() as server, Tasks() as tasks:
        key = Path(server.server.config.service_account_key).read_bytes()
        manager = ControllerManager(server.client, ControllersConfig(service_account_key=key))
        tasks.spawn(manager.run(), "controllers")
        await manager.wait_ready()
        async with HollowNode(server.client) as node:
            found = await asyncio.gather(*(_outcome(Replay(server.client, node, _SCENARIOS[name])) for name in names))
    return dict(zip(names, found, strict=True))


@pytest.fixture(scope="module")
def outcomes() -> Outcomes:
    return virtualtime.run(_play(sorted(_SCENARIOS)))


@pytest.mark.parametrize("name", sorted(_SCENARIOS))
def test_controllers_do_what_was_recorded(name: str, outcomes: Outcomes) -> None:
    assert outcomes[name] == []
