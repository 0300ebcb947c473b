"""Options of the network: what is taken, and what is told when it cannot be."""

from __future__ import annotations

from ipaddress import ip_address
from pathlib import Path

import pytest

from knarr.cluster import config as cluster_config
from knarr.cluster import netoptions, nodes, tokens
from knarr.cluster.config import ClusterConfig, ConfigError
from knarr.cluster.netoptions import NetworkOptions
from knarr.network import pool


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ClusterConfig:
    monkeypatch.setattr(cluster_config, "DATA_ROOT", tmp_path / "root")
    return cluster_config.new_cluster("default", str(tmp_path / "data"))


def test_ranges_of_two_families_are_kept_and_decide_what_follows_from_them(config: ClusterConfig) -> None:
    wanted = NetworkOptions(service_cidr="10.30.0.0/20,fd30::/112", pod_cidr="10.40.0.0/16, fd40::/56", node_ports="31000-31999")
    assert netoptions.apply(config, wanted, fresh=True)
    assert config.address(1) == "10.30.0.1"
    assert config.dns_ip == "10.30.0.10"
    assert config.pod_cidrs == ("10.40.0.0/16", "fd40::/56")
    assert config.node_ports == (31000, 31999)
    assert config.balancer_pool == ("172.29.128.0/24", "fd4b:6e61:7272::/112") or len(config.balancer_pool) == 2
    config.save()
    assert cluster_config.load("default", config.data_dir) == config
    # The same again is no change, another range is refused, the pool may change.
    assert not netoptions.apply(config, wanted, fresh=False)
    with pytest.raises(ConfigError, match="delete"):
        netoptions.apply(config, NetworkOptions(node_ports="30000-32767"), fresh=False)
    config.node_ports = (31000, 31999)
    assert netoptions.apply(config, NetworkOptions(balancer_pool="192.0.2.240-192.0.2.250", announce="auto"), fresh=False)
    assert config.announce == "auto"
    assert netoptions.apply(config, NetworkOptions(announce="off"), fresh=False)
    assert netoptions.apply(config, NetworkOptions(pod_network="cni"), fresh=False)
    assert tokens.settings(config)["podNetwork"] == "cni"
    assert config.announce == ""


def test_dns_servers_are_kept_and_taken_back(config: ClusterConfig) -> None:
    assert netoptions.apply(config, NetworkOptions(dns_upstreams="192.0.2.53, fd00::53", stub_domains=("Corp.Example.=10.0.0.53,10.0.0.54",)), fresh=False)
    assert (config.dns_upstreams, config.stub_domains) == (["192.0.2.53", "fd00::53"], {"corp.example": ["10.0.0.53", "10.0.0.54"]})
    config.save()
    assert cluster_config.load("default", config.data_dir) == config
    assert not netoptions.apply(config, NetworkOptions(), fresh=False)
    assert netoptions.apply(config, NetworkOptions(dns_upstreams="", stub_domains=("",)), fresh=False)
    assert (config.dns_upstreams, config.stub_domains) == ([], {})


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (NetworkOptions(dns_upstreams="resolver"), "--dns-upstream"),
        (NetworkOptions(stub_domains=("corp.example",)), "DOMAIN=SERVER"),
        (NetworkOptions(service_cidr="fd30::/112"), "expected one IPv4 range"),
        (NetworkOptions(service_cidr="10.30.0.0/30"), "too small"),
        (NetworkOptions(service_cidr="10.30.0.1/20"), "host bits"),
        (NetworkOptions(pod_cidr="10.0.0.0/8"), "overlap"),
        (NetworkOptions(service_cidr="10.30.0.0/20,fd30::/112"), "both have one family"),
        (NetworkOptions(node_ports="32767-30000"), "FIRST-LAST"),
        (NetworkOptions(balancer_pool="192.0.2.9-192.0.2.1"), "not a range"),
    ],
)
def test_what_cannot_be_is_told(config: ClusterConfig, options: NetworkOptions, text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        netoptions.apply(config, options, fresh=True)


def test_pools_of_networks_and_ranges() -> None:
    made = pool.parse(["192.0.2.0/29", "192.0.2.240-192.0.2.242", "fd00::1"])
    assert [*made.candidates(4)] == [*(f"192.0.2.{n}" for n in range(1, 7)), "192.0.2.240", "192.0.2.241", "192.0.2.242"]
    assert [*made.candidates(6)] == ["fd00::1"]
    assert ip_address("192.0.2.0") not in made
    assert ip_address("192.0.2.241") in made
    assert pool.networks(["192.0.2.240-192.0.2.242", "fd00::/120"]) == ["192.0.2.240/31", "192.0.2.242/32", "fd00::/120"]


def test_nodes_have_addresses_of_both_families_only_where_the_cluster_has(config: ClusterConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    own, further = config.nodes[0], cluster_config.further_node(config, "node-2", "172.29.0.7")
    monkeypatch.setattr(nodes.addresses, "primary_address6", lambda: "fd00::2")
    assert (nodes.second_address(config, own), nodes.second_address(config, further)) == ("", "")
    netoptions.apply(config, NetworkOptions(service_cidr="10.30.0.0/20,fd30::/112", pod_cidr="10.40.0.0/16,fd40::/56"), fresh=True)
    assert nodes.second_address(config, own) == "fd00::2"
    assert nodes.second_address(config, further) == "fd4b:6e61:7272:100::7"
    # A machine without a way out by IPv6 has an address for its further nodes at least.
    monkeypatch.setattr(nodes.addresses, "primary_address6", lambda: "")
    monkeypatch.setattr(nodes.addresses, "primary_address", lambda: "192.0.2.2")
    assert nodes.second_address(config, own) == ""
    config.nodes.append(further)
    assert nodes.second_address(config, own) == nodes.gateway6(config) == "fd4b:6e61:7272:100:ffff:ffff:ffff:fffe"
