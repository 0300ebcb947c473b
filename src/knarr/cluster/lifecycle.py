"""up, down, delete, status: the life of one cluster on this machine.

Role: what the commands of the same names do, without any parsing or exit codes. `up` forks the supervisor and waits on a pipe
for the components' own reports, so nothing polls. Failures are CommandError with one line that says what to do.
"""

from __future__ import annotations

import base64
import contextlib
import os
import select
import shutil
import socket
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from knarr.cluster import addresses, controllerargs, host, netoptions, nodes, pki, preflight, supervisor
from knarr.cluster import config as cluster_config
from knarr.cluster.config import ClusterConfig
from knarr.cluster.progress import Progress

if TYPE_CHECKING:
    from knarr.client.rest import Client

UP_SECONDS = 60.0
DOWN_SECONDS = 30.0
READY_API, KNOWN_NODE, READY_NODE, READY_DNS = "api", "known", "node", "dns"


class CommandError(Exception):
    """A command cannot do what was asked; the text is one line for the user."""


@dataclass(frozen=True, slots=True)
class UpOptions:
    """What `knarr up` may be told; None keeps what the cluster has, or the default for a new one."""

    name: str = "default"
    data_dir: str | None = None
    nodes: int | None = None
    storage: str | None = None
    oci_runtime: str | None = None
    controllers: str | None = None
    apiserver_arguments: tuple[str, ...] = ()
    """Empty keeps what the cluster has."""
    tls_names: tuple[str, ...] = ()
    """Further names of the API server; empty keeps what the cluster has."""
    controller_arguments: tuple[str, ...] = ()
    """Empty keeps what the cluster has."""
    kubelet_config: str | None = None
    """File whose content the nodes of this machine use from now on; "" for none."""
    credential_providers: tuple[str | None, str | None] = (None, None)
    """Configuration of plugins that give credentials for images, and the folder of their programs; "" for none."""
    scheduler_config: str | None = None
    """File that the scheduler uses from now on; "" for none."""
    kubeconfig: bool = True
    """Merge the context into the user's kubeconfig."""
    network: netoptions.NetworkOptions = field(default_factory=netoptions.NetworkOptions)


def existing(name: str, data_dir: str | None = None) -> ClusterConfig:
    """The stored cluster of that name. Raises CommandError when there is none."""
    config = cluster_config.load(name, data_dir)
    if config is None:
        known = ", ".join(other.name for other in cluster_config.known_clusters()) or "none"
        raise CommandError(f"there is no cluster {name!r} here (known: {known}); `knarr up` makes one")
    return config


def need_control_plane(config: ClusterConfig) -> None:
    """Raises CommandError on a machine that joined a cluster: the command belongs to the other one."""
    if config.joined:
        raise CommandError(f"the control plane of cluster {config.name!r} is at {config.server}; run this there")


def is_running(config: ClusterConfig) -> bool:
    try:
        supervisor.ask(config, "status")
    except (ConnectionError, TimeoutError):
        return False
    return True


def _scheduler_settings(path: str) -> bytes:
    """Read and check a KubeSchedulerConfiguration. Raises CommandError."""
    from knarr.scheduler import config as schedulerconfig
    from knarr.scheduler.handle import Handle
    from knarr.scheduler.registry import build_profile

    try:
        content = Path(path).read_bytes()
        for profile in schedulerconfig.read_text(content).profiles:
            build_profile(profile, Handle())
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from error
    return content


def up(options: UpOptions, progress: Progress) -> ClusterConfig:
    """Bring the cluster up and return when API, nodes and DNS answer; a running one is left as it is.

    Raises:
      CommandError: preflight, a component's start or the time limit failed; the text names the log to read.
    """
    config = cluster_config.load(options.name, options.data_dir)
    fresh = config is None
    if config is None:
        config = cluster_config.new_cluster(
            options.name, options.data_dir, nodes=options.nodes or 1, storage=options.storage or "", oci_runtime=options.oci_runtime or "runc"
        )
    elif options.storage is not None and options.storage != config.storage:
        raise CommandError(f"cluster {config.name!r} keeps its data in {config.store_url}; `knarr delete` first to change that")
    changed = netoptions.apply(config, options.network, fresh=fresh)
    if options.oci_runtime:
        config.oci_runtime = options.oci_runtime
    if options.controllers:
        config.controllers = options.controllers
    if options.apiserver_arguments:
        config.apiserver_arguments = _checked(options.apiserver_arguments)
    if options.tls_names:
        config.tls_names = list(options.tls_names)
    if options.controller_arguments:
        try:
            controllerargs.parse(options.controller_arguments)
        except ValueError as error:
            raise CommandError(str(error)) from error
        config.controller_arguments = list(options.controller_arguments)
    _take_credential_providers(config, *options.credential_providers)
    content = _kubelet_settings(options.kubelet_config) if options.kubelet_config else b""
    scheduling = _scheduler_settings(options.scheduler_config) if options.scheduler_config else b""
    if is_running(config):
        if changed:
            raise CommandError(f"cluster {config.name!r} is running; `knarr down` first to change its network")
        if options.scheduler_config is not None:
            raise CommandError(f"cluster {config.name!r} is running; `knarr down` first to change its scheduler's configuration")
        if options.kubelet_config is not None or any(item is not None for item in options.credential_providers):
            raise CommandError(f"cluster {config.name!r} is running; `knarr down` first to change its kubelets' configuration")
        progress.done(f"cluster {config.name} is running already")
        return config
    if os.geteuid() == 0:
        host.clean_stale(config)
    findings = preflight.check(config)
    if findings:
        raise CommandError("\n".join(str(finding) for finding in findings))
    config.save()
    if options.scheduler_config is not None:
        config.scheduler_file.unlink(missing_ok=True)
        if scheduling:
            config.scheduler_file.write_bytes(scheduling)
    if options.kubelet_config is not None:
        config.kubelet_file.unlink(missing_ok=True)
        if content:
            config.kubelet_file.write_bytes(content)
    if not config.joined:
        progress.step("certificates")
        keys = make_pki(config)
        if options.kubeconfig:
            merge_kubeconfig(config, keys)
        progress.step("starting the API server")
    reader = _fork_supervisor(config)
    _wait_ready(config, reader, progress)
    return config


def _kubelet_settings(path: str) -> bytes:
    """A KubeletConfiguration file's content, looked through. Raises CommandError."""
    from knarr.kubelet import configfile
    from knarr.kubelet.config import KubeletConfig

    try:
        content = Path(path).read_bytes()
        configfile.load(content, KubeletConfig(node_name=""))
    except (OSError, configfile.ConfigFileError) as error:
        raise CommandError(f"{path}: {error.strerror if isinstance(error, OSError) else error}") from error
    return content


def _take_credential_providers(config: ClusterConfig, path: str | None, folder: str | None) -> None:
    """Check plugins for image credentials, and have the nodes use them. Raises CommandError."""
    from knarr.kubelet.credentials import providerconfig

    if path is not None:
        config.credential_provider_config = os.path.abspath(path) if path else ""
    if folder is not None:
        config.credential_provider_bin_dir = os.path.abspath(folder) if folder else ""
    if path is None and folder is None:
        return
    if bool(config.credential_provider_config) != bool(config.credential_provider_bin_dir):
        raise CommandError("--image-credential-provider-config and --image-credential-provider-bin-dir need each other")
    if config.credential_provider_config:
        try:
            providerconfig.load(config.credential_provider_config, config.credential_provider_bin_dir)
        except providerconfig.ProviderConfigError as error:
            raise CommandError(str(error)) from error


def _checked(arguments: Sequence[str]) -> list[str]:
    from knarr.apiserver import options

    try:
        return options.normalised(arguments)
    except options.OptionError as error:
        raise CommandError(str(error)) from error


def make_pki(config: ClusterConfig) -> pki.ClusterPKI:
    """The cluster's certificates, with every name and address of the API server."""
    need_control_plane(config)
    domain = config.cluster_domain
    names = ["kubernetes", "kubernetes.default", "kubernetes.default.svc", f"kubernetes.default.svc.{domain}", "localhost", socket.gethostname().lower()]
    own = addresses.primary_address()
    return pki.ensure(config.pki, list(dict.fromkeys([*names, "127.0.0.1", *([own] if own else []), config.address(1), nodes.gateway(config), *config.tls_names])))


def _fork_supervisor(config: ClusterConfig) -> int:
    """Start the supervisor, detached from this terminal; returns the reading end of its ready pipe."""
    listener = None if config.joined else _listen(config)
    reader, writer = os.pipe2(os.O_CLOEXEC)
    config.logs.mkdir(parents=True, exist_ok=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if os.fork() == 0:
        os.setsid()
        if os.fork() != 0:
            os._exit(0)
        os.close(reader)
        _become_supervisor(config, listener, writer)
    os.wait()
    os.close(writer)
    if listener is not None:
        listener.close()
    return reader


def _listen(config: ClusterConfig) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("0.0.0.0", config.api_port))
    except OSError as error:
        raise CommandError(f"port {config.api_port} is taken by {preflight.port_holder(config.api_port)}; stop that process, or use --name") from error
    listener.listen(1024)
    return listener


def _become_supervisor(config: ClusterConfig, listener: socket.socket | None, writer: int) -> None:
    """The detached process; never returns."""
    code = 1
    try:
        os.chdir("/")
        null = os.open(os.devnull, os.O_RDONLY)
        log = os.open(config.logs / "supervisor.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o640)
        os.dup2(null, 0)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from knarr.cluster import processes

        supervisor.name_process("knarr-supervisor")
        processes.supervise(config, listener, writer)
        code = 0
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def _wait_ready(config: ClusterConfig, reader: int, progress: Progress) -> None:
    from knarr.network import cni

    awaited = [] if config.joined else [READY_API]
    # What will be applied to the cluster, a network's manifest, cannot be waited for here.
    without_network = config.pod_network == "cni" and cni.installed(Path(config.cni_conf_dir)) is None
    awaited += [f"{KNOWN_NODE if without_network else READY_NODE} {node.name}" for node in config.nodes if not node.stopped]
    if not without_network:
        awaited.append(READY_DNS)
    texts = {READY_API: f"API server answers on https://127.0.0.1:{config.api_port}", READY_DNS: "DNS resolves"}
    texts |= {f"{KNOWN_NODE} {node.name}": f"node {node.name} is registered" for node in config.nodes}
    deadline = time.monotonic() + UP_SECONDS
    buffer = b""
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while awaited:
            progress.step("waiting for " + ", ".join(awaited))
            ready, _, _ = select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))
            data = pipe.read(4096) if ready else b""
            if not data:
                why = "the supervisor ended" if ready else f"not ready after {UP_SECONDS:.0f} s: {', '.join(awaited)}"
                raise CommandError(f"{why}; read {config.logs}, or `knarr logs supervisor`, `knarr status`")
            *lines, buffer = (buffer + data).split(b"\n")
            for line in (raw.decode() for raw in lines):
                if line in awaited:
                    awaited.remove(line)
                    progress.done(texts.get(line, f"{line} is Ready"))
    if without_network:
        progress.done(f"nodes wait for a CNI configuration in {config.cni_conf_dir}")


def merge_kubeconfig(config: ClusterConfig, keys: pki.ClusterPKI) -> Path:
    """Add or replace the cluster's context in the user's kubeconfig; other entries stay as they are."""
    from knarr.client import kubeconfig

    def text(data: bytes) -> str:
        return base64.b64encode(data).decode()

    return kubeconfig.merge_context(
        config.context,
        {"server": f"https://127.0.0.1:{config.api_port}", "certificate-authority-data": text(keys.authority.pair.certificate_pem())},
        {"client-certificate-data": text(keys.admin.certificate_pem()), "client-key-data": text(keys.admin.key_pem())},
    )


def admin_client(config: ClusterConfig) -> Client:
    """A client with the administrator's certificate, for commands that speak to the API."""
    from knarr.client.rest import Client
    from knarr.cluster.processes import common

    need_control_plane(config)
    return Client(common.client_config(config, common.pair(config, "admin"), "knarr"))


def with_client(config: ClusterConfig, work: Callable[[Client], Awaitable[int]]) -> int:
    """Run a command's work with the administrator's client, which is closed after it; gives the exit code."""
    import asyncio

    async def main() -> int:
        client = admin_client(config)
        try:
            return await work(client)
        finally:
            await client.close()

    return asyncio.run(main())


def down(config: ClusterConfig, progress: Progress) -> None:
    """Stop every process of the cluster and leave nothing of it on the host; its data stays."""
    stop_supervisor(config)
    progress.step("removing containers, mounts, interfaces")
    host.clean(config)
    progress.done(f"cluster {config.name} is down")


def stop_supervisor(config: ClusterConfig) -> None:
    """End the supervisor and with it the components; containers go on."""
    try:
        pid = int(supervisor.ask(config, "status")["pid"])
        descriptor = os.pidfd_open(pid)
    except (ConnectionError, ProcessLookupError):
        return
    try:
        supervisor.ask(config, "stop")
        ready, _, _ = select.select([descriptor], [], [], DOWN_SECONDS)
        if not ready:
            raise CommandError(f"the supervisor (pid {pid}) did not stop within {DOWN_SECONDS:.0f} s; read {config.logs}")
    finally:
        os.close(descriptor)


def delete(config: ClusterConfig, progress: Progress) -> None:
    """`down`, and the data and the kubeconfig context as well."""
    down(config, progress)
    from knarr.client import kubeconfig

    kubeconfig.remove_context(config.context)
    shutil.rmtree(config.data, ignore_errors=False)
    link = cluster_config.DATA_ROOT / config.name
    if link.is_symlink():
        link.unlink()
    with contextlib.suppress(OSError):
        cluster_config.DATA_ROOT.rmdir()
    progress.done(f"the data of cluster {config.name} is deleted")


def status(config: ClusterConfig) -> dict[str, Any] | None:
    """What the supervisor knows of its components; None when the cluster is down."""
    try:
        result: dict[str, Any] = supervisor.ask(config, "status")
    except ConnectionError:
        return None
    return result


def log_path(config: ClusterConfig, component: str) -> Path:
    """The log file of a component. Raises CommandError naming the ones that exist."""
    path = config.logs / f"{component}.log"
    if not path.is_file():
        names = ", ".join(sorted(entry.stem for entry in config.logs.glob("*.log"))) or "none yet"
        raise CommandError(f"there is no log of {component!r}; components: {names}")
    return path
