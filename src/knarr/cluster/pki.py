"""The cluster's certificates and keys: EC P-256, made in milliseconds, kept in the data folder.

Role: called by `up` before the components start; components get paths. Names and groups in the certificates are the ones
that the bootstrap RBAC policy knows (kubeadm's layout: kubernetes.io/docs/setup/best-practices/certificates).
Certificates with under 30 days left are made again from the same authority, by the running processes (see renewal) or the next `up`.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_DAYS = 3650
LEAF_DAYS = 365
RENEW_DAYS = 30


@dataclass(frozen=True, slots=True)
class KeyPair:
    """Paths of a PEM certificate and its PEM private key."""

    certificate: Path
    key: Path

    def certificate_pem(self) -> bytes:
        return self.certificate.read_bytes()

    def key_pem(self) -> bytes:
        return self.key.read_bytes()


def _write_private(path: Path, data: bytes) -> None:
    """Replace a file whole; keys are readable by root alone."""
    temporary = path.with_name("." + path.name)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600 if path.suffix == ".key" else 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    temporary.replace(path)


def _key_bytes(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _load_key(path: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key(path.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    return key


class Authority:
    """A certificate authority on disk; created on first use."""

    def __init__(self, folder: Path, file_name: str, common_name: str) -> None:
        self.pair = KeyPair(folder / f"{file_name}.crt", folder / f"{file_name}.key")
        folder.mkdir(parents=True, exist_ok=True)
        if not (self.pair.certificate.is_file() and self.pair.key.is_file()):
            self._create(common_name)
        self._key = _load_key(self.pair.key)
        self._certificate = x509.load_pem_x509_certificate(self.pair.certificate.read_bytes())

    def _create(self, common_name: str) -> None:
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)])
        now = datetime.datetime.now(datetime.UTC)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=AUTHORITY_DAYS))
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write_private(self.pair.key, _key_bytes(key))
        _write_private(self.pair.certificate, certificate.public_bytes(serialization.Encoding.PEM))

    def issue(
        self,
        path: Path,
        common_name: str,
        *,
        groups: Sequence[str] = (),
        hosts: Sequence[str] = (),
        server: bool = False,
        client: bool = True,
    ) -> KeyPair:
        """A certificate at `path`.crt with its key at `path`.key; an existing one is kept while it fits and lasts.

        Args:
          hosts: DNS names and IP addresses for the subject alternative names.
        """
        pair = KeyPair(path.with_name(path.name + ".crt"), path.with_name(path.name + ".key"))
        if self._usable(pair, hosts):
            return pair
        path.parent.mkdir(parents=True, exist_ok=True)
        key = ec.generate_private_key(ec.SECP256R1())
        subject = [x509.NameAttribute(NameOID.ORGANIZATION_NAME, group) for group in groups]
        usages = [*([ExtendedKeyUsageOID.SERVER_AUTH] if server else []), *([ExtendedKeyUsageOID.CLIENT_AUTH] if client else [])]
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([*subject, x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
            .issuer_name(self._certificate.subject)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(minutes=5))
            .not_valid_after(now + datetime.timedelta(days=LEAF_DAYS))
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(sign_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
        )
        if hosts:
            builder = builder.add_extension(x509.SubjectAlternativeName([_general_name(host) for host in hosts]), critical=False)
        certificate = builder.sign(self._key, hashes.SHA256())
        _write_private(pair.key, _key_bytes(key))
        _write_private(pair.certificate, certificate.public_bytes(serialization.Encoding.PEM))
        return pair

    def _usable(self, pair: KeyPair, hosts: Sequence[str]) -> bool:
        if not (pair.certificate.is_file() and pair.key.is_file()):
            return False
        certificate = x509.load_pem_x509_certificate(pair.certificate.read_bytes())
        if certificate.issuer != self._certificate.subject:
            return False
        if certificate.not_valid_after_utc - datetime.datetime.now(datetime.UTC) < datetime.timedelta(days=RENEW_DAYS):
            return False
        try:
            names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        except x509.ExtensionNotFound:
            return not hosts
        return set(names) == {_general_name(host) for host in hosts}


def _usage(*, sign_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        content_commitment=False,
        key_encipherment=not sign_certificates,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _general_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


@dataclass(frozen=True, slots=True)
class ClusterPKI:
    """All key pairs of a cluster; node pairs are issued per node by `node_client` and `node_serving`."""

    authority: Authority
    front_proxy_authority: Authority
    api_server: KeyPair
    kubelet_client: KeyPair
    front_proxy_client: KeyPair
    admin: KeyPair
    controller_manager: KeyPair
    scheduler: KeyPair
    network: KeyPair
    service_account_key: Path

    def node_client(self, folder: Path, node_name: str) -> KeyPair:
        return self.authority.issue(folder / f"kubelet-client-{node_name}", f"system:node:{node_name}", groups=["system:nodes"])

    def node_serving(self, folder: Path, node_name: str, addresses: Sequence[str]) -> KeyPair:
        hosts = list(dict.fromkeys([node_name, "localhost", "127.0.0.1", *addresses]))
        return self.authority.issue(folder / f"kubelet-serving-{node_name}", f"system:node:{node_name}", groups=["system:nodes"], hosts=hosts, server=True)


def ensure(folder: Path, api_hosts: Sequence[str]) -> ClusterPKI:
    """Make what is missing or about to end; everything else is left alone.

    Args:
      api_hosts: every name and address that clients may use for the API server.
    """
    authority = Authority(folder, "ca", "kubernetes")
    front_proxy = Authority(folder, "front-proxy-ca", "front-proxy-ca")
    signing_key = folder / "sa.key"
    if not signing_key.is_file():
        key = ec.generate_private_key(ec.SECP256R1())
        _write_private(signing_key, _key_bytes(key))
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        _write_private(folder / "sa.pub", public)
    return ClusterPKI(
        authority=authority,
        front_proxy_authority=front_proxy,
        api_server=authority.issue(folder / "apiserver", "kube-apiserver", hosts=api_hosts, server=True, client=False),
        kubelet_client=authority.issue(folder / "apiserver-kubelet-client", "kube-apiserver-kubelet-client", groups=["system:masters"]),
        front_proxy_client=front_proxy.issue(folder / "front-proxy-client", "front-proxy-client"),
        admin=authority.issue(folder / "admin", "kubernetes-admin", groups=["system:masters"]),
        # Upstream gives every controller a service account of its own with a bootstrap role; here they share one client, so its
        # certificate needs the union, which is everything.
        controller_manager=authority.issue(folder / "controller-manager", "system:kube-controller-manager", groups=["system:masters"]),
        scheduler=authority.issue(folder / "scheduler", "system:kube-scheduler"),
        # The node's network parts (service proxy, policy, DNS) share one client: kube-proxy's role by name, the rest by group.
        network=authority.issue(folder / "network", "system:kube-proxy", groups=["knarr:network"]),
        service_account_key=signing_key,
    )
