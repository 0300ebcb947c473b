"""Every store that the conformance suite runs over."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from knarr.storage import RevisionStore, open_store


@pytest.fixture(params=["memory", "sqlite"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RevisionStore]:
    store = open_store("memory://" if request.param == "memory" else f"sqlite://{tmp_path}/store.db")
    await store.start()
    yield store
    await store.close()
