"""ClusterTrustBundles and PodCertificateRequests.

Source: pkg/apis/certificates/validation/validation.go, core/validation ValidateClusterTrustBundleName.
"""

from __future__ import annotations

import base64
import binascii
import re
from datetime import datetime, timedelta
from typing import Any

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, padding, rsa

from knarr.aiokits import clock
from knarr.api.errors import invalid_value, not_supported, required, too_long
from knarr.api.validation.metadata import Errors, add, validate_conditions
from knarr.api.validation.signers import validate_signer_name
from knarr.api.validation.strings import dns_subdomain

Object = dict[str, Any]
_BLOCK = re.compile(r"-----BEGIN ([^-\n]*)-----[ \t]*\r?\n(.*?)-----END \1-----", re.DOTALL)
_MOST_BUNDLE, _MOST_KEY, _MOST_PROOF, _MOST_CHAIN = 1 << 20, 10 << 10, 10 << 10, 100 << 10
_LEAST_SECONDS, _MOST_SECONDS, _MOST_OWN_SECONDS = 3600, 91 * 86400, 86400
_ENDS = ("Issued", "Denied", "Failed")
_CHAIN, _KEY, _PROOF = "status.certificateChain", "spec.pkixPublicKey", "spec.proofOfPossession"
_OMITTED = "<value omitted>"


class _Malformed(ValueError):
    """The text says what is wrong."""


def _blocks(text: str) -> list[tuple[str, str]]:
    """(type, what is between the lines) of each PEM block; text around them does not count."""
    return [(found[1], found[2]) for found in _BLOCK.finditer(text)]


def _decoded(body: str) -> bytes:
    try:
        return base64.b64decode("".join(body.split()), validate=True)
    except binascii.Error as error:
        raise _Malformed("no base64") from error


# -- ClusterTrustBundles ---------------------------------------------------------------------------------------------
def create_bundle(obj: Object, errors: Errors) -> None:
    _bundle(obj, errors)
    _anchors((obj.get("spec") or {}).get("trustBundle") or "", errors)


def update_bundle(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    _bundle(new, errors)
    spec, before = new.get("spec") or {}, old.get("spec") or {}
    if (spec.get("trustBundle") or "") != (before.get("trustBundle") or ""):
        _anchors(spec.get("trustBundle") or "", errors)
    if (spec.get("signerName") or "") != (before.get("signerName") or ""):
        errors.append(invalid_value("spec.signerName", spec.get("signerName") or "", "field is immutable"))


def _bundle(obj: Object, errors: Errors) -> None:
    name, signer = obj["metadata"].get("name") or "", (obj.get("spec") or {}).get("signerName") or ""
    path, rest = "metadata.name", name
    if signer:
        prefix = signer.replace("/", ":") + ":"
        if not name.startswith(prefix):
            errors.append(invalid_value(path, name, f"ClusterTrustBundle for signerName {signer} must be named with prefix {prefix}"))
            rest = ""
        else:
            rest = name[len(prefix) :]
            add(errors, path, name, dns_subdomain(rest))
    elif ":" in name:
        errors.append(invalid_value(path, name, 'ClusterTrustBundle without signer name must not have ":" in its name'))
    else:
        add(errors, path, name, dns_subdomain(rest))
    if signer:
        validate_signer_name(signer, "spec.signerName", errors)


def _anchors(text: str, errors: Errors) -> None:
    """Each block is a CA's certificate, once; anything between them is skipped."""
    path = "spec.trustBundle"
    if len(text.encode()) > _MOST_BUNDLE:
        errors.append(too_long(path, _MOST_BUNDLE))
        return
    seen: dict[bytes, list[int]] = {}
    wrong = len(errors)
    for index, (kind, body) in enumerate(_blocks(text)):
        try:
            seen.setdefault(_anchor(kind, body), []).append(index)
        except _Malformed as error:
            errors.append(invalid_value(path, _OMITTED, f"entry {index} {error}"))
    if len(errors) > wrong:
        return
    if not seen:
        errors.append(invalid_value(path, _OMITTED, "at least one trust anchor must be provided"))
    for places in seen.values():
        if len(places) > 1:
            errors.append(invalid_value(path, _OMITTED, f"duplicate trust anchor (indices [{' '.join(map(str, places))}])"))


def _anchor(kind: str, body: str) -> bytes:
    if kind != "CERTIFICATE":
        raise _Malformed(f"has bad block type: {kind}")
    if ":" in body:
        raise _Malformed("has PEM block headers")
    try:
        der = _decoded(body)
        certificate = x509.load_der_x509_certificate(der)
        authority = certificate.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    except x509.ExtensionNotFound:
        authority = False
    except ValueError as error:
        raise _Malformed("does not parse as X.509") from error
    if not authority:
        raise _Malformed("does not have the CA bit set")
    return der


# -- PodCertificateRequests ------------------------------------------------------------------------------------------
def create_pod_request(obj: Object, errors: Errors) -> None:
    spec = obj.get("spec") or {}
    signer = spec.get("signerName") or ""
    validate_signer_name(signer, "spec.signerName", errors)
    for name, uid in (("podName", "podUID"), ("serviceAccountName", "serviceAccountUID"), ("nodeName", "nodeUID")):
        add(errors, f"spec.{name}", spec.get(name) or "", dns_subdomain(spec.get(name) or ""))
        value = spec.get(uid) or ""
        if not value:
            errors.append(invalid_value(f"spec.{uid}", value, "must not be empty"))
        if len(value) > 128:
            errors.append(too_long(f"spec.{uid}", 128))
    seconds = spec.get("maxExpirationSeconds")
    if seconds is None:
        errors.append(required("spec.maxExpirationSeconds", "must be set"))
        return
    domain = signer.partition("/")[0]
    most = _MOST_OWN_SECONDS if domain == "kubernetes.io" or domain.endswith(".kubernetes.io") else _MOST_SECONDS
    if not _LEAST_SECONDS <= seconds <= most:
        errors.append(invalid_value("spec.maxExpirationSeconds", seconds, f"must be in the range [{_LEAST_SECONDS}, {most}]"))
    _possession(spec, errors)


def _possession(spec: Object, errors: Errors) -> None:
    """The key is one of a kind that is allowed, and whoever asks has signed the pod's UID by it."""
    key_text, proof_text = spec.get("pkixPublicKey") or "", spec.get("proofOfPossession") or ""
    encoded, proof = base64.b64decode(key_text), base64.b64decode(proof_text)
    for path, value, most in ((_KEY, encoded, _MOST_KEY), (_PROOF, proof, _MOST_PROOF)):
        if len(value) > most:
            errors.append(too_long(path, most))
            return
    try:
        key = serialization.load_der_public_key(encoded)
    except (ValueError, UnsupportedAlgorithm):
        errors.append(invalid_value(_KEY, key_text, "must be a valid PKIX-serialized public key"))
        return
    signed = (spec.get("podUID") or "").encode()
    try:
        if isinstance(key, ed25519.Ed25519PublicKey):
            key.verify(proof, signed)
        elif isinstance(key, ec.EllipticCurvePublicKey):
            if not isinstance(key.curve, ec.SECP256R1 | ec.SECP384R1 | ec.SECP521R1):
                errors.append(invalid_value(_KEY, f"curve {key.curve.name}", "elliptic public keys must use curve P256 or P384"))
                return
            key.verify(proof, signed, ec.ECDSA(hashes.SHA256()))
        elif isinstance(key, rsa.RSAPublicKey):
            if key.key_size not in (3072, 4096):
                errors.append(invalid_value(_KEY, f"{key.key_size}-bit modulus", "RSA keys must have modulus size 3072 or 4096"))
                return
            key.verify(proof, signed, padding.PSS(padding.MGF1(hashes.SHA256()), padding.PSS.AUTO), hashes.SHA256())
        else:
            errors.append(invalid_value(_KEY, key_text, "unknown public key type; supported types are Ed25519, ECDSA, and RSA"))
    except InvalidSignature:
        errors.append(invalid_value(_PROOF, _OMITTED, "could not verify proof-of-possession signature"))


def update_pod_request(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    if subresource:
        _status(new, old, errors)
    elif (new.get("spec") or {}) != (old.get("spec") or {}):
        errors.append(invalid_value("spec", new.get("spec"), "field is immutable"))


def _status(new: Object, old: Object, errors: Errors) -> None:
    status, before = new.get("status") or {}, old.get("status") or {}
    conditions, wrong = status.get("conditions") or [], len(errors)
    for index, condition in enumerate(conditions):
        path, kind = f"status.conditions[{index}]", condition.get("type") or ""
        if kind not in _ENDS:
            errors.append(not_supported(f"{path}.type", kind, list(_ENDS)))
            continue
        if index:
            errors.append(invalid_value(f"{path}.type", kind, 'There may be at most one condition with type "Issued", "Denied", or "Failed"'))
        if condition.get("status") != "True":
            errors.append(not_supported(f"{path}.status", condition.get("status") or "", ["True"]))
    validate_conditions(conditions, "status.conditions", errors)
    if len(errors) > wrong:
        return
    if before.get("conditions"):
        if status != before:
            errors.append(invalid_value("status", _OMITTED, "immutable after PodCertificateRequest is issued, denied, or failed"))
    elif not conditions:
        if status != before:
            errors.append(invalid_value("status", _OMITTED, 'status is immutable unless transitioning to "Issued", "Denied", or "Failed"'))
    elif conditions[0]["type"] != "Issued":
        if any(value for name, value in status.items() if name != "conditions"):
            errors.append(invalid_value("status", _OMITTED, "non-condition status fields must be empty when denying or failing the PodCertificateRequest"))
    else:
        _issued(old.get("spec") or {}, status, errors)


def _issued(spec: Object, status: Object, errors: Errors) -> None:
    text = status.get("certificateChain") or ""
    if len(text.encode()) > _MOST_CHAIN:
        errors.append(too_long(_CHAIN, _MOST_CHAIN))
        return
    try:
        leaf = _leaf(text, base64.b64decode(spec.get("pkixPublicKey") or ""))
    except _Malformed as error:
        errors.append(invalid_value(_CHAIN, text, str(error)))
        return
    wrong = len(errors)
    for name in ("notBefore", "notAfter"):
        if not status.get(name):
            errors.append(required(f"status.{name}", "must be present and consistent with the issued certificate"))
    if not status.get("beginRefreshAt"):
        errors.append(required("status.beginRefreshAt", "must be present and in the range [notbefore+10min, notafter-10min]"))
    if len(errors) > wrong:
        return
    begin, end, refresh = (datetime.fromisoformat(status[name]) for name in ("notBefore", "notAfter", "beginRefreshAt"))
    lifetime, margin = leaf.not_valid_after_utc - leaf.not_valid_before_utc, timedelta(minutes=10)
    most = spec.get("maxExpirationSeconds") or 0
    for path, value, holds, detail in (
        ("status.notBefore", begin, begin == leaf.not_valid_before_utc, "must be set to the NotBefore time encoded in the leaf certificate"),
        ("status.notBefore", begin, abs(begin.timestamp() - clock.now()) < 300, "must be set to within 5 minutes of kube-apiserver's current time"),
        ("status.notAfter", end, end == leaf.not_valid_after_utc, "must be set to the NotAfter time encoded in the leaf certificate"),
        (_CHAIN, lifetime, lifetime >= timedelta(hours=1), "leaf certificate lifetime must be >= 1 hour"),
        (_CHAIN, lifetime, lifetime <= timedelta(seconds=most), f"leaf certificate lifetime must be <= spec.maxExpirationSeconds ({most})"),
        ("status.beginRefreshAt", refresh, refresh >= begin + margin, "must be at least 10 minutes after status.notBefore"),
        ("status.beginRefreshAt", refresh, refresh <= end - margin, "must be at least 10 minutes before status.notAfter"),
    ):  # fmt: skip
        if not holds:
            errors.append(invalid_value(path, str(value), detail))
            return


def _leaf(text: str, key: bytes) -> x509.Certificate:
    """Return the first certificate of a chain of nothing but certificates, which is for a key. Raises _Malformed."""
    blocks = _blocks(text)
    if not blocks:
        raise _Malformed("issued certificate chain must contain at least one certificate")
    found: list[x509.Certificate] = []
    for kind, body in blocks:
        if kind != "CERTIFICATE":
            raise _Malformed("issued certificate chain must consist entirely of CERTIFICATE PEM blocks")
        try:
            found.append(x509.load_der_x509_certificate(_decoded(body)))
        except ValueError as error:
            raise _Malformed(f"{'intermediate' if found else 'leaf'} certificate does not parse as valid X.509") from error
    owned = found[0].public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    if owned != key:
        raise _Malformed("leaf certificate was not issued to the requested public key")
    return found[0]
