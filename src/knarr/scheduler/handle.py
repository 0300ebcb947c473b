"""What plugins may ask of the scheduler: the node table, the other objects, volumes, randomness."""

from __future__ import annotations

import random
from typing import Protocol

from knarr.scheduler.nodes import NodeTable
from knarr.scheduler.objects import Object, Objects
from knarr.scheduler.podinfo import PodInfo, Shapes
from knarr.scheduler.volumes import NodeVolumes, Volumes

__all__ = ["Handle", "Object", "Objects", "VolumeWriter"]


class VolumeWriter(Protocol):
    """Writes chosen bindings to the API and waits until they are complete."""

    async def bind(self, pod: PodInfo, node_name: str, chosen: NodeVolumes, timeout_seconds: float) -> None: ...


class Handle:
    """Shared by all plugins of a scheduler."""

    def __init__(self, *, randomness: random.Random | None = None) -> None:
        self.table = NodeTable()
        self.objects = Objects()
        self.shapes = Shapes()
        self.volumes = Volumes(self.objects)
        self.volume_writer: VolumeWriter | None = None
        self.random = randomness or random.Random()
        self.preempting: set[str] = set()
        """Pods (by uid) whose victims are being evicted right now."""
