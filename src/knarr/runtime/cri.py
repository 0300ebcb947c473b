"""The Container Runtime Interface as Python Protocols: what the kubelet asks of any runtime.

Role: the seam between kubelet and runtime. The embedded runtime (conmon and runc) and the gRPC client for containerd or
CRI-O both implement `RuntimeService` and `ImageService`; the kubelet knows nothing else. Also here: `PodNetwork`, which the
runtime consumes and the network component implements.
Names follow CRI v1 (k8s.io/cri-api/pkg/apis/runtime/v1/api.proto) in snake_case, with units in names where CRI leaves them
to comments. Times are epoch nanoseconds (int), 0 meaning unset. Must not know Kubernetes objects.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, Protocol

NamespaceMode = Literal["POD", "CONTAINER", "NODE", "TARGET"]
MountPropagation = Literal["PRIVATE", "HOST_TO_CONTAINER", "BIDIRECTIONAL"]
SeccompType = Literal["RuntimeDefault", "Unconfined", "Localhost"]


class RuntimeFault(Exception):
    """Base of what a runtime call may raise; the text is what events and status messages show."""


class NotFound(RuntimeFault):
    """No such sandbox, container or image. Stop and remove calls never raise it: they are idempotent."""


class ImagePullError(RuntimeFault):
    """A pull failed. `reason` is the waiting reason that the kubelet shows.

    One of ErrImagePull, RegistryUnavailable, SignatureValidationFailed, InvalidImageName.
    """

    def __init__(self, message: str, reason: str = "ErrImagePull") -> None:
        super().__init__(message)
        self.reason = reason


class DeadlineExceeded(RuntimeFault):
    """An exec or stop ran past its limit."""


@dataclass(slots=True)
class IDMapping:
    host_id: int
    container_id: int
    length: int


@dataclass(slots=True)
class NamespaceOptions:
    network: NamespaceMode = "POD"
    pid: NamespaceMode = "CONTAINER"
    ipc: NamespaceMode = "POD"
    target_id: str = ""
    """Container whose PID namespace is joined when pid is TARGET."""
    user_mappings: list[IDMapping] | None = None
    """uid and gid maps of the pod's user namespace; None means the host's."""


@dataclass(slots=True)
class SeccompProfile:
    type: SeccompType = "Unconfined"
    localhost_path: str = ""
    """Absolute path of the profile file when type is Localhost."""


@dataclass(slots=True)
class LinuxResources:
    """Zero or None means: not set."""

    cpu_period_us: int = 0
    cpu_quota_us: int = 0
    cpu_shares: int = 0
    memory_limit_bytes: int = 0
    memory_swap_limit_bytes: int = 0
    oom_score_adj: int | None = None
    cpuset_cpus: str = ""
    cpuset_mems: str = ""
    hugepage_limits: dict[str, int] = field(default_factory=dict)
    """Page size such as "2MB" to bytes."""
    pids_limit: int = 0
    unified: dict[str, str] = field(default_factory=dict)
    """Raw cgroup v2 keys, e.g. memory.high."""


@dataclass(slots=True)
class PodSandboxMetadata:
    name: str
    uid: str
    namespace: str
    attempt: int = 0


@dataclass(slots=True)
class PortMapping:
    protocol: str
    container_port: int
    host_port: int
    host_ip: str = ""


@dataclass(slots=True)
class DNSConfig:
    servers: list[str] = field(default_factory=list)
    searches: list[str] = field(default_factory=list)
    options: list[str] = field(default_factory=list)


@dataclass(slots=True)
class PodSandboxConfig:
    metadata: PodSandboxMetadata
    hostname: str = ""
    """UTS host name; empty in a host-network pod, which keeps the host's."""
    log_directory: str = ""
    dns: DNSConfig | None = None
    """None keeps the image's or host's resolv.conf; the runtime writes one file per sandbox and mounts it in containers."""
    port_mappings: list[PortMapping] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    cgroup_parent: str = ""
    """Cgroup path relative to each controller's root, e.g. "/kubepods/burstable/pod<uid>"; made by the kubelet."""
    sysctls: dict[str, str] = field(default_factory=dict)
    namespaces: NamespaceOptions = field(default_factory=NamespaceOptions)
    privileged: bool = False
    seccomp: SeccompProfile = field(default_factory=SeccompProfile)
    run_as_user: int | None = None
    run_as_group: int | None = None
    supplemental_groups: list[int] = field(default_factory=list)
    overhead: LinuxResources | None = None
    resources: LinuxResources | None = None


class SandboxState(Enum):
    READY = "READY"
    NOTREADY = "NOTREADY"


@dataclass(slots=True)
class PodSandboxStatus:
    id: str
    metadata: PodSandboxMetadata
    state: SandboxState
    created_at_ns: int
    ips: list[str] = field(default_factory=list)
    """First is the primary; empty for host network."""
    namespaces: NamespaceOptions = field(default_factory=NamespaceOptions)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    runtime_handler: str = ""
    netns_path: str = ""


@dataclass(slots=True)
class ContainerMetadata:
    name: str
    attempt: int = 0


@dataclass(slots=True)
class Mount:
    container_path: str
    host_path: str = ""
    readonly: bool = False
    recursive_read_only: bool = False
    selinux_relabel: bool = False
    propagation: MountPropagation = "PRIVATE"
    image: str = ""
    """Image reference to mount instead of host_path (image volumes)."""
    image_sub_path: str = ""


@dataclass(slots=True)
class Device:
    container_path: str
    host_path: str
    permissions: str = "rwm"


@dataclass(slots=True)
class ContainerSecurity:
    run_as_user: int | None = None
    run_as_username: str = ""
    run_as_group: int | None = None
    supplemental_groups: list[int] = field(default_factory=list)
    supplemental_groups_policy: Literal["Merge", "Strict"] = "Merge"
    privileged: bool = False
    readonly_rootfs: bool = False
    no_new_privs: bool = False
    add_capabilities: list[str] = field(default_factory=list)
    """Without the CAP_ prefix; ALL is allowed."""
    drop_capabilities: list[str] = field(default_factory=list)
    seccomp: SeccompProfile = field(default_factory=SeccompProfile)
    apparmor_profile: str = ""
    selinux_label: str = ""
    masked_paths: list[str] | None = None
    """None means the runtime's default list; [] masks nothing (procMount Unmasked, privileged)."""
    readonly_paths: list[str] | None = None
    namespaces: NamespaceOptions = field(default_factory=NamespaceOptions)


@dataclass(slots=True)
class ContainerConfig:
    metadata: ContainerMetadata
    image: str
    """Image id as returned by ImageService, or a reference present locally."""
    command: list[str] = field(default_factory=list)
    """Replaces the image's entry point when not empty."""
    args: list[str] = field(default_factory=list)
    working_dir: str = ""
    env: list[tuple[str, str]] = field(default_factory=list)
    """In order; later entries win. The image's own come first unless named here."""
    mounts: list[Mount] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    log_path: str = ""
    """Relative to the sandbox's log_directory."""
    stdin: bool = False
    stdin_once: bool = False
    tty: bool = False
    resources: LinuxResources = field(default_factory=LinuxResources)
    security: ContainerSecurity = field(default_factory=ContainerSecurity)
    stop_signal: str = ""
    cdi_devices: list[str] = field(default_factory=list)


class ContainerState(Enum):
    CREATED = "CREATED"
    RUNNING = "RUNNING"
    EXITED = "EXITED"
    UNKNOWN = "UNKNOWN"


@dataclass(slots=True)
class ContainerStatus:
    id: str
    """64 hexadecimal digits; the kubelet adds the runtime's scheme, e.g. knarr://<id>."""
    sandbox_id: str
    metadata: ContainerMetadata
    state: ContainerState
    created_at_ns: int
    started_at_ns: int
    finished_at_ns: int
    exit_code: int
    image: str
    """The reference that the container was created with."""
    image_id: str
    """The image's id (config digest), sha256:…"""
    image_ref: str
    """Repository digest (name@sha256:…) when known, else the image id."""
    reason: str = ""
    """Completed, Error, OOMKilled, ContainerCannotRun or StartError."""
    message: str = ""
    signal: int = 0
    pid: int = 0
    labels: dict[str, str] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    log_path: str = ""
    """Absolute."""
    resources: LinuxResources | None = None
    user: tuple[int, int, list[int]] | None = None
    """uid, gid, supplemental groups of the first process."""
    stop_signal: str = ""


@dataclass(slots=True)
class ContainerStats:
    id: str
    sandbox_id: str
    metadata: ContainerMetadata
    labels: dict[str, str]
    timestamp_ns: int
    cpu_usage_core_ns: int
    memory_usage_bytes: int
    memory_working_set_bytes: int
    memory_rss_bytes: int
    memory_page_faults: int
    memory_major_page_faults: int
    writable_layer_bytes: int
    writable_layer_inodes: int
    process_count: int = 0


@dataclass(slots=True)
class InterfaceStats:
    name: str
    rx_bytes: int = 0
    rx_errors: int = 0
    tx_bytes: int = 0
    tx_errors: int = 0
    rx_packets: int = 0
    rx_dropped: int = 0
    tx_packets: int = 0
    tx_dropped: int = 0


@dataclass(slots=True)
class SandboxStats:
    id: str
    metadata: PodSandboxMetadata
    timestamp_ns: int
    interfaces: list[InterfaceStats]
    process_count: int


@dataclass(slots=True)
class ExecResult:
    stdout: bytes
    stderr: bytes
    exit_code: int


@dataclass(slots=True)
class ContainerEvent:
    """What happened to a container or sandbox; delivered in order per container."""

    type: Literal["CREATED", "STARTED", "STOPPED", "DELETED"]
    container_id: str
    sandbox_id: str
    created_at_ns: int


@dataclass(slots=True)
class RuntimeCondition:
    type: Literal["RuntimeReady", "NetworkReady"]
    status: bool
    reason: str = ""
    message: str = ""


@dataclass(slots=True)
class RuntimeVersion:
    name: str
    version: str
    api_version: str = "v1"


@dataclass(slots=True)
class Image:
    id: str
    """Digest of the image's configuration, sha256:…"""
    repo_tags: list[str]
    repo_digests: list[str]
    size_bytes: int
    uid: int | None = None
    """Numeric user of the image's configuration, if it is a number."""
    username: str = ""
    """User name when it is not a number."""
    pinned: bool = False


@dataclass(slots=True)
class AuthConfig:
    username: str = ""
    password: str = ""
    auth: str = ""
    server_address: str = ""
    identity_token: str = ""
    registry_token: str = ""


@dataclass(slots=True)
class FilesystemUsage:
    mountpoint: str
    timestamp_ns: int
    used_bytes: int
    inodes_used: int


class Stream(Protocol):
    """One interactive process (exec or attach): byte streams in both directions, and its end.

    `read` yields (channel, data): channel 1 is stdout, 2 is stderr (never with a terminal). It ends after both closed.
    Cancelling `wait` does not stop the process; `close` drops the streams and, for exec, kills the process.
    """

    def read(self) -> AsyncIterator[tuple[int, bytes]]: ...
    async def write_stdin(self, data: bytes) -> None: ...
    async def close_stdin(self) -> None: ...
    async def resize(self, width: int, height: int) -> None: ...
    async def wait(self) -> int: ...
    async def close(self) -> None: ...


class ByteStream(Protocol):
    """One connection inside a pod (port-forward)."""

    async def read(self) -> bytes: ...
    async def write(self, data: bytes) -> None: ...
    async def write_eof(self) -> None: ...
    async def close(self) -> None: ...


@dataclass(slots=True)
class NetworkResult:
    ips: list[str]
    """Primary family first."""
    mac: str = ""
    interface: str = "eth0"


@dataclass(slots=True)
class SandboxNetwork:
    """What a pod network needs to know about one sandbox."""

    sandbox_id: str
    netns_path: str
    namespace: str
    name: str
    uid: str
    port_mappings: Sequence[PortMapping] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)


class PodNetwork(Protocol):
    """Puts interfaces into a sandbox's network namespace. All calls are idempotent per sandbox_id."""

    async def setup(self, sandbox: SandboxNetwork) -> NetworkResult: ...
    async def teardown(self, sandbox: SandboxNetwork) -> None: ...
    async def ready(self) -> str | None:
        """None when pods can be attached, else why not (becomes the node's NetworkReady message)."""


class RuntimeService(Protocol):
    """Sandboxes and containers. Stop, remove and cleanup are idempotent; every call may raise RuntimeFault."""

    features: frozenset[str]
    """What it can beyond the common: supplementalGroupsPolicy, recursiveReadOnlyMounts, userNamespaces; known after `status`."""

    async def version(self) -> RuntimeVersion: ...
    async def status(self) -> list[RuntimeCondition]: ...
    async def run_pod_sandbox(self, config: PodSandboxConfig, runtime_handler: str = "") -> str:
        """Make namespaces, network, resolv.conf; returns the sandbox id. On failure nothing is left."""

    async def stop_pod_sandbox(self, sandbox_id: str) -> None:
        """Kill what still runs in it and give its network back; its status stays readable."""

    async def remove_pod_sandbox(self, sandbox_id: str) -> None: ...
    async def pod_sandbox_status(self, sandbox_id: str) -> PodSandboxStatus: ...
    async def list_pod_sandboxes(self, labels: Mapping[str, str] | None = None) -> list[PodSandboxStatus]: ...
    async def create_container(self, sandbox_id: str, config: ContainerConfig) -> str: ...
    async def start_container(self, container_id: str) -> None: ...
    async def stop_container(self, container_id: str, timeout_seconds: float, signal: str = "") -> None:
        """Send the stop signal, wait up to timeout_seconds, then KILL; returns when it has exited."""

    async def remove_container(self, container_id: str) -> None: ...
    async def container_status(self, container_id: str) -> ContainerStatus: ...
    async def list_containers(self, labels: Mapping[str, str] | None = None, sandbox_id: str | None = None) -> list[ContainerStatus]: ...
    async def update_container_resources(self, container_id: str, resources: LinuxResources) -> None: ...
    async def reopen_container_log(self, container_id: str) -> None: ...
    async def exec_sync(self, container_id: str, command: Sequence[str], timeout_seconds: float = 0) -> ExecResult:
        """Run to its end; 0 means no limit. Raises DeadlineExceeded after killing the process."""

    async def exec(self, container_id: str, command: Sequence[str], *, tty: bool, stdin: bool) -> Stream: ...
    async def attach(self, container_id: str, *, tty: bool, stdin: bool) -> Stream: ...
    async def port_forward(self, sandbox_id: str, port: int) -> ByteStream: ...
    async def list_container_stats(self, labels: Mapping[str, str] | None = None) -> list[ContainerStats]: ...
    async def list_pod_sandbox_stats(self) -> list[SandboxStats]: ...
    def events(self) -> AsyncIterator[ContainerEvent]:
        """Events from the moment of the call on; several readers may listen. Bounded: a reader that lags far behind
        sees the stream end and must list again."""


class ImageService(Protocol):
    """The images on this node. References are normalised as docker does (redis -> docker.io/library/redis:latest)."""

    async def list_images(self) -> list[Image]: ...
    async def image_status(self, reference: str) -> Image | None: ...
    async def pull_image(self, reference: str, auth: Sequence[AuthConfig] = (), namespace: str = "") -> str:
        """Returns the image id. Credentials are tried in order, none at all when there are none. Raises ImagePullError."""

    async def remove_image(self, reference: str) -> None: ...
    async def image_fs_info(self) -> FilesystemUsage: ...
