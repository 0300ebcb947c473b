"""Local path provisioner: volumes that are folders on the node where their pod runs. Not upstream's; the default storage class uses it.

A claim of a class with our provisioner gets a PersistentVolume of type local on the node that the scheduler chose; the kubelet
there makes the folder when it is first mounted. A released volume's folder is removed through that kubelet, then the object.
Growing changes objects alone, since a folder has no size of its own. What a folder cannot be (shared between nodes, a block
device) is refused with an event.
Source: external-provisioner's events and order of steps; rancher/local-path-provisioner's behaviour.
"""

from __future__ import annotations

from knarr.aiokits.log import get_logger
from knarr.api import errors, meta, quantity
from knarr.api.resources import NODES, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, STORAGE_CLASSES
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers.context import Context, object_key
from knarr.controllers.quota import claim_class
from knarr.controllers.volume import match

log = get_logger(__name__)

PROVISIONER = "knarr.io/local-path"
CLASS_NAME = "local-path"
FOLDER_ANNOTATION = "knarr.io/local-path-folder"
"""On a Node: where its kubelet keeps such folders."""
_DEFAULT_FOLDER = "/var/lib/knarr/local-path"
_MODES = {"ReadWriteOnce", "ReadWriteOncePod"}
_AGAIN_SECONDS = 15.0


def default_class() -> Object:
    """The storage class of claims that name none."""
    return {
        "apiVersion": "storage.k8s.io/v1",
        "kind": "StorageClass",
        "metadata": {"name": CLASS_NAME, "annotations": {match.DEFAULT_CLASS: "true"}},
        "provisioner": PROVISIONER,
        "reclaimPolicy": "Delete",
        "volumeBindingMode": "WaitForFirstConsumer",
        "allowVolumeExpansion": True,
    }


class _Impossible(Exception):
    """The claim asks for what a folder cannot be."""


class LocalPathProvisioner:
    """See the module."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._claims = ctx.informer(PERSISTENT_VOLUME_CLAIMS)
        self._volumes = ctx.informer(PERSISTENT_VOLUMES)
        self._classes = ctx.informer(STORAGE_CLASSES)
        self._nodes = ctx.informer(NODES)
        self._recorder = ctx.recorder(PROVISIONER)
        self.controller = Controller("local-path-provisioner-controller", self._reconcile)
        self._claims.add_handler(self._claim_seen, lambda _, claim: self._claim_seen(claim))
        self._volumes.add_handler(self._volume_seen, lambda _, volume: self._volume_seen(volume))

    async def run(self) -> None:
        await self.controller.run()

    def _claim_seen(self, claim: Object) -> None:
        if meta.annotations(claim).get(match.PROVISIONER) == PROVISIONER:
            self.controller.queue.add("claim:" + object_key(claim))

    def _volume_seen(self, volume: Object) -> None:
        if meta.annotations(volume).get(match.PROVISIONED_BY) == PROVISIONER and (volume.get("status") or {}).get("phase") == "Released":
            self.controller.queue.add("volume:" + volume["metadata"]["name"])

    async def _reconcile(self, key: str) -> Result | None:
        kind, _, name = key.partition(":")
        if kind == "volume":
            return await self._delete(name)
        claim = self._claims.get_key(name)
        if claim is None or claim["metadata"].get("deletionTimestamp"):
            return None
        if claim["spec"].get("volumeName"):
            await self._grow(claim)
            return None
        return await self._provision(claim)

    # --- provisioning ---

    async def _provision(self, claim: Object) -> Result | None:
        storage_class = self._classes.get(None, claim_class(claim))
        if storage_class is None or storage_class["provisioner"] != PROVISIONER:
            return None
        name = "pvc-" + claim["metadata"]["uid"]
        if self._volumes.get(None, name) is not None:
            return None
        node = self._node_for(claim, storage_class)
        if node is None:
            return Result(_AGAIN_SECONDS) if storage_class.get("volumeBindingMode") == "Immediate" else None
        try:
            _check(claim)
        except _Impossible as error:
            message = f'failed to provision volume with StorageClass "{storage_class["metadata"]["name"]}": {error}'
            self._recorder.event(claim, "Warning", "ProvisioningFailed", message)
            return None
        where = f"{claim['metadata']['namespace']}/{claim['metadata']['name']}"
        self._recorder.event(claim, "Normal", "Provisioning", f'External provisioner is provisioning volume for claim "{where}"')
        try:
            await self._client.create(PERSISTENT_VOLUMES, volume_for(claim, storage_class, node, name))
        except errors.StatusError as error:
            if not errors.is_already_exists(error):
                raise
        self._recorder.event(claim, "Normal", "ProvisioningSucceeded", f"Successfully provisioned volume {name}")
        return None

    def _node_for(self, claim: Object, storage_class: Object) -> Object | None:
        """The node that the scheduler chose; for classes that do not wait for it, the Ready one with the fewest such volumes."""
        chosen = meta.annotations(claim).get(match.SELECTED_NODE)
        if chosen:
            return self._nodes.get(None, chosen)
        if storage_class.get("volumeBindingMode") == "WaitForFirstConsumer":
            return None
        counts: dict[str, int] = {}
        for volume in self._volumes:
            node = node_of(volume)
            counts[node] = counts.get(node, 0) + 1
        ready = [n for n in self._nodes if not n["spec"].get("unschedulable") and meta.is_condition_true((n.get("status") or {}).get("conditions"), "Ready")]
        return min(ready, key=lambda n: (counts.get(n["metadata"]["name"], 0), n["metadata"]["name"]), default=None)

    async def _grow(self, claim: Object) -> None:
        """Give a claim the size that it asks for."""
        volume = self._volumes.get(None, claim["spec"]["volumeName"])
        held = ((claim.get("status") or {}).get("capacity") or {}).get("storage")
        wanted = match.requested(claim)
        if volume is None or held is None or meta.annotations(volume).get(match.PROVISIONED_BY) != PROVISIONER or quantity.compare(wanted, held) <= 0:
            return
        if quantity.compare(wanted, match.capacity(volume)) > 0:
            await self._client.patch(PERSISTENT_VOLUMES, volume["metadata"]["name"], None, {"spec": {"capacity": {"storage": wanted}}})
        where = claim["metadata"]
        status = {"capacity": {**(claim["status"]["capacity"]), "storage": wanted}, "conditions": None, "allocatedResources": None, "allocatedResourceStatuses": None}
        await self._client.patch(PERSISTENT_VOLUME_CLAIMS, where["name"], where["namespace"], {"status": status}, subresource="status")
        self._recorder.event(claim, "Normal", "VolumeResizeSuccessful", "Resize volume succeeded")

    # --- deleting ---

    async def _delete(self, name: str) -> Result | None:
        volume = self._volumes.get(None, name)
        if volume is None or (volume.get("status") or {}).get("phase") != "Released" or volume["spec"].get("persistentVolumeReclaimPolicy") != "Delete":
            return None
        node = node_of(volume)
        if self._nodes.get(None, node) is not None:
            try:
                await self._client.request("DELETE", f"/api/v1/nodes/{node}/proxy/localvolumes/{name}")
            except errors.StatusError as error:
                if error.code != 404:
                    message = f"folder on node {node} not removed yet: {error.message}"
                    self._recorder.event(volume, "Warning", "VolumeFailedDelete", message)
                    return Result(_AGAIN_SECONDS)
        else:
            log.info("the node of a released volume is gone, and the folder with it", volume=name, node=node)
        try:
            await self._client.delete(PERSISTENT_VOLUMES, name, uid=volume["metadata"]["uid"])
        except errors.StatusError as error:
            if not errors.is_not_found(error):
                raise
        return None


def _check(claim: Object) -> None:
    modes = set(claim["spec"].get("accessModes") or ())
    if not modes <= _MODES:
        raise _Impossible(f"only ReadWriteOnce and ReadWriteOncePod are possible with a folder of one node, not {', '.join(sorted(modes - _MODES))}")
    if match.mode(claim) == "Block":
        raise _Impossible("a folder is no block device")
    if claim["spec"].get("selector"):
        raise _Impossible("claim.spec.selector is not supported for dynamic provisioning")
    if claim["spec"].get("dataSource") or claim["spec"].get("dataSourceRef"):
        raise _Impossible("a folder cannot be made from another volume or a snapshot")


def volume_for(claim: Object, storage_class: Object, node: Object, name: str) -> Object:
    """The PersistentVolume of a claim on a node. Pure."""
    where, host = claim["metadata"], node["metadata"]["name"]
    folder = meta.annotations(node).get(FOLDER_ANNOTATION, _DEFAULT_FOLDER)
    expression = {"key": "kubernetes.io/hostname", "operator": "In", "values": [(node["metadata"].get("labels") or {}).get("kubernetes.io/hostname", host)]}
    return {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": name, "annotations": {match.PROVISIONED_BY: PROVISIONER, match.SELECTED_NODE: host}},
        "spec": {
            "capacity": {"storage": match.requested(claim)},
            "accessModes": claim["spec"]["accessModes"],
            "persistentVolumeReclaimPolicy": storage_class.get("reclaimPolicy") or "Delete",
            "storageClassName": storage_class["metadata"]["name"],
            "volumeMode": "Filesystem",
            "mountOptions": storage_class.get("mountOptions") or [],
            "claimRef": {
                "apiVersion": "v1",
                "kind": "PersistentVolumeClaim",
                "namespace": where["namespace"],
                "name": where["name"],
                "uid": where["uid"],
                "resourceVersion": where["resourceVersion"],
            },
            "local": {"path": f"{folder}/{name}"},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [expression]}]}},
        },
    }


def node_of(volume: Object) -> str:
    """The node that holds a volume of ours; "" for others."""
    return str(meta.annotations(volume).get(match.SELECTED_NODE, "")) if meta.annotations(volume).get(match.PROVISIONED_BY) == PROVISIONER else ""
