"""Storage version migration: what is stored in an old version or under an old key is written anew."""

from __future__ import annotations

import base64
import os
from pathlib import Path
from typing import Any

import orjson
import pytest
import yaml

from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, CUSTOM_RESOURCE_DEFINITIONS, SECRETS, STORAGE_VERSION_MIGRATIONS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.storage import encryption
from knarr.testing.apiserver import running_apiserver
from tests.controllers.test_controllers import controllers, until

SERVED: dict[str, Any] = {"runtime_config": ("storagemigration.k8s.io/v1alpha1",)}
GATES = {"StorageVersionMigrator": True}
MIGRATOR = "storage-version-migrator-controller"
SHIPS = Resource("example.com", "v1", "ships", "ship", "Ship", True, custom=True)


def _crd(stored: str) -> Object:
    schema = {"openAPIV3Schema": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}
    versions = [{"name": name, "served": True, "storage": name == stored, "schema": schema} for name in ("v1", "v2")]
    names = {"plural": "ships", "singular": "ship", "kind": "Ship", "listKind": "ShipList"}
    return {"metadata": {"name": "ships.example.com"}, "spec": {"group": "example.com", "scope": "Namespaced", "names": names, "versions": versions}}


def _migration(name: str, group: str, version: str, resource: str) -> Object:
    return {"metadata": {"name": name}, "spec": {"resource": {"group": group, "version": version, "resource": resource}}}


async def _ended(client: Client, name: str) -> dict[str, Object]:
    """The conditions of a migration once it has ended."""
    found: dict[str, Object] = {}

    async def ended() -> bool:
        status = (await client.get(STORAGE_VERSION_MIGRATIONS, name)).get("status") or {}
        found.update({one["type"]: one for one in status.get("conditions") or ()})
        return "Succeeded" in found or "Failed" in found

    await until(ended)
    return found


async def _versions(store: Any) -> list[str]:
    page = await store.scan("/registry/example.com/ships/")
    return sorted(orjson.loads(item.value)["apiVersion"] for item in page.items)


async def _create_ships(client: Client, count: int) -> None:
    await client.create(CUSTOM_RESOURCE_DEFINITIONS, _crd("v1"))

    async def served() -> bool:
        try:
            await client.list(SHIPS, "default")
        except StatusError:
            return False
        return True

    await until(served)
    for number in range(count):
        await client.create(SHIPS, {"apiVersion": "example.com/v1", "kind": "Ship", "metadata": {"name": f"s{number}"}, "masts": number}, "default")


async def _store_as(client: Client, version: str) -> None:
    crd = await client.get(CUSTOM_RESOURCE_DEFINITIONS, "ships.example.com")
    crd["spec"] = _crd(version)["spec"]
    await client.update(CUSTOM_RESOURCE_DEFINITIONS, crd)

    async def recorded() -> bool:
        return version in (await client.get(CUSTOM_RESOURCE_DEFINITIONS, "ships.example.com"))["status"]["storedVersions"]

    await until(recorded)


async def test_custom_objects_come_into_the_version_that_is_stored_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.controllers.storageversionmigrator._PAGE", 4)
    async with running_apiserver(**SERVED) as server, controllers(server, MIGRATOR, feature_gates=GATES) as client:
        await _create_ships(client, 11)
        await _store_as(client, "v2")
        store = server.server.storage.store
        assert await _versions(store) == ["example.com/v1"] * 11
        before = {ship["metadata"]["name"]: ship["metadata"] for ship in (await client.list(SHIPS, "default"))["items"]}
        await client.create(STORAGE_VERSION_MIGRATIONS, _migration("ships", "example.com", "v1", "ships"))
        conditions = await _ended(client, "ships")
        assert await _versions(store) == ["example.com/v2"] * 11
        assert conditions["Succeeded"]["reason"] == "StorageVersionMigrationSucceeded"
        assert conditions["Running"]["status"] == "False"
        status = (await client.get(STORAGE_VERSION_MIGRATIONS, "ships"))["status"]
        ships = (await client.list(SHIPS, "default"))["items"]
        for ship in ships:
            old, new = before[ship["metadata"]["name"]], ship["metadata"]
            assert int(old["resourceVersion"]) <= int(status["resourceVersion"]) < int(new["resourceVersion"])
            assert {**new, "resourceVersion": ""} == {**old, "resourceVersion": ""}, "nothing but where it is stored has changed"
        # Once more: all is as it should be, so nothing is written.
        await client.create(STORAGE_VERSION_MIGRATIONS, _migration("again", "example.com", "v2", "ships"))
        assert "Succeeded" in await _ended(client, "again")
        assert (await client.list(SHIPS, "default"))["items"] == ships


async def test_a_migration_that_was_cut_off_is_taken_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.controllers.storageversionmigrator._PAGE", 2)
    async with running_apiserver(**SERVED) as server:
        client = server.client
        await _create_ships(client, 10)
        await _store_as(client, "v2")
        store = server.server.storage.store
        async with controllers(server, MIGRATOR, feature_gates=GATES):
            await client.create(STORAGE_VERSION_MIGRATIONS, _migration("ships", "example.com", "v1", "ships"))

            async def under_way() -> bool:
                return "example.com/v2" in await _versions(store)

            await until(under_way)
        async with controllers(server, MIGRATOR, feature_gates=GATES):
            assert "Succeeded" in await _ended(client, "ships")
        assert await _versions(store) == ["example.com/v2"] * 10


async def test_secrets_come_under_the_new_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = [{"name": name, "secret": base64.b64encode(os.urandom(32)).decode()} for name in ("old", "new")]
    path, url = tmp_path / "encryption.yaml", f"sqlite://{tmp_path}/store.db"

    def configure(*names: str) -> str:
        ordered = [key for name in names for key in keys if key["name"] == name]
        resources = [{"resources": ["secrets"], "providers": [{"aesgcm": {"keys": ordered}}]}]
        path.write_text(yaml.safe_dump({"kind": "EncryptionConfiguration", "apiVersion": "apiserver.config.k8s.io/v1", "resources": resources}))
        return str(path)

    async with running_apiserver(store=url, encryption_config=configure("old")) as server:
        for number in range(5):
            await server.client.create(SECRETS, {"metadata": {"name": f"s{number}"}, "stringData": {"k": str(number)}}, "default")
    # The server's own round is held up at its first value; the migration does not wait for it.
    monkeypatch.setattr(encryption, "_PAUSE_BETWEEN_REWRITES_SECONDS", 3600.0)
    async with running_apiserver(store=url, encryption_config=configure("new", "old"), **SERVED) as server:
        async with controllers(server, MIGRATOR, feature_gates=GATES) as client:
            await client.create(STORAGE_VERSION_MIGRATIONS, _migration("secrets", "", "v1", "secrets"))
            assert "Succeeded" in await _ended(client, "secrets")
    # Without the old key everything can still be read.
    async with running_apiserver(store=url, encryption_config=configure("new")) as server:
        found = {one["metadata"]["name"]: one["data"]["k"] for one in (await server.client.list(SECRETS, "default"))["items"]}
        assert found == {f"s{number}": base64.b64encode(str(number).encode()).decode() for number in range(5)}


async def test_what_cannot_be_migrated_fails_and_says_why() -> None:
    async with running_apiserver(**SERVED) as server, controllers(server, MIGRATOR, feature_gates=GATES) as client:
        await client.create(STORAGE_VERSION_MIGRATIONS, _migration("unknown", "example.com", "v1", "ships"))
        failed = (await _ended(client, "unknown"))["Failed"]
        assert (failed["reason"], failed["message"]) == ("StorageVersionMigrationFailed", "resource does not exist in discovery")
        await client.create(STORAGE_VERSION_MIGRATIONS, _migration("bindings", "", "v1", "bindings"))
        assert "does not support discovery operations: [update patch list]" in (await _ended(client, "bindings"))["Failed"]["message"]


async def test_migrations_are_served_on_request_and_judged() -> None:
    async with running_apiserver() as server:
        with pytest.raises(StatusError) as refused:
            await server.client.list(STORAGE_VERSION_MIGRATIONS)
        assert refused.value.code == 404
        groups = orjson.loads((await server.client.request("GET", "/apis")).body)["groups"]
        assert "storagemigration.k8s.io" not in {group["name"] for group in groups}
    async with running_apiserver(**SERVED) as server:
        client = server.client
        groups = orjson.loads((await client.request("GET", "/apis")).body)["groups"]
        assert {"groupVersion": "storagemigration.k8s.io/v1alpha1", "version": "v1alpha1"} in [group["preferredVersion"] for group in groups]
        document = orjson.loads((await client.request("GET", "/openapi/v3/apis/storagemigration.k8s.io/v1alpha1")).body)
        assert "io.k8s.api.storagemigration.v1alpha1.StorageVersionMigrationSpec" in document["components"]["schemas"]
        with pytest.raises(StatusError, match=r"spec.resource.version: Required value: version is required"):
            await client.create(STORAGE_VERSION_MIGRATIONS, _migration("m", "", "", "secrets"))
        made = await client.create(STORAGE_VERSION_MIGRATIONS, _migration("m", "", "v1", CONFIG_MAPS.plural))
        table = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
        shown = orjson.loads((await client.request("GET", STORAGE_VERSION_MIGRATIONS.path(None, "m"), headers=table)).body)
        assert shown["rows"][0]["cells"] == ["m", "configmaps.v1."]
        made["spec"]["resource"]["resource"] = "secrets"
        with pytest.raises(StatusError, match='resource: Invalid value: "secrets": field is immutable'):
            await client.update(STORAGE_VERSION_MIGRATIONS, made)
        made["status"] = {"resourceVersion": "soon", "conditions": [
            {"type": kind, "status": "True", "reason": "R", "lastUpdateTime": "2026-01-01T00:00:00Z"} for kind in ("Succeeded", "Failed")
        ]}  # fmt: skip
        with pytest.raises(StatusError) as refused:
            await client.update(STORAGE_VERSION_MIGRATIONS, made, subresource="status")
        assert 'failed to parse resource version "soon"' in refused.value.message
        assert "Both success and failed conditions cannot be true at the same time" in refused.value.message
