"""The built-in pod network of one node: `BridgeNetwork`, the PodNetwork that the embedded runtime is given.

Shape: the bridge holds the node's own address of each pod CIDR (the pods' gateway, where the cluster DNS also listens).
Every pod gets a veth pair whose node side is a routed port: a /32 (or /128) route to the pod, a pinned neighbour on
either side. So every packet of a pod, also to its neighbour on the same node, passes the node's IP layer, where
Services and policies act, whether or not the kernel filters bridged frames; nobody broadcasts, and no pod can answer in
another's name.
Callers: runtime (setup, teardown, ready), cluster (start, recover, set_pod_cidrs, cleanup). All netlink work runs on
one worker thread, because it blocks for up to some milliseconds. Invariants: calls are idempotent per sandbox; a lease
is written before a link is made, so that a crash never loses either; cleanup leaves no link, rule, route, sysctl or
file.
Must not know: Kubernetes objects (except that annotations may ask for bandwidth).
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import Awaitable, Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Address, IPv6Interface, ip_address, ip_network
from pathlib import Path
from typing import TypeVar

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.network import rtnl
from knarr.network.bandwidth import INGRESS, limit_bits, shape
from knarr.network.direct.path import DirectPath
from knarr.network.hostport import HostPorts, Port
from knarr.network.ipam import AddressManager, Lease, PoolExhausted, gateway_of
from knarr.network.netlink import GONE, NetlinkError, NetlinkSocket
from knarr.network.netns import open_netlink, run_inside
from knarr.network.nftables import NftError, StateMismatch, delete_table
from knarr.network.sysctl import SysctlRecord, read, write
from knarr.network.tablewatch import TableWatch
from knarr.runtime.cri import NetworkResult, RuntimeFault, SandboxNetwork

log = get_logger(__name__)
T = TypeVar("T")

NODE_MAC = "ee:ee:ee:ee:ee:ee"
"""Hardware address of every node-side link; each stands alone on its wire."""
_DOOMED_GROUP = 0x6B6E6472
GATEWAY6 = IPv6Address("fe80::1")


@dataclass(frozen=True, slots=True)
class Addressing:
    """What a pod's namespace is told, by family."""

    addresses: list[rtnl.Address]
    gateways: list[rtnl.Address]


def link_name(prefix: str, sandbox_id: str) -> str:
    """The node-side link of a sandbox; 15 bytes at most."""
    return f"{prefix}{sandbox_id[:11]}"


def pod_mac(address: rtnl.Address) -> str:
    """A locally administered hardware address that follows from the IP address."""
    return "0a:58:" + address.packed[-4:].hex(":")


class BridgeNetwork:
    """See the module. One instance per node.

    Args:
      bridge: Name of the interface that carries the node's gateway addresses.
      pod_cidrs: The node's pod CIDRs, primary family first; may be empty until `set_pod_cidrs`.
      cluster_cidrs: All pods' CIDRs (never masqueraded between each other).
      service_cidrs: Get a route to the bridge, so that the node's own processes reach Services without a default route.
      mtu: Of pod links; 0 takes the uplink's, less the overlay's overhead when `overlay_overhead_bytes` is given.
      state_dir: On a tmpfs, for leases and the record of changed sysctls.
      table: Name of the nf_tables table (masquerading, host ports).
      netns: Path of the node's own network namespace; None is the process's.
      direct: The node's direct path, if its kernel has one; it is closed with the network.
    """

    own_routes = True
    """Whether ways to other nodes are ours to make."""

    def __init__(
        self,
        *,
        bridge: str = "knarr0",
        pod_cidrs: Sequence[str] = (),
        cluster_cidrs: Sequence[str] = ("10.244.0.0/16",),
        service_cidrs: Sequence[str] = (),
        mtu: int = 0,
        overlay_overhead_bytes: int = 0,
        state_dir: str | Path,
        table: str = "knarr-pods",
        link_prefix: str = "knp-",
        netns: str | None = None,
        direct: DirectPath | None = None,
    ) -> None:
        self.bridge = bridge
        self.pod_cidrs = list(pod_cidrs)
        self.cluster_cidrs = list(cluster_cidrs)
        self.service_cidrs = list(service_cidrs)
        self.mtu = mtu
        self.netns = netns
        self.direct = direct
        self._overhead = overlay_overhead_bytes
        self._state_dir = Path(state_dir)
        self._table = table
        self._prefix = link_prefix
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="podnet")
        self._reaper = ThreadPoolExecutor(1, thread_name_prefix="podnet-reaper")
        self._doomed: set[str] = set()
        self._netlink: NetlinkSocket | None = None
        self._addresses: AddressManager | None = None
        self._sysctls = SysctlRecord(self._state_dir / "sysctls.json")
        self._host_ports = HostPorts(table, netns, link_prefix)
        self._tasks = Tasks()
        self._watch = TableWatch(table, self._table_lost, wanted=lambda: self._started, netns=netns)
        self.on_attach: Callable[[str, str, Sequence[str]], Awaitable[None]] | None = None
        """Called with namespace, name and addresses of each attached pod before its containers may start."""
        self._started = False
        self._why_not = "the pod network has not been started"

    async def start(self) -> None:
        """Make the node side ready: gateway interface, rules, sysctls; adopt what a former process left.

        Raises:
          RuntimeFault: the kernel or nft refused; `ready` then says why, and start may be tried again.
        """
        await self._run(self._start)
        self._watch.start()

    async def set_pod_cidrs(self, pod_cidrs: Sequence[str]) -> None:
        """Take the node's pod CIDRs (once the control plane has assigned them) and start, if not done so already."""
        if list(pod_cidrs) == self.pod_cidrs and self._started:
            return
        self.pod_cidrs = list(pod_cidrs)
        self._started = False
        await self.start()

    async def ready(self) -> str | None:
        """See PodNetwork.ready."""
        if self._started:
            return None
        return self._why_not if self.pod_cidrs else "no pod CIDR assigned to the node yet"

    async def setup(self, sandbox: SandboxNetwork) -> NetworkResult:
        """See PodNetwork.setup. Raises RuntimeFault; nothing is left then."""
        if not self._started and self.pod_cidrs:
            await self.start()
        reason = await self.ready()
        if reason is not None:
            raise RuntimeFault(f"network is not ready: {reason}")
        result = await self._run(lambda: self._setup(sandbox))
        if self.on_attach is not None:
            await self.on_attach(sandbox.namespace, sandbox.name, result.ips)
        if (direct := self.direct) is not None:
            await self._run(lambda: self._go_directly(direct, sandbox.sandbox_id))
        return result

    async def teardown(self, sandbox: SandboxNetwork) -> None:
        """See PodNetwork.teardown."""
        await self._run(lambda: self._teardown(sandbox.sandbox_id))

    async def recover(self, living: Collection[str]) -> list[str]:
        """Free what belongs to sandboxes that are not among `living` (ids); returns their ids."""
        return await self._run(lambda: self._recover(living))

    async def change_address(self, old: str, new: str) -> None:
        """The node has another address; connections of pods to the old one end at once instead of hanging."""
        await self._run(lambda: self._host_ports.change_address(old, new))

    def _table_lost(self) -> None:
        if len(self._tasks) == 0:
            self._tasks.spawn(self.start(), "pod network: write the table anew")

    async def cleanup(self) -> None:
        """Remove every trace: links, rules, gateway interface, sysctls, files. Idempotent; `start` makes it anew."""
        self._started = False
        self._watch.close()
        await self._tasks.close()
        await self._run(self._cleanup)

    async def close(self) -> None:
        """End the worker; the network itself goes on working."""
        self._watch.close()
        await self._tasks.close()
        await self._run(self._close_sockets)
        if self.direct is not None:
            self.direct.close()
        self._worker.shutdown(wait=False)
        self._reaper.shutdown(wait=False)

    @property
    def gateways(self) -> list[str]:
        """The node's own address in each pod CIDR: where node services listen for pods."""
        return [str(gateway_of(ip_network(cidr))) for cidr in self.pod_cidrs]

    def lease(self, sandbox_id: str) -> Lease | None:
        """What a sandbox holds, for `why` and tests."""
        return self._addresses.leases.get(sandbox_id) if self._addresses else None

    async def _run(self, function: Callable[[], T]) -> T:
        # The work must not be torn apart by a cancelled caller: it always runs to its end, the caller just stops waiting.
        try:
            return await asyncio.shield(asyncio.get_running_loop().run_in_executor(self._worker, function))
        except (NetlinkError, NftError, StateMismatch, PoolExhausted, OSError) as error:
            raise RuntimeFault(f"pod network: {error}") from error

    def _socket(self) -> NetlinkSocket:
        if self._netlink is None:
            self._netlink = open_netlink(self.netns)
        return self._netlink

    def _close_sockets(self) -> None:
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
        self._host_ports.close()

    # Node side

    def _start(self) -> None:
        try:
            self._state_dir.mkdir(parents=True, exist_ok=True)
            if self._addresses is None:
                self._addresses = AddressManager(self._state_dir / "leases", self.pod_cidrs)
            else:
                self._addresses.set_networks(self.pod_cidrs)
            if not self.pod_cidrs:
                return
            self._ensure_gateway()
            run_inside(self.netns, self._ensure_sysctls)
            held: list[Port] = [port for lease in self._addresses.leases.values() for port in lease.ports]
            self._host_ports.install(self.cluster_cidrs, self.pod_cidrs, held)
            run_inside(self.netns, self._sysctls.ensure_tracking)
            if (direct := self.direct) is not None:
                self._adopt_links(direct)
                if self._host_ports.leave_led_untracked(self.gateways):
                    direct.release_host("rules")
        except Exception as error:
            self._why_not = str(error)
            raise
        self._started = True

    @staticmethod
    def uplink_mtu(netlink: NetlinkSocket) -> int:
        """The smallest MTU of the links that default routes use; 1500 without any."""
        indexes = {route.index for route in rtnl.routes(netlink) if route.destination.prefixlen == 0}
        found = [link.mtu for link in rtnl.links(netlink) if link.index in indexes]
        return min(found, default=1500)

    def _ensure_gateway(self) -> None:
        netlink = self._socket()
        if not self.mtu:
            self.mtu = self.uplink_mtu(netlink) - self._overhead
        networks = [ip_network(cidr) for cidr in self.pod_cidrs]
        wanted: list[rtnl.Interface] = []
        for network in networks:
            address = gateway_of(network)
            wanted.append(IPv4Interface((address, 32)) if address.version == 4 else IPv6Interface((address, 128)))
        netlink.send(rtnl.add_bridge(self.bridge, mac=pod_mac(wanted[0].ip), mtu=self.mtu), ignore=(errno.EEXIST,))
        link = rtnl.link(netlink, self.bridge)
        if not link.up:
            netlink.send(rtnl.set_up(link.index))
        present = [address for index, address, scope in rtnl.addresses(netlink) if index == link.index and scope == 0]
        netlink.send(*(rtnl.delete_address(link.index, address) for address in present if address not in wanted), ignore=GONE)
        netlink.send(*(rtnl.add_address(link.index, address) for address in wanted))
        # Service addresses never go over the wire; with a route of their own they work on a host without a default route, too, and the
        # node's own connections to them carry its pod network address, which every other node can answer.
        services = [ip_network(cidr) for cidr in self.service_cidrs]
        sources = {address.version: address.ip for address in wanted}
        netlink.send(
            *(rtnl.add_route(cidr, index=link.index, source=sources[cidr.version]) for cidr in services if cidr.version in sources)
        )

    def _ensure_sysctls(self) -> None:
        self._sysctls.ensure("net/ipv4/ip_forward", "1")
        if any(":" in cidr for cidr in self.pod_cidrs):
            # A forwarding host ignores router advertisements unless told otherwise, and would lose its own default route.
            for path in Path("/proc/sys/net/ipv6/conf").iterdir():
                name = f"net/ipv6/conf/{path.name}/accept_ra"
                if path.name not in ("lo", self.bridge) and not path.name.startswith(self._prefix) and read(name) == "1":
                    self._sysctls.ensure(name, "2")
            self._sysctls.ensure("net/ipv6/conf/all/forwarding", "1")
        # Packets to unused pod addresses must not wander to the default route; the bridge without ports swallows them.
        write(f"net/ipv4/conf/{self.bridge}/route_localnet", "1")

    def _adopt_links(self, direct: DirectPath) -> None:
        """Let pods that are there already take this process's direct path instead of a former one's."""
        assert self._addresses is not None
        direct.add_node(self.gateways)
        indexes = {link.name: link.index for link in rtnl.links(self._socket())}
        for lease in self._addresses.leases.values():
            if (index := indexes.get(lease.link)) is not None:
                self._watch_link(index)
                self._go_directly(direct, lease.sandbox_id, index)

    # Pods

    def _watch_link(self, index: int) -> None:
        if self.direct is not None:
            try:
                self.direct.watch(self._socket(), index)
            except NetlinkError as error:
                log.warning("the kernel takes no programs at links; pods have no direct path", error=str(error))
                self.direct.close()
                self.direct = None

    def _go_directly(self, direct: DirectPath, sandbox_id: str, index: int = 0) -> None:
        lease = self._addresses.leases.get(sandbox_id) if self._addresses is not None else None
        if lease is not None and lease.netns:
            index = index or rtnl.link(self._socket(), lease.link).index
            direct.add(sandbox_id, lease.ips, index, pod_mac(ip_address(lease.ips[0])), lease.netns, shaped=lease.shaped)

    def _setup(self, sandbox: SandboxNetwork) -> NetworkResult:
        manager = self._addresses
        assert manager is not None
        pod = f"{sandbox.namespace}/{sandbox.name}"
        known = sandbox.sandbox_id in manager.leases
        shaped = limit_bits(sandbox.annotations, INGRESS) is not None
        lease = manager.acquire(sandbox.sandbox_id, link_name(self._prefix, sandbox.sandbox_id), pod, sandbox.netns_path, shaped=shaped)
        try:
            addressing = Addressing([ip_address(text) for text in lease.ips], [gateway_of(ip_network(cidr)) for cidr in self.pod_cidrs])
            self._connect(sandbox, lease.link, addressing, fresh=not known)
            self._claim_ports(sandbox, lease)
            shape(self._socket(), lease.link, sandbox.netns_path, sandbox.annotations, self.mtu)
        except BaseException:
            self._teardown(sandbox.sandbox_id)
            raise
        return NetworkResult(ips=list(lease.ips), mac=pod_mac(addressing.addresses[0]))

    def _connect(self, sandbox: SandboxNetwork, name: str, addressing: Addressing, *, fresh: bool) -> None:
        netlink = self._socket()
        mac = pod_mac(addressing.addresses[0])
        target = os.open(sandbox.netns_path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            try:
                netlink.send(rtnl.add_veth(name, peer="eth0", peer_netns=target, mtu=self.mtu, peer_mac=mac, mac=NODE_MAC))
            except NetlinkError as error:
                if error.errno != errno.EEXIST or fresh:
                    raise
            with open_netlink(target) as inside:
                self._configure_pod(inside, rtnl.link(inside, "eth0").index, addressing)
        finally:
            os.close(target)
        index = rtnl.link(netlink, name).index
        self._watch_link(index)
        self._configure_node_side(netlink, index, addressing, mac)

    def _configure_pod(self, inside: NetlinkSocket, index: int, addressing: Addressing) -> None:
        messages = [rtnl.set_up(1), rtnl.set_up(index)]
        routes = []
        for address, gateway in zip(addressing.addresses, addressing.gateways, strict=True):
            if address.version == 4:
                messages.append(rtnl.add_address(index, IPv4Interface((address, 32))))
                via: rtnl.Address = gateway
                routes.append(rtnl.add_route(rtnl.host_network(gateway), index=index))
                routes.append(rtnl.add_route(ip_network("0.0.0.0/0"), index=index, gateway=gateway))
            else:
                messages.append(rtnl.add_address(index, IPv6Interface((address, 128))))
                via = GATEWAY6
                routes.append(rtnl.add_route(ip_network("::/0"), index=index, gateway=GATEWAY6, onlink=True))
            messages.append(rtnl.add_neighbour(index, via, NODE_MAC))
        inside.send(*messages, *routes)

    def _configure_node_side(self, netlink: NetlinkSocket, index: int, addressing: Addressing, mac: str) -> None:
        messages = [rtnl.allow_localnet(index)]
        for address, gateway in zip(addressing.addresses, addressing.gateways, strict=True):
            messages.append(rtnl.add_neighbour(index, address, mac))
            messages.append(rtnl.add_route(rtnl.host_network(address), index=index, source=gateway))
        netlink.send(*messages)

    def _claim_ports(self, sandbox: SandboxNetwork, lease: Lease) -> None:
        ports: list[Port] = []
        for mapping in sandbox.port_mappings:
            if mapping.host_port <= 0:
                continue
            for pod_ip in lease.ips:
                host_ip = mapping.host_ip
                if host_ip and (":" in host_ip) != (":" in pod_ip) and not (ip_address(host_ip).is_unspecified and ":" not in host_ip):
                    continue
                ports.append([mapping.protocol.upper(), host_ip, mapping.host_port, pod_ip, mapping.container_port])
        for port in ports:
            holder = self._host_ports.conflict(port)
            if holder is not None and list(holder) != list(port):
                raise OSError(errno.EADDRINUSE, f"host port {port[2]}/{port[0]} is held by the pod at {holder[3]}")
        if not ports:
            return
        lease.ports = [list(port) for port in ports]
        assert self._addresses is not None
        self._addresses.save(lease)
        self._host_ports.change(ports, ())

    def _teardown(self, sandbox_id: str) -> None:
        if self._addresses is None:
            self._addresses = AddressManager(self._state_dir / "leases", self.pod_cidrs)
        if self.direct is not None:
            self.direct.remove(sandbox_id)
        lease = self._addresses.leases.get(sandbox_id)
        name = lease.link if lease else link_name(self._prefix, sandbox_id)
        if lease is not None and lease.ports:
            try:
                self._host_ports.change((), lease.ports)
            except StateMismatch:
                # Somebody flushed our table; writing it whole again is the repair.
                self._addresses.release(sandbox_id)
                self._start()
        netlink = self._socket()
        if lease is not None:
            # Without its routes the pod is cut off; only then may its addresses go to another.
            netlink.send(*(rtnl.delete_route(rtnl.host_network(ip_address(text))) for text in lease.ips), ignore=GONE)
        self._addresses.release(sandbox_id)
        self._doomed.add(name)
        self._reaper.submit(self._reap)

    def _reap(self) -> None:
        # Deleting a link waits for a grace period of the kernel (tens of milliseconds) under its one big lock, whatever the number of links:
        # so all that are waiting go together, in their own thread.
        names = [self._doomed.pop() for _ in range(len(self._doomed))]
        if not names:
            return
        try:
            with open_netlink(self.netns) as netlink:
                netlink.send(*(rtnl.set_group(name, _DOOMED_GROUP) for name in names), rtnl.delete_group(_DOOMED_GROUP), ignore=GONE)
        except OSError as error:
            log.warning("links of ended pods were not deleted", links=" ".join(names), error=str(error))

    def _recover(self, living: Collection[str]) -> list[str]:
        if self._addresses is None:
            self._addresses = AddressManager(self._state_dir / "leases", self.pod_cidrs)
        gone = self._addresses.strangers(living)
        for sandbox_id in gone:
            self._teardown(sandbox_id)
        names = {lease.link for lease in self._addresses.leases.values()} | self._doomed
        netlink = self._socket()
        for link in rtnl.links(netlink):
            if link.name.startswith(self._prefix) and link.kind == "veth" and link.name not in names:
                netlink.send(rtnl.delete_link(link.name), ignore=GONE)
        return gone

    def _cleanup(self) -> None:
        self._started = False
        self._why_not = "the pod network was cleaned up"
        self._recover(())
        self._reaper.submit(self._reap).result()
        delete_table(self._table, self.netns)
        self._host_ports.ports = {}
        self._socket().send(rtnl.delete_link(self.bridge), ignore=GONE)
        run_inside(self.netns, self._sysctls.restore)
        self._close_sockets()
        for folder in (self._state_dir / "leases", self._state_dir):
            try:
                folder.rmdir()
            except OSError:
                log.debug("state folder kept", path=str(folder))
        self._addresses = None
