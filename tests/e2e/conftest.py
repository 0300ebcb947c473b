"""One cluster for all whole-cluster tests: up once, deleted at the end, and the host as it was before."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.dockercoins import images
from tests.e2e.cluster import Cluster
from tests.host_state import HostState


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    made = Cluster("e2e", tmp_path_factory.mktemp("e2e"))
    made.knarr("delete", check=False)  # what a run that was killed may have left
    before = HostState.take()
    made.up()
    made.knarr("image", "load", str(images.archive()))
    yield made
    made.delete()
    assert HostState.take().difference(before) == {}
