"""What each pod uses of what a node can run out of: memory, disk, inodes, processes. For eviction and statistics.

Callers: eviction, server.stats, server.volumes. Walks files: call from a thread what says so. On the node's disk count writable
layers, logs, emptyDirs that are not in memory, and written volumes (configMap, secret, downwardAPI, projected are small and count too).
Source: pkg/kubelet/eviction/helpers.go, pkg/kubelet/server/stats, pkg/volume/util/fs.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil, resources, sandboxes
from knarr.kubelet.node import Node
from knarr.runtime import disk
from knarr.runtime.cri import ContainerStats

_LOCAL_VOLUMES = ("emptyDir", "configMap", "secret", "downwardAPI", "projected", "gitRepo")


@dataclass(frozen=True, slots=True)
class Space:
    """Bytes and inodes on a disk."""

    size: int = 0
    inodes: int = 0

    def __add__(self, other: Space) -> Space:
        return Space(self.size + other.size, self.inodes + other.inodes)


@dataclass(slots=True)
class PodUsage:
    """One pod's use of the node."""

    memory: int = 0
    """Working set in bytes."""
    processes: int = 0
    container_memory: dict[str, int] = field(default_factory=dict)
    layers: dict[str, Space] = field(default_factory=dict)
    """Container to its writable layer."""
    logs: dict[str, Space] = field(default_factory=dict)
    volumes: dict[str, Space] = field(default_factory=dict)
    """Every local volume, those in memory too."""
    in_memory: frozenset[str] = frozenset()
    """Volumes that are not on the disk."""

    def disk(self) -> Space:
        """All of it that is on the node's disk."""
        parts = [*self.layers.values(), *self.logs.values(), *(v for name, v in self.volumes.items() if name not in self.in_memory)]
        return sum(parts, Space())

    def of(self, resource: str) -> int:
        """By the name of a starved resource."""
        if resource == "memory":
            return self.memory
        if resource == "pids":
            return self.processes
        return self.disk().inodes if resource == "inodes" else self.disk().size

    def of_container(self, name: str, resource: str) -> int | None:
        """What a container alone uses; None when that is not measured."""
        if resource == "memory":
            return self.container_memory.get(name)
        if resource == "ephemeral-storage" and name in self.layers:
            return self.layers[name].size + self.logs.get(name, Space()).size
        return None


def tree(path: str) -> Space:
    """Disk blocks and inodes used below a path, itself included; links are not followed, hard links count once. Walks files."""
    if not os.path.isdir(path):
        return Space()
    size, inodes = disk.tree_usage(path)
    return Space(size, inodes + 1)


def local_volumes(node: Node, pod: Object) -> tuple[dict[str, Space], frozenset[str]]:
    """(each of the pod's local volumes, the names of those in memory). Walks files."""
    paths = node.volumes.usage_paths(pod)
    wanted = [v for v in pod["spec"].get("volumes") or [] if any(kind in v for kind in _LOCAL_VOLUMES) and v["name"] in paths]
    in_memory = frozenset(v["name"] for v in wanted if "emptyDir" not in v or (v["emptyDir"] or {}).get("medium"))
    return {v["name"]: tree(paths[v["name"]]) for v in wanted}, in_memory


def measure(node: Node, pod: Object, stats: list[ContainerStats]) -> PodUsage:
    """A pod's use by its containers' statistics, its group and its files. Walks files."""
    path = node.cgroups.pod_path(pod)
    folder = sandboxes.log_directory(node.config, pod)
    volumes, in_memory = local_volumes(node, pod)
    memory = node.cgroups.memory_usage(path)[1] if node.config.cgroups_per_qos else sum(s.memory_working_set_bytes for s in stats)
    return PodUsage(
        memory=memory,
        processes=node.cgroups.process_count(path),
        container_memory={s.metadata.name: s.memory_working_set_bytes for s in stats},
        layers={s.metadata.name: Space(s.writable_layer_bytes, s.writable_layer_inodes) for s in stats},
        logs={name: tree(os.path.join(folder, name)) for name in (os.listdir(folder) if os.path.isdir(folder) else ())},
        volumes=volumes,
        in_memory=in_memory,
    )


def order(pod: Object, usage: PodUsage, resource: str) -> tuple[int, int, int]:
    """What pods are sorted by when one has to go: the smallest goes first."""
    priority, used = int(pod["spec"].get("priority") or 0), usage.of(resource)
    if resource == "pids":
        return 0, priority, -used
    requests = resources.pod_totals(pod)[0]
    # Inodes are asked for by nobody; upstream takes away the request for bytes there, which changes nothing else.
    return int(used <= requests.get(resource, 0)), priority, requests.get("ephemeral-storage" if resource == "inodes" else resource, 0) - used


def low_message(pod: Object, usage: PodUsage, resource: str, limit: int, available: int) -> tuple[str, dict[str, str]]:
    """(what an evicted pod is told, annotations of the event)."""
    text = f"The node was low on resource: {resource}. Threshold quantity: {shown(limit, resource)}, available: {shown(available, resource)}. "
    annotations: dict[str, str] = {}
    pod_request = resources.amount(pod["spec"].get("resources"), "requests", resource)
    if resource == "memory" and pod_request is not None:
        name = pod["metadata"]["name"]
        text += f"Pod {name} was using {shown(usage.memory)}, request is {shown(pod_request)}, has larger consumption of {resource}. "
        annotations.update(offending_pod=name, offending_pod_usage=shown(usage.memory))
    names, used = [], []
    for container in (*podutil.containers(pod), *podutil.init_containers(pod)):
        amount, request = usage.of_container(container["name"], resource), resources.amount(container.get("resources"), "requests", resource) or 0
        if amount is not None and amount > request:
            text += f"Container {container['name']} was using {shown(amount)}, request is {shown(request) if request else '0'}, has larger consumption of {resource}. "
            names.append(container["name"])
            used.append(shown(amount))
    annotations.update(offending_containers=",".join(names), offending_containers_usage=",".join(used), starved_resource=resource)
    return text, annotations


def over_limit(pod: Object, usage: PodUsage) -> tuple[str, str] | None:
    """(signal, message) when a pod uses more local storage than it may."""
    for volume in pod["spec"].get("volumes") or []:
        limit = (volume.get("emptyDir") or {}).get("sizeLimit")
        if limit and usage.volumes.get(volume["name"], Space()).size > quantity.value(limit) > 0:
            return "emptydirfs.limit", f'Usage of EmptyDir volume "{volume["name"]}" exceeds the limit "{limit}". '
    pod_limit = resources.pod_totals(pod)[1]["ephemeral-storage"]
    if pod_limit and usage.disk().size > pod_limit:
        return "ephemeralpodfs.limit", f"Pod ephemeral local storage usage exceeds the total limit of containers {shown(pod_limit)}. "
    for container in podutil.containers(pod):
        limit = ((container.get("resources") or {}).get("limits") or {}).get("ephemeral-storage")
        used = usage.of_container(container["name"], "ephemeral-storage")
        if limit and used is not None and used > quantity.value(limit) > 0:
            return "ephemeralcontainerfs.limit", f'Container {container["name"]} exceeded its local ephemeral storage limit "{limit}". '
    return None


def has_limits(pod: Object) -> bool:
    """Whether a pod's local storage is limited."""
    if any((v.get("emptyDir") or {}).get("sizeLimit") for v in pod["spec"].get("volumes") or []):
        return True
    return any("ephemeral-storage" in ((c.get("resources") or {}).get("limits") or {}) for c in podutil.containers(pod))


def shown(number: int, resource: str = "memory") -> str:
    """An amount as messages have it."""
    return quantity.format(number, "DecimalSI" if resource in ("inodes", "pids") else "BinarySI")
