"""Node ports where several API servers share a store: a claim is a key there, so that the store decides between two claimants.

A server that dies between its claim and the Service's write leaves a key that belongs to nobody; `repair` finds those. What the
servers know in memory only helps to guess a free port.

Source: pkg/registry/core/service/portallocator and its controller/repair.go.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.apiserver.registry.allocators import AllocationError, PortAllocator, node_ports_of
from knarr.apiserver.store import ResourceStore
from knarr.storage.errors import StoreError
from knarr.storage.protocol import ANY, RevisionStore

if TYPE_CHECKING:
    from knarr.aiokits.tasks import Tasks

log = get_logger(__name__)

PREFIX = "/registry/core/nodeports/"
REPAIR_SECONDS = 180.0


class SharedPortAllocator(PortAllocator):
    """PortAllocator of one among several servers."""

    def __init__(self, first: int, last: int, services: ResourceStore, tasks: Tasks) -> None:
        super().__init__(first, last, services)
        self._services = services
        self._store: RevisionStore = services.storage.store
        self._tasks = tasks
        self._taken: dict[int, int] = {}
        """Port -> revision of the claims made here whose Service is not written yet, or is."""

    async def claim(self, port: int, *, dry_run: bool = False) -> None:
        if not dry_run and not self.first <= port <= self.last:
            raise self.outside()
        if dry_run:
            if await self._store.get(f"{PREFIX}{port}") is not None:
                raise AllocationError("provided port is already allocated")
            return
        if not await self._take(port):
            raise AllocationError("provided port is already allocated")

    async def claim_next(self, *, dry_run: bool = False) -> int:
        known = {port for service in self._services.list_nowait() for port in node_ports_of(service)}
        for port in self.candidates():
            if port not in known and (dry_run or await self._take(port)):
                return port
        raise AllocationError("range is full")

    async def _take(self, port: int) -> bool:
        try:
            put = await self._store.put(f"{PREFIX}{port}", b"{}", expected=0)
        except StoreError as error:
            raise errors.internal(str(error)) from error
        if put.won:
            self._taken[port] = put.revision
        return put.won

    def undo(self, port: int) -> None:
        revision = self._taken.pop(port, 0)
        if revision:
            self._tasks.spawn(self._remove(port, revision), "release-node-port")

    def release(self, port: int) -> None:
        self._taken.pop(port, None)
        self._tasks.spawn(self._remove(port, ANY), "release-node-port")

    async def _remove(self, port: int, expected: int) -> None:
        try:
            await self._store.remove(f"{PREFIX}{port}", expected=expected)
        except StoreError as error:
            log.warning("node port is not given back yet", port=port, error=str(error))


async def repair(services: ResourceStore, suspects: dict[int, int]) -> dict[int, int]:
    """Make the claims those of the Services; a claim without one is removed when it was a suspect (port -> revision) before.

    Returns the suspects of this round. Raises StoreError.
    """
    store = services.storage.store
    claims = {int(item.key.removeprefix(PREFIX)): item.revision for item in (await store.scan(PREFIX)).items}
    # After the claims: whoever claimed before has written its Service, or is about to.
    await store.catch_up()
    used = {port for service in services.list_nowait() for port in node_ports_of(service)}
    for port in used - claims.keys():
        await store.put(f"{PREFIX}{port}", b"{}", expected=0)
    found: dict[int, int] = {}
    for port in claims.keys() - used:
        if suspects.get(port) == claims[port]:
            await store.remove(f"{PREFIX}{port}", expected=claims[port])
        else:
            found[port] = claims[port]
    return found


async def repair_for_ever(services: ResourceStore) -> None:
    """Repair at once and then from time to time."""
    suspects: dict[int, int] = {}
    while True:
        try:
            suspects = await repair(services, suspects)
        except StoreError as error:
            log.warning("node ports were not compared with the Services", error=str(error))
        await asyncio.sleep(REPAIR_SECONDS)
