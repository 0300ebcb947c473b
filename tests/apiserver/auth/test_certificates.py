"""Client certificates that are not good: what is told to those who show them."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
import ssl
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from knarr.api import resources as R
from knarr.client.rest import Client
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import refused

DAY = timedelta(days=1)
Authority = tuple[x509.Certificate, ec.EllipticCurvePrivateKey]


def the_clusters() -> Authority:
    """The CA that the test API servers trust."""
    testing.test_pki()
    folder = Path(testing._folder().name)
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    return x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes()), signer


def issue(
    by: Authority | None, name: str, *extensions: x509.ExtensionType, begins: timedelta = -DAY, ends: timedelta = DAY, critical: bool = True
) -> Authority:
    """A certificate by an authority, or by itself, valid from and to so long from now."""
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    subject = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters"), x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer, signer = (by[0].subject, by[1]) if by is not None else (subject, key)
    builder = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now + begins).not_valid_after(now + ends)
    for extension in extensions:
        builder = builder.add_extension(extension, critical)
    return builder.sign(signer, hashes.SHA256()), key


def authority(by: Authority | None, *more: x509.ExtensionType, depth: int | None = None, ends: timedelta = DAY) -> Authority:
    return issue(by, "some authority", x509.BasicConstraints(True, depth), *more, ends=ends)


def pem(made: Authority, *others: Authority) -> tuple[bytes, bytes]:
    """(certificate with those above it, key) as clients have them."""
    private = made[1].private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return b"".join(one[0].public_bytes(serialization.Encoding.PEM) for one in (made, *others)), private


def certificate(begins: timedelta, ends: timedelta) -> tuple[bytes, bytes]:
    """An administrator's certificate by the cluster's CA: (certificate, key)."""
    return pem(issue(the_clusters(), "someone", x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), begins=begins, ends=ends))


def client_of(server: RunningAPIServer, pair: tuple[bytes, bytes], **settings: str) -> Client:
    return Client(dataclasses.replace(server.client_config, client_cert=pair[0], client_key=pair[1], **settings))


@pytest.mark.parametrize(("begins", "ends"), [(-3 * DAY, -2 * DAY), (DAY, 2 * DAY)], ids=["expired", "not yet valid"])
async def test_a_certificate_that_is_not_good_now_is_unauthorized_even_where_anyone_may_come_in(
    apiserver: RunningAPIServer, begins: timedelta, ends: timedelta
) -> None:
    pair = certificate(begins, ends)
    client = client_of(apiserver, pair)
    try:
        with refused(401, "Unauthorized"):
            await client.list(R.NAMESPACES)
        with refused(401, "Unauthorized"):
            await client.request("GET", "/healthz")
    finally:
        await client.close()


async def test_a_token_counts_beside_an_expired_certificate(apiserver: RunningAPIServer) -> None:
    await apiserver.client.create(R.SERVICE_ACCOUNTS, {"metadata": {"name": "robot"}}, "default")
    asked = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    made = await apiserver.client.create(R.SERVICE_ACCOUNTS, asked, "default", subresource="token", name="robot")
    pair = certificate(-3 * DAY, -2 * DAY)
    client = client_of(apiserver, pair, token=made["status"]["token"])
    try:
        with refused(403, 'User "system:serviceaccount:default:robot" cannot list resource'):
            await client.list(R.NAMESPACES)
    finally:
        await client.close()


async def test_a_good_certificate_is_its_user(apiserver: RunningAPIServer) -> None:
    pair = certificate(-DAY, DAY)
    client = client_of(apiserver, pair)
    try:
        assert (await client.list(R.NAMESPACES))["items"]
    finally:
        await client.close()


def below(*more: x509.ExtensionType, depth: int | None = None, ends: timedelta = DAY) -> tuple[bytes, bytes]:
    """A client's certificate, with that of an authority between it and the cluster's."""
    middle = authority(the_clusters(), *more, depth=depth, ends=ends)
    return pem(issue(middle, "someone", x509.SubjectAlternativeName([x509.DNSName("web.example.com")])), middle)


def permits(domain: str) -> x509.NameConstraints:
    return x509.NameConstraints([x509.DNSName(domain)], None)


def two_between(depth: int) -> tuple[bytes, bytes]:
    upper = authority(the_clusters(), depth=depth)
    lower = authority(upper)
    return pem(issue(lower, "someone"), lower, upper)


def forged() -> tuple[bytes, bytes]:
    """By an authority that only has the name of the cluster's."""
    real = the_clusters()[0]
    key = ec.generate_private_key(ec.SECP256R1())
    return pem(issue((real, key), "someone"))


def by_a_client() -> tuple[bytes, bytes]:
    client = issue(the_clusters(), "someone")
    return pem(issue(client, "someone else"), client)


GOOD = {
    "an authority between": below,
    "an authority for clients": lambda: below(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH])),
    "within its domain": lambda: below(permits("example.com")),
    "as deep as allowed": lambda: two_between(1),
}
BAD = {
    "of an unknown authority": lambda: pem(issue(authority(None), "someone")),
    "of an unknown authority that is shown": lambda: pem(issue(own := authority(None), "someone"), own),
    "by itself": lambda: pem(issue(None, "someone")),
    "forged": forged,
    "by a client": by_a_client,
    "for servers": lambda: pem(issue(the_clusters(), "someone", x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]))),
    "by an authority for servers": lambda: below(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH])),
    "by an expired authority": lambda: below(ends=-DAY / 2),
    "outside its domain": lambda: below(permits("example.org")),
    "deeper than allowed": lambda: two_between(0),
    "with a demand nobody knows": lambda: pem(issue(the_clusters(), "someone", x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\x05\x00"))),
}  # fmt: skip


@pytest.mark.parametrize("made", GOOD.values(), ids=GOOD)
async def test_certificates_that_lead_to_the_authority_are_good(apiserver: RunningAPIServer, made: Callable[[], tuple[bytes, bytes]]) -> None:
    client = client_of(apiserver, made())
    try:
        assert (await client.list(R.NAMESPACES))["items"]
    finally:
        await client.close()


@pytest.mark.parametrize("made", BAD.values(), ids=BAD)
async def test_certificates_that_do_not_are_told_so(apiserver: RunningAPIServer, made: Callable[[], tuple[bytes, bytes]]) -> None:
    client = client_of(apiserver, made())
    try:
        with refused(401, "Unauthorized"):
            await client.list(R.NAMESPACES)
    finally:
        await client.close()


def ask(server: RunningAPIServer, context: ssl.SSLContext, session: ssl.SSLSession | None) -> tuple[bytes, ssl.SSLSession | None, bool]:
    """One request over a connection of its own: (answer's first line, the session to resume, whether this one was resumed)."""
    with socket.create_connection(("127.0.0.1", server.server.port), 10) as plain, context.wrap_socket(plain, session=session) as tls:
        tls.sendall(b"GET /api/v1/namespaces HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while part := tls.recv(65536):
            answer += part
        return answer.partition(b"\r\n")[0], tls.session, bool(tls.session_reused)


async def test_a_resumed_session_is_the_same_user(apiserver: RunningAPIServer, tmp_path: Path) -> None:
    """It shows the client's own certificate only, not that of the authority between."""
    chain, key = below()
    (tmp_path / "pair.pem").write_bytes(chain + key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(tmp_path / "pair.pem")
    first, session, _ = await asyncio.to_thread(ask, apiserver, context, None)
    again, _, resumed = await asyncio.to_thread(ask, apiserver, context, session)
    assert resumed
    assert (first, again) == (b"HTTP/1.1 200 OK",) * 2
