"""Informers that a test feeds by hand instead of a server."""

from __future__ import annotations

from typing import Any

from knarr.api.scheme import Resource
from knarr.client.informer import Informers


class FedInformers(Informers):
    """`put` and `drop` are the watch."""

    def __init__(self) -> None:
        super().__init__(None)  # type: ignore[arg-type]

    async def start(self) -> None:
        for informer in self._informers.values():
            informer._synced.set()

    def put(self, resource: Resource, *objects: dict[str, Any]) -> None:
        for informer in self._informers.values():
            if informer.resource == resource:
                for obj in objects:
                    informer._store(obj)

    def drop(self, resource: Resource, namespace: str, name: str) -> None:
        for informer in self._informers.values():
            if informer.resource == resource:
                informer._remove(namespace, name, None)
