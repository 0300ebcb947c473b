"""The proxy's nf_tables table: its fixed skeleton, and the few chains that pick among N endpoints.

Role: `ruleset` writes both. One shared set of maps serves all Services:

    service  (address . protocol . port) -> chain            what is asked for; also who has no endpoint and is refused
    endpoint (address . protocol . port . index) -> address . port
    local    the same, only this node's endpoints
    port, port_endpoint, port_local                          node ports: the same without the address

A chain exists per number of endpoints and manner (`Pick`), not per Service: it draws an index below N and goes where
the map says. Session affinity is one dynamic map from client and frontend to endpoint: read before drawing, written
(and its time renewed) in a hook behind the translation, where the packet itself names the chosen endpoint. The rules of
these chains are encoded here, so that chains and elements change in one transaction, and because nft's language has no
concatenation with a tracked connection's original port. `nft list` shows all of them.
Every base chain is of type nat, where the kernel asks only for the first packet of a connection: sources that may not
come and Services without endpoints are judged there, too, so that all further packets pass no rule of this table.
Invariants: names depend on content alone, so a chain that exists is the right one.
Source: behaviour of pkg/proxy/nftables/proxier.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import ip_network

from knarr.network.expressions import (
    CT_DESTINATION,
    CT_PROTO_DESTINATION,
    CT_SOURCE,
    DROP,
    GOTO,
    META_L4PROTO,
    RETURN,
    Family,
    R,
    add_chain,
    add_rule,
    destination_is_local,
    dnat,
    lookup,
    mark,
    meta_load,
    numgen,
    original,
    payload,
    unmark,
    update,
    verdict,
)
from knarr.network.nftables import ElementBatch

MASQUERADE_MARK = 0x4000
AFFINITY_MARK = 0x2000
SKELETON_VERSION = 5
_FAMILIES = ((4, "ip", "ipv4_addr", "0.0.0.0"), (6, "ip6", "ipv6_addr", "::"))


@dataclass(frozen=True, slots=True)
class Pick:
    """One manner of choosing: the name of the chain says it all.

    Attributes:
      family: 4 or 6.
      node_port: keyed without address.
      cluster: how many endpoints cluster-wide; 0 when unused.
      local: how many on this node; None when the traffic policy is not Local.
      masquerade: hide the client's address (external traffic under the Cluster policy).
      affinity_seconds: 0 is off.
    """

    family: int
    node_port: bool
    cluster: int
    local: int | None = None
    masquerade: bool = False
    affinity_seconds: int = 0

    @property
    def name(self) -> str:
        """The chain's name."""
        name = f"{'port' if self.node_port else 'pick'}{self.family}-{self.cluster}"
        if self.local is not None:
            name += f"-local{self.local}"
        if self.masquerade:
            name += "-masq"
        if self.affinity_seconds:
            name += f"-aff{self.affinity_seconds}"
        return name


def skeleton(table: str, pod_cidrs: Sequence[str], node_port_addresses: Sequence[str] = ()) -> str:
    """The table's script: sets, maps, base chains. Replaces an older table of that name."""
    out = [f"table inet {table} {{}}", f"delete table inet {table}", f"table inet {table} {{", f" chain {version_chain(pod_cidrs)} {{ }}"]
    for version, ip, kind, _zero in _FAMILIES:
        cidrs = [cidr for cidr in pod_cidrs if ip_network(cidr).version == version]
        elements = f"elements = {{ {', '.join(cidrs)} }};" if cidrs else ""
        frontend, port = f"{kind} . inet_proto . inet_service", "inet_proto . inet_service"
        typed, typed_port = f"typeof {ip} daddr . meta l4proto . th dport", "typeof meta l4proto . th dport"
        target, index = f"{ip} daddr . th dport", "numgen random mod 2"
        dynamic = "size 262144; flags dynamic,timeout;"
        out += [
            f" set pods{version} {{ type {kind}; flags interval; auto-merge; {elements} }}",
            f" set cluster_ip{version} {{ type {kind}; }}",
            f" set hairpin{version} {{ type {kind} . {kind}; }}",
            f" set limited{version} {{ type {frontend}; }}",
            f" set allowed{version} {{ type {frontend} . {kind}; flags interval; }}",
            f" map service{version} {{ type {frontend} : verdict; }}",
            f" map port{version} {{ type {port} : verdict; }}",
            f" map endpoint{version} {{ {typed} . {index} : {target}; }}",
            f" map local{version} {{ {typed} . {index} : {target}; }}",
            f" map port_endpoint{version} {{ {typed_port} . {index} : {target}; }}",
            f" map port_local{version} {{ {typed_port} . {index} : {target}; }}",
            f" map affinity{version} {{ typeof {ip} saddr . {ip} daddr . meta l4proto . th dport : {target}; {dynamic} }}",
            f" map sticky{version} {{ type {frontend} : verdict; }}",
            f" map port_sticky{version} {{ type {port} : verdict; }}",
        ]
    for name, end in (("refuse", "reject"), ("lose", "drop")):
        out.append(f" chain {name} {{ {end}; }}")
        out.append(f" chain {name}_port {{ fib daddr type != local return; {end}; }}")
    out.append(" chain services {")
    for version, ip, _kind, _zero in _FAMILIES:
        frontend = f"{ip} daddr . meta l4proto . th dport"
        out += [
            f"  {frontend} @limited{version} {frontend} . {ip} saddr != @allowed{version} drop",
            f"  {ip} daddr @cluster_ip{version} {ip} saddr != @pods{version} meta mark set meta mark or 0x4000",
            f"  {frontend} vmap @service{version}",
            f"  {ip} daddr @cluster_ip{version} reject",
        ]
    for version, ip, _kind, _zero in _FAMILIES:
        cidrs = [cidr for cidr in node_port_addresses if ip_network(cidr).version == version]
        restriction = f" {ip} daddr {{ {', '.join(cidrs)} }}" if cidrs else ""
        family = "ipv4" if version == 4 else "ipv6"
        # Whether the address is the node's own is asked behind the map: few connections are to a port that is in it.
        out.append(f"  meta nfproto {family}{restriction} meta l4proto . th dport vmap @port{version}")
    out.append(" }")
    out.append(_BASE_CHAINS)
    out.append("}")
    return "\n".join(out) + "\n"


_BASE_CHAINS = """ chain nat_in {
  type nat hook prerouting priority dstnat; policy accept;
  jump services
 }
 chain nat_output {
  type nat hook output priority -100; policy accept;
  jump services
 }
 chain learn_in {
  type nat hook input priority 90; policy accept;
  meta mark & 0x2000 != 0 jump learn
 }
 chain learn_out {
  type nat hook postrouting priority srcnat - 10; policy accept;
  meta mark & 0x2000 != 0 jump learn
 }
 chain learn {
 }
 chain nat_out {
  type nat hook postrouting priority srcnat; policy accept;
  oif "lo" return
  meta mark & 0x4000 != 0 jump hide
  ct status dnat ip saddr . ip daddr @hairpin4 masquerade fully-random
  ct status dnat ip6 saddr . ip6 daddr @hairpin6 masquerade fully-random
 }
 chain hide {
  meta mark set meta mark xor 0x4000
  masquerade fully-random
 }"""


def version_chain(pod_cidrs: Sequence[str]) -> str:
    """Name of an empty chain that tells which skeleton a table has, so that a restart can keep a fitting one."""
    code = 0
    for cidr in pod_cidrs:
        for byte in cidr.encode():
            code = (code * 131 + byte) & 0xFFFFFFFF
    return f"skeleton-{SKELETON_VERSION}-{code:08x}"


# Encoded rules


class _Registers(Family):
    """Register layout of one family: a rule's key grows from the first register on."""

    def frontend(self, at: int, node_port: bool) -> tuple[bytes, int]:
        """Load the frontend's key from register `at`; returns the code and the next free register."""
        code = b""
        if not node_port:
            code = self.target(at)
            at += self.words
        return code + meta_load(META_L4PROTO, at) + payload(2, 2, 2, at + 1), at + 2

    def client(self, at: int) -> tuple[bytes, int]:
        """Load the client's address; returns the code and the next free register."""
        return self.source(at), at + self.words


def _choose(pick: Pick, registers: _Registers, map_name: str, count: int, target: int) -> bytes:
    """Code that leaves a drawn endpoint (address, port) at register `target`."""
    code, free = registers.frontend(R, pick.node_port)
    return registers.only() + code + numgen(count, free) + lookup(map_name, R, target)


def _pick_rules(pick: Pick, map_name: str, count: int) -> list[bytes]:
    registers = _Registers(pick.family)
    words = registers.words
    if not count:
        return [verdict(DROP)]
    draw = _choose(pick, registers, map_name, count, R) + dnat(pick.family, R, R + words)
    if not pick.affinity_seconds:
        return [draw]
    client, after = registers.client(R)
    frontend, _free = registers.frontend(after, False)
    remembered = registers.only() + client + frontend + lookup(f"affinity{pick.family}", R, R) + dnat(pick.family, R, R + words)
    # A look-up without result ends its rule, not the chain.
    return [mark(AFFINITY_MARK), remembered, draw]


def learn_name(family: int, seconds: int) -> str:
    """Chain that remembers a client's endpoint for so long."""
    return f"learn{family}-{seconds}"


def _original_frontend(registers: _Registers, at: int, *, address: bool) -> tuple[bytes, int]:
    code = b""
    if address:
        code = original(CT_DESTINATION[registers.version], at)
        at += registers.words
    return code + meta_load(META_L4PROTO, at) + original(CT_PROTO_DESTINATION, at + 1), at + 2


def add_learning(batch: ElementBatch, table: str) -> None:
    """Complete a fresh skeleton: the rules that find how long a frontend's clients are remembered."""
    for family in (4, 6):
        registers = _Registers(family)
        for prefix, address in (("", True), ("port_", False)):
            key, _free = _original_frontend(registers, R, address=address)
            add_rule(batch, table, "learn", registers.only() + key + lookup(f"{prefix}sticky{family}", R, 0))


def add_learn_chain(batch: ElementBatch, table: str, family: int, seconds: int) -> None:
    """Add the chain that remembers: (client, frontend) as first sent, the endpoint as the packet says now."""
    registers = _Registers(family)
    name = learn_name(family, seconds)
    client = original(CT_SOURCE[family], R)
    frontend, data = _original_frontend(registers, R + registers.words, address=True)
    chosen = payload(1, registers.target_offset, registers.length, data) + payload(2, 2, 2, data + registers.words)
    add_chain(batch, table, name)
    # Taken off only here: the mark may be another cluster's, whose own table comes after ours.
    add_rule(batch, table, name, unmark(AFFINITY_MARK))
    add_rule(batch, table, name, registers.only() + client + frontend + chosen + update(f"affinity{family}", R, data, seconds))


def _rules(pick: Pick) -> list[bytes]:
    prefix = "port_" if pick.node_port else ""
    if pick.local is None:
        rules = _pick_rules(pick, f"{prefix}endpoint{pick.family}", pick.cluster)
        return [mark(MASQUERADE_MARK), *rules] if pick.masquerade else rules
    registers = _Registers(pick.family)
    rules = []
    if pick.cluster:
        everywhere = Pick(pick.family, pick.node_port, pick.cluster, None, False, pick.affinity_seconds)
        client, _after = registers.client(R)
        # Pods and the node itself need no load balancer before them: they reach all endpoints.
        rules.append(registers.only() + client + lookup(f"pods{pick.family}", R) + verdict(GOTO, everywhere.name))
        rules.append(destination_is_local(source=True) + mark(MASQUERADE_MARK) + verdict(GOTO, everywhere.name))
    return rules + _pick_rules(pick, f"{prefix}local{pick.family}", pick.local)


def needed(pick: Pick) -> list[Pick]:
    """The pick and what its rules go to, in the order in which they must be made."""
    if pick.local is not None and pick.cluster:
        return [Pick(pick.family, pick.node_port, pick.cluster, None, False, pick.affinity_seconds), pick]
    return [pick]


def add_pick_chain(batch: ElementBatch, table: str, pick: Pick) -> None:
    """Add a pick's chain with its rules to a batch."""
    add_chain(batch, table, pick.name)
    if pick.node_port:
        add_rule(batch, table, pick.name, destination_is_local(opposite=True) + verdict(RETURN))
    for rule in _rules(pick):
        add_rule(batch, table, pick.name, rule)
