"""Grows the file systems of volumes in use after the volumes themselves have grown.

Callers: csi and claims (what is in use), kubelet (the loop). Whoever grows a volume, the cluster's resizer or a human, marks its claim; a
node may read single claims, not watch them, so the claims of volumes that are in use here and can grow are looked at every
INTERVAL_SECONDS, as upstream does in shorter rounds, and at once when such a volume is mounted. Without such volumes nothing runs.
Source: pkg/volume/util/operationexecutor/node_expander.go, pkg/volume/util/resize_util.go, pkg/volume/csi/expander.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from knarr.aiokits.log import get_logger
from knarr.api import errors, meta, quantity
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet.faults import UNREACHABLE
from knarr.kubelet.volumes.model import VolumeError

log = get_logger(__name__)

INTERVAL_SECONDS = 10.0
_PENDING = ("NodeResizePending", "NodeResizeInProgress")


@dataclass(frozen=True, slots=True)
class InUse:
    """A volume published for a pod."""

    pod: Object
    volume: str
    """Name of the PersistentVolume."""
    grow: Callable[[int], Awaitable[None]]
    """To a size in bytes. Raises VolumeError."""
    can_grow: Callable[[], bool] = lambda: True
    """Whether that can be asked for now."""


class Growth:
    """See the module.

    Args:
      event: (pod, type, reason, message).
    """

    def __init__(self, client: Client, event: Callable[[Object, str, str, str], None]) -> None:
        self._client = client
        self._event = event
        self._used: dict[tuple[str, str], InUse] = {}
        """By pod uid and volume."""
        self._wake = asyncio.Event()

    def use(self, used: InUse) -> None:
        """A volume was mounted for a pod."""
        self._used[used.pod["metadata"]["uid"], used.volume] = used
        self.look()

    def look(self) -> None:
        """Look at the claims now."""
        self._wake.set()

    def forget(self, pod_uid: str) -> None:
        """The pod's volumes are taken back."""
        for key in [key for key in self._used if key[0] == pod_uid]:
            del self._used[key]

    async def run(self) -> None:
        """Eternal."""
        while True:
            while not any(used.can_grow() for used in self._used.values()):
                await self._wake.wait()
                self._wake.clear()
            seen: set[str] = set()
            for used in list(self._used.values()):
                if used.can_grow() and used.volume not in seen:
                    seen.add(used.volume)
                    try:
                        await self._look(used)
                    except (errors.StatusError, *UNREACHABLE) as error:
                        log.warning("claim of a volume in use not read", volume=used.volume, error=str(error))
            try:
                async with asyncio.timeout(INTERVAL_SECONDS):
                    await self._wake.wait()
                self._wake.clear()
            except TimeoutError:
                continue

    async def _look(self, used: InUse) -> None:
        persistent = await self._client.get(PERSISTENT_VOLUMES, used.volume)
        reference = persistent["spec"].get("claimRef") or {}
        claim = await self._client.get(PERSISTENT_VOLUME_CLAIMS, reference.get("name", ""), reference.get("namespace"))
        if claim["metadata"]["uid"] != reference.get("uid") or not pending(claim, persistent):
            return
        size = persistent["spec"]["capacity"]["storage"]
        try:
            await used.grow(quantity.value(size))
        except VolumeError as error:
            self._event(used.pod, "Warning", "VolumeResizeFailed", f'NodeExpandVolume.NodeExpandVolume failed for volume "{used.volume}" : {error}')
            return
        status = claim.get("status") or {}
        rest = {kind: state for kind, state in (status.get("allocatedResourceStatuses") or {}).items() if kind != "storage"}
        patch: Object = {"capacity": {**(status.get("capacity") or {}), "storage": size}, "conditions": None, "allocatedResourceStatuses": rest or None}
        await self._client.patch(PERSISTENT_VOLUME_CLAIMS, meta.name(claim), meta.namespace(claim), {"status": patch}, subresource="status")
        self._event(used.pod, "Normal", "FileSystemResizeSuccessful", f'NodeExpandVolume.NodeExpandVolume succeeded for volume "{used.volume}"')


def pending(claim: Object, persistent: Object) -> bool:
    """Whether a node has still to grow the file system. Pure."""
    status = claim.get("status") or {}
    marked = meta.is_condition_true(status.get("conditions"), "FileSystemResizePending")
    marked = marked or (status.get("allocatedResourceStatuses") or {}).get("storage") in _PENDING
    held = (status.get("capacity") or {}).get("storage") or "0"
    return bool(marked and quantity.compare(persistent["spec"]["capacity"]["storage"], held) > 0)
