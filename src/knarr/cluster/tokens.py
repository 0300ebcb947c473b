"""`knarr token create|ls|rm`: bootstrap tokens, and what a joining machine must find in the cluster.

Role: the control machine's half of `knarr join`. The first token makes what kubeadm's clusters have too: the signed
kube-public/cluster-info, and roles that let the holder of a token ask for a node's certificate and nothing else. The cluster's
ranges are in kube-system/knarr-config, because a joining machine needs them before it has a Node.
Source: kubeadm phases/bootstraptoken, cluster-bootstrap token/util; SIG design-proposals cluster-lifecycle/bootstrap-discovery.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import secrets
import string
from typing import Any

from knarr.aiokits import clock
from knarr.api import times
from knarr.api.errors import StatusError
from knarr.api.resources import CLUSTER_ROLE_BINDINGS, CLUSTER_ROLES, CONFIG_MAPS, ROLE_BINDINGS, ROLES, SECRETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster import addons, addresses, nodes
from knarr.cluster.config import ClusterConfig
from knarr.cluster.lifecycle import CommandError, with_client

TOKEN_GROUP = "system:bootstrappers:knarr:default-node-token"
INFO_NAME, INFO_NAMESPACE = "cluster-info", "kube-public"
SETTINGS_NAME, SETTINGS_NAMESPACE = "knarr-config", "kube-system"
_TYPE = "bootstrap.kubernetes.io/token"
_ALPHABET = string.ascii_lowercase + string.digits
_SIGNED_SECONDS = 20.0


def ca_hash(certificate_pem: bytes) -> str:
    """What --discovery-token-ca-cert-hash takes: the SHA-256 of the authority's public key (SubjectPublicKeyInfo, DER)."""
    from cryptography import x509
    from cryptography.hazmat.primitives import serialization

    key = x509.load_pem_x509_certificate(certificate_pem).public_key()
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return "sha256:" + hashlib.sha256(der).hexdigest()


def settings(config: ClusterConfig) -> dict[str, Any]:
    """What every node of the cluster must agree on."""
    return {
        "serviceCIDR": config.service_cidr,
        "podCIDR": config.pod_cidr,
        "loadBalancerCIDR": ",".join(config.balancer_pool),
        "announce": config.announce,
        "podNetwork": config.pod_network,
        "autopath": config.autopath,
        "directPath": config.direct_path,
        "dnsUpstreams": config.dns_upstreams,
        "stubDomains": config.stub_domains,
        "nodePorts": list(config.node_ports),
        "clusterDomain": config.cluster_domain,
        "tunnelID": config.tunnel,
        "machineNode": config.nodes[0].name,
        "machineCIDR": config.node_cidr,
    }


def create(config: ClusterConfig, ttl: str) -> int:
    """Make a token and print the command that joins another machine with it."""
    try:
        seconds = times.parse_duration(ttl) / 1e9
    except ValueError as error:
        raise CommandError(f"--ttl {ttl!r} is not a duration such as 24h or 30m; 0 never ends") from error
    identity, secret = (("".join(secrets.choice(_ALPHABET) for _ in range(length))) for length in (6, 16))
    authority = (config.pki / "ca.crt").read_bytes()

    async def work(client: Client) -> int:
        await ensure_joinable(client, config, authority)
        data = {
            "token-id": identity,
            "token-secret": secret,
            "usage-bootstrap-authentication": "true",
            "usage-bootstrap-signing": "true",
            "auth-extra-groups": TOKEN_GROUP,
            "description": "made by knarr token create",
        }
        if seconds > 0:
            data["expiration"] = clock.rfc3339(clock.now() + seconds)
        body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": f"bootstrap-token-{identity}", "namespace": "kube-system"}, "type": _TYPE, "stringData": data}
        await client.create(SECRETS, body, "kube-system")
        await _wait_signed(client, identity)
        return 0

    with_client(config, work)
    own = addresses.primary_address() or nodes.gateway(config)
    print(f"knarr join {own}:{config.api_port} --token {identity}.{secret} --discovery-token-ca-cert-hash {ca_hash(authority)}")
    return 0


async def _wait_signed(client: Client, identity: str) -> None:
    """Until the controllers have signed cluster-info with a new token."""
    watch = client.watch(CONFIG_MAPS, INFO_NAMESPACE, field_selector=f"metadata.name={INFO_NAME}")
    try:
        async with asyncio.timeout(_SIGNED_SECONDS), contextlib.aclosing(watch) as events:
            async for _, seen in events:
                if f"jws-kubeconfig-{identity}" in (seen.get("data") or {}):
                    return
    except TimeoutError as error:
        raise CommandError("the controllers did not sign the token; read `knarr logs control`") from error


def show(config: ClusterConfig) -> int:
    """Print one line per token, without its secret half."""

    async def work(client: Client) -> int:
        found = (await client.list(SECRETS, "kube-system", field_selector=f"type={_TYPE}")).get("items") or []
        for item in found:
            data = {name: base64.b64decode(value).decode(errors="replace") for name, value in (item.get("data") or {}).items()}
            print(f"{data.get('token-id', ''):<8} {data.get('expiration', 'never ends'):<22} {data.get('description', '')}")
        return 0

    return with_client(config, work)


def remove(config: ClusterConfig, token: str) -> int:
    """Delete a token, named by its first half or whole; machines that joined with it stay."""

    async def work(client: Client) -> int:
        try:
            await client.delete(SECRETS, f"bootstrap-token-{token.partition('.')[0]}", "kube-system")
        except StatusError as error:
            if error.reason != "NotFound":
                raise
            raise CommandError(f"there is no token {token.partition('.')[0]!r}") from error
        return 0

    return with_client(config, work)


async def ensure_joinable(client: Client, config: ClusterConfig, authority: bytes) -> None:
    """Make or correct everything that a joining machine looks for."""
    own = addresses.primary_address() or nodes.gateway(config)
    cluster = {"certificate-authority-data": base64.b64encode(authority).decode(), "server": f"https://{own}:{config.api_port}"}
    kubeconfig = {"apiVersion": "v1", "kind": "Config", "clusters": [{"name": "", "cluster": cluster}], "contexts": [], "current-context": "", "preferences": {}, "users": []}
    await _ensure_data(client, INFO_NAMESPACE, INFO_NAME, {"kubeconfig": json.dumps(kubeconfig, indent=1)})
    await _ensure_data(client, SETTINGS_NAMESPACE, SETTINGS_NAME, {"cluster": json.dumps(settings(config), indent=1)})
    for resource, wanted in join_roles():
        await addons.apply(client, resource, wanted)


async def _ensure_data(client: Client, namespace: str, name: str, data: dict[str, str]) -> None:
    """A ConfigMap with at least these entries; other entries (signatures) stay."""
    body: Object = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": namespace}, "data": data}
    try:
        await client.create(CONFIG_MAPS, body, namespace)
    except StatusError as error:
        if error.reason != "AlreadyExists":
            raise
        current = await client.get(CONFIG_MAPS, name, namespace)
        if any((current.get("data") or {}).get(key) != value for key, value in data.items()):
            await client.patch(CONFIG_MAPS, name, namespace, {"data": data})


def join_roles() -> list[tuple[Resource, Object]]:
    """Roles and bindings that joining needs, as kubeadm makes them under its own name."""
    reads = {"apiGroups": [""], "resources": ["configmaps"], "verbs": ["get"]}
    tokens, machines = _group(TOKEN_GROUP), _group("system:nodes")
    approve = "system:certificates.k8s.io:certificatesigningrequests"
    nobody = {"apiGroup": "rbac.authorization.k8s.io", "kind": "User", "name": "system:anonymous"}
    return [
        (ROLES, {**_named("Role", "knarr:cluster-info", INFO_NAMESPACE), "rules": [{**reads, "resourceNames": [INFO_NAME]}]}),
        (ROLE_BINDINGS, _binding("knarr:cluster-info", "Role", "knarr:cluster-info", [nobody], INFO_NAMESPACE)),
        (ROLES, {**_named("Role", "knarr:config", SETTINGS_NAMESPACE), "rules": [{**reads, "resourceNames": [SETTINGS_NAME]}]}),
        (ROLE_BINDINGS, _binding("knarr:config", "Role", "knarr:config", [tokens, machines], SETTINGS_NAMESPACE)),
        (CLUSTER_ROLES, {**_named("ClusterRole", "knarr:get-nodes"), "rules": [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get"]}]}),
        (CLUSTER_ROLE_BINDINGS, _binding("knarr:get-nodes", "ClusterRole", "knarr:get-nodes", [tokens])),
        (CLUSTER_ROLE_BINDINGS, _binding("knarr:kubelet-bootstrap", "ClusterRole", "system:node-bootstrapper", [tokens])),
        (CLUSTER_ROLE_BINDINGS, _binding("knarr:node-autoapprove-bootstrap", "ClusterRole", f"{approve}:nodeclient", [tokens])),
        (CLUSTER_ROLE_BINDINGS, _binding("knarr:node-autoapprove-certificate-rotation", "ClusterRole", f"{approve}:selfnodeclient", [machines])),
        # The network parts of a machine that joined act as its node; on the control machine they have a certificate of their own.
        (CLUSTER_ROLE_BINDINGS, _binding("knarr:node-proxier", "ClusterRole", "system:node-proxier", [machines])),
        (CLUSTER_ROLE_BINDINGS, _binding("knarr:node-network", "ClusterRole", addons.NETWORK_GROUP, [machines])),
    ]


def _named(kind: str, name: str, namespace: str = "") -> Object:
    metadata: Object = {"name": name, "labels": {"app.kubernetes.io/managed-by": "knarr"}}
    return {"apiVersion": "rbac.authorization.k8s.io/v1", "kind": kind, "metadata": {**metadata, **({"namespace": namespace} if namespace else {})}}


def _binding(name: str, kind: str, role: str, subjects: list[Object], namespace: str = "") -> Object:
    body = _named("RoleBinding" if namespace else "ClusterRoleBinding", name, namespace)
    return {**body, "roleRef": {"apiGroup": "rbac.authorization.k8s.io", "kind": kind, "name": role}, "subjects": subjects}


def _group(name: str) -> Object:
    return {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": name}
