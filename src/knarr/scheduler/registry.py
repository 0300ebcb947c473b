"""All plugins by name, and the default profile in upstream's order with upstream's weights.

Source: apis/config/v1/default_plugins.go.
"""

from __future__ import annotations

from knarr.scheduler.config import ProfileConfig
from knarr.scheduler.framework import Plugin, Profile
from knarr.scheduler.handle import Handle
from knarr.scheduler.plugins.dynamic_resources import DynamicResources
from knarr.scheduler.plugins.image_locality import ImageLocality
from knarr.scheduler.plugins.inter_pod_affinity import InterPodAffinity
from knarr.scheduler.plugins.node_affinity import NodeAffinity
from knarr.scheduler.plugins.node_name import NodeName
from knarr.scheduler.plugins.node_ports import NodePorts
from knarr.scheduler.plugins.node_resources import NodeResourcesBalancedAllocation, NodeResourcesFit
from knarr.scheduler.plugins.node_unschedulable import NodeUnschedulable
from knarr.scheduler.plugins.node_volume_limits import NodeVolumeLimits
from knarr.scheduler.plugins.pod_topology_spread import PodTopologySpread
from knarr.scheduler.plugins.preemption import DefaultPreemption
from knarr.scheduler.plugins.scheduling_gates import SchedulingGates
from knarr.scheduler.plugins.taint_toleration import TaintToleration
from knarr.scheduler.plugins.volume_binding import VolumeBinding
from knarr.scheduler.plugins.volume_restrictions import VolumeRestrictions
from knarr.scheduler.plugins.volume_zone import VolumeZone

PLUGINS: dict[str, type[Plugin]] = {
    plugin.name: plugin
    for plugin in (
        SchedulingGates,
        NodeUnschedulable,
        NodeName,
        TaintToleration,
        NodeAffinity,
        NodePorts,
        NodeResourcesFit,
        VolumeRestrictions,
        NodeVolumeLimits,
        VolumeBinding,
        VolumeZone,
        PodTopologySpread,
        InterPodAffinity,
        DynamicResources,
        DefaultPreemption,
        NodeResourcesBalancedAllocation,
        ImageLocality,
    )
}

WEIGHTS = {"TaintToleration": 3, "NodeAffinity": 2, "PodTopologySpread": 2, "InterPodAffinity": 2}


def build_profile(config: ProfileConfig, handle: Handle) -> Profile:
    """Make a profile's plugins.

    Raises:
      ValueError: the configuration names a plugin that does not exist.
    """
    names = [name for name in PLUGINS if name not in config.disabled and "*" not in config.disabled]
    single = [name for enabled in config.enabled_points.values() for name in enabled]
    for name in (*config.enabled, *single):
        if name not in PLUGINS and name not in ("PrioritySort", "DefaultBinder"):
            raise ValueError(f"plugin {name!r} does not exist")
    names += [name for name in config.enabled if name in PLUGINS and name not in names]
    only_there = [name for name in dict.fromkeys(single) if name in PLUGINS and name not in names]
    plugins = [PLUGINS[name](handle, config.plugin_args.get(name, {})) for name in (*names, *only_there)]
    weights = {**WEIGHTS, **config.enabled, **config.enabled_points.get("score", {})}
    return Profile(
        config.scheduler_name,
        plugins,
        everywhere=frozenset(names),
        enabled_points=config.enabled_points,
        disabled_points=config.disabled_points,
        weights=weights,
        percentage_of_nodes_to_score=config.percentage_of_nodes_to_score,
    )
