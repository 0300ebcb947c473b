"""The binder: claims find volumes, volumes follow their claims, released volumes are reclaimed.

A binding is written on the volume first and on the claim second; whatever dies in between, the
next look finishes it. One worker does claims and volumes in turn, because two at once could give
one volume to two claims.
Longer than most modules: claims and volumes are two halves of one state machine.
Source: pkg/controller/volume/persistentvolume/pv_controller.go, pv_controller_base.go.
"""

from __future__ import annotations

import asyncio
import os
import re
import shutil

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors, meta, quantity
from knarr.api.errors import StatusError
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, STORAGE_CLASSES
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers.context import Context, object_key
from knarr.controllers.quota import claim_class
from knarr.controllers.volume import match

log = get_logger(__name__)

_RESYNC_SECONDS = 15.0
_CLAIM, _VOLUME = "claim:", "volume:"
_NO_PROVISIONER = "kubernetes.io/no-provisioner"
_TMP = re.compile(r"^/tmp/.+")


class PersistentVolumeBinder:
    """Binds, unbinds and reclaims. Keys are "claim:<namespace>/<name>" and "volume:<name>"."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._volumes = ctx.informer(PERSISTENT_VOLUMES)
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._classes = ctx.informer(STORAGE_CLASSES)
        self._pods = ctx.pods
        self._pods.add_index("claim", claims_of_pod)
        self._recorder = ctx.recorder("persistentvolume-controller")
        self.controller = Controller("persistentvolume-binder-controller", self._reconcile, workers=1)
        self._claims.add_handler(self._claim_changed, lambda old, new: self._claim_changed(new), self._claim_deleted)
        self._volumes.add_handler(self._volume_changed, lambda old, new: self._volume_changed(new), self._volume_deleted)
        self._classes.add_handler(self._class_changed, lambda old, new: self._class_changed(new))

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _claim_changed(self, claim: Object) -> None:
        self.controller.queue.add(_CLAIM + object_key(claim))

    def _claim_deleted(self, claim: Object) -> None:
        name = claim["spec"].get("volumeName")
        if name:
            self.controller.queue.add(_VOLUME + name)

    def _volume_changed(self, volume: Object) -> None:
        self.controller.queue.add(_VOLUME + volume["metadata"]["name"])
        ref = volume["spec"].get("claimRef")
        if ref:
            self.controller.queue.add(f"{_CLAIM}{ref['namespace']}/{ref['name']}")
        elif (volume.get("status") or {}).get("phase") == "Available":
            self._wake_pending()

    def _volume_deleted(self, volume: Object) -> None:
        ref = volume["spec"].get("claimRef")
        if ref:
            self.controller.queue.add(f"{_CLAIM}{ref['namespace']}/{ref['name']}")

    def _class_changed(self, obj: Object) -> None:
        self._wake_pending()

    def _wake_pending(self) -> None:
        for claim in self._claims:
            if (claim.get("status") or {}).get("phase") == "Pending":
                self._claim_changed(claim)

    async def _reconcile(self, key: str) -> Result | None:
        if key.startswith(_CLAIM):
            claim = self._claims.get_key(key.removeprefix(_CLAIM))
            if claim is None:
                return None
            if match.BIND_COMPLETED in meta.annotations(claim):
                await self._sync_bound_claim(claim)
                return None
            return await self._sync_unbound_claim(claim)
        volume = self._volumes.get(None, key.removeprefix(_VOLUME))
        if volume is not None:
            await self._sync_volume(volume)
        return None

    def _event(self, obj: Object, type: str, reason: str, message: str) -> None:
        self._recorder.event(obj, type, reason, message)

    # Claims

    def _is_delayed(self, claim: Object) -> bool:
        found = self._classes.get(None, claim_class(claim))
        return found is not None and found.get("volumeBindingMode") == "WaitForFirstConsumer"

    async def _sync_unbound_claim(self, claim: Object) -> Result | None:
        name = claim["spec"].get("volumeName")
        if not name:
            return await self._find_volume(claim)
        volume = self._volumes.get(None, name)
        if volume is None:
            await self._set_claim_phase(claim, "Pending", None)
            return Result(_RESYNC_SECONDS)
        if volume["spec"].get("claimRef") is None:
            why = match.mismatch(volume, claim)
            if why:
                message = f'Cannot bind to requested volume "{name}": {why}'
                self._event(claim, "Warning", "VolumeMismatch", message)
                await self._set_claim_phase(claim, "Pending", None)
                return Result(_RESYNC_SECONDS)
            await self._bind(volume, claim)
        elif match.is_bound_to(volume, claim):
            await self._bind(volume, claim)
        else:
            message = f'volume "{name}" already bound to a different claim.'
            self._event(claim, "Warning", "FailedBinding", message)
            await self._set_claim_phase(claim, "Pending", None)
            return Result(_RESYNC_SECONDS)
        return None

    async def _find_volume(self, claim: Object) -> Result | None:
        delayed = self._is_delayed(claim)
        volume = match.best_match(claim, self._volumes, delayed)
        if volume is not None:
            await self._bind(volume, claim)
            return None
        if not match.has_class(claim) and (chosen := match.default_class(self._classes)) is not None:
            spec = {**claim["spec"], "storageClassName": chosen["metadata"]["name"]}
            await self._client.update(PERSISTENT_VOLUME_CLAIMS, {**claim, "spec": spec})
            return None
        if delayed and match.SELECTED_NODE not in meta.annotations(claim):
            self._event_waiting(claim)
        elif claim_class(claim):
            await self._ask_provisioner(claim)
            return Result(_RESYNC_SECONDS)
        else:
            message = "no persistent volumes available for this claim and no storage class is set"
            self._event(claim, "Normal", "FailedBinding", message)
        await self._set_claim_phase(claim, "Pending", None)
        return Result(_RESYNC_SECONDS)

    def _event_waiting(self, claim: Object) -> None:
        names = [pod["metadata"]["name"] for pod in self._pods.by_index("claim", object_key(claim)) if not pod["spec"].get("nodeName")]
        if not names:
            self._event(claim, "Normal", "WaitForFirstConsumer", "waiting for first consumer to be created before binding")
        elif len(names) == 1:
            self._event(claim, "Normal", "WaitForPodScheduled", f"waiting for pod {names[0]} to be scheduled")
        else:
            self._event(claim, "Normal", "WaitForPodScheduled", f"waiting for pods {','.join(names)} to be scheduled")

    async def _ask_provisioner(self, claim: Object) -> None:
        """Name the provisioner on the claim; making the volume is its work."""
        name = claim_class(claim)
        found = self._classes.get(None, name)
        if found is None:
            message = f'storageclass.storage.k8s.io "{name}" not found'
            self._event(claim, "Warning", "ProvisioningFailed", message)
            return
        provisioner = found["provisioner"]
        if provisioner == _NO_PROVISIONER:
            message = "storageclass has no provisioner and no persistent volumes are available for this claim"
            self._event(claim, "Normal", "FailedBinding", message)
            return
        if meta.annotations(claim).get(match.PROVISIONER) != provisioner:
            annotations = {**meta.annotations(claim), match.PROVISIONER: provisioner, match.OLD_PROVISIONER: provisioner}
            claim = {**claim, "metadata": {**claim["metadata"], "annotations": annotations}}
            claim = await self._client.update(PERSISTENT_VOLUME_CLAIMS, claim)
        message = (
            f"Waiting for a volume to be created either by the external provisioner '{provisioner}' or manually by the system administrator. "
            "If volume creation is delayed, please verify that the provisioner is running and correctly registered."
        )
        self._event(claim, "Normal", "ExternalProvisioning", message)

    async def _sync_bound_claim(self, claim: Object) -> None:
        name = claim["spec"].get("volumeName")
        if not name:
            await self._lose(claim, "ClaimLost", "Bound claim has lost reference to PersistentVolume. Data on the volume is lost!")
            return
        volume = self._volumes.get(None, name)
        if volume is None:
            await self._lose(claim, "ClaimLost", "Bound claim has lost its PersistentVolume. Data on the volume is lost!")
            return
        ref = volume["spec"].get("claimRef")
        if ref is None or ref.get("uid") == claim["metadata"]["uid"]:
            await self._bind(volume, claim)
        else:
            message = "Two claims are bound to the same volume, this one is bound incorrectly"
            await self._lose(claim, "ClaimMisbound", message)

    async def _lose(self, claim: Object, reason: str, message: str) -> None:
        if (claim.get("status") or {}).get("phase") == "Lost":
            return
        await self._set_claim_phase(claim, "Lost", None)
        self._event(claim, "Warning", reason, message)

    async def _set_claim_phase(self, claim: Object, phase: str, volume: Object | None) -> Object:
        old = claim.get("status") or {}
        status = dict(old)
        status["phase"] = phase
        if volume is None:
            for name in ("accessModes", "capacity", "currentVolumeAttributesClassName"):
                status.pop(name, None)
        else:
            status["accessModes"] = volume["spec"].get("accessModes") or []
            if old.get("phase") != phase:
                have = (old.get("capacity") or {}).get("storage")
                if have is None or quantity.compare(have, match.capacity(volume)) != 0:
                    status["capacity"] = volume["spec"].get("capacity") or {}
                attributes = volume["spec"].get("volumeAttributesClassName")
                if attributes and old.get("phase") == "Pending" and phase == "Bound":
                    status["currentVolumeAttributesClassName"] = attributes
        if status == old:
            return claim
        return await self._client.update(PERSISTENT_VOLUME_CLAIMS, {**claim, "status": status}, subresource="status")

    # Binding

    async def _bind(self, volume: Object, claim: Object) -> None:
        """Do what is left of: volume to claim, volume phase, claim to volume, claim phase."""
        volume = await self._bind_volume(volume, claim)
        volume = await self._set_volume_phase(volume, "Bound")
        claim = await self._bind_claim(claim, volume)
        await self._set_claim_phase(claim, "Bound", volume)

    async def _bind_volume(self, volume: Object, claim: Object) -> Object:
        ref = volume["spec"].get("claimRef") or {}
        claim_meta = claim["metadata"]
        annotations = dict(meta.annotations(volume))
        if not match.is_bound_to(volume, claim):
            annotations.setdefault(match.BOUND_BY_CONTROLLER, "yes")
        wanted = (claim_meta["name"], claim_meta["namespace"], claim_meta["uid"])
        if (ref.get("name"), ref.get("namespace"), ref.get("uid")) == wanted and annotations == meta.annotations(volume):
            return volume
        ref = {
            "kind": "PersistentVolumeClaim",
            "namespace": claim_meta["namespace"],
            "name": claim_meta["name"],
            "uid": claim_meta["uid"],
            "apiVersion": "v1",
            "resourceVersion": claim_meta["resourceVersion"],
        }
        new_meta = {**volume["metadata"], **({"annotations": annotations} if annotations else {})}
        return await self._client.update(PERSISTENT_VOLUMES, {**volume, "metadata": new_meta, "spec": {**volume["spec"], "claimRef": ref}})

    async def _bind_claim(self, claim: Object, volume: Object) -> Object:
        name = volume["metadata"]["name"]
        annotations = dict(meta.annotations(claim))
        if claim["spec"].get("volumeName") != name:
            annotations.setdefault(match.BOUND_BY_CONTROLLER, "yes")
        annotations.setdefault(match.BIND_COMPLETED, "yes")
        if claim["spec"].get("volumeName") == name and annotations == meta.annotations(claim):
            return claim
        changed = {
            **claim,
            "metadata": {**claim["metadata"], "annotations": annotations},
            "spec": {**claim["spec"], "volumeName": name},
        }
        return await self._client.update(PERSISTENT_VOLUME_CLAIMS, changed)

    # Volumes

    async def _set_volume_phase(self, volume: Object, phase: str, message: str = "", reason: str = "") -> Object:
        old = volume.get("status") or {}
        if old.get("phase") == phase:
            return volume
        status = {**old, "phase": phase, "message": message, "lastPhaseTransitionTime": clock.now_rfc3339()}
        if not message:
            status.pop("message")
        updated = await self._client.update(PERSISTENT_VOLUMES, {**volume, "status": status}, subresource="status")
        if reason:
            self._event(updated, "Warning", reason, message)
        return updated

    async def _sync_volume(self, volume: Object) -> None:
        ref = volume["spec"].get("claimRef")
        if ref is None or not ref.get("uid"):
            await self._set_volume_phase(volume, "Available")
            return
        claim = await self._claim_of(ref)
        if claim is None:
            if (volume.get("status") or {}).get("phase") not in ("Released", "Failed"):
                volume = await self._set_volume_phase(volume, "Released")
            await self._reclaim(volume)
        elif not claim["spec"].get("volumeName"):
            if match.mode(claim) != match.mode(volume):
                name = claim["metadata"]["name"]
                text = f'Cannot bind PersistentVolume to requested PersistentVolumeClaim "{name}" due to incompatible volumeMode.'
                self._event(volume, "Warning", "VolumeMismatch", text)
                text = (
                    f'Cannot bind PersistentVolume "{volume["metadata"]["name"]}" to requested PersistentVolumeClaim due to incompatible volumeMode.'
                )
                self._event(claim, "Warning", "VolumeMismatch", text)
                return
            self._claim_changed(claim)
        elif claim["spec"]["volumeName"] == volume["metadata"]["name"]:
            await self._set_volume_phase(volume, "Bound")
        else:
            await self._give_up_claim(volume)

    async def _claim_of(self, ref: Object) -> Object | None:
        """Give the claim that a volume is bound to; None when that one no longer exists."""
        claim = self._claims.get(ref["namespace"], ref["name"])
        if claim is not None and claim["metadata"]["uid"] == ref["uid"]:
            return claim
        # A missing or other claim in the cache is no proof, and what follows may destroy data.
        try:
            claim = await self._client.get(PERSISTENT_VOLUME_CLAIMS, ref["name"], ref["namespace"])
        except StatusError as error:
            if errors.is_not_found(error):
                return None
            raise
        return claim if claim["metadata"]["uid"] == ref["uid"] else None

    async def _give_up_claim(self, volume: Object) -> None:
        """The claim took another volume."""
        dynamic = match.PROVISIONED_BY in meta.annotations(volume)
        if dynamic and volume["spec"].get("persistentVolumeReclaimPolicy") == "Delete":
            if (volume.get("status") or {}).get("phase") not in ("Released", "Failed"):
                volume = await self._set_volume_phase(volume, "Released")
            await self._reclaim(volume)
            return
        await self._unbind(volume)

    async def _unbind(self, volume: Object) -> None:
        annotations = dict(meta.annotations(volume))
        spec = dict(volume["spec"])
        if annotations.pop(match.BOUND_BY_CONTROLLER, None) is not None:
            spec.pop("claimRef", None)
        else:
            # The user bound it in advance by name; that stays.
            spec["claimRef"] = {name: value for name, value in spec["claimRef"].items() if name != "uid"}
        new_meta = {name: value for name, value in volume["metadata"].items() if name != "annotations"}
        if annotations:
            new_meta["annotations"] = annotations
        volume = await self._client.update(PERSISTENT_VOLUMES, {**volume, "metadata": new_meta, "spec": spec})
        await self._set_volume_phase(volume, "Available")

    async def _reclaim(self, volume: Object) -> None:
        policy = volume["spec"].get("persistentVolumeReclaimPolicy") or "Retain"
        if policy == "Retain":
            return
        if policy == "Recycle":
            await self._set_volume_phase(volume, "Failed", "No recycler plugin found for the volume!", "VolumeFailedRecycle")
        elif policy == "Delete":
            await self._delete_volume(volume)
        else:
            message = "Volume has unrecognized PersistentVolumeReclaimPolicy"
            await self._set_volume_phase(volume, "Failed", message, "VolumeUnknownReclaimPolicy")

    async def _delete_volume(self, volume: Object) -> None:
        name = volume["metadata"]["name"]
        if meta.annotations(volume).get(match.PROVISIONED_BY) or volume["spec"].get("csi"):
            # Whoever made it deletes it.
            return
        host_path = (volume["spec"].get("hostPath") or {}).get("path")
        if host_path is None:
            message = f'error getting deleter volume plugin for volume "{name}": no volume plugin matched'
            await self._set_volume_phase(volume, "Failed", message, "VolumeFailedDelete")
            return
        if not _TMP.match(host_path) or ".." in host_path.split("/"):
            message = f"host_path deleter only supports /tmp/.+ but received provided {host_path}"
            await self._set_volume_phase(volume, "Failed", message, "VolumeFailedDelete")
            return
        await asyncio.get_running_loop().run_in_executor(None, _remove_tree, host_path)
        try:
            await self._client.delete(PERSISTENT_VOLUMES, name)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise


def _remove_tree(path: str) -> None:
    if os.path.islink(path) or os.path.isfile(path):
        os.unlink(path)
    else:
        shutil.rmtree(path, ignore_errors=True)


def claims_of_pod(pod: Object) -> list[str]:
    """Index function: keys of the claims a pod uses, named or ephemeral."""
    namespace, name = pod["metadata"].get("namespace", ""), pod["metadata"]["name"]
    keys = []
    for volume in pod["spec"].get("volumes") or ():
        if volume.get("persistentVolumeClaim"):
            keys.append(f"{namespace}/{volume['persistentVolumeClaim']['claimName']}")
        elif volume.get("ephemeral") is not None:
            keys.append(f"{namespace}/{name}-{volume['name']}")
    return keys
