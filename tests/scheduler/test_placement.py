"""Filters against plain models on random clusters, messages word for word, the node table's bookkeeping."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest

from knarr.scheduler.algorithm import Found

from .world import ZONE, World

SELECTOR = {"matchLabels": {"app": "x"}}


def _random_world(seed: int) -> tuple[World, dict[str, str], dict[str, list[dict[str, str]]]]:
    """A world, the zone of each node, the labels of the pods on each node."""
    lot = random.Random(seed)
    world = World(seed)
    zones = {f"n{i}": f"z{lot.randrange(4)}" for i in range(lot.randrange(2, 25))}
    for name, zone in zones.items():
        world.node(name, zone=zone)
    placed: dict[str, list[dict[str, str]]] = {name: [] for name in zones}
    for i in range(lot.randrange(30)):
        node, labels = lot.choice(list(zones)), lot.choice([{"app": "x"}, {"app": "y"}, {}])
        placed[node].append(labels)
        world.place(world.pod(f"p{i}", cpu="1m", labels=labels), node)
    return world, zones, placed


def _matching(zones: dict[str, str], placed: dict[str, list[dict[str, str]]]) -> Counter[str]:
    """Pods with app=x per zone."""
    counts: Counter[str] = Counter(dict.fromkeys(zones.values(), 0))
    for node, pods in placed.items():
        counts[zones[node]] += sum(labels.get("app") == "x" for labels in pods)
    return counts


@pytest.mark.parametrize("seed", range(40))
def test_spreading_is_as_the_definition_says(seed: int) -> None:
    world, zones, placed = _random_world(seed)
    skew = 1 + seed % 3
    constraint = {"maxSkew": skew, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule", "labelSelector": SELECTOR}
    counts = _matching(zones, placed)
    wanted = {node for node, zone in zones.items() if counts[zone] + 1 - min(counts.values()) <= skew}
    assert world.feasible(world.pod("new", labels={"app": "x"}, topologySpreadConstraints=[constraint])) == wanted


@pytest.mark.parametrize("seed", range(40))
def test_pod_affinity_and_anti_affinity_are_as_the_definition_says(seed: int) -> None:
    world, zones, placed = _random_world(seed)
    counts = _matching(zones, placed)
    terms = [{"labelSelector": SELECTOR, "topologyKey": ZONE}]
    rule = "requiredDuringSchedulingIgnoredDuringExecution"
    together = world.pod("a", affinity={"podAffinity": {rule: terms}})
    assert world.feasible(together) == {node for node, zone in zones.items() if counts[zone]}
    apart = world.pod("b", affinity={"podAntiAffinity": {rule: terms}})
    assert world.feasible(apart) == {node for node, zone in zones.items() if not counts[zone]}
    own = world.pod("c", labels={"app": "x"}, affinity={"podAffinity": {rule: terms}})
    first_of_its_kind = not any(counts.values())
    assert world.feasible(own) == {node for node, zone in zones.items() if counts[zone] or first_of_its_kind}


@pytest.mark.parametrize("seed", range(20))
def test_anti_affinity_of_placed_pods_counts_too(seed: int) -> None:
    world, zones, _ = _random_world(seed)
    guarded = random.Random(seed).choice(list(zones))
    rule = {"requiredDuringSchedulingIgnoredDuringExecution": [{"labelSelector": {"matchLabels": {"app": "new"}}, "topologyKey": ZONE}]}
    guard = world.pod("guard", affinity={"podAntiAffinity": rule})
    world.place(guard, guarded)
    newcomer = world.pod("new", labels={"app": "new"})
    assert world.feasible(newcomer) == {node for node, zone in zones.items() if zone != zones[guarded]}
    world.handle.table.remove_pod(guard)
    assert world.feasible(newcomer) == set(zones)


@pytest.mark.parametrize("seed", range(20))
def test_resources_after_any_sequence_of_changes(seed: int) -> None:
    lot, world = random.Random(seed), World(seed)
    free: dict[str, int] = {}
    pods: dict[str, tuple[Any, str, int]] = {}
    for i in range(200):
        action = lot.randrange(6)
        if action == 0 or not free:
            world.node(f"n{i}", cpu="2")
            free[f"n{i}"] = 2000
        elif action == 1 and len(free) > 1:
            gone = lot.choice(list(free))
            world.handle.table.remove_node(gone)
            for uid in [uid for uid, (_, node, _) in pods.items() if node == gone]:
                world.handle.table.remove_pod(pods.pop(uid)[0])
            del free[gone]
        elif action == 2 and pods:
            info, node, amount = pods.pop(lot.choice(list(pods)))
            world.handle.table.remove_pod(info)
            free[node] += amount
        else:
            amount = lot.choice([100, 500, 900])
            info = world.pod(f"p{i}", cpu=f"{amount}m")
            wanted = {node for node, left in free.items() if left >= amount}
            assert world.feasible(info) == wanted
            if wanted:
                node = lot.choice(sorted(wanted))
                world.place(info, node)
                pods[info.uid] = (info, node, amount)
                free[node] -= amount


def test_messages_are_upstreams() -> None:
    world = World()
    world.node("a", cpu="1")
    world.node("b", taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}])
    world.node("c", cpu="1")
    found = world.decide(world.pod("p", cpu="2"))
    assert not isinstance(found, Found)
    assert found.message() == "0/3 nodes are available: 1 node(s) had untolerated taint {k: v}, 2 Insufficient cpu."
    found = world.decide(world.pod("q", nodeSelector={"no": "where"}))
    assert not isinstance(found, Found)
    assert found.message() == (
        "0/3 nodes are available: 1 node(s) had untolerated taint {k: v}, 2 node(s) didn't match Pod's node affinity/selector."
    )


def test_the_emptier_node_is_chosen() -> None:
    world = World()
    world.node("full")
    world.node("empty")
    world.place(world.pod("p", cpu="3"), "full")
    found = world.decide(world.pod("q"))
    assert isinstance(found, Found)
    assert found.node_name == "empty"


def test_preferred_hosts_win_over_emptier_ones() -> None:
    world = World()
    world.node("full", disk="fast")
    world.node("empty")
    world.place(world.pod("p", cpu="1"), "full")
    term = {"weight": 100, "preference": {"matchExpressions": [{"key": "disk", "operator": "Exists"}]}}
    found = world.decide(world.pod("q", affinity={"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": [term]}}))
    assert isinstance(found, Found)
    assert found.node_name == "full"
    assert world.handle.table.get("full") is not None
