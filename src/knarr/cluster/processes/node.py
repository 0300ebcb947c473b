"""A node's process: container runtime, pod network, kubelet, service proxy and DNS in one event loop.

Order: the runtime finds its containers again, the node is registered, the pod network starts when the control plane has given
the node its pod CIDR, proxy and DNS run beside. Everything but the runtime meets through the API alone.
"""

from __future__ import annotations

import asyncio
import ipaddress
import os
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from knarr.aiokits import collector
from knarr.aiokits.log import get_logger
from knarr.api.errors import StatusError
from knarr.api.resources import NODES, PODS
from knarr.api.types import Object
from knarr.client.informer import Informers
from knarr.client.rest import Client
from knarr.cluster import nodes, pki, relocation, renewal, supervisor
from knarr.cluster.config import ClusterConfig, NodeConfig
from knarr.cluster.processes import common
from knarr.cluster.supervisor import Announce
from knarr.http.errors import HTTPError
from knarr.kubelet import certificates, configfile
from knarr.network import conntrack, netns
from knarr.network.netlink import NETLINK_NETFILTER

if TYPE_CHECKING:
    from knarr.kubelet.config import KubeletConfig
    from knarr.kubelet.kubelet import Kubelet
    from knarr.network.direct.path import DirectPath
    from knarr.network.machine import Machine
    from knarr.network.plugins import PluginNetwork
    from knarr.network.podnet import BridgeNetwork
    from knarr.network.policy import PolicyEngine
    from knarr.network.proxy.service_proxy import ServiceProxy
    from knarr.runtime.embedded import EmbeddedRuntime
    from knarr.runtime.grpc_cri import GRPCRuntime

RESOLVE_SECONDS = 0.05
CIDR_FILE = "pod-cidrs"
_POLICIES, _FIREWALLS = "policies", "firewalls"
"""Why nothing goes the direct path."""

log = get_logger(__name__)


def main(config: ClusterConfig, node: NodeConfig, announce: Announce) -> None:
    """Run one node until stopped; its containers outlive it."""
    nodes.ensure_host(config, node)
    nodes.enter(node)
    collector.keep_one_heap()
    common.run(lambda: Node(config, node, announce).run())


def orderly_seconds(config: ClusterConfig) -> float:
    """How long a node may take to end its pods when it is told to go down in order; 0 when that is not configured."""
    from knarr.kubelet.config import KubeletConfig

    if not config.kubelet_file.is_file():
        return 0.0
    return configfile.shutdown_seconds(configfile.load(config.kubelet_file.read_bytes(), KubeletConfig(node_name=""))[0])


class Node:
    """The parts of one node and their wiring."""

    def __init__(self, config: ClusterConfig, node: NodeConfig, announce: Announce) -> None:
        self.config = config
        self.node = node
        self.announce = announce
        self.address = nodes.node_address(config, node)
        self.second = nodes.second_address(config, node)
        self.data = config.data / "nodes" / node.name
        self.state = config.state / node.name
        self.network_started = asyncio.Event()
        self.server = config.server or f"https://{nodes.gateway(config) if node.netns else '127.0.0.1'}:{config.api_port}"

    def clients(self) -> tuple[Client, Client]:
        """(the kubelet's, the network's); on a machine that joined both act as the node."""
        if self.config.joined:
            pair = certificates.load(self.config.client_certificate(self.node.name))
            if pair is None:
                raise RuntimeError(f"{self.config.client_certificate(self.node.name)} is missing; `knarr delete` and join again")
            own = network = pair
        else:
            issued = self.client_pair()
            shared = common.pair(self.config, "network")
            own, network = (issued.certificate_pem(), issued.key_pem()), (shared.certificate_pem(), shared.key_pem())
        return (
            Client(common.certified(self.config, *own, "kubelet", server=self.server)),
            Client(common.certified(self.config, *network, "knarr-network", server=self.server)),
        )

    def client_pair(self) -> pki.KeyPair:
        """The kubelet's client certificate on the machine of the control plane, made where it is missing or ends soon."""
        return self.authority().issue(self.data / "pki" / "kubelet-client", f"system:node:{self.node.name}", groups=["system:nodes"])

    async def renew_certificates(self, kubelet: Kubelet, network_client: Client) -> None:
        """Keep this node's certificates fresh where the authority is at hand. Eternal."""
        shared = common.pair(self.config, "network")

        def renewed(pairs: list[pki.KeyPair]) -> None:
            for pair in pairs:
                if pair == shared:
                    # Connections made with the old one end with it at the latest, and are made again.
                    network_client.use_certificate(pair.certificate_pem(), pair.key_pem())
                elif str(pair.certificate) == kubelet.config.serving_cert:
                    kubelet.serving_renewed()
                else:
                    kubelet.client_renewed(pair.certificate_pem(), pair.key_pem())

        own = [self.client_pair(), self.serving()]
        await renewal.follow([*own, shared], renewed, issue=lambda: (self.client_pair(), self.serving()))

    def authority(self) -> pki.Authority:
        return pki.Authority(self.config.pki, "ca", "kubernetes")

    def serving(self) -> pki.KeyPair:
        """The kubelet's serving certificate; a machine that joined asks the cluster for its own and has it in one file."""
        if self.config.joined:
            path = self.data / "pki" / "kubelet-server-current.pem"
            return pki.KeyPair(path, path)
        names = [self.node.name, "localhost", "127.0.0.1", self.address]
        return self.authority().issue(
            self.data / "pki" / "kubelet-serving", f"system:node:{self.node.name}", groups=["system:nodes"], hosts=names, server=True
        )

    def make_network(self) -> BridgeNetwork | PluginNetwork:
        from knarr.network import cni, pool
        from knarr.network.direct import path
        from knarr.network.plugins import PluginNetwork
        from knarr.network.podnet import BridgeNetwork

        config = self.config
        plugins = cni.installed(Path(config.cni_conf_dir))
        if plugins is not None or config.pod_network == "cni":
            network = plugins.name if plugins is not None else "none yet"
            log.info("pods get their network from the CNI configuration", network=network, folder=config.cni_conf_dir)
            return PluginNetwork(
                node_address=self.address, state_dir=self.state / "network", config_dir=config.cni_conf_dir, plugin_dirs=config.cni_bin_dirs
            )
        return BridgeNetwork(
            bridge=f"knarr{config.slot}",
            cluster_cidrs=config.pod_cidrs,
            service_cidrs=(*config.service_cidrs, *pool.networks(config.balancer_pool)),
            state_dir=self.state / "network",
            table=f"knarr{config.suffix}-net",
            link_prefix=f"kp{config.slot}-",
            # Until policies are in force and other firewalls are looked for.
            direct=path.available(None, (_POLICIES, _FIREWALLS), (_FIREWALLS,)) if config.direct_path else None,
        )

    def make_runtime(self, network: BridgeNetwork | PluginNetwork) -> EmbeddedRuntime | GRPCRuntime:
        from knarr.runtime.embedded import EmbeddedRuntime, RuntimeConfig

        if self.config.oci_runtime.startswith("unix://"):
            from knarr.runtime.grpc_cri import GRPCRuntime

            return GRPCRuntime(self.config.oci_runtime, str(self.data / "cri"))
        return EmbeddedRuntime(
            RuntimeConfig(
                root=str(self.data / "runtime"),
                state=str(self.state / "runtime"),
                network=network,
                cgroup_root=f"/knarr{self.config.suffix}/{self.node.name}",
                oci_runtime=self.config.oci_runtime,
                handlers={"runc": "runc"},
            )
        )

    def make_proxy(
        self, client: Client, informers: Informers, network: BridgeNetwork | PluginNetwork, machine: Machine | None
    ) -> tuple[ServiceProxy, PolicyEngine]:
        """Services and policies of this node, in the ways that its pod network leaves them."""
        from knarr.network.direct import services
        from knarr.network.podnet import BridgeNetwork
        from knarr.network.policy import PolicyEngine
        from knarr.network.proxy.service_proxy import ServiceProxy

        direct = network.direct if isinstance(network, BridgeNetwork) else None
        proxy = ServiceProxy(
            client,
            informers,
            node_name=self.node.name,
            table=f"knarr{self.config.suffix}",
            pod_cidrs=self.config.pod_cidrs,
            # Where load balancers and monitoring look for kube-proxy's health; other clusters of this machine keep out of its way.
            health_port=10256 if self.node.netns else self.config.kubelet_port + 6,
            metrics_port=10249 if self.node.netns else self.config.kubelet_port - 1,
            machine=machine,
            direct=services.available(direct, self.config.pod_cidrs) if direct is not None else None,
        )
        policy = PolicyEngine(
            client, informers, node_name=self.node.name, table=f"knarr{self.config.suffix}-policy",
            on_isolate=direct.isolate if direct is not None else None,
        )  # fmt: skip
        network.on_attach = policy.admit
        proxy.further_metrics.append(policy.metrics.render)
        return proxy, policy

    async def run(self) -> None:
        """Until cancelled; a part that fails ends the process, and the supervisor starts it again."""
        from knarr.cluster.localapi import LocalAPI, socket_path
        from knarr.cluster.nodeapi import image_verbs
        from knarr.kubelet.kubelet import Kubelet
        from knarr.network.podnet import BridgeNetwork

        self.state.mkdir(parents=True, exist_ok=True)
        network = self.make_network()
        if known := self.remembered_cidrs():
            # A process that follows a killed one goes on with its network at once, so that the node never shows NotReady.
            await network.set_pod_cidrs(known)
            self.network_started.set()
        runtime = self.make_runtime(network)
        await runtime.start()
        api = LocalAPI(socket_path(self.config, self.node.name), image_verbs(runtime))
        await api.start()
        kubelet_client, network_client = self.clients()
        informers = Informers(network_client)
        direct = network.direct if isinstance(network, BridgeNetwork) else None
        # The ways between nodes of one machine are the built-in network's.
        machine = self.machine if isinstance(network, BridgeNetwork) else None
        proxy, policy = self.make_proxy(network_client, informers, network, machine)
        try:
            async with asyncio.TaskGroup() as group:
                kubelet = Kubelet(kubelet_client, runtime, runtime, self.kubelet_config(self.serving()))
                if self.config.joined:
                    kubelet.rotated_clients.append(network_client)
                else:
                    group.create_task(self.renew_certificates(kubelet, network_client), name="certificates")
                group.create_task(kubelet.run(), name="kubelet")
                group.create_task(self.go_down_in_order(kubelet), name="orderly-shutdown")
                group.create_task(self.follow_own_node(informers, network, runtime, kubelet.network_changed), name="own-node")
                group.create_task(proxy.run(), name="proxy")
                group.create_task(policy.run(), name="policy")
                group.create_task(self.serve_dns(network_client, informers, network), name="dns")
                group.create_task(self.reach_other_nodes(informers, network), name="routes")
                group.create_task(self.report_ready(informers, proxy), name="ready")
                group.create_task(self.watch_firewalls(network_client, direct), name="firewalls")
                if direct is not None:
                    group.create_task(self.open_direct_path(direct, policy), name="direct-path")
                if not self.node.ip:
                    group.create_task(relocation.follow(self.address, lambda _old, new: self.move(new, kubelet, network)), name="relocation")
                announcing = self.announce_balancers(network_client, informers, machine) if self.announces else self.leave_announcing(kubelet_client)
                group.create_task(announcing, name="announce")
        finally:
            await informers.close()
            await api.close()
            await runtime.close()
            await network.close()
            await kubelet_client.close()
            await network_client.close()

    async def move(self, address: str, kubelet: Kubelet, network: BridgeNetwork | PluginNetwork) -> None:
        """The machine has another address, so this node has."""
        from knarr.network.plugins import PluginNetwork

        old, self.address = self.address, address
        self.second = nodes.second_address(self.config, self.node)
        if not self.config.joined:
            self.serving()
        kubelet.host_changed()
        nodes.prefer_primary(self.config)
        with netns.open_netlink(None, NETLINK_NETFILTER) as netlink:
            # Connections of pods to what was there hang otherwise, until their programs give them up.
            forgotten = conntrack.forget_translated(netlink, old)
        if not isinstance(network, PluginNetwork):
            await network.change_address(old, address)
        log.info("node has another address", address=address, connections_forgotten=forgotten)

    @property
    def announces(self) -> bool:
        """Whether this node tells the local network of LoadBalancer addresses; nodes in namespaces of this machine are not part of it."""
        return bool(self.config.announce) and not self.node.netns

    @property
    def machine(self) -> Machine | None:
        """The machine whose further nodes are namespaces: that of the control plane; None when its own node is not known."""
        from knarr.network.machine import Machine

        config = self.config
        if config.joined:
            name, network = config.machine_node, config.machine_cidr
        else:
            name, network = next((node.name for node in config.nodes if not node.netns), ""), config.node_cidr
        return Machine(name, ipaddress.ip_network(network)) if name and network else None

    async def leave_announcing(self, client: Client) -> None:
        """Take back the mark of a node that announced before its cluster was told not to: others would leave addresses to it."""
        from knarr.network.announcer import LABEL

        try:
            node = await client.get(NODES, self.node.name)
            if LABEL in (node["metadata"].get("labels") or {}):
                await client.patch(NODES, self.node.name, None, {"metadata": {"labels": {LABEL: None}}}, type="merge")
        except (StatusError, HTTPError, OSError) as error:
            # A node that is not known yet has no mark; a mark that stays is taken back at the next start.
            log.debug("the node's mark of announcing was not looked at", error=str(error))

    async def watch_firewalls(self, client: Client, direct: DirectPath | None) -> None:
        """Tell which firewalls of this machine may stop pods; packets that any of them looks at must pass it."""
        from knarr.network.firewalls import HOST_WAY, PODS_WAY, FirewallWatch

        def settle(watched: frozenset[int]) -> None:
            if direct is not None:
                (direct.hold if watched & PODS_WAY else direct.release)(_FIREWALLS)
                (direct.hold_host if watched & HOST_WAY else direct.release_host)(_FIREWALLS)

        await FirewallWatch(client, self.node.name, on_watchers=settle).run()

    @staticmethod
    async def open_direct_path(direct: DirectPath, policy: PolicyEngine) -> None:
        """Pods go directly once the policies that say which of them must not are known."""
        await policy.wait_synced()
        await asyncio.to_thread(direct.release, _POLICIES)

    async def announce_balancers(self, client: Client, informers: Informers, machine: Machine | None) -> None:
        """Answer ARP and NDP for LoadBalancer addresses that fall to this node."""
        from knarr.network.announcer import Announcer

        await Announcer(client, informers, node_name=self.node.name, interface=self.config.announce, machine=machine).run()

    async def go_down_in_order(self, kubelet: Kubelet) -> None:
        """When the supervisor asks for it, end the pods as configured, then this process."""
        asked = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(supervisor.ORDERLY_SIGNAL, asked.set)
        await asked.wait()
        log.info("going down in order", node=self.node.name)
        kubelet.shutdown.request()
        await kubelet.shutdown.finished.wait()
        os.kill(os.getpid(), signal.SIGTERM)

    def kubelet_config(self, serving: pki.KeyPair) -> KubeletConfig:
        from knarr.kubelet.config import KubeletConfig
        from knarr.network import announcer

        config = self.config
        settings = KubeletConfig(
            node_name=self.node.name,
            node_ip=self.address,
            current_ips=lambda: (self.address, self.second) if self.second else (self.address,),
            root_dir=str(self.data / "kubelet"),
            share_root=True,
            pod_logs_dir=str(self.data / "pod-logs"),
            static_pod_path=str(self.data / "manifests"),
            cluster_dns=(config.dns_ip,),
            cluster_domain=config.cluster_domain,
            port=10250 if self.node.netns else config.kubelet_port,
            serving_cert=str(serving.certificate),
            serving_key=str(serving.key),
            credential_provider_config=config.credential_provider_config,
            credential_provider_bin_dir=config.credential_provider_bin_dir,
            server_tls_bootstrap=config.joined,
            client_cert_file=str(config.client_certificate(self.node.name)) if config.joined else "",
            rotate_certificates=config.joined,
            reappear=not config.joined,
            client_ca=str(config.pki / "ca.crt"),
            cgroup_root=f"/knarr{config.suffix}/{self.node.name}",
            node_labels=self.node.labels | ({announcer.LABEL: "lan"} if self.announces else {}),
            node_taints=tuple(self.node.taints),
        )
        if config.kubelet_file.is_file():
            settings, idle = configfile.load(config.kubelet_file.read_bytes(), settings)
            if idle:
                log.info("fields of the kubelet's configuration file have no effect here", fields=",".join(idle))
        return settings

    def remembered_cidrs(self) -> list[str]:
        try:
            return (self.state / CIDR_FILE).read_text().split()
        except FileNotFoundError:
            return []

    async def follow_own_node(self, informers: Informers, network: BridgeNetwork | PluginNetwork, runtime: EmbeddedRuntime | GRPCRuntime, changed_network: Callable[[], None]) -> None:
        """Give the pod network its CIDRs as soon as the node has them, and again should they change."""
        wake = asyncio.Event()
        seen: dict[str, list[str]] = {}

        def changed(obj: Object) -> None:
            cidrs = obj.get("spec", {}).get("podCIDRs") or []
            if cidrs and seen.get("cidrs") != cidrs:
                seen["cidrs"] = cidrs
                wake.set()

        own = informers.get(NODES, field_selector=f"metadata.name={self.node.name}")
        own.add_handler(on_add=changed, on_update=lambda _, new: changed(new))
        await informers.start()
        while True:
            await wake.wait()
            wake.clear()
            await network.set_pod_cidrs(seen["cidrs"])
            (self.state / CIDR_FILE).write_text("\n".join(seen["cidrs"]))
            self.network_started.set()
            changed_network()
            freed = await network.recover([sandbox.id for sandbox in await runtime.list_pod_sandboxes()])
            if freed:
                log.info("freed the network of sandboxes that are gone", count=len(freed))

    async def serve_dns(self, client: Client, informers: Informers, network: BridgeNetwork | PluginNetwork) -> None:
        """Answer on the node's address in the pod network, once there is one, and tell the cluster."""
        from knarr.network.dns import DNSPublisher, DNSServer
        from knarr.network.policy.engine import trim_pod

        await self.network_started.wait()
        # A node's own address may have a DNS server of the machine's owner; the pod network's is ours alone.
        port = 53 if network.own_routes else 10053
        server = DNSServer(
            informers, listen=network.gateways, port=port, cluster_domain=self.config.cluster_domain, avoid=[self.config.dns_ip],
            machine_nodes=[node.name for node in self.config.nodes if not node.netns] if self.node.netns else (),
            upstreams=self.config.dns_upstreams or None, stub_domains=self.config.stub_domains,
            # The policies' informer of pods, which is there anyway.
            autopath=informers.get(PODS, transform=trim_pod) if self.config.autopath else None,
        )  # fmt: skip
        await server.start()
        try:
            await DNSPublisher(
                client, informers, node_name=self.node.name, addresses=network.gateways, cluster_ips=(self.config.dns_ip,), port=server.port
            ).run()
        finally:
            await server.close()

    async def reach_other_nodes(self, informers: Informers, network: BridgeNetwork | PluginNetwork) -> None:
        """Keep the ways to the pods of other nodes; the node that is this machine itself is behind the gateway of those that are namespaces."""
        from knarr.network.overlay import NodeRoutes, Peer
        from knarr.network.podnet import BridgeNetwork

        await self.network_started.wait()
        if not isinstance(network, BridgeNetwork):
            return
        machine = (nodes.gateway(self.config), nodes.gateway6(self.config))
        hops = {node.name: machine for node in self.config.nodes if not node.netns} if self.node.netns else {}
        device = f"kp{self.config.slot}-vx"

        def behind(peer: Peer) -> str:
            far = self.config.machine_cidr
            return self.config.machine_node if far and ipaddress.ip_address(peer.address) in ipaddress.ip_network(far) else ""

        await NodeRoutes(
            informers, network, node_name=self.node.name, next_hops=hops, device=device, vni=self.config.tunnel, behind=behind
        ).run()

    async def report_ready(self, informers: Informers, proxy: ServiceProxy) -> None:
        """Tell `up` when the API knows this node, shows it Ready, and when a name resolves through the cluster's DNS address."""
        known, ready = asyncio.Event(), asyncio.Event()

        def changed(obj: Object) -> None:
            known.set()
            if any(condition["type"] == "Ready" and condition["status"] == "True" for condition in obj.get("status", {}).get("conditions", ())):
                ready.set()

        own = informers.get(NODES, field_selector=f"metadata.name={self.node.name}")
        own.add_handler(on_add=changed, on_update=lambda _, new: changed(new))
        await informers.start()
        await known.wait()
        self.announce(f"known {self.node.name}")
        await ready.wait()
        self.announce(f"node {self.node.name}")
        await proxy.wait_synced()
        await wait_resolves(self.config)
        self.announce("dns")


async def wait_resolves(config: ClusterConfig) -> None:
    """Until the cluster's DNS service answers for the API server's name: asked as a pod would, through the service address."""
    from knarr.network.dns.wire import A, WireError, build_query, read_addresses

    name = f"kubernetes.default.svc.{config.cluster_domain}"
    question = build_query(1, name, A)
    loop = asyncio.get_running_loop()
    while True:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as sock:
            try:
                await loop.sock_connect(sock, (config.dns_ip, 53))
                await loop.sock_sendall(sock, question)
                async with asyncio.timeout(RESOLVE_SECONDS):
                    answer = read_addresses(await loop.sock_recv(sock, 4096))
                if config.address(1) in answer:
                    return
            except (OSError, TimeoutError, WireError) as error:
                log.debug("DNS does not answer yet", error=str(error))
        await asyncio.sleep(RESOLVE_SECONDS)
