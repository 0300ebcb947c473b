"""Every store that the conformance suite runs over. etcd runs once for the whole session, each test under a prefix of its own."""

import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from knarr.storage import RevisionStore, open_store


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def etcd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a fresh etcd."""
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
