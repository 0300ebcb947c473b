"""Secrets are unreadable in the store and readable through the server, those from before included."""

from __future__ import annotations

import base64
import os
import sqlite3
from pathlib import Path

import yaml

from knarr.api.resources import SECRETS
from knarr.api.types import Object
from knarr.testing.apiserver import running_apiserver


def write_config(path: Path) -> str:
    key = {"name": "first", "secret": base64.b64encode(os.urandom(32)).decode()}
    resources = [{"resources": ["secrets"], "providers": [{"aesgcm": {"keys": [key]}}, {"identity": {}}]}]
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
