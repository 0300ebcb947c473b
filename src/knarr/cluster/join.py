"""`knarr join`: make this machine a node of a cluster that runs elsewhere.

Order, each step trusting only what the one before proved: fetch kube-public/cluster-info from an address that nothing vouches
for yet; its signature proves that the other side knows the token, the hash of its authority that it is the cluster meant; fetch
it again over TLS of that authority; ask, with the token, for this node's client certificate; write it all down. From there the
node's process runs as on any machine and keeps its certificates fresh itself (`knarr.kubelet.certificates`).
Source: kubeadm app/discovery/token, app/phases/kubelet; cluster-bootstrap token/jws.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import shutil
import socket
from dataclasses import dataclass
from typing import Any

import yaml

from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, NODES
from knarr.client.config import ClientConfig
from knarr.client.rest import Client
from knarr.cluster import config as cluster_config
from knarr.cluster import lifecycle, tokens
from knarr.cluster.config import ClusterConfig, NodeConfig
from knarr.cluster.lifecycle import CommandError
from knarr.cluster.progress import Progress
from knarr.http.errors import HTTPError
from knarr.kubelet import certificates

TOKEN = re.compile(r"([a-z0-9]{6})\.([a-z0-9]{16})")
CERTIFICATE_SECONDS = 60.0
_HASH = re.compile(r"sha256:[0-9a-f]{64}")
_NODE_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")


@dataclass(frozen=True, slots=True)
class JoinOptions:
    """What `knarr join` is told."""

    server: str
    """HOST:PORT of the API server."""
    token: str
    hashes: tuple[str, ...] = ()
    """sha256:… of the authorities that are believed."""
    any_authority: bool = False
    """Believe whatever authority the holder of the token names."""
    node_name: str = ""
    name: str = "default"
    data_dir: str | None = None
    oci_runtime: str = "runc"
    kubelet_config: str | None = None
    credential_providers: tuple[str | None, str | None] = (None, None)


def join(options: JoinOptions, progress: Progress) -> ClusterConfig:
    """Become a node and return when it is Ready.

    Raises:
      CommandError: the other side could not be believed or reached, or this machine is in a cluster already.
    """
    _check(options)
    node_name = options.node_name or socket.gethostname().lower()
    if not _NODE_NAME.fullmatch(node_name):
        raise CommandError(f"{node_name!r} is no name for a node; give one with --node-name")
    if cluster_config.load(options.name, options.data_dir) is not None:
        raise CommandError(f"there is a cluster {options.name!r} on this machine already; `knarr delete --name {options.name}` leaves it, or join under another --name")
    progress.step(f"asking {options.server} for the cluster")
    try:
        authority, settings, pair = asyncio.run(_bootstrap(options, node_name, progress))
    except (HTTPError, TimeoutError) as error:
        raise CommandError(f"https://{options.server}: {error or 'no answer in time'}") from error
    config = _write(options, node_name, authority, settings, pair)
    try:
        taken = lifecycle.UpOptions(
            name=config.name, data_dir=config.data_dir, kubelet_config=options.kubelet_config, credential_providers=options.credential_providers, kubeconfig=False
        )
        lifecycle.up(taken, progress)
    except CommandError:
        if not lifecycle.is_running(config):
            shutil.rmtree(config.data, ignore_errors=True)
        raise
    return config


def _check(options: JoinOptions) -> None:
    host, colon, port = options.server.rpartition(":")
    if not colon or not host or not port.isdigit():
        raise CommandError(f"{options.server!r} is not of the form HOST:PORT")
    if not TOKEN.fullmatch(options.token):
        raise CommandError("the token is not of the form abcdef.0123456789abcdef; `knarr token create` on the control machine prints one")
    if not options.hashes and not options.any_authority:
        raise CommandError("--discovery-token-ca-cert-hash is needed, or --discovery-token-unsafe-skip-ca-verification")
    for text in options.hashes:
        if not _HASH.fullmatch(text):
            raise CommandError(f"{text!r} is not of the form sha256:HEX")


async def _bootstrap(options: JoinOptions, node_name: str, progress: Progress) -> tuple[bytes, dict[str, Any], tuple[bytes, bytes]]:
    """(authority, the cluster's settings, (client certificate, key)). Raises CommandError, HTTPError."""
    authority = await _discover(options)
    client = Client(ClientConfig(f"https://{options.server}", ca_data=authority, token=options.token, user_agent="knarr-join"))
    try:
        try:
            existing = await client.get(NODES, node_name)
        except StatusError as error:
            if error.reason != "NotFound":
                raise
        else:
            ready = [c for c in existing.get("status", {}).get("conditions") or [] if c["type"] == "Ready" and c["status"] == "True"]
            if ready:
                raise CommandError(f"the cluster has a node {node_name!r} that is Ready; join under another --node-name")
        stored = await client.get(CONFIG_MAPS, tokens.SETTINGS_NAME, tokens.SETTINGS_NAMESPACE)
        progress.step("waiting for the certificate")
        try:
            pair = await certificates.ask(client, certificates.Template(node_name), timeout_seconds=CERTIFICATE_SECONDS)
        except certificates.Refused as error:
            raise CommandError(str(error)) from error
    finally:
        await client.close()
    settings: dict[str, Any] = json.loads(stored["data"]["cluster"])
    return authority, settings, pair


async def _discover(options: JoinOptions) -> bytes:
    """The cluster's authority (PEM), proved by token and hash."""
    address = f"https://{options.server}"
    first = await _cluster_info(ClientConfig(address, insecure_skip_tls_verify=True))
    content = first.get("kubeconfig", "")
    verify(content, first.get(f"jws-kubeconfig-{options.token[:6]}", ""), options.token)
    authority = _authority(content)
    if not options.any_authority and tokens.ca_hash(authority) not in options.hashes:
        raise CommandError("the cluster's authority is not the one of --discovery-token-ca-cert-hash: another cluster, or somebody in between")
    second = await _cluster_info(ClientConfig(address, ca_data=authority))
    if second.get("kubeconfig") != content:
        raise CommandError("the cluster's description differs when asked for over its own authority: somebody in between")
    return authority


async def _cluster_info(config: ClientConfig) -> dict[str, str]:
    client = Client(config)
    try:
        found = await client.get(CONFIG_MAPS, tokens.INFO_NAME, tokens.INFO_NAMESPACE)
    except StatusError as error:
        raise CommandError(f"{config.server} gives no cluster-info ({error.message}); run `knarr token create` on the control machine") from error
    finally:
        await client.close()
    data: dict[str, str] = found.get("data") or {}
    return data


def verify(content: str, signature: str, token: str) -> None:
    """Check a detached JWS (HS256) over cluster-info. Raises CommandError."""
    if not signature:
        raise CommandError("the token is unknown to the cluster or has ended; `knarr token create` on the control machine makes another")
    header, _, rest = signature.partition(".")
    payload, _, given = rest.partition(".")
    body = base64.urlsafe_b64encode(content.encode()).rstrip(b"=").decode()
    try:
        fields = json.loads(base64.urlsafe_b64decode(header + "=" * (-len(header) % 4)))
    except ValueError as error:
        raise CommandError("the cluster's description bears no readable signature") from error
    digest = hmac.new(token.encode(), f"{header}.{body}".encode(), hashlib.sha256).digest()
    wanted = base64.urlsafe_b64encode(digest).rstrip(b"=").decode()
    if payload or fields.get("alg") != "HS256" or fields.get("kid") != token[:6] or not hmac.compare_digest(wanted, given):
        raise CommandError("the signature of the cluster's description does not fit the token: a wrong token, or somebody in between")


def _authority(content: str) -> bytes:
    try:
        cluster = yaml.safe_load(content)["clusters"][0]["cluster"]
        return base64.b64decode(cluster["certificate-authority-data"])
    except (yaml.YAMLError, LookupError, TypeError, ValueError) as error:
        raise CommandError("the cluster's description names no authority") from error


def _write(options: JoinOptions, node_name: str, authority: bytes, settings: dict[str, Any], pair: tuple[bytes, bytes]) -> ClusterConfig:
    config = cluster_config.new_cluster(options.name, options.data_dir, oci_runtime=options.oci_runtime)
    config.nodes = [NodeConfig(node_name)]
    config.server = f"https://{options.server}"
    config.service_cidr = settings["serviceCIDR"]
    config.pod_cidr = settings["podCIDR"]
    config.balancer_range = settings["loadBalancerCIDR"]
    config.announce = "auto" if settings.get("announce") else ""
    config.pod_network = settings.get("podNetwork") or config.pod_network
    config.autopath = bool(settings.get("autopath"))
    config.direct_path = bool(settings.get("directPath", True))
    config.dns_upstreams = list(settings.get("dnsUpstreams") or ())
    config.stub_domains = dict(settings.get("stubDomains") or {})
    low, high = settings["nodePorts"]
    config.node_ports = (low, high)
    config.cluster_domain = settings["clusterDomain"]
    config.tunnel_id = settings["tunnelID"]
    config.machine_node = settings["machineNode"]
    config.machine_cidr = settings["machineCIDR"]
    config.pki.mkdir(parents=True, exist_ok=True)
    (config.pki / "ca.crt").write_bytes(authority)
    certificates.store(config.client_certificate(node_name), *pair)
    config.save()
    return config
