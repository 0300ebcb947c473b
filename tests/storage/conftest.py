"""Every store that the conformance suite runs over, each test on etcd under a prefix of its own."""

import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from knarr.storage import RevisionStore, open_store


@pytest.fixture(params=["memory", "sqlite", "etcd"])
async def store(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[RevisionStore]:
    if request.param == "memory":
        url = "memory://"
    elif request.param == "sqlite":
        url = f"sqlite://{tmp_path}/store.db"
    else:
        url = f"etcd3://{request.getfixturevalue('etcd')}/{uuid.uuid4().hex}"
    store = open_store(url)
    await store.start()
    yield store
    await store.close()
