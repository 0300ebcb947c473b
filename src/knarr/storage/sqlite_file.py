"""The SQL of the SQLite store: schema, one writer connection, reader connections. Blocking; run on the store's threads.

Statements are few and each takes the interpreter lock back only once: sqlite3 releases it around every step, and beside a busy event
loop every re-acquisition may wait a whole switch interval. Hence one INSERT with many rows instead of executemany.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from knarr.storage.protocol import Event, Stored

Row = tuple[int, str, int, bool, float, "bytes | None"]
"""(revision, key, previous revision, removed, expiry in epoch seconds or 0, value)."""

SCHEMA_VERSION = 1
_ROWS_PER_STATEMENT = 100
_COMPACTION_ROWS = 2000
_VACUUM_PAGES = 128
_FREE_PAGES = 512
"""So many free pages (2 MiB) are kept for the next writes."""
_LOG_BYTES = 4 << 20
"""A write-ahead log larger than this is emptied in a quiet moment."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS log (
  revision INTEGER PRIMARY KEY,
  key TEXT NOT NULL,
  previous INTEGER NOT NULL,
  removed INTEGER NOT NULL,
  expires REAL NOT NULL,
  value BLOB
);
CREATE INDEX IF NOT EXISTS log_by_key ON log (key, revision, removed);
CREATE INDEX IF NOT EXISTS log_by_expiry ON log (expires, revision) WHERE expires > 0;
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
"""


class Loaded(NamedTuple):
    """What the store needs in memory: live keys with revisions, counters, leases as (key, revision, expiry)."""

    live: dict[str, int]
    revision: int
    compacted: int
    leases: list[tuple[str, int, float]]


class CompactionStep(NamedTuple):
    """Compacted up to `done`."""

    done: int


def prefix_end(prefix: str) -> str:
    """The first string behind every string that starts with `prefix` (for "" a string behind everything)."""
    return prefix[:-1] + chr(ord(prefix[-1]) + 1) if prefix else "\U0010ffff"


def _insert(rows: int) -> str:
    return "INSERT INTO log VALUES " + ",".join(["(?,?,?,?,?,?)"] * rows)


class Writer:
    """The one connection that writes."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        self._connection = self._connect()

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self._path, isolation_level=None, check_same_thread=False, cached_statements=256, timeout=5)
        self._path.chmod(0o600)
        for pragma in (
            "auto_vacuum=INCREMENTAL",  # before the first table: lets compaction give pages back
            "journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=4000", "journal_size_limit=67108864",
            "cache_size=-16384", "temp_store=MEMORY",
        ):  # fmt: skip
            connection.execute(f"PRAGMA {pragma}")
        found = connection.execute("PRAGMA user_version").fetchone()[0]
        if found not in (0, SCHEMA_VERSION):
            connection.close()
            raise sqlite3.DatabaseError(f"schema version {found} is unknown, this program writes {SCHEMA_VERSION}")
        if found == 0:
            connection.executescript(_SCHEMA + f"PRAGMA user_version={SCHEMA_VERSION};")
        return connection

    def load(self) -> Loaded:
        """Read the index; walks only the covering index on keys, not the values."""
        execute = self._connection.execute
        meta = dict(execute("SELECT name, value FROM meta"))
        newest = execute("SELECT max(revision) FROM log").fetchone()[0] or 0
        index: dict[str, int] = {}
        for key, revision, removed in execute("SELECT key, max(revision), removed FROM log GROUP BY key"):
            if not removed:
                index[key] = revision
        leases = [
            (key, revision, expires)
            for key, revision, expires in execute("SELECT key, revision, expires FROM log WHERE expires > 0")
            if index.get(key) == revision
        ]
        # `newest` may be missing from the log when the last write was a removal that has been compacted.
        return Loaded(index, max(newest, meta.get("revision", 0)), meta.get("compacted", 0), leases)

    def commit(self, rows: list[Row]) -> dict[int, bytes]:
        """Store rows durably, all or none; returns the previous values of removals by revision.

        Raises:
          sqlite3.Error: nothing is stored.
        """
        connection = self._connection
        removed: dict[int, bytes] = {}
        try:
            if len(rows) <= _ROWS_PER_STATEMENT:
                connection.execute(_insert(len(rows)), [field for row in rows for field in row])
            else:
                connection.execute("BEGIN IMMEDIATE")
                for start in range(0, len(rows), _ROWS_PER_STATEMENT):
                    part = rows[start : start + _ROWS_PER_STATEMENT]
                    connection.execute(_insert(len(part)), [field for row in part for field in row])
                connection.execute("COMMIT")
        except (sqlite3.Error, OSError):
            if not self._recover(rows[-1][0]):
                raise
        removals = [(revision, previous) for revision, _, previous, gone, _, _ in rows if gone]
        for revision, previous in removals:
            found = connection.execute("SELECT value FROM log WHERE revision = ?", (previous,)).fetchone()
            if found is not None:
                removed[revision] = found[0]
        return removed

    def _recover(self, last: int) -> bool:
        """After a failed commit: open afresh and say whether the transaction is on disk after all (a failed fsync may tell a half truth)."""
        if self._connection.in_transaction:
            self._connection.execute("ROLLBACK")
        self._connection.close()
        self._connection = self._connect()
        newest: int = self._connection.execute("SELECT max(revision) FROM log").fetchone()[0] or 0
        return newest >= last

    def compact_step(self, after: int, target: int) -> CompactionStep:
        """Delete what was superseded by the next stretch of revisions behind `after`, at most up to `target`.

        Every row of the stretch is still there, since only rows superseded up to `after` are gone; so the rows to delete are the
        ones that the stretch names as previous, and its removals.
        """
        connection = self._connection
        until = min(after + _COMPACTION_ROWS, target)
        connection.execute("BEGIN IMMEDIATE")
        try:
            newest = connection.execute("SELECT max(revision) FROM log").fetchone()[0] or 0
            connection.execute(
                "DELETE FROM log WHERE revision IN (SELECT previous FROM log WHERE revision > ? AND revision <= ? AND previous > 0)",
                (after, until),
            )
            connection.execute("DELETE FROM log WHERE revision > ? AND revision <= ? AND removed", (after, until))
            connection.execute("INSERT INTO meta VALUES ('compacted', ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (until,))
            connection.execute("INSERT INTO meta VALUES ('revision', ?) ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)", (newest,))
            connection.execute("COMMIT")
        except sqlite3.Error:
            connection.execute("ROLLBACK")
            raise
        return CompactionStep(until)

    def give_back(self, *, quiet: bool) -> bool:
        """Give a few free pages back to the file system; True while there are more to give.

        Under load the free pages will be used again soon, so up to a quarter of the file may be free then. In a quiet moment few are
        kept, and the write-ahead log, which never shrinks by itself, is emptied when nobody reads it.
        """
        execute = self._connection.execute
        free: int = execute("PRAGMA freelist_count").fetchone()[0]
        allowed = _FREE_PAGES if quiet else max(_FREE_PAGES, execute("PRAGMA page_count").fetchone()[0] // 4)
        if free > allowed:
            execute(f"PRAGMA incremental_vacuum({_VACUUM_PAGES})").fetchall()
            return True
        log_file = self._path.with_name(self._path.name + "-wal")
        if quiet and log_file.exists() and log_file.stat().st_size > _LOG_BYTES:
            execute("PRAGMA busy_timeout=0")  # readers have precedence: the next time will do
            execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
            execute("PRAGMA busy_timeout=5000")
        return False

    def size_bytes(self) -> int:
        """Bytes of the file and its write-ahead log."""
        paths = (self._path, self._path.with_name(self._path.name + "-wal"))
        return sum(path.stat().st_size for path in paths if path.exists())

    def skip_to(self, revision: int) -> None:
        """Make `revision` the last one used, and everything up to it compacted; only for a store without rows."""
        connection = self._connection
        connection.execute("BEGIN IMMEDIATE")
        for name in ("revision", "compacted"):
            connection.execute("INSERT INTO meta VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = max(value, excluded.value)", (name, revision))
        connection.execute("COMMIT")

    def close(self) -> None:
        self._connection.close()


class Reader:
    """A connection that only reads; made and used on one thread, closed from another."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=5)
        self._connection.execute("PRAGMA cache_size=-8192")

    def get(self, key: str, at: int) -> Stored | None:
        row = self._connection.execute(
            "SELECT revision, removed, value FROM log WHERE key = ? AND revision <= ? ORDER BY revision DESC LIMIT 1", (key, at)
        ).fetchone()
        return None if row is None or row[1] else Stored(key, row[2], row[0])

    def scan(self, prefix: str, at: int, limit: int, after: str | None) -> tuple[list[Stored], int]:
        """Items at a revision in key order, and how many are left behind the limit."""
        first = prefix if after is None else max(prefix, after + "\0")
        newest = (
            "SELECT key, max(revision) AS revision, removed FROM log INDEXED BY log_by_key"
            " WHERE key >= ? AND key < ? AND revision <= ? GROUP BY key HAVING NOT removed"
        )
        arguments = (first, prefix_end(prefix), at)
        rows = self._connection.execute(
            f"SELECT log.key, log.value, log.revision FROM ({newest} ORDER BY key LIMIT ?) AS newest"
            " JOIN log ON log.revision = newest.revision ORDER BY log.key",
            (*arguments, limit or -1),
        ).fetchall()
        items = [Stored(*row) for row in rows]
        if not limit or len(items) < limit:
            return items, 0
        total = self._connection.execute(f"SELECT count(*) FROM ({newest})", arguments).fetchone()[0]
        return items, total - len(items)

    def history(self, prefix: str, since: int, until: int) -> list[Event]:
        rows = self._connection.execute(
            "SELECT log.key, log.value, log.revision, log.previous, before.value FROM log"
            " LEFT JOIN log AS before ON before.revision = log.previous AND log.previous > 0"
            " WHERE log.revision > ? AND log.revision <= ? AND log.key >= ? AND log.key < ? ORDER BY log.revision",
            (since, until, prefix, prefix_end(prefix)),
        ).fetchall()
        return [Event(*row) for row in rows]

    def close(self) -> None:
        self._connection.close()


def snapshot(path: Path) -> tuple[int, Iterator[tuple[str, bytes, float]]]:
    """One consistent view of a store file that may be in use: its revision and (key, value, expiry) of every live key.

    The view lasts until the iterator is exhausted.
    """
    connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True, isolation_level=None, check_same_thread=False, timeout=5)
    connection.execute("BEGIN")
    newest = connection.execute("SELECT max(revision) FROM log").fetchone()[0] or 0
    meta = dict(connection.execute("SELECT name, value FROM meta"))

    def rows() -> Iterator[tuple[str, bytes, float]]:
        try:
            yield from connection.execute(
                "SELECT log.key, log.value, log.expires FROM (SELECT key, max(revision) AS revision, removed FROM log GROUP BY key HAVING NOT removed)"
                " AS newest JOIN log ON log.revision = newest.revision ORDER BY log.key"
            )
        finally:
            connection.close()

    return max(newest, meta.get("revision", 0)), rows()
