"""Settings of one kubelet. Read by every module of this package; nothing here does I/O.

Source: kubelet.config.k8s.io/v1beta1 KubeletConfiguration; names follow it in snake_case, with units.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, field

SIGNALS = (
    "memory.available",
    "nodefs.available",
    "nodefs.inodesFree",
    "imagefs.available",
    "imagefs.inodesFree",
    "containerfs.available",
    "containerfs.inodesFree",
    "pid.available",
)
"""What eviction thresholds can be set for."""


@dataclass(frozen=True, slots=True)
class EvictionConfig:
    """Node-pressure eviction. Source: pkg/kubelet/eviction."""

    hard: dict[str, str] = field(
        default_factory=lambda: {
            "memory.available": "100Mi",
            "nodefs.available": "10%",
            "nodefs.inodesFree": "5%",
            "imagefs.available": "15%",
            "imagefs.inodesFree": "5%",
        }
    )
    """Signal to threshold (quantity or percentage); crossing one evicts at once."""
    soft: dict[str, str] = field(default_factory=dict)
    """Signal to threshold that must hold for its grace period."""
    soft_grace_period_seconds: dict[str, float] = field(default_factory=dict)
    minimum_reclaim: dict[str, str] = field(default_factory=dict)
    """Signal to what must be free beyond the threshold before an eviction counts as enough."""
    max_pod_grace_period_seconds: int = 0
    """Most grace given to a pod that a soft threshold evicts."""
    pressure_transition_period_seconds: float = 300.0
    """How long a pressure condition stays after the signal is gone."""
    interval_seconds: float = 10.0


@dataclass(frozen=True, slots=True)
class KubeletConfig:
    """What one node's kubelet is told at start; immutable."""

    node_name: str
    node_ip: str = "127.0.0.1"
    """Address of the node (InternalIP, hostIP of its pods)."""
    node_ips: tuple[str, ...] = ()
    """All node addresses when dual stack; empty means only node_ip."""
    current_ips: Callable[[], tuple[str, ...]] | None = None
    """Asked for the addresses instead, where they may change while the node runs (see Kubelet.host_changed)."""
    root_dir: str = "/var/lib/knarr/default/kubelet"
    """Pod directories, volumes and check-points."""
    share_root: bool = False
    """Make root_dir a shared mount of its own, for mounts of containers below it. It stays for the next start; who sets this unmounts it."""
    pod_logs_dir: str = ""
    """Where container logs go; empty means <root_dir>/../pod-logs."""
    static_pod_path: str = ""
    """Folder of static pod manifests; empty means none."""
    cluster_dns: tuple[str, ...] = ("10.96.0.10",)
    cluster_domain: str = "cluster.local"
    resolv_conf: str = "/etc/resolv.conf"
    bind_address: str = "0.0.0.0"
    port: int = 10250
    serving_cert: str = ""
    """PEM file; without one the server is not started."""
    serving_key: str = ""
    server_tls_bootstrap: bool = False
    """Ask the cluster for the serving certificate and keep it fresh; serving_cert and serving_key are then one file, which may not exist yet."""
    client_cert_file: str = ""
    """PEM file with the client certificate and its key, for rotate_certificates."""
    rotate_certificates: bool = False
    """Ask the cluster for a new client certificate before the present one ends."""
    client_ca: str = ""
    """PEM bundle that client certificates must chain to."""
    anonymous_auth: bool = False
    authorization_mode: str = "Webhook"
    """Webhook (SubjectAccessReview) or AlwaysAllow."""
    cgroup_root: str = ""
    """Prefix of the kubelet's cgroup tree in every hierarchy, e.g. "/knarr-default"; empty is the host's root."""
    cgroups_per_qos: bool = True
    enforce_cpu_limits: bool = True
    pod_pids_limit: int = 0
    """0 means no limit."""
    max_pods: int = 110
    register_node: bool = True
    reappear: bool = True
    """Make the Node object anew when somebody deleted it. Upstream's kubelet does so only when it is started again."""
    node_labels: dict[str, str] = field(default_factory=dict)
    node_taints: tuple[dict[str, str], ...] = ()
    provider_id: str = ""
    system_reserved: dict[str, str] = field(default_factory=dict)
    kube_reserved: dict[str, str] = field(default_factory=dict)
    enforce_node_allocatable: tuple[str, ...] = ("pods",)
    """Of pods, system-reserved, kube-reserved and the latter two with -compressible: whose group is limited."""
    system_reserved_cgroup: str = ""
    """The group that holds the system's own processes, for system-reserved."""
    kube_reserved_cgroup: str = ""
    """The group that holds the cluster's daemons, for kube-reserved."""
    reserved_system_cpus: str = ""
    """CPUs kept from containers with CPUs of their own, e.g. "0-1"; takes the place of the cpu in system_reserved and kube_reserved."""
    cpu_manager_policy: str = "none"
    """none or static."""
    cpu_manager_options: tuple[str, ...] = ()
    """Names of options that are "true"."""
    memory_manager_policy: str = "None"
    """None or Static."""
    reserved_memory: dict[int, dict[str, int]] = field(default_factory=dict)
    """NUMA node to kind to bytes that the Static memory manager keeps from pods."""
    topology_manager_policy: str = "none"
    topology_manager_scope: str = "container"
    eviction: EvictionConfig = field(default_factory=EvictionConfig)
    lease_duration_seconds: int = 40
    lease_renew_seconds: float = 10.0
    node_status_interval_seconds: float = 10.0
    """How often conditions are looked at."""
    node_status_report_seconds: float = 300.0
    """The longest time an unchanged node status stays unreported."""
    crash_loop_initial_seconds: float = 10.0
    crash_loop_max_seconds: float = 300.0
    image_back_off_initial_seconds: float = 10.0
    image_back_off_max_seconds: float = 300.0
    max_parallel_image_pulls: int = 5
    image_gc_high_threshold_percent: int = 85
    image_gc_low_threshold_percent: int = 80
    image_minimum_gc_age_seconds: float = 120.0
    image_maximum_gc_age_seconds: float = 0.0
    """Images that nobody used for so long are removed however much room there is; 0 for never."""
    container_log_max_size_bytes: int = 10 * 1024 * 1024
    container_log_max_files: int = 5
    shutdown_grace_period_seconds: float = 0.0
    shutdown_grace_period_critical_seconds: float = 0.0
    shutdown_grace_period_by_priority: tuple[tuple[int, float], ...] = ()
    """(lowest priority, seconds) in ascending order; takes the place of the two periods above."""
    allowed_unsafe_sysctls: tuple[str, ...] = ()
    runtime_scheme: str = "knarr"
    """Prefix of container ids in statuses."""
    kubelet_version: str = "v1.35.0"
    seccomp_default: bool = False
    registry_credentials_file: str = ""
    """A docker config.json whose credentials every pull may use."""
    credential_provider_config: str = ""
    """File or folder of CredentialProviderConfigs: plugins that give credentials for images; empty means none."""
    credential_provider_bin_dir: str = ""
    """Folder with the plugins' programs."""
    image_verification_policy: str = "NeverVerifyPreloadedImages"
    """Which images that are here are given only to pods whose credentials could have pulled them (records.POLICIES)."""
    image_verification_allowlist: tuple[str, ...] = ()
    """Images that NeverVerifyAllowlistedImages is about."""
    volume_plugin_dirs: tuple[str, ...] = ()
    device_plugins_dir: str = ""
    """Where device plugins find kubelet.sock; empty means <root_dir>/device-plugins."""
    plugins_dir: str = ""
    """Where CSI and device plugins register; empty means <root_dir>/plugins_registry."""

    @property
    def pods_dir(self) -> str:
        """Folder with one sub-folder per pod uid."""
        return os.path.join(self.root_dir, "pods")

    @property
    def logs_dir(self) -> str:
        """Folder of <namespace>_<name>_<uid>/<container>/<n>.log."""
        return self.pod_logs_dir or os.path.join(os.path.dirname(self.root_dir.rstrip("/")), "pod-logs")

    @property
    def host_ips(self) -> tuple[str, ...]:
        """The node's addresses, primary first."""
        if self.current_ips is not None:
            return self.current_ips()
        return self.node_ips or (self.node_ip,)
