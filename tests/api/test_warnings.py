"""Warnings, as a real 1.35 API server gave them for the same objects."""

import base64
import datetime
import json
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from knarr.api import decode, defaulting, warnings
from knarr.api.scheme import SCHEME
from knarr.api.warnings import addresses, pods
from tests.api.recorded import load


@pytest.mark.parametrize("case", load("warnings.jsonl"), ids=lambda c: c["name"])
def test_warnings_equal_the_recorded_ones(case: dict[str, Any]) -> None:
    resource = SCHEME.for_kind(case["body"]["apiVersion"], case["body"]["kind"])
    assert resource is not None
    obj, _ = decode.decode(resource, json.dumps(case["body"]).encode())
    defaulting.default(resource, obj)
    synced = pods.take_apparmor_annotations(obj) if obj["kind"] == "Pod" else []
    if obj["kind"] == "Service" and obj["spec"].get("clusterIP") is None and "clusterIPs" not in obj["spec"]:
        obj["spec"]["clusterIP"] = "10.96.0.7"
    # Upstream looks through maps in no order.
    assert sorted(synced + warnings.of_change(obj, None)) == sorted(case["warnings"])


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("a", 'metadata.finalizers: "a": prefer a domain-qualified finalizer name to avoid accidental conflicts with other finalizer writers'),
        ("a.b", 'metadata.finalizers: "a.b": prefer a domain-qualified finalizer name including a path (/) to avoid accidental conflicts '
                "with other finalizer writers"),
        ("a.b/c", None),
        ("orphan", None),
    ],
)  # fmt: skip
def test_only_new_finalizers_of_custom_objects_are_questioned(name: str, said: str | None) -> None:
    obj = {"metadata": {"finalizers": [name]}}
    assert warnings.of_custom(obj, {"metadata": {}}) == ([said] if said else [])
    assert warnings.of_custom(obj, obj) == []


def test_pods_are_not_questioned_on_update() -> None:
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a.b"}, "spec": {"containers": []}}
    assert warnings.of_change(pod, None)
    assert warnings.of_change(pod, pod) == []


@pytest.mark.parametrize("value", ["10.0.0.1", "2001:db8::1", "::", "fe80::1%eth0", "junk"])
def test_usual_addresses_pass(value: str) -> None:
    assert addresses.of_ip("f", value) == []


def test_status_addresses() -> None:
    pod = {"kind": "Pod", "status": {"podIPs": [{"ip": "10.0.0.1"}, {"ip": "2001:DB8::1"}]}}
    assert warnings.of_status(pod) == ['status.podIPs[1].ip: IPv6 address "2001:DB8::1" should be in RFC 5952 canonical format ("2001:db8::1")']


def _key_and_certificate() -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    start = datetime.datetime(2026, 1, 1, tzinfo=datetime.UTC)
    builder = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(1)
    certificate = builder.not_valid_before(start).not_valid_after(start + datetime.timedelta(days=1)).sign(key, hashes.SHA256())
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode(), certificate.public_bytes(Encoding.PEM).decode()


def test_keys_must_fit_their_certificates() -> None:
    key, certificate = _key_and_certificate()
    other, _ = _key_and_certificate()

    def said(certificate: str, key: str) -> list[str]:
        data = {"tls.crt": base64.b64encode(certificate.encode()).decode(), "tls.key": base64.b64encode(key.encode()).decode()}
        secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a"}, "type": "kubernetes.io/tls", "data": data}
        return warnings.of_change(secret, None)

    assert said(certificate, key) == []
    assert said(certificate, other) == ["tls: private key does not match public key"]
    assert said("", key) == ["tls: failed to find any PEM data in certificate input"]
    assert said(certificate, certificate) == ["tls: found a certificate rather than a key in the PEM for the private key"]
    assert said(key, certificate) == [
        "tls: failed to find certificate PEM data in certificate input, but did find a private key; PEM inputs may have been switched"
    ]
