"""Plugins about certificate signing requests: CertificateApproval, CertificateSigning, CertificateSubjectRestriction;
and ClusterTrustBundleAttest.

Source: kubernetes plugin/pkg/admission/certificates.
"""

from __future__ import annotations

import base64
import binascii

from knarr.api.errors import go_quote
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.apiserver.admission.plugin import CREATE, UPDATE, Plugin, is_resource, refuse
from knarr.apiserver.attributes import AdmissionRequest, Attributes, Authorizer, Decision, UserInfo

GROUP = "certificates.k8s.io"
_COLLECTED = frozenset({"ownerReferences", "finalizers", "managedFields", "resourceVersion"})
_CLIENT_SIGNER = "kubernetes.io/kube-apiserver-client"


async def _decide(authorizer: Authorizer, attributes: Attributes) -> bool:
    decision, _ = authorizer.authorize(attributes)
    if decision is Decision.ASK:
        decision, _ = await authorizer.authorize_async(attributes)
    return decision is Decision.ALLOW


async def may_use_signer(authorizer: Authorizer, user: UserInfo, verb: str, signer: str) -> bool:
    """Whether the user holds the verb on this signer, or on all signers of its domain."""
    attributes = Attributes(user, verb, GROUP, "*", "signers", "", "", signer)
    if await _decide(authorizer, attributes):
        return True
    return await _decide(authorizer, attributes._replace(name=signer.split("/", 1)[0] + "/*"))


class CertificateApproval(Plugin):
    name = "CertificateApproval"

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, GROUP, "certificatesigningrequests") and subresource == "approval" and operation == UPDATE

    async def validate(self, request: AdmissionRequest) -> None:
        signer = ((request.old_object or {}).get("spec") or {}).get("signerName") or ""
        if not await may_use_signer(self._authorizer, request.user, "approve", signer):
            raise refuse(request, f"user not permitted to approve requests with signerName {go_quote(signer)}")


_SIGNED = {
    "certificatesigningrequests": ("certificate", "conditions"),
    "podcertificaterequests": ("beginRefreshAt", "certificateChain", "conditions", "notAfter", "notBefore"),
}  # fmt: skip
"""What of a request's status only its signer writes."""


class CertificateSigning(Plugin):
    name = "CertificateSigning"

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        requests = resource.group == GROUP and resource.plural in _SIGNED
        return requests and subresource == "status" and operation == UPDATE

    async def validate(self, request: AdmissionRequest) -> None:
        old = request.old_object or {}
        before, after = old.get("status") or {}, (request.object or {}).get("status") or {}
        if all((before.get(field) or None) == (after.get(field) or None) for field in _SIGNED[request.resource.plural]):
            return
        signer = (old.get("spec") or {}).get("signerName") or ""
        if not await may_use_signer(self._authorizer, request.user, "sign", signer):
            raise refuse(request, f"user not permitted to sign requests with signerName {go_quote(signer)}")


class ClusterTrustBundleAttest(Plugin):
    """Whoever writes a ClusterTrustBundle of a signer must hold "attest" on it. The kind is off by default in 1.35, and then not served."""

    name = "ClusterTrustBundleAttest"

    def __init__(self, authorizer: Authorizer) -> None:
        self._authorizer = authorizer

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, GROUP, "clustertrustbundles") and operation in (CREATE, UPDATE)

    async def validate(self, request: AdmissionRequest) -> None:
        signer = ((request.object or {}).get("spec") or {}).get("signerName") or ""
        if not signer or (request.operation == UPDATE and _only_collected(request.object or {}, request.old_object or {})):
            return
        if not await may_use_signer(self._authorizer, request.user, "attest", signer):
            raise refuse(request, f"user not permitted to attest for signerName {go_quote(signer)}")


def _only_collected(new: Object, old: Object) -> bool:
    """Whether nothing but what garbage collection and migration write has changed."""

    def rest(obj: Object) -> Object:
        kept = {key: value for key, value in (obj.get("metadata") or {}).items() if key not in _COLLECTED}
        return {**obj, "metadata": kept}

    return rest(new) == rest(old)


class CertificateSubjectRestriction(Plugin):
    name = "CertificateSubjectRestriction"

    def handles(self, operation: str, resource: Resource, subresource: str) -> bool:
        return is_resource(resource, GROUP, "certificatesigningrequests") and not subresource and operation == CREATE

    def validate(self, request: AdmissionRequest) -> None:
        spec = (request.object or {}).get("spec") or {}
        if spec.get("signerName") != _CLIENT_SIGNER:
            return
        from cryptography import x509
        from cryptography.x509.oid import NameOID

        try:
            parsed = x509.load_pem_x509_csr(base64.b64decode(spec.get("request") or ""))
        except (ValueError, binascii.Error) as error:
            raise refuse(request, f"failed to parse CSR: {error}") from error
        groups = [str(attribute.value) for attribute in parsed.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME)]
        if "system:masters" in groups:
            raise refuse(request, f"use of {_CLIENT_SIGNER} signer with system:masters group is not allowed")
