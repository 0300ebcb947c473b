"""Backup and restore of a store in use."""

import asyncio
from pathlib import Path

import pytest

from knarr.storage import ANY, CompactedError, open_store
from knarr.storage.backup import BackupError, backup, read, restore


async def _filled(url: str) -> int:
    store = open_store(url)
    await store.start()
    await asyncio.gather(*(store.put(f"/registry/core/configmaps/n/{n}", b"%d" % n, expected=0) for n in range(2500)))
    await store.put("/registry/core/configmaps/n/7", b"seven", expected=ANY)
    await store.remove("/registry/core/configmaps/n/8", expected=ANY)
    await store.put("/registry/core/events/n/e", b"event", expected=0, lease_seconds=600)
    revision = store.revision
    await store.close()
    return revision


async def test_everything_comes_back_and_revisions_go_on(tmp_path: Path) -> None:
    revision = await _filled(f"sqlite://{tmp_path}/old.db")
    file = tmp_path / "backup"
    assert await backup(f"sqlite://{tmp_path}/old.db", file) == (revision, 2500)
    assert file.stat().st_mode & 0o777 == 0o600
    await restore(f"sqlite://{tmp_path}/new.db", file)
    store = open_store(f"sqlite://{tmp_path}/new.db")
    await store.start()
    assert store.revision == revision + 2500
    page = await store.scan("/registry/core/configmaps/")
    assert len(page.items) == 2499
    seven = await store.get("/registry/core/configmaps/n/7")
    assert seven is not None
    assert (seven.value, seven.revision > revision) == (b"seven", True)
    assert await store.get("/registry/core/configmaps/n/8") is None
    with pytest.raises(CompactedError):
        await store.get("/registry/core/configmaps/n/7", at=revision - 1)
    assert (await store.put("/registry/core/configmaps/n/new", b"", expected=0)).revision == revision + 2501
    await store.close()


async def test_a_backup_is_one_revision_while_writers_go_on(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/live.db"
    store = open_store(url)
    await store.start()
    stop = False

    async def write() -> None:
        n = 0
        while not stop:
            n += 1
            await asyncio.gather(store.put("/registry/a/x/1", b"%d" % n, expected=ANY), store.put("/registry/a/x/2", b"%d" % n, expected=ANY))

    writer = asyncio.ensure_future(write())
    for turn in range(5):
        await asyncio.sleep(0.02)
        await backup(url, tmp_path / f"b{turn}")
        revision, entries = read(tmp_path / f"b{turn}")
        values = [int(entry.value) for entry in entries]
        # Both are written in one commit, so no backup may show them apart.
        assert len(set(values)) <= 1
        assert revision > 0
    stop = True
    await writer
    await store.close()


async def test_a_damaged_file_and_a_store_in_use_are_refused(tmp_path: Path) -> None:
    url = f"sqlite://{tmp_path}/old.db"
    await _filled(url)
    await backup(url, tmp_path / "backup")
    with pytest.raises(BackupError, match="not empty"):
        await restore(url, tmp_path / "backup")
    data = (tmp_path / "backup").read_bytes()
    (tmp_path / "cut").write_bytes(data[: len(data) // 2])
    (tmp_path / "nonsense").write_bytes(b"nonsense")
    for name in ("cut", "nonsense"):
        with pytest.raises(BackupError):
            read(tmp_path / name)
    with pytest.raises(BackupError, match="in memory"):
        await backup("memory://", tmp_path / "b")


async def test_etcd_to_sqlite(tmp_path: Path, etcd: str) -> None:
    url = f"etcd3://{etcd}/backup-test"
    revision = await _filled(url)
    assert await backup(url, tmp_path / "backup") == (revision, 2499)
    summary = await restore(f"sqlite://{tmp_path}/new.db", tmp_path / "backup")
    assert summary.keys == 2499
