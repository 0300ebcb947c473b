"""Certificates that the proxy shows: from Secrets, for the names that ask for them.

Role: `controller` collects them after every change, `haproxy` brings them into the running proxy. Pure but for the one that is made.
Invariants: a Secret whose chain and key do not belong together is not used. One Secret is the fallback of names that nothing else
serves, the oldest of those that a Gateway wants so; the others of these serve the names in their certificates.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from knarr.aiokits.clock import now
from knarr.api.types import Object
from knarr.network.ingress.alternatives import Action
from knarr.network.ingress.routes import ANY_NAME, Routes, Server


@dataclass(slots=True)
class Certificates:
    """Certificate chains with keys, as PEM, by file name; the host names of each; and what other names are shown.

    Attributes:
      checks: File name to the authorities of which clients are asked for certificates.
      keys: Our own certificates with keys, for backends, by file name.
    """

    pems: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, list[str]] = field(default_factory=dict)
    checks: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    fallback: str = ""


def collect(routes: Routes, secret: Callable[[str], Object | None], otherwise: str) -> tuple[Certificates, list[tuple[str, str]]]:
    """All certificates of a routing table, and (host name, Secret) of those that cannot be had.

    Args:
      otherwise: Certificate of names that have none.
    """
    wanted = routes.certificates
    out, missing, names = Certificates(keys=dict(routes.keys)), [], {host for host in wanted if not host.startswith(ANY_NAME)}
    for host, key in sorted(wanted.items(), key=lambda item: item[0].startswith(ANY_NAME)):
        if not key:
            continue
        pem = secret_pem(secret(key))
        if pem is None:
            missing.append((host, key))
            continue
        hosts = [host]
        if host.startswith(ANY_NAME):
            out.fallback = out.fallback or pem
            hosts = sorted(_own_names(pem) - names)
        names.update(hosts)
        for served in hosts:
            _serve(out, key, pem, served, routes.checks.get(served, ""))
    for host in sorted(set(routes.checks) - {name for hosts in out.hosts.values() for name in hosts}):
        _serve(out, "", out.fallback or otherwise, host, routes.checks[host])
    return out, missing


def _serve(out: Certificates, key: str, pem: str, host: str, check: str) -> None:
    # What is asked of clients belongs to a file, so a certificate has one for each.
    name = certificate_name(f"{key} {check}" if check else key)
    out.pems[name] = pem
    out.hosts.setdefault(name, []).append(host)
    if check:
        out.checks[name] = check


def _own_names(pem: str) -> set[str]:
    """The host names that a certificate is for."""
    try:
        names = x509.load_pem_x509_certificate(pem.encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {name.lower() for name in names.value.get_values_for_type(x509.DNSName)}


def authority_name(pem: str) -> str:
    """File name for certificates of authorities."""
    return hashlib.blake2b(pem.encode(), digest_size=10).hexdigest() + ".ca"


def readable(pem: str) -> bool:
    """Whether a text has certificates, and nothing else that claims to be one."""
    try:
        return bool(x509.load_pem_x509_certificates(pem.encode()))
    except ValueError:
        return False


def server_action(routes: Routes, server: Server) -> Action:
    """The action that sends a request through a server, which is added to the table."""
    name = "s" + hashlib.blake2b(repr((server.sni, server.authority, server.name, server.certificate)).encode(), digest_size=8).hexdigest()
    routes.servers[name] = server
    return ("server", name)


def certificate_name(secret: str) -> str:
    """File name for a Secret's certificate."""
    return hashlib.blake2b(secret.encode(), digest_size=10).hexdigest() + ".pem"


def secret_pem(secret: Object | None) -> str | None:
    """Chain and key of a TLS Secret that belong together, or None."""
    if secret is None:
        return None
    try:
        data = secret.get("data") or {}
        chain, key = (base64.b64decode(data[name]).decode() for name in ("tls.crt", "tls.key"))
        certificate = x509.load_pem_x509_certificate(chain.encode())
        private = serialization.load_pem_private_key(key.encode(), None)
        fmt = (serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        if certificate.public_key().public_bytes(*fmt) != private.public_key().public_bytes(*fmt):
            return None
    except (KeyError, ValueError, TypeError, UnicodeDecodeError, binascii.Error):
        return None
    return f"{chain.strip()}\n{key.strip()}\n"


def self_signed() -> str:
    """What is shown for names without a certificate of their own."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "Kubernetes Ingress Controller Fake Certificate")])
    present = datetime.datetime.fromtimestamp(now(), datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(present - datetime.timedelta(days=1))
        .not_valid_after(present + datetime.timedelta(days=3650))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return certificate.public_bytes(serialization.Encoding.PEM).decode() + private.decode()
