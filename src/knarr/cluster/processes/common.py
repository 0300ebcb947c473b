"""What every component process does: an event loop that ends on SIGTERM, and a client with the component's certificate."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable

import uvloop

from knarr.aiokits import collector
from knarr.aiokits.log import get_logger
from knarr.client.config import ClientConfig
from knarr.cluster.config import ClusterConfig
from knarr.cluster.pki import KeyPair

log = get_logger(__name__)


def run(main: Callable[[], Awaitable[None]]) -> None:
    """Run a component until it ends or SIGTERM or SIGINT cancels it; cancelling is a normal end."""

    async def guarded() -> None:
        task = asyncio.ensure_future(main())
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, task.cancel)
        try:
            await task
        except asyncio.CancelledError:
            log.info("stopped")

    collector.relax()
    uvloop.run(guarded())


def client_config(config: ClusterConfig, pair: KeyPair, component: str, *, host: str = "127.0.0.1") -> ClientConfig:
    """How a component reaches the API server with its own certificate.

    Args:
      host: the API server's address as the component sees it.
    """
    return certified(config, pair.certificate_pem(), pair.key_pem(), component, server=f"https://{host}:{config.api_port}")


def certified(config: ClusterConfig, certificate: bytes, key: bytes, component: str, *, server: str) -> ClientConfig:
    """The same with the pair itself (PEM) and the API server's whole address."""
    return ClientConfig(
        server=server, ca_data=(config.pki / "ca.crt").read_bytes(), client_cert=certificate, client_key=key, user_agent=f"{component}/v1.35.0 knarr"
    )


def pair(config: ClusterConfig, name: str) -> KeyPair:
    """A key pair that `up` has made."""
    return KeyPair(config.pki / f"{name}.crt", config.pki / f"{name}.key")
