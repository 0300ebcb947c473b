"""Writes volume bindings to the API and waits until the volume controller has completed them.

Source: plugins/volumebinding/binder.go BindPodVolumes, checkBindings.
"""

from __future__ import annotations

import asyncio

from knarr.api.errors import StatusError
from knarr.api.resources import PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.scheduler.framework import PluginError
from knarr.scheduler.handle import Handle, Object
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.volumes import SELECTED_NODE, NodeVolumes, is_fully_bound, volume_reaches


class APIVolumeWriter:
    """See the module. `changed` is called by the event handlers when a claim or a volume changes."""

    def __init__(self, client: Client, handle: Handle) -> None:
        self._client = client
        self._handle = handle
        self._changed = asyncio.Event()

    def changed(self) -> None:
        self._changed.set()

    async def bind(self, pod: PodInfo, node_name: str, chosen: NodeVolumes, timeout_seconds: float) -> None:
        """Write the bindings and wait for their completion.

        Raises:
          PluginError: the API refused, the volumes changed under way, or the time is up.
        """
        try:
            volumes = [await self._client.update(PERSISTENT_VOLUMES, volume) for volume, _ in chosen.bindings]
            claims = [await self._client.update(PERSISTENT_VOLUME_CLAIMS, claim) for claim in chosen.provisions]
        except (StatusError, HTTPError) as error:
            raise PluginError(f"binding volumes: {error}") from error
        pairs = [(volume, claim) for volume, (_, claim) in zip(volumes, chosen.bindings, strict=True)]
        try:
            async with asyncio.timeout(timeout_seconds):
                while not self._complete(pod, node_name, pairs, claims):
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            raise PluginError("binding volumes: context deadline exceeded") from None

    def _complete(self, pod: PodInfo, node_name: str, pairs: list[tuple[Object, Object]], claims: list[Object]) -> bool:
        objects = self._handle.objects
        info = self._handle.table.get(node_name)
        if info is None or info.node is None:
            raise PluginError(f'binding volumes: failed to get node "{node_name}"')
        done = True
        for written, claim in pairs:
            name = written["metadata"]["name"]
            volume = objects.get("PersistentVolume", name)
            current = objects.get("PersistentVolumeClaim", claim["metadata"]["name"], pod.namespace)
            if volume is None or current is None:
                raise PluginError("binding volumes: failed to check binding: volume or claim not found")
            if int(volume["metadata"]["resourceVersion"]) < int(written["metadata"]["resourceVersion"]):
                done = False
                continue
            if not volume_reaches(volume, info.node):
                raise PluginError(f'binding volumes: pv "{name}" node affinity doesn\'t match node "{node_name}"')
            if not (volume["spec"].get("claimRef") or {}).get("uid"):
                raise PluginError(f'binding volumes: ClaimRef got reset for pv "{name}"')
            done = done and is_fully_bound(current)
        for written in claims:
            name = written["metadata"]["name"]
            current = objects.get("PersistentVolumeClaim", name, pod.namespace)
            if current is None:
                raise PluginError("binding volumes: failed to check provisioning pvc: not found")
            if int(current["metadata"]["resourceVersion"]) < int(written["metadata"]["resourceVersion"]):
                done = False
                continue
            if (current["metadata"].get("annotations") or {}).get(SELECTED_NODE) != node_name:
                raise PluginError(f'binding volumes: provisioning failed for PVC "{name}"')
            volume = objects.get("PersistentVolume", current["spec"].get("volumeName") or "")
            if volume is not None and not volume_reaches(volume, info.node):
                raise PluginError(f'binding volumes: pv "{volume["metadata"]["name"]}" node affinity doesn\'t match node "{node_name}"')
            done = done and is_fully_bound(current)
        return done
