"""A real etcd that asks for client certificates: connecting, refusing, backup and restore; and who of two servers compacts."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.servers import running_etcd

from knarr.cluster import pki
from knarr.storage import open_store
from knarr.storage.backup import backup, restore
from knarr.storage.errors import CompactedError, UnavailableError
from knarr.storage.etcd import EtcdConfig, EtcdStore

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(host:port, folder with ca.crt, client.crt, client.key) of an etcd that only takes certificates of its CA."""
    folder = tmp_path_factory.mktemp("etcd-tls")
    authority = pki.Authority(folder, "ca", "etcd")
    authority.issue(folder / "server", "etcd", hosts=["localhost", "127.0.0.1"], server=True)
    authority.issue(folder / "client", "knarr")
    options = ("--cert-file", str(folder / "server.crt"), "--key-file", str(folder / "server.key"), "--client-cert-auth")
    trusted = ("--trusted-ca-file", str(folder / "ca.crt"))
    with running_etcd(folder / "data", scheme="https", options=(*options, *trusted)) as address:
        yield address, folder


def _url(secured: tuple[str, Path], prefix: str) -> str:
    address, folder = secured
    return f"etcd3://{address}/{prefix}?ca={folder}/ca.crt&cert={folder}/client.crt&key={folder}/client.key"


async def test_with_a_client_certificate_the_store_works_and_can_be_backed_up(secured: tuple[str, Path], tmp_path: Path) -> None:
    prefix = uuid.uuid4().hex
    store = open_store(_url(secured, prefix))
    await store.start()
    for number in range(20):
        assert (await store.put(f"/registry/core/configmaps/default/c{number}", b"{}", expected=0)).won
    assert store.size_bytes > 0
    await store.close()
    assert (await backup(_url(secured, prefix), tmp_path / "backup")).keys == 20
    other = _url(secured, uuid.uuid4().hex)
    assert (await restore(other, tmp_path / "backup")).keys == 20
    restored = open_store(other)
    await restored.start()
    assert len((await restored.scan("/registry/")).items) == 20
    await restored.close()


@pytest.mark.parametrize("lacking", ["client certificate", "known authority"])
async def test_without_what_etcd_asks_for_the_store_does_not_start(secured: tuple[str, Path], tmp_path: Path, lacking: str) -> None:
    address, folder = secured
    pair = f"&cert={folder}/client.crt&key={folder}/client.key"
    ca = f"{folder}/ca.crt"
    if lacking == "client certificate":
        pair = ""
    else:
        pki.Authority(tmp_path, "ca", "somebody else")
        ca = f"{tmp_path}/ca.crt"
    store = open_store(f"etcd3://{address}/x?ca={ca}{pair}")
    with pytest.raises(UnavailableError):
        await store.start()
    await store.close()


async def test_of_two_servers_only_one_compacts_and_the_other_takes_over(etcd: str) -> None:
    config = EtcdConfig(endpoints=(etcd,), prefix=f"/{uuid.uuid4().hex}")
    first, second = EtcdStore(config), EtcdStore(config)
    await first.start()
    await second.start()
    compactions: list[str] = []
    for name, store in (("first", first), ("second", second)):
        original = store.compact

        async def counted(revision: int, name: str = name, original: object = original) -> None:
            compactions.append(name)
            await original(revision)  # type: ignore[operator]

        store.compact = counted  # type: ignore[method-assign]
    states = {"first": (first.revision, 0), "second": (second.revision, 0)}
    for _ in range(4):
        for number in range(5):
            await first.put(f"/k{number}", b"v", expected=-1)
        await second.catch_up()
        for name, store in (("first", first), ("second", second)):
            states[name] = await store._compact_turn(*states[name])
    # The first turn of each may only find out whose turn it is; from then on one does it for both.
    assert len(compactions) >= 2
    assert len(set(compactions[-2:])) == 1
    leader = compactions[-1]
    gone, left = (first, second) if leader == "first" else (second, first)
    other = "second" if leader == "first" else "first"
    await gone.close()
    compactions.clear()
    for _ in range(3):
        await left.put("/k0", b"w", expected=-1)
        states[other] = await left._compact_turn(*states[other])
    assert compactions
    assert set(compactions) == {other}
    with pytest.raises(CompactedError):
        await left.scan("/", at=1)
    await left.close()
