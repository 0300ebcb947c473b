"""What the runtime holds of one pod at one moment: the kubelet's only source of truth about containers.

Made by `observe`, read by lifecycle and status (pure). Invariant: newest first in both lists.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knarr.kubelet import podutil
from knarr.runtime.cri import ContainerState, ContainerStatus, PodSandboxStatus, RuntimeService, SandboxState


@dataclass(slots=True)
class Observed:
    """Sandboxes and containers of a pod, newest first."""

    sandboxes: list[PodSandboxStatus] = field(default_factory=list)
    containers: list[ContainerStatus] = field(default_factory=list)
    ips: list[str] = field(default_factory=list)
    """Of the ready sandbox; when there is none, the last ones known."""

    def latest(self, name: str) -> ContainerStatus | None:
        """The newest container of this name, in whichever state."""
        return next((c for c in self.containers if c.metadata.name == name), None)

    def latest_exited(self, name: str) -> ContainerStatus | None:
        return next((c for c in self.containers if c.metadata.name == name and c.state is ContainerState.EXITED), None)

    def running(self) -> list[ContainerStatus]:
        """Everything that may still have a process."""
        return [c for c in self.containers if c.state in (ContainerState.RUNNING, ContainerState.UNKNOWN)]

    def ready_sandbox(self) -> PodSandboxStatus | None:
        return next((s for s in self.sandboxes if s.state is SandboxState.READY), None)


async def observe(runtime: RuntimeService, pod_uid: str) -> Observed:
    """Read one pod's sandboxes and containers from the runtime.

    Raises:
      RuntimeFault: the runtime does not answer.
    """
    labels = {podutil.POD_UID_LABEL: pod_uid}
    sandboxes = await runtime.list_pod_sandboxes(labels)
    containers = await runtime.list_containers(labels)
    sandboxes.sort(key=lambda s: (s.created_at_ns, s.metadata.attempt), reverse=True)
    containers.sort(key=lambda c: (c.created_at_ns, c.metadata.attempt), reverse=True)
    ips: list[str] = []
    if sandboxes and sandboxes[0].state is SandboxState.READY:
        ips = list(sandboxes[0].ips)
    return Observed(sandboxes, containers, ips)
