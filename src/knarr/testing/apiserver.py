"""A real API server inside the test's event loop, with a store in memory and certificates of its own.

Callers: tests of every component (`async with running_apiserver() as server`, or the pytest fixture `apiserver`). The
certificates are made once per test process. Leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import yaml

from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.server import APIServer
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.cluster import pki

HOSTS = ("localhost", "127.0.0.1", "10.96.0.1", "kubernetes", "kubernetes.default", "kubernetes.default.svc")


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="knarr-test-pki-")


@functools.cache
def test_pki() -> pki.ClusterPKI:
    """Return the key pairs that all servers of this process share."""
    return pki.ensure(Path(_folder().name), HOSTS)


class RunningAPIServer:
    """A started server and how to reach it as system:masters."""

    def __init__(self, server: APIServer, client: Client, client_config: ClientConfig, folder: Path) -> None:
        self.server = server
        self.client = client
        self.client_config = client_config
        self.folder = folder

    @property
    def url(self) -> str:
        return self.client_config.server

    @property
    def kubeconfig_path(self) -> str:
        """A kubeconfig for unmodified clients."""
        path = self.folder / "kubeconfig"
        if not path.exists():
            path.write_text(yaml.safe_dump(self.client_config.to_kubeconfig()), encoding="utf-8")
        return str(path)


@contextlib.asynccontextmanager
async def running_apiserver(store: str = "memory://", **settings: Any) -> AsyncIterator[RunningAPIServer]:
    """Start an API server on a free port; stops it at the end.

    Args:
      store: Store URL.
      settings: Fields of APIServerConfig.
    """
    pairs = test_pki()
    pki_folder = Path(_folder().name)
    config = APIServerConfig(**{
        "port": 0, "store": store, "serving_cert": str(pairs.api_server.certificate), "serving_key": str(pairs.api_server.key),
        "client_ca": str(pki_folder / "ca.crt"), "service_account_key": str(pki_folder / "sa.key"),
        "requestheader_client_ca": str(pki_folder / "front-proxy-ca.crt"), "requestheader_allowed_names": ("front-proxy-client",),
        "proxy_client_cert": str(pairs.front_proxy_client.certificate), "proxy_client_key": str(pairs.front_proxy_client.key),
        "kubelet_client_cert": str(pairs.kubelet_client.certificate), "kubelet_client_key": str(pairs.kubelet_client.key),
        "shutdown_grace_seconds": 1.0, **settings,
    })  # fmt: skip
    server = APIServer(config)
    with tempfile.TemporaryDirectory(prefix="knarr-test-") as folder:
        try:
            await server.start()
            client_config = ClientConfig(
                server=f"https://127.0.0.1:{server.port}", ca_data=(pki_folder / "ca.crt").read_bytes(),
                client_cert=pairs.admin.certificate_pem(), client_key=pairs.admin.key_pem(), user_agent="knarr-test/1",
            )
            client = Client(client_config)
            try:
                yield RunningAPIServer(server, client, client_config, Path(folder))
            finally:
                await client.close()
        finally:
            await server.stop()
