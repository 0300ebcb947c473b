"""Pods as the scheduler sees them: a shape shared by equal pods, and the little that is the pod's own.

Pods of one workload ask the same questions. All that follows from the specification (requests,
affinity terms, tolerations, ports) is compiled once per distinct shape and shared; plugins
keep what they worked out for a shape in `PodShape.memo`, stamped with the version of the
data it came from. Callers: event handlers, the node table, plugins.

Invariant: two pods get the same shape only if no plugin could tell them apart, their names aside.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Any

import orjson

from knarr.api.encode import trimmed
from knarr.scheduler.resources import Amounts, nonzero_requests, pod_requests
from knarr.scheduler.terms import (
    NodeSelector,
    NodeTerm,
    PodTerm,
    Selector,
    Toleration,
    pod_terms,
    preferred_node_terms,
    required_node_selector,
    selector,
    tolerations,
)

Pod = dict[str, Any]
HostPort = tuple[str, str, int]
"""(host address, protocol, port)."""

_DISK_VOLUMES = ("gcePersistentDisk", "awsElasticBlockStore", "iscsi", "rbd")
MAXIMUM_SHAPES = 20_000


class Spread:
    """One topology spread constraint of a shape."""

    __slots__ = ("honor_affinity", "honor_taints", "maximum_skew", "minimum_domains", "selector", "topology_key")

    def __init__(self, item: dict[str, Any], labels: dict[str, str], labels_selector: Selector | None = None) -> None:
        extra = {key: labels[key] for key in item.get("matchLabelKeys") or () if key in labels}
        self.maximum_skew: int = item["maxSkew"]
        self.topology_key: str = item["topologyKey"]
        self.selector = labels_selector if labels_selector is not None else selector(item.get("labelSelector"), extra=extra)
        self.minimum_domains: int = item.get("minDomains") or 1
        self.honor_affinity = (item.get("nodeAffinityPolicy") or "Honor") == "Honor"
        self.honor_taints = (item.get("nodeTaintsPolicy") or "Ignore") == "Honor"


class PodShape:
    """What equal pods share. Read only, but for `memo`.

    `memo` maps a plugin's key to whatever it stored, by convention a tuple starting with versions.
    """

    __slots__ = (
        "best_effort_score",
        "hard_spread",
        "host_ports",
        "images",
        "key",
        "labels",
        "memo",
        "namespace",
        "node_selector",
        "nonzero_cpu",
        "nonzero_memory",
        "own_node_name",
        "owner",
        "preemption_policy",
        "preferred_affinity",
        "preferred_anti_affinity",
        "preferred_node_terms",
        "priority",
        "request_items",
        "requests",
        "required_affinity",
        "required_anti_affinity",
        "scheduler_name",
        "soft_spread",
        "tolerations",
        "uses_own_spread",
    )  # fmt: skip

    def __init__(self, key: bytes, pod: Pod) -> None:
        spec, metadata = pod["spec"], pod["metadata"]
        affinity = spec.get("affinity") or {}
        self.key = key
        self.namespace: str = metadata.get("namespace", "")
        self.labels: dict[str, str] = metadata.get("labels") or {}
        self.scheduler_name: str = spec.get("schedulerName") or "default-scheduler"
        self.priority: int = spec.get("priority") or 0
        self.preemption_policy: str = spec.get("preemptionPolicy") or "PreemptLowerPriority"
        self.requests: Amounts = pod_requests(pod)
        self.request_items = tuple((name, value) for name, value in self.requests.items() if value)
        self.nonzero_cpu, self.nonzero_memory = nonzero_requests(pod)
        self.node_selector: NodeSelector | None = required_node_selector(spec)
        self.preferred_node_terms: tuple[tuple[int, NodeTerm], ...] = preferred_node_terms(affinity.get("nodeAffinity"))
        self.tolerations: tuple[Toleration, ...] = tolerations(spec)
        near, far = affinity.get("podAffinity") or {}, affinity.get("podAntiAffinity") or {}
        required, preferred = "requiredDuringSchedulingIgnoredDuringExecution", "preferredDuringSchedulingIgnoredDuringExecution"
        self.required_affinity: tuple[PodTerm, ...] = pod_terms(near.get(required), self.namespace)
        self.required_anti_affinity: tuple[PodTerm, ...] = pod_terms(far.get(required), self.namespace)
        self.preferred_affinity: tuple[PodTerm, ...] = pod_terms(near.get(preferred), self.namespace, weighted=True)
        self.preferred_anti_affinity: tuple[PodTerm, ...] = pod_terms(far.get(preferred), self.namespace, weighted=True)
        spread = spec.get("topologySpreadConstraints") or ()
        self.uses_own_spread = bool(spread)
        self.hard_spread = tuple(Spread(c, self.labels) for c in spread if c.get("whenUnsatisfiable") != "ScheduleAnyway")
        self.soft_spread = tuple(Spread(c, self.labels) for c in spread if c.get("whenUnsatisfiable") == "ScheduleAnyway")
        self.host_ports: tuple[HostPort, ...] = host_ports(spec)
        self.images: tuple[str, ...] = tuple(
            normalized_image(c.get("image") or "") for c in (*(spec.get("initContainers") or ()), *(spec.get("containers") or ()))
        )
        self.own_node_name: str = ""
        self.owner: tuple[str, str, str] | None = controller(metadata)
        self.memo: dict[Hashable, Any] = {}

    @property
    def affinity_terms(self) -> bool:
        return bool(self.required_affinity or self.required_anti_affinity or self.preferred_affinity or self.preferred_anti_affinity)


def controller(metadata: dict[str, Any]) -> tuple[str, str, str] | None:
    """Give (apiVersion, kind, name) of the controlling owner."""
    for reference in metadata.get("ownerReferences") or ():
        if reference.get("controller"):
            return reference["apiVersion"], reference["kind"], reference["name"]
    return None


def normalized_image(name: str) -> str:
    """Add the tag "latest" to a name without a tag, as node statuses list images."""
    return name + ":latest" if name.rfind(":") <= name.rfind("/") else name


def host_ports(spec: dict[str, Any]) -> tuple[HostPort, ...]:
    result = []
    containers = [*(spec.get("containers") or ()), *(c for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always")]
    for container in containers:
        for port in container.get("ports") or ():
            if port.get("hostPort"):
                result.append((port.get("hostIP") or "0.0.0.0", port.get("protocol") or "TCP", port["hostPort"]))
    return tuple(result)


def _container_key(container: dict[str, Any]) -> tuple[Any, ...]:
    return (
        container["name"],
        container.get("resources"),
        container.get("ports"),
        container.get("image"),
        container.get("restartPolicy"),
    )


def shape_key(pod: Pod) -> bytes:
    """Serialise everything of a pod that scheduling depends on, its own identity aside."""
    spec, metadata = pod["spec"], pod["metadata"]
    resized = None
    status = pod.get("status")
    if status:
        statuses = status.get("containerStatuses")
        if statuses:
            # Only a resize under way makes the status differ from the specification.
            resized = [(s["name"], s.get("resources"), s.get("allocatedResources")) for s in statuses if s.get("resources")] or None
            if resized:
                resized.append(("", [c for c in status.get("conditions") or () if c.get("type") == "PodResizePending"], None))
    return orjson.dumps(
        (
            metadata.get("namespace"),
            metadata.get("labels"),
            controller(metadata) if "ownerReferences" in metadata else None,
            spec.get("priority"),
            spec.get("schedulerName"),
            spec.get("preemptionPolicy"),
            spec.get("nodeSelector"),
            spec.get("affinity"),
            spec.get("tolerations"),
            spec.get("topologySpreadConstraints"),
            [_container_key(c) for c in spec.get("containers") or ()],
            [_container_key(c) for c in spec["initContainers"]] if spec.get("initContainers") else None,
            spec.get("overhead"),
            spec.get("resources"),
            resized,
        )
    )


class Shapes:
    """Interns shapes; the least recently used beyond the limit are forgotten (pods keep theirs alive)."""

    def __init__(self) -> None:
        self._by_key: OrderedDict[bytes, PodShape] = OrderedDict()

    def of(self, pod: Pod) -> PodShape:
        key = shape_key(pod)
        shape = self._by_key.get(key)
        if shape is None:
            key = trimmed(key)
            shape = self._by_key[key] = PodShape(key, pod)
            if len(self._by_key) > MAXIMUM_SHAPES:
                self._by_key.popitem(last=False)
        else:
            self._by_key.move_to_end(key)
        return shape


class PodInfo:
    """One pod: its object, its shape and its place."""

    __slots__ = ("claims", "deleting", "disks", "name", "namespace", "node_name", "pod", "resource_claims", "row", "shape", "uid")

    def __init__(self, pod: Pod, shapes: Shapes) -> None:
        self.shape = shapes.of(pod)
        self.row = -1
        self.set_pod(pod)

    def set_pod(self, pod: Pod) -> None:
        """Take a newer object of the same pod and shape."""
        metadata, spec = pod["metadata"], pod["spec"]
        self.pod = pod
        self.uid: str = metadata["uid"]
        self.namespace: str = metadata.get("namespace", "")
        self.name: str = metadata["name"]
        self.node_name: str = spec.get("nodeName") or ""
        self.deleting = "deletionTimestamp" in metadata
        self.claims: tuple[tuple[str, bool], ...] = ()
        self.disks: tuple[dict[str, Any], ...] = ()
        self.resource_claims = bool(spec.get("resourceClaims"))
        volumes = spec.get("volumes")
        if volumes:
            self._read_volumes(volumes)

    def _read_volumes(self, volumes: list[dict[str, Any]]) -> None:
        claims = []
        for volume in volumes:
            if "persistentVolumeClaim" in volume:
                claims.append((volume["persistentVolumeClaim"].get("claimName") or "", False))
            elif "ephemeral" in volume:
                claims.append((f"{self.name}-{volume['name']}", True))
        if claims:
            self.claims = tuple(claims)
        disks = tuple(v for v in volumes if any(kind in v for kind in _DISK_VOLUMES))
        if disks:
            self.disks = disks

    @property
    def key(self) -> str:
        return f"{self.namespace}/{self.name}"

    @property
    def nominated_node(self) -> str:
        return (self.pod.get("status") or {}).get("nominatedNodeName") or ""

    @property
    def priority(self) -> int:
        return self.shape.priority

    def __repr__(self) -> str:
        return f"PodInfo({self.key})"
