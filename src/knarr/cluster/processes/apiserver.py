"""The API server's process."""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

from knarr.aiokits.tasks import Tasks
from knarr.cluster import addresses, pki, relocation, renewal
from knarr.cluster.config import ClusterConfig
from knarr.cluster.processes import common
from knarr.cluster.supervisor import Announce

if TYPE_CHECKING:
    from knarr.apiserver.server import APIServer

CLUSTER_INFO_PATH = "/api/v1/namespaces/kube-public/configmaps/cluster-info"


def main(config: ClusterConfig, listener: socket.socket, announce: Announce) -> None:
    """Serve the API on the supervisor's socket until stopped."""
    from knarr.apiserver.config import APIServerConfig
    from knarr.apiserver.options import applied
    from knarr.apiserver.server import APIServer

    folder = config.pki
    (config.data / "store").mkdir(parents=True, exist_ok=True)
    settings = APIServerConfig(
        bind_address="0.0.0.0",
        port=config.api_port,
        listen_sock=listener,
        advertise_address=addresses.primary_address() or "127.0.0.1",
        store=config.store_url,
        data_dir=str(config.data / "apiserver"),
        serving_cert=str(folder / "apiserver.crt"),
        serving_key=str(folder / "apiserver.key"),
        client_ca=str(folder / "ca.crt"),
        service_account_key=str(folder / "sa.key"),
        service_account_issuer=f"https://kubernetes.default.svc.{config.cluster_domain}",
        requestheader_client_ca=str(folder / "front-proxy-ca.crt"),
        requestheader_allowed_names=("front-proxy-client",),
        proxy_client_cert=str(folder / "front-proxy-client.crt"),
        proxy_client_key=str(folder / "front-proxy-client.key"),
        service_cidrs=config.service_cidrs,
        node_port_range=config.node_ports,
        kubelet_client_cert=str(folder / "apiserver-kubelet-client.crt"),
        kubelet_client_key=str(folder / "apiserver-kubelet-client.key"),
        kubelet_ca=str(folder / "ca.crt"),
        cluster_domain=config.cluster_domain,
    )
    # A machine that joins knows nobody yet; what it reads here is signed with its token.
    settings.anonymous_paths = (*settings.anonymous_paths, CLUSTER_INFO_PATH)

    settings = applied(settings, config.apiserver_arguments)

    async def serve() -> None:
        server = APIServer(settings)
        await server.start()
        announce("api")
        async with Tasks() as tasks:
            tasks.spawn_eternal(relocation.follow(settings.advertise_address, follower(config, server)), "relocation")
            tasks.spawn_eternal(renew(config, server), "certificates")
            try:
                # Should the store lose events, only a new process can be right again; the supervisor starts it.
                await server.storage.store.wait_lost()
            finally:
                await server.stop()

    common.run(serve)


async def renew(config: ClusterConfig, server: APIServer) -> None:
    """Make all certificates of the control plane again before they end, and go on with this process's own. Eternal."""
    from knarr.cluster.lifecycle import make_pki

    serving, *others = [common.pair(config, name) for name in ("apiserver", "apiserver-kubelet-client", "front-proxy-client")]

    def renewed(pairs: list[pki.KeyPair]) -> None:
        if pairs == [serving]:
            server.serving_renewed()
        else:
            renewal.start_again(pairs)

    await renewal.follow([serving, *others], renewed, issue=lambda: make_pki(config))


def follower(config: ClusterConfig, server: APIServer) -> Callable[[str, str], Awaitable[None]]:
    """What is to be done when the machine has another address."""

    async def moved(_old: str, new: str) -> None:
        from knarr.cluster.lifecycle import make_pki

        make_pki(config)
        await server.move(new)

    return moved
