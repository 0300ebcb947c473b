"""Settings of the API server; made by knarr.cluster, by tests, or by hand. Paths are PEM files."""

from __future__ import annotations

import socket
from dataclasses import dataclass, field

from knarr.api.types import Object


@dataclass(slots=True)
class APIServerConfig:
    """Everything an API server must be told."""

    bind_address: str = "127.0.0.1"
    """Address to listen on; "0.0.0.0" or "::" for all."""
    port: int = 6443
    """TCP port; 0 lets the kernel choose (then APIServer.port tells)."""
    listen_sock: socket.socket | None = None
    """A socket already bound and listening (the supervisor's, which survives restarts of the server); None binds one."""
    advertise_address: str = ""
    """Address put into the endpoints of the kubernetes Service; "" means the bind address."""
    store: str = "memory://"
    """"memory://", "sqlite:///path/to/file" or "etcd3://host:port,host:port"."""
    data_dir: str = ""
    """Where the server may keep files of its own (generated keys); "" means none are kept."""
    serving_cert: str = ""
    serving_key: str = ""
    """Certificate chain and key for TLS; both "" serves plain HTTP (tests only)."""
    client_ca: str = ""
    """CA bundle for client certificates; "" means none are accepted."""
    service_account_key: str = ""
    """Private key that signs service account tokens; "" makes one for the life of the process."""
    service_account_key_files: tuple[str, ...] = ()
    """Further keys (public or private) whose tokens are accepted."""
    service_account_issuer: str = "https://kubernetes.default.svc.cluster.local"
    api_audiences: tuple[str, ...] = ()
    """Audiences of the API; empty means the issuer."""
    service_account_max_token_seconds: int = 0
    """Upper bound for requested token lifetimes; 0 means none."""
    token_file: str = ""
    """CSV file of static tokens: token,user,uid,"group1,group2"."""
    requestheader_client_ca: str = ""
    requestheader_allowed_names: tuple[str, ...] = ()
    proxy_client_cert: str = ""
    proxy_client_key: str = ""
    """Front-proxy certificate shown to extension API servers."""
    anonymous_paths: tuple[str, ...] = ("/healthz", "/livez", "/readyz")
    """Where callers without credentials become system:anonymous instead of getting 401; ("*",) means everywhere."""
    authorization_modes: tuple[str, ...] = ("Node", "RBAC")
    authorization_webhook_config: str = ""
    authentication_webhook_config: str = ""
    jwt_issuers: tuple[Object, ...] = ()
    """Entries `jwt` of an AuthenticationConfiguration."""
    authorizers: tuple[Object, ...] = ()
    """Entries of an AuthorizationConfiguration; empty means authorization_modes."""
    authentication_config: str = ""
    authorization_config: str = ""
    """Files that jwt_issuers and authorizers come from; they are read again when they change."""
    oidc: dict[str, str] = field(default_factory=dict)
    """OIDC options by upstream's flag names without the prefix: issuer-url, client-id, username-claim, ..."""
    service_cidrs: tuple[str, ...] = ("10.96.0.0/16",)
    node_port_range: tuple[int, int] = (30000, 32767)
    """First and last node port."""
    kubelet_client_cert: str = ""
    kubelet_client_key: str = ""
    kubelet_ca: str = ""
    """CA of the kubelets' serving certificates; "" does not verify them (as upstream without the flag)."""
    cluster_domain: str = "cluster.local"
    admission_plugins_on: tuple[str, ...] = ()
    admission_plugins_off: tuple[str, ...] = ()
    admission_config: dict[str, object] = field(default_factory=dict)
    """Plugin name -> configuration object."""
    encryption_config: str = ""
    """Path of an EncryptionConfiguration; "" stores in the clear."""
    encryption_config_reload: bool = False
    """Whether that file is read again when it changes."""
    audit_policy: str = ""
    """Path of an audit Policy; "" switches auditing off."""
    audit_log_path: str = ""
    """File for audit events, "-" for standard output, "" for none."""
    audit_log_max_megabytes: int = 0
    """The audit log is put aside when it grows beyond; 0 means never."""
    audit_log_backups: int = 0
    """So many of the files put aside are kept; 0 means all."""
    audit_webhook_config: str = ""
    """Kubeconfig of a server that audit events are sent to; "" means none."""
    audit_webhook_batch_events: int = 400
    audit_webhook_batch_seconds: float = 30.0
    """A batch of events is sent when it is so large, or so old."""
    tracing_config: str = ""
    """Path of a TracingConfiguration; "" makes no traces."""
    event_ttl_seconds: int = 3600
    min_request_timeout_seconds: int = 1800
    """Watches without timeoutSeconds last between this and twice as long."""
    request_timeout_seconds: float = 60.0
    max_requests_inflight: int = 400
    max_mutating_requests_inflight: int = 200
    priority_and_fairness: bool = True
    shutdown_delay_seconds: float = 0.0
    """How long a server that has been told to stop goes on serving, not ready any more, so that load balancers turn away from it."""
    shutdown_grace_seconds: float = 10.0
    history_seconds: float = 300.0
    """Old revisions are kept at least this long before compaction."""
    runtime_config: tuple[str, ...] = ()
    """Group versions served beside those that are on by default: "storagemigration.k8s.io/v1alpha1"."""
    feature_gates: dict[str, bool] = field(default_factory=dict)
    """Gates that are not at their defaults (see features.py)."""
    identity: str = ""
    """Suffix of the identity Lease; "" derives one from the host's name."""
