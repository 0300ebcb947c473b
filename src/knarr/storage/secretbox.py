"""NaCl's secretbox (XSalsa20 and Poly1305), which the `secretbox` provider of encryption at rest writes.

Poly1305 is the cryptography package's; XSalsa20, which that package lacks, is worked out here for all blocks of a value at once in
numpy's unsigned 32-bit arithmetic. Pure. Checked against NaCl's published vector in the tests.

Source: D. J. Bernstein, "Extending the Salsa20 nonce" and "Cryptography in NaCl".
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.poly1305 import Poly1305

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Words = NDArray[np.uint32]

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 24, 16
_BLOCK_BYTES = 64
_CONSTANT = np.frombuffer(b"expand 32-byte k", "<u4")
_QUARTERS = (
    (0, 4, 8, 12), (5, 9, 13, 1), (10, 14, 2, 6), (15, 3, 7, 11),
    (0, 1, 2, 3), (5, 6, 7, 4), (10, 11, 8, 9), (15, 12, 13, 14),
)  # fmt: skip
"""Columns, then rows: which words each quarter round takes."""


class WrongKeyError(Exception):
    """The box was not sealed with this key, or has been changed."""


def _rounds(state: list[Words]) -> list[Words]:
    """Twenty rounds of Salsa20 over sixteen words, each an array with an entry for each block."""
    x = list(state)
    for _ in range(10):
        for a, b, c, d in _QUARTERS:
            x[b] = x[b] ^ _rotated(x[a] + x[d], 7)
            x[c] = x[c] ^ _rotated(x[b] + x[a], 9)
            x[d] = x[d] ^ _rotated(x[c] + x[b], 13)
            x[a] = x[a] ^ _rotated(x[d] + x[c], 18)
    return x


def _rotated(words: Words, bits: int) -> Words:
    return (words << np.uint32(bits)) | (words >> np.uint32(32 - bits))


def _state(key: bytes, middle: list[Words], blocks: int) -> list[Words]:
    words = [np.full(blocks, word, np.uint32) for word in np.frombuffer(key, "<u4")]
    constant = [np.full(blocks, word, np.uint32) for word in _CONSTANT]
    return [constant[0], *words[:4], constant[1], *middle, constant[2], *words[4:], constant[3]]


def _keystream(key: bytes, nonce: bytes, size: int) -> bytes:
    """XSalsa20's stream: the first 16 bytes of the nonce make a key of their own, the rest is Salsa20's nonce."""
    first = [np.full(1, word, np.uint32) for word in np.frombuffer(nonce[:16], "<u4")]
    mixed = _rounds(_state(key, first, 1))
    inner = b"".join(int(mixed[index][0]).to_bytes(4, "little") for index in (0, 5, 10, 15, 6, 7, 8, 9))
    blocks = -(-size // _BLOCK_BYTES)
    counter = np.arange(blocks, dtype=np.uint64)
    rest = [np.full(blocks, word, np.uint32) for word in np.frombuffer(nonce[16:], "<u4")]
    state = _state(inner, [*rest, counter.astype(np.uint32), (counter >> np.uint64(32)).astype(np.uint32)], blocks)
    out = np.stack([mixed + start for mixed, start in zip(_rounds(state), state, strict=True)], axis=1)
    return out.astype("<u4").tobytes()[:size]


def _xor(left: bytes, right: bytes) -> bytes:
    return (np.frombuffer(left, np.uint8) ^ np.frombuffer(right, np.uint8)).tobytes()


def seal(key: bytes, nonce: bytes, text: bytes) -> bytes:
    """Return tag and ciphertext. Key and nonce are KEY_BYTES and NONCE_BYTES long; a nonce is used once."""
    stream = _keystream(key, nonce, 32 + len(text))
    body = _xor(text, stream[32:])
    return Poly1305.generate_tag(stream[:32], body) + body


def unseal(key: bytes, nonce: bytes, box: bytes) -> bytes:
    """Return the text. Raises WrongKeyError."""
    tag, body = box[:TAG_BYTES], box[TAG_BYTES:]
    stream = _keystream(key, nonce, 32 + len(body))
    try:
        Poly1305.verify_tag(stream[:32], body, tag)
    except InvalidSignature as error:
        raise WrongKeyError from error
    return _xor(body, stream[32:])
