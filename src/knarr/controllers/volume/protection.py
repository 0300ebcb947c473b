"""Protection: claims in use by pods and volumes bound to claims stay until they are not used any more.

Source: pkg/controller/volume/pvcprotection, pvprotection, vacprotection.
"""

from __future__ import annotations

from knarr.api import meta
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS, VOLUME_ATTRIBUTES_CLASSES
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.client.rest import Client
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key
from knarr.controllers.volume.binder import claims_of_pod

_CLAIM = "kubernetes.io/pvc-protection"
_VOLUME = "kubernetes.io/pv-protection"
_ATTRIBUTES = "kubernetes.io/vac-protection"


async def _set_finalizer(client: Client, resource: Resource, obj: Object, finalizer: str, wanted: bool) -> None:
    finalizers = [item for item in meta.finalizers(obj) if item != finalizer]
    if wanted:
        finalizers.append(finalizer)
    patch = {"metadata": {"finalizers": finalizers, "resourceVersion": obj["metadata"]["resourceVersion"]}}
    await client.patch(resource, obj["metadata"]["name"], obj["metadata"].get("namespace"), patch)


class ClaimProtection:
    """Puts the finalizer on claims and takes it off when nothing runs with a deleted one."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._pods = ctx.pods
        self._pods.add_index("claim", claims_of_pod)
        self.controller = Controller("persistentvolumeclaim-protection-controller", self._reconcile)
        self._claims.add_handler(self._changed, lambda old, new: self._changed(new))
        self._pods.add_handler(None, self._pod_updated, self._pod_ended)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, claim: Object) -> None:
        if podutil.is_deleting(claim) == (_CLAIM in meta.finalizers(claim)):
            self.controller.queue.add(object_key(claim))

    def _pod_updated(self, old: Object, new: Object) -> None:
        if podutil.is_finished(new) and not podutil.is_finished(old):
            self._pod_ended(new)

    def _pod_ended(self, pod: Object) -> None:
        for key in claims_of_pod(pod):
            claim = self._claims.get_key(key)
            if claim is not None and podutil.is_deleting(claim):
                self.controller.queue.add(key)

    async def _reconcile(self, key: str) -> None:
        claim = self._claims.get_key(key)
        if claim is None:
            return
        has = _CLAIM in meta.finalizers(claim)
        if podutil.is_deleting(claim):
            if has and not await self._is_used(key):
                await _set_finalizer(self._client, PERSISTENT_VOLUME_CLAIMS, claim, _CLAIM, False)
        elif not has:
            await _set_finalizer(self._client, PERSISTENT_VOLUME_CLAIMS, claim, _CLAIM, True)

    async def _is_used(self, key: str) -> bool:
        if any(_uses(pod) for pod in self._pods.by_index("claim", key)):
            return True
        # A pod may have been bound a moment ago, and the claim's data would be gone for it.
        live = await self._client.list(PODS, key.partition("/")[0])
        return any(_uses(pod) and key in claims_of_pod(pod) for pod in live.get("items") or ())


def _uses(pod: Object) -> bool:
    return bool(pod["spec"].get("nodeName")) and not podutil.is_finished(pod)


class VolumeProtection:
    """The same for volumes, which are used while bound."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._volumes = ctx.informer(PERSISTENT_VOLUMES)
        self.controller = Controller("persistentvolume-protection-controller", self._reconcile)
        self._volumes.add_handler(self._changed, lambda old, new: self._changed(new))

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, volume: Object) -> None:
        if podutil.is_deleting(volume) == (_VOLUME in meta.finalizers(volume)):
            self.controller.queue.add(object_key(volume))

    async def _reconcile(self, key: str) -> None:
        volume = self._volumes.get_key(key)
        if volume is None:
            return
        has = _VOLUME in meta.finalizers(volume)
        if podutil.is_deleting(volume):
            if has and (volume.get("status") or {}).get("phase") != "Bound":
                await _set_finalizer(self._client, PERSISTENT_VOLUMES, volume, _VOLUME, False)
        elif not has:
            await _set_finalizer(self._client, PERSISTENT_VOLUMES, volume, _VOLUME, True)


class AttributesClassProtection:
    """The same for VolumeAttributesClasses, which are used while a claim or volume names them."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._classes = ctx.informer(VOLUME_ATTRIBUTES_CLASSES)
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._volumes = ctx.informer(PERSISTENT_VOLUMES)
        self.controller = Controller("volumeattributesclass-protection-controller", self._reconcile)
        self._classes.add_handler(self._changed, lambda old, new: self._changed(new))
        for informer in (self._claims, self._volumes):
            informer.add_handler(None, self._user_updated, self._user_gone)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, obj: Object) -> None:
        if podutil.is_deleting(obj) == (_ATTRIBUTES in meta.finalizers(obj)):
            self.controller.queue.add(object_key(obj))

    def _user_updated(self, old: Object, new: Object) -> None:
        if _attribute_classes(old) != _attribute_classes(new):
            self._user_gone(old)

    def _user_gone(self, obj: Object) -> None:
        for name in _attribute_classes(obj):
            found = self._classes.get(None, name)
            if found is not None and podutil.is_deleting(found):
                self.controller.queue.add(name)

    async def _reconcile(self, name: str) -> None:
        obj = self._classes.get(None, name)
        if obj is None:
            return
        has = _ATTRIBUTES in meta.finalizers(obj)
        if podutil.is_deleting(obj):
            used = any(name in _attribute_classes(user) for informer in (self._claims, self._volumes) for user in informer)
            if has and not used:
                await _set_finalizer(self._client, VOLUME_ATTRIBUTES_CLASSES, obj, _ATTRIBUTES, False)
        elif not has:
            await _set_finalizer(self._client, VOLUME_ATTRIBUTES_CLASSES, obj, _ATTRIBUTES, True)


def _attribute_classes(obj: Object) -> set[str]:
    status = obj.get("status") or {}
    names = (
        obj["spec"].get("volumeAttributesClassName"),
        status.get("currentVolumeAttributesClassName"),
        (status.get("modifyVolumeStatus") or {}).get("targetVolumeAttributesClassName"),
    )
    return {name for name in names if name}
