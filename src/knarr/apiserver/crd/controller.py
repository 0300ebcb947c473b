"""Keeps what is served in step with the CustomResourceDefinitions: one task, one CRD at a time, the latest state of each.

Owner: APIServer. Input: events of the CRD store, in the turn they are published. A CRD that appears is named, established
and served within one commit or two; one that goes is emptied first.

Source: apiextensions-apiserver pkg/controller/*, pkg/apiserver/customresource_handler.go.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.apply import manager_for
from knarr.api.meta import deep_copy
from knarr.api.openapi.documents import CustomAPI
from knarr.api.resources import CUSTOM_RESOURCE_DEFINITIONS
from knarr.api.types import Object
from knarr.apiserver.admission.webhook_client import WebhookClient
from knarr.apiserver.crd import naming, serving
from knarr.apiserver.crd.webhook import WebhookConverter
from knarr.apiserver.store import ResourceStore
from knarr.apiserver.watching import close_watchers

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

log = get_logger(__name__)
GROUP = "apiextensions.k8s.io"


class _Served:
    """What is installed for one CRD."""

    def __init__(self) -> None:
        self.group = ""
        self.plural = ""
        self.versions: dict[str, Object] = {}
        self.prefix = ""
        self.signature: object = None


class CustomResources:
    """See the module's docstring."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        self._store: ResourceStore = server.store(GROUP, "customresourcedefinitions")
        self._webhooks = WebhookClient(server.store("", "services"), server.store("discovery.k8s.io", "endpointslices"))
        self._dirty: dict[str, None] = {}
        self._wakeup = asyncio.Event()
        self._served: dict[str, _Served] = {}

    async def start(self) -> None:
        """Serve what the store holds, then follow changes."""
        self._store.add_handler(self._on_event)
        for crd in self._store.list_nowait():
            await self._reconcile(crd["metadata"]["name"])
        await self._server.registration.sync_custom()
        self._server.tasks.spawn_eternal(self._run(), "custom-resources")

    def _on_event(self, type: str, obj: Object, old: Object | None) -> None:
        self._dirty[obj["metadata"]["name"]] = None
        self._wakeup.set()

    async def _run(self) -> None:
        while True:
            await self._wakeup.wait()
            self._wakeup.clear()
            while self._dirty:
                name = next(iter(self._dirty))
                del self._dirty[name]
                try:
                    await self._reconcile(name)
                    if not self._dirty:
                        await self._server.registration.sync_custom()
                except Exception as error:
                    log.error("custom resource definition failed", crd=name, exc_info=error)

    async def _reconcile(self, name: str) -> None:
        crd = self._store.get_nowait("", name)
        if crd is None:
            self._uninstall(name)
            # Names that the gone one held may now be free for others.
            for other in self._store.list_nowait():
                if not naming.is_true(other, "NamesAccepted"):
                    self._dirty[other["metadata"]["name"]] = None
            if self._dirty:
                self._wakeup.set()
            return
        if crd["metadata"].get("deletionTimestamp"):
            await self._clean(name, crd)
            return
        crd = await self._update_status(name)
        if crd is not None and naming.is_true(crd, "Established"):
            await self._install(name, crd)

    async def _update_status(self, name: str) -> Object | None:
        """Write names and conditions; the CRD as stored then, None if it is gone."""
        now = clock.now_rfc3339()

        def change(crd: Object) -> Object | None:
            before = deep_copy(crd)
            others = [other for other in self._store.list_nowait() if other["metadata"]["name"] != name]
            naming.accept_names(crd, others, now)
            naming.establish(crd, now)
            naming.approve(crd, now)
            manager_for(CUSTOM_RESOURCE_DEFINITIONS, "status").update(before, crd, "kube-apiserver", now=now)
            return crd

        try:
            return await self._store.update("", name, change)
        except errors.StatusError as error:
            if errors.is_not_found(error):
                return None
            raise

    async def _install(self, name: str, crd: Object) -> None:
        server = self._server
        spec, names = crd["spec"], crd["status"]["acceptedNames"]
        served = self._served.get(name)
        signature = (orjson_text(spec), orjson_text(names))
        if served is not None and served.signature == signature:
            return
        if served is None:
            served = self._served[name] = _Served()
        plural = names["plural"]
        served.group, served.plural = spec["group"], plural
        served.prefix = f"/registry/{spec['group']}/{plural}/"
        storage = next((v for v in spec["versions"] if v.get("storage")), None)
        if storage is None:
            return
        selectable = serving.SelectableFields(_all_fields(spec["versions"]))
        cache = await server.storage.add_loaded(served.prefix, selectable.names, selectable if selectable.names else None)
        cache.versioned = True
        if cache.field_names != selectable.names:
            cache.reindex(selectable.names, selectable if selectable.names else None)
        store = ResourceStore(server.storage, cache, serving.resource_of(crd, storage))
        versions = {v["name"]: v for v in spec["versions"] if v.get("served")}
        for gone in served.versions.keys() - versions.keys():
            server.registry.remove(spec["group"], gone, plural)
        converter = None
        if (spec.get("conversion") or {}).get("strategy") == "Webhook":
            converter = WebhookConverter(crd, self._webhooks)
        for version in versions.values():
            server.registry.add(serving.endpoint_of(crd, version, store, converter))
            server.registry.stores[spec["group"], plural] = store
        if served.signature is not None:
            # What was made for the old schemas will not be asked for again.
            for cached in cache.objects.values():
                cached.forms = None
            # What watchers see may have changed shape: they resume from where they were.
            close_watchers(cache)
        served.versions = versions
        served.signature = signature
        self._publish()

    def _uninstall(self, name: str) -> None:
        served = self._served.pop(name, None)
        if served is None:
            return
        server = self._server
        cache = server.storage.caches.get(served.prefix)
        for version in served.versions:
            server.registry.remove(served.group, version, served.plural)
        if cache is not None:
            close_watchers(cache)
            server.storage.drop(served.prefix)
        self._publish()

    def _publish(self) -> None:
        """Tell OpenAPI and admission what is served now; discovery sees the registry's new generation."""
        apis = [
            CustomAPI(endpoint.resource, endpoint.schema.open_api_schema)
            for endpoint in self._server.registry.endpoints.values() if endpoint.resource.custom and endpoint.schema is not None
        ]  # fmt: skip
        self._server.openapi.set_custom(apis)

    async def _clean(self, name: str, crd: Object) -> None:
        """Delete the instances of a CRD that is being deleted, then let it go."""
        if naming.FINALIZER not in (crd["metadata"].get("finalizers") or []):
            return
        served = self._served.get(name)
        left = 0
        if served is not None:
            left = await self._delete_instances(served)
        now = clock.now_rfc3339()
        if left:
            await self._say(name, "True", "InstanceDeletionInProgress", "CustomResource deletion is in progress", now)
            # Finalizers of instances hold it up: look again when one of them changes.
            self._server.tasks.spawn(self._again(name), "crd-cleanup")
            return
        cached = self._store.find("", name)
        if cached is None:
            return
        obj = self._store.cache.private(cached)
        finalizers = [f for f in obj["metadata"].get("finalizers") or [] if f != naming.FINALIZER]
        if finalizers:
            obj["metadata"]["finalizers"] = finalizers
            naming.set_condition(obj, "Terminating", "False", "InstanceDeletionCompleted", "removed all instances", now)
            await self._store.put(name, obj, cached.revision)
        elif await self._store.remove(cached) is None:
            self._dirty[name] = None
            self._wakeup.set()

    async def _again(self, name: str) -> None:
        served = self._served.get(name)
        cache = self._server.storage.caches.get(served.prefix) if served is not None else None
        if cache is not None:
            before = cache.generation
            for _ in range(20):
                await asyncio.sleep(0.1)
                if cache.generation != before:
                    break
        self._dirty[name] = None
        self._wakeup.set()

    async def _say(self, name: str, status: str, reason: str, message: str, now: str) -> None:
        def change(crd: Object) -> Object | None:
            naming.set_condition(crd, "Terminating", status, reason, message, now)
            return crd

        await self._store.update("", name, change)

    async def _delete_instances(self, served: _Served) -> int:
        """Delete or mark every instance; how many are still there."""
        store = self._server.registry.stores.get((served.group, served.plural))
        if store is None:
            return 0
        for cached in store.cache.in_order():
            obj = store.cache.private(cached)
            metadata = obj["metadata"]
            if not metadata.get("finalizers"):
                await store.remove(cached)
            elif not metadata.get("deletionTimestamp"):
                metadata["deletionTimestamp"] = clock.now_rfc3339()
                metadata["deletionGracePeriodSeconds"] = 0
                metadata["generation"] = (metadata.get("generation") or 0) + 1
                await store.put(cached.key, obj, cached.revision)
        return len(store.cache.objects)


def _all_fields(versions: list[Object]) -> list[Object]:
    """Selectable fields of all versions, each once: one cache serves them all."""
    seen: dict[str, Object] = {}
    for version in versions:
        for field in version.get("selectableFields") or []:
            seen.setdefault(field["jsonPath"], field)
    return list(seen.values())


def orjson_text(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)
