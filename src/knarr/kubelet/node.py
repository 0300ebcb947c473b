"""The services that pod workers share: one object, wired by kubelet.Kubelet and by tests.

Must not know workers. Everything here lives as long as the kubelet.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from knarr.aiokits.tasks import Tasks
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import podutil
from knarr.kubelet.affinity.manager import Affinity
from knarr.kubelet.cgroups import Cgroups
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.env import EnvContext
from knarr.kubelet.images import ImageManager
from knarr.kubelet.machine import Capacity
from knarr.kubelet.meters import Meters
from knarr.kubelet.objects import ReferencedObjects
from knarr.kubelet.plugins.devices import DeviceManager
from knarr.kubelet.plugins.dra import DynamicResources
from knarr.kubelet.probes.manager import Probes
from knarr.kubelet.status_manager import StatusManager
from knarr.kubelet.tokens import Tokens
from knarr.kubelet.userns import UserNamespaces
from knarr.kubelet.volumes.manager import Volumes
from knarr.runtime.cri import ImageService, RuntimeService

if TYPE_CHECKING:
    from knarr.kubelet.resize import Resizes

RecordEvent = Callable[..., None]
"""(object, type, reason, message, field_path="")"""


@dataclass(slots=True)
class Node:
    """Shared services of a kubelet."""

    config: KubeletConfig
    client: Client
    runtime: RuntimeService
    image_service: ImageService
    images: ImageManager
    status: StatusManager
    volumes: Volumes
    probes: Probes
    cgroups: Cgroups
    objects: ReferencedObjects
    tokens: Tokens
    userns: UserNamespaces
    record: RecordEvent
    forget_events: Callable[[Object], None]
    """A pod is gone for good: what is remembered of its events may go."""
    services: Callable[[str], Iterable[Object]]
    """Services of a namespace and of "default"."""
    wait_services: Callable[[], object]
    """Awaitable maker: until Services have been read once."""
    runtime_class: Callable[[str], Object | None]
    capacity: Capacity
    tasks: Tasks
    devices: DeviceManager
    dynamic: DynamicResources
    affinity: Affinity
    resize: Resizes | None = None
    pods_changed: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when pods came, went or were resized: what groups of pods share has to be set anew."""
    meters: Meters = field(default_factory=Meters)

    def count(self, metric: str) -> None:
        """Add one to a counter of /metrics; the name may carry labels."""
        self.meters.count(metric)

    def event(self, pod: Object, kind: str, reason: str, message: str) -> None:
        """Record an event about a pod."""
        self.record(pod, kind, reason, message)

    def container_event(self, pod: Object, name: str, kind: str, reason: str, message: str) -> None:
        """Record an event about one container of a pod."""
        self.record(pod, kind, reason, message, field_path=podutil.field_path(pod, name))

    def env_context(self, pod: Object, ips: list[str]) -> EnvContext:
        """Where environment variables of a pod's containers come from."""
        mounted = self.volumes.of(podutil.uid(pod)).volumes
        paths: Mapping[str, str] = {name: volume.path for name, volume in mounted.items()}
        return EnvContext(
            objects=self.objects,
            services=self.services(pod["metadata"].get("namespace", "")),
            ips=ips,
            host_ips=self.config.host_ips,
            allocatable=self.capacity.allocatable,
            volume_paths=paths,
        )
