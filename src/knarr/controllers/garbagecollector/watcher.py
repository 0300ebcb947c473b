"""Watches resources for the graph without keeping their objects.

Resources that other controllers have a full cache of are followed there; of all others only
metadata is asked for and only the graph remembers what matters. Bound: nothing is stored here.
Source: pkg/controller/garbagecollector/graph_builder.go (monitors).
"""

from __future__ import annotations

import asyncio

import orjson

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.config import CredentialError
from knarr.client.rest import Client
from knarr.controllers.garbagecollector.graph import Graph
from knarr.http.errors import HTTPError

log = get_logger(__name__)

_LIST = "application/json;as=PartialObjectMetadataList;g=meta.k8s.io;v=v1,application/json"
_WATCH = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1,application/json"
_WATCH_SECONDS = 480
_PAGE = 500


class MetadataWatcher:
    """Feeds the graph with one resource."""

    def __init__(self, client: Client, resource: Resource, graph: Graph) -> None:
        self.resource = resource
        self._client = client
        self._graph = graph
        self._synced = asyncio.Event()
        self._version = ""

    @property
    def synced(self) -> bool:
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        await self._synced.wait()

    async def run(self) -> None:
        """List, then watch for ever."""
        backoff = Backoff(0.1, 30.0, jitter=0.2)
        listed = False
        while True:
            try:
                if not listed:
                    await self._list()
                    listed = True
                    self._synced.set()
                started = asyncio.get_running_loop().time()
                await self._watch()
                if asyncio.get_running_loop().time() - started < 1.0:
                    await backoff.sleep()
            except StatusError as error:
                listed = listed and not errors.is_expired(error)
                if error.code in (403, 404, 405):
                    # Not to be listed (any more): the graph goes on without it.
                    self._synced.set()
                log.debug("metadata watch refused", resource=self.resource.plural, error=error)
                await backoff.sleep()
            except (HTTPError, OSError, CredentialError, ValueError) as error:
                log.debug("metadata watch broke", resource=self.resource.plural, error=repr(error))
                await backoff.sleep()

    async def _list(self) -> None:
        seen: set[str] = set()
        token = ""
        while True:
            query: dict[str, str | int] = {"limit": _PAGE, "continue": token}
            response = await self._client.request("GET", self.resource.path(), query, headers={"Accept": _LIST})
            answer: Object = orjson.loads(response.body)
            for item in answer.get("items") or ():
                seen.add(item["metadata"]["uid"])
                self._graph.changed(self.resource, item)
            token = answer["metadata"].get("continue") or ""
            if not token:
                break
        self._version = answer["metadata"].get("resourceVersion", "")
        for node in self._graph.of_kind(self.resource):
            if node.uid not in seen:
                self._graph.removed(node.uid)

    async def _watch(self) -> None:
        events = self._client.watch(
            self.resource, resource_version=self._version, timeout_seconds=_WATCH_SECONDS, accept=_WATCH
        )
        async for kind, obj in events:
            if kind == "DELETED":
                self._graph.removed(obj["metadata"]["uid"])
            elif kind != "BOOKMARK":
                self._graph.changed(self.resource, obj)
            self._version = obj["metadata"].get("resourceVersion") or self._version
