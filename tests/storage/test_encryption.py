"""Encryption at rest: what lies in the store, what is read back, and how keys are rotated."""

import asyncio
import base64
from pathlib import Path

import pytest

from knarr.storage import Event, secretbox
from knarr.storage.encryption import DecryptionError, EncryptedStore
from knarr.storage.memory import MemoryStore


def _config(folder: Path, *providers: str) -> Path:
    path = folder / "encryption.yaml"
    lines = "\n".join(f"      - {provider}" for provider in providers)
    path.write_text(
        f"kind: EncryptionConfiguration\napiVersion: apiserver.config.k8s.io/v1\nresources:\n  - resources: [secrets, '*.example.com']\n    providers:\n{lines}\n"
    )
    return path


def _key(kind: str, name: str, byte: int) -> str:
    return f"{kind}: {{keys: [{{name: {name}, secret: {base64.b64encode(bytes([byte] * 32)).decode()}}}]}}"


SECRET, WIDGET, PLAIN = "/registry/core/secrets/ns/s", "/registry/example.com/widgets/ns/w", "/registry/core/configmaps/ns/c"


async def _raw(inner: MemoryStore, key: str) -> bytes:
    found = await inner.get(key)
    assert found is not None
    return found.value


@pytest.mark.parametrize("kind", ["aesgcm", "aescbc", "secretbox"])
async def test_only_the_named_resources_are_encrypted_and_read_back(tmp_path: Path, kind: str) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, _config(tmp_path, _key(kind, "one", 1)))
    await store.start()
    seen: list[Event] = []
    store.subscribe(seen.extend)
    for key in (SECRET, WIDGET, PLAIN):
        assert (await store.put(key, b'{"data":"hush"}', expected=0)).won
    for key in (SECRET, WIDGET):
        stored = await _raw(inner, key)
        assert stored.startswith(f"k8s:enc:{kind}:v1:one:".encode())
        assert b"hush" not in stored
    assert await _raw(inner, PLAIN) == b'{"data":"hush"}'
    assert {item.value for item in (await store.scan("/registry/")).items} == {b'{"data":"hush"}'}
    assert [event.value for event in seen] == [b'{"data":"hush"}'] * 3
    async with store.watch("/registry/core/secrets/", since=0) as stream:
        async for batch in stream:
            assert batch[0].value == b'{"data":"hush"}'
            break
    lost = await store.put(SECRET, b"x", expected=99)
    assert lost.current is not None
    assert lost.current.value == b'{"data":"hush"}'
    await store.close()


def test_secretbox_is_that_of_nacl() -> None:
    """The vector of "Cryptography in NaCl", whose text is 131 bytes long: two blocks and a bit."""
    key = bytes.fromhex("1b27556473e985d462cd51197a9a46c76009549eac6474f206c4ee0844f68389")
    nonce = bytes.fromhex("69696ee955b62b73cd62bda875fc73d68219e0036b7a0b37")
    text = bytes.fromhex(
        "be075fc53c81f2d5cf141316ebeb0c7b5228c52a4c62cbd44b66849b64244ffce5ecbaaf33bd751a1ac728d45e6c61296cdc3c01233561f41db66cce314adb31"
        "0e3be8250c46f06dceea3a7fa1348057e2f6556ad6b1318a024a838f21af1fde048977eb48f59ffd4924ca1c60902e52f0a089bc76897040e082f93776384864"
        "5e0705"
    )
    box = bytes.fromhex(
        "f3ffc7703f9400e52a7dfb4b3d3305d98e993b9f48681273c29650ba32fc76ce48332ea7164d96a4476fb8c531a1186ac0dfc17c98dce87b4da7f011ec48c972"
        "71d2c20f9b928fe2270d6fb863d51738b48eeee314a7cc8ab932164548e526ae90224368517acfeabd6bb3732bc0e9da99832b61ca01b6de56244a9e88d5f9b3"
        "7973f622a43d14a6599b1f654cb45a74e355a5"
    )
    assert secretbox.seal(key, nonce, text) == box
    assert secretbox.unseal(key, nonce, box) == text
    with pytest.raises(secretbox.WrongKeyError):
        secretbox.unseal(key, nonce, box[:-1] + b"x")


async def test_a_value_moved_to_another_key_or_tampered_with_is_refused(tmp_path: Path) -> None:
    inner = MemoryStore()
    store = EncryptedStore(inner, _config(tmp_path, _key("aesgcm", "one", 1)))
    await store.start()
    await store.put(SECRET, b"{}", expected=0)
    await inner.put(SECRET + "2", await _raw(inner, SECRET), expected=0)
    with pytest.raises(DecryptionError):
        await store.get(SECRET + "2")
    await store.close()


async def test_a_new_first_key_takes_over_and_old_data_is_rewritten(tmp_path: Path) -> None:
    inner = MemoryStore()
    await inner.put(WIDGET, b'{"clear":1}', expected=0)
    old = EncryptedStore(inner, _config(tmp_path, _key("aescbc", "one", 1)))
    await old.put(SECRET, b'{"data":"hush"}', expected=0)
    new = EncryptedStore(inner, _config(tmp_path, _key("aesgcm", "two", 2), _key("aescbc", "one", 1), "identity: {}"))
    await new.start()
    async with asyncio.timeout(5):
        while not all([(await _raw(inner, key)).startswith(b"k8s:enc:aesgcm:v1:two:") for key in (SECRET, WIDGET)]):
            await asyncio.sleep(0.005)
    found = await new.get(SECRET)
    assert found is not None
    assert found.value == b'{"data":"hush"}'
    await new.close()


def test_a_bad_configuration_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not supported"):
        EncryptedStore(MemoryStore(), _config(tmp_path, "vault: {}"))
    with pytest.raises(ValueError, match=r"got 3, expected one of \[16 24 32\]"):
        EncryptedStore(MemoryStore(), _config(tmp_path, "aesgcm: {keys: [{name: x, secret: YWJj}]}"))
