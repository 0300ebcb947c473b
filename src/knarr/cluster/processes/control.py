"""The control plane's second process: controllers and scheduler in one event loop, each with its own client."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from knarr.client.informer import Family, Informers
from knarr.client.rest import Client
from knarr.cluster import addons, addresses, controllerargs, nodes, pki, relocation, renewal
from knarr.cluster.config import ClusterConfig
from knarr.cluster.localapi import Answer, LocalAPI, Say, socket_path
from knarr.cluster.processes import common, endpoints
from knarr.cluster.supervisor import Announce

if TYPE_CHECKING:
    from knarr.cluster.usage.server import UsageServer
    from knarr.controllers.context import ControllersConfig
    from knarr.scheduler.scheduler import Scheduler


CONNECTIONS = 96
"""Requests at the same time, of each client. More share no more of a commit; each connection has a TLS session and buffers on both sides."""


def main(config: ClusterConfig, announce: Announce) -> None:
    """Run the controllers and the scheduler until stopped."""
    from knarr.apiserver import options
    from knarr.cluster.servingcerts import ServingCertificateApprover
    from knarr.controllers.manager import ControllerManager
    from knarr.network.ingress import IngressController
    from knarr.network.ingress.haproxy import Listen
    from knarr.network.loadbalancer import LoadBalancerController
    from knarr.scheduler.config import SchedulerConfig, read_text
    from knarr.scheduler.scheduler import Scheduler

    # Upstream's components have the gates each; here they are told to the API server, and hold for the whole cluster.
    gates = options.feature_gates(config.apiserver_arguments)

    async def control() -> None:
        controllers = Client(
            common.client_config(config, common.pair(config, "controller-manager"), "kube-controller-manager"), max_connections=CONNECTIONS
        )
        scheduler = Client(common.client_config(config, common.pair(config, "scheduler"), "kube-scheduler"), max_connections=CONNECTIONS)
        informers = Informers(controllers)
        # The first cluster of a machine has the well-known ports; nothing listens before the first Ingress of the class is there.
        listen = Listen(http_port=8000 + config.slot, https_port=8400 + config.slot) if config.slot else Listen()
        shown = [address] if (address := addresses.primary_address()) else []
        folder = config.state / "ingress"
        ingress = IngressController(controllers, informers, folder=folder, listen=listen, status_addresses=shown, gateway_services=True)
        file = config.scheduler_file
        deciding_as = read_text(file.read_bytes()) if file.is_file() else SchedulerConfig()
        family = Family()
        deciding = Scheduler(scheduler, replace(deciding_as, feature_gates={**gates, **deciding_as.feature_gates}), family=family)
        managing = ControllerManager(controllers, controllers_config(config, gates), family=family)
        components = (
            endpoints.Component(
                "kube-controller-manager", endpoints.CONTROLLER_MANAGER_PORT, controllers, lambda: managing.ready, managing.exposition, managing.settings
            ),
            endpoints.Component(
                "kube-scheduler", endpoints.SCHEDULER_PORT, scheduler, deciding.ready.is_set, deciding.exposition, deciding.settings
            ),
        )
        api = LocalAPI(socket_path(config, "control"), scheduler_verbs(deciding))
        await api.start()
        usage = usage_server(config, controllers)

        async def moved(_old: str, new: str) -> None:
            ingress.show([new])
            await serve_usage(config, controllers, usage)

        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(managing.run(), name="controllers")
                group.create_task(endpoints.serve(config, components), name="endpoints")
                group.create_task(addons.ensure(controllers), name="addons")
                group.create_task(serve_usage(config, controllers, usage), name="resource-metrics")
                group.create_task(ServingCertificateApprover(controllers, informers).run(), name="serving-certificates")
                group.create_task(LoadBalancerController(controllers, informers, pool=config.balancer_pool).run(), name="load-balancer")
                group.create_task(ingress.run(), name="ingress")
                group.create_task(renewal.follow(own_pairs(config), renewal.start_again, issue=lambda: usage_pair(config)), name="certificates")
                group.create_task(relocation.follow(shown[0] if shown else "", moved), name="relocation")
                group.create_task(deciding.run(), name="scheduler")
        finally:
            await usage.close()
            await api.close()
            await informers.close()
            await controllers.close()
            await scheduler.close()

    common.run(control)


def controllers_config(config: ClusterConfig, gates: dict[str, bool]) -> ControllersConfig:
    """What the cluster's configuration says to the controllers."""
    from knarr.controllers.context import ControllersConfig

    folder = config.pki
    return ControllersConfig(
        # As kubeadm's clusters: what signs and clears bootstrap tokens is on, though upstream's own default leaves it off.
        enabled=f"{config.controllers},bootstrapsigner,tokencleaner" if config.controllers == "*" else config.controllers,
        cluster_cidr=config.pod_cidr,
        service_cidr=config.service_cidr,
        service_account_key=(folder / "sa.key").read_bytes(),
        root_ca=(folder / "ca.crt").read_bytes(),
        ca_cert=(folder / "ca.crt").read_bytes(),
        ca_key=(folder / "ca.key").read_bytes(),
        feature_gates=gates,
        **controllerargs.parse(config.controller_arguments),
    )


def own_pairs(config: ClusterConfig) -> list[pki.KeyPair]:
    """The certificates of this process, made again (here, or by the API server's process) before they end."""
    return [common.pair(config, name) for name in ("controller-manager", "scheduler", "metrics")]


def usage_pair(config: ClusterConfig) -> pki.KeyPair:
    """The serving certificate of metrics.k8s.io."""
    from knarr.cluster.usage.registration import HOST

    return pki.Authority(config.pki, "ca", "kubernetes").issue(config.pki / "metrics", "knarr-metrics", hosts=[HOST], server=True, client=False)


def usage_server(config: ClusterConfig, client: Client) -> UsageServer:
    """What answers for metrics.k8s.io, not listening yet."""
    from knarr.cluster.usage.collector import Collector, kubelet_reader
    from knarr.cluster.usage.server import UsageServer

    serving = usage_pair(config)
    proxy_ca = config.pki / "front-proxy-ca.crt"
    return UsageServer(client, Collector(kubelet_reader(client)), certificate=str(serving.certificate), key=str(serving.key), proxy_ca=str(proxy_ca))


async def serve_usage(config: ClusterConfig, client: Client, server: UsageServer) -> None:
    """Listen on the machine's address, since endpoints cannot be loopback ones, and lead the API server there."""
    from knarr.cluster.usage.registration import register

    address = nodes.node_address(config, config.nodes[0])
    port = await server.listen(address)
    await register(client, address, port, (config.pki / "ca.crt").read_bytes())


def scheduler_verbs(scheduler: Scheduler) -> Answer:
    """What the running scheduler tells the command line."""

    async def answer(verb: str, arguments: dict[str, Any], say: Say) -> None:
        if verb != "why/pod":
            raise ValueError(f"unknown request {verb!r}")
        report = scheduler.why(arguments["namespace"], arguments["name"])
        if report is None:
            raise ValueError(f"there is no pod {arguments['namespace']}/{arguments['name']} that still runs or waits")
        say(report=report)

    return answer
