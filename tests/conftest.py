"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest_asyncio

from knarr.testing.apiserver import RunningAPIServer, running_apiserver


@pytest_asyncio.fixture
async def apiserver() -> AsyncIterator[RunningAPIServer]:
    """A real API server with a store in memory; `.client` is system:masters."""
    async with running_apiserver() as server:
        yield server
