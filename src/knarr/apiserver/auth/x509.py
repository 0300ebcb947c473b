"""Users from client certificates: CN is the name, O the groups. Whether a certificate is good is found out in chains.py.

Source: apiserver pkg/authentication/request/x509.
"""

from __future__ import annotations

import hashlib

from cryptography import x509
from cryptography.x509.oid import NameOID, ObjectIdentifier

from knarr.api.errors import unauthorized
from knarr.apiserver.attributes import UserInfo
from knarr.apiserver.auth import users

_UID_OID = ObjectIdentifier("1.3.6.1.4.1.57683.2")


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
