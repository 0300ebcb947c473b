"""Leader election over a Lease: of several equal processes one works, the others stand by.

Callers run their component inside `LeaderElector.run(work)`. Invariant: `work` is cancelled
before another process can believe to be leader, because the renew deadline is shorter than
the lease. Clocks of different machines are never compared: a holder is dead when its record has
not changed for a lease duration by our own clock.
Source: client-go tools/leaderelection.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import LEASES
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.rest import Client
from knarr.http.errors import HTTPError

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class LeaderElectionConfig:
    """Which lease, and how patient. Upstream's defaults."""

    name: str
    """Name of the Lease, e.g. "kube-controller-manager"."""
    identity: str
    """Unique among the candidates."""
    namespace: str = "kube-system"
    lease_seconds: float = 15.0
    """Standby processes take over when the record did not change for this long."""
    renew_seconds: float = 10.0
    """The leader stops working when it could not renew for this long."""
    retry_seconds: float = 2.0
    """Pause between tries."""


class LeaderElector:
    """One candidate."""

    def __init__(self, client: Client, config: LeaderElectionConfig, recorder: EventRecorder | None = None) -> None:
        self._client = client
        self._config = config
        self._recorder = recorder
        self._seen: Object | None = None
        self._seen_at = 0.0
        self.is_leader = False
        self.leader = ""
        """Identity of the leader as last seen."""

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Wait to be leader, run `work`, release the lease; returns when work ended or leadership was lost.

        Cancellation: cancels work, then releases the lease.
        """
        await self._acquire()
        self._event("became leader")
        try:
            async with Tasks() as tasks:
                working = tasks.spawn(_await(work), f"leader-{self._config.name}")
                renewing = tasks.spawn(self._renew(), f"lease-{self._config.name}")
                await asyncio.wait([working, renewing], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self._release()
            self._event("stopped leading")

    def _event(self, what: str) -> None:
        if self._recorder is not None:
            reference = {"kind": "Lease", "apiVersion": "coordination.k8s.io/v1", "name": self._config.name, "namespace": self._config.namespace}
            self._recorder.event(reference, "Normal", "LeaderElection", f"{self._config.identity} {what}")

    async def _acquire(self) -> None:
        while not await self._try():
            await asyncio.sleep(self._config.retry_seconds * (1 + 1.2 * random.random()))
        self.is_leader = True

    async def _renew(self) -> None:
        loop = asyncio.get_running_loop()
        renewed = loop.time()
        while True:
            await asyncio.sleep(self._config.retry_seconds)
            try:
                async with asyncio.timeout_at(renewed + self._config.renew_seconds):
                    succeeded = await self._try()
            except TimeoutError:
                succeeded = False
            if succeeded:
                renewed = loop.time()
            elif loop.time() >= renewed + self._config.renew_seconds:
                log.warning("leadership lost", lease=self._config.name)
                return

    async def _try(self) -> bool:
        try:
            return await self._take_or_renew()
        except (StatusError, HTTPError, OSError) as error:
            log.debug("lease not taken", lease=self._config.name, error=error)
            return False

    async def _take_or_renew(self) -> bool:
        config, loop = self._config, asyncio.get_running_loop()
        now = clock.now_micro()
        spec = {"holderIdentity": config.identity, "leaseDurationSeconds": max(1, int(config.lease_seconds)), "acquireTime": now, "renewTime": now}
        try:
            lease = await self._client.get(LEASES, config.name, config.namespace)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
            meta = {"name": config.name, "namespace": config.namespace}
            obj = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": meta, "spec": {**spec, "leaseTransitions": 0}}
            await self._client.create(LEASES, obj)
            self.leader = config.identity
            return True
        old = lease.get("spec") or {}
        if old != self._seen:
            self._seen, self._seen_at = dict(old), loop.time()
        holder = self.leader = old.get("holderIdentity") or ""
        mine = holder == config.identity
        if holder and not mine and loop.time() < self._seen_at + config.lease_seconds:
            return False
        transitions = old.get("leaseTransitions") or 0
        if mine:
            spec["acquireTime"] = old.get("acquireTime") or now
        lease["spec"] = {**old, **spec, "leaseTransitions": transitions if mine else transitions + 1}
        updated = await self._client.update(LEASES, lease)
        self._seen, self._seen_at = updated["spec"], loop.time()
        self.leader = config.identity
        return True

    async def _release(self) -> None:
        # Letting go at once spares the next one the wait for the lease to run out.
        if not self.is_leader:
            return
        self.is_leader = False
        with contextlib.suppress(StatusError, HTTPError, OSError, TimeoutError):
            async with asyncio.timeout(2.0):
                lease = await self._client.get(LEASES, self._config.name, self._config.namespace)
                if lease["spec"].get("holderIdentity") == self._config.identity:
                    lease["spec"].update(holderIdentity="", leaseDurationSeconds=1, renewTime=clock.now_micro())
                    await self._client.update(LEASES, lease)


async def _await(work: Callable[[], Awaitable[None]]) -> None:
    await work()
