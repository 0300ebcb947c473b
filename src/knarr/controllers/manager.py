"""The controller manager: makes the enabled controllers, fills their caches, runs them side by side.

One event loop runs all of them over one set of shared informers. A controller that fails is
restarted with back-off and never takes others along.
Source: cmd/kube-controller-manager/app/controllermanager.go, names/controller_names.go.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Callable, Iterable, Mapping

from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.types import Object
from knarr.client.informer import Family, Informers
from knarr.client.leaderelection import LeaderElectionConfig, LeaderElector
from knarr.client.rest import Client
from knarr.controllers import metrics
from knarr.controllers.context import Component, Context, ControllersConfig
from knarr.controllers.registry import ALIASES, CONTROLLERS, GATES, OFF_BY_DEFAULT, WITHOUT_WORK

log = get_logger(__name__)


class UnknownController(ValueError):
    """A name in the selection is not a controller."""


def selected(enabled: str | Iterable[str], gates: Mapping[str, bool] | None = None) -> list[str]:
    """Resolve a selection as upstream's --controllers flag into controller names.

    Args:
      enabled: "*" (all that are on by default), "name" (that one), "-name" (not that one); aliases
        such as "deployment" and names of upstream's controllers without work here are taken too.
        Text is split at commas. A "-name" or "name" wins over "*".
      gates: feature gates that are not at their defaults; without its gate a controller is known, but does not start.

    Raises:
      UnknownController: a name is none.
    """
    parts = enabled.split(",") if isinstance(enabled, str) else list(enabled)
    every = False
    wanted: set[str] = set()
    unwanted: set[str] = set()
    for part in (item.strip() for item in parts):
        if part in ("*", ""):
            every = every or part == "*"
            continue
        name = part.removeprefix("-")
        name = ALIASES.get(name, name)
        if name not in CONTROLLERS and name not in WITHOUT_WORK:
            raise UnknownController(f"{part!r} is not in the list of known controllers")
        (unwanted if part.startswith("-") else wanted).add(name)
    switched = gates or {}
    return [
        name
        for name in CONTROLLERS
        if name not in unwanted
        and (name in wanted or (every and name not in OFF_BY_DEFAULT))
        and (name not in GATES or switched.get(GATES[name], False))
    ]


def _constructor(name: str) -> Callable[[Context], Component]:
    module, _, attribute = CONTROLLERS[name].partition(":")
    found = getattr(importlib.import_module(f"knarr.controllers.{module}"), attribute)
    return found  # type: ignore[no-any-return]


class ControllerManager:
    """Runs controllers against one API server.

    Args:
      client: identified as whoever may do everything; owned by the caller.
      family: whose informers keep objects together with these, without `informers`.
    """

    def __init__(
        self, client: Client, config: ControllersConfig | None = None, informers: Informers | None = None, *, family: Family | None = None
    ) -> None:
        self.config = config or ControllersConfig()
        self.names = selected(self.config.enabled, self.config.feature_gates)
        self._client = client
        self._informers = informers
        self._family = family
        self._ready = asyncio.Event()

    @property
    def ready(self) -> bool:
        """Whether all caches are filled and all controllers run."""
        return self._ready.is_set()

    def exposition(self) -> bytes:
        """Give the metrics as text, under upstream's names."""
        return metrics.exposition(self.names if self.ready else ())

    def settings(self) -> Object:
        """What /configz shows."""
        config = self.config
        values: Object = {
            "Generic": {"Controllers": config.enabled.split(",") if isinstance(config.enabled, str) else list(config.enabled)},
            "KubeCloudShared": {"ClusterCIDR": config.cluster_cidr or ""},
            "NodeIPAMController": {"ServiceCIDR": config.service_cidr or ""},
        }
        return {"kubecontrollermanager.config.k8s.io": values}

    async def wait_ready(self) -> None:
        await self._ready.wait()

    async def run(self) -> None:
        """Run until cancelled; with leader election, work only while leading."""
        if not self.config.leader_elect:
            await self._run()
            return
        election = LeaderElectionConfig(name="kube-controller-manager", identity=self.config.identity)
        while True:
            await LeaderElector(self._client, election).run(self._run)

    async def _run(self) -> None:
        ctx = Context(self._client, self.config, self._informers, self._family)
        components = [(name, _constructor(name)(ctx)) for name in self.names]
        try:
            async with Tasks() as tasks:
                await ctx.informers.start()
                await ctx.informers.wait_synced()
                for name, component in components:
                    tasks.spawn(_keep_running(name, component), name)
                self._ready.set()
                log.info("controllers run", count=len(components))
                await asyncio.get_running_loop().create_future()
        finally:
            self._ready.clear()
            await ctx.close()


async def _keep_running(name: str, component: Component) -> None:
    backoff = Backoff(0.5, 30.0)
    while True:
        try:
            await component.run()
            return
        except Exception as error:
            log.error("controller failed, will start again", controller=name, error=repr(error), exc_info=error)
            await backoff.sleep()
