"""Pods from manifest files on this node, and their mirrors in the API server.

Caller: kubelet. A folder is watched with inotify; a changed manifest is a new pod (its uid is the digest of the file), the old
one ends first. Mirror pods show static pods to clients; deleting one only makes it anew.
Source: pkg/kubelet/config/{file,common}.go, pkg/kubelet/pod/mirror_client.go.
"""

from __future__ import annotations

import asyncio
import hashlib
import os

import yaml

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.meta import deep_copy
from knarr.api.resources import NODES, PODS
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.faults import UNREACHABLE
from knarr.kubelet.inotify import IN_CLOSE_WRITE, IN_DELETE, IN_MOVED_FROM, IN_MOVED_TO, Inotify
from knarr.kubelet.node import Node
from knarr.kubelet.pods import PodWorkers

log = get_logger(__name__)

_RETRY_SECONDS = 5.0


class StaticPods:
    """The node's own pods."""

    def __init__(self, node: Node, workers: PodWorkers) -> None:
        self._node = node
        self._workers = workers
        self._pods: dict[str, Object] = {}
        """By file name."""
        self._mirrors: dict[str, Object] = {}
        """The API's mirror pods by namespace/name."""
        self._check = asyncio.Event()
        self._inotify: Inotify | None = None

    async def start(self) -> None:
        """Read the folder once; needs the pods of the API server, so that mirrors are known."""
        folder = self._node.config.static_pod_path
        if not folder:
            return
        os.makedirs(folder, 0o755, exist_ok=True)
        self._inotify = Inotify()
        self._inotify.add(folder, IN_CLOSE_WRITE | IN_MOVED_TO | IN_MOVED_FROM | IN_DELETE)
        self._scan()

    async def run(self) -> None:
        """Follow the folder and keep the mirrors. Eternal."""
        if self._inotify is None:
            await asyncio.Event().wait()
            return
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow(), name="static-pods")
            group.create_task(self._keep_mirrors(), name="mirror-pods")

    async def _follow(self) -> None:
        assert self._inotify is not None
        while True:
            await self._inotify.wait()
            self._scan()

    def _scan(self) -> None:
        folder = self._node.config.static_pod_path
        found: dict[str, Object] = {}
        for name in sorted(os.listdir(folder)):
            if name.startswith(".") or not os.path.isfile(os.path.join(folder, name)):
                continue
            try:
                pod = self._read(os.path.join(folder, name))
            except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as e:
                log.error("static pod manifest not read", file=name, error=str(e))
                continue
            found[name] = pod
        for name, old in list(self._pods.items()):
            new = found.get(name)
            if new is None or podutil.uid(new) != podutil.uid(old):
                self._workers.delete(old)
                del self._pods[name]
        for name, pod in found.items():
            if name not in self._pods:
                self._pods[name] = pod
                self._workers.add(pod)
        self._check.set()

    def _read(self, path: str) -> Object:
        with open(path, "rb") as file:
            raw = file.read()
        pod: Object = yaml.load(raw, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        if not isinstance(pod, dict) or pod.get("kind") != "Pod":
            raise ValueError("no Pod")
        config = self._node.config
        digest = hashlib.md5(raw + config.node_name.encode() + path.encode(), usedforsecurity=False).hexdigest()
        meta = pod.setdefault("metadata", {})
        meta["uid"] = meta.get("uid") or digest
        meta["name"] = f"{meta['name']}-{config.node_name.lower()}"
        meta.setdefault("namespace", "default")
        meta.setdefault("annotations", {}).update(
            {podutil.CONFIG_SOURCE_ANNOTATION: "file", podutil.CONFIG_HASH_ANNOTATION: digest, "kubernetes.io/config.seen": ""}
        )
        spec = pod["spec"]
        spec["nodeName"] = config.node_name
        tolerations = spec.setdefault("tolerations", [])
        if not any(t.get("operator") == "Exists" and t.get("effect") == "NoExecute" and not t.get("key") for t in tolerations):
            tolerations.append({"operator": "Exists", "effect": "NoExecute"})
        from knarr.api.defaulting import default

        default(PODS, pod)
        pod["status"] = {"phase": "Pending"}
        return pod

    # --- mirrors ---

    def mirror_changed(self, pod: Object) -> None:
        """The API server shows this mirror pod."""
        self._mirrors[podutil.key(pod)] = pod
        self._check.set()
        for static in self._pods.values():
            if podutil.key(static) == podutil.key(pod):
                self._node.status.resend(podutil.uid(static))

    def mirror_deleted(self, pod: Object) -> None:
        """The mirror is gone; if its static pod is not, it is made anew."""
        self._mirrors.pop(podutil.key(pod), None)
        self._check.set()

    async def _keep_mirrors(self) -> None:
        while True:
            await self._check.wait()
            self._check.clear()
            try:
                await self._reconcile()
            except (errors.StatusError, *UNREACHABLE) as e:
                log.warning("mirror pods not brought up to date", error=str(e))
                await asyncio.sleep(_RETRY_SECONDS)
                self._check.set()

    async def _reconcile(self) -> None:
        statics = {podutil.key(p): p for p in self._pods.values()}
        for key, mirror in list(self._mirrors.items()):
            static = statics.get(key)
            same = static is not None and (mirror["metadata"].get("annotations") or {}).get(
                podutil.CONFIG_MIRROR_ANNOTATION
            ) == static["metadata"]["annotations"][podutil.CONFIG_HASH_ANNOTATION]
            if same and not podutil.is_deleted(mirror):
                continue
            meta = mirror["metadata"]
            try:
                await self._node.client.delete(PODS, meta["name"], meta["namespace"], grace_period_seconds=0, uid=meta["uid"])
            except errors.StatusError as e:
                if not errors.is_not_found(e):
                    raise
            self._mirrors.pop(key, None)
        for key, static in statics.items():
            if key not in self._mirrors:
                await self._create(static)

    async def _create(self, static: Object) -> None:
        mirror = deep_copy(static)
        mirror.pop("status", None)
        meta = mirror["metadata"]
        meta.pop("uid", None)
        meta["annotations"][podutil.CONFIG_MIRROR_ANNOTATION] = meta["annotations"][podutil.CONFIG_HASH_ANNOTATION]
        name = self._node.config.node_name
        node = await self._node.client.get(NODES, name)
        meta["ownerReferences"] = [
            {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"], "controller": True}
        ]
        try:
            await self._node.client.create(PODS, mirror, meta["namespace"])
        except errors.StatusError as e:
            if not errors.is_already_exists(e):
                raise
