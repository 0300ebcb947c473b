"""Whom preemption would evict: by numbers alone the same as by asking all filters anew."""

from __future__ import annotations

import random
from typing import Any

import pytest

from knarr.scheduler.framework import Diagnosis
from knarr.scheduler.plugins.preemption import Candidate, DefaultPreemption, _Trial

from .world import World


def _crowded(seed: int) -> tuple[World, Any]:
    """Nodes full of pods of several priorities, some behind budgets, some nominated; and a pod that fits nowhere."""
    draw = random.Random(seed)
    world = World(seed)
    for number in range(draw.randint(1, 6)):
        taints = [{"key": "k", "value": "", "effect": "NoSchedule"}] if draw.random() < 0.2 else []
        world.node(f"n{number}", cpu="4", taints=taints)
        for index in range(draw.randint(1, 8)):
            labels = {"app": draw.choice(["a", "b"])}
            pod = world.pod(
                f"p{number}-{index}", cpu=f"{draw.choice([500, 900, 1300])}m", labels=labels, priority=draw.choice([0, 5, 10, 100])
            )
            if draw.random() < 0.5:
                pod.pod["status"] = {"startTime": f"2026-01-01T00:00:{draw.randint(10, 59)}Z"}
            world.place(pod, f"n{number}")
        if draw.random() < 0.3:
            world.queue.nominator.set(world.pod(f"nominated{number}", cpu="500m", priority=50), f"n{number}")
    spec = {"selector": {"matchLabels": {"app": "a"}}}
    budget = {"metadata": {"name": "b", "namespace": "default"}, "spec": spec, "status": {"disruptionsAllowed": draw.randint(0, 2)}}
    world.handle.objects.set("PodDisruptionBudget", budget)
    return world, world.pod("new", cpu=f"{draw.choice([1000, 2000, 3500])}m", priority=50)


@pytest.mark.parametrize("seed", range(150))
def test_counting_resources_finds_the_same_victims_as_asking_all_filters(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    world, pod = _crowded(seed)
    decided = world.decide(pod)
    if not isinstance(decided, Diagnosis):
        return
    plugin = world.profile.plugin("DefaultPreemption")
    assert isinstance(plugin, DefaultPreemption)

    def find() -> Any:
        world.handle.random.seed(seed)
        found = plugin.find(world.profile, pod, decided, world.queue.nominator)
        if isinstance(found, list):
            return sorted((c.node_name, [v.uid for v in c.victims], c.violations) for c in found if isinstance(c, Candidate))
        return found.message

    before = world.handle.table.requested.copy(), world.handle.table.pods_count.copy()
    quick = find()
    monkeypatch.setattr(_Trial, "look_at", lambda self, rows: setattr(self, "_fit", None))
    assert quick == find()
    table = world.handle.table
    assert (table.requested == before[0]).all()
    assert (table.pods_count == before[1]).all()
