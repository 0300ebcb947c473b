"""Further nodes on this machine: each is a host of its own, in a network namespace with an address on a bridge between them.

Role: makes and removes what a node needs of the host before its process starts; the process then enters the namespace for good
(`enter`). The first node is the machine itself and needs nothing. Everything carries the cluster's mark, so that `host.clean`
finds it.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import subprocess
from pathlib import Path

from knarr.cluster import addresses
from knarr.cluster.config import ClusterConfig, ConfigError, NodeConfig, further_node
from knarr.network import netns
from knarr.network.sysctl import SysctlRecord

CLONE_NEWNET, CLONE_NEWUTS = 0x40000000, 0x04000000
NETNS_FOLDER = Path("/run/netns")


def node_address(config: ClusterConfig, node: NodeConfig) -> str:
    """The address under which the cluster knows a node."""
    return node.ip or addresses.primary_address() or gateway(config)


def second_address(config: ClusterConfig, node: NodeConfig) -> str:
    """The node's IPv6 address; "" in a cluster of one family, and for a machine that has none."""
    if not config.dual_stack:
        return ""
    if node.netns:
        return str(ipaddress.ip_network(config.node_cidr6)[_index(config, node)])
    return addresses.primary_address6() or (gateway6(config) if needs_bridge(config) else "")


def _index(config: ClusterConfig, node: NodeConfig) -> int:
    """Which of the addresses of further nodes is this one's."""
    return int(ipaddress.ip_address(node.ip)) - int(ipaddress.ip_network(config.node_cidr)[0])


def gateway6(config: ClusterConfig) -> str:
    """As `gateway`, of the second family."""
    return str(ipaddress.ip_network(config.node_cidr6)[-2])


def gateway(config: ClusterConfig) -> str:
    """This machine's address on the bridge between further nodes."""
    return str(ipaddress.ip_network(config.node_cidr)[-2])


def bridge_name(config: ClusterConfig) -> str:
    return f"knarr-n{config.slot}"


def needs_bridge(config: ClusterConfig) -> bool:
    """Further nodes need it, and so does a machine without any address of its own."""
    return any(node.netns for node in config.nodes) or not addresses.primary_address()


def _ip(*arguments: str) -> None:
    command = ["ip", *arguments]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise OSError(f"{' '.join(command)}: {result.stderr.strip()}")


def ensure_bridge(config: ClusterConfig) -> None:
    """Make the bridge between nodes, with masquerading for what they send to the outside. Idempotent."""
    name = bridge_name(config)
    network = ipaddress.ip_network(config.node_cidr)
    if not Path("/sys/class/net", name).exists():
        _ip("link", "add", name, "type", "bridge")
        _ip("link", "set", name, "alias", f"knarr:{config.name}")
        _ip("address", "add", f"{gateway(config)}/{network.prefixlen}", "dev", name, "noprefixroute")
        _ip("link", "set", name, "up")
        _ip("route", "add", str(network), "dev", name, "src", gateway(config), "metric", "10")
        if config.dual_stack:
            _ip("address", "add", f"{gateway6(config)}/64", "dev", name, "nodad")
        prefer_primary(config)
    SysctlRecord(config.data / "sysctls.json").ensure("net/ipv4/ip_forward", "1")
    table = f"knarr{config.suffix}-nodes"
    rules = f"""
add table ip {table}
delete table ip {table}
add table ip {table}
add chain ip {table} leave {{ type nat hook postrouting priority 100; policy accept; }}
add rule ip {table} leave ip saddr {network} ip daddr != {network} ip daddr != {config.pod_cidrs[0]} oifname != "{name}" masquerade
"""
    if config.dual_stack:
        rules += f"""
add table ip6 {table}
delete table ip6 {table}
add table ip6 {table}
add chain ip6 {table} leave {{ type nat hook postrouting priority 100; policy accept; }}
add rule ip6 {table} leave ip6 saddr {config.node_cidr6} ip6 daddr != {config.node_cidr6} ip6 daddr != {config.pod_cidrs[1]} oifname != "{name}" masquerade
"""
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True, capture_output=True)


def prefer_primary(config: ClusterConfig) -> None:
    """Let other nodes see the address under which the cluster knows this one. Idempotent; nothing without a bridge.

    Should the machine lose the address, the bridge's other route stays.
    """
    name = bridge_name(config)
    if (primary := addresses.primary_address()) and Path("/sys/class/net", name).exists():
        _ip("route", "replace", str(ipaddress.ip_network(config.node_cidr)), "dev", name, "src", primary, "metric", "5")


def ensure_host(config: ClusterConfig, node: NodeConfig) -> None:
    """Make a further node's namespace and its link to the bridge. Idempotent; nothing for the first node.

    Raises:
      OSError: the kernel refused, with the command.
    """
    if not node.netns:
        return
    ensure_bridge(config)
    path = NETNS_FOLDER / node.netns
    if not path.exists():
        netns.create_named(node.netns)
    outer = f"knn{config.slot}-{_index(config, node)}"
    inside = ["-n", node.netns]
    if not Path("/sys/class/net", outer).exists():
        _ip("link", "add", outer, "type", "veth", "peer", "name", "eth0", "netns", node.netns)
        _ip("link", "set", outer, "alias", f"knarr:{config.name}")
        _ip("link", "set", outer, "master", bridge_name(config), "up")
        # With br_netfilter a packet that this machine sends back where it came from (a node's pod asks a node port here and is given a pod of its own node)
        # is switched, not routed, and a bridge does not switch to the port of origin unless told so.
        _ip("link", "set", outer, "type", "bridge_slave", "hairpin", "on")
        prefix = ipaddress.ip_network(config.node_cidr).prefixlen
        _ip(*inside, "link", "set", "lo", "up")
        _ip(*inside, "address", "add", f"{node.ip}/{prefix}", "dev", "eth0")
        _ip(*inside, "link", "set", "eth0", "up")
        _ip(*inside, "route", "add", "default", "via", gateway(config))
        if config.dual_stack:
            _ip(*inside, "address", "add", f"{second_address(config, node)}/64", "dev", "eth0", "nodad")
            _ip(*inside, "route", "add", "default", "via", gateway6(config))


def enter(node: NodeConfig) -> None:
    """Put this process, before it has threads, into the node's network namespace, under the node's name.

    Pods on the host's network show the host name that the Node object tells. Mounts stay shared with the machine: sysfs therefore shows the
    machine's devices, and what needs a node's own asks netlink.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if os.uname().nodename.lower() != node.name and libc.unshare(CLONE_NEWUTS) == 0:
        socket.sethostname(node.name)
    if not node.netns:
        return
    descriptor = os.open(NETNS_FOLDER / node.netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            error = ctypes.get_errno()
            raise OSError(error, f"cannot enter {node.netns}: {os.strerror(error)}")
    finally:
        os.close(descriptor)


def add_node(config: ClusterConfig, name: str | None = None) -> NodeConfig:
    """Append a further node to the cluster's configuration and save it.

    Raises:
      ConfigError: the name is taken or the address range is full.
    """
    taken = {node.name for node in config.nodes}
    prefix = "" if config.name == "default" else config.name + "-"
    number = 2
    while name is None and f"{prefix}node-{number}" in taken:
        number += 1
    wanted = name or f"{prefix}node-{number}"
    if wanted in taken:
        raise ConfigError(f"there is a node {wanted!r} already")
    used = {node.ip for node in config.nodes} | {gateway(config)}
    free = next((str(address) for address in list(ipaddress.ip_network(config.node_cidr).hosts())[1:] if str(address) not in used), None)
    if free is None:
        raise ConfigError(f"no address is left in {config.node_cidr}")
    node = further_node(config, wanted, free)
    config.nodes.append(node)
    config.save()
    return node

