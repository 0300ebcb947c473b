"""Tells the API server about this node: registration, status, and a Lease as the heart-beat.

Caller: kubelet (three eternal tasks: register once, then status and lease on timers). The status is written when it changed and
else every five minutes; the Lease every ten seconds. Source: pkg/kubelet/kubelet_node_status.go, pkg/kubelet/nodestatus,
component-helpers/apimachinery/lease.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.resources import LEASES, NODES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import machine
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.faults import UNREACHABLE
from knarr.kubelet.machine import Capacity
from knarr.kubelet.node import RecordEvent
from knarr.kubelet.volumes import local
from knarr.runtime.cri import ImageService, RuntimeFault, RuntimeService

log = get_logger(__name__)

_LEASE_NAMESPACE = "kube-node-lease"
_LEAST_TIMEOUT_SECONDS = 5.0
MAX_IMAGES = 50
_NAMES_PER_IMAGE = 5
_PRESSURES = (
    ("MemoryPressure", "KubeletHasInsufficientMemory", "KubeletHasSufficientMemory", "memory"),
    ("DiskPressure", "KubeletHasDiskPressure", "KubeletHasNoDiskPressure", "disk"),
    ("PIDPressure", "KubeletHasInsufficientPID", "KubeletHasSufficientPID", "PID"),
)
_EVENTS = {
    ("MemoryPressure", "False"): "NodeHasSufficientMemory",
    ("MemoryPressure", "True"): "NodeHasInsufficientMemory",
    ("DiskPressure", "False"): "NodeHasNoDiskPressure",
    ("DiskPressure", "True"): "NodeHasDiskPressure",
    ("PIDPressure", "False"): "NodeHasSufficientPID",
    ("PIDPressure", "True"): "NodeHasInsufficientPID",
    ("Ready", "True"): "NodeReady",
    ("Ready", "False"): "NodeNotReady",
}


class NodeReporter:
    """This node's object and Lease."""

    def __init__(
        self,
        config: KubeletConfig,
        client: Client,
        runtime: RuntimeService,
        images: ImageService,
        record: RecordEvent,
        capacity: Capacity,
        pressure: Callable[[], dict[str, bool]],
    ) -> None:
        """`pressure` tells which of MemoryPressure, DiskPressure and PIDPressure hold now."""
        self._config = config
        self._client = client
        self._runtime = runtime
        self._images = images
        self._record = record
        self._capacity = capacity
        self._pressure = pressure
        self._changed = asyncio.Event()
        self._reported: Object | None = None
        self._reported_at = 0.0
        self._runtime_version = ""
        self.registered = asyncio.Event()
        self.shutting_down = False
        self.volumes_in_use: Callable[[], list[str]] = lambda: []
        self.not_ready_reason: Callable[[], str | None] = lambda: None
        self.live: Callable[[], Object | None] = lambda: None
        """The node object as the API server shows it."""
        self.node: Object | None = None
        """The node object as last read or written."""
        self._events_seen: dict[str, str] = {}

    def reference(self) -> Object:
        """What events about the node refer to; upstream uses the name as its uid."""
        name = self._config.node_name
        return {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "uid": name}}

    def changed(self) -> None:
        """Something in the status became different: look now."""
        self._changed.set()

    def seen(self, node: Object) -> None:
        """The API server's copy changed; others write there too, above all Unknown when they missed this node's heart-beat."""
        if self._reported is None:
            return
        ours = {c["type"]: c["status"] for c in self._reported["conditions"]}
        theirs = {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or []}
        if any(theirs.get(kind) != status for kind, status in ours.items()):
            self.node, self._reported = node, None
            self._changed.set()

    def _labels(self) -> dict[str, str]:
        arch = machine.architecture()
        return {
            "beta.kubernetes.io/arch": arch,
            "beta.kubernetes.io/os": "linux",
            "kubernetes.io/arch": arch,
            "kubernetes.io/hostname": self._config.node_name,
            "kubernetes.io/os": "linux",
            **self._config.node_labels,
        }

    async def register(self) -> Object:
        """Make the Node object, or take over the one that exists; tried until it works."""
        if not self._runtime_version:
            version = await self._runtime.version()
            self._runtime_version = f"{version.name}://{version.version}"
        delay = 0.1
        while True:
            try:
                self.node = await self._register_once()
                self._reported, self._reported_at = None, 0.0
                self.registered.set()
                return self.node
            except (errors.StatusError, *UNREACHABLE) as e:
                log.warning("node not registered", node=self._config.node_name, error=str(e))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 7.0)

    async def _register_once(self) -> Object:
        name = self._config.node_name
        annotations = {"volumes.kubernetes.io/controller-managed-attach-detach": "true", local.FOLDER_ANNOTATION: local.folder(self._config)}
        fresh: Object = {
            "apiVersion": "v1",
            "kind": "Node",
            "metadata": {"name": name, "labels": self._labels(), "annotations": annotations},
            "spec": {},
            "status": await self._status({}),
        }
        taints = [dict(t) for t in self._config.node_taints]
        if taints:
            fresh["spec"]["taints"] = taints
        if self._config.provider_id:
            fresh["spec"]["providerID"] = self._config.provider_id
        if self._config.register_node:
            try:
                return await self._client.create(NODES, fresh)
            except errors.StatusError as e:
                if not errors.is_already_exists(e):
                    raise
        existing = await self._client.get(NODES, name)
        labels, held = self._labels(), existing["metadata"].get("labels") or {}
        missing = {k: v for k, v in labels.items() if held.get(k) != v and (k in self._config.node_labels or k not in held or "hostname" in k)}
        absent = {k: v for k, v in annotations.items() if v != (existing["metadata"].get("annotations") or {}).get(k)}
        if missing or absent:
            existing = await self._client.patch(NODES, name, None, {"metadata": {"labels": missing, "annotations": absent}}, type="strategic")
        return existing

    async def run_status(self) -> None:
        """Keep the node's status true. Eternal."""
        await self.registered.wait()
        while True:
            # Before the look: what changes while the status is on its way is in the next one, at once.
            self._changed.clear()
            try:
                # A request that hangs must not outlast the interval: on a new connection the next one may get through.
                async with asyncio.timeout(max(_LEAST_TIMEOUT_SECONDS, self._config.node_status_interval_seconds)):
                    await self.report()
            except errors.StatusError as e:
                log.warning("node status not stored", error=str(e))
                if errors.is_not_found(e) and self._config.reappear:
                    # Somebody deleted our Node; a cluster of one wants it back.
                    await self.register()
                    continue
            except UNREACHABLE as e:
                log.warning("API server not reached for the node status", error=repr(e))
            except RuntimeFault as e:
                log.warning("runtime does not answer", error=str(e))
            try:
                async with asyncio.timeout(self._config.node_status_interval_seconds):
                    await self._changed.wait()
            except TimeoutError:
                continue

    async def report(self) -> None:
        """Write the status if it changed or is old. Raises StatusError and the UNREACHABLE faults."""
        assert self.node is not None
        status = await self._status(self.node.get("status") or {})
        comparable = _without_heartbeats(status)
        now = clock.now()
        if comparable == self._reported and now - self._reported_at < self._config.node_status_report_seconds:
            return
        # A node with two families has two addresses of one type, which a strategic merge by type would make one of.
        patch = {"status": {**status, "addresses": [*status["addresses"], {"$patch": "replace"}]}}
        self.node = await self._client.patch(NODES, self._config.node_name, None, patch, type="strategic", subresource="status")
        self._reported, self._reported_at = comparable, now
        self._tell(status["conditions"])

    def _tell(self, conditions: list[Object]) -> None:
        for condition in conditions:
            kind, value = condition["type"], condition["status"]
            reason = _EVENTS.get((kind, value))
            if reason and self._events_seen.get(kind) != value:
                self._events_seen[kind] = value
                message = f"Node {self._config.node_name} status is now: {reason}"
                self._record(self.reference(), "Normal", reason, message)

    async def _status(self, old: Object) -> Object:
        before = {c["type"]: c for c in old.get("conditions") or []}
        addresses = [{"type": "InternalIP", "address": ip} for ip in self._config.host_ips]
        addresses.append({"type": "Hostname", "address": self._config.node_name})
        status: Object = {
            "addresses": addresses,
            "capacity": dict(self._capacity.capacity),
            "allocatable": dict(self._capacity.allocatable),
            "conditions": await self._conditions(before),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._config.port}},
            "nodeInfo": machine.node_info(self._config, self._runtime_version),
            "images": await self._image_list(),
            "runtimeHandlers": [
                {"name": "", "features": {name: name in self._runtime.features for name in ("recursiveReadOnlyMounts", "userNamespaces")}}
            ],
            "features": {"supplementalGroupsPolicy": "supplementalGroupsPolicy" in self._runtime.features},
        }
        status["allocatable"].update(self._advertised())
        in_use = self.volumes_in_use()
        if in_use or old.get("volumesInUse"):
            status["volumesInUse"] = in_use
        return status

    def _advertised(self) -> dict[str, str | None]:
        """Resources that somebody else wrote into the node's capacity can be allocated; None takes back those that are gone."""
        live = ((self.live() or {}).get("status")) or {}
        own, others = self._capacity.capacity, live.get("capacity") or {}
        found: dict[str, str | None] = {name: amount for name, amount in others.items() if name not in own}
        for name in live.get("allocatable") or {}:
            if name not in others and name not in own and "/" in name:
                found[name] = None
        return found

    def node_changed(self, node: Object) -> None:
        """The API server shows another version of our Node."""
        status = node.get("status") or {}
        allocatable = status.get("allocatable") or {}
        if any(allocatable.get(name) != amount for name, amount in self._advertised().items()):
            self.changed()

    async def _image_list(self) -> list[Object]:
        try:
            found = await self._images.list_images()
        except RuntimeFault:
            return []
        found.sort(key=lambda i: -i.size_bytes)
        out = []
        for image in found[:MAX_IMAGES]:
            names = [*image.repo_digests, *image.repo_tags][:_NAMES_PER_IMAGE]
            out.append({"names": names or [image.id], "sizeBytes": image.size_bytes})
        return out

    async def _conditions(self, before: dict[str, Object]) -> list[Object]:
        now = clock.now_rfc3339()
        pressure = self._pressure()
        out = []
        for kind, bad, good, word in _PRESSURES:
            holds = pressure.get(kind, False)
            adjective = {"memory": "insufficient memory", "disk": "disk pressure", "PID": "insufficient PID"}[word]
            fine = {"memory": "sufficient memory", "disk": "no disk pressure", "PID": "sufficient PID"}[word]
            out.append(_condition(kind, holds, bad if holds else good, f"kubelet has {adjective if holds else fine} available".replace("pressure available", "pressure"), before, now))
        problem = await self._problem()
        if problem is None:
            out.append(_condition("Ready", True, "KubeletReady", "kubelet is posting ready status", before, now))
        else:
            out.append(_condition("Ready", False, "KubeletNotReady", problem, before, now))
        return out

    async def _problem(self) -> str | None:
        """Why the node is not ready, None when it is."""
        if self.shutting_down:
            return "node is shutting down"
        problems = []
        own = self.not_ready_reason()
        if own:
            problems.append(own)
        try:
            for condition in await self._runtime.status():
                if not condition.status:
                    word = "container runtime network not ready" if condition.type == "NetworkReady" else "container runtime not ready"
                    problems.append(f"{word}: {condition.type}=false reason:{condition.reason} message:{condition.message}")
        except RuntimeFault as e:
            problems.append(f"container runtime is down: {e}")
        return ", ".join(problems) or None

    async def run_lease(self) -> None:
        """Renew the node's Lease. Eternal."""
        await self.registered.wait()
        held: Object | None = None
        while True:
            try:
                async with asyncio.timeout(max(_LEAST_TIMEOUT_SECONDS, self._config.lease_renew_seconds)):
                    held = await self._renew(held)
            except (errors.StatusError, *UNREACHABLE) as e:
                log.warning("node lease not renewed", error=str(e))
                held = None
                await asyncio.sleep(min(1.0, self._config.lease_renew_seconds))
                continue
            await asyncio.sleep(self._config.lease_renew_seconds)

    async def _renew(self, held: Object | None) -> Object:
        name = self._config.node_name
        if held is None:
            try:
                held = await self._client.get(LEASES, name, _LEASE_NAMESPACE)
            except errors.StatusError as e:
                if not errors.is_not_found(e):
                    raise
                return await self._client.create(LEASES, self._lease({}), _LEASE_NAMESPACE)
        try:
            return await self._client.update(LEASES, self._lease(held))
        except errors.StatusError as e:
            if not errors.is_conflict(e):
                raise
            return await self._client.update(LEASES, self._lease(await self._client.get(LEASES, name, _LEASE_NAMESPACE)))

    def _lease(self, held: Object) -> Object:
        name = self._config.node_name
        metadata: dict[str, Any] = dict(held.get("metadata") or {"name": name, "namespace": _LEASE_NAMESPACE})
        uid = (self.node or {}).get("metadata", {}).get("uid")
        if uid and not metadata.get("ownerReferences"):
            metadata["ownerReferences"] = [{"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}]
        spec = {
            **(held.get("spec") or {}),
            "holderIdentity": name,
            "leaseDurationSeconds": self._config.lease_duration_seconds,
            "renewTime": clock.now_micro(),
        }
        return {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata, "spec": spec}


def _condition(kind: str, value: bool, reason: str, message: str, before: dict[str, Object], now: str) -> Object:
    status = "True" if value else "False"
    old = before.get(kind)
    since = old.get("lastTransitionTime", now) if old is not None and old.get("status") == status else now
    return {"type": kind, "status": status, "reason": reason, "message": message, "lastHeartbeatTime": now, "lastTransitionTime": since}


def _without_heartbeats(status: Object) -> Object:
    return {
        **status,
        "conditions": [{k: v for k, v in c.items() if k not in ("lastHeartbeatTime", "lastTransitionTime")} for c in status["conditions"]],
    }
