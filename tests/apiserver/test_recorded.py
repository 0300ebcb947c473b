"""The server answers as the real one did: recorded exchanges, replayed and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apiserver.reasons import reason_for
from tests.apiserver.replay import Difference, Outcome, load, replay

RECORDED = Path(__file__).parent / "recorded"

FILES = ("auth", "crds", "defaults", "invalid", "listwatch", "patches", "subresources")


def unexplained(outcome: Outcome, unstable: set[str]) -> list[Difference]:
    return [d for d in outcome.differences if d.scenario not in unstable and not reason_for(d.scenario, d.what)]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", FILES)
async def test_recorded_exchanges_are_answered_as_recorded(name: str) -> None:
    """Every step is answered as recorded, or its difference has a reason; what differs is played again alone, with all its pauses."""
    scenarios = load(RECORDED / f"{name}.jsonl.gz")
    unstable = {scenario["scenario"] for scenario in scenarios if scenario.get("unstable")}
    different = {d.scenario for d in unexplained(await replay(scenarios), unstable)}
    if different:
        again = await replay([s for s in scenarios if s["scenario"] in different], no_sleep=False, servers=1)
        left = unexplained(again, unstable)
        assert not left, "\n".join(f"{d.scenario}[{d.step}] {d.what[:160]}" for d in left[:40])
