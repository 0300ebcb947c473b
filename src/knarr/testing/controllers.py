"""Real controllers inside the test's event loop, all of them or those that a test names."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from typing import Any

from knarr.aiokits.tasks import Tasks
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.testing.apiserver import RunningAPIServer


@contextlib.asynccontextmanager
async def running_controllers(server: RunningAPIServer, enabled: str = "*", **settings: Any) -> AsyncIterator[ControllerManager]:
    """Run controllers against a server; returns when their caches are filled, stops them at the end.

    Args:
      enabled: As upstream's --controllers, e.g. "*,-deployment" or "deployment,replicaset".
      settings: Fields of ControllersConfig.

    Raises:
      UnknownController: a name is none.
    """
    manager = ControllerManager(server.client, ControllersConfig(enabled=enabled, **settings))
    async with Tasks() as tasks:
        tasks.spawn(manager.run(), "controllers")
        await manager.wait_ready()
        yield manager
