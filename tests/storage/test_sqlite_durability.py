"""What only the file store promises: durability, restarts, failing disks, bounded size."""

import asyncio
import os
import random
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from knarr.storage import UnavailableError
from knarr.storage.retention import Retention
from knarr.storage.sqlite import SQLiteStore

WRITER = """
import asyncio, sys
from pathlib import Path
from knarr.storage.sqlite import SQLiteStore

async def main():
    store = SQLiteStore(Path(sys.argv[1]))
    await store.start()
    print("start", store.revision, flush=True)
    async def write(w):
        n = 0
        revision = 0
        found = await store.get(f"/k/{w}")
        if found is not None:
            n, revision = int(found.value), found.revision
        while True:
            n += 1
            put = await store.put(f"/k/{w}", b"%d" % n, expected=revision)
            assert put.won
            revision = put.revision
            sys.stdout.write(f"ack {w} {n} {revision}\\n")
    async def flush():
        while True:
            await asyncio.sleep(0.001)
            sys.stdout.flush()
    await asyncio.gather(flush(), *(write(w) for w in range(32)))

asyncio.run(main())
"""


async def test_every_acknowledged_write_survives_sigkill_and_no_revision_goes_back(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    newest = 0
    acknowledged: dict[int, int] = {}
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        try:
            assert process.stdout is not None
            started = process.stdout.readline().split()
            assert int(started[1]) >= newest
            await asyncio.sleep(random.uniform(0.05, 0.4))
        finally:
            os.kill(process.pid, signal.SIGKILL)
        rest, _ = process.communicate()
        for line in rest.splitlines():
            words = line.split()
            if len(words) == 4 and line.startswith("ack") and rest.endswith("\n"):
                acknowledged[int(words[1])] = max(acknowledged.get(int(words[1]), 0), int(words[2]))
                newest = max(newest, int(words[3]))
    store = SQLiteStore(path)
    await store.start()
    assert store.revision >= newest > 0
    page = await store.scan("/k/")
    stored = {int(item.key.rsplit("/", 1)[1]): int(item.value) for item in page.items}
    await store.close()
    assert all(stored[writer] >= count for writer, count in acknowledged.items())
    with sqlite3.connect(path) as connection:
        count, low, high = connection.execute("SELECT count(*), min(revision), max(revision) FROM log").fetchone()
    assert (low, high - low + 1) == (1, count)


async def test_the_index_revision_and_leases_come_back_after_a_restart(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "store.db")
    await store.start()
    first = await store.put("/a", b"1", expected=0)
    await store.put("/leased", b"", expected=0, lease_seconds=1)
    gone = await store.put("/gone", b"", expected=0)
    last = await store.remove("/gone", expected=gone.revision)
    await store.compact(last.revision)
    await store.close()
    store = SQLiteStore(tmp_path / "store.db")
    await store.start()
    assert store.revision == last.revision
    assert store.compacted == last.revision
    assert (await store.put("/a", b"2", expected=first.revision)).revision == last.revision + 1
    assert (await store.put("/gone", b"back", expected=0)).won
    async with asyncio.timeout(6):
        while await store.get("/leased") is not None:
            await asyncio.sleep(0.1)
    await store.close()


async def test_a_failed_commit_fails_its_writers_publishes_nothing_and_takes_the_index_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = SQLiteStore(tmp_path / "store.db")
    await store.start()
    first = await store.put("/a", b"1", expected=0)
    seen: list[object] = []
    store.subscribe(seen.extend)
    assert store._writer is not None
    store._writer._connection.execute("PRAGMA query_only=1")
    outcomes = await asyncio.gather(
        store.put("/a", b"2", expected=first.revision), store.put("/b", b"", expected=0), store.remove("/a", expected=first.revision + 1),
        return_exceptions=True,
    )
    assert all(isinstance(outcome, UnavailableError) for outcome in outcomes)
    assert seen == []
    assert store.revision == first.revision
    # The failed commit opened a fresh connection, so that the next write succeeds, at the revision that was not used.
    put = await store.put("/a", b"2", expected=first.revision)
    assert (put.won, put.revision) == (True, first.revision + 1)
    assert (await store.put("/b", b"", expected=0)).won
    await store.close()


async def test_a_full_disk_is_a_clear_error_and_the_store_recovers(tmp_path: Path) -> None:
    store = SQLiteStore(tmp_path / "store.db")
    await store.start()
    await store.put("/a", b"1", expected=0)
    assert store._writer is not None
    connection = store._writer._connection
    pages = connection.execute("PRAGMA page_count").fetchone()[0]
    connection.execute(f"PRAGMA max_page_count={pages}")
    with pytest.raises(UnavailableError, match="full"):
        for n in range(100):
            await store.put(f"/b/{n}", b"x" * 2000, expected=0)
    assert (await store.put("/c", b"1", expected=0)).won
    await store.close()


async def test_the_file_stays_bounded_under_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.storage.sqlite.COMPACTION_INTERVAL_SECONDS", 0.05)
    path = tmp_path / "store.db"
    store = SQLiteStore(path, retention=Retention(seconds=300, revisions=2000))
    await store.start()
    revisions = {n: (await store.put(f"/k/{n}", b"x" * 500, expected=0)).revision for n in range(100)}

    async def update(n: int) -> None:
        for _ in range(400):
            put = await store.put(f"/k/{n}", b"y" * 500, expected=revisions[n])
            revisions[n] = put.revision

    await asyncio.gather(*(update(n) for n in range(100)))
    await store.compact(store.revision)
    assert len((await store.scan("/k/")).items) == 100
    await store.close()
    assert path.stat().st_size < 25_000_000


async def test_free_pages_and_the_log_are_given_back_in_a_quiet_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "store.db"
    store = SQLiteStore(path, retention=Retention(seconds=0, revisions=1000))
    await store.start()
    for n in range(20):
        await asyncio.gather(*(store.put(f"/k/{n}/{m}", b"x" * 4000, expected=0) for m in range(100)))
    for n in range(20):
        await asyncio.gather(*(store.remove(f"/k/{n}/{m}", expected=-1) for m in range(100)))
    assert store.size_bytes > 8_000_000
    await store.compact(store.revision)
    monkeypatch.setattr("knarr.storage.sqlite.COMPACTION_INTERVAL_SECONDS", 0.01)
    store._compact_due()
    async with asyncio.timeout(20):
        while path.stat().st_size > 3_000_000 or path.with_name("store.db-wal").stat().st_size:
            await asyncio.sleep(0.01)
    assert store.size_bytes < 3_100_000
    await store.put("/k", b"1", expected=0)
    await store.close()


async def test_a_file_of_an_unknown_schema_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA user_version=99")
    with pytest.raises(UnavailableError, match="schema version 99"):
        await SQLiteStore(path).start()
