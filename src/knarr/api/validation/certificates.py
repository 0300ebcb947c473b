"""CertificateSigningRequests. Source: pkg/apis/certificates/validation."""

from __future__ import annotations

import base64

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm

from knarr.api.errors import duplicate, field_forbidden, invalid_value, not_supported, required
from knarr.api.validation.metadata import Errors, Object
from knarr.api.validation.signers import validate_signer_name
from knarr.api.validation.strings import Messages

USAGES = (
    "any", "cert sign", "client auth", "code signing", "content commitment", "crl sign", "data encipherment", "decipher only",
    "digital signature", "email protection", "encipher only", "ipsec end system", "ipsec tunnel", "ipsec user", "key agreement",
    "key encipherment", "microsoft sgc", "netscape sgc", "ocsp signing", "s/mime", "server auth", "signing", "timestamping",
)  # fmt: skip
_LEGACY = "kubernetes.io/legacy-unknown"
_DECISIONS = ("Approved", "Denied")


def any_name(value: str) -> Messages:
    return ()


def _problem(request: str) -> str:
    """What is wrong with a PEM certificate request; "" if nothing."""
    try:
        csr = x509.load_pem_x509_csr(base64.b64decode(request))
        return "" if csr.is_signature_valid else "x509: invalid signature"
    except (ValueError, UnsupportedAlgorithm):
        return "PEM block type must be CERTIFICATE REQUEST"


def _certificate_problem(text: str) -> str:
    try:
        data = base64.b64decode(text)
        certificates = x509.load_pem_x509_certificates(data)
    except ValueError:
        return "must contain at least one CERTIFICATE PEM block"
    return "" if certificates else "must contain at least one CERTIFICATE PEM block"


def _check(obj: Object, old: Object | None, errors: Errors) -> None:
    spec, before = obj.get("spec") or {}, (old or {}).get("spec") or {}
    request = spec.get("request") or ""
    if old is None or request != before.get("request"):
        problem = _problem(request)
        if problem:
            errors.append(invalid_value("spec.request", request, problem))
    usages, old_usages = spec.get("usages") or [], before.get("usages") or []
    if not usages:
        errors.append(required("spec.usages"))
    for index, usage in enumerate(usages):
        if usage not in USAGES and not any(u not in USAGES for u in old_usages):
            errors.append(not_supported(f"spec.usages[{index}]", usage, USAGES))
    for index, usage in enumerate(usages):
        if usage in usages[:index] and len(set(old_usages)) == len(old_usages):
            errors.append(duplicate(f"spec.usages[{index}]", usage))
    signer = spec.get("signerName") or ""
    if signer == _LEGACY and before.get("signerName") != _LEGACY:
        errors.append(invalid_value("spec.signerName", signer, "the legacy signerName is not allowed via this API version"))
    else:
        validate_signer_name(signer, "spec.signerName", errors)
    seconds = spec.get("expirationSeconds")
    if seconds is not None and seconds < 600:
        message = "may not specify a duration less than 600 seconds (10 minutes)"
        errors.append(invalid_value("spec.expirationSeconds", seconds, message))
    _conditions(obj, errors)
    certificate = (obj.get("status") or {}).get("certificate")
    if certificate and certificate != ((old or {}).get("status") or {}).get("certificate"):
        problem = _certificate_problem(certificate)
        if problem:
            errors.append(invalid_value("status.certificate", "<certificate data>", problem))


def _conditions(obj: Object, errors: Errors) -> None:
    seen: list[str] = []
    for index, condition in enumerate((obj.get("status") or {}).get("conditions") or ()):
        path, kind, status = f"status.conditions[{index}]", condition.get("type") or "", condition.get("status") or ""
        allowed = ["True"] if kind in (*_DECISIONS, "Failed") else ["False", "True", "Unknown"]
        if not kind:
            errors.append(required(f"{path}.type"))
        if not status:
            errors.append(required(f"{path}.status"))
        elif status not in allowed:
            errors.append(not_supported(f"{path}.status", status, allowed))
        if kind in _DECISIONS and any(other in seen for other in _DECISIONS if other != kind):
            message = "Approved and Denied conditions are mutually exclusive"
            errors.append(invalid_value("status.conditions", kind, message))
        if kind in seen:
            errors.append(duplicate(f"{path}.type", kind))
        seen.append(kind)


def create_request(obj: Object, errors: Errors) -> None:
    _check(obj, None, errors)


def _of_type(obj: Object, kind: str) -> list[Object]:
    return [c for c in (obj.get("status") or {}).get("conditions") or () if c.get("type") == kind]


def update_request(new: Object, old: Object, errors: Errors, subresource: str) -> None:
    """Approval alone may decide; status alone may set the certificate; nothing is taken back."""
    _check(new, old, errors)
    path = "status.conditions"
    for kind in (*_DECISIONS, "Failed"):
        if len(_of_type(new, kind)) < len(_of_type(old, kind)):
            errors.append(field_forbidden(path, f'updates may not remove a condition of type "{kind}"'))
    if subresource != "approval":
        for kind in _DECISIONS:
            after, before = _of_type(new, kind), _of_type(old, kind)
            if len(after) > len(before):
                errors.append(field_forbidden(path, f'updates may not add a condition of type "{kind}"'))
            elif len(after) == len(before) and after != before:
                errors.append(field_forbidden(path, f'updates may not modify a condition of type "{kind}"'))
    certificate, had = (new.get("status") or {}).get("certificate"), (old.get("status") or {}).get("certificate")
    if certificate != had:
        if subresource != "status":
            errors.append(field_forbidden("status.certificate", "updates may not set certificate content"))
        elif had:
            errors.append(field_forbidden("status.certificate", "updates may not modify existing certificate content"))
