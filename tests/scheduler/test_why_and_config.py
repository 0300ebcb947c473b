"""What `knarr why` is told, and KubeSchedulerConfiguration files."""

from __future__ import annotations

import pytest
import yaml

from knarr.scheduler.config import read_configuration
from knarr.scheduler.why import explain

from .world import World


def test_each_node_has_its_reason_and_the_change_that_would_make_the_pod_fit() -> None:
    world = World()
    world.node("small", cpu="1")
    world.node("tainted", taints=[{"key": "k", "value": "v", "effect": "NoSchedule"}])
    world.node("roomy", cpu="8")
    entries = {entry["node"]: entry for entry in explain(world.handle, world.profile, world.pod("p", cpu="2"))}
    assert entries["roomy"]["fits"]
    assert entries["small"]["reasons"] == ["Insufficient cpu"]
    assert not entries["tainted"]["fits"]
    assert entries["small"]["changes"]
    assert entries["tainted"]["changes"]


def test_a_configuration_file_names_profiles_and_arguments() -> None:
    text = """
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
percentageOfNodesToScore: 30
profiles:
- schedulerName: packing
  pluginConfig:
  - name: NodeResourcesFit
    args: {scoringStrategy: {type: MostAllocated, resources: [{name: cpu, weight: 1}]}}
  plugins:
    score:
      disabled: [{name: ImageLocality}]
"""
    config = read_configuration(yaml.safe_load(text))
    assert [profile.scheduler_name for profile in config.profiles] == ["packing"]
    assert config.percentage_of_nodes_to_score == 30


@pytest.mark.parametrize("document", [{"kind": "Foo"}, {"apiVersion": "v1", "kind": "KubeSchedulerConfiguration"}, {}])
def test_other_files_are_refused(document: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=r"not a kubescheduler\.config\.k8s\.io/v1"):
        read_configuration(document)
