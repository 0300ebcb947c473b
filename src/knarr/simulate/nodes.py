"""Simulated Node objects: made, kept alive by their Leases, and removed when fewer are declared.

Used by `simulator`. A node is simulated when it has the label LABEL; `kubectl annotate node NAME SILENT=true` lets it fall
silent, as a machine that has lost its network: its Lease is not renewed and its pods do not move.
"""

from __future__ import annotations

import asyncio
import ipaddress

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import LEASES, NODES
from knarr.api.types import Object
from knarr.client.informer import Informer
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)

LABEL = "simulate.knarr.dev/node"
TAINT = {"key": LABEL, "value": "true", "effect": "NoSchedule"}
SILENT = "simulate.knarr.dev/silent"
_LEASE_NAMESPACE = "kube-node-lease"
_TICK_SECONDS = 0.5
_AT_A_TIME = 32
# Addresses that no route leads to: pods of simulated nodes look like pods but cannot be reached.
_ADDRESSES = ipaddress.ip_network("100.64.0.0/10")


def node_name(number: int) -> str:
    return f"sim-{number:05d}"


def _cidr(number: int) -> str:
    return f"{_ADDRESSES[number % 16384 * 256]}/24"


def pod_address(node: Object | None, number: int) -> str:
    """The address of the number-th pod of a node."""
    cidr = (node or {}).get("spec", {}).get("podCIDR")
    return str(ipaddress.ip_network(cidr)[number % 250 + 2]) if cidr else ""


def make_node(number: int, tainted: bool, pods: int) -> Object:
    """A Node that is Ready from its first moment."""
    name, now = node_name(number), clock.now_rfc3339()
    bad = [("MemoryPressure", "KubeletHasSufficientMemory"), ("DiskPressure", "KubeletHasNoDiskPressure"), ("PIDPressure", "KubeletHasSufficientPID")]
    kinds = [*((kind, "False", reason) for kind, reason in bad), ("Ready", "True", "KubeletReady")]
    conditions = [
        {"type": kind, "status": status, "reason": reason, "message": "simulated", "lastHeartbeatTime": now, "lastTransitionTime": now}
        for kind, status, reason in kinds
    ]
    amounts = {"cpu": "32", "memory": "256Gi", "ephemeral-storage": "1Ti", "pods": str(pods)}
    labels = {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux", "kubernetes.io/arch": "amd64", LABEL: "true"}
    info = dict.fromkeys(("machineID", "systemUUID", "bootID", "kernelVersion", "osImage", "containerRuntimeVersion"), "simulated")
    return {
        "metadata": {"name": name, "labels": labels},
        "spec": {"podCIDR": _cidr(number), "podCIDRs": [_cidr(number)], **({"taints": [TAINT]} if tainted else {})},
        "status": {
            "capacity": amounts,
            "allocatable": amounts,
            "conditions": conditions,
            "addresses": [{"type": "Hostname", "address": name}],
            "nodeInfo": {**info, "kubeletVersion": "v1.35.0", "kubeProxyVersion": "", "operatingSystem": "linux", "architecture": "amd64"},
        },
    }


class SimulatedNodes:
    """Keeps nodes 0 to count-1 and their Leases."""

    def __init__(self, client: Client, informer: Informer, count: int, tainted: bool, lease_seconds: float, pods: int) -> None:
        self._client = client
        self._informer = informer
        self._names = [node_name(number) for number in range(count)]
        self._declared = frozenset(self._names)
        self._tainted = tainted
        self._lease_seconds = lease_seconds
        self._pods = pods
        self._limit = asyncio.Semaphore(_AT_A_TIME)
        self.complete = asyncio.Event()

    def declares(self, name: str) -> bool:
        """Whether a node of that name is one of these, or will be."""
        return name in self._declared

    def is_silent(self, name: str) -> bool:
        """Whether a node's machine is taken for lost."""
        node = self._informer.get(None, name)
        return node is None or meta.annotations(node).get(SILENT) == "true"

    async def run(self) -> None:
        """Bring the nodes to their number, then renew Leases, evenly over time."""
        wanted = set(self._names)
        surplus = [meta.name(node) for node in self._informer.list() if meta.name(node) not in wanted]
        await asyncio.gather(*(self._remove(name) for name in surplus))
        await asyncio.gather(*(self._ensure(number, name) for number, name in enumerate(self._names)))
        log.info("simulated nodes are there", nodes=len(self._names), removed=len(surplus))
        self.complete.set()
        await self._renew_for_ever()

    async def _ensure(self, number: int, name: str) -> None:
        async with self._limit:
            try:
                node = await self._client.create(NODES, make_node(number, self._tainted, self._pods))
                await self._create_lease(name, node["metadata"]["uid"])
            except StatusError as error:
                if not errors.is_already_exists(error):
                    raise
                await self._renew(name)

    async def _remove(self, name: str) -> None:
        async with self._limit:
            try:
                await self._client.delete(NODES, name)
            except StatusError as error:
                if not errors.is_not_found(error):
                    raise

    async def _create_lease(self, name: str, uid: str) -> None:
        owner = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": uid}
        spec = {"holderIdentity": name, "leaseDurationSeconds": 40, "renewTime": clock.now_micro()}
        lease = {"metadata": {"name": name, "namespace": _LEASE_NAMESPACE, "ownerReferences": [owner]}, "spec": spec}
        try:
            await self._client.create(LEASES, lease)
        except StatusError as error:
            if not errors.is_already_exists(error):
                raise

    async def _renew_for_ever(self) -> None:
        position, owed = 0, 0.0
        while True:
            await asyncio.sleep(_TICK_SECONDS)
            owed = min(owed + len(self._names) * _TICK_SECONDS / self._lease_seconds, float(len(self._names)))
            batch = int(owed)
            owed -= batch
            names = [self._names[(position + offset) % len(self._names)] for offset in range(batch)]
            position += batch
            await asyncio.gather(*(self._renew_limited(name) for name in names))

    async def _renew_limited(self, name: str) -> None:
        async with self._limit:
            try:
                await self._renew(name)
            except (StatusError, HTTPError, OSError) as error:
                log.warning("lease of a simulated node not renewed", node=name, error=str(error))

    async def _renew(self, name: str) -> None:
        if self.is_silent(name):
            return
        try:
            await self._client.patch(LEASES, name, _LEASE_NAMESPACE, {"spec": {"renewTime": clock.now_micro()}})
        except StatusError as error:
            node = self._informer.get(None, name)
            if not errors.is_not_found(error) or node is None:
                raise
            await self._create_lease(name, node["metadata"]["uid"])
