"""The behaviour of the real controllers, recorded once and asked from ours."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from knarr.aiokits.tasks import Tasks
from knarr.api.types import Object
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.testing.apiserver import running_apiserver
from tests.controllers.hollow import HollowNode
from tests.controllers.replay import Replay, scenarios

_SCENARIOS = {scenario["scenario"]: scenario for scenario in scenarios()}
# These wait for the next minute, or for a node to be given up.
_SLOW = {name for name in _SCENARIOS if name.startswith("cronjob-")} | {"node-lifecycle-unreachable", "podgc-orphaned-node"}
_QUICK = sorted(_SCENARIOS.keys() - _SLOW)
_TRIES = 3
_APART_SECONDS = 0.2

Outcomes = dict[str, list[str]]


def _length(scenario: Object) -> float:
    return max((entry["t"] for entry in scenario["timeline"]), default=0.0)


async def _outcome(replay: Replay, delay_seconds: float) -> list[str]:
    await asyncio.sleep(delay_seconds)
    try:
        await replay.play()
    except TimeoutError as error:
        return [str(error)]
    return replay.outcome()


async def _play(chosen: list[Object]) -> Outcomes:
    """Play scenarios side by side, each in a namespace of its own: the longest first, and not all in the same moment."""
    chosen = sorted(chosen, key=_length, reverse=True)
    async with running_apiserver() as server, Tasks() as tasks:
        key = Path(server.server.config.service_account_key).read_bytes()
        manager = ControllerManager(server.client, ControllersConfig(service_account_key=key))
        tasks.spawn(manager.run(), "controllers")
        await manager.wait_ready()
        async with HollowNode(server.client) as node:
            plays = [_outcome(Replay(server.client, node, scenario), index * _APART_SECONDS) for index, scenario in enumerate(chosen)]
            found = await asyncio.gather(*plays)
    return {scenario["scenario"]: outcome for scenario, outcome in zip(chosen, found, strict=True)}


async def _play_patiently(names: list[str]) -> Outcomes:
    """Play all at once, and those that the load of the machine disturbed again."""
    outcomes: Outcomes = {}
    for _ in range(_TRIES):
        disturbed = [name for name in names if outcomes.get(name) != []]
        if disturbed:
            outcomes.update(await _play([_SCENARIOS[name] for name in disturbed]))
    return outcomes


@pytest.fixture(scope="module")
def quick() -> Iterator[Outcomes]:
    return asyncio.run(_play_patiently(_QUICK))


@pytest.fixture(scope="module")
def slow() -> Iterator[Outcomes]:
    return asyncio.run(_play_patiently(sorted(_SLOW)))


def _agreement(outcomes: Outcomes) -> None:
    """At least 95 of 100 timelines agree: a hundred scenarios in real time on two cores lose a few to timing."""
    differing = {name: found for name, found in outcomes.items() if found != []}
    assert len(differing) <= max(1, len(outcomes) // 20), differing


def test_controllers_do_what_was_recorded(quick: Outcomes) -> None:
    _agreement(quick)


@pytest.mark.slow
def test_controllers_do_slowly_what_was_recorded(slow: Outcomes) -> None:
    _agreement(slow)
