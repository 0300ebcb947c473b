"""What plugins may ask of the scheduler: the node table, the other objects, volumes, randomness."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

from knarr.scheduler.dra.claims import Claims
from knarr.scheduler.dra.devices import Slices
from knarr.scheduler.nodes import NodeTable
from knarr.scheduler.objects import Object, Objects
from knarr.scheduler.podinfo import PodInfo, Shapes
from knarr.scheduler.volumes import NodeVolumes, Volumes

__all__ = ["ClaimWriter", "Handle", "Object", "Objects", "VolumeWriter"]


class VolumeWriter(Protocol):
    """Writes chosen bindings to the API and waits until they are complete."""

    async def bind(self, pod: PodInfo, node_name: str, chosen: NodeVolumes, timeout_seconds: float) -> None: ...


class ClaimWriter(Protocol):
    """Writes allocations and reservations of resource claims to the API."""

    async def bind(self, pod: PodInfo, claim: Object, allocation: Object | None) -> Object: ...

    async def release(self, pod: PodInfo, claim: Object) -> None: ...

    async def deallocate(self, claim: Object) -> None: ...


def _nowhere(key: str, call: Callable[..., Awaitable[None]], *args: Any) -> None:
    """Without an API nothing is written."""


class Handle:
    """Shared by all plugins of a scheduler."""

    def __init__(self, *, randomness: random.Random | None = None, feature_gates: Mapping[str, bool] | None = None) -> None:
        self.table = NodeTable()
        self.objects = Objects()
        self.shapes = Shapes()
        self.volumes = Volumes(self.objects)
        self.volume_writer: VolumeWriter | None = None
        self.claims = Claims()
        self.slices = Slices()
        self.claim_writer: ClaimWriter | None = None
        self.feature_gates: Mapping[str, bool] = feature_gates or {}
        self.submit: Callable[..., None] = _nowhere
        """(key, call, *args): have an API call made beside the scheduling loop, see Dispatcher.submit."""
        self.random = randomness or random.Random()
        self._preempting: dict[str, tuple[str, str] | None] = {}

    # Pods whose victims are being evicted. Such a pod must not be tried again before the last victim is seen going:
    # until then its node looks full, and the next attempt would pick more victims.

    def preemption_started(self, uid: str) -> None:
        self._preempting[uid] = None

    def last_victim(self, uid: str, node_name: str, victim_uid: str) -> None:
        """All victims but this one have been told to go."""
        self._preempting[uid] = (node_name, victim_uid)

    def preemption_ended(self, uid: str) -> None:
        self._preempting.pop(uid, None)

    def is_preempting(self, uid: str) -> bool:
        if uid not in self._preempting:
            return False
        last = self._preempting[uid]
        if last is None:
            return True
        node = self.table.get(last[0])
        victim = node.pods.get(last[1]) if node is not None else None
        if victim is not None and not victim.deleting:
            return True
        del self._preempting[uid]
        return False
