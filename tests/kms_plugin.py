"""A key management plugin by KMS API v2, as those of clouds are: grpcio's server on a Unix socket, with keys in memory."""

from __future__ import annotations

import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from knarr.storage.etcd_wire import data, fields, message


class Plugin:
    """What it says can be changed while it runs."""

    def __init__(self) -> None:
        self.key_id = "key-1"
        self.healthz = "ok"
        self.version = "v2"
        self.calls = {"Status": 0, "Encrypt": 0, "Decrypt": 0}
        self.broken = False
        self._keys: dict[str, AESGCM] = {}

    def _key(self, key_id: str) -> AESGCM:
        return self._keys.setdefault(key_id, AESGCM(os.urandom(32)))

    async def answer(self, method: str, body: bytes, context: Any) -> bytes:
        self.calls[method] += 1
        if self.broken:
            await context.abort(grpc.StatusCode.INTERNAL, "the vault is shut")
        asked = {number: value for number, value in fields(body) if isinstance(value, bytes)}
        if method == "Status":
            return data(1, self.version.encode()) + data(2, self.healthz.encode()) + data(3, self.key_id.encode())
        if method == "Encrypt":
            nonce = os.urandom(12)
            sealed = nonce + self._key(self.key_id).encrypt(nonce, asked[1], None)
            note = message(3, data(1, b"mock.example.com") + data(2, b"1"))
            return data(1, sealed) + data(2, self.key_id.encode()) + note
        notes = dict(fields(asked[4]))
        assert notes == {1: b"mock.example.com", 2: b"1"}
        return data(1, self._key(asked[3].decode()).decrypt(asked[1][:12], asked[1][12:], None))


@contextlib.asynccontextmanager
async def running_plugin(path: Path, plugin: Plugin | None = None) -> AsyncIterator[Plugin]:
    """Serves on a socket at this path."""
    plugin = plugin or Plugin()

    def handler(method: str) -> Any:
        async def handle(body: bytes, context: Any) -> bytes:
            return await plugin.answer(method, body, context)

        return grpc.unary_unary_rpc_method_handler(handle)

    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("v2.KeyManagementService", {name: handler(name) for name in plugin.calls}),))
    server.add_insecure_port(f"unix:{path}")
    await server.start()
    try:
        yield plugin
    finally:
        await server.stop(0)
