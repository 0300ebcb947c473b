"""What every controller is given: client, shared informers, configuration, event recorders.

The manager makes one Context; a controller takes its informers from it in its constructor, so
that all of them are known before the first one starts. Informers are trimmed here to what the
controllers read, because the pods of a cluster are most of this process's memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from knarr.api.resources import CONFIG_MAPS, CONTROLLER_REVISIONS, EVENTS, NODES, PODS, REPLICA_SETS, SECRETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.client.events import EventRecorder
from knarr.client.informer import Family, Informer, Informers, Selector
from knarr.client.leanpods import lean_pod
from knarr.client.rest import Client


@dataclass(frozen=True, slots=True)
class ControllersConfig:
    """Settings of the controllers; defaults are upstream's."""

    enabled: str = "*"
    """As upstream's --controllers: names separated by commas, "*" for all that are on by default, "-name" switches one off."""
    feature_gates: Mapping[str, bool] = field(default_factory=dict)
    """Feature gates that are not at upstream's defaults."""
    cluster_cidr: str = "10.244.0.0/16"
    """Range that node podCIDRs are cut from; several separated by commas for dual stack; "" allocates none."""
    node_cidr_mask_size: int = 24
    """Size of one node's range (IPv4)."""
    service_cidr: str = "10.96.0.0/16"
    """Service range, never handed to nodes."""
    service_account_key: bytes | None = field(default=None, repr=False)
    """PEM private key that signs tokens in secrets; None leaves such secrets empty."""
    root_ca: bytes | None = None
    """PEM bundle published as kube-root-ca.crt and put into token secrets."""
    ca_cert: bytes | None = None
    """PEM certificate of the authority that signs certificate requests."""
    ca_key: bytes | None = field(default=None, repr=False)
    """PEM key of that authority; None leaves requests unsigned."""
    signing_seconds: float = 365 * 24 * 3600.0
    """Longest life of signed certificates."""
    node_monitor_period_seconds: float = 5.0
    node_monitor_grace_seconds: float = 50.0
    """Without a heartbeat for this long a node's conditions become Unknown."""
    node_startup_grace_seconds: float = 60.0
    """The same for a node that has never reported."""
    terminated_pod_gc_threshold: int = 12500
    """Finished pods beyond this number are deleted, oldest first."""
    pod_gc_period_seconds: float = 20.0
    quota_resync_seconds: float = 300.0
    hpa_sync_seconds: float = 15.0
    hpa_tolerance: float = 0.1
    hpa_downscale_stabilization_seconds: float = 300.0
    hpa_cpu_initialization_seconds: float = 300.0
    hpa_initial_readiness_seconds: float = 30.0
    endpoint_batch_seconds: float = 0.0
    """Endpoint changes of one Service within this time become one write."""
    max_endpoints_per_slice: int = 100
    pv_provisioning_backoff_seconds: float = 15.0
    attach_detach_max_wait_unmount_seconds: float = 360.0
    leader_elect: bool = False
    """Compete for the Lease kube-controller-manager (several managers in one cluster)."""
    identity: str = "knarr"


class Component(Protocol):
    """What the manager needs of a controller: a task that runs until cancelled."""

    async def run(self) -> None: ...


def trim_node(node: Object) -> Object:
    """Drop managed fields and the list of images, which is most of a node."""
    node["metadata"].pop("managedFields", None)
    (node.get("status") or {}).pop("images", None)
    return node


def trim_to_metadata(obj: Object) -> Object:
    """Keep only the type, metadata without managedFields and last-applied."""
    meta = obj["metadata"]
    meta.pop("managedFields", None)
    annotations = meta.get("annotations")
    if annotations:
        annotations.pop("kubectl.kubernetes.io/last-applied-configuration", None)
    return {"apiVersion": obj.get("apiVersion", ""), "kind": obj.get("kind", ""), "metadata": meta}


# What controllers make and find again by its owner.
_OWNED = (PODS, REPLICA_SETS, CONTROLLER_REVISIONS)
_TRIMS = {PODS: lean_pod, NODES: trim_node, CONFIG_MAPS: trim_to_metadata, EVENTS: trim_to_metadata}


def controller_uid_index(obj: Object) -> list[str]:
    """Index function: the uid of the controlling owner, or "" + namespace key for orphans."""
    for reference in obj["metadata"].get("ownerReferences") or ():
        if reference.get("controller"):
            return [reference["uid"]]
    return ["orphan/" + obj["metadata"].get("namespace", "")]


def label_index(obj: Object) -> list[str]:
    """Index function: every label with its namespace."""
    meta = obj["metadata"]
    namespace = meta.get("namespace", "")
    return [f"{namespace}/{name}={value}" for name, value in (meta.get("labels") or {}).items()]


def matching(pods: Informer, namespace: str, labels: Mapping[str, str] | None, selector: Selector) -> list[Object]:
    """Give the pods of a namespace that a selector matches.

    Args:
      labels: what the selector wants to be equal, at least; the rarest of them narrows the search.
    """
    if not labels:
        return pods.list(namespace, selector)
    found = min((pods.by_index("label", f"{namespace}/{name}={value}") for name, value in labels.items()), key=len)
    return [pod for pod in found if selector.matches(pod["metadata"].get("labels") or {})]


def possibly_owned(informer: Informer, owner: Object) -> list[Object]:
    """Give the objects that an owner controls and those of its namespace that nobody does."""
    meta = owner["metadata"]
    return informer.by_index("controller", meta["uid"]) + informer.by_index("controller", "orphan/" + meta.get("namespace", ""))


def node_name_index(pod: Object) -> list[str]:
    """Index function: the node a pod is bound to."""
    name = (pod.get("spec") or {}).get("nodeName")
    return [name] if name else []


class Context:
    """The shared parts of all controllers of one manager."""

    def __init__(self, client: Client, config: ControllersConfig, informers: Informers | None = None, family: Family | None = None) -> None:
        self.client = client
        self.config = config
        self.informers = informers or Informers(client, family)
        self._recorders: dict[str, EventRecorder] = {}
        self._shared: dict[Resource, Informer] = {}

    def informer(self, resource: Resource) -> Informer:
        """Give the shared informer of a resource, trimmed as this process needs it."""
        informer = self._shared[resource] = self.informers.get(resource, transform=_TRIMS.get(resource))
        if resource in _OWNED:
            informer.add_index("controller", controller_uid_index)
        if resource is PODS:
            informer.add_index("label", label_index)
            informer.add_index("node", node_name_index)
        return informer

    def shared_informer(self, resource: Resource) -> Informer | None:
        """Give the full informer of a resource if some controller has one already."""
        return self._shared.get(resource)

    @property
    def pods(self) -> Informer:
        """Pods, indexed by "controller" (uid, or "orphan/<namespace>") and "node"."""
        return self.informer(PODS)

    @property
    def nodes(self) -> Informer:
        return self.informer(NODES)

    @property
    def secrets(self) -> Informer:
        return self.informer(SECRETS)

    def recorder(self, component: str) -> EventRecorder:
        """Give the event recorder of a component name."""
        recorder = self._recorders.get(component)
        if recorder is None:
            recorder = self._recorders[component] = EventRecorder(self.client, component)
        return recorder

    async def close(self) -> None:
        """Close recorders and informers; the client is the caller's."""
        for recorder in self._recorders.values():
            await recorder.close()
        await self.informers.close()


def object_key(obj: Object) -> str:
    """ "namespace/name" or "name" of an object known to have metadata."""
    meta: dict[str, Any] = obj["metadata"]
    namespace = meta.get("namespace")
    return f"{namespace}/{meta['name']}" if namespace else str(meta["name"])


__all__ = ["Component", "Context", "Controller", "ControllersConfig", "controller_uid_index", "object_key", "trim_to_metadata"]
