"""Whether a TLS secret's certificate and key belong together. Pure; used by this package.

Source: Go crypto/tls (X509KeyPair), whose texts these are; pkg/registry/core/secret/strategy.go.
"""

import base64
import binascii
import re

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_der_private_key

_BLOCK = re.compile(r"^-----BEGIN ([^\n]*?)-----[ \t\r]*\n(.*?)^-----END \1-----", re.DOTALL | re.MULTILINE)


def of_pair(certificate: str, key: str) -> list[str]:
    """Return what TLS would say of a certificate chain and a key, both PEM in base64 as secrets hold them."""
    problem = _problem(_blocks(certificate), _blocks(key))
    return [problem] if problem else []


def _blocks(encoded: str) -> list[tuple[str, bytes]]:
    found = []
    for kind, body in _BLOCK.findall(base64.b64decode(encoded).decode("utf-8", "replace")):
        # Headers of old, as in encrypted keys, end with an empty line.
        text = body.rpartition("\n\n")[2] if ":" in body else body
        try:
            found.append((kind, base64.b64decode("".join(text.split()), validate=True)))
        except binascii.Error:
            continue
    return found


def _problem(certificates: list[tuple[str, bytes]], keys: list[tuple[str, bytes]]) -> str | None:
    chain = [body for kind, body in certificates if kind == "CERTIFICATE"]
    if not chain:
        skipped = [kind for kind, _ in certificates]
        if not skipped:
            return "tls: failed to find any PEM data in certificate input"
        if len(skipped) == 1 and skipped[0].endswith("PRIVATE KEY"):
            return "tls: failed to find certificate PEM data in certificate input, but did find a private key; PEM inputs may have been switched"
        return (
            'tls: failed to find "CERTIFICATE" PEM block in certificate input after skipping PEM blocks of the following types: '
            f"[{' '.join(skipped)}]"
        )
    private = next((body for kind, body in keys if kind == "PRIVATE KEY" or kind.endswith(" PRIVATE KEY")), None)
    if private is None:
        skipped = [kind for kind, _ in keys]
        if not skipped:
            return "tls: failed to find any PEM data in key input"
        if skipped == ["CERTIFICATE"]:
            return "tls: found a certificate rather than a key in the PEM for the private key"
        return (
            'tls: failed to find PEM block with type ending in "PRIVATE KEY" in key input after skipping PEM blocks of the following types: '
            f"[{' '.join(skipped)}]"
        )
    return _mismatch(chain[0], private)


def _mismatch(certificate: bytes, private: bytes) -> str | None:
    try:
        public = x509.load_der_x509_certificate(certificate).public_key()
    except ValueError:
        return "x509: malformed certificate"
    try:
        key = load_der_private_key(private, password=None)
    except (ValueError, TypeError):
        return "tls: failed to parse private key"
    own = key.public_key()
    for kind in (rsa.RSAPublicKey, ec.EllipticCurvePublicKey, ed25519.Ed25519PublicKey):
        if isinstance(public, kind):
            if not isinstance(own, kind):
                return "tls: private key type does not match public key type"
            form = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
            return None if public.public_bytes(*form) == own.public_bytes(*form) else "tls: private key does not match public key"
    return "tls: unknown public key algorithm"
