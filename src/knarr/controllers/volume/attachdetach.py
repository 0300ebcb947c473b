"""Attach and detach: VolumeAttachments for the CSI volumes of the pods on each node.

One node is one key. What should be attached follows from pods, claims, volumes and drivers; what
is attached, from the VolumeAttachments that CSI attachers confirm. Invariant: a volume is detached
only when the node says it is not in use, or the node is lost for so long that it does not count.
Source: pkg/controller/volume/attachdetach, pkg/volume/csi/csi_attacher.go.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CSI_DRIVERS, NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, VOLUME_ATTACHMENTS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil, taints
from knarr.controllers.context import Context, object_key
from knarr.controllers.volume.binder import claims_of_pod

_MANAGED = "volumes.kubernetes.io/controller-managed-attach-detach"
_KEEP_TERMINATED = "volumes.kubernetes.io/keep-terminated-pod-volumes"
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_SHARED_MODES = {"ReadWriteMany", "ReadOnlyMany"}
_LOOK_AGAIN_SECONDS = 10.0


@dataclass(slots=True)
class _Wanted:
    """A volume that pods on a node need."""

    volume: Object
    pods: list[Object] = field(default_factory=list)


def attachment_name(handle: str, driver: str, node: str) -> str:
    return "csi-" + hashlib.sha256(f"{handle}{driver}{node}".encode()).hexdigest()


def unique_name(volume: Object) -> str:
    """The name of a volume in a node's status."""
    csi = volume["spec"]["csi"]
    return f"kubernetes.io/csi/{csi['driver']}^{csi['volumeHandle']}"


def _is_attached(attachment: Object) -> bool:
    return bool((attachment.get("status") or {}).get("attached"))


def _attachment_node(attachment: Object) -> list[str]:
    return [attachment["spec"]["nodeName"]]


def _attachment_volume(attachment: Object) -> list[str]:
    name = (attachment["spec"].get("source") or {}).get("persistentVolumeName")
    return [name] if name else []


class AttachDetachController:
    """Keeps the attachments of every node as its pods need them."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._patience_seconds = ctx.config.attach_detach_max_wait_unmount_seconds
        self._pods, self._nodes = ctx.pods, ctx.informer(NODES)
        self._claims, self._volumes = ctx.informer(PERSISTENT_VOLUME_CLAIMS), ctx.informer(PERSISTENT_VOLUMES)
        self._drivers, self._attachments = ctx.informer(CSI_DRIVERS), ctx.informer(VOLUME_ATTACHMENTS)
        self._recorder = ctx.recorder("attachdetach-controller")
        self._unwanted_since: dict[str, float] = {}
        self._pods.add_index("claim", claims_of_pod)
        self._attachments.add_index("node", _attachment_node)
        self._attachments.add_index("volume", _attachment_volume)
        self.controller = Controller("persistentvolume-attach-detach-controller", self._reconcile)
        self._pods.add_handler(self._pod_changed, lambda old, new: self._pod_changed(new), self._pod_changed)
        self._claims.add_handler(self._claim_changed, lambda old, new: self._claim_changed(new))
        self._volumes.add_handler(self._volume_changed, lambda old, new: self._volume_changed(new))
        self._nodes.add_handler(self._node_changed, self._node_updated, self._node_changed)
        self._attachments.add_handler(self._attachment_changed, self._attachment_updated, self._attachment_gone)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _pod_changed(self, pod: Object) -> None:
        node = pod["spec"].get("nodeName")
        if node and any(True for _ in claims_of_pod(pod)):
            self.controller.queue.add(node)

    def _claim_changed(self, claim: Object) -> None:
        for pod in self._pods.by_index("claim", object_key(claim)):
            self._pod_changed(pod)

    def _volume_changed(self, volume: Object) -> None:
        claim = volume["spec"].get("claimRef") or {}
        for pod in self._pods.by_index("claim", f"{claim.get('namespace')}/{claim.get('name')}"):
            self._pod_changed(pod)

    def _node_changed(self, node: Object) -> None:
        name = node["metadata"]["name"]
        if self._attachments.by_index("node", name) or (node.get("status") or {}).get("volumesAttached"):
            self.controller.queue.add(name)

    def _node_updated(self, old: Object, new: Object) -> None:
        before, after = old.get("status") or {}, new.get("status") or {}
        names = ("volumesInUse", "volumesAttached")
        if any(before.get(name) != after.get(name) for name in names) or taints.of_node(old) != taints.of_node(new):
            self._node_changed(new)

    def _attachment_changed(self, attachment: Object) -> None:
        self.controller.queue.add(attachment["spec"]["nodeName"])

    def _attachment_updated(self, old: Object, new: Object) -> None:
        self._attachment_changed(new)
        failure = (new.get("status") or {}).get("attachError") or {}
        if _is_attached(new) and not _is_attached(old):
            self._tell(new, "Normal", "SuccessfulAttachVolume", 'AttachVolume.Attach succeeded for volume "{}" ')
        elif failure and failure != (old.get("status") or {}).get("attachError"):
            self._tell(
                new, "Warning", "FailedAttachVolume", 'AttachVolume.Attach failed for volume "{}" : ' + str(failure.get("message", ""))
            )

    def _attachment_gone(self, attachment: Object) -> None:
        self._unwanted_since.pop(attachment["metadata"]["name"], None)
        self._attachment_changed(attachment)
        # Whoever waits for the volume on another node may have it now.
        for name in _attachment_volume(attachment):
            volume = self._volumes.get(None, name)
            if volume is not None:
                self._volume_changed(volume)

    def _tell(self, attachment: Object, type: str, reason: str, message: str) -> None:
        wanted = self._wanted(attachment["spec"]["nodeName"]).get(attachment["metadata"]["name"])
        for pod in wanted.pods if wanted is not None else ():
            self._recorder.event(pod, type, reason, message.replace("{}", wanted.volume["metadata"]["name"]) if wanted else message)

    # What should be

    def _volumes_of(self, pod: Object) -> Iterator[Object]:
        for key in claims_of_pod(pod):
            claim = self._claims.get_key(key)
            name = claim["spec"].get("volumeName") if claim is not None else None
            volume = self._volumes.get(None, name) if name else None
            if claim is None or volume is None or not volume["spec"].get("csi"):
                continue
            reference = volume["spec"].get("claimRef") or {}
            if reference.get("uid") == claim["metadata"]["uid"] and self._needs_attaching(volume["spec"]["csi"]["driver"]):
                yield volume

    def _needs_attaching(self, driver: str) -> bool:
        known = self._drivers.get(None, driver)
        return known is None or known["spec"].get("attachRequired") is not False

    def _wanted(self, node_name: str) -> dict[str, _Wanted]:
        node = self._nodes.get(None, node_name)
        if node is None or _MANAGED not in meta.annotations(node):
            return {}
        keep = meta.annotations(node).get(_KEEP_TERMINATED) == "true"
        wanted: dict[str, _Wanted] = {}
        for pod in self._pods.by_index("node", node_name):
            if podutil.is_finished(pod) and not keep:
                continue
            for volume in self._volumes_of(pod):
                csi = volume["spec"]["csi"]
                name = attachment_name(csi["volumeHandle"], csi["driver"], node_name)
                wanted.setdefault(name, _Wanted(volume)).pods.append(pod)
        return wanted

    # Reconcile

    async def _reconcile(self, node_name: str) -> Result | None:
        wanted = self._wanted(node_name)
        present = {item["metadata"]["name"]: item for item in self._attachments.by_index("node", node_name)}
        unwanted = {
            name: item for name, item in present.items() if name not in wanted and name.startswith("csi-") and not podutil.is_deleting(item)
        }
        going: dict[str, Object] = {}
        for name, item in unwanted.items():
            if await self._may_detach(node_name, item):
                going[name] = item
        # The node has to hear that a volume is no longer safe to mount before it goes.
        attached = [item for name, item in present.items() if _is_attached(item) and name not in going and not podutil.is_deleting(item)]
        await self._report(node_name, attached)
        for item in going.values():
            await self._detach(item)
        for name in wanted:
            self._unwanted_since.pop(name, None)
        blocked = False
        for name, want in wanted.items():
            if name not in present:
                blocked = not await self._attach(node_name, name, want) or blocked
        return Result(_LOOK_AGAIN_SECONDS) if blocked or len(going) < len(unwanted) else None

    async def _may_detach(self, node_name: str, attachment: Object) -> bool:
        since = self._unwanted_since.setdefault(attachment["metadata"]["name"], clock.now())
        cached = self._nodes.get(None, node_name)
        if cached is None:
            return True
        if any(taint["key"] == _OUT_OF_SERVICE for taint in taints.of_node(cached)):
            return True
        ready = podutil.condition(cached, "Ready")
        if (ready is None or ready["status"] != "True") and clock.now() - since > self._patience_seconds:
            return True
        volumes = [self._volumes.get(None, name) for name in _attachment_volume(attachment)]
        names = {unique_name(volume) for volume in volumes if volume is not None and volume["spec"].get("csi")}
        if names & set((cached.get("status") or {}).get("volumesInUse") or ()):
            return False
        # The cache may be older than a mount that began just now.
        try:
            node = await self._client.get(NODES, node_name)
        except StatusError as error:
            if errors.is_not_found(error):
                return True
            raise
        return not names & set((node.get("status") or {}).get("volumesInUse") or ())

    async def _report(self, node_name: str, attached: list[Object]) -> None:
        node = self._nodes.get(None, node_name)
        if node is None:
            return
        listed = []
        for item in attached:
            for name in _attachment_volume(item):
                volume = self._volumes.get(None, name)
                if volume is not None and volume["spec"].get("csi"):
                    listed.append({"name": unique_name(volume), "devicePath": ""})
        listed.sort(key=lambda item: item["name"])
        known = sorted((node.get("status") or {}).get("volumesAttached") or [], key=lambda item: item["name"])
        if known != listed:
            await self._client.patch(NODES, node_name, None, {"status": {"volumesAttached": listed or None}}, subresource="status")

    async def _detach(self, attachment: Object) -> None:
        try:
            await self._client.delete(VOLUME_ATTACHMENTS, attachment["metadata"]["name"], uid=attachment["metadata"]["uid"])
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _attach(self, node_name: str, name: str, want: _Wanted) -> bool:
        volume = want.volume["metadata"]["name"]
        elsewhere = [item for item in self._attachments.by_index("volume", volume) if item["spec"]["nodeName"] != node_name]
        if elsewhere and not _SHARED_MODES & set(want.volume["spec"].get("accessModes") or ()):
            others = sorted({object_key(pod) for item in elsewhere for pod in self._users(item)})
            detail = "Volume is already exclusively attached to one node and can't be attached to another"
            if others:
                detail = f"Volume is already used by {len(others)} pod(s) in different namespaces"
                same = [key.partition("/")[2] for key in others if key.partition("/")[0] == want.pods[0]["metadata"]["namespace"]]
                if same:
                    detail = f"Volume is already used by pod(s) {', '.join(same)}"
            for pod in want.pods:
                self._recorder.event(pod, "Warning", "FailedAttachVolume", f'Multi-Attach error for volume "{volume}" {detail}')
            return False
        spec = {"attacher": want.volume["spec"]["csi"]["driver"], "nodeName": node_name, "source": {"persistentVolumeName": volume}}
        body = {"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": {"name": name}, "spec": spec}
        try:
            await self._client.create(VOLUME_ATTACHMENTS, body)
        except StatusError as error:
            if not errors.is_already_exists(error):
                raise
        return True

    def _users(self, attachment: Object) -> list[Object]:
        wanted = self._wanted(attachment["spec"]["nodeName"]).get(attachment["metadata"]["name"])
        return wanted.pods if wanted is not None else []
