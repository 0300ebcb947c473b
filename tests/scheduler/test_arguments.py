"""Each argument of the plugins, and what is switched at single extension points, changes a decision: without it and with it."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.scheduler.algorithm import Found
from knarr.scheduler.config import ProfileConfig, read_configuration
from knarr.scheduler.framework import Diagnosis
from knarr.scheduler.plugins.preemption import DefaultPreemption
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.registry import build_profile

from .world import HOST, ZONE, Object, World

FOO = "example.com/foo"
SELECTED = {"labelSelector": {"matchLabels": {"app": "x"}}, "topologyKey": HOST}
REQUIRED, PREFERRED = "requiredDuringSchedulingIgnoredDuringExecution", "preferredDuringSchedulingIgnoredDuringExecution"


def _profile(**document: Any) -> ProfileConfig:
    kind = {"apiVersion": "kubescheduler.config.k8s.io/v1", "kind": "KubeSchedulerConfiguration"}
    return read_configuration({**kind, "profiles": [document]}).profiles[0]


def _with(plugin: str, **args: Any) -> ProfileConfig:
    return _profile(pluginConfig=[{"name": plugin, "args": args}])


def _chosen(world: World, config: ProfileConfig, pod: PodInfo) -> str:
    """The name of the node, "" when there is none."""
    found = world.algorithm.schedule(build_profile(config, world.handle), pod)
    return found.node_name if isinstance(found, Found) else ""


def _containers(**requests: str) -> dict[str, Any]:
    amounts = {name.replace("foo", FOO): amount for name, amount in requests.items()}
    return {"containers": [{"name": "c", "image": "i", "resources": {"requests": amounts}}]}


@pytest.mark.parametrize("args", [{"ignoredResources": [FOO]}, {"ignoredResourceGroups": ["example.com"]}])
def test_resources_that_are_ignored_are_not_counted(args: Object) -> None:
    world = World()
    world.node("n")
    pod = world.pod("p", **_containers(cpu="1", foo="1"))
    assert _chosen(world, ProfileConfig(), pod) == ""
    assert _chosen(world, _with("NodeResourcesFit", **args), pod) == "n"


_CPU = [{"name": "cpu", "weight": 1}]
_SHAPE = {"shape": [{"utilization": 0, "score": 0}, {"utilization": 50, "score": 10}, {"utilization": 51, "score": 0}]}


@pytest.mark.parametrize(
    ("strategy", "node"),
    [
        ({"type": "LeastAllocated", "resources": _CPU}, "empty"),
        ({"type": "MostAllocated", "resources": _CPU}, "full"),
        ({"type": "RequestedToCapacityRatio", "resources": _CPU, "requestedToCapacityRatio": _SHAPE}, "half"),
    ],
)
def test_the_scoring_strategy_decides_how_full_a_node_is_to_be(strategy: Object, node: str) -> None:
    world = World()
    for name, used in (("empty", "1m"), ("half", "1900m"), ("full", "3")):
        world.node(name)
        world.place(world.pod(f"on-{name}", cpu=used), name)
    config = _profile(
        plugins={"multiPoint": {"disabled": [{"name": "NodeResourcesBalancedAllocation"}]}},
        pluginConfig=[{"name": "NodeResourcesFit", "args": {"scoringStrategy": strategy}}],
    )
    assert _chosen(world, config, world.pod("p", cpu="100m")) == node


@pytest.mark.parametrize(("weights", "node"), [((10, 1), "little-memory"), ((1, 10), "little-cpu")])
def test_the_scoring_strategy_weighs_resources(weights: tuple[int, int], node: str) -> None:
    world = World()
    for name, requests in (("little-memory", {"memory": "7Gi"}), ("little-cpu", {"cpu": "3500m"})):
        world.node(name)
        world.place(world.pod(f"on-{name}", **_containers(**requests)), name)
    resources = [{"name": name, "weight": weight} for name, weight in zip(("cpu", "memory"), weights, strict=True)]
    strategy = {"type": "LeastAllocated", "resources": resources}
    assert _chosen(world, _with("NodeResourcesFit", scoringStrategy=strategy), world.pod("p", **_containers(cpu="1m", memory="1Mi"))) == node


def test_balance_is_between_the_resources_named() -> None:
    only = {"score": {"disabled": [{"name": "*"}], "enabled": [{"name": "NodeResourcesBalancedAllocation"}]}}
    world = World()
    # Balanced in CPU and memory the one, in CPU and the device the other.
    for name, requests in (("memory", {"cpu": "2", "memory": "4Gi"}), ("device", {"cpu": "2", "foo": "4"})):
        world.handle.table.set_node(
            {
                "metadata": {"name": name, "labels": {HOST: name}},
                "status": {"allocatable": {"cpu": "4", "memory": "8Gi", "pods": "9", FOO: "8"}},
            }
        )
        world.place(world.pod(f"on-{name}", **_containers(**requests)), name)
    pod = world.pod("p", **_containers(cpu="10m", memory="20Mi", foo="0"))
    assert _chosen(world, _profile(plugins=only), pod) == "memory"
    pod = world.pod("q", **_containers(cpu="10m", foo="1"))
    args = {"resources": [{"name": "cpu", "weight": 1}, {"name": FOO, "weight": 1}]}
    assert _chosen(world, _profile(plugins=only, pluginConfig=[{"name": "NodeResourcesBalancedAllocation", "args": args}]), pod) == "device"


@pytest.mark.parametrize(
    ("affinity", "args"),
    [
        ({REQUIRED: [SELECTED]}, {"hardPodAffinityWeight": 0}),
        ({PREFERRED: [{"weight": 100, "podAffinityTerm": SELECTED}]}, {"ignorePreferredTermsOfExistingPods": True}),
    ],
    ids=["hardPodAffinityWeight", "ignorePreferredTermsOfExistingPods"],
)
def test_what_placed_pods_wish_counts_as_configured(affinity: Object, args: Object) -> None:
    world = World()
    for name in ("wished", "empty"):
        world.node(name)
    world.place(world.pod("wishing", cpu="2", affinity={"podAffinity": affinity}), "wished")
    pod = world.pod("p", labels={"app": "x"})
    assert _chosen(world, ProfileConfig(), pod) == "wished"
    assert _chosen(world, _with("InterPodAffinity", **args), pod) == "empty"


def _spread_world() -> World:
    """Two pods of a Service in zone a; zone b has the fuller nodes."""
    world = World()
    world.handle.objects.set("Service", {"metadata": {"name": "s", "namespace": "default"}, "spec": {"selector": {"app": "x"}}})
    for zone in ("a", "b"):
        world.node(zone, zone=zone)
    for number in range(2):
        world.place(world.pod(f"x{number}", cpu="1m", labels={"app": "x"}), "a")
    world.place(world.pod("other", cpu="2"), "b")
    return world


def test_default_constraints_spread_pods_that_have_none() -> None:
    world = _spread_world()
    hard = [{"maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule"}]
    spreading = _with("PodTopologySpread", defaultingType="List", defaultConstraints=hard)
    assert _chosen(world, spreading, world.pod("p", labels={"app": "x"})) == "b"
    # Zone b has no room for this one.
    big = world.pod("q", cpu="3", labels={"app": "x"})
    assert _chosen(world, ProfileConfig(), big) == "a"
    assert _chosen(world, spreading, big) == ""


def test_without_default_constraints_nothing_is_spread() -> None:
    world = _spread_world()
    pod = world.pod("p", labels={"app": "x"})
    assert _chosen(world, ProfileConfig(), pod) == "b"
    assert _chosen(world, _with("PodTopologySpread", defaultingType="List"), pod) == "a"


def test_added_affinity_holds_for_every_pod() -> None:
    world = World()
    world.node("big", cpu="64", disk="slow")
    world.node("small", disk="fast")
    expression = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["fast"]}]}
    pod = world.pod("p")
    assert _chosen(world, ProfileConfig(), pod) == "big"
    for added in ({REQUIRED: {"nodeSelectorTerms": [expression]}}, {PREFERRED: [{"weight": 100, "preference": expression}]}):
        assert _chosen(world, _with("NodeAffinity", addedAffinity=added), pod) == "small"


@pytest.mark.parametrize(
    ("args", "number"),
    [
        ({}, 20),
        ({"minCandidateNodesAbsolute": 3}, 3),
        ({"minCandidateNodesAbsolute": 3, "minCandidateNodesPercentage": 50}, 10),
        ({"minCandidateNodesAbsolute": 0, "minCandidateNodesPercentage": 5}, 1),
    ],
)
def test_so_many_nodes_are_tried_for_preemption(args: Object, number: int) -> None:
    world = World()
    for index in range(20):
        world.node(f"n{index}")
        world.place(world.pod(f"low{index}", cpu="3"), f"n{index}")
    profile = build_profile(_with("DefaultPreemption", **args), world.handle)
    pod = world.pod("p", cpu="3", priority=10)
    diagnosis = world.algorithm.schedule(profile, pod)
    plugin = profile.plugin("DefaultPreemption")
    assert isinstance(diagnosis, Diagnosis)
    assert isinstance(plugin, DefaultPreemption)
    candidates = plugin.find(profile, pod, diagnosis, world.queue.nominator)
    assert isinstance(candidates, list)
    assert len(candidates) == number


def test_single_points_take_a_star_and_plugins_beside_it() -> None:
    world = World()
    world.node("wished", cpu="2", disk="fast")
    world.node("roomy", cpu="64")
    expression = {"matchExpressions": [{"key": "disk", "operator": "In", "values": ["fast"]}]}
    pod = world.pod("p", affinity={"nodeAffinity": {PREFERRED: [{"weight": 1, "preference": expression}]}})
    everything = {"disabled": [{"name": "*"}]}
    assert _chosen(world, ProfileConfig(), pod) == "wished"
    assert _chosen(world, _profile(plugins={"score": {**everything, "enabled": [{"name": "NodeResourcesFit"}]}}), pod) == "roomy"
    assert _chosen(world, _profile(plugins={"score": {"enabled": [{"name": "NodeResourcesFit", "weight": 100}]}}), pod) == "roomy"


def test_a_plugin_enabled_at_one_point_acts_only_there() -> None:
    world = World()
    world.node("full", cpu="50m")
    world.node("tainted", taints=[{"key": "k", "value": "", "effect": "NoSchedule"}])
    everything, fit = {"disabled": [{"name": "*"}]}, {"enabled": [{"name": "NodeResourcesFit"}]}
    assert _chosen(world, _profile(plugins={"multiPoint": everything, "filter": fit}), world.pod("p")) == "tainted"
    assert _chosen(world, _profile(plugins={"filter": everything}), world.pod("q", nodeSelector={HOST: "full"})) in ("full", "tainted")
    profile = build_profile(_profile(plugins={"multiPoint": everything, "filter": fit}), world.handle)
    assert [[plugin.name for plugin in point] for point in (profile.filters, profile.scores)] == [["NodeResourcesFit"], []]


_TWICE = [{"maxSkew": 1, "topologyKey": ZONE, "whenUnsatisfiable": "DoNotSchedule"}] * 2


@pytest.mark.parametrize(
    ("plugin", "args", "words"),
    [
        ("DefaultPreemption", {"minCandidateNodesPercentage": 101}, r"minCandidateNodesPercentage: .*not in valid range \[0, 100\]"),
        ("DefaultPreemption", {"minCandidateNodesPercentage": 0, "minCandidateNodesAbsolute": 0}, "cannot be zero at the same time"),
        ("InterPodAffinity", {"hardPodAffinityWeight": 101}, r"not in valid range \[0, 100\]"),
        ("NodeAffinity", {"addedAffinity": {REQUIRED: {"nodeSelectorTerms": []}}}, "at least one node selector term"),
        ("PodTopologySpread", {"defaultConstraints": _TWICE[:1]}, "when .defaultConstraints are not empty"),
        ("PodTopologySpread", {"defaultingType": "List", "defaultConstraints": _TWICE}, "Duplicate value"),
        ("PodTopologySpread", {"defaultingType": "List", "defaultConstraints": [{}]}, r"maxSkew.*topologyKey.*whenUnsatisfiable"),
        ("NodeResourcesFit", {"ignoredResourceGroups": ["a/b"]}, "resource group name can't contain"),
        ("NodeResourcesFit", {"scoringStrategy": {"type": "Best"}}, "Unsupported value"),
        ("NodeResourcesFit", {"scoringStrategy": {"type": "RequestedToCapacityRatio"}}, "at least one point"),
        ("NodeResourcesFit", {"scoringStrategy": {"type": "LeastAllocated", "resources": [{"name": "cpu", "weight": 101}]}}, r"\(0, 100\]"),
        ("NodeResourcesFit", {"scoringStrategy": "LeastAllocated"}, "NodeResourcesFitArgs"),
        ("NodeResourcesBalancedAllocation", {"resources": [{"name": "cpu", "weight": 2}]}, "must be 1"),
        ("VolumeBinding", {"bindTimeoutSeconds": -1}, "should not be a negative value"),
        ("VolumeBinding", {"bindTimeout": 1}, 'unknown field "bindTimeout"'),
    ],
)
def test_arguments_that_cannot_be_meant_are_refused(plugin: str, args: Object, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        _with(plugin, **args)
