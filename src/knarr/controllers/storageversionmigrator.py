"""Storage version migration: every object of a resource is written once more, so that it is stored in today's version and under
today's encryption key.

Runs behind the gate StorageVersionMigrator. A migration first notes the resource version at which it was seen; what is written
later is right already. Then each object is applied with nothing but its uid and resource version: the API server writes it if
it is stored otherwise than it would be now. A migration goes on page by page, so that others have their turns; one that was cut
off by the end of the process starts from the front, where nothing is left to be written.
Source: pkg/controller/storageversionmigrator.
"""

from __future__ import annotations

import asyncio
from typing import Any

import orjson

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.meta import deep_copy
from knarr.api.resources import STORAGE_VERSION_MIGRATIONS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.discovery import served_resource
from knarr.client.informer import Informers
from knarr.controllers.context import Context

log = get_logger(__name__)

NAME = "storage-version-migrator-controller"
_VERBS = ("update", "patch", "list")
_PAGE = 500
_AT_ONCE = 8
_METADATA_ONLY = {"Accept": "application/json;as=PartialObjectMetadataList;v=v1;g=meta.k8s.io,application/json"}


class Unmigratable(Exception):
    """The migration fails, for the reason in the text."""


class StorageVersionMigrator:
    """Works StorageVersionMigrations off."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        # Its own, since the kind need not be served: the other controllers do not wait for it.
        self._informers = Informers(ctx.client)
        self._migrations = self._informers.get(STORAGE_VERSION_MIGRATIONS)
        self._progress: dict[str, str] = {}
        """Where the next page begins, by the migration's uid."""
        self.controller = Controller(NAME, self._reconcile, workers=5)
        self._migrations.add_handler(self._changed, lambda _, new: self._changed(new), self._deleted)

    async def run(self) -> None:
        try:
            await self._informers.start()
            await self._informers.wait_synced()
            await self.controller.run()
        finally:
            await self._informers.close()

    def _changed(self, migration: Object) -> None:
        self.controller.queue.add(migration["metadata"]["name"])

    def _deleted(self, migration: Object) -> None:
        self._progress.pop(migration["metadata"]["uid"], None)

    async def _reconcile(self, name: str) -> Result | None:
        cached = self._migrations.get(None, name)
        if cached is None or _holds(cached, "Succeeded") or _holds(cached, "Failed"):
            return None
        migration = deep_copy(cached)
        try:
            resource = await self._resource(migration)
            if not (migration.get("status") or {}).get("resourceVersion"):
                await self._begin(migration, resource)
                return None
            return await self._page(migration, resource)
        except Unmigratable as problem:
            log.warning("storage version migration failed", migration=name, error=str(problem))
            await self._conclude(migration, "Failed", str(problem))
            return None

    async def _resource(self, migration: Object) -> Resource:
        wanted = migration["spec"]["resource"]
        group, version, plural = (wanted.get(key) or "" for key in ("group", "version", "resource"))
        resource = await served_resource(self._client, group, version, plural)
        if resource is None:
            raise Unmigratable("resource does not exist in discovery")
        if not set(_VERBS) <= set(resource.verbs):
            shown = f"{group}/{version}, Resource={plural}"
            raise Unmigratable(f'resource "{shown}" does not support discovery operations: [{" ".join(_VERBS)}]')
        return resource

    async def _begin(self, migration: Object, resource: Resource) -> None:
        """Note as of when all objects are to have been written; the change wakes the migration up again."""
        listed = await self._list(resource, limit=1)
        migration.setdefault("status", {})["resourceVersion"] = listed["metadata"]["resourceVersion"]
        await self._write(migration)

    async def _page(self, migration: Object, resource: Resource) -> Result | None:
        uid = migration["metadata"]["uid"]
        if not _holds(migration, "Running"):
            migration = await self._conclude(migration, "Running")
        try:
            listed = await self._list(resource, limit=_PAGE, after=self._progress.get(uid, ""))
        except StatusError as error:
            if error.code != 410 or uid not in self._progress:
                raise
            # The page is too old to go on from: what has been written need not be again, so the front is as good.
            del self._progress[uid]
            return Result(0.0)
        items = listed.get("items") or []
        for start in range(0, len(items), _AT_ONCE):
            await asyncio.gather(*[self._rewrite(resource, item["metadata"]) for item in items[start : start + _AT_ONCE]])
        token = listed["metadata"].get("continue") or ""
        if token:
            self._progress[uid] = token
            return Result(0.0)
        self._progress.pop(uid, None)
        await self._conclude(migration, "Succeeded")
        return None

    async def _rewrite(self, resource: Resource, metadata: Object) -> None:
        """Apply nothing. A conflict says that somebody else has written or deleted the object, so that nothing is left to do."""
        patch = {
            "apiVersion": resource.api_version, "kind": resource.kind,
            "metadata": {"name": metadata["name"], "uid": metadata["uid"], "resourceVersion": metadata["resourceVersion"]},
        }  # fmt: skip
        try:
            await self._client.patch(resource, metadata["name"], metadata.get("namespace"), patch, type="apply", field_manager=NAME)
        except StatusError as error:
            if not errors.is_conflict(error):
                log.warning("object not migrated", resource=resource.group_resource, name=metadata["name"], error=str(error))
                raise Unmigratable("migration encountered unhandled error") from error

    async def _list(self, resource: Resource, *, limit: int, after: str = "") -> Object:
        query: dict[str, Any] = {"limit": str(limit), "continue": after or None}
        answer: Object = orjson.loads((await self._client.request("GET", resource.path(), query, None, _METADATA_ONLY)).body)
        return answer

    async def _conclude(self, migration: Object, kind: str, message: str = "") -> Object:
        """Write a condition down. Returns the migration as it is now."""
        conditions = migration.setdefault("status", {}).setdefault("conditions", [])
        if kind != "Running":
            for condition in conditions:
                if condition["type"] == "Running":
                    condition["status"] = "False"
        reason = "StorageVersionMigrationInProgress" if kind == "Running" else f"StorageVersionMigration{kind}"
        condition = {"type": kind, "status": "True", "lastUpdateTime": clock.now_rfc3339(), "reason": reason}
        conditions.append({**condition, "message": message} if message else condition)
        return await self._write(migration)

    async def _write(self, migration: Object) -> Object:
        return await self._client.update(STORAGE_VERSION_MIGRATIONS, migration, subresource="status")


def _holds(migration: Object, kind: str) -> bool:
    conditions = (migration.get("status") or {}).get("conditions") or ()
    return any(condition["type"] == kind and condition["status"] == "True" for condition in conditions)
