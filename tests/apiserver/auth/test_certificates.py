"""Client certificates that are not good: what is told to those who show them."""

from __future__ import annotations

import dataclasses
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


def certificate(begins: timedelta, ends: timedelta) -> tuple[bytes, bytes]:
    """A certificate of an administrator by the cluster's CA, valid from and to so long from now: (certificate, key)."""
    folder = Path(testing._folder().name)
    testing.test_pki()
    authority = x509.load_pem_x509_certificate((folder / "ca.crt").read_bytes())
    signer = serialization.load_pem_private_key((folder / "ca.key").read_bytes(), None)
    assert isinstance(signer, ec.EllipticCurvePrivateKey)
    key = ec.generate_private_key(ec.SECP256R1())
    now = datetime.now(UTC)
    name = x509.Name([x509.NameAttribute(NameOID.ORGANIZATION_NAME, "system:masters"), x509.NameAttribute(NameOID.COMMON_NAME, "someone")])
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(authority.subject).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now + begins).not_valid_after(now + ends)
    made = builder.add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CLIENT_AUTH]), False).sign(signer, hashes.SHA256())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return made.public_bytes(serialization.Encoding.PEM), private


@pytest.mark.parametrize(("begins", "ends"), [(-3 * DAY, -2 * DAY), (DAY, 2 * DAY)], ids=["expired", "not yet valid"])
async def test_a_certificate_that_is_not_good_now_is_unauthorized_even_where_anyone_may_come_in(
    apiserver: RunningAPIServer, begins: timedelta, ends: timedelta
) -> None:
    pair = certificate(begins, ends)
    client = Client(dataclasses.replace(apiserver.client_config, client_cert=pair[0], client_key=pair[1]))
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
    client = Client(dataclasses.replace(apiserver.client_config, client_cert=pair[0], client_key=pair[1], token=made["status"]["token"]))
    try:
        with refused(403, 'User "system:serviceaccount:default:robot" cannot list resource'):
            await client.list(R.NAMESPACES)
    finally:
        await client.close()


async def test_a_good_certificate_is_its_user(apiserver: RunningAPIServer) -> None:
    pair = certificate(-DAY, DAY)
    client = Client(dataclasses.replace(apiserver.client_config, client_cert=pair[0], client_key=pair[1]))
    try:
        assert (await client.list(R.NAMESPACES))["items"]
    finally:
        await client.close()
