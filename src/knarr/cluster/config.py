"""What one cluster on this machine is: its name, folders, addresses and ports.

Role: every other module of `knarr.cluster` reads this and nothing else about a cluster. Written once as `cluster.json` in the
data folder by the first `knarr up`, read by every later command, so that a second `up` is the same cluster.
Several clusters live side by side: each takes the lowest free slot, and the slot decides ports and address ranges.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import json
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA_ROOT = Path("/var/lib/knarr")
STATE_ROOT = Path("/run/knarr")
CONFIG_VERSION = 1
NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,10}[a-z0-9])?")
"""Short, because the name becomes part of interface names, which the kernel limits to 15 characters."""


RESERVED = {"net", "nodes", "policy"}
"""Names that would make a cluster's first nft table another cluster's second."""


class ConfigError(Exception):
    """The cluster's configuration cannot be used; the text says why and what to do."""


@dataclass(slots=True)
class NodeConfig:
    """One node that this machine runs."""

    name: str
    ip: str = ""
    """Address that the other nodes and the API server reach; "" for the first node means the host's own address."""
    netns: str = ""
    """Name of the network namespace that is this node's host; "" is the machine's own."""
    taints: list[dict[str, str]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    stopped: bool = False
    """Stopped by `knarr node stop`: kept, but not started with the cluster."""


@dataclass(slots=True)
class ClusterConfig:
    """A cluster as stored in `cluster.json`."""

    name: str
    slot: int
    """0 for the first cluster on this machine; decides every default below."""
    data_dir: str
    storage: str = ""
    """Store address; "" means the embedded SQLite file in data_dir."""
    api_port: int = 6443
    kubelet_port: int = 10250
    service_cidr: str = "10.96.0.0/16"
    pod_cidr: str = "10.244.0.0/16"
    """Both: one range, or with a comma one for each family, IPv4 first, since node addresses are."""
    node_cidr: str = "172.29.0.0/24"
    """Addresses of further nodes on this machine; the first is the bridge between them."""
    node_ports: tuple[int, int] = (30000, 32767)
    cluster_domain: str = "cluster.local"
    oci_runtime: str = "runc"
    controllers: str = "*"
    apiserver_arguments: list[str] = field(default_factory=list)
    """NAME=VALUE options of the API server beyond what the cluster itself decides."""
    server: str = ""
    """Address of the API server (https://HOST:PORT) when this machine joined a cluster that runs elsewhere; "" when it runs here."""
    tls_names: list[str] = field(default_factory=list)
    """Further names and addresses under which the API server is reached, for its certificate."""
    controller_arguments: list[str] = field(default_factory=list)
    """NAME=VALUE options of the controllers."""
    balancer_range: str = ""
    """Networks and ranges for LoadBalancer Services, separated by commas; "" decides by the slot."""
    announce: str = ""
    """Interface to whose network LoadBalancer addresses are announced, "auto" for the one that leads there, "" for none."""
    dns_upstreams: list[str] = field(default_factory=list)
    """Servers for names outside the cluster; none means those of the host."""
    stub_domains: dict[str, list[str]] = field(default_factory=dict)
    """Domains with DNS servers of their own."""
    pod_network: str = "auto"
    """ "auto": the built-in one unless there is another network's configuration; "cni": another one, for which nodes wait."""
    cni_conf_dir: str = "/etc/cni/net.d"
    """Where another network's configuration is looked for, which then makes the pods' network."""
    cni_bin_dirs: list[str] = field(default_factory=lambda: ["/opt/cni/bin", "/usr/lib/cni"])
    autopath: bool = False
    """Whether the DNS server walks through search paths for the pods."""
    direct_path: bool = True
    """Whether packets between pods may pass by the IP stack of their node, where its kernel can."""
    credential_provider_config: str = ""
    """File or folder that says which plugins give nodes credentials for images; "" for none."""
    credential_provider_bin_dir: str = ""
    """Folder with those plugins."""
    machine_node: str = ""
    """Of the cluster joined: the node that is the control machine itself."""
    machine_cidr: str = ""
    """Of the cluster joined: addresses of further nodes on the control machine, which are reached through machine_node."""
    tunnel_id: int = 0
    """VXLAN id of the cluster joined; 0 decides by the slot."""
    nodes: list[NodeConfig] = field(default_factory=list)

    @property
    def data(self) -> Path:
        return Path(self.data_dir)

    @property
    def state(self) -> Path:
        """Sockets, pid files and namespaces: gone after a reboot, removed by `down`."""
        return STATE_ROOT / self.name

    @property
    def pki(self) -> Path:
        return self.data / "pki"

    @property
    def logs(self) -> Path:
        return self.data / "logs"

    @property
    def store_url(self) -> str:
        return self.storage or f"sqlite://{self.data / 'store' / 'knarr.db'}"

    @property
    def service_cidrs(self) -> tuple[str, ...]:
        return tuple(self.service_cidr.split(","))

    @property
    def pod_cidrs(self) -> tuple[str, ...]:
        return tuple(self.pod_cidr.split(","))

    def address(self, offset: int) -> str:
        """The service address at an offset of the (first) range: 1 is the API server, 10 the DNS."""
        return str(ipaddress.ip_network(self.service_cidrs[0])[offset])

    @property
    def balancer_pool(self) -> tuple[str, ...]:
        """Networks and ranges of LoadBalancer Services; this machine reaches them."""
        if self.balancer_range:
            return tuple(self.balancer_range.split(","))
        second = (f"fd4b:6e61:7272:{self.slot}::/112",) if len(self.service_cidrs) > 1 else ()
        return (f"172.29.{128 + self.slot}.0/24", *second)

    @property
    def dual_stack(self) -> bool:
        return len(self.pod_cidrs) > 1

    @property
    def node_cidr6(self) -> str:
        """IPv6 addresses of further nodes on this machine, when there are two families."""
        return f"fd4b:6e61:7272:{0x100 + self.slot:x}::/64"

    @property
    def tunnel(self) -> int:
        """VXLAN id, the same on all machines of a cluster."""
        return self.tunnel_id or 4040 + self.slot

    @property
    def joined(self) -> bool:
        """Whether the control plane is on another machine."""
        return bool(self.server)

    @property
    def kubelet_file(self) -> Path:
        """The KubeletConfiguration of all nodes of this machine; it need not exist."""
        return self.data / "kubelet-config.yaml"

    @property
    def scheduler_file(self) -> Path:
        """The scheduler's KubeSchedulerConfiguration; it need not exist."""
        return self.data / "scheduler-config.yaml"

    def client_certificate(self, node_name: str) -> Path:
        """Where a node that joined keeps its client certificate with its key."""
        return self.data / "nodes" / node_name / "pki" / "kubelet-client-current.pem"

    @property
    def dns_ip(self) -> str:
        return self.address(10)

    @property
    def suffix(self) -> str:
        """Appended to the names of host objects (interfaces, tables, cgroups); empty for the first cluster."""
        return "" if self.name == "default" else f"-{self.name}"

    @property
    def context(self) -> str:
        """Name of the kubeconfig context, cluster and user."""
        return "knarr" + self.suffix

    def save(self) -> None:
        """Write `cluster.json` so that a crash leaves the old or the new one, never half."""
        self.data.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": CONFIG_VERSION, **dataclasses.asdict(self)}, indent=1)
        temporary = self.data / ".cluster.json.new"
        temporary.write_text(text)
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(self.data / "cluster.json")
        link = DATA_ROOT / self.name
        if self.data != link and not link.exists():
            # `--data-dir` moves the state; the link lets later commands find it by the cluster's name alone.
            DATA_ROOT.mkdir(parents=True, exist_ok=True)
            link.unlink(missing_ok=True)  # one that points to data long gone
            link.symlink_to(self.data)


def load(name: str, data_dir: str | None = None) -> ClusterConfig | None:
    """The stored cluster of that name, None when there is none. Raises ConfigError on a file that cannot be read."""
    folder = Path(data_dir) if data_dir else DATA_ROOT / name
    try:
        raw = json.loads((folder / "cluster.json").read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read {folder / 'cluster.json'}: {error}") from error
    if raw.pop("version", None) != CONFIG_VERSION:
        raise ConfigError(f"{folder / 'cluster.json'} was written by another version of knarr; `knarr delete` removes it")
    raw["nodes"] = [NodeConfig(**_known(NodeConfig, node)) for node in raw["nodes"]]
    raw["node_ports"] = tuple(raw["node_ports"])
    return ClusterConfig(**_known(ClusterConfig, raw))


def _known(kind: type, raw: dict[str, Any]) -> dict[str, Any]:
    """The fields that this version has: one cluster of another version must not stop the others."""
    names = {item.name for item in dataclasses.fields(kind)}
    return {name: value for name, value in raw.items() if name in names}


def known_clusters() -> list[ClusterConfig]:
    """Every cluster that has data on this machine, by name."""
    if not DATA_ROOT.is_dir():
        return []
    found = [load(entry.name) for entry in sorted(DATA_ROOT.iterdir()) if (entry / "cluster.json").is_file()]
    return [config for config in found if config is not None]


def _unused(port: int) -> bool:
    """Nobody listens there: clusters of other machines' file systems (a chroot, a container) may share this network."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("0.0.0.0", port))
        except OSError:
            return False
    return True


def new_cluster(name: str, data_dir: str | None, *, nodes: int = 1, storage: str = "", oci_runtime: str = "runc") -> ClusterConfig:
    """Defaults for a cluster that does not exist yet. Raises ConfigError on a bad name or when no slot is free."""
    if not NAME.fullmatch(name):
        raise ConfigError(f"cluster name {name!r} must be 1 to 12 lower-case letters, digits and '-', starting with a letter or digit")
    if name in RESERVED:
        raise ConfigError(f"cluster name {name!r} is reserved")
    taken = {config.slot for config in known_clusters() if config.name != name}
    if name == "default":
        slot = 0
    else:
        slot = next((number for number in range(1, 11) if number not in taken and _unused(6443 + number) and _unused(10250 + 20 * number)), -1)
        if slot < 0:
            raise ConfigError("ten clusters exist already, or other programs have their ports; `knarr delete --name NAME` frees one")
    config = ClusterConfig(name=name, slot=slot, data_dir=os.path.abspath(data_dir) if data_dir else str(DATA_ROOT / name), storage=storage, oci_runtime=oci_runtime)
    if slot:
        config.api_port = 6443 + slot
        config.kubelet_port = 10250 + 20 * slot
        config.service_cidr = f"10.{96 + slot}.0.0/16"
        config.pod_cidr = f"10.{244 + slot}.0.0/16"
        config.node_cidr = f"172.29.{slot}.0/24"
        config.node_ports = (20000 + 1000 * (slot - 1), 20999 + 1000 * (slot - 1))
    prefix = "" if name == "default" else name + "-"
    hosts = ipaddress.ip_network(config.node_cidr)
    for number in range(1, nodes + 1):
        config.nodes.append(NodeConfig(f"{prefix}node-{number}") if number == 1 else further_node(config, f"{prefix}node-{number}", str(hosts[number])))
    return config


def further_node(config: ClusterConfig, name: str, ip: str) -> NodeConfig:
    """A node that is a host of its own on this machine: its network namespace carries its address."""
    return NodeConfig(name, ip=ip, netns=f"knarr{config.suffix}-{name}")
