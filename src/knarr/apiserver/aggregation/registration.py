"""APIServices for the groups that this server serves itself: those of the built-in kinds at start, those of CRDs as they come.

Source: kube-aggregator pkg/controllers/autoregister, pkg/controlplane/controller/crdregistration.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.scheme import OPTIONAL, SCHEME
from knarr.api.types import Object

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

log = get_logger(__name__)
GROUP = "apiregistration.k8s.io"
LABEL = "kube-aggregator.kubernetes.io/automanaged"
CUSTOM_PRIORITY = (1000, 100)


def local_status() -> Object:
    condition = {
        "type": "Available", "status": "True", "lastTransitionTime": clock.now_rfc3339(), "reason": "Local",
        "message": "Local APIServices are always available",
    }
    return {"conditions": [condition]}


def local_service(group: str, version: str, priority: tuple[int, int], managed: str) -> Object:
    """Return the APIService of a group version that this server serves itself."""
    spec: Object = {"version": version, "groupPriorityMinimum": priority[0], "versionPriority": priority[1]}
    if group:
        spec = {"group": group, **spec}
    return {"metadata": {"name": f"{version}.{group}", "labels": {LABEL: managed}}, "spec": spec, "status": local_status()}


class Registration:
    """See the module's docstring."""

    def __init__(self, server: APIServer) -> None:
        self._server = server
        self._custom: set[tuple[str, str]] = set()

    async def start(self) -> None:
        """Register the built-in groups."""
        await asyncio.gather(*[
            self._create(local_service(group.name, version, group.priority.get(version, (17900, 15)), "onstart"))
            for group in SCHEME.groups() for version in group.versions if group.name != GROUP
        ], *[
            self._create(local_service(group.name, version, group.priority.get(version, (17900, 15)), "onstart"))
            for group in OPTIONAL.groups() for version in group.versions if f"{group.name}/{version}" in self._server.config.runtime_config
        ])  # fmt: skip

    async def _create(self, obj: Object) -> None:
        store = self._server.registry.stores[GROUP, "apiservices"]
        if store.find("", obj["metadata"]["name"]) is not None:
            return
        try:
            await store.create(obj)
        except errors.StatusError as error:
            if not errors.is_already_exists(error):
                raise

    async def sync_custom(self) -> None:
        """Register the group versions of CRDs, and take off those that are gone."""
        wanted = {(group, version) for (group, version, _), e in self._server.registry.endpoints.items() if e.resource.custom}
        store = self._server.registry.stores[GROUP, "apiservices"]
        for group, version in wanted - self._custom:
            await self._create(local_service(group, version, CUSTOM_PRIORITY, "true"))
        for group, version in self._custom - wanted:
            name = f"{version}.{group}"
            present = store.get_nowait("", name)
            if present is not None and (present["metadata"].get("labels") or {}).get(LABEL) == "true":
                await store.delete("", name)
        self._custom = wanted
