"""Servers that tests run beside ours: an etcd, and whatever answers over HTTPS with the test API server's certificate."""

from __future__ import annotations

import contextlib
import shutil
import socket
import ssl
import subprocess
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

from knarr.http.server import HTTPServer, Request
from knarr.testing import apiserver as testing


@contextlib.asynccontextmanager
async def https_server(handle: Callable[[Request], Awaitable[None]]) -> AsyncIterator[int]:
    """Serves on loopback; yields the port."""
    pairs = testing.test_pki()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pairs.api_server.certificate, pairs.api_server.key)
    server = HTTPServer(handle, ssl_context=context)
    port = await server.listen("127.0.0.1", 0)
    try:
        yield port
    finally:
        await server.close()


@contextlib.contextmanager
def running_etcd(data: Path, *, scheme: str = "http", options: tuple[str, ...] = ()) -> Iterator[str]:
    """An etcd of one member with its data in a folder; yields HOST:PORT for clients."""
    program = shutil.which("etcd")
    assert program is not None, "etcd is among the Debian packages that the tests install"
    port = _free_port()
    client, peer = f"{scheme}://127.0.0.1:{port}", f"http://127.0.0.1:{_free_port()}"
    process = subprocess.Popen(
        [
            program, "--data-dir", str(data), "--listen-client-urls", client, "--advertise-client-urls", client, "--listen-peer-urls", peer,
            "--initial-advertise-peer-urls", peer, "--initial-cluster", f"default={peer}", "--logger", "zap", "--log-level", "error", *options,
        ],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.02)
        yield f"127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(10)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
