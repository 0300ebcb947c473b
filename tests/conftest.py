"""Fixtures for every test."""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, settings

from knarr.testing.apiserver import RunningAPIServer, running_apiserver

# How quick a busy machine is fails no test.
settings.register_profile("any-machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any-machine")


@pytest_asyncio.fixture
async def apiserver() -> AsyncIterator[RunningAPIServer]:
    """A real API server with a store in memory; `.client` is system:masters."""
    async with running_apiserver() as server:
        yield server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of an etcd for the whole session; users keep apart by prefixes."""
    program = shutil.which("etcd")
    assert program is not None, "etcd is among the Debian packages that the tests install"
    client, peer = _free_port(), _free_port()
    data = tmp_path_factory.mktemp("etcd")
    process = subprocess.Popen(
        [
            program, "--data-dir", str(data), "--listen-client-urls", f"http://127.0.0.1:{client}", "--advertise-client-urls",
            f"http://127.0.0.1:{client}", "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls",
            f"http://127.0.0.1:{peer}", "--initial-cluster", f"default=http://127.0.0.1:{peer}", "--logger", "zap", "--log-level", "error",
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", client)) == 0:
                    break
            time.sleep(0.02)
        yield f"127.0.0.1:{client}"
    finally:
        process.terminate()
        process.wait(10)
