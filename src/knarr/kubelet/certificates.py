"""Certificates that a node asks the cluster for: the request itself, and keeping one fresh before it ends.

Callers: kubelet (its client certificate with `rotate_certificates`, its serving certificate with `server_tls_bootstrap`), and
`knarr join` for the first client certificate of a machine. A certificate and its key are one PEM file, replaced whole, so that
a crash leaves the old pair or the new one, never half of each. Keys are EC P-256 and never leave the machine.
Source: client-go util/certificate (certificate_manager.go, certificate_store.go, csr/csr.go), pkg/kubelet/certificate.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.aiokits.backoff import Backoff
from knarr.aiokits.log import get_logger
from knarr.api import meta
from knarr.api.errors import StatusError
from knarr.api.resources import CERTIFICATE_SIGNING_REQUESTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet.faults import UNREACHABLE

if TYPE_CHECKING:
    from cryptography import x509

log = get_logger(__name__)

CLIENT_SIGNER = "kubernetes.io/kube-apiserver-client-kubelet"
SERVING_SIGNER = "kubernetes.io/kubelet-serving"
ANSWER_SECONDS = 900.0
"""How long one request is waited for before another is made."""
_RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS = 2.0, 300.0


class Refused(Exception):
    """The cluster denied a request or could not sign it; the text says why."""


@dataclass(frozen=True, slots=True)
class Template:
    """What a certificate shall say."""

    node_name: str
    dns: tuple[str, ...] = ()
    ips: tuple[str, ...] = ()

    @property
    def serving(self) -> bool:
        return bool(self.dns or self.ips)


def make_request(template: Template) -> tuple[bytes, bytes]:
    """A fresh key and a PEM request for it: (request, key)."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:nodes"), x509.NameAttribute(NameOID.COMMON_NAME, f"system:node:{template.node_name}")]
    )
    builder = x509.CertificateSigningRequestBuilder().subject_name(subject)
    names = [*(x509.DNSName(name) for name in template.dns), *(x509.IPAddress(ipaddress.ip_address(ip)) for ip in template.ips)]
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM), pem


async def ask(client: Client, template: Template, *, timeout_seconds: float = ANSWER_SECONDS) -> tuple[bytes, bytes]:
    """Have a certificate signed by the cluster: (certificate, key), both PEM.

    Raises:
      Refused: denied, or the signer says that it cannot.
      TimeoutError: nobody approved it in time.
      StatusError, HTTPError: the request could not be made.
    """
    request, key = make_request(template)
    serving = template.serving
    created = await client.create(
        CERTIFICATE_SIGNING_REQUESTS,
        {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"generateName": "csr-"},
            "spec": {
                "request": base64.b64encode(request).decode(),
                "signerName": SERVING_SIGNER if serving else CLIENT_SIGNER,
                "usages": ["digital signature", "server auth" if serving else "client auth"],
            },
        },
    )
    async with asyncio.timeout(timeout_seconds):
        return await _answer(client, created), key


async def _answer(client: Client, request: Object) -> bytes:
    name = request["metadata"]["name"]
    while True:
        version = request["metadata"]["resourceVersion"]
        watch = client.watch(CERTIFICATE_SIGNING_REQUESTS, resource_version=version, field_selector=f"metadata.name={name}")
        async with contextlib.aclosing(watch) as events:
            async for kind, seen in events:
                if kind == "DELETED":
                    raise Refused(f"certificate signing request {name} was deleted")
                if kind in ("ADDED", "MODIFIED") and (certificate := _signed(seen)) is not None:
                    return certificate
        request = await client.get(CERTIFICATE_SIGNING_REQUESTS, name)
        if (certificate := _signed(request)) is not None:
            return certificate


def _signed(request: Object) -> bytes | None:
    status = request.get("status") or {}
    for bad in ("Denied", "Failed"):
        condition = meta.get_condition(status.get("conditions") or [], bad)
        if condition is not None and condition.get("status") == "True":
            name = request["metadata"]["name"]
            raise Refused(f"certificate signing request {name} is {bad.lower()}: {condition.get('reason', '')}: {condition.get('message', '')}")
    if not status.get("certificate"):
        return None
    return base64.b64decode(status["certificate"])


def store(path: str | os.PathLike[str], certificate: bytes, key: bytes) -> None:
    """Write certificate and key as one file that root alone reads, in one step. Raises OSError."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name("." + target.name)
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(certificate.rstrip() + b"\n" + key)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(target)


def load(path: str | os.PathLike[str]) -> tuple[bytes, bytes] | None:
    """(certificate, key) from such a file; None when there is none or it holds no pair."""
    try:
        text = Path(path).read_bytes()
    except FileNotFoundError:
        return None
    marker = text.find(b"-----BEGIN PRIVATE KEY-----")
    if marker < 0 or b"-----BEGIN CERTIFICATE-----" not in text[:marker]:
        return None
    return text[:marker], text[marker:]


def parse(certificate: bytes) -> x509.Certificate:
    """The leaf of a PEM chain. Raises ValueError."""
    from cryptography import x509

    return x509.load_pem_x509_certificate(certificate)


def rotation_time(certificate: x509.Certificate, fraction: float) -> float:
    """When (epoch seconds) this share of its life has passed."""
    start, end = certificate.not_valid_before_utc.timestamp(), certificate.not_valid_after_utc.timestamp()
    return start + (end - start) * fraction


class Rotation:
    """Keeps one certificate fresh: asks for it when it is missing, ends soon, or no longer says what it should.

    Args:
      path: the PEM file of certificate and key.
      template: what the certificate shall say now; None while that is not known yet.
      installed: called with (certificate, key) whenever there is a new pair.
      fraction: the share of its life after which a certificate is replaced; by default it differs each time, so that nodes
        that joined together do not all ask together.
    """

    def __init__(
        self,
        client: Client,
        path: str,
        template: Callable[[], Template | None],
        installed: Callable[[bytes, bytes], None],
        *,
        fraction: Callable[[], float] = lambda: random.uniform(0.7, 0.9),
    ) -> None:
        self._client = client
        self._path = path
        self._template = template
        self._installed = installed
        self._fraction = fraction
        self._wake = asyncio.Event()
        self._due: tuple[bytes, float] | None = None
        """The certificate and when to replace it."""
        self._fresh = b""

    def changed(self) -> None:
        """What the certificate shall say may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Until cancelled. Failures are tried again with growing pauses; the old certificate stays meanwhile."""
        backoff = Backoff(_RETRY_FIRST_SECONDS, _RETRY_MOST_SECONDS)
        while True:
            template = self._template()
            wait: float | None = None
            if template is not None:
                wait = self._seconds_left(template)
                if wait <= 0:
                    try:
                        await self._renew(template)
                        backoff.reset()
                        continue
                    except (Refused, TimeoutError, StatusError, *UNREACHABLE) as error:
                        wait = backoff.next_seconds()
                        log.warning("certificate not renewed", file=self._path, delay_seconds=wait, error=str(error))
            self._wake.clear()
            try:
                async with asyncio.timeout(wait):
                    await self._wake.wait()
            except TimeoutError:
                continue

    def _seconds_left(self, template: Template) -> float:
        pair = load(self._path)
        if pair is None:
            return 0.0
        certificate = parse(pair[0])
        if template.serving and not covers(certificate, template.dns, template.ips):
            return 0.0
        if self._due is None or self._due[0] != pair[0]:
            due = rotation_time(certificate, self._fraction())
            if self._fresh == pair[0]:
                # Signers date certificates back a little; one of a very short life is not replaced at once for that.
                due = max(due, (clock.now() + certificate.not_valid_after_utc.timestamp()) / 2)
            self._due = (pair[0], due)
        return self._due[1] - clock.now()

    async def _renew(self, template: Template) -> None:
        certificate, key = await ask(self._client, template)
        store(self._path, certificate, key)
        self._fresh = certificate.rstrip() + b"\n"
        log.info("certificate renewed", file=self._path, until=parse(certificate).not_valid_after_utc.isoformat())
        self._installed(certificate, key)


def covers(certificate: x509.Certificate, dns: Sequence[str], ips: Sequence[str]) -> bool:
    """Whether a certificate names all of these."""
    from cryptography import x509

    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return not dns and not ips
    return set(dns) <= set(names.get_values_for_type(x509.DNSName)) and set(ips) <= {str(ip) for ip in names.get_values_for_type(x509.IPAddress)}
