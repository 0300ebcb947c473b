"""Users from client certificates: CN is the name, O the groups.

The TLS layer has verified the chain against all client CAs of the server. Where there are two bundles (ordinary clients
and front proxies), the leaf's issuer tells which of the two vouched for it.

Source: apiserver pkg/authentication/request/x509.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

from knarr.api.errors import unauthorized
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.auth import users

_UID_OID = ObjectIdentifier("1.3.6.1.4.1.57683.2")


class CABundle:
    """Certificates of one bundle; says whether one of them issued a leaf."""

    def __init__(self, path: str) -> None:
        self.certificates = x509.load_pem_x509_certificates(Path(path).read_bytes())

    def issued(self, leaf: x509.Certificate) -> bool:
        for authority in self.certificates:
            if not in_validity(authority):
                continue
            try:
                leaf.verify_directly_issued_by(authority)
                return True
            except (ValueError, TypeError, InvalidSignature):
                continue
        return False


def for_client_auth(leaf: x509.Certificate) -> bool:
    """Whether the extended key usage allows client authentication (no such extension allows everything)."""
    try:
        usage = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        return True
    return ExtendedKeyUsageOID.CLIENT_AUTH in usage or ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE in usage


def in_validity(certificate: x509.Certificate) -> bool:
    return certificate.not_valid_before_utc <= datetime.now(UTC) <= certificate.not_valid_after_utc


def common_name(leaf: x509.Certificate) -> str:
    names = leaf.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[-1].value) if names else ""


def user_of(leaf: x509.Certificate, der: bytes) -> UserInfo | None:
    """Return the user, None when the certificate names nobody.

    Raises:
      StatusError: 401, the subject carries a malformed UID.
    """
    name = common_name(leaf)
    if not name:
        return None
    uids = [str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(_UID_OID)]
    if len(uids) > 1 or uids == [""]:
        raise unauthorized()
    groups = tuple(str(attribute.value) for attribute in leaf.subject.get_attributes_for_oid(NameOID.ORGANIZATION_NAME))
    fingerprint = f"X509SHA256={hashlib.sha256(der).hexdigest()}"
    return UserInfo(name, uids[0] if uids else "", groups, {users.CREDENTIAL_ID: (fingerprint,)})
