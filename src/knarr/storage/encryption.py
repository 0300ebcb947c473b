"""Encryption at rest: a store around another one that keeps the values of some prefixes encrypted.

The stored form names provider and key, as upstream's does, so that either program reads what the other wrote:
`k8s:enc:aesgcm:v1:<key>:` + nonce + ciphertext, the store key being authenticated too. The first provider of a resource writes, all read; so a
key is rotated by putting the new one first. What still lies under an old key, or in the clear, is written anew in the background after
the start.

Source: apiserver pkg/server/options/encryptionconfig, pkg/storage/value/encrypt/aes.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import yaml
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import padding
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.storage.errors import CompactedError, StoreError, UnavailableError
from knarr.storage.protocol import Event, EventStream, Page, Put, RevisionStore, Stored, Subscriber

log = get_logger(__name__)

_NONCE_BYTES = 12
_PAUSE_BETWEEN_REWRITES_SECONDS = 0.002


class DecryptionError(StoreError):
    """A value is under a key that is not configured, or has been tampered with."""


class Transformer(Protocol):
    """One provider's key."""

    prefix: bytes

    def encrypt(self, key: str, value: bytes) -> bytes: ...

    def decrypt(self, key: str, stored: bytes) -> bytes: ...


class AESGCMTransformer:
    """AES-GCM with a random nonce for each write."""

    def __init__(self, name: str, secret: bytes) -> None:
        self.prefix = f"k8s:enc:aesgcm:v1:{name}:".encode()
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


class AESCBCTransformer:
    """AES-CBC with PKCS#7 padding; not authenticated, here for data that others wrote."""

    def __init__(self, name: str, secret: bytes) -> None:
        self.prefix = f"k8s:enc:aescbc:v1:{name}:".encode()
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


class SecretboxTransformer:
    """XSalsa20 and Poly1305, as NaCl's secretbox."""

    def __init__(self, name: str, secret: bytes) -> None:
        from knarr.storage import secretbox

        if len(secret) != secretbox.KEY_BYTES:
            raise ValueError(f"secret of secretbox key {name} has {len(secret)} bytes, not {secretbox.KEY_BYTES}")
        self.prefix = f"k8s:enc:secretbox:v1:{name}:".encode()
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

    def encrypt(self, key: str, value: bytes) -> bytes:
        return value

    def decrypt(self, key: str, stored: bytes) -> bytes:
        if stored.startswith(b"k8s:enc:"):
            raise DecryptionError(f"{key}: identity transformer tried to read encrypted data")
        return stored


class Rule(NamedTuple):
    """Transformers of a set of store prefixes; the first one writes."""

    matches: Callable[[str], bool]
    transformers: tuple[Transformer, ...]


def load_rules(path: str | Path) -> list[Rule]:
    """Read an EncryptionConfiguration.

    Raises:
      ValueError: it is malformed, or names a provider that is not supported.
      OSError: the file cannot be read.
    """
    document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    if not isinstance(document, dict) or document.get("kind") != "EncryptionConfiguration" or document.get("apiVersion") != "apiserver.config.k8s.io/v1":
        raise ValueError(f"{path} is no apiserver.config.k8s.io/v1 EncryptionConfiguration")
    rules: list[Rule] = []
    for entry in document.get("resources") or ():
        transformers = [one for provider in entry.get("providers") or () for one in _transformers(provider)]
        if not transformers:
            raise ValueError(f"{path}: resources {entry.get('resources')} have no provider")
        rules.append(Rule(_matcher([str(name) for name in entry.get("resources") or ()]), tuple(transformers)))
    return rules


def _transformers(provider: dict[str, Any]) -> list[Transformer]:
    if "identity" in provider:
        return [Identity()]
    makers: dict[str, Callable[[str, bytes], Transformer]] = {
        "aesgcm": AESGCMTransformer, "aescbc": AESCBCTransformer, "secretbox": SecretboxTransformer,
    }  # fmt: skip
    for kind, make in makers.items():
        if kind in provider:
            return [make(str(key["name"]), _secret(key)) for key in provider[kind].get("keys") or ()]
    raise ValueError(f"encryption provider {', '.join(provider)} is not supported: aesgcm, aescbc, secretbox and identity are")


def _secret(key: dict[str, Any]) -> bytes:
    try:
        secret = base64.b64decode(str(key.get("secret") or ""), validate=True)
    except binascii.Error as error:
        raise ValueError(f"secret of encryption key {key.get('name')} is not base64") from error
    if len(secret) not in (16, 24, 32):
        raise ValueError(f"encryption key {key.get('name')} has {len(secret)} bytes; 16, 24 or 32 are needed")
    return secret


def _matcher(resources: list[str]) -> Callable[[str], bool]:
    """Match store keys /registry/<group or core>/<plural>/… against names such as secrets, deployments.apps, *.apps, *.*."""
    names = set(resources)

    def matches(key: str) -> bool:
        parts = key.split("/", 4)
        if len(parts) < 4 or parts[1] != "registry":
            return False
        group, plural = parts[2], parts[3]
        suffix = "" if group == "core" else group
        dotted = f"{plural}.{suffix}" if suffix else plural
        return bool(names & {dotted, f"*.{suffix}", "*.*"})

    return matches


class EncryptedStore:
    """RevisionStore that encrypts what its rules name, over another store."""

    def __init__(self, inner: RevisionStore, rules: Sequence[Rule]) -> None:
        self._inner = inner
        self._rules = tuple(rules)
        self._by_prefix: dict[str, tuple[Transformer, ...]] = {}
        self._tasks = Tasks()
        self._rotating = True
        """Until every value is known to be under the first key."""

    def _transformers(self, key: str) -> tuple[Transformer, ...]:
        """The transformers of a key; () when it is kept as it is. Remembered per resource."""
        end = key.find("/", key.find("/", 10) + 1)
        prefix = key[:end] if end > 0 else key
        known = self._by_prefix.get(prefix)
        if known is None:
            known = next((rule.transformers for rule in self._rules if rule.matches(prefix + "/")), ())
            self._by_prefix[prefix] = known
        return known

    def _encrypt(self, key: str, value: bytes) -> bytes:
        transformers = self._transformers(key)
        return transformers[0].encrypt(key, value) if transformers else value

    def _decrypt(self, key: str, stored: bytes) -> bytes:
        transformers = self._transformers(key)
        if not transformers:
            return stored
        for transformer in transformers:
            if transformer.prefix and stored.startswith(transformer.prefix):
                return transformer.decrypt(key, stored)
        if stored.startswith(b"k8s:enc:"):
            raise DecryptionError(f"{key}: no matching prefix found: the value's key is not configured")
        # Data from before encryption was switched on is read, whether identity is listed or not, and rewritten.
        return stored

    def _open(self, stored: Stored | None) -> Stored | None:
        return None if stored is None else Stored(stored.key, self._decrypt(stored.key, stored.value), stored.revision)

    def _open_event(self, event: Event) -> Event:
        if not self._transformers(event.key):
            return event
        value = None if event.value is None else self._decrypt(event.key, event.value)
        previous = None if event.previous_value is None else self._decrypt(event.key, event.previous_value)
        return event._replace(value=value, previous_value=previous)

    # -- RevisionStore ---------------------------------------------------------------------------------------------
    @property
    def revision(self) -> int:
        return self._inner.revision

    @property
    def compacted(self) -> int:
        return self._inner.compacted

    def is_stale(self, key: str) -> bool:
        return self._rotating and bool(self._transformers(key))

    @property
    def shared(self) -> bool:
        return self._inner.shared

    @property
    def size_bytes(self) -> int:
        return self._inner.size_bytes

    async def catch_up(self) -> None:
        await self._inner.catch_up()

    async def start(self) -> None:
        await self._inner.start()
        self._tasks.spawn(self._rewrite_stale(), "store-reencryption")

    async def wait_lost(self) -> None:
        await self._inner.wait_lost()

    async def close(self) -> None:
        await self._tasks.close()
        await self._inner.close()

    async def get(self, key: str, *, at: int | None = None) -> Stored | None:
        return self._open(await self._inner.get(key, at=at))

    async def scan(self, prefix: str, *, at: int | None = None, limit: int = 0, after: str | None = None) -> Page:
        page = await self._inner.scan(prefix, at=at, limit=limit, after=after)
        try:
            return page._replace(items=[Stored(item.key, self._decrypt(item.key, item.value), item.revision) for item in page.items])
        except DecryptionError as error:
            if at is None or at >= self.revision:
                raise
            # Of a time before a key was given up: as good as compacted.
            raise CompactedError(at, self.revision) from error

    async def put(self, key: str, value: bytes, *, expected: int, lease_seconds: int = 0) -> Put:
        put = await self._inner.put(key, self._encrypt(key, value), expected=expected, lease_seconds=lease_seconds)
        return put if put.current is None else put._replace(current=self._open(put.current))

    async def remove(self, key: str, *, expected: int) -> Put:
        put = await self._inner.remove(key, expected=expected)
        return put if put.current is None else put._replace(current=self._open(put.current))

    def subscribe(self, subscriber: Subscriber) -> Callable[[], None]:
        def pass_on(events: Sequence[Event]) -> None:
            try:
                opened = [self._open_event(event) for event in events]
            except DecryptionError as error:
                # Written by a server with other keys: what can be read is passed on, the rest only an operator can mend.
                log.error("event cannot be decrypted", error=str(error))
                opened = [one for event in events if (one := self._opened_or_none(event)) is not None]
            subscriber(opened)

        return self._inner.subscribe(pass_on)

    def _opened_or_none(self, event: Event) -> Event | None:
        try:
            return self._open_event(event)
        except DecryptionError:
            return None

    def watch(self, prefix: str, *, since: int) -> AbstractAsyncContextManager[EventStream]:
        return self._watch(prefix, since)

    @asynccontextmanager
    async def _watch(self, prefix: str, since: int) -> AsyncIterator[EventStream]:
        async with self._inner.watch(prefix, since=since) as stream:
            yield _OpenedStream(stream, self._open_event)

    async def compact(self, revision: int) -> None:
        await self._inner.compact(revision)

    # -- rotation --------------------------------------------------------------------------------------------------
    async def _rewrite_stale(self) -> None:
        """Bring every value of the encrypted resources under the first key."""
        rewritten = failed = 0
        after: str | None = None
        while True:
            page = await self._inner.scan("/registry/", limit=500, after=after)
            for item in page.items:
                transformers = self._transformers(item.key)
                if not transformers or item.value.startswith(transformers[0].prefix or b"{"):
                    continue
                try:
                    value = transformers[0].encrypt(item.key, self._decrypt(item.key, item.value))
                    # Somebody who writes it meanwhile writes it under the first key.
                    await self._inner.put(item.key, value, expected=item.revision)
                except (DecryptionError, UnavailableError) as error:
                    log.warning("value not encrypted anew", error=str(error))
                    failed += 1
                    continue
                rewritten += 1
                await asyncio.sleep(_PAUSE_BETWEEN_REWRITES_SECONDS)
            if page.after is None:
                break
            after = page.after
        self._rotating = failed > 0
        if rewritten:
            log.info("values encrypted under the first key", count=rewritten)


class _OpenedStream:
    """An EventStream whose events are decrypted on the way; those under a key that has been given up are as good as compacted."""

    def __init__(self, inner: EventStream, open_event: Callable[[Event], Event]) -> None:
        self._inner = inner
        self._open_event = open_event

    async def __aiter__(self) -> AsyncIterator[Sequence[Event]]:
        async for batch in self._inner:
            try:
                opened = [self._open_event(event) for event in batch]
            except DecryptionError as error:
                raise CompactedError(batch[0].revision, batch[-1].revision) from error
            yield opened
