"""The HTTPS endpoints of controller manager and scheduler: health, metrics, settings.

Caller: the control process. The first cluster of a machine has upstream's ports 10257 and 10259, on the loopback address as
kubeadm has them; others are 20 apart.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.client.endpoint import Endpoint
from knarr.client.rest import Client
from knarr.cluster import pki
from knarr.cluster.config import ClusterConfig

log = get_logger(__name__)

HOST = "127.0.0.1"
CONTROLLER_MANAGER_PORT, SCHEDULER_PORT = 10257, 10259
_PORTS_APART = 20


@dataclass(frozen=True)
class Component:
    """One component of the process and what its endpoint tells."""

    name: str
    port: int
    client: Client
    """Of the component itself: it may ask the API server for reviews."""
    ready: Callable[[], bool]
    metrics: Callable[[], bytes]
    settings: Callable[[], Object]


def port(config: ClusterConfig, first: int) -> int:
    """The port of a cluster, from that of the machine's first one."""
    return first + _PORTS_APART * config.slot


async def serve(config: ClusterConfig, components: Sequence[Component]) -> None:
    """Listen until cancelled; a port that is taken costs the endpoint, not the component."""
    authority = pki.Authority(config.pki, "ca", "kubernetes")
    endpoints: list[Endpoint] = []
    try:
        for component in components:
            serving = authority.issue(
                config.pki / f"{component.name}-serving", component.name, hosts=["localhost", HOST], server=True, client=False
            )
            ready = component.ready
            endpoint = Endpoint(
                component.client,
                checks={"informer-sync": lambda ready=ready: "" if ready() else "caches are not filled yet"},  # type: ignore[misc]
                only_ready=frozenset({"informer-sync"}),
                metrics=component.metrics,
                settings=component.settings,
                certificate=str(serving.certificate),
                key=str(serving.key),
                client_ca=str(config.pki / "ca.crt"),
            )
            endpoints.append(endpoint)
            try:
                await endpoint.listen(HOST, port(config, component.port))
            except OSError as error:
                log.error("no metrics of a component: its port is taken", component=component.name, error=str(error))
        await asyncio.get_running_loop().create_future()
    finally:
        for endpoint in endpoints:
            await endpoint.close()
