"""How to reach one API server: address, trust and credentials.

Callers make a ClientConfig from a kubeconfig, from the mounted service account, or by hand,
and hand it to `Client`. Credentials that change with time (token files, exec plugins) are
read again when they are due. Secrets never show in `repr`.
Source: client-go rest/config.go, plugin/pkg/client/auth/exec; client.authentication.k8s.io/v1.
"""

from __future__ import annotations

import asyncio
import base64
import os
import ssl
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import orjson

from knarr.aiokits import clock
from knarr.client import kubeconfig

_SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
_EXEC_API = "client.authentication.k8s.io/v1"
# Token files rotate on disk; upstream reads them again this often.
_TOKEN_FILE_SECONDS = 60.0


class CredentialError(Exception):
    """Credentials cannot be had: the exec plugin failed or answered nonsense, a file is missing."""


@dataclass(frozen=True, slots=True)
class ExecPlugin:
    """A command that prints an ExecCredential."""

    command: str
    args: Sequence[str] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    api_version: str = _EXEC_API
    provide_cluster_info: bool = False


@dataclass(frozen=True, slots=True)
class ClientConfig:
    """Address, trust and credentials of one API server."""

    server: str
    """Base URL, e.g. "https://127.0.0.1:6443"; a path in it prefixes every request."""
    ca_data: bytes | None = None
    """PEM bundle that signs the server; None trusts the system's."""
    client_cert: bytes | None = field(default=None, repr=False)
    """PEM client certificate (chain)."""
    client_key: bytes | None = field(default=None, repr=False)
    """PEM key of the client certificate."""
    token: str = field(default="", repr=False)
    """Bearer token."""
    token_file: str = ""
    """File with a bearer token, read again every minute; wins over `token`."""
    username: str = ""
    password: str = field(default="", repr=False)
    exec_plugin: ExecPlugin | None = None
    insecure_skip_tls_verify: bool = False
    tls_server_name: str = ""
    """Name expected in the server's certificate, when it is not the host of `server`."""
    namespace: str = "default"
    """Namespace of the context, for callers that need a default."""
    user_agent: str = "knarr/v1.35.0"
    impersonate_user: str = ""
    impersonate_groups: Sequence[str] = ()

    @classmethod
    def from_kubeconfig(cls, path: str | os.PathLike[str] | None = None, context: str | None = None) -> ClientConfig:
        """Read the context (default: the current one) of a file (default: $KUBECONFIG, ~/.kube/config).

        Raises:
          kubeconfig.KubeconfigError: no such context, cluster or user, or a bad file.
        """
        return cls.from_kubeconfig_dict(kubeconfig.load(path), context)

    @classmethod
    def from_kubeconfig_dict(cls, config: dict[str, Any], context: str | None = None) -> ClientConfig:
        """The same from loaded content."""
        context = context or config.get("current-context") or ""
        if not context:
            raise kubeconfig.KubeconfigError("no current context is set")
        chosen = kubeconfig.entry(config, "contexts", context)
        cluster = kubeconfig.entry(config, "clusters", chosen.get("cluster", ""))
        user = kubeconfig.entry(config, "users", chosen["user"]) if chosen.get("user") else {}
        plugin = user.get("exec")
        return cls(
            server=cluster.get("server") or "http://localhost:8080",
            ca_data=_data(cluster, "certificate-authority"),
            client_cert=_data(user, "client-certificate"),
            client_key=_data(user, "client-key"),
            token=user.get("token") or "",
            token_file=user.get("tokenFile") or "",
            username=user.get("username") or "",
            password=user.get("password") or "",
            exec_plugin=_exec_plugin(plugin) if plugin else None,
            insecure_skip_tls_verify=bool(cluster.get("insecure-skip-tls-verify")),
            tls_server_name=cluster.get("tls-server-name") or "",
            namespace=chosen.get("namespace") or "default",
            impersonate_user=user.get("as") or "",
            impersonate_groups=tuple(user.get("as-groups") or ()),
        )

    @classmethod
    def in_cluster(cls) -> ClientConfig:
        """Use the service account mounted into this pod.

        Raises:
          CredentialError: this is no pod with a service account.
        """
        host, port = os.environ.get("KUBERNETES_SERVICE_HOST"), os.environ.get("KUBERNETES_SERVICE_PORT")
        if not host or not port:
            raise CredentialError("KUBERNETES_SERVICE_HOST and KUBERNETES_SERVICE_PORT are not set")
        try:
            ca_data = (_SERVICE_ACCOUNT / "ca.crt").read_bytes()
            namespace = (_SERVICE_ACCOUNT / "namespace").read_text().strip()
        except OSError as error:
            raise CredentialError(f"service account is not mounted: {error}") from error
        address = f"[{host}]" if ":" in host else host
        return cls(
            server=f"https://{address}:{port}", ca_data=ca_data, token_file=str(_SERVICE_ACCOUNT / "token"), namespace=namespace
        )

    def with_user_agent(self, user_agent: str) -> ClientConfig:
        return replace(self, user_agent=user_agent)

    def to_kubeconfig(self, name: str = "knarr") -> dict[str, Any]:
        """Give this as a kubeconfig with one context of that name."""
        cluster: dict[str, Any] = {"server": self.server}
        if self.ca_data:
            cluster["certificate-authority-data"] = base64.b64encode(self.ca_data).decode()
        if self.insecure_skip_tls_verify:
            cluster["insecure-skip-tls-verify"] = True
        if self.tls_server_name:
            cluster["tls-server-name"] = self.tls_server_name
        user: dict[str, Any] = {}
        if self.client_cert and self.client_key:
            user["client-certificate-data"] = base64.b64encode(self.client_cert).decode()
            user["client-key-data"] = base64.b64encode(self.client_key).decode()
        if self.token:
            user["token"] = self.token
        if self.token_file:
            user["tokenFile"] = self.token_file
        config = kubeconfig.empty()
        kubeconfig.put_entry(config, "clusters", name, cluster)
        kubeconfig.put_entry(config, "users", name, user)
        kubeconfig.put_entry(config, "contexts", name, {"cluster": name, "user": name})
        config["current-context"] = name
        return config

    def ssl_context(self, client_cert: bytes | None = None, client_key: bytes | None = None) -> ssl.SSLContext | None:
        """Make the TLS settings; None for a plain http server.

        Args:
          client_cert, client_key: PEM, instead of the configured ones (exec plugins).
        """
        if urlsplit(self.server).scheme != "https":
            return None
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        if self.insecure_skip_tls_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        elif self.ca_data:
            context.load_verify_locations(cadata=self.ca_data.decode())
        else:
            context.load_default_certs()
        cert, key = client_cert or self.client_cert, client_key or self.client_key
        if cert and key:
            _load_cert_chain(context, cert, key)
        return context


def _load_cert_chain(context: ssl.SSLContext, cert: bytes, key: bytes) -> None:
    # OpenSSL's Python face reads files only; an anonymous memory file keeps the key off the disk.
    handle = os.memfd_create("knarr-client-cert")
    try:
        os.write(handle, cert.rstrip() + b"\n" + key)
        context.load_cert_chain(f"/proc/self/fd/{handle}")
    finally:
        os.close(handle)


def _data(body: dict[str, Any], name: str) -> bytes | None:
    if encoded := body.get(f"{name}-data"):
        return base64.b64decode(encoded)
    if path := body.get(name):
        try:
            return Path(path).read_bytes()
        except OSError as error:
            raise kubeconfig.KubeconfigError(f"unable to read {name} {path}: {error}") from error
    return None


def _exec_plugin(body: dict[str, Any]) -> ExecPlugin:
    return ExecPlugin(
        command=body.get("command", ""),
        args=tuple(body.get("args") or ()),
        env={item["name"]: item["value"] for item in body.get("env") or ()},
        api_version=body.get("apiVersion") or _EXEC_API,
        provide_cluster_info=bool(body.get("provideClusterInfo")),
    )


class Credentials:
    """The current credentials of a config: a token and, from exec plugins, a certificate.

    One per Client. `headers()` never blocks once `refresh()` was awaited and nothing expired.
    """

    __slots__ = ("_expires", "_token", "certificate", "config")

    def __init__(self, config: ClientConfig) -> None:
        self.config = config
        self.certificate: tuple[bytes, bytes] | None = None
        self._token = config.token
        self._expires = float("inf") if not (config.token_file or config.exec_plugin) else 0.0

    def due(self) -> bool:
        return clock.now() >= self._expires

    def invalidate(self) -> None:
        """The server answered 401: ask again for what can change."""
        if self.config.token_file or self.config.exec_plugin:
            self._expires = 0.0

    async def refresh(self) -> bool:
        """Read what is due; says whether the client certificate changed (connections must be made anew).

        Raises:
          CredentialError: the file or the plugin gives nothing usable.
        """
        if self.config.token_file:
            try:
                self._token = Path(self.config.token_file).read_text().strip()
            except OSError as error:
                raise CredentialError(f"token file: {error}") from error
            self._expires = clock.now() + _TOKEN_FILE_SECONDS
        elif self.config.exec_plugin:
            return await self._run_plugin(self.config.exec_plugin)
        return False

    async def _run_plugin(self, plugin: ExecPlugin) -> bool:
        info: dict[str, Any] = {"apiVersion": plugin.api_version, "kind": "ExecCredential", "spec": {"interactive": False}}
        if plugin.provide_cluster_info:
            cluster: dict[str, Any] = {"server": self.config.server}
            if self.config.ca_data:
                cluster["certificate-authority-data"] = base64.b64encode(self.config.ca_data).decode()
            info["spec"]["cluster"] = cluster
        env = {**os.environ, **plugin.env, "KUBERNETES_EXEC_INFO": orjson.dumps(info).decode()}
        try:
            process = await asyncio.create_subprocess_exec(
                plugin.command, *plugin.args, env=env, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
            )
            output, errors = await process.communicate()
        except OSError as error:
            raise CredentialError(f"exec plugin {plugin.command}: {error}") from error
        if process.returncode:
            raise CredentialError(f"exec plugin {plugin.command} exited with {process.returncode}: {errors.decode(errors='replace').strip()}")
        try:
            status = orjson.loads(output)["status"]
        except (ValueError, KeyError, TypeError) as error:
            raise CredentialError(f"exec plugin {plugin.command} printed no ExecCredential with a status") from error
        self._token = status.get("token") or ""
        expires = status.get("expirationTimestamp")
        self._expires = clock.parse_rfc3339(expires) if expires else float("inf")
        before = self.certificate
        cert, key = status.get("clientCertificateData"), status.get("clientKeyData")
        self.certificate = (cert.encode(), key.encode()) if cert and key else None
        return before != self.certificate

    def headers(self) -> list[tuple[str, str]]:
        """Give the headers that carry the credentials."""
        result = []
        if self._token:
            result.append(("Authorization", f"Bearer {self._token}"))
        elif self.config.username:
            basic = base64.b64encode(f"{self.config.username}:{self.config.password}".encode()).decode()
            result.append(("Authorization", f"Basic {basic}"))
        if self.config.impersonate_user:
            result.append(("Impersonate-User", self.config.impersonate_user))
            result += [("Impersonate-Group", group) for group in self.config.impersonate_groups]
        return result
