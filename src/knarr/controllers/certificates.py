"""Certificate signing requests: approving kubelets' own, signing approved ones, clearing old ones.

Source: pkg/controller/certificates (approver, signer, cleaner), pkg/apis/certificates/helpers.go.
"""

from __future__ import annotations

import base64
from typing import TYPE_CHECKING, Any

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import meta
from knarr.api.resources import CERTIFICATE_SIGNING_REQUESTS, SUBJECT_ACCESS_REVIEWS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result, TerminalError
from knarr.controllers.context import Context
from knarr.controllers.podutil import created_at

if TYPE_CHECKING:
    from cryptography import x509

log = get_logger(__name__)

_KUBELET_CLIENT = "kubernetes.io/kube-apiserver-client-kubelet"
_KUBELET_SERVING = "kubernetes.io/kubelet-serving"
_CLIENT = "kubernetes.io/kube-apiserver-client"
_LEGACY = "kubernetes.io/legacy-unknown"
_SIGNERS = (_KUBELET_CLIENT, _KUBELET_SERVING, _CLIENT, _LEGACY)
_BACKDATE_SECONDS = 300
_SHORT_SECONDS = 8 * 3600
_LEAST_SECONDS = 600
_HANDLED_SECONDS = 3600.0
_PENDING_SECONDS = 24 * 3600.0


class _NotValid(Exception):
    """The request asks for something that its signer does not give."""


def _is_true(request: Object, type: str) -> bool:
    return meta.is_condition_true((request.get("status") or {}).get("conditions"), type)


def _parse(request: Object) -> x509.CertificateSigningRequest:
    from cryptography import x509

    try:
        parsed = x509.load_pem_x509_csr(base64.b64decode(request["spec"]["request"]))
    except ValueError as error:
        raise TerminalError(f"unable to parse csr {request['metadata']['name']!r}: {error}") from error
    if not parsed.is_signature_valid:
        raise TerminalError(f"csr {request['metadata']['name']!r} is not signed by its own key")
    return parsed


def _subject(parsed: x509.CertificateSigningRequest) -> tuple[str, list[str]]:
    """(common name, organizations)."""
    from cryptography.x509.oid import NameOID

    names = [str(item.value) for item in parsed.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
    organizations = [str(item.value) for item in parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
    return (names[0] if names else ""), organizations


def _alternative_names(parsed: x509.CertificateSigningRequest) -> dict[str, list[Any]]:
    from cryptography import x509

    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return {"DNS": [], "Email": [], "IP": [], "URI": []}
    return {
        "DNS": names.get_values_for_type(x509.DNSName),
        "Email": names.get_values_for_type(x509.RFC822Name),
        "IP": names.get_values_for_type(x509.IPAddress),
        "URI": names.get_values_for_type(x509.UniformResourceIdentifier),
    }


def _check_kubelet(parsed: x509.CertificateSigningRequest, usages: set[str], serving: bool) -> None:
    name, organizations = _subject(parsed)
    if organizations != ["system:nodes"]:
        raise _NotValid("subject organization is not system:nodes")
    names = _alternative_names(parsed)
    if serving and not names["DNS"] and not names["IP"]:
        raise _NotValid("DNS or IP subjectAltName is required")
    for kind in ("Email", "URI") if serving else ("DNS", "Email", "IP", "URI"):
        if names[kind]:
            raise _NotValid(f"{kind} subjectAltNames are not allowed")
    auth = "server auth" if serving else "client auth"
    if usages - {"key encipherment"} != {"digital signature", auth}:
        wanted = sorted(["digital signature", "key encipherment", auth])
        raise _NotValid(f"usages did not match [{' '.join(wanted)}]")
    if not name.startswith("system:node:"):
        raise _NotValid("subject common name does not begin with system:node:")


class CSRApprovingController:
    """Approves what kubelets ask for themselves, if they may."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._requests = ctx.informer(CERTIFICATE_SIGNING_REQUESTS)
        self.controller = Controller("certificatesigningrequest-approving-controller", self._reconcile, max_retries=10)
        add = self.controller.queue.add
        self._requests.add_handler(lambda obj: add(obj["metadata"]["name"]), lambda old, new: add(new["metadata"]["name"]))

    async def run(self) -> None:
        await self.controller.run()

    async def _reconcile(self, name: str) -> None:
        request = self._requests.get(None, name)
        if request is None or request["spec"]["signerName"] != _KUBELET_CLIENT:
            return
        if (request.get("status") or {}).get("certificate") or _is_true(request, "Approved") or _is_true(request, "Denied"):
            return
        parsed = _parse(request)
        try:
            _check_kubelet(parsed, set(request["spec"].get("usages") or ()), False)
        except _NotValid:
            return
        tries = [("nodeclient", "Auto approving kubelet client certificate after SubjectAccessReview.")]
        if request["spec"].get("username") == _subject(parsed)[0]:
            tries.insert(0, ("selfnodeclient", "Auto approving self kubelet client certificate after SubjectAccessReview."))
        for subresource, message in tries:
            if await self._may(request, subresource):
                await self._approve(request, message)
                return

    async def _may(self, request: Object, subresource: str) -> bool:
        spec = request["spec"]
        attributes = {
            "group": "certificates.k8s.io",
            "resource": "certificatesigningrequests",
            "verb": "create",
            "subresource": subresource,
            "version": "*",
        }
        review: Object = {"user": spec.get("username", ""), "resourceAttributes": attributes}
        for source, target in (("uid", "uid"), ("groups", "groups"), ("extra", "extra")):
            if spec.get(source):
                review[target] = spec[source]
        body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": review}
        answer = await self._client.create(SUBJECT_ACCESS_REVIEWS, body)
        return bool((answer.get("status") or {}).get("allowed"))

    async def _approve(self, request: Object, message: str) -> None:
        status = request.get("status") or {}
        condition = {"type": "Approved", "status": "True", "reason": "AutoApproved", "message": message}
        changed = {**request, "status": {**status, "conditions": [*(status.get("conditions") or ()), condition]}}
        await self._client.update(CERTIFICATE_SIGNING_REQUESTS, changed, subresource="approval")


class CSRSigningController:
    """Signs approved requests of the signers that Kubernetes itself has."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._ca_cert = ctx.config.ca_cert
        self._ca_key = ctx.config.ca_key
        self._seconds = ctx.config.signing_seconds
        self._requests = ctx.informer(CERTIFICATE_SIGNING_REQUESTS)
        self.controller = Controller("certificatesigningrequest-signing-controller", self._reconcile, max_retries=10)
        add = self.controller.queue.add
        self._requests.add_handler(lambda obj: add(obj["metadata"]["name"]), lambda old, new: add(new["metadata"]["name"]))

    async def run(self) -> None:
        await self.controller.run()

    async def _reconcile(self, name: str) -> None:
        request = self._requests.get(None, name)
        if request is None or (request.get("status") or {}).get("certificate") or self._ca_cert is None or self._ca_key is None:
            return
        if not _is_true(request, "Approved") or _is_true(request, "Failed") or request["spec"]["signerName"] not in _SIGNERS:
            return
        parsed = _parse(request)
        usages = set(request["spec"].get("usages") or ())
        try:
            _check(request["spec"]["signerName"], parsed, usages)
        except _NotValid as error:
            await self._fail(request, str(error))
            return
        certificate = _sign(self._ca_cert, self._ca_key, parsed, usages, self._lifetime(request))
        status = {**(request.get("status") or {}), "certificate": base64.b64encode(certificate).decode()}
        await self._client.update(CERTIFICATE_SIGNING_REQUESTS, {**request, "status": status}, subresource="status")

    def _lifetime(self, request: Object) -> float:
        asked = request["spec"].get("expirationSeconds")
        return self._seconds if asked is None else max(float(_LEAST_SECONDS), min(float(asked), self._seconds))

    async def _fail(self, request: Object, message: str) -> None:
        status = request.get("status") or {}
        condition = {
            "type": "Failed",
            "status": "True",
            "reason": "SignerValidationFailure",
            "message": message,
            "lastUpdateTime": clock.now_rfc3339(),
        }
        changed = {**request, "status": {**status, "conditions": [*(status.get("conditions") or ()), condition]}}
        await self._client.update(CERTIFICATE_SIGNING_REQUESTS, changed, subresource="status")


def _check(signer: str, parsed: x509.CertificateSigningRequest, usages: set[str]) -> None:
    if signer in (_KUBELET_CLIENT, _KUBELET_SERVING):
        _check_kubelet(parsed, usages, signer == _KUBELET_SERVING)
    elif signer == _CLIENT:
        for usage in sorted(usages - {"digital signature", "key encipherment", "client auth"}):
            raise _NotValid(f"invalid usage for client certificate: {usage}")
        if "client auth" not in usages:
            raise _NotValid("missing required usage for client certificate: client auth")


def _sign(ca_cert: bytes, ca_key: bytes, parsed: x509.CertificateSigningRequest, usages: set[str], seconds: float) -> bytes:
    """Make the certificate, as PEM."""
    import datetime

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization

    issuer = x509.load_pem_x509_certificate(ca_cert)
    key: Any = serialization.load_pem_private_key(ca_key, None)
    now = datetime.datetime.fromtimestamp(int(clock.now()), datetime.UTC)
    backdate = _BACKDATE_SECONDS
    # A long life is counted from now, so that the clock skew allowed for costs nothing of it.
    not_after = now + datetime.timedelta(seconds=seconds - (backdate if seconds < _SHORT_SECONDS else 0))
    not_after = min(not_after, issuer.not_valid_after_utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(parsed.subject)
        .issuer_name(issuer.subject)
        .public_key(parsed.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(seconds=backdate))
        .not_valid_after(not_after)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key()), critical=False)
    )
    for extension, critical in _usage_extensions(usages):
        builder = builder.add_extension(extension, critical)
    try:
        names = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        builder = builder.add_extension(names.value, names.critical)
    except x509.ExtensionNotFound:
        pass
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def _usage_extensions(usages: set[str]) -> list[tuple[Any, bool]]:
    from cryptography import x509
    from cryptography.x509.oid import ExtendedKeyUsageOID

    basic = {
        "digital_signature": usages & {"digital signature", "signing"},
        "content_commitment": usages & {"content commitment"},
        "key_encipherment": usages & {"key encipherment"},
        "data_encipherment": usages & {"data encipherment"},
        "key_agreement": usages & {"key agreement"},
        "key_cert_sign": usages & {"cert sign"},
        "crl_sign": usages & {"crl sign"},
    }
    result: list[tuple[Any, bool]] = []
    if any(basic.values()):
        flags = {name: bool(value) for name, value in basic.items()}
        agreement = flags["key_agreement"]
        only = {"encipher_only": agreement and "encipher only" in usages, "decipher_only": agreement and "decipher only" in usages}
        result.append((x509.KeyUsage(**flags, **only), True))
    extended = {
        "server auth": ExtendedKeyUsageOID.SERVER_AUTH,
        "client auth": ExtendedKeyUsageOID.CLIENT_AUTH,
        "code signing": ExtendedKeyUsageOID.CODE_SIGNING,
        "email protection": ExtendedKeyUsageOID.EMAIL_PROTECTION,
        "s/mime": ExtendedKeyUsageOID.EMAIL_PROTECTION,
        "timestamping": ExtendedKeyUsageOID.TIME_STAMPING,
        "ocsp signing": ExtendedKeyUsageOID.OCSP_SIGNING,
        "any": ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE,
    }
    chosen = [oid for usage, oid in extended.items() if usage in usages]
    if chosen:
        result.append((x509.ExtendedKeyUsage(list(dict.fromkeys(chosen))), False))
    return result


class CSRCleanerController:
    """Deletes requests that were handled, refused, or left lying for long enough."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._requests = ctx.informer(CERTIFICATE_SIGNING_REQUESTS)
        self.controller = Controller("certificatesigningrequest-cleaner-controller", self._reconcile)
        add = self.controller.queue.add
        self._requests.add_handler(lambda obj: add(obj["metadata"]["name"]), lambda old, new: add(new["metadata"]["name"]))

    async def run(self) -> None:
        await self.controller.run()

    async def _reconcile(self, name: str) -> Result | None:
        request = self._requests.get(None, name)
        if request is None:
            return None
        due = _clean_at(request)
        if due is None:
            return None
        if due > clock.now():
            return Result(due - clock.now())
        await self._client.delete(CERTIFICATE_SIGNING_REQUESTS, name, uid=request["metadata"]["uid"])
        return None


def _clean_at(request: Object) -> float | None:
    """When a request has lain long enough (epoch seconds)."""
    status = request.get("status") or {}
    conditions = status.get("conditions") or []
    if not conditions:
        return created_at(request) + _PENDING_SECONDS
    dues = []
    for condition in conditions:
        stamp = condition.get("lastUpdateTime")
        since = clock.parse_rfc3339(stamp) if stamp else None
        if since is None:
            continue
        if condition["type"] == "Approved":
            dues.append(since + (_HANDLED_SECONDS if status.get("certificate") else _PENDING_SECONDS))
        elif condition["type"] in ("Denied", "Failed"):
            dues.append(since + _HANDLED_SECONDS)
    return min(dues) if dues else None
