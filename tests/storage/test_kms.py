"""Encryption at rest by a key management service: what is stored, what the plugin is asked, and what happens when it fails or changes its key."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
from tests.kms_plugin import Plugin, running_plugin

from knarr.aiokits import clock
from knarr.storage import Event, UnavailableError, kms
from knarr.storage.encryption import DecryptionError, EncryptedStore
from knarr.storage.kms_wire import decode_sealed
from knarr.storage.memory import MemoryStore

SECRET, CLEAR = "/registry/core/secrets/ns/s", b'{"data":"hush"}'
PREFIX = b"k8s:enc:kms:v2:vault:"
LOCAL = f"aesgcm: {{keys: [{{name: local, secret: {base64.b64encode(bytes(32)).decode()}}}]}}"


def provider(folder: Path, name: str = "vault", *, socket: str = "kms.sock") -> str:
    return f"kms: {{apiVersion: v2, name: {name}, endpoint: 'unix://{folder}/{socket}', timeout: 2s}}"


def configure(folder: Path, *providers: str, resources: str = "secrets") -> Path:
    path = folder / "encryption.yaml"
    lines = "\n".join(f"      - {one}" for one in providers)
    path.write_text(
        f"kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n  - resources: [{resources}]\n    providers:\n{lines}\n"
    )
    return path


@pytest.fixture
async def plugin(tmp_path: Path) -> AsyncIterator[Plugin]:
    async with running_plugin(tmp_path / "kms.sock") as running:
        yield running


async def raw(inner: MemoryStore, key: str = SECRET) -> bytes:
    found = await inner.get(key)
    assert found is not None
    return found.value


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.01)


async def value_of(store: EncryptedStore, key: str = SECRET) -> bytes:
    found = await store.get(key)
    assert found is not None
    return found.value


async def test_the_plugin_is_asked_once_for_many_values(tmp_path: Path, plugin: Plugin) -> None:
    inner = MemoryStore()
    path = configure(tmp_path, provider(tmp_path))
    store = EncryptedStore(inner, path)
    await store.start()
    for number in range(20):
        assert (await store.put(f"{SECRET}{number}", CLEAR, expected=0)).won
    sealed = [decode_sealed((await raw(inner, f"{SECRET}{number}"))[len(PREFIX) :]) for number in range(20)]
    assert {(one.key_id, one.kind, *one.annotations) for one in sealed} == {("key-1", 1, "mock.example.com")}
    assert len({one.source for one in sealed}) == 1
    assert len({one.body[:32] for one in sealed}) == 20, "each value has a key of its own"
    assert plugin.calls == {"Status": 1, "Encrypt": 1, "Decrypt": 0}
    await store.close()

    again = EncryptedStore(inner, path)
    await again.start()
    assert {item.value for item in (await again.scan("/registry/core/secrets/")).items} == {CLEAR}
    assert plugin.calls == {"Status": 2, "Encrypt": 2, "Decrypt": 1}
    await inner.put(SECRET, await raw(inner, f"{SECRET}1"), expected=0)
    with pytest.raises(DecryptionError):
        await again.get(SECRET)  # it belongs under another store key
    await again.close()


async def test_values_go_to_another_key_when_the_plugin_names_one(tmp_path: Path, plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kms, "HEALTHY_SECONDS", 0.05)
    monkeypatch.setattr(kms, "HEALTHY_KEPT_SECONDS", 0.0)
    inner = MemoryStore()
    store = EncryptedStore(inner, configure(tmp_path, provider(tmp_path)))
    await store.start()
    await store.put(SECRET, CLEAR, expected=0)
    plugin.key_id = "key-2"

    async def moved() -> bool:
        return decode_sealed((await raw(inner))[len(PREFIX) :]).key_id == "key-2"

    await until(moved)
    assert await value_of(store) == CLEAR
    await store.close()


async def test_a_plugin_that_fails_is_written_with_for_three_minutes_more(tmp_path: Path, plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, configure(tmp_path, provider(tmp_path)))
    await store.start()
    await store.put(SECRET, CLEAR, expected=0)
    plugin.broken = True
    later = clock.now() + kms.HEALTHY_KEPT_SECONDS + 1
    monkeypatch.setattr(clock, "now", lambda: later)
    told = await store.health()
    assert told == (
        "kms-provider-0: failed to perform status section of the healthz check for KMS Provider vault, "
        "error: rpc error: code = Internal desc = the vault is shut"
    )
    await store.put(SECRET + "2", CLEAR, expected=0)
    monkeypatch.setattr(clock, "now", lambda: later + kms.WRITE_SECONDS)
    with pytest.raises(UnavailableError, match="expired"):
        await store.put(SECRET + "3", CLEAR, expected=0)
    assert await value_of(store) == CLEAR, "reading needs no plugin for a seed that is known"
    plugin.broken = False
    monkeypatch.setattr(clock, "now", lambda: later + kms.WRITE_SECONDS + 60)
    assert await store.health() == ""
    assert (await store.put(SECRET + "3", CLEAR, expected=0)).won
    assert plugin.calls["Encrypt"] == 1, "the seed is as good as before"
    await store.close()


@pytest.mark.parametrize(("field", "value", "told"), [
    ("healthz", "low on paper", "got unexpected healthz status: low on paper"),
    ("version", "v1", "expected KMSv2 API version v2, got v1"),
    ("key_id", "", 'got invalid KMSv2 KeyID hash "": keyID is empty'),
    ("key_id", "x" * 1025, "keyID is 1025 bytes, which exceeds the max size of 1024"),
])  # fmt: skip
async def test_a_plugin_that_is_not_well_is_told_of(tmp_path: Path, plugin: Plugin, field: str, value: str, told: str) -> None:
    setattr(plugin, field, value)
    store = EncryptedStore(MemoryStore(), configure(tmp_path, provider(tmp_path)))
    await store.start()
    health = await store.health()
    assert "kmsv2 Provider vault is not healthy, error: " in health
    assert told in health
    await store.close()


async def test_events_of_another_server_come_in_order_when_their_seed_has_to_be_fetched(tmp_path: Path, plugin: Plugin) -> None:
    path = configure(tmp_path, provider(tmp_path), resources="secrets, '*.apps'")
    inner, elsewhere = MemoryStore(), MemoryStore()
    store, other = EncryptedStore(inner, path), EncryptedStore(elsewhere, path)
    await store.start()
    await other.start()
    seen: list[Event] = []
    store.subscribe(seen.extend)
    await other.put(SECRET, CLEAR, expected=0)
    foreign = await raw(elsewhere)
    await inner.put(SECRET, foreign, expected=0)
    await store.put(SECRET + "2", CLEAR, expected=0)
    await inner.put("/registry/core/configmaps/ns/c", b"{}", expected=0)
    assert seen == []
    await store.catch_up()
    assert [(event.key.rpartition("/")[2], event.value) for event in seen] == [("s", CLEAR), ("s2", CLEAR), ("c", b"{}")]
    await store.put(SECRET + "3", CLEAR, expected=0)
    assert seen[-1].value == CLEAR, "and at once again, when nothing waits"
    await store.close()
    await other.close()


async def test_a_start_waits_for_the_plugin_that_has_the_key_of_stored_values(tmp_path: Path) -> None:
    inner = MemoryStore()
    path = configure(tmp_path, provider(tmp_path))
    async with running_plugin(tmp_path / "kms.sock") as plugin:
        first = EncryptedStore(inner, path)
        await first.start()
        await first.put(SECRET, CLEAR, expected=0)
        await first.close()
    path.write_text(path.read_text().replace("timeout: 2s", "timeout: 100ms"))
    second = EncryptedStore(inner, path)
    starting = asyncio.create_task(second.start())
    await asyncio.sleep(0.3)
    assert not starting.done()
    async with running_plugin(tmp_path / "kms.sock", plugin):
        async with asyncio.timeout(20):
            await starting
        assert await value_of(second) == CLEAR
        await second.close()


async def test_the_configuration_is_read_again(tmp_path: Path, plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.storage.encryption._LEAST_TRIAL_SECONDS", 0.3)
    inner = MemoryStore()
    path = configure(tmp_path, LOCAL)
    store = EncryptedStore(inner, path)
    await store.start()
    await store.put(SECRET, CLEAR, expected=0)
    assert not await store.reload()
    for bad in ("kms: {apiVersion: v2, name: vault}", provider(tmp_path, socket="nobody.sock").replace("2s", "100ms")):
        configure(tmp_path, bad, LOCAL)
        with pytest.raises(ValueError):
            await store.reload()
        assert (await raw(inner)).startswith(b"k8s:enc:aesgcm:v1:local:")
    configure(tmp_path, provider(tmp_path), LOCAL, resources="'*.*'")
    assert await store.reload()

    async def moved() -> bool:
        return (await raw(inner)).startswith(PREFIX)

    await until(moved)
    assert await value_of(store) == CLEAR
    await store.put("/registry/core/configmaps/ns/c", CLEAR, expected=0)
    assert (await raw(inner, "/registry/core/configmaps/ns/c")).startswith(PREFIX), "what the new configuration names, too"
    configure(tmp_path, "identity: {}", provider(tmp_path), LOCAL, resources="'*.*'")
    assert await store.reload()

    async def bare() -> bool:
        return await raw(inner) == CLEAR

    await until(bare)
    assert await value_of(store) == CLEAR
    await store.close()


@pytest.mark.parametrize(("resources", "told"), [
    ("secrets, secrets", "the same resource cannot be specified multiple times"),
    ("secrets, '*.'", "using overlapping resources"),
    ("secrets, '*.*'", "using overlapping resources"),
    ("Secrets", "resource name should not contain capital letters"),
    ("'*'", "use '\\*\\.' to encrypt all the resources from core API group"),
    ("events.events.k8s.io", "Use 'events' instead in the config file"),
    ("'pods.*'", "encrypting the same resource across groups is not supported"),
    ("serviceipallocations", "resources which do not have REST API/s cannot be encrypted"),
])  # fmt: skip
def test_names_of_resources_that_cannot_be_are_refused(tmp_path: Path, resources: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        EncryptedStore(MemoryStore(), configure(tmp_path, "identity: {}", resources=resources))


def test_a_resource_behind_a_wider_rule_is_refused_and_before_it_taken(tmp_path: Path) -> None:
    path = configure(tmp_path, LOCAL, resources="'*.apps'")
    wide = path.read_text()
    narrow = wide.partition("resources:\n")[2].replace("'*.apps'", "deployments.apps").replace("aesgcm", "aescbc")
    path.write_text(wide + narrow)
    with pytest.raises(ValueError, match="masked by earlier rule"):
        EncryptedStore(MemoryStore(), path)
    head, _, body = wide.partition("resources:\n")
    path.write_text(f"{head}resources:\n{narrow}{body}")
    store = EncryptedStore(MemoryStore(), path)
    assert store._encrypt("/registry/apps/deployments/ns/d", CLEAR).startswith(b"k8s:enc:aescbc:")
    assert store._encrypt("/registry/apps/daemonsets/ns/d", CLEAR).startswith(b"k8s:enc:aesgcm:")
    assert store._encrypt("/registry/core/pods/ns/p", CLEAR) == CLEAR
