"""The server answers as the real one did: recorded exchanges, replayed and compared."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.apiserver.reasons import reason_for
from tests.apiserver.replay import load, replay

RECORDED = Path(__file__).parent / "recorded"

# File -> least share of steps that must be equal, expected differences not counted.
LEAST = {"listwatch": 0.99, "subresources": 0.995, "crds": 0.99, "patches": 0.99, "defaults": 0.99, "auth": 0.999, "invalid": 0.99}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", sorted(LEAST))
async def test_recorded_exchanges_are_answered_as_recorded(name: str) -> None:
    scenarios = load(RECORDED / f"{name}.jsonl.gz")
    unstable = {scenario["scenario"] for scenario in scenarios if scenario.get("unstable")}
    outcome = await replay(scenarios)
    unexplained = [d for d in outcome.differences if d.scenario not in unstable and not reason_for(d.scenario, d.what)]
    share = 1 - len(unexplained) / outcome.steps
    report = "\n".join(f"{d.scenario}[{d.step}] {d.what[:160]}" for d in unexplained[:40])
    assert share >= LEAST[name], f"{share:.4f} equal\n{report}"
