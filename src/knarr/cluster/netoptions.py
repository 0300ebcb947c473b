"""`knarr up`'s options of the network: ranges of addresses and ports, announcement, DNS.

Role: the command line reads them here, `lifecycle.up` applies them to a cluster's configuration.
Invariants: ranges are settled with a cluster's first start, because objects and nodes hold addresses of them; the others may
change whenever the cluster is down.
Source: options of kube-apiserver and kube-controller-manager of the same names.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from ipaddress import ip_address, ip_network

from knarr.cluster.config import ClusterConfig, ConfigError
from knarr.network import pool

_SMALLEST_SERVICE_BITS = 5
"""Host bits that a range of services needs at least: its tenth address is the DNS service."""


@dataclass(frozen=True, slots=True)
class NetworkOptions:
    """What was asked for; None keeps what the cluster has."""

    service_cidr: str | None = None
    pod_cidr: str | None = None
    node_ports: str | None = None
    balancer_pool: str | None = None
    announce: str | None = None
    autopath: bool | None = None
    pod_network: str | None = None
    cni_conf_dir: str | None = None
    cni_bin_dirs: str | None = None
    dns_upstreams: str | None = None
    stub_domains: tuple[str, ...] = ()
    """DOMAIN=SERVER[,SERVER] each; an empty text takes all of them back."""
    direct_path: bool | None = None

def read(options: argparse.Namespace) -> NetworkOptions:
    """The parsed options."""
    return NetworkOptions(
        options.service_cidr, options.pod_cidr, options.node_port_range, options.load_balancer_pool, options.announce, options.dns_autopath,
        options.pod_network, options.cni_conf_dir, options.cni_bin_dir, options.dns_upstream, tuple(options.dns_stub_domain),
        options.direct_path,
    )  # fmt: skip


def apply(config: ClusterConfig, options: NetworkOptions, *, fresh: bool) -> bool:
    """Change a configuration; returns whether anything is other than before.

    Raises:
      ConfigError: something cannot be, or can only be for a new cluster.
    """
    before = (config.service_cidr, config.pod_cidr, config.node_ports)
    others = _changeable(config)
    if options.service_cidr is not None:
        config.service_cidr = _ranges("--service-cidr", options.service_cidr, {4: 32 - _SMALLEST_SERVICE_BITS, 6: 128 - _SMALLEST_SERVICE_BITS})
    if options.pod_cidr is not None:
        config.pod_cidr = _ranges("--pod-cidr", options.pod_cidr, {4: 24, 6: 64})
    if options.node_ports is not None:
        config.node_ports = _ports(options.node_ports)
    if not fresh and (config.service_cidr, config.pod_cidr, config.node_ports) != before:
        raise ConfigError(f"cluster {config.name!r} exists with other ranges of addresses or ports; `knarr delete` first to change them")
    if options.balancer_pool is not None:
        try:
            pool.parse(options.balancer_pool.split(","))
        except ValueError as error:
            raise ConfigError(f"--load-balancer-pool: {error}") from error
        config.balancer_range = options.balancer_pool
    if options.announce is not None:
        config.announce = "" if options.announce == "off" else options.announce
    if options.autopath is not None:
        config.autopath = options.autopath
    if options.direct_path is not None:
        config.direct_path = options.direct_path
    if options.pod_network is not None:
        config.pod_network = options.pod_network
    if options.cni_conf_dir is not None:
        config.cni_conf_dir = os.path.abspath(options.cni_conf_dir)
    if options.cni_bin_dirs is not None:
        config.cni_bin_dirs = [os.path.abspath(part) for part in options.cni_bin_dirs.split(",")]
    if options.dns_upstreams is not None:
        config.dns_upstreams = _servers("--dns-upstream", options.dns_upstreams) if options.dns_upstreams else []
    if options.stub_domains:
        config.stub_domains = dict(_stub_domain(text) for text in options.stub_domains if text)
    _check_together(config)
    return fresh or others != _changeable(config)


def _changeable(config: ClusterConfig) -> tuple[object, ...]:
    dns = config.autopath, tuple(config.dns_upstreams), tuple((name, tuple(servers)) for name, servers in config.stub_domains.items())
    network = config.pod_network, config.cni_conf_dir, tuple(config.cni_bin_dirs), config.direct_path
    return config.balancer_range, config.announce, network, dns


def _servers(name: str, text: str) -> list[str]:
    try:
        return [str(ip_address(part.strip())) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error


def _stub_domain(text: str) -> tuple[str, list[str]]:
    domain, equals, servers = text.partition("=")
    if not equals or not domain.strip("."):
        raise ConfigError(f"--dns-stub-domain {text!r}: expected DOMAIN=SERVER[,SERVER], for example corp.example=10.0.0.53")
    return domain.strip(".").lower(), _servers("--dns-stub-domain", servers)


def _ranges(name: str, text: str, longest: dict[int, int]) -> str:
    try:
        networks = [ip_network(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
    if [network.version for network in networks] not in ([4], [4, 6]):
        raise ConfigError(f"{name} {text!r}: expected one IPv4 range, or one and an IPv6 range behind a comma")
    for network in networks:
        if network.prefixlen > longest[network.version]:
            raise ConfigError(f"{name}: {network} is too small, at least a /{longest[network.version]} is needed")
    return ",".join(map(str, networks))


def _ports(text: str) -> tuple[int, int]:
    first, _dash, last = text.partition("-")
    if not (first.isdigit() and last.isdigit() and 0 < int(first) <= int(last) < 65536):
        raise ConfigError(f"--node-port-range {text!r}: expected FIRST-LAST, for example 30000-32767")
    return int(first), int(last)


def _check_together(config: ClusterConfig) -> None:
    if len(config.pod_cidrs) != len(config.service_cidrs):
        raise ConfigError("--pod-cidr and --service-cidr must both have one family, or both have two")
    ranges = {"pods": config.pod_cidrs, "Services": config.service_cidrs, "load balancers": pool.networks(config.balancer_pool), "nodes": (config.node_cidr,)}
    found = [(use, ip_network(text)) for use, texts in ranges.items() for text in texts]
    for index, (use, network) in enumerate(found):
        for other, second in found[index + 1 :]:
            if use != other and network.overlaps(second):
                raise ConfigError(f"the addresses of {use} ({network}) and of {other} ({second}) overlap")
