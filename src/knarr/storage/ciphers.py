"""What turns a value into what is stored, and back: AES-GCM, AES-CBC, NaCl's secretbox with keys of the configuration, or nothing.

The stored form names provider and key, as upstream's does, so that either program reads what the other wrote:
`k8s:enc:aesgcm:v1:<key>:` + nonce + ciphertext, the store key being authenticated too.

Source: apiserver pkg/storage/value/encrypt/{aes,secretbox,identity}.
"""

from __future__ import annotations

import os
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from knarr.storage.errors import StoreError

MARK = b"k8s:enc:"
"""What every encrypted value begins with."""
_NONCE_BYTES = 12


class DecryptionError(StoreError):
    """A value is under a key that is not configured, or has been tampered with."""


class Transformer(Protocol):
    """One provider's key."""

    prefix: bytes
    """What the values that it has written begin with."""
    label: str
    """The part of the prefix that metrics name."""

    def encrypt(self, key: str, value: bytes) -> bytes: ...

    def decrypt(self, key: str, stored: bytes) -> bytes: ...

    def is_current(self, stored: bytes) -> bool:
        """Whether a value is stored as a write would store it now."""
        ...


class _Keyed:
    """A key that stands in the configuration."""

    kind = ""

    def __init__(self, name: str) -> None:
        self.label = f"k8s:enc:{self.kind}:v1:"
        self.prefix = f"{self.label}{name}:".encode()

    def is_current(self, stored: bytes) -> bool:
        return stored.startswith(self.prefix)


class AESGCMTransformer(_Keyed):
    """AES-GCM with a random nonce for each write."""

    kind = "aesgcm"

    def __init__(self, name: str, secret: bytes) -> None:
        super().__init__(name)
        self._cipher = AESGCM(secret)

    def encrypt(self, key: str, value: bytes) -> bytes:
        nonce = os.urandom(_NONCE_BYTES)
        return self.prefix + nonce + self._cipher.encrypt(nonce, value, key.encode())

    def decrypt(self, key: str, stored: bytes) -> bytes:
        body = stored[len(self.prefix) :]
        try:
            return self._cipher.decrypt(body[:_NONCE_BYTES], body[_NONCE_BYTES:], key.encode())
        except (InvalidTag, ValueError) as error:
            raise DecryptionError(f"{key}: the value does not fit its key") from error


class AESCBCTransformer(_Keyed):
    """AES-CBC with PKCS#7 padding; not authenticated, here for data that others wrote."""

    kind = "aescbc"

    def __init__(self, name: str, secret: bytes) -> None:
        super().__init__(name)
        self._algorithm = algorithms.AES(secret)

    def encrypt(self, key: str, value: bytes) -> bytes:
        vector = os.urandom(16)
        padder = padding.PKCS7(128).padder()
        encryptor = Cipher(self._algorithm, modes.CBC(vector)).encryptor()
        return self.prefix + vector + encryptor.update(padder.update(value) + padder.finalize()) + encryptor.finalize()

    def decrypt(self, key: str, stored: bytes) -> bytes:
        body = stored[len(self.prefix) :]
        try:
            decryptor = Cipher(self._algorithm, modes.CBC(body[:16])).decryptor()
            unpadder = padding.PKCS7(128).unpadder()
            return unpadder.update(decryptor.update(body[16:]) + decryptor.finalize()) + unpadder.finalize()
        except ValueError as error:
            raise DecryptionError(f"{key}: the value does not fit its key") from error


class SecretboxTransformer(_Keyed):
    """XSalsa20 and Poly1305, as NaCl's secretbox."""

    kind = "secretbox"

    def __init__(self, name: str, secret: bytes) -> None:
        from knarr.storage import secretbox

        super().__init__(name)
        self._secret = secret
        self._box = secretbox

    def encrypt(self, key: str, value: bytes) -> bytes:
        nonce = os.urandom(self._box.NONCE_BYTES)
        return self.prefix + nonce + self._box.seal(self._secret, nonce, value)

    def decrypt(self, key: str, stored: bytes) -> bytes:
        body = stored[len(self.prefix) :]
        size = self._box.NONCE_BYTES
        try:
            return self._box.unseal(self._secret, body[:size], body[size:])
        except (self._box.WrongKeyError, ValueError) as error:
            raise DecryptionError(f"{key}: the value does not fit its key") from error


class Identity:
    """No encryption."""

    prefix = b""
    label = "identity"

    def is_current(self, stored: bytes) -> bool:
        return not stored.startswith(MARK)

    def encrypt(self, key: str, value: bytes) -> bytes:
        return value

    def decrypt(self, key: str, stored: bytes) -> bytes:
        if stored.startswith(MARK):
            raise DecryptionError(f"{key}: identity transformer tried to read encrypted data")
        return stored
