"""The suite that every RevisionStore passes. Revisions are compared relative to the store's first one."""

import asyncio

import pytest

from knarr.storage import ANY, CompactedError, Event, FutureRevisionError, RevisionStore


async def test_a_key_is_created_only_when_it_does_not_exist(store: RevisionStore) -> None:
    first = await store.put("/a/x", b"1", expected=0)
    assert first.won
    second = await store.put("/a/x", b"2", expected=0)
    assert not second.won
    assert second.current is not None
    assert (second.current.value, second.current.revision) == (b"1", first.revision)


async def test_a_write_with_an_old_revision_loses_and_shows_the_current_value(store: RevisionStore) -> None:
    first = await store.put("/a/x", b"1", expected=0)
    second = await store.put("/a/x", b"2", expected=first.revision)
    assert second.won
    third = await store.put("/a/x", b"3", expected=first.revision)
    assert not third.won
    assert third.current is not None
    assert third.current.value == b"2"
    assert (await store.put("/a/x", b"4", expected=ANY)).won


async def test_removing_needs_the_current_revision_and_an_existing_key(store: RevisionStore) -> None:
    assert (await store.remove("/a/x", expected=ANY)).current is None
    first = await store.put("/a/x", b"1", expected=0)
    assert not (await store.remove("/a/x", expected=first.revision + 1)).won
    gone = await store.remove("/a/x", expected=first.revision)
    assert gone.won
    assert gone.revision > first.revision
    assert await store.get("/a/x") is None
    again = await store.put("/a/x", b"2", expected=0)
    assert again.won


async def test_revisions_grow_by_one_even_when_writes_lose(store: RevisionStore) -> None:
    base = (await store.put("/a/0", b"", expected=0)).revision
    outcomes = await asyncio.gather(*(store.put(f"/a/{n % 10}", b"v", expected=0) for n in range(40)))
    won = sorted(put.revision for put in outcomes if put.won)
    assert won == list(range(base + 1, base + 10))
    assert store.revision == base + 9


async def test_many_writers_of_one_key_lose_no_update(store: RevisionStore) -> None:
    await store.put("/n", b"0", expected=0)

    async def add() -> None:
        for _ in range(10):
            while True:
                current = await store.get("/n")
                assert current is not None
                if (await store.put("/n", b"%d" % (int(current.value) + 1), expected=current.revision)).won:
                    break

    await asyncio.gather(*(add() for _ in range(8)))
    final = await store.get("/n")
    assert final is not None
    assert final.value == b"80"


async def test_reading_at_a_revision_sees_the_world_as_it_was(store: RevisionStore) -> None:
    first = await store.put("/a/x", b"1", expected=0)
    await store.put("/a/y", b"1", expected=0)
    second = await store.put("/a/x", b"2", expected=first.revision)
    gone = await store.remove("/a/x", expected=second.revision)
    old = await store.get("/a/x", at=first.revision)
    assert old is not None
    assert old.value == b"1"
    assert await store.get("/a/y", at=first.revision) is None
    assert await store.get("/a/x", at=gone.revision) is None
    page = await store.scan("/a/", at=second.revision)
    assert [(item.key, item.value) for item in page.items] == [("/a/x", b"2"), ("/a/y", b"1")]
    with pytest.raises(FutureRevisionError):
        await store.get("/a/x", at=gone.revision + 5)


async def test_a_scan_pages_in_key_order_at_one_revision_and_counts_what_remains(store: RevisionStore) -> None:
    for n in range(10):
        await store.put(f"/p/{n}", b"old", expected=0)
    await store.put("/pp/other", b"", expected=0)
    page = await store.scan("/p/", limit=4)
    assert [item.key for item in page.items] == ["/p/0", "/p/1", "/p/2", "/p/3"]
    assert page.remaining == 6
    await store.remove("/p/7", expected=ANY)
    await store.put("/p/8", b"new", expected=ANY)
    await store.put("/p/55", b"new", expected=0)
    page2 = await store.scan("/p/", at=page.revision, limit=4, after=page.after)
    assert [item.key for item in page2.items] == ["/p/4", "/p/5", "/p/6", "/p/7"]
    page3 = await store.scan("/p/", at=page.revision, limit=4, after=page2.after)
    assert [(item.key, item.value) for item in page3.items] == [("/p/8", b"old"), ("/p/9", b"old")]
    assert (page3.after, page3.remaining) == (None, 0)
    assert [item.key for item in (await store.scan("/p/", after="/p/4", limit=2)).items] == ["/p/5", "/p/55"]
    exact = await store.scan("/p/", limit=10)
    assert (exact.after, exact.remaining) == (None, 0)


async def test_subscribers_get_each_event_once_in_order_before_the_writer_gets_its_answer(store: RevisionStore) -> None:
    seen: list[Event] = []
    cancel = store.subscribe(seen.extend)

    async def write(n: int) -> None:
        put = await store.put(f"/s/{n}", b"%d" % n, expected=0)
        assert any(event.revision == put.revision and event.key == f"/s/{n}" for event in seen)

    await asyncio.gather(*(write(n) for n in range(50)))
    put = await store.put("/s/0", b"again", expected=ANY)
    await store.remove("/s/0", expected=put.revision)
    revisions = [event.revision for event in seen]
    assert revisions == list(range(revisions[0], revisions[0] + 52))
    assert seen[-2].previous_revision < seen[-2].revision
    assert (seen[-1].value, seen[-1].previous_value, seen[-1].previous_revision) == (None, b"again", put.revision)
    assert all(event.previous_revision == 0 for event in seen[:50])
    cancel()
    await store.put("/s/1", b"unseen", expected=ANY)
    assert seen[-1].key == "/s/0"


async def test_a_watch_from_an_old_revision_gets_history_then_live_without_hole_or_repeat(store: RevisionStore) -> None:
    base = (await store.put("/other", b"", expected=0)).revision
    first = await store.put("/w/a", b"1", expected=0)
    await store.put("/w/a", b"2", expected=first.revision)
    got: list[Event] = []

    async def write_more() -> None:
        for n in range(30):
            await store.put(f"/w/{n}", b"n", expected=0)
            await store.put(f"/not/{n}", b"n", expected=0)
        await store.remove("/w/a", expected=ANY)

    writer = asyncio.ensure_future(write_more())
    async with asyncio.timeout(10), store.watch("/w/", since=base) as stream:
        async for batch in stream:
            got.extend(batch)
            if got[-1].value is None:
                break
    await writer
    assert [(event.key, event.value) for event in got[:2]] == [("/w/a", b"1"), ("/w/a", b"2")]
    assert got[1].previous_value == b"1"
    assert [event.key for event in got[2:-1]] == [f"/w/{n}" for n in range(30)]
    assert (got[-1].key, got[-1].previous_value) == ("/w/a", b"2")
    assert [event.revision for event in got] == sorted({event.revision for event in got})


async def test_compaction_keeps_what_is_live_and_refuses_what_is_older(store: RevisionStore) -> None:
    first = await store.put("/c/x", b"1", expected=0)
    kept = await store.put("/c/kept", b"k", expected=0)
    second = await store.put("/c/x", b"2", expected=first.revision)
    gone = await store.put("/c/gone", b"g", expected=0)
    removed = await store.remove("/c/gone", expected=gone.revision)
    last = await store.put("/c/x", b"3", expected=second.revision)
    await store.compact(removed.revision)
    assert store.compacted == removed.revision
    for asked in (first.revision, second.revision):
        with pytest.raises(CompactedError):
            await store.get("/c/x", at=asked)
        with pytest.raises(CompactedError):
            await store.scan("/c/", at=asked)
        with pytest.raises(CompactedError):
            async with store.watch("/c/", since=asked):
                pass
    at_compacted = await store.scan("/c/", at=removed.revision)
    assert [(item.key, item.value, item.revision) for item in at_compacted.items] == [
        ("/c/kept", b"k", kept.revision), ("/c/x", b"2", second.revision),
    ]
    async with asyncio.timeout(10), store.watch("/c/", since=removed.revision) as stream:
        async for batch in stream:
            assert [(event.revision, event.value, event.previous_value) for event in batch] == [(last.revision, b"3", b"2")]
            break
    await store.compact(first.revision)
    with pytest.raises(FutureRevisionError):
        await store.compact(last.revision + 100)


async def test_a_leased_key_removes_itself_and_a_later_write_lifts_the_lease(store: RevisionStore) -> None:
    seen: list[Event] = []
    store.subscribe(seen.extend)
    await store.put("/l/short", b"", expected=0, lease_seconds=1)
    lifted = await store.put("/l/lifted", b"", expected=0, lease_seconds=1)
    await store.put("/l/lifted", b"stays", expected=lifted.revision)
    async with asyncio.timeout(6):
        while await store.get("/l/short") is not None:
            await asyncio.sleep(0.1)
    assert await store.get("/l/lifted") is not None
    assert [event.key for event in seen if event.value is None] == ["/l/short"]


async def test_a_watcher_that_does_not_read_is_cut_off(store: RevisionStore) -> None:
    from knarr.storage import SlowWatcherError

    base = (await store.put("/slow/0", b"", expected=ANY)).revision
    async with store.watch("/slow/", since=base) as stream:
        for n in range(102):
            await asyncio.gather(*(store.put(f"/slow/{n}/{m}", b"", expected=0) for m in range(100)))
        with pytest.raises(SlowWatcherError):
            async for _ in stream:
                pass
