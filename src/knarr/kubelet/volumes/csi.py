"""CSI drivers registered on this node, and the volumes that they serve: attach is awaited, stage and publish are called.

Callers: volumes.claims; plugins.watcher (register, deregister). What is published for a pod, and what is staged, is recorded
beside it (vol_data.json), before the driver is asked, so a restarted kubelet can undo it; a record goes when the driver has surely done
nothing or has undone it. Invariants: unpublish before unstage; a volume is unstaged when no pod of this node has a record of it. A volume of a driver that is not registered fails with upstream's message and is tried again.
Source: pkg/volume/csi (csi_mounter.go, csi_attacher.go, csi_plugin.go, nodeinfomanager).
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
from dataclasses import dataclass, field
from glob import escape as glob_escape
from glob import glob
from typing import Any
from weakref import WeakValueDictionary

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.resources import CSI_DRIVERS, CSI_NODES, NODES, SECRETS, VOLUME_ATTACHMENTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import podutil
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.faults import UNREACHABLE
from knarr.kubelet.plugins.wire import Message, Plugin, PluginError
from knarr.kubelet.tokens import Tokens
from knarr.kubelet.volumes import mounts, wellknown
from knarr.kubelet.volumes.growth import Growth, InUse
from knarr.kubelet.volumes.model import MountedVolume, VolumeError

log = get_logger(__name__)

_NODE = "/csi.v1.Node/"
_STAGE, _EXPAND, _SINGLE_NODE, _MOUNT_GROUP = 1, 3, 5, 6
_MODES = {"ReadWriteOnce": 1, "ReadOnlyMany": 3, "ReadWriteMany": 5, "ReadWriteOncePod": 1}
_SINGLE_NODE_MODES = {"ReadWriteOnce": 7, "ReadWriteOncePod": 6}
"""What a driver is told that tells one pod of a node from many."""
_UNCERTAIN = frozenset({"", "CANCELLED", "DEADLINE_EXCEEDED", "UNAVAILABLE", "RESOURCE_EXHAUSTED", "ABORTED"})
"""Codes with which a driver may still have done, or be doing, what it was asked for."""
_PATHS = ("target_path", "staging_target_path", "volume_path")
_MIGRATED = "storage.alpha.kubernetes.io/migrated-plugins"
_MIGRATED_PLUGINS = ",".join(
    f"kubernetes.io/{name}" for name in ("aws-ebs", "azure-disk", "azure-file", "cinder", "gce-pd", "portworx-volume", "vsphere-volume")
)
_ATTACH_SECONDS = 120.0
_ATTACH_LOOK_SECONDS = 5.0
_REPUBLISH_SECONDS = 60.0
"""How often a driver that asks for it is to publish again what is in use."""
_TOKEN_SECONDS = 3600
_FOLDER = "kubernetes.io~csi"
_NODE_ID_ANNOTATION = "csi.volume.kubernetes.io/nodeid"


class _CallFault(VolumeError):
    """A driver answered with an error. `final`: it has done nothing."""

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


@dataclass(slots=True)
class _Driver:
    name: str
    plugin: Plugin
    capabilities: set[int] = field(default_factory=set)
    node_id: str = ""
    known_root: bool = False
    """It knows the kubelet's folder as /var/lib/kubelet, and is told its paths so."""


class CSIVolumes:
    """Volumes served by CSI drivers."""

    def __init__(self, config: KubeletConfig, client: Client, tokens: Tokens, growth: Growth) -> None:
        self._config = config
        self._tokens = tokens
        self._client = client
        self.growth = growth
        self._attachments_changed = asyncio.Event()
        self._drivers: dict[str, _Driver] = {}
        self._staging: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def close(self) -> None:
        for driver in self._drivers.values():
            await driver.plugin.close()

    def start_over(self) -> None:
        """No mount of an earlier start is there any more: the machine was started again, or the cluster. Everything is to be staged anew."""
        for path in glob(os.path.join(glob_escape(self._config.root_dir), "plugins", "kubernetes.io", "csi", "*", "*", "staged")):
            os.unlink(path)

    def owns(self, path: str) -> bool:
        """Whether this path is a CSI volume whose ownership its driver has set."""
        return "/kubernetes.io~csi/" in path

    # --- registration ---

    async def register(self, name: str, endpoint: str, versions: list[str], *, known_root: bool = False) -> None:
        """Take a driver: ask what it is, and tell the API server. Raises PluginError."""
        if not any(v.startswith("1.") or v == "v1" for v in versions):
            raise PluginError(f"none of the driver's versions is supported: {versions}")
        plugin = Plugin(endpoint)
        try:
            info = await plugin.call(_NODE + "NodeGetInfo", "Empty", {}, "NodeGetInfoResponse")
            answer = await plugin.call(_NODE + "NodeGetCapabilities", "Empty", {}, "NodeGetCapabilitiesResponse")
            capabilities = {int((c.get("rpc") or {}).get("type") or 0) for c in answer.get("capabilities") or []}
            await self._publish_node(name, info)
        except (PluginError, errors.StatusError, *UNREACHABLE) as e:
            await plugin.close()
            raise PluginError(f"error updating Node object with CSI driver node info: {e}") from e
        old = self._drivers.pop(name, None)
        if old is not None:
            await old.plugin.close()
        self._drivers[name] = _Driver(name, plugin, capabilities, info.get("node_id", ""), known_root)

    async def deregister(self, name: str, endpoint: str = "") -> None:
        """The driver's socket is gone."""
        driver = self._drivers.pop(name, None)
        if driver is not None:
            await driver.plugin.close()
        with contextlib.suppress(errors.StatusError, *UNREACHABLE):
            await self._update_csi_node(name, None)

    async def announce(self) -> None:
        """Make this node's CSINode, which provisioners and the scheduler look for even where no driver is."""
        delay = 1.0
        while True:
            try:
                return await self._update_csi_node("", None)
            except (errors.StatusError, PluginError, *UNREACHABLE) as e:
                log.warning("CSINode not made", error=str(e))
            await asyncio.sleep(delay)
            delay = min(2 * delay, 60.0)

    async def _publish_node(self, name: str, info: Message) -> None:
        segments: dict[str, str] = (info.get("accessible_topology") or {}).get("segments") or {}
        node = await self._client.get(NODES, self._config.node_name)
        held = orjson.loads((node["metadata"].get("annotations") or {}).get(_NODE_ID_ANNOTATION) or "{}")
        held[name] = info.get("node_id", "")
        patch = {"metadata": {"annotations": {_NODE_ID_ANNOTATION: orjson.dumps(held).decode()}, "labels": segments}}
        await self._client.patch(NODES, self._config.node_name, None, patch, type="merge")
        entry: Object = {"name": name, "nodeID": info.get("node_id", ""), "topologyKeys": sorted(segments) or None}
        if info.get("max_volumes_per_node"):
            entry["allocatable"] = {"count": info["max_volumes_per_node"]}
        await self._update_csi_node(name, entry)

    async def _update_csi_node(self, name: str, entry: Object | None) -> None:
        node_name = self._config.node_name
        for _ in range(5):
            try:
                found = await self._client.get(CSI_NODES, node_name)
            except errors.StatusError as e:
                if not errors.is_not_found(e):
                    raise
                found = None
            try:
                if found is None:
                    node = await self._client.get(NODES, node_name)
                    owner = {"apiVersion": "v1", "kind": "Node", "name": node_name, "uid": node["metadata"]["uid"]}
                    fresh = {"apiVersion": "storage.k8s.io/v1", "kind": "CSINode", "metadata": {"name": node_name, "annotations": {_MIGRATED: _MIGRATED_PLUGINS}, "ownerReferences": [owner]}}
                    await self._client.create(CSI_NODES, {**fresh, "spec": {"drivers": [entry] if entry else []}})
                    return
                if entry is None and all(d["name"] != name for d in (found.get("spec") or {}).get("drivers") or []):
                    return
                drivers = [d for d in (found.get("spec") or {}).get("drivers") or [] if d["name"] != name]
                found["spec"] = {"drivers": drivers + ([entry] if entry else [])}
                await self._client.update(CSI_NODES, found)
                return
            except errors.StatusError as e:
                if not (errors.is_conflict(e) or errors.is_already_exists(e)):
                    raise
        raise PluginError("CSINode keeps changing")

    # --- mounting ---

    def _driver(self, name: str) -> _Driver:
        driver = self._drivers.get(name)
        if driver is None:
            raise VolumeError(
                f"kubernetes.io/csi: mounter.SetUpAt failed to get CSI client: driver name {name} not found in the list of registered CSI drivers"
            )
        return driver

    async def _driver_object(self, name: str) -> Object:
        try:
            return (await self._client.get(CSI_DRIVERS, name)).get("spec") or {}
        except errors.StatusError as e:
            if errors.is_not_found(e):
                return {}
            raise VolumeError(e.message) from e

    async def mount_inline(self, pod: Object, volume: Object, pod_dir: str) -> MountedVolume:
        """Publish an ephemeral volume that the pod's spec describes. Raises VolumeError."""
        source, name = volume["csi"], volume["name"]
        driver = self._driver(source["driver"])
        spec = await self._driver_object(source["driver"])
        if "Ephemeral" not in (spec.get("volumeLifecycleModes") or ["Persistent"]):
            raise VolumeError(f"kubernetes.io/csi: mounter.SetUpAt volume mode \"Ephemeral\" not supported by driver {source['driver']} (only supports {spec.get('volumeLifecycleModes')})")
        handle = "csi-" + hashlib.sha256(f"{podutil.uid(pod)}{name}".encode()).hexdigest()
        context = dict(source.get("volumeAttributes") or {})
        secrets = await self._secrets(source.get("nodePublishSecretRef"), pod["metadata"].get("namespace", ""))
        request = {"volume_id": handle, "volume_capability": _capability(driver, [], source.get("fsType") or "", ["ReadWriteOnce"])}
        read_only = bool(source.get("readOnly"))
        return await self._publish(pod, name, name, driver, spec, request, context, secrets, pod_dir, read_only=read_only, inline=True)

    async def mount_persistent(self, pod: Object, name: str, persistent: Object, pod_dir: str, *, read_only: bool) -> MountedVolume:
        """Wait for the attachment, stage and publish. Raises VolumeError."""
        source, inner = persistent["spec"]["csi"], persistent["metadata"]["name"]
        driver = self._driver(source["driver"])
        spec = await self._driver_object(source["driver"])
        publish_context = await self._attached(persistent, spec)
        capability = _capability(driver, persistent["spec"].get("mountOptions") or [], source.get("fsType") or "", persistent["spec"].get("accessModes") or [])
        self._add_group(pod, driver, capability)
        record = os.path.join(pod_dir, "volumes", _FOLDER, inner)
        staging = await self._stage(driver, persistent, capability, publish_context, record)
        secrets = await self._secrets(source.get("nodePublishSecretRef"))
        request = {"volume_id": source["volumeHandle"], "publish_context": publish_context, "volume_capability": capability}
        if staging:
            request["staging_target_path"] = staging
        context = dict(source.get("volumeAttributes") or {})
        read_only = read_only or bool(source.get("readOnly"))
        mounted = await self._publish(pod, name, inner, driver, spec, request, context, secrets, pod_dir, read_only=read_only, inline=False)
        self._use(pod, persistent, request, mounted.path)
        return mounted

    async def publish_block(self, pod: Object, name: str, persistent: Object, pod_dir: str, *, read_only: bool) -> MountedVolume:
        """Publish a volume as a device file. Raises VolumeError."""
        source, inner = persistent["spec"]["csi"], persistent["metadata"]["name"]
        driver = self._driver(source["driver"])
        spec = await self._driver_object(source["driver"])
        publish_context = await self._attached(persistent, spec)
        capability = {"block": {}, "access_mode": _access_mode(driver, persistent["spec"].get("accessModes") or [])}
        record = os.path.join(pod_dir, "volumeDevices", _FOLDER, inner)
        staging = await self._stage(driver, persistent, capability, publish_context, record)
        folder = os.path.join(self._config.root_dir, "plugins", "kubernetes.io", "csi", "volumeDevices", "publish", inner)
        os.makedirs(folder, 0o750, exist_ok=True)
        target = os.path.join(folder, podutil.uid(pod))
        request: Message = {
            "volume_id": source["volumeHandle"],
            "publish_context": publish_context,
            "volume_capability": capability,
            "target_path": target,
            "readonly": read_only,
            "volume_context": source.get("volumeAttributes") or {},
            "secrets": await self._secrets(source.get("nodePublishSecretRef")),
        }
        if staging:
            request["staging_target_path"] = staging
        await self._publish_call(driver, request, record)
        self._use(pod, persistent, request, target)
        return MountedVolume(name, os.path.realpath(target), read_only=read_only, block=True)

    def _add_group(self, pod: Object, driver: _Driver, capability: Message) -> None:
        group = (pod["spec"].get("securityContext") or {}).get("fsGroup")
        if group is not None and _MOUNT_GROUP in driver.capabilities:
            capability["mount"]["volume_mount_group"] = str(group)

    async def _publish(
        self,
        pod: Object,
        name: str,
        inner: str,
        driver: _Driver,
        spec: Object,
        request: Message,
        context: dict[str, str],
        secrets: dict[str, str],
        pod_dir: str,
        *,
        read_only: bool,
        inline: bool,
    ) -> MountedVolume:
        folder = os.path.join(pod_dir, "volumes", _FOLDER, inner)
        target = os.path.join(folder, "mount")
        mounted = MountedVolume(name, target, read_only=read_only, again_at=clock.now() + _REPUBLISH_SECONDS if spec.get("requiresRepublish") else None)
        there = mounts.is_mount_point(target)
        if there and mounted.again_at is None:
            return mounted
        os.makedirs(folder, 0o750, exist_ok=True)
        if spec.get("podInfoOnMount"):
            meta = pod["metadata"]
            context["csi.storage.k8s.io/pod.name"] = meta["name"]
            context["csi.storage.k8s.io/pod.namespace"] = meta.get("namespace", "")
            context["csi.storage.k8s.io/pod.uid"] = meta["uid"]
            context["csi.storage.k8s.io/serviceAccount.name"] = pod["spec"].get("serviceAccountName", "")
            context["csi.storage.k8s.io/ephemeral"] = "true" if inline else "false"
        context |= await self._service_account_tokens(pod, spec)
        full = {**request, "target_path": target, "readonly": read_only, "secrets": secrets, "volume_context": context}
        await self._publish_call(driver, full, folder, there=there)
        if not there and _owned_by_kubelet(spec, request, pod) and not read_only and "volume_mount_group" not in (request["volume_capability"].get("mount") or {}):
            from knarr.kubelet.volumes import ownership

            shared = pod["spec"].get("securityContext") or {}
            mismatch = shared.get("fsGroupChangePolicy") == "OnRootMismatch"
            await asyncio.to_thread(ownership.give_to_group, target, shared["fsGroup"], only_on_mismatch=mismatch)
        return mounted

    async def _publish_call(self, driver: _Driver, request: Message, folder: str, *, there: bool = False) -> None:
        """`there`: it is published already. Raises VolumeError."""
        data = {"driver": driver.name, "handle": request["volume_id"], "target": request["target_path"], "staging": request.get("staging_target_path", "")}
        _record(folder, data)
        try:
            await self._call(driver, "NodePublishVolume", "NodePublishVolumeRequest", request)
        except _CallFault as e:
            if e.final and not there:
                with contextlib.suppress(OSError):
                    os.rmdir(data["target"])
                if data["staging"]:
                    _record(folder, {**data, "target": ""})
                else:
                    _forget(folder)
            raise

    async def _service_account_tokens(self, pod: Object, spec: Object) -> dict[str, str]:
        """Tokens of the pod's account, for the audiences that the driver asks for."""
        found: dict[str, Object] = {}
        for wanted in spec.get("tokenRequests") or []:
            audience = wanted.get("audience") or ""
            try:
                found[audience], _ = await self._tokens.status(pod, audience, wanted.get("expirationSeconds") or _TOKEN_SECONDS)
            except (errors.StatusError, *UNREACHABLE) as e:
                raise VolumeError(f"kubernetes.io/csi: mounter.SetUpAt failed to get service accoount token attributes: {e}") from e
        return {"csi.storage.k8s.io/serviceAccount.tokens": orjson.dumps(found, option=orjson.OPT_SORT_KEYS).decode()} if found else {}

    async def _stage(self, driver: _Driver, persistent: Object, capability: Message, publish_context: dict[str, str], record: str) -> str:
        """Stage once per node; the path, "" for a driver that does not stage. `record` is the pod's folder for this volume."""
        if _STAGE not in driver.capabilities:
            return ""
        source = persistent["spec"]["csi"]
        digest = hashlib.sha256(source["volumeHandle"].encode()).hexdigest()
        folder = os.path.join(self._config.root_dir, "plugins", "kubernetes.io", "csi", driver.name, digest)
        path = os.path.join(folder, "globalmount")
        async with self._staging.setdefault(path, asyncio.Lock()):
            if _recorded(record) is None:
                _record(record, {"driver": driver.name, "handle": source["volumeHandle"], "target": "", "staging": path})
            if os.path.exists(os.path.join(folder, "staged")):
                return path
            os.makedirs(path, 0o750, exist_ok=True)
            _record(folder, {"driver": driver.name, "handle": source["volumeHandle"]})
            request = {
                "volume_id": source["volumeHandle"],
                "publish_context": publish_context,
                "staging_target_path": path,
                "volume_capability": capability,
                "secrets": await self._secrets(source.get("nodeStageSecretRef")),
                "volume_context": source.get("volumeAttributes") or {},
            }
            try:
                await self._call(driver, "NodeStageVolume", "NodeStageVolumeRequest", request)
            except _CallFault as e:
                if e.final:
                    _forget(record)
                    _forget(folder, "globalmount")
                raise
            with open(os.path.join(folder, "staged"), "wb"):
                return path

    async def _attached(self, persistent: Object, spec: Object) -> dict[str, str]:
        """Wait until the volume is attached to this node, if its driver wants that; the attachment's metadata."""
        if spec.get("attachRequired") is False:
            return {}
        source = persistent["spec"]["csi"]
        text = source["volumeHandle"] + source["driver"] + self._config.node_name
        name = "csi-" + hashlib.sha256(text.encode()).hexdigest()
        try:
            async with asyncio.timeout(_ATTACH_SECONDS):
                return await self._wait_attached(name)
        except TimeoutError as e:
            raise VolumeError(f"timed out waiting for external-attacher of {source['driver']} CSI driver to attach volume {source['volumeHandle']}", reason="FailedAttachVolume") from e

    async def _wait_attached(self, name: str) -> dict[str, str]:
        """A node may read single attachments, neither list nor watch them; its own Node tells that one has changed."""
        while True:
            news = self._attachments_changed
            try:
                if (metadata := _attachment(await self._client.get(VOLUME_ATTACHMENTS, name))) is not None:
                    return metadata
            except (errors.StatusError, *UNREACHABLE) as e:
                log.info("volume attachment not there", name=name, error=str(e))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ATTACH_LOOK_SECONDS):
                    await news.wait()

    def node_changed(self, old: Object, new: Object) -> None:
        """News of the own Node: whoever waits for an attachment looks again when volumes were attached to it."""
        if (old.get("status") or {}).get("volumesAttached") != (new.get("status") or {}).get("volumesAttached"):
            self._attachments_changed.set()
            self._attachments_changed = asyncio.Event()

    async def _secrets(self, reference: Object | None, namespace: str = "") -> dict[str, str]:
        if not reference:
            return {}
        import base64

        try:
            secret = await self._client.get(SECRETS, reference["name"], reference.get("namespace") or namespace)
        except errors.StatusError as e:
            raise VolumeError(f"failed to get secret {reference['name']}: {e.message}") from e
        return {k: base64.b64decode(v or "").decode(errors="replace") for k, v in (secret.get("data") or {}).items()}

    async def _call(self, driver: _Driver, method: str, kind: str, message: Message) -> None:
        if driver.known_root:
            root = self._config.root_dir
            message = {**message, **{name: wellknown.known(root, message[name]) for name in _PATHS if message.get(name)}}
        try:
            await driver.plugin.call(_NODE + method, kind, message, "Empty")
        except PluginError as e:
            raise _CallFault(str(e), final=e.code not in _UNCERTAIN) from e

    # --- the end ---

    async def unmount(self, pod_uid: str, pod_dir: str) -> None:
        """Unpublish what the pod had and unstage what nobody else has. Raises VolumeError."""
        self.growth.forget(pod_uid)
        for kind in ("volumes", "volumeDevices"):
            folder = os.path.join(pod_dir, kind, _FOLDER)
            for entry in os.listdir(folder) if os.path.isdir(folder) else []:
                await self._unpublish(os.path.join(folder, entry))

    async def _unpublish(self, folder: str) -> None:
        data = _recorded(folder)
        if data is None:
            return
        driver = self._driver(data["driver"])
        if data["target"]:
            request = {"volume_id": data["handle"], "target_path": data["target"]}
            await self._call(driver, "NodeUnpublishVolume", "NodeUnpublishVolumeRequest", request)
            with contextlib.suppress(OSError):
                os.rmdir(data["target"])
            if os.path.dirname(data["target"]) != folder:
                with contextlib.suppress(OSError):
                    os.rmdir(os.path.dirname(data["target"]))
        staging = data.get("staging")
        if not staging:
            _forget(folder)
            return
        _record(folder, {**data, "target": ""})
        async with self._staging.setdefault(staging, asyncio.Lock()):
            if not self._used_elsewhere(staging, folder):
                request = {"volume_id": data["handle"], "staging_target_path": staging}
                await self._call(driver, "NodeUnstageVolume", "NodeUnstageVolumeRequest", request)
                _forget(os.path.dirname(staging), "globalmount")
            _forget(folder)

    def _used_elsewhere(self, staging: str, own: str) -> bool:
        for uid in os.listdir(self._config.pods_dir):
            for kind in ("volumes", "volumeDevices"):
                folder = os.path.join(self._config.pods_dir, uid, kind, _FOLDER)
                for entry in os.listdir(folder) if os.path.isdir(folder) else []:
                    record = os.path.join(folder, entry)
                    if record != own and (_recorded(record) or {}).get("staging") == staging:
                        return True
        return False

    # --- growing ---

    def _grows(self, driver: str) -> bool:
        found = self._drivers.get(driver)
        return found is not None and _EXPAND in found.capabilities

    def _use(self, pod: Object, persistent: Object, request: Message, path: str) -> None:
        """Have the file system grow with the volume while this pod uses it."""
        source = persistent["spec"]["csi"]
        growing = {
            "volume_id": source["volumeHandle"],
            "volume_path": path,
            "staging_target_path": request.get("staging_target_path", ""),
            "volume_capability": request["volume_capability"],
        }

        async def grow(size: int) -> None:
            request = {**growing, "capacity_range": {"required_bytes": size}, "secrets": await self._secrets(source.get("nodeExpandSecretRef"))}
            await self._call(self._driver(source["driver"]), "NodeExpandVolume", "NodeExpandVolumeRequest", request)

        self.growth.use(InUse(pod, persistent["metadata"]["name"], grow, lambda: self._grows(source["driver"])))


def _owned_by_kubelet(spec: Object, request: Message, pod: Object) -> bool:
    """Whether fsGroup is ours to apply, by the driver's policy."""
    if (pod["spec"].get("securityContext") or {}).get("fsGroup") is None:
        return False
    policy = spec.get("fsGroupPolicy") or "ReadWriteOnceWithFSType"
    if policy == "File":
        return True
    if policy == "None":
        return False
    capability = request["volume_capability"]
    return bool(capability.get("mount", {}).get("fs_type")) and capability["access_mode"]["mode"] in (1, 6, 7)


def _access_mode(driver: _Driver, modes: list[str]) -> Message:
    known = {**_MODES, **_SINGLE_NODE_MODES} if _SINGLE_NODE in driver.capabilities else _MODES
    return {"mode": known.get(modes[0] if modes else "ReadWriteOnce", 1)}


def _capability(driver: _Driver, options: list[str], fs_type: str, modes: list[str]) -> Message:
    return {"mount": {"fs_type": fs_type, "mount_flags": list(options)}, "access_mode": _access_mode(driver, modes)}


def _attachment(obj: Object) -> dict[str, str] | None:
    status = obj.get("status") or {}
    if status.get("attached") and not obj["metadata"].get("deletionTimestamp"):
        return dict(status.get("attachmentMetadata") or {})
    if status.get("attachError"):
        raise VolumeError(status["attachError"].get("message") or "attach failed", reason="FailedAttachVolume")
    return None


def _record(folder: str, data: dict[str, Any]) -> None:
    os.makedirs(folder, 0o750, exist_ok=True)
    with open(os.path.join(folder, "vol_data.json"), "wb") as file:
        file.write(orjson.dumps(data))


def _forget(folder: str, inner: str = "mount") -> None:
    """Remove a record, and its folder when nothing else is in it."""
    for name in ("staged", "vol_data.json"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(folder, name))
    for path in (os.path.join(folder, inner), folder):
        with contextlib.suppress(OSError):
            os.rmdir(path)


def _recorded(folder: str) -> dict[str, Any] | None:
    try:
        with open(os.path.join(folder, "vol_data.json"), "rb") as file:
            data = orjson.loads(file.read())
    except (OSError, ValueError):
        return None
    return data if isinstance(data, dict) else None
