"""What the API server adds to encryption at rest: metrics, a health check of key management services, reading the configuration again.

Owner: APIServer, where an encryption configuration is given.

Source: apiserver pkg/storage/value/metrics.go, encrypt/envelope/metrics, server/options/encryptionconfig/{controller,metrics}.
"""

from __future__ import annotations

import hashlib
import socket
from typing import TYPE_CHECKING

from knarr.aiokits import clock
from knarr.apiserver.auth.reload import Reloads
from knarr.apiserver.config import APIServerConfig
from knarr.apiserver.instruments import Counters, Histograms
from knarr.apiserver.metrics import family
from knarr.storage.kms import Observer
from knarr.storage.kms_wire import key_hash

if TYPE_CHECKING:
    from knarr.storage.encryption import EncryptedStore

_MOST_KEYS = 100


def _doubling(first: float, count: int) -> tuple[float, ...]:
    return tuple(first * 2**power for power in range(count))


class Measures(Observer):
    """Counts by upstream's names."""

    def __init__(self, server: str) -> None:
        """Args:
        server: The server's identity.
        """
        self.server = f"sha256:{hashlib.sha256(server.encode()).hexdigest()}"
        prefix = "apiserver_envelope_encryption_"
        keys = ("apiserver_id_hash", "key_id_hash", "provider_name", "transformation_type")
        self._calls = Histograms(
            prefix + "kms_operations_latency_seconds", "[ALPHA] KMS operation duration with gRPC error code status total.",
            ("grpc_status_code", "method_name", "provider_name"), _doubling(0.0001, 20),
        )  # fmt: skip
        self._uses = Counters(prefix + "key_id_hash_total", "[ALPHA] Number of times a keyID is used split by transformation type, provider, and apiserver identity.", keys)
        self._last_uses = Counters(prefix + "key_id_hash_last_timestamp_seconds", "[ALPHA] The last time in seconds when a keyID was used.", keys, kind="gauge")
        self._told = Counters(
            prefix + "key_id_hash_status_last_timestamp_seconds", "[ALPHA] The last time in seconds when a keyID was returned by the Status RPC call.",
            keys[:3], kind="gauge",
        )  # fmt: skip
        self._invalid = Counters(
            prefix + "invalid_key_id_from_status_total", "[ALPHA] Number of times an invalid keyID is returned by the Status RPC call split by error.",
            ("error", "provider_name"),
        )  # fmt: skip
        self._seeds = Counters(
            prefix + "dek_source_cache_size", "[ALPHA] Number of records in data encryption key (DEK) source cache. On a restart, this value is an "
            "approximation of the number of decrypt RPC calls the server will make to the KMS plugin.", ("provider_name",), kind="gauge",
        )  # fmt: skip
        self._missed = Counters(
            "apiserver_storage_envelope_transformation_cache_misses_total", "[ALPHA] Total number of cache misses while accessing key decryption key(KEK)."
        )
        self._durations = Histograms(
            "apiserver_storage_transformation_duration_seconds", "[ALPHA] Latencies in seconds of value transformation operations.",
            ("transformation_type", "transformer_prefix"), _doubling(5e-6, 25),
        )  # fmt: skip
        self._values = Counters(
            "apiserver_storage_transformation_operations_total", "[ALPHA] Total number of transformations. Successful transformation will have a status "
            "'OK' and a varied status string when the transformation fails. The status, resource, and transformation_type fields can be used for "
            "alerting purposes. For example, you can monitor for encryption/decryption failures using the transformation_type (e.g., from_storage for "
            "decryption and to_storage for encryption). Additionally, these fields can be used to ensure that the correct transformers are applied to "
            "each resource.", ("resource", "status", "transformation_type", "transformer_prefix"),
        )  # fmt: skip
        self._hashes: dict[str, str] = {}

    def _hash(self, key_id: str) -> str:
        known = self._hashes.get(key_id)
        if known is None:
            if len(self._hashes) >= _MOST_KEYS:
                self._hashes.clear()
            known = self._hashes[key_id] = key_hash(key_id)
        return known

    def called(self, provider: str, method: str, code: str, seconds: float) -> None:
        self._calls.at(code, method, provider).observe(seconds)

    def key_used(self, direction: str, provider: str, key_id: str) -> None:
        labels = (self.server, self._hash(key_id), provider, direction)
        self._uses.add(*labels)
        self._last_uses.set(clock.now(), *labels)

    def key_told(self, provider: str, key_id: str) -> None:
        self._told.set(clock.now(), self.server, self._hash(key_id), provider)

    def key_invalid(self, provider: str, reason: str) -> None:
        self._invalid.add(reason, provider)

    def seed_missed(self) -> None:
        self._missed.add()

    def seeds_kept(self, provider: str, count: int) -> None:
        self._seeds.set(count, provider)

    def transformed(self, resource: str, direction: str, prefix: str, failed: bool, seconds: float) -> None:
        self._values.add(resource, "unknown-non-grpc" if failed else "OK", direction, prefix)
        if not failed:
            self._durations.at(direction, prefix).observe(seconds)

    def lines(self) -> list[str]:
        """Return lines of the exposition format."""
        kept = (
            self._calls, self._uses, self._last_uses, self._told, self._invalid, self._seeds, self._missed, self._durations, self._values,
        )  # fmt: skip
        return [line for one in kept for line in one.lines()]


class Encryption:
    """See the module's docstring."""

    def __init__(self, config: APIServerConfig, store: EncryptedStore, measures: Measures) -> None:
        self._store = store
        self._measures = measures
        self.trouble = ""
        """What was wrong with key management services when they were asked last."""
        self.reloads: Reloads | None = None
        if config.encryption_config_reload:
            self.reloads = Reloads("encryption", config.encryption_config, self._reload, server_identity(config), stability="ALPHA")

    @property
    def checked(self) -> bool:
        """Whether there is a health check."""
        return self.reloads is not None or self._store.has_plugins

    async def refresh(self) -> None:
        """Ask the key management services anew, unless they have just been."""
        self.trouble = await self._store.health()

    async def _reload(self, path: str) -> None:
        await self._store.reload()

    def metrics(self) -> list[str]:
        """Return lines of the exposition format."""
        lines = self._measures.lines()
        if self.reloads is not None:
            text = "[ALPHA] Information about the last applied encryption configuration with hash as label, split by apiserver identity."
            labels = f'apiserver_id_hash="{self._measures.server}",hash="{self._store.configuration_hash}"'
            lines += [*self.reloads.metrics(), *family("apiserver_encryption_config_controller_last_config_info", "gauge", text, [(labels, 1)])]
        return lines


def server_identity(config: APIServerConfig) -> str:
    """Return what tells this server from others."""
    return config.identity or socket.gethostname()
