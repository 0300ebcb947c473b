"""Certificates for pods and what they trust: the two kinds, their rules, and the controllers behind their gates."""

from __future__ import annotations

import base64
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from knarr.aiokits import clock
from knarr.api.errors import StatusError
from knarr.api.resources import CLUSTER_TRUST_BUNDLES, POD_CERTIFICATE_REQUESTS
from knarr.api.types import Object
from knarr.testing.apiserver import running_apiserver
from tests.controllers.test_controllers import controllers, until

SERVED: dict[str, Any] = {"runtime_config": ("certificates.k8s.io/v1beta1", "certificates.k8s.io/v1alpha1")}
GATES = {"ClusterTrustBundle": True, "PodCertificateRequest": True}
PUBLISHER, CLEANER = "kube-apiserver-serving-clustertrustbundle-publisher-controller", "podcertificaterequest-cleaner-controller"
KEY = ec.generate_private_key(ec.SECP256R1())


def certificate(hours: float = 2, *, ca: bool = False, key: ec.EllipticCurvePrivateKey = KEY) -> x509.Certificate:
    now = datetime.now(UTC).replace(microsecond=0)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "pod")])
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
    made = made.not_valid_before(now).not_valid_after(now + timedelta(hours=hours))
    return made.add_extension(x509.BasicConstraints(ca, None), True).sign(key, hashes.SHA256())


def pem(*certificates: x509.Certificate) -> str:
    return "".join(one.public_bytes(serialization.Encoding.PEM).decode() for one in certificates)


ANCHOR = certificate(ca=True)


def bundle(name: str, text: str, signer: str = "") -> Object:
    return {"metadata": {"name": name}, "spec": {"trustBundle": text, **({"signerName": signer} if signer else {})}}


def request(**changes: object) -> Object:
    public = KEY.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    proof = KEY.sign(b"pod-uid", ec.ECDSA(hashes.SHA256()))
    spec = {
        "signerName": "example.com/pods", "podName": "web", "podUID": "pod-uid", "serviceAccountName": "default", "serviceAccountUID": "a",
        "nodeName": "n", "nodeUID": "b", "pkixPublicKey": base64.b64encode(public).decode(), "proofOfPossession": base64.b64encode(proof).decode(),
    }  # fmt: skip
    return {"metadata": {"name": "r"}, "spec": {**spec, **changes}}


async def test_the_api_servers_authority_is_published_and_others_of_its_signer_go() -> None:
    signer = "kubernetes.io/kube-apiserver-serving"
    root = pem(ANCHOR)
    async with running_apiserver(**SERVED) as server:
        await server.client.create(CLUSTER_TRUST_BUNDLES, bundle("kubernetes.io:kube-apiserver-serving:old", root, signer))
        await server.client.create(CLUSTER_TRUST_BUNDLES, bundle("mine", root))
        async with controllers(server, PUBLISHER, feature_gates=GATES, root_ca=root.encode()) as client:

            async def published() -> bool:
                found = (await client.list(CLUSTER_TRUST_BUNDLES, field_selector=f"spec.signerName={signer}"))["items"]
                return [one["spec"]["trustBundle"] for one in found] == [root] and not found[0]["metadata"]["name"].endswith(":old")

            await until(published)
            (ours,) = (await client.list(CLUSTER_TRUST_BUNDLES, field_selector=f"spec.signerName={signer}"))["items"]
            await client.update(CLUSTER_TRUST_BUNDLES, {**ours, "spec": {**ours["spec"], "trustBundle": pem(certificate(ca=True))}})
            await until(published)
            await client.delete(CLUSTER_TRUST_BUNDLES, ours["metadata"]["name"])
            await until(published)
            assert (await client.get(CLUSTER_TRUST_BUNDLES, "mine"))["spec"]["trustBundle"] == root


async def test_old_requests_of_pods_are_deleted_and_young_ones_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_apiserver(**SERVED) as server:
        await server.client.create(POD_CERTIFICATE_REQUESTS, request(), "default")
        later = clock.now() + 15 * 60
        monkeypatch.setattr(clock, "now_rfc3339", lambda: datetime.fromtimestamp(later, UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        await server.client.create(POD_CERTIFICATE_REQUESTS, {**request(), "metadata": {"name": "young"}}, "default")
        monkeypatch.setattr(clock, "now", lambda: later + 1)
        async with controllers(server, CLEANER, feature_gates=GATES) as client:

            async def one_is_left() -> bool:
                return [one["metadata"]["name"] for one in (await client.list(POD_CERTIFICATE_REQUESTS, "default"))["items"]] == ["young"]

            await until(one_is_left)


async def test_controllers_without_their_gates_do_nothing() -> None:
    async with running_apiserver(**SERVED) as server:
        async with controllers(server, f"{PUBLISHER},{CLEANER}", root_ca=pem(ANCHOR).encode()) as client:
            assert (await client.list(CLUSTER_TRUST_BUNDLES))["items"] == []


BUNDLES: dict[str, tuple[Object, str]] = {
    "nothing": (bundle("a", "no block at all"), "at least one trust anchor must be provided"),
    "twice": (bundle("a", pem(ANCHOR, ANCHOR)), "duplicate trust anchor (indices [0 1])"),
    "no authority": (bundle("a", pem(certificate())), "entry 0 does not have the CA bit set"),
    "a key": (bundle("a", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"), "entry 0 has bad block type: PRIVATE KEY"),
    "rubbish": (bundle("a", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"), "entry 0 does not parse as X.509"),
    "a colon": (bundle("a:b", pem(ANCHOR)), 'ClusterTrustBundle without signer name must not have ":" in its name'),
    "another prefix": (bundle("a", pem(ANCHOR), "example.com/s"), "ClusterTrustBundle for signerName example.com/s must be named with prefix example.com:s:"),
}
REQUESTS: dict[str, tuple[Object, str]] = {
    "another's key": (request(podUID="other"), "could not verify proof-of-possession signature"),
    "no key": (request(pkixPublicKey="AAAA"), "must be a valid PKIX-serialized public key"),
    "too long": (request(maxExpirationSeconds=92 * 86400), "must be in the range [3600, 7862400]"),
    "too long for ours": (request(signerName="kubernetes.io/x", maxExpirationSeconds=86401), "must be in the range [3600, 86400]"),
    "no pod": (request(podName="-"), "spec.podName: Invalid value"),
}


async def test_what_cannot_be_is_refused() -> None:
    async with running_apiserver(**SERVED) as server:
        for kind, namespace, cases in ((CLUSTER_TRUST_BUNDLES, None, BUNDLES), (POD_CERTIFICATE_REQUESTS, "default", REQUESTS)):
            for what, (body, told) in cases.items():
                with pytest.raises(StatusError) as refused:
                    await server.client.create(kind, body, namespace)
                assert refused.value.code == 422, what
                assert told in refused.value.message, what


async def test_a_signer_issues_once_and_what_fits_the_request() -> None:
    leaf = certificate()
    good: Object = {
        "certificateChain": pem(leaf), "notBefore": _time(leaf.not_valid_before_utc), "notAfter": _time(leaf.not_valid_after_utc),
        "beginRefreshAt": _time(leaf.not_valid_before_utc + timedelta(hours=1)),
        "conditions": [_condition("Issued")],
    }  # fmt: skip
    short = certificate(0.5)
    wrong: dict[str, Callable[[], Object]] = {
        "must be at least 10 minutes after status.notBefore": lambda: {**good, "beginRefreshAt": good["notBefore"]},
        "leaf certificate was not issued to the requested public key": lambda: {
            **good, "certificateChain": pem(certificate(key=ec.generate_private_key(ec.SECP256R1())))},
        "leaf certificate lifetime must be >= 1 hour": lambda: {
            **good, "certificateChain": pem(short), "notBefore": _time(short.not_valid_before_utc), "notAfter": _time(short.not_valid_after_utc)},
        "must be present and consistent": lambda: {name: value for name, value in good.items() if name != "notAfter"},
        "non-condition status fields must be empty": lambda: {**good, "conditions": [_condition("Denied")]},
        "status is immutable unless transitioning": lambda: {**good, "conditions": []},
        "There may be at most one condition": lambda: {**good, "conditions": [_condition("Issued"), _condition("Failed")]},
    }  # fmt: skip
    async with running_apiserver(**SERVED) as server:
        client = server.client
        made = await client.create(POD_CERTIFICATE_REQUESTS, request(), "default")
        assert made["spec"]["maxExpirationSeconds"] == 86400
        for told, status in wrong.items():
            with pytest.raises(StatusError, match=told):
                await client.update(POD_CERTIFICATE_REQUESTS, {**made, "status": status()}, subresource="status")
        issued = await client.update(POD_CERTIFICATE_REQUESTS, {**made, "status": good}, subresource="status")
        assert issued["status"] == good
        with pytest.raises(StatusError, match="immutable after"):
            await client.update(POD_CERTIFICATE_REQUESTS, {**issued, "status": {**good, "beginRefreshAt": good["notAfter"]}}, subresource="status")
        with pytest.raises(StatusError, match="field is immutable"):
            await client.update(POD_CERTIFICATE_REQUESTS, {**issued, "spec": {**issued["spec"], "nodeName": "m"}})


def _time(when: datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")


def _condition(kind: str) -> Object:
    return {"type": kind, "status": "True", "reason": "Because", "message": "", "lastTransitionTime": clock.now_rfc3339()}
