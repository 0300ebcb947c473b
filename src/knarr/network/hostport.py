"""Host ports and the node-side rules of the pod network: one nf_tables table of ours.

Role: used by `podnet`. The table masquerades what pods send out of the cluster, maps host ports to pods, keeps
127.0.0.1 of the node from pods, and stops ICMP redirects nowhere else wanted. Host ports are elements of shared maps.
Invariants: nothing but the table named at construction is touched. A host port is a pair (node-wide) or a triple (one
host address).
Source: cni-plugins portmap (behaviour), kube-proxy nftables masquerading.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from ipaddress import ip_address, ip_network

from knarr.aiokits.log import get_logger
from knarr.network import conntrack
from knarr.network.direct.programs import LED_MARK
from knarr.network.ipam import gateway_of
from knarr.network.netlink import NETLINK_NETFILTER, NetlinkError, NetlinkSocket
from knarr.network.nftables import (
    Element,
    ElementBatch,
    NftError,
    StateMismatch,
    join,
    packed_address,
    port_key,
    protocol_key,
    run_script,
    value,
)

log = get_logger(__name__)


def render(table: str, cluster_cidrs: Sequence[str], pod_cidrs: Sequence[str], link_prefix: str) -> str:
    """The table's skeleton as an nft script; replaces an older one of the same name and empties its maps."""
    lines = [f"table inet {table} {{}}", f"delete table inet {table}", f"table inet {table} {{"]
    for version, kind in ((4, "ipv4_addr"), (6, "ipv6_addr")):
        inside = sorted({c for c in (*cluster_cidrs, *pod_cidrs) if ip_network(c).version == version})
        own = sorted({c for c in pod_cidrs if ip_network(c).version == version})
        for name, cidrs in (("cluster", inside), ("own", own)):
            elements = f"elements = {{ {', '.join(cidrs)} }}" if cidrs else ""
            lines.append(f" set {name}{version} {{ type {kind}; flags interval; auto-merge; {elements} }}")
        lines.append(f" map port{version} {{ type inet_proto . inet_service : {kind} . inet_service; }}")
        lines.append(f" map address_port{version} {{ type {kind} . inet_proto . inet_service : {kind} . inet_service; }}")
        lines.append(f" set self{version} {{ type {kind} . {kind}; }}")
    lines.append(
        """
 chain loopback {
  type filter hook input priority raw; policy accept;
  # The node's loopback is routable towards pods (host ports on 127.0.0.1), so nothing from outside may name it but answers.
  iif != "lo" ip daddr 127.0.0.0/8 ct status dnat accept
  iif != "lo" ip daddr 127.0.0.0/8 drop
 }
 # Chains of type nat are asked for the first packet of a connection only: all further ones pass without a look.
 chain first {
  type nat hook prerouting priority dstnat - 50; policy accept;
  iif != "lo" ip daddr 127.0.0.0/8 drop
  iifname "LINKS*" jump honest
 }
 chain honest {
  # A pod sends with its own addresses: those whose way back is the link they came in by.
  ip6 saddr { fe80::/10, ::/128 } return
  fib saddr . iif oif 0 drop
 }
 # After the Services: what they have translated needs no look here.
 chain host_ports {
PASS
  dnat ip to ip daddr . meta l4proto . th dport map @address_port4
  dnat ip6 to ip6 daddr . meta l4proto . th dport map @address_port6
  fib daddr type local jump node_ports
 }
 chain node_ports {
  dnat ip to meta l4proto . th dport map @port4
  dnat ip6 to meta l4proto . th dport map @port6
 }
 chain nat_in {
  type nat hook prerouting priority dstnat + 2; policy accept;
  meta l4proto { tcp, udp, sctp } jump host_ports
 }
 chain nat_output {
  type nat hook output priority -98; policy accept;
  meta l4proto { tcp, udp, sctp } jump host_ports
 }
 chain nat_out {
  type nat hook postrouting priority srcnat + 1; policy accept;
  oif "lo" return
  ip saddr 127.0.0.0/8 masquerade
  ct status dnat ip saddr . ip daddr @self4 masquerade
  ct status dnat ip6 saddr . ip6 daddr @self6 masquerade
  ip saddr @own4 ip daddr != @cluster4 ip daddr != 224.0.0.0/4 masquerade
  ip6 saddr @own6 ip6 daddr != @cluster6 ip6 daddr != ff00::/8 masquerade
 }
}""".replace("LINKS", link_prefix).replace("PASS", "\n".join(_no_host_port(cluster_cidrs, pod_cidrs)))
    )
    return "\n".join(lines) + "\n"


def _no_host_port(cluster_cidrs: Sequence[str], pod_cidrs: Sequence[str]) -> Iterator[str]:
    """Rules that let pass what is for a pod: of the pod network only the gateways are the node's own."""
    for version, ip in ((4, "ip"), (6, "ip6")):
        gateways = sorted(str(gateway_of(network)) for network in map(ip_network, pod_cidrs) if network.version == version)
        if gateways:
            yield f"  {ip} daddr @cluster{version} {ip} daddr != {{ {', '.join(gateways)} }} return"


_LED = """table inet {table} {{
 set former4 {{ type ipv4_addr; flags timeout; timeout 1h; }}
 set former6 {{ type ipv6_addr; flags timeout; timeout 1h; }}
 chain led_in {{
  type filter hook prerouting priority raw; policy accept;
{answers}
  ip daddr @former4 ip saddr @own4 meta l4proto tcp tcp flags & syn == 0 reject with tcp reset
  ip6 daddr @former6 ip6 saddr @own6 meta l4proto tcp tcp flags & syn == 0 reject with tcp reset
 }}
 chain led_out {{
  type filter hook output priority raw; policy accept;
  meta mark & {mark} != 0 notrack
 }}
}}
"""
"""Segments of the host's own connections that were led to a pod: nothing is to be translated, so nothing is tracked. What pods go on sending
to a former address of the host, where they were led, is refused, so that their programs notice."""

Port = Sequence[str | int]
"""protocol, host address ("" for all), host port, pod address, container port."""


class HostPorts:
    """The table in one network namespace. Blocking; called from the pod network's worker thread."""

    def __init__(self, table: str, netns: str | None, link_prefix: str) -> None:
        self._table = table
        self._link_prefix = link_prefix
        self._netns = netns
        self._netlink: NetlinkSocket | None = None
        self.ports: dict[tuple[str, str, int, int], Port] = {}

    def install(self, cluster_cidrs: Sequence[str], pod_cidrs: Sequence[str], ports: Iterable[Port]) -> None:
        """Write the whole table, with the ports of pods that are already there."""
        run_script(render(self._table, cluster_cidrs, pod_cidrs, self._link_prefix), self._netns)
        self.ports = {}
        self.change(list(ports), ())

    def leave_led_untracked(self, gateways: Iterable[str]) -> bool:
        """Add rules for sockets that carry `programs.LED_MARK`, which answer at the gateways' addresses; False where the kernel has them not."""
        mark = hex(LED_MARK)
        answers = (f"  {'ip6' if ':' in gateway else 'ip'} daddr {gateway} meta l4proto tcp socket mark & {mark} != 0 notrack" for gateway in gateways)
        try:
            run_script(_LED.format(table=self._table, answers="\n".join(answers), mark=mark), self._netns)
        except NftError as error:
            log.info("the host's own connections to Services are tracked on this kernel", reason=str(error).splitlines()[0])
            return False
        return True

    def change_address(self, old: str, new: str) -> None:
        """The host has another address: end connections that pods have to the old one."""
        left, taken = ElementBatch(self._table), ElementBatch(self._table)
        left.add(f"former{6 if ':' in old else 4}", [Element(packed_address(old))])
        taken.delete(f"former{6 if ':' in new else 4}", [Element(packed_address(new))])
        for batch in (left, taken):
            try:
                batch.commit(self.socket())
            except (StateMismatch, NetlinkError) as error:
                # The new one was not left before, or the kernel has no such rules: connections end by themselves then.
                log.debug("former addresses", old=old, new=new, error=str(error))

    def socket(self) -> NetlinkSocket:
        """The netfilter socket of the namespace."""
        if self._netlink is None:
            from knarr.network.netns import open_netlink

            self._netlink = open_netlink(self._netns, NETLINK_NETFILTER)
        return self._netlink

    @staticmethod
    def key_of(port: Port) -> tuple[str, str, int, int]:
        """Who holds a host port: protocol, host address, number, family."""
        return (
            str(port[0]),
            "" if ip_address(str(port[1] or "0.0.0.0")).is_unspecified else str(port[1]),
            int(port[2]),
            6 if ":" in str(port[3]) else 4,
        )

    def conflict(self, port: Port) -> Port | None:
        """The port that already holds this place, if any."""
        return self.ports.get(self.key_of(port))

    def change(self, added: Sequence[Port], removed: Sequence[Port]) -> None:
        """Add and remove mappings in one transaction."""
        batch = ElementBatch(self._table)
        for port in removed:
            key = self.key_of(port)
            if self.ports.get(key) == list(port):
                del self.ports[key]
                self._element(batch, port, remove=True)
        for port in added:
            key = self.key_of(port)
            if key not in self.ports:
                self.ports[key] = list(port)
                self._element(batch, port, remove=False)
        self._hairpins(batch, added, removed)
        batch.commit(self.socket())
        self._forget_flows(added, removed)

    def _forget_flows(self, added: Sequence[Port], removed: Sequence[Port]) -> None:
        """UDP flows know no end: those to a pod that is gone, or from before there was one, would go on as they were."""
        former = {(int(port[2]), str(port[3])) for port in removed if port[0] == "UDP"}
        fresh = {int(port[2]) for port in added if port[0] == "UDP"}
        if not former and not fresh:
            return
        conntrack.forget_stale(
            self.socket(),
            lambda flow: (
                (flow.target_port, flow.reply_address) in former
                or (flow.target_port in fresh and flow.reply_address == flow.target_address)
            ),
        )

    def _element(self, batch: ElementBatch, port: Port, *, remove: bool) -> None:
        protocol, host_ip, number, version = self.key_of(port)
        parts = [protocol_key(protocol), port_key(number)]
        name = f"port{version}"
        if host_ip:
            parts.insert(0, packed_address(host_ip))
            name = f"address_port{version}"
        element = Element(join(parts), value(packed_address(str(port[3])) + port_key(int(port[4]))))
        if remove:
            batch.delete(name, [element])
        else:
            batch.add(name, [element])

    def _hairpins(self, batch: ElementBatch, added: Sequence[Port], removed: Sequence[Port]) -> None:
        still = {str(port[3]) for port in self.ports.values()}
        for address in {str(port[3]) for port in added} & still:
            packed = packed_address(address)
            batch.add(f"self{6 if ':' in address else 4}", [Element(packed + packed)])
        for address in {str(port[3]) for port in removed} - still:
            packed = packed_address(address)
            batch.delete(f"self{6 if ':' in address else 4}", [Element(packed + packed)])

    def close(self) -> None:
        """Close the socket; the table stays."""
        if self._netlink is not None:
            self._netlink.close()
            self._netlink = None
