"""Other people's clients against our API server: unmodified, configured by a kubeconfig alone."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path

import pytest
from bench.servers import TOKEN

from knarr.client import kubeconfig
from tests.faults.server import Server


@pytest.fixture(scope="session")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server process on disk; `live.folder / "kubeconfig"` reaches it as an administrator."""
    server = Server(tmp_path_factory.mktemp("clients"))
    asyncio.run(server.start())
    authority = base64.b64encode((server.folder / "ca.crt").read_bytes()).decode()
    kubeconfig.merge_context(
        "live", {"server": f"https://127.0.0.1:{server.port}", "certificate-authority-data": authority}, {"token": TOKEN}, namespace="default", path=server.folder / "kubeconfig"
    )
    yield server
    server.kill()


@pytest.fixture
def config_path(live: Server, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = live.folder / "kubeconfig"
    monkeypatch.setenv("KUBECONFIG", str(path))
    return path
