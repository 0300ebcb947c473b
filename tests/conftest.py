"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from tests.servers import running_etcd

# How quick a busy machine is fails no test.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest_asyncio.fixture
async def apiserver() -> AsyncIterator[RunningAPIServer]:
    """A real API server with a store in memory; `.client` is system:masters."""
    async with running_apiserver() as server:
        yield server


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an etcd for the whole session; users keep apart by prefixes."""
    with running_etcd(tmp_path_factory.mktemp("etcd")) as address:
        yield address
