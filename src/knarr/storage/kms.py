"""A key management service as provider of encryption at rest: KMS API v2 over gRPC on a Unix socket.

The plugin holds the key; here is a seed, made at random when the plugin's key is first seen and encrypted by it, from which each write
derives a key of its own. Every value carries the encrypted seed, so that reading asks the plugin once per seed and not once per value. The plugin's
Status is asked once a minute: another key id brings another seed; a plugin that fails may be written with for three more minutes.

Role: one of the transformers of encryption_config.py; EncryptedStore starts it, fetches missing seeds before it decrypts, closes it.
Loop: one per plugin, a timer. grpcio is an optional dependency (extra "cri").

Source: apiserver pkg/storage/value/encrypt/envelope/kmsv2, encrypt/aes/aes_extended_nonce.go; k8s.io/kms apis/v2; KEP-3299.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import uuid
from collections.abc import Awaitable, Callable
from typing import Any, NamedTuple

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.storage.ciphers import DecryptionError
from knarr.storage.errors import UnavailableError
from knarr.storage.etcd_wire import data, fields
from knarr.storage.kms_wire import DEK, SEED, Sealed, check, decode_sealed, invalid_key_id, key_hash, pairs, sealed_by
from knarr.storage.kms_wire import identity as identity_of

log = get_logger(__name__)

DEFAULT_TIMEOUT_SECONDS = 3.0
HEALTHY_SECONDS, UNHEALTHY_SECONDS = 60.0, 10.0
"""How often the plugin is asked for its status."""
HEALTHY_KEPT_SECONDS, UNHEALTHY_KEPT_SECONDS = 20.0, 3.0
"""How long its answer counts."""
WRITE_SECONDS = 180.0
"""How long a seed is written with after the plugin was well for the last time."""
_PREFIX = b"k8s:enc:kms:v2:"
_MOSTSEEDS = 4096
_INFO_BYTES = _SEED_BYTES = 32
_NONCE_BYTES = 12


class Observer:
    """Told of what happens, for metrics; this one forgets it."""

    def called(self, provider: str, method: str, code: str, seconds: float) -> None:
        """The plugin has answered a call, or not (code)."""

    def key_used(self, direction: str, provider: str, key_id: str) -> None:
        """A value was read ("from_storage") or written ("to_storage")."""

    def key_told(self, provider: str, key_id: str) -> None:
        """The plugin's Status has named its key."""

    def key_invalid(self, provider: str, reason: str) -> None:
        """It has named one that cannot be."""

    def seed_missed(self) -> None:
        """A seed must be decrypted by the plugin."""

    def seeds_kept(self, provider: str, count: int) -> None:
        """So many are known now."""

    def transformed(self, resource: str, direction: str, prefix: str, failed: bool, seconds: float) -> None:
        """A value was encrypted or decrypted by whatever provider."""


class _Seed:
    """A seed from which each value's key is derived, or a key as such (older servers wrote so)."""

    def __init__(self, secret: bytes, kind: int) -> None:
        if kind == SEED and len(secret) < _SEED_BYTES:
            raise ValueError(f"invalid seed length {len(secret)} used for key generation")
        self._secret = secret
        self._cipher = AESGCM(secret) if kind == DEK else None

    def _derived(self, info: bytes) -> AESGCM:
        return AESGCM(HKDFExpand(SHA256(), 32, info).derive(self._secret))

    def seal(self, key: str, value: bytes) -> bytes:
        info, nonce = os.urandom(_INFO_BYTES), os.urandom(_NONCE_BYTES)
        return info + nonce + self._derived(info).encrypt(nonce, value, key.encode())

    def unseal(self, key: str, body: bytes) -> bytes:
        start = 0 if self._cipher is not None else _INFO_BYTES
        cipher = self._cipher or self._derived(body[:start])
        return cipher.decrypt(body[start : start + _NONCE_BYTES], body[start + _NONCE_BYTES :], key.encode())


class _Writing(NamedTuple):
    """What values are written with."""

    seed: _Seed
    sealed: Sealed
    tail: bytes
    expires_at: float


class KMSProvider:
    """See the module's docstring. A Transformer; decrypt raises SeedMissing until `fetch` has been awaited for the value."""

    def __init__(self, name: str, path: str, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS, observer: Observer | None = None) -> None:
        """Args:
        path: The socket; "/@name" is in the abstract namespace.
        """
        self.name = name
        self.label = f"{_PREFIX.decode()}{name}:"
        self.prefix = self.label.encode()
        self.timeout_seconds = timeout_seconds
        self.rotated: Callable[[], None] = lambda: None
        """Called when another key has taken over."""
        self._target = f"unix-abstract:{path[2:]}" if path.startswith("/@") else f"unix:{path}"
        self._observer = observer or Observer()
        self._channel: Any = None
        self._loop: asyncio.Task[None] | None = None
        self._writing: _Writing | None = None
        self._seeds: dict[tuple[object, ...], _Seed] = {}
        self._fetching: dict[tuple[object, ...], asyncio.Task[None]] = {}
        self._version = ""
        self._checking = asyncio.Lock()
        self._trouble = ""
        self._checked_until = 0.0

    # -- life --------------------------------------------------------------------------------------------------------
    async def start(self) -> None:
        """Ask the plugin for the first time, which it need not answer, and follow it from then on. Raises UnavailableError without grpcio."""
        try:
            import grpc.aio
        except ImportError as error:
            raise UnavailableError("KMS providers need grpcio: install the extra cri") from error
        self._channel = grpc.aio.insecure_channel(self._target, options=[("grpc.default_authority", "localhost")])
        await self.health()
        self._loop = asyncio.get_running_loop().create_task(self._follow(), name=f"kms-{self.name}")

    async def close(self) -> None:
        """Stop following it; idempotent."""
        loop, self._loop = self._loop, None
        for task in (loop, *self._fetching.values()):
            if task is not None:
                task.cancel()
                with contextlib.suppress(asyncio.CancelledError, UnavailableError):
                    await task
        channel, self._channel = self._channel, None
        if channel is not None:
            await channel.close()

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(UNHEALTHY_SECONDS if self._trouble else HEALTHY_SECONDS)
            await self.health()

    # -- health and keys ---------------------------------------------------------------------------------------------
    async def health(self) -> str:
        """Return what is wrong with the plugin, "" when it is well; asks it unless it has just been asked."""
        async with self._checking:
            if clock.now() < self._checked_until:
                return self._trouble
            before = self._trouble
            try:
                status = {number: value for number, value in fields(await self._call("Status", b""))}
                self._trouble = await self._take_status(*(bytes(status.get(number, b"")).decode() for number in (1, 2, 3)))
            except UnavailableError as error:
                self._trouble = f"failed to perform status section of the healthz check for KMS Provider {self.name}, error: {error}"
            if self._trouble and self._trouble != before:
                log.warning("key management service is not well", name=self.name, error=self._trouble)
            self._checked_until = clock.now() + (UNHEALTHY_KEPT_SECONDS if self._trouble else HEALTHY_KEPT_SECONDS)
            return self._trouble

    async def _take_status(self, version: str, healthz: str, key_id: str) -> str:
        """Return what is wrong with a Status; takes over another key if it names one."""
        wrong: list[str] = []
        if healthz != "ok":
            wrong.append(f"got unexpected healthz status: {healthz}")
        if version not in ("v2", "v2beta1"):
            wrong.append(f"expected KMSv2 API version v2, got {version}")
        else:
            self._version = self._version or version
            if version != self._version:
                wrong.append(f"KMSv2 API version should not change after the initial status response version {self._version}, got {version}")
        code, reason = invalid_key_id(key_id)
        if code:
            self._observer.key_invalid(self.name, code)
            wrong.append(f'got invalid KMSv2 KeyID hash "{key_hash(key_id)}": {reason}')
        else:
            self._observer.key_told(self.name, key_id)
            wrong += await self._keep_up(key_id)
        if not wrong:
            return ""
        together = wrong[0] if len(wrong) == 1 else f"[{', '.join(wrong)}]"
        return f"kmsv2 Provider {self.name} is not healthy, error: {together}"

    async def _keep_up(self, key_id: str) -> list[str]:
        """Go on writing with the seed there is if it is under this key, with a new one otherwise; returns what went wrong."""
        # Counted from before the call, so that it is an upper bound.
        expires_at = clock.now() + WRITE_SECONDS
        current = self._writing
        if current is not None and current.sealed.key_id == key_id:
            self._writing = current._replace(expires_at=expires_at)
            return []
        secret, uid = os.urandom(_SEED_BYTES), str(uuid.uuid4())
        told = ""
        try:
            sealed = sealed_by(await self._call("Encrypt", data(1, secret) + data(2, uid.encode())))
            told = sealed.key_id
            check(sealed)
            if told == key_id:
                seed = _Seed(secret, SEED)
                self._keep(sealed, seed)
                self._writing = _Writing(seed, sealed, sealed.tail(), expires_at)
                log.info("key management service has given a key", name=self.name, key=key_hash(key_id))
                self.rotated()
                return []
            why = "<nil>"
        except (UnavailableError, ValueError) as error:
            why = f"failed to encrypt DEK, error: {error}"
        state = current.sealed.key_id if current is not None else ""
        return [
            f'failed to rotate DEK uid="{uid}", useSeed=true, errGen={why}, statusKeyIDHash="{key_hash(key_id)}", '
            f'encryptKeyIDHash="{key_hash(told)}", stateKeyIDHash="{key_hash(state)}"'
        ]

    async def _call(self, method: str, body: bytes) -> bytes:
        """Call the plugin. Raises UnavailableError."""
        import grpc
        import grpc.aio

        path, loop = f"/v2.KeyManagementService/{method}", asyncio.get_running_loop()
        begin, code = loop.time(), "OK"
        if self._channel is None:
            raise UnavailableError(f"KMS provider {self.name} is closed")
        try:
            answer: bytes = await self._channel.unary_unary(path)(body, timeout=self.timeout_seconds, wait_for_ready=True)
        except grpc.aio.AioRpcError as error:
            code = "".join(part.capitalize() for part in error.code().name.split("_"))
            raise UnavailableError(f"rpc error: code = {code} desc = {error.details()}") from error
        finally:
            self._observer.called(self.name, path, code, loop.time() - begin)
        return answer

    # -- values ------------------------------------------------------------------------------------------------------
    def encrypt(self, key: str, value: bytes) -> bytes:
        """Raises UnavailableError: the plugin has not been well for too long."""
        writing = self._writing
        if writing is None:
            raise UnavailableError(f"KMS provider {self.name} has given no key yet: {self._trouble}")
        if clock.now() > writing.expires_at:
            raise UnavailableError(f'encryptedDEKSource with keyID hash "{key_hash(writing.sealed.key_id)}" expired: {self._trouble}')
        sealed = self.prefix + data(1, writing.seed.seal(key, value)) + writing.tail
        self._observer.key_used("to_storage", self.name, writing.sealed.key_id)
        return sealed

    def decrypt(self, key: str, stored: bytes) -> bytes:
        sealed = self._read(key, stored)
        seed = self._seeds.get(identity_of(sealed))
        if seed is None:
            raise SeedMissing(f"{key}: the key management service has not been asked for its seed")
        try:
            value = seed.unseal(key, sealed.body)
        except (InvalidTag, ValueError) as error:
            raise DecryptionError(f"{key}: the value does not fit its key") from error
        self._observer.key_used("from_storage", self.name, sealed.key_id)
        return value

    def is_current(self, stored: bytes) -> bool:
        writing = self._writing
        if writing is None or not stored.startswith(self.prefix):
            return False
        try:
            sealed = decode_sealed(stored[len(self.prefix) :])
        except ValueError:
            return False
        return sealed.key_id == writing.sealed.key_id and sealed.kind == SEED

    def lacks(self, stored: bytes) -> bool:
        """Whether `fetch` must come before a value can be decrypted."""
        try:
            return identity_of(decode_sealed(stored[len(self.prefix) :])) not in self._seeds
        except ValueError:
            return False

    def fetch(self, stored: bytes) -> Awaitable[None]:
        """Have a value's seed decrypted; those who ask for the same one share the call. Raises UnavailableError, DecryptionError."""
        sealed = self._read("value", stored)
        identity = identity_of(sealed)
        task = self._fetching.get(identity)
        if task is None:
            task = self._fetching[identity] = asyncio.get_running_loop().create_task(self._fetch(sealed))
            task.add_done_callback(lambda _: self._fetching.pop(identity, None))
        return asyncio.shield(task)

    async def _fetch(self, sealed: Sealed) -> None:
        if identity_of(sealed) in self._seeds:
            return
        self._observer.seed_missed()
        asked = data(1, sealed.source) + data(2, str(uuid.uuid4()).encode()) + data(3, sealed.key_id.encode()) + pairs(4, sealed.annotations)
        try:
            answer = await self._call("Decrypt", asked)
            secret = next((value for number, value in fields(answer) if number == 1 and isinstance(value, bytes)), b"")
            self._keep(sealed, _Seed(secret, sealed.kind))
        except (UnavailableError, ValueError) as error:
            raise UnavailableError(f"failed to decrypt DEK, error: {error}") from error

    def _read(self, key: str, stored: bytes) -> Sealed:
        try:
            return decode_sealed(stored[len(self.prefix) :])
        except ValueError as error:
            raise DecryptionError(f"{key}: {error}") from error

    def _keep(self, sealed: Sealed, seed: _Seed) -> None:
        while len(self._seeds) >= _MOSTSEEDS:
            del self._seeds[next(iter(self._seeds))]
        self._seeds[identity_of(sealed)] = seed
        self._observer.seeds_kept(self.name, len(self._seeds))


class SeedMissing(DecryptionError):
    """The plugin has to be asked first."""
