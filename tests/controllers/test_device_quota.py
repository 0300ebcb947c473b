"""Devices of claims count against quotas by device class: at once by admission, and by the controller's count."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from knarr.api.errors import StatusError
from knarr.api.resources import RESOURCE_CLAIMS, RESOURCE_QUOTAS
from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.testing.apiserver import running_apiserver

GOLD, COUNT = "gold.deviceclass.resource.k8s.io/devices", "count/resourceclaims.resource.k8s.io"


def _claim(name: str, *requests: dict[str, Any]) -> dict[str, Any]:
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {"devices": {"requests": list(requests)}}}


async def _used(client: Client, wanted: dict[str, str]) -> None:
    async with asyncio.timeout(15):
        while ((await client.get(RESOURCE_QUOTAS, "q", "default")).get("status") or {}).get("used") != wanted:
            await asyncio.sleep(0.02)


@pytest.mark.timeout(60)
async def test_claims_use_devices_of_a_quota_and_more_than_that_are_refused() -> None:
    async with running_apiserver() as server:
        own = Client(server.client_config)
        manager = ControllerManager(own, ControllersConfig(enabled="resourcequota-controller,namespace-controller"))
        task = asyncio.create_task(manager.run())
        try:
            await manager.wait_ready()
            hard = {GOLD: "5", COUNT: "10"}
            await server.client.create(RESOURCE_QUOTAS, {"metadata": {"name": "q", "namespace": "default"}, "spec": {"hard": hard}})
            await _used(server.client, {GOLD: "0", COUNT: "0"})
            subs = [{"name": "many", "deviceClassName": "gold", "count": 3}, {"name": "one", "deviceClassName": "gold"}]
            exact = {"name": "b", "exactly": {"deviceClassName": "gold", "count": 1}}
            other = {"name": "c", "exactly": {"deviceClassName": "silver", "allocationMode": "All"}}
            await server.client.create(RESOURCE_CLAIMS, _claim("one", {"name": "a", "firstAvailable": subs}, exact, other))
            await _used(server.client, {GOLD: "4", COUNT: "1"})
            with pytest.raises(StatusError, match=r"exceeded quota: q, requested: gold\.deviceclass\.resource\.k8s\.io/devices=32"):
                await server.client.create(
                    RESOURCE_CLAIMS, _claim("all", {"name": "a", "exactly": {"deviceClassName": "gold", "allocationMode": "All"}})
                )
            await server.client.delete(RESOURCE_CLAIMS, "one", "default")
            await _used(server.client, {GOLD: "0", COUNT: "0"})
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await own.close()
