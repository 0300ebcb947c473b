"""A server that has been told to stop says so first, serves on for a while, and then ends its watches."""

from __future__ import annotations

import asyncio

import pytest

from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.options import applied
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.testing.apiserver import running_apiserver


@pytest.mark.timeout(30)
async def test_readiness_fails_first_while_everything_else_goes_on() -> None:
    async with running_apiserver(shutdown_delay_seconds=0.5) as running:
        client = running.client
        await client.create(CONFIG_MAPS, {"metadata": {"name": "before"}}, "default")
        names: list[str] = []

        async def watch() -> None:
            async for _, obj in client.watch(CONFIG_MAPS, "default", resource_version="0"):
                names.append(obj["metadata"]["name"])

        watching = asyncio.ensure_future(watch())
        stopping = asyncio.ensure_future(running.server.stop())
        await asyncio.sleep(0)
        async with asyncio.timeout(10):
            assert (await _status(client, "/livez"), await _status(client, "/healthz")) == (200, 200)
            assert await _status(client, "/readyz") == 500
            assert await _status(client, "/readyz/shutdown") == 500
            await client.create(CONFIG_MAPS, {"metadata": {"name": "meanwhile"}}, "default")
            await stopping
            await asyncio.wait([watching])
        watching.exception()
        assert names == ["before", "meanwhile"]
        with pytest.raises((HTTPError, OSError)):
            await client.get(CONFIG_MAPS, "before", "default")


async def _status(client: Client, path: str) -> int:
    try:
        return (await client.request("GET", path)).status
    except StatusError as error:
        return error.code


def test_the_delay_is_an_option() -> None:
    assert applied(APIServerConfig(), ["shutdown-delay-duration=70s"]).shutdown_delay_seconds == 70
