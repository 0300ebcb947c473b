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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from knarr.aiokits.clock import now
from knarr.api.types import Object
from knarr.network.ingress.model import ANY_NAME


@dataclass(slots=True)
class Certificates:
    """Certificate chains with keys, as PEM, by file name; the host names of each; and what other names are shown."""

    pems: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, list[str]] = field(default_factory=dict)
    fallback: str = ""


def collect(wanted: Mapping[str, str], secret: Callable[[str], Object | None]) -> tuple[Certificates, list[tuple[str, str]]]:
    """All certificates of a routing table, and (host name, Secret) of those that cannot be had.

    Args:
      wanted: Host name to Secret ("namespace/name"); ANY_NAME with a Secret behind it for one that serves all names.
    """
    out, missing, names = Certificates(), [], {host for host in wanted if not host.startswith(ANY_NAME)}
    for host, key in sorted(wanted.items(), key=lambda item: item[0].startswith(ANY_NAME)):
        if not key:
            continue
        pem = secret_pem(secret(key))
        if pem is None:
            missing.append((host, key))
            continue
        name = certificate_name(key)
        if host.startswith(ANY_NAME):
            out.fallback = out.fallback or pem
            hosts = sorted(_own_names(pem) - names)
            names.update(hosts)
        else:
            hosts = [host]
        if hosts:
            out.pems[name] = pem
            out.hosts.setdefault(name, []).extend(hosts)
    return out, missing


def _own_names(pem: str) -> set[str]:
    """The host names that a certificate is for."""
    try:
        names = x509.load_pem_x509_certificate(pem.encode()).extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return set()
    return {name.lower() for name in names.value.get_values_for_type(x509.DNSName)}


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
