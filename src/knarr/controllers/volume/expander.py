"""Expansion: says of claims that want to grow who will do it.

Volumes are grown by their CSI driver's own resizer; what has none cannot grow here.
Source: pkg/controller/volume/expand/expand_controller.go.
"""

from __future__ import annotations

from knarr.api import meta, quantity
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.controllers.context import Context, object_key
from knarr.controllers.volume import match
from knarr.controllers.volume.localpath import PROVISIONER


class VolumeExpander:
    """Watches for claims whose request exceeds their capacity."""

    def __init__(self, ctx: Context) -> None:
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._volumes = ctx.informer(PERSISTENT_VOLUMES)
        self._recorder = ctx.recorder("volume_expand")
        self.controller = Controller("persistentvolume-expander-controller", self._reconcile)
        self._claims.add_handler(self._changed, self._updated)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, claim: Object) -> None:
        capacity = ((claim.get("status") or {}).get("capacity") or {}).get("storage")
        if capacity is not None and quantity.compare(match.requested(claim), capacity) > 0:
            self.controller.queue.add(object_key(claim))

    def _updated(self, old: Object, new: Object) -> None:
        if match.requested(old) != match.requested(new):
            self._changed(new)

    async def _reconcile(self, key: str) -> None:
        claim = self._claims.get_key(key)
        if claim is None or (claim.get("status") or {}).get("phase") != "Bound":
            return
        volume = self._volumes.get(None, claim["spec"].get("volumeName", ""))
        if volume is None or (volume["spec"].get("claimRef") or {}).get("uid") != claim["metadata"]["uid"]:
            return
        if meta.annotations(volume).get(match.PROVISIONED_BY) == PROVISIONER:
            return  # localpath.py sees to it
        if volume["spec"].get("csi") and meta.annotations(claim).get("volume.kubernetes.io/storage-resizer"):
            return
        if volume["spec"].get("csi"):
            message = "CSI migration or driver resizes the volume: waiting for an external controller to expand this PVC"
            self._recorder.event(claim, "Normal", "ExternalExpanding", message)
            return
        message = "Ignoring the PVC: didn't find a plugin capable of expanding the volume; waiting for an external controller to process this PVC."
        self._recorder.event(claim, "Warning", "ExternalExpanding", message)
