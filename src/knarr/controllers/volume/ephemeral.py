"""Ephemeral volumes: a pod's own claims, made from the templates in its volumes.

Source: pkg/controller/volume/ephemeral/controller.go.
"""

from __future__ import annotations

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS
from knarr.api.types import Object
from knarr.client.controller import Controller, TerminalError
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key


class EphemeralVolumeController:
    """Creates the claims of pods with ephemeral volumes."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._pods = ctx.pods
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._recorder = ctx.recorder("ephemeral_volume")
        self.controller = Controller("ephemeral-volume-controller", self._reconcile, workers=10)
        self._pods.add_handler(self._pod_added)
        self._claims.add_handler(on_delete=self._claim_deleted)

    async def run(self) -> None:
        await self.controller.run()

    def _pod_added(self, pod: Object) -> None:
        if not podutil.is_deleting(pod) and any(volume.get("ephemeral") is not None for volume in pod["spec"].get("volumes") or ()):
            self.controller.queue.add(object_key(pod))

    def _claim_deleted(self, claim: Object) -> None:
        owner = meta.controller_of(claim)
        if owner is not None and owner["kind"] == "Pod":
            pod = self._pods.get(claim["metadata"]["namespace"], owner["name"])
            if pod is not None and pod["metadata"]["uid"] == owner["uid"]:
                self._pod_added(pod)

    async def _reconcile(self, key: str) -> None:
        pod = self._pods.get_key(key)
        if pod is None or podutil.is_deleting(pod):
            return
        for volume in pod["spec"].get("volumes") or ():
            if volume.get("ephemeral") is not None:
                await self._ensure(pod, volume)

    async def _ensure(self, pod: Object, volume: Object) -> None:
        namespace = pod["metadata"]["namespace"]
        name = f"{pod['metadata']['name']}-{volume['name']}"
        existing = self._claims.get(namespace, name)
        if existing is not None:
            if not meta.is_controlled_by(existing, pod):
                message = f'PVC "{namespace}/{name}" was not created for pod "{object_key(pod)}" (pod is not owner)'
                raise TerminalError(message)
            return
        template = volume["ephemeral"].get("volumeClaimTemplate") or {}
        template_meta = template.get("metadata") or {}
        claim_meta: Object = {"name": name, "namespace": namespace, "ownerReferences": [meta.new_controller_ref(pod, "v1", "Pod")]}
        claim_meta["ownerReferences"][0]["blockOwnerDeletion"] = True
        for field in ("labels", "annotations"):
            if template_meta.get(field):
                claim_meta[field] = dict(template_meta[field])
        claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": claim_meta, "spec": meta.deep_copy(template.get("spec") or {})}
        try:
            await self._client.create(PERSISTENT_VOLUME_CLAIMS, claim)
        except StatusError as error:
            if errors.is_namespace_terminating(error):
                return
            self._recorder.event(pod, "Warning", "FailedBinding", f"ephemeral volume controller: create PVC {name}: {error.message}")
            raise
