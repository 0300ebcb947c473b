"""Whether a client's certificates lead to one of a bundle's authorities.

The TLS layer only asks for certificates (http/anycertificate.py), so that who shows one of an unknown or expired authority can be told so. Here is what
Go's x509.Verify demands for client authentication: signatures, validity, authorities that may sign and how deep, purposes, names that an
authority is confined to. Revocation is looked at by neither.

Source: Go's crypto/x509 verify.go; RFC 5280 section 6.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.x509.oid import ExtendedKeyUsageOID, ExtensionOID

_UNDERSTOOD = frozenset({
    ExtensionOID.KEY_USAGE, ExtensionOID.BASIC_CONSTRAINTS, ExtensionOID.EXTENDED_KEY_USAGE, ExtensionOID.SUBJECT_ALTERNATIVE_NAME,
    ExtensionOID.NAME_CONSTRAINTS, ExtensionOID.CERTIFICATE_POLICIES, ExtensionOID.AUTHORITY_KEY_IDENTIFIER, ExtensionOID.SUBJECT_KEY_IDENTIFIER,
})  # fmt: skip
MOST_PRESENTED = 10
_MOST_SIGNATURES = 100
_CLIENT = frozenset({ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE})

Chain = tuple[x509.Certificate, ...]


class CABundle:
    """The authorities of one file."""

    def __init__(self, path: str) -> None:
        self.certificates = x509.load_pem_x509_certificates(Path(path).read_bytes())

    def trusted_until(self, leaf: x509.Certificate, others: Sequence[x509.Certificate] = ()) -> datetime | None:
        """Return when the first certificate of a chain from a client's to an authority ends; None when no chain holds now.

        Args:
          others: what the client showed beside its own.
        """
        try:
            for chain in self._chains((leaf,), others, [_MOST_SIGNATURES]):
                if _for_clients(chain) and _names_fit(chain):
                    return min(one.not_valid_after_utc for one in chain)
        except (ValueError, UnsupportedAlgorithm):
            # Malformed extensions: nothing that is shown so is trusted.
            return None
        return None

    def _chains(self, chain: Chain, others: Sequence[x509.Certificate], left: list[int]) -> Iterator[Chain]:
        """Yield the chains that begin so; left bounds how many signatures are looked at, as others may be chosen to make many."""
        last = chain[-1]
        if not usable(last):
            return
        if last in self.certificates:
            yield chain
            return
        for parent in self.certificates:
            if _may_sign(parent, len(chain) - 1) and usable(parent) and _signed(last, parent, left):
                yield (*chain, parent)
        for parent in others[:MOST_PRESENTED]:
            if parent not in chain and _may_sign(parent, len(chain) - 1) and _signed(last, parent, left):
                yield from self._chains((*chain, parent), others, left)


def usable(certificate: x509.Certificate) -> bool:
    """Whether a certificate is valid now and demands nothing that is not understood here."""
    now = datetime.now(UTC)
    if not certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc:
        return False
    return all(not one.critical or one.oid in _UNDERSTOOD for one in certificate.extensions)


def _may_sign(parent: x509.Certificate, between: int) -> bool:
    """Whether a certificate is an authority's that allows so many others between it and the client's."""
    if parent.version is x509.Version.v1:
        return True
    try:
        constraints = parent.extensions.get_extension_for_class(x509.BasicConstraints).value
    except x509.ExtensionNotFound:
        return False
    if not constraints.ca or (constraints.path_length is not None and between > constraints.path_length):
        return False
    try:
        return parent.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign
    except x509.ExtensionNotFound:
        return True


def _signed(child: x509.Certificate, parent: x509.Certificate, left: list[int]) -> bool:
    if child.issuer != parent.subject or left[0] <= 0:
        return False
    left[0] -= 1
    try:
        child.verify_directly_issued_by(parent)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _for_clients(chain: Chain) -> bool:
    """Whether no certificate is confined to purposes that do not include this one."""
    for one in chain:
        try:
            usage = one.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
        except x509.ExtensionNotFound:
            continue
        if not _CLIENT & set(usage):
            return False
    return True


def _names_fit(chain: Chain) -> bool:
    """Whether the client's alternative names are among those that its authorities are confined to."""
    limits: list[x509.NameConstraints] = []
    for authority in chain[1:]:
        try:
            limits.append(authority.extensions.get_extension_for_class(x509.NameConstraints).value)
        except x509.ExtensionNotFound:
            continue
    if not limits:
        return True
    try:
        names = list(chain[0].extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        return True
    return all(_allowed(name, limit) for name in names for limit in limits)


def _allowed(name: x509.GeneralName, limit: x509.NameConstraints) -> bool:
    permitted = [one for one in limit.permitted_subtrees or () if type(one) is type(name)]
    excluded = [one for one in limit.excluded_subtrees or () if type(one) is type(name)]
    return not any(_within(name, one) for one in excluded) and (not permitted or any(_within(name, one) for one in permitted))


def _within(name: x509.GeneralName, subtree: x509.GeneralName) -> bool:
    value, limit = name.value, subtree.value
    if isinstance(name, x509.IPAddress):
        network = limit if isinstance(limit, ipaddress.IPv4Network | ipaddress.IPv6Network) else ipaddress.ip_network(limit)
        return isinstance(value, ipaddress.IPv4Address | ipaddress.IPv6Address) and value.version == network.version and value in network
    if not isinstance(value, str) or not isinstance(limit, str):
        # Kinds of names that nobody confines; where somebody does, the whole kind is out of reach.
        return bool(value == limit)
    if isinstance(name, x509.RFC822Name):
        if "@" in limit:
            return value.partition("@")[0] == limit.partition("@")[0] and value.partition("@")[2].lower() == limit.partition("@")[2].lower()
        return _below(value.rpartition("@")[2], limit, exact=True)
    if isinstance(name, x509.UniformResourceIdentifier):
        host = value.partition("://")[2].partition("/")[0].rpartition("@")[2]
        return _below(host.rpartition(":")[0] or host, limit, exact=True)
    return _below(value, limit, exact=False)


def _below(host: str, domain: str, *, exact: bool) -> bool:
    """Whether a host is in a domain: ".example.com" means hosts below; without the dot only the host itself, if exact, else both."""
    host, domain = host.lower().rstrip("."), domain.lower()
    if domain.startswith("."):
        return host.endswith(domain)
    return not domain or host == domain or (not exact and host.endswith("." + domain))
