"""The garbage collector: deletes what lost its owners, in the way the owner was deleted.

Background: dependents follow after the owner is gone. Foreground: the owner waits, by finalizer,
until its blocking dependents are gone. Orphan: dependents lose their reference first. Owners are
looked up on the server before anything is deleted; the graph only says where to look.
Source: pkg/controller/garbagecollector/garbagecollector.go, operations.go, patch.go.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from typing import Any

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import API_SERVICES, CUSTOM_RESOURCE_DEFINITIONS, EVENTS, EVENTS_V1
from knarr.api.scheme import SCHEME, Resource
from knarr.api.types import Object
from knarr.client.controller import Controller
from knarr.client.discovery import server_resources
from knarr.controllers.context import Context, trim_to_metadata
from knarr.controllers.garbagecollector.graph import FOREGROUND, ORPHAN, Graph, Node
from knarr.controllers.garbagecollector.watcher import MetadataWatcher
from knarr.http.errors import HTTPError

log = get_logger(__name__)

_METADATA = {"Accept": "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"}
_ABSENT_ENTRIES = 500
_RESYNC_DELAY_SECONDS = 0.2
_FINALIZER_TRIES = 5
# Events own nothing and are many.
_IGNORED = {EVENTS, EVENTS_V1}


class UnknownKind(Exception):
    """No served resource has this kind (yet)."""


class GarbageCollector:
    """Watches every deletable resource and collects."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._client = ctx.client
        self._recorder = ctx.recorder("garbage-collector-controller")
        self.controller = Controller("garbage-collector-controller", self._reconcile, workers=20)
        self._orphaner = Controller("garbage-collector-orphaner", self._orphan, workers=5)
        self.graph = Graph(self.controller.queue.add, self._orphaner.queue.add, self._invalid_reference)
        self._watchers: dict[Resource, tuple[MetadataWatcher, asyncio.Task[None]]] = {}
        self._followed: set[Resource] = set()
        self._kinds: dict[tuple[str, str], Resource] = {}
        self._absent: OrderedDict[tuple[str, ...], None] = OrderedDict()
        self._tasks = Tasks()
        self._resync = asyncio.Event()
        crds = ctx.informers.get(CUSTOM_RESOURCE_DEFINITIONS, transform=_trim_crd)
        services = ctx.informers.get(API_SERVICES, transform=trim_to_metadata)
        for informer in (crds, services):
            informer.add_handler(self._kinds_changed, lambda old, new: self._kinds_changed(new), self._kinds_changed)

    def _kinds_changed(self, _: Object) -> None:
        self._resync.set()

    async def run(self) -> None:
        self._tasks = Tasks()
        try:
            await self._sync_watchers()
            for watcher, _ in list(self._watchers.values()):
                await watcher.wait_synced()
            self.controller.start()
            self._orphaner.start()
            self._resync.clear()
            while True:
                await self._resync.wait()
                # Several changes come together, and discovery follows a moment after them.
                await asyncio.sleep(_RESYNC_DELAY_SECONDS)
                self._resync.clear()
                try:
                    await self._sync_watchers()
                except (StatusError, HTTPError, OSError) as error:
                    log.warning("discovery failed, will retry", error=error)
                    asyncio.get_running_loop().call_later(5.0, self._resync.set)
        finally:
            await self.controller.stop()
            await self._orphaner.stop()
            await self._tasks.close()
            self._watchers.clear()

    # Which resources

    async def _sync_watchers(self) -> None:
        resources, failed = await server_resources(self._client)
        wanted = {res for res in resources if {"delete", "list", "watch"} <= set(res.verbs) and res not in _IGNORED}
        self._kinds = {(res.group, res.kind): res for res in resources}
        for res in wanted:
            if res in self._watchers or res in self._followed:
                continue
            shared = self._ctx.shared_informer(res)
            if shared is not None:
                self._followed.add(res)
                shared.add_handler(self._changed(res), lambda old, new, changed=self._changed(res): changed(new), self._removed)  # type: ignore[misc]
            else:
                watcher = MetadataWatcher(self._client, res, self.graph)
                self._watchers[res] = (watcher, self._tasks.spawn_eternal(watcher.run(), f"gc-watch-{res.plural}"))
        for res in [res for res in self._watchers if res not in wanted and res.api_version not in failed]:
            _, task = self._watchers.pop(res)
            task.cancel()
            for node in self.graph.of_kind(res):
                self.graph.removed(node.uid)

    def _changed(self, res: Resource) -> Any:
        changed = self.graph.changed
        return lambda obj: changed(res, obj)

    def _removed(self, obj: Object) -> None:
        self.graph.removed(obj["metadata"]["uid"])

    async def _resource(self, api_version: str, kind: str) -> Resource:
        found = SCHEME.for_kind(api_version, kind)
        group = api_version.rpartition("/")[0]
        found = found or self._kinds.get((group, kind))
        if found is None:
            resources, _ = await server_resources(self._client)
            self._kinds = {(res.group, res.kind): res for res in resources}
            found = self._kinds.get((group, kind))
        if found is None:
            raise UnknownKind(f'no matches for kind "{kind}" in version "{api_version}"')
        return found

    # Requests

    async def _get(self, res: Resource, namespace: str, name: str) -> Object | None:
        """Read metadata; None when the object is not there."""
        try:
            path = res.path(namespace if res.namespaced else None, name)
            response = await self._client.request("GET", path, headers=_METADATA)
        except StatusError as error:
            if errors.is_not_found(error):
                return None
            raise
        answer: Object = orjson.loads(response.body)
        return answer

    async def _patch_owners(self, node: Node, res: Resource, latest: Object, patch: list[Object], merged: list[Object]) -> None:
        """Change owner references, by strategic merge where the server knows how, else as a whole."""
        namespace = node.namespace if res.namespaced else None
        try:
            body: Object = {"metadata": {"ownerReferences": patch, "uid": node.uid}}
            if res.custom:
                version = latest["metadata"]["resourceVersion"]
                body = {"metadata": {"ownerReferences": merged, "uid": node.uid, "resourceVersion": version}}
            await self._client.patch(res, node.name, namespace, body, type="merge" if res.custom else "strategic")
        except StatusError as error:
            if error.code != 415:
                raise
            version = latest["metadata"]["resourceVersion"]
            body = {"metadata": {"ownerReferences": merged, "uid": node.uid, "resourceVersion": version}}
            await self._client.patch(res, node.name, namespace, body, type="merge")

    async def _drop_owners(self, node: Node, res: Resource, latest: Object, uids: set[str]) -> None:
        patch = [{"$patch": "delete", "uid": uid} for uid in sorted(uids)]
        merged = [ref for ref in latest["metadata"].get("ownerReferences") or () if ref["uid"] not in uids]
        await self._patch_owners(node, res, latest, patch, merged)

    async def _delete(self, node: Node, res: Resource, latest: Object, policy: str) -> None:
        namespace = node.namespace if res.namespaced else None
        version = latest["metadata"].get("resourceVersion")
        try:
            await self._client.delete(res, node.name, namespace, propagation_policy=policy, uid=node.uid, resource_version=version)
        except StatusError as error:
            if errors.is_not_found(error):
                self.graph.removed(node.uid)
                return
            if not errors.is_conflict(error):
                raise
            live = await self._get(res, node.namespace, node.name)
            if live is None:
                return
            if live["metadata"]["uid"] != node.uid:
                self.graph.removed(node.uid)
                return
            if live["metadata"].get("ownerReferences") != latest["metadata"].get("ownerReferences"):
                raise
            # Something else of it changed; its owners did not.
            await self._client.delete(res, node.name, namespace, propagation_policy=policy, uid=node.uid)

    async def _remove_finalizer(self, node: Node, res: Resource, finalizer: str) -> None:
        for attempt in range(_FINALIZER_TRIES):
            latest = await self._get(res, node.namespace, node.name)
            if latest is None or latest["metadata"]["uid"] != node.uid:
                return
            meta = latest["metadata"]
            if finalizer not in (meta.get("finalizers") or ()):
                return
            kept = [item for item in meta["finalizers"] if item != finalizer]
            patch = {"metadata": {"resourceVersion": meta["resourceVersion"], "finalizers": kept}}
            try:
                await self._client.patch(res, node.name, node.namespace if res.namespaced else None, patch)
                return
            except StatusError as error:
                if errors.is_not_found(error):
                    return
                if not errors.is_conflict(error) or attempt == _FINALIZER_TRIES - 1:
                    raise

    # Work

    async def _reconcile(self, uid: str) -> None:
        node = self.graph.nodes.get(uid)
        if node is None or (node.being_deleted and not node.deleting_dependents) or self._is_safe(node):
            return
        try:
            res = await self._resource(node.api_version, node.kind)
        except UnknownKind:
            if node.observed or node.dependents:
                raise
            return
        latest = await self._get(res, node.namespace, node.name)
        if latest is None or latest["metadata"]["uid"] != uid:
            self._remember_absent(node.api_version, node.kind, node.name, uid, node.namespace)
            self.graph.removed(uid)
            return
        if not node.observed:
            self.graph.confirm(uid, res, latest["metadata"].get("namespace", ""), latest["metadata"]["name"])
        if node.deleting_dependents:
            await self._continue_foreground(node, res)
            return
        owners = latest["metadata"].get("ownerReferences") or []
        if owners:
            await self._collect(node, res, latest, owners)

    def _is_safe(self, node: Node) -> bool:
        """Whether the caches alone show that all owners are there; the common case, and the cheap one."""
        if node.deleting_dependents or not node.observed or not node.owners:
            return False
        for ref in node.owners:
            owner = self.graph.nodes.get(ref["uid"])
            res = SCHEME.for_kind(ref["apiVersion"], ref["kind"])
            shared = self._ctx.shared_informer(res) if res is not None else None
            if res is None or shared is None or owner is None or owner.being_deleted:
                return False
            cached = shared.get(node.namespace if res.namespaced else "", ref["name"])
            if cached is None or cached["metadata"]["uid"] != ref["uid"] or "deletionTimestamp" in cached["metadata"]:
                return False
            self.graph.confirm(ref["uid"], res, cached["metadata"].get("namespace", ""), ref["name"])
        return True

    async def _continue_foreground(self, node: Node, res: Resource) -> None:
        blocking = node.blocking_dependents()
        if not blocking:
            await self._remove_finalizer(node, res, FOREGROUND)
            return
        for dependent in blocking:
            if not dependent.deleting_dependents:
                self.controller.queue.add(dependent.uid)

    async def _collect(self, node: Node, res: Resource, latest: Object, owners: list[Object]) -> None:
        solid, dangling, waiting = await self._classify(node, owners)
        if solid:
            gone = {ref["uid"] for ref in dangling + waiting}
            if gone:
                await self._drop_owners(node, res, latest, gone)
            return
        if waiting and node.dependents:
            if any(dependent.deleting_dependents for dependent in node.dependents):
                # Both wait for each other: unblock, or neither would ever go.
                patch = [{"uid": ref["uid"], "blockOwnerDeletion": False} for ref in owners if ref.get("blockOwnerDeletion")]
                merged = [{**ref, "blockOwnerDeletion": False} for ref in owners]
                if patch:
                    await self._patch_owners(node, res, latest, patch, merged)
                    latest = await self._get(res, node.namespace, node.name) or latest
            await self._delete(node, res, latest, "Foreground")
            return
        finalizers = latest["metadata"].get("finalizers") or ()
        policy = "Orphan" if ORPHAN in finalizers else "Foreground" if FOREGROUND in finalizers else "Background"
        await self._delete(node, res, latest, policy)

    async def _classify(self, node: Node, owners: list[Object]) -> tuple[list[Object], list[Object], list[Object]]:
        solid: list[Object] = []
        dangling: list[Object] = []
        waiting: list[Object] = []
        for ref in owners:
            found = await self._find_owner(node, ref)
            if found is None:
                dangling.append(ref)
            elif "deletionTimestamp" in found and FOREGROUND in (found.get("finalizers") or ()):
                waiting.append(ref)
            else:
                solid.append(ref)
        return solid, dangling, waiting

    async def _find_owner(self, node: Node, ref: Object) -> Object | None:
        """Give the metadata of an owner as it is now; None when it does not exist (in the dependent's namespace)."""
        coordinates = (ref["apiVersion"], ref["kind"], ref["name"], ref["uid"])
        if (*coordinates, node.namespace) in self._absent or (*coordinates, "") in self._absent:
            return None
        res = await self._resource(ref["apiVersion"], ref["kind"])
        if res.namespaced and not node.namespace:
            self._invalid_reference(node, ref)
            # Nobody can say what such a reference means; the object stays.
            return {"uid": ref["uid"]}
        namespace = node.namespace if res.namespaced else ""
        shared = self._ctx.shared_informer(res)
        cached = shared.get(namespace, ref["name"]) if shared is not None else None
        if cached is not None and cached["metadata"]["uid"] == ref["uid"] and "deletionTimestamp" not in cached["metadata"]:
            owner = self.graph.nodes.get(ref["uid"])
            if owner is None or not owner.being_deleted:
                self.graph.confirm(ref["uid"], res, namespace, ref["name"])
                return dict(cached["metadata"])
        live = await self._get(res, namespace, ref["name"])
        if live is None or live["metadata"]["uid"] != ref["uid"]:
            self._remember_absent(*coordinates, namespace)
            return None
        self.graph.confirm(ref["uid"], res, namespace, ref["name"])
        return dict(live["metadata"])

    def _remember_absent(self, *key: str) -> None:
        self._absent[key] = None
        if len(self._absent) > _ABSENT_ENTRIES:
            self._absent.popitem(last=False)

    async def _orphan(self, uid: str) -> None:
        node = self.graph.nodes.get(uid)
        if node is None:
            return

        async def release(dependent: Node) -> None:
            res = await self._resource(dependent.api_version, dependent.kind)
            latest = await self._get(res, dependent.namespace, dependent.name)
            if latest is None or all(ref["uid"] != uid for ref in latest["metadata"].get("ownerReferences") or ()):
                return
            try:
                await self._drop_owners(dependent, res, latest, {uid})
            except StatusError as error:
                if not errors.is_not_found(error):
                    raise

        for result in await asyncio.gather(*[release(dependent) for dependent in list(node.dependents)], return_exceptions=True):
            if isinstance(result, BaseException):
                raise result
        await self._remove_finalizer(node, await self._resource(node.api_version, node.kind), ORPHAN)

    def _invalid_reference(self, node: Node, ref: Object) -> None:
        text = f"[{ref['apiVersion']}/{ref['kind']}, namespace: {node.namespace}, name: {ref['name']}, uid: {ref['uid']}]"
        message = f'ownerRef {text} does not exist in namespace "{node.namespace}"'
        self._recorder.event(node.reference(), "Warning", "OwnerRefInvalidNamespace", message)


def _trim_crd(crd: Object) -> Object:
    # Schemas are large; only whether and what it serves matters here.
    spec = crd.get("spec") or {}
    return {
        "apiVersion": crd.get("apiVersion", ""),
        "kind": crd.get("kind", ""),
        "metadata": {key: value for key, value in crd["metadata"].items() if key not in ("managedFields", "annotations")},
        "spec": {"group": spec.get("group"), "names": spec.get("names"), "scope": spec.get("scope")},
        "status": {"conditions": (crd.get("status") or {}).get("conditions")},
    }
