"""JSON Web Tokens as Kubernetes uses them: RS256/384/512 and ES256/384/512, key ids derived from the public key.

Callers: the API server (issues and checks service account tokens, checks OIDC tokens), the token controller (legacy tokens).
Knows nothing of claims beyond their being a JSON object; who checks expiry and audience is the caller.

Source: RFC 7515, 7517, 7518; kubernetes pkg/serviceaccount/jwt.go for the key id.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable
from typing import Any

import orjson
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, padding, rsa
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature, encode_dss_signature

PublicKey = rsa.RSAPublicKey | ec.EllipticCurvePublicKey
PrivateKey = rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey

_HASHES: dict[str, hashes.HashAlgorithm] = {"256": hashes.SHA256(), "384": hashes.SHA384(), "512": hashes.SHA512()}
_CURVE_ALGORITHMS = {"secp256r1": "ES256", "secp384r1": "ES384", "secp521r1": "ES512"}
MAX_TOKEN_BYTES = 64 << 10


class TokenError(Exception):
    """The token cannot be trusted; the text may be shown to whoever sent it."""


def b64encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def b64decode(text: str) -> bytes:
    """Decode base64url without padding. Raises TokenError."""
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except ValueError as error:
        raise TokenError("illegal base64 data") from error


def key_id(key: PublicKey) -> str:
    """Base64url SHA-256 of the DER form: what Kubernetes puts into `kid`."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b64encode(hashlib.sha256(der).digest())


def algorithm(key: PublicKey) -> str:
    """The algorithm that Kubernetes signs with under this key. Raises TokenError for curves that JOSE does not have."""
    if isinstance(key, rsa.RSAPublicKey):
        return "RS256"
    try:
        return _CURVE_ALGORITHMS[key.curve.name]
    except KeyError:
        raise TokenError("unknown private key curve, must be 256, 384, or 521") from None


def load_private_key(pem: bytes) -> PrivateKey:
    """Read a PEM key. Raises ValueError for keys that are neither RSA nor EC."""
    key = serialization.load_pem_private_key(pem, None)
    if not isinstance(key, rsa.RSAPrivateKey | ec.EllipticCurvePrivateKey):
        raise ValueError("only RSA and EC keys can sign tokens")
    return key


def load_public_keys(pem: bytes) -> list[PublicKey]:
    """Read every RSA or EC key of a PEM bundle of public keys, private keys and certificates.

    Raises:
      ValueError: there is none.
    """
    from cryptography import x509

    found: list[PublicKey] = []
    end = b"-----END "
    position = 0
    while (start := pem.find(b"-----BEGIN ", position)) >= 0:
        stop = pem.find(end, start)
        position = pem.find(b"-----", stop + len(end)) + 5 if stop >= 0 else len(pem)
        block = pem[start:position] + b"\n"
        key: Any
        if b"CERTIFICATE" in block[:40]:
            key = x509.load_pem_x509_certificate(block).public_key()
        elif b"PRIVATE KEY" in block[:40]:
            key = load_private_key(block).public_key()
        elif b"PUBLIC KEY" in block[:40]:
            key = serialization.load_pem_public_key(block)
        else:
            continue
        if isinstance(key, rsa.RSAPublicKey | ec.EllipticCurvePublicKey):
            found.append(key)
    if not found:
        raise ValueError("no RSA or EC key found")
    return found


class Signer:
    """Signs claims with one key."""

    def __init__(self, key: PrivateKey) -> None:
        self._key = key
        self.public_key = key.public_key()
        self._algorithm = algorithm(self.public_key)
        self._header = b64encode(orjson.dumps({"alg": self._algorithm, "kid": key_id(self.public_key)}))

    def sign(self, claims: dict[str, Any]) -> str:
        """Return the compact serialisation."""
        signed = f"{self._header}.{b64encode(orjson.dumps(claims))}"
        data = signed.encode()
        digest = _HASHES[self._algorithm[2:]]
        if isinstance(self._key, rsa.RSAPrivateKey):
            signature = self._key.sign(data, padding.PKCS1v15(), digest)
        else:
            r, s = decode_dss_signature(self._key.sign(data, ec.ECDSA(digest)))
            size = (self._key.key_size + 7) // 8
            signature = r.to_bytes(size, "big") + s.to_bytes(size, "big")
        return f"{signed}.{b64encode(signature)}"


def unverified_claims(token: str) -> dict[str, Any]:
    """Read the claims without looking at the signature, to find out who might have issued the token. Raises TokenError."""
    parts = token.split(".")
    if len(parts) != 3 or len(token) > MAX_TOKEN_BYTES:
        raise TokenError("token is malformed")
    return _object(parts[1])


def _object(part: str) -> dict[str, Any]:
    try:
        value = orjson.loads(b64decode(part))
    except orjson.JSONDecodeError as error:
        raise TokenError("token is malformed") from error
    if not isinstance(value, dict):
        raise TokenError("token is malformed")
    return value


def header(token: str) -> dict[str, Any]:
    """Read the header without looking at the signature. Raises TokenError."""
    return _object(token.split(".", 1)[0])


def verify(token: str, keys: Iterable[PublicKey], *, algorithms: frozenset[str] | None = None) -> dict[str, Any]:
    """Check the signature under any of the keys and return the claims.

    Args:
      algorithms: Only these are accepted; None means every one that fits the key's type.

    Raises:
      TokenError: malformed, or no key made this signature.
    """
    claims = unverified_claims(token)
    name = header(token).get("alg")
    signed, _, signature_text = token.rpartition(".")
    signature = b64decode(signature_text)
    if not isinstance(name, str) or name[2:] not in _HASHES or (algorithms is not None and name not in algorithms):
        raise TokenError(f"unexpected signature algorithm {name!r}")
    for key in keys:
        if _verify_one(key, name, signed.encode(), signature):
            return claims
    raise TokenError("failed to verify id token signature")


def _verify_one(key: PublicKey, name: str, signed: bytes, signature: bytes) -> bool:
    digest = _HASHES[name[2:]]
    try:
        if isinstance(key, rsa.RSAPublicKey):
            if name[:2] != "RS":
                return False
            key.verify(signature, signed, padding.PKCS1v15(), digest)
            return True
        size = (key.key_size + 7) // 8
        if name != _CURVE_ALGORITHMS.get(key.curve.name) or len(signature) != 2 * size:
            return False
        dss = encode_dss_signature(int.from_bytes(signature[:size], "big"), int.from_bytes(signature[size:], "big"))
        key.verify(dss, signed, ec.ECDSA(digest))
        return True
    except InvalidSignature:
        return False


def to_jwk(key: PublicKey) -> dict[str, str]:
    """Return the key's JSON Web Key, as /openid/v1/jwks lists it."""
    common = {"use": "sig", "kid": key_id(key), "alg": algorithm(key)}
    if isinstance(key, rsa.RSAPublicKey):
        numbers = key.public_numbers()
        return {
            "use": "sig", "kty": "RSA", "kid": common["kid"], "alg": common["alg"],
            "n": b64encode(numbers.n.to_bytes((numbers.n.bit_length() + 7) // 8, "big")),
            "e": b64encode(numbers.e.to_bytes((numbers.e.bit_length() + 7) // 8, "big")),
        }  # fmt: skip
    size = (key.key_size + 7) // 8
    point = key.public_numbers()
    return {
        "use": "sig", "kty": "EC", "kid": common["kid"], "crv": f"P-{key.key_size}", "alg": common["alg"],
        "x": b64encode(point.x.to_bytes(size, "big")), "y": b64encode(point.y.to_bytes(size, "big")),
    }  # fmt: skip


def from_jwk(jwk: dict[str, Any]) -> PublicKey:
    """Build the key of a JSON Web Key. Raises TokenError for types other than RSA and EC."""
    try:
        if jwk.get("kty") == "RSA":
            n, e = (int.from_bytes(b64decode(jwk[field]), "big") for field in ("n", "e"))
            return rsa.RSAPublicNumbers(e, n).public_key()
        curves: dict[str, ec.EllipticCurve] = {"P-256": ec.SECP256R1(), "P-384": ec.SECP384R1(), "P-521": ec.SECP521R1()}
        if jwk.get("kty") == "EC" and jwk.get("crv") in curves:
            x, y = (int.from_bytes(b64decode(jwk[field]), "big") for field in ("x", "y"))
            return ec.EllipticCurvePublicNumbers(x, y, curves[jwk["crv"]]).public_key()
    except (KeyError, ValueError, AttributeError) as error:
        raise TokenError("malformed JSON web key") from error
    raise TokenError(f"unsupported JSON web key type {jwk.get('kty')!r}")
