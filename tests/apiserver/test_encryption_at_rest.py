"""Secrets are unreadable in the store and readable through the server, those from before included."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import os
import socket
import sqlite3
import time
from pathlib import Path

import pytest
import yaml

from knarr.aiokits import clock
from knarr.api.resources import SECRETS
from knarr.api.types import Object
from knarr.apiserver.auth import reload
from knarr.testing.apiserver import running_apiserver
from tests.apiserver.identities import refused
from tests.kms_plugin import running_plugin

KEY = {"name": "first", "secret": base64.b64encode(os.urandom(32)).decode()}


def write_config(path: Path, *before: Object) -> str:
    resources = [{"resources": ["secrets"], "providers": [*before, {"aesgcm": {"keys": [KEY]}}, {"identity": {}}]}]
    path.write_text(yaml.safe_dump({"kind": "EncryptionConfiguration", "apiVersion": "apiserver.config.k8s.io/v1", "resources": resources}))
    return str(path)


def holds(path: Path, wanted: bytes) -> bool:
    with sqlite3.connect(path) as connection:
        tables = [row[0] for row in connection.execute("select name from sqlite_master where type='table'")]
        return any(
            isinstance(cell, bytes) and wanted in cell for table in tables for row in connection.execute(f"select * from {table}") for cell in row
        )


async def test_secrets_are_sealed_and_those_from_before_are_read(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/store.db"

    def secret(name: str) -> Object:
        return {"metadata": {"name": name}, "data": {"k": base64.b64encode(name.encode()).decode()}}

    async with running_apiserver(store=url) as server:
        await server.client.create(SECRETS, secret("plain"), "default")
    async with running_apiserver(store=url, encryption_config=write_config(tmp_path / "encryption.yaml")) as server:
        await server.client.create(SECRETS, secret("sealed"), "default")
        assert (await server.client.get(SECRETS, "plain", "default"))["data"] == secret("plain")["data"]
        assert (await server.client.get(SECRETS, "sealed", "default"))["data"] == secret("sealed")["data"]
        assert holds(tmp_path / "store.db", b"k8s:enc:aesgcm:v1:first:")
        assert not holds(tmp_path / "store.db", base64.b64encode(b"sealed"))
    async with running_apiserver(store=url, encryption_config=str(tmp_path / "encryption.yaml")) as server:
        assert (await server.client.get(SECRETS, "sealed", "default"))["data"] == secret("sealed")["data"]


async def test_a_key_management_service_is_checked_and_counted_and_the_configuration_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reload, "RELOAD_SECONDS", 0.02)
    secret = {"metadata": {"name": "sealed"}, "stringData": {"k": "hush"}}
    async with running_plugin(tmp_path / "kms.sock") as plugin:
        settings = {"encryption_config": write_config(tmp_path / "encryption.yaml"), "encryption_config_reload": True}
        async with running_apiserver(store=f"sqlite://{tmp_path}/store.db", **settings) as server:

            async def ask(path: str, **query: str) -> str:
                return (await server.client.request("GET", path, query)).body.decode()

            assert await ask("/healthz/kms-providers") == "ok", "there is nothing to ask yet"
            await server.client.create(SECRETS, secret, "default")
            provider = {"kms": {"apiVersion": "v2", "name": "vault", "endpoint": f"unix://{tmp_path}/kms.sock"}}
            write_config(tmp_path / "encryption.yaml", provider)
            async with asyncio.timeout(10):
                while "k8s:enc:kms:v2:vault:" not in (metrics := await ask("/metrics")):
                    await asyncio.sleep(0.02)
            identity = f'apiserver_id_hash="sha256:{hashlib.sha256(socket.gethostname().encode()).hexdigest()}"'
            assert f'apiserver_encryption_config_controller_automatic_reloads_total{{{identity},status="success"}} 1' in metrics
            key = f'key_id_hash="sha256:{hashlib.sha256(b"key-1").hexdigest()}"'
            assert f'apiserver_envelope_encryption_key_id_hash_total{{{identity},{key},provider_name="vault",transformation_type="to_storage"}}' in metrics
            assert 'method_name="/v2.KeyManagementService/Encrypt",provider_name="vault"} 1' in metrics
            assert "[+]kms-providers ok" in await ask("/readyz", verbose="1")
            assert "kms-providers" not in await ask("/livez", verbose="1")
            plugin.healthz = "on fire"
            monkeypatch.setattr(clock, "now", lambda: time.time() + 30)
            with refused(500, "kms-provider-0: kmsv2 Provider vault is not healthy, error: got unexpected healthz status: on fire"):
                await ask("/healthz/kms-providers")
            monkeypatch.undo()
            assert (await server.client.get(SECRETS, "sealed", "default"))["data"] == {"k": base64.b64encode(b"hush").decode()}
    assert holds(tmp_path / "store.db", b"k8s:enc:kms:v2:vault:")
