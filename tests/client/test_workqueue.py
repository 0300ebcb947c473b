"""The work queue and the reconcile loop, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from knarr.aiokits.backoff import ItemBackoff
from knarr.api import errors
from knarr.client.controller import Controller, Result, TerminalError
from knarr.client.workqueue import QueueShutDown, WorkQueue

virtual_time = pytest.mark.looptime


def test_key_added_twice_is_handed_out_once() -> None:
    queue = WorkQueue()
    for key in ("a", "b", "a"):
        queue.add(key)
    assert [queue.get_nowait(), queue.get_nowait(), queue.get_nowait()] == ["a", "b", None]


def test_key_added_during_work_comes_again_after_it() -> None:
    queue = WorkQueue()
    queue.add("a")
    assert queue.get_nowait() == "a"
    queue.add("a")
    assert queue.get_nowait() is None
    assert queue.busy
    queue.done("a")
    assert queue.get_nowait() == "a"
    queue.done("a")
    assert not queue.busy


def test_higher_priority_goes_first_also_when_raised_later() -> None:
    queue = WorkQueue()
    queue.add("low")
    queue.add("raised")
    queue.add("high", 5)
    queue.add("raised", 9)
    queue.add("raised", 1)
    assert [queue.get_nowait() for _ in range(4)] == ["raised", "high", "low", None]


@virtual_time
async def test_of_several_delays_the_first_to_end_rules() -> None:
    queue = WorkQueue()
    started = asyncio.get_running_loop().time()
    for seconds in (5, 2, 9):
        queue.add_after("a", seconds)
    assert await queue.get() == "a"
    assert asyncio.get_running_loop().time() - started == pytest.approx(2, abs=0.01)
    queue.done("a")
    await asyncio.sleep(20)
    assert queue.get_nowait() is None


@virtual_time
async def test_failures_delay_longer_each_time() -> None:
    queue = WorkQueue(ItemBackoff(1, 3))
    loop = asyncio.get_running_loop()
    waits = []
    for _ in range(4):
        before = loop.time()
        queue.add_rate_limited("a")
        queue.done(await queue.get())
        waits.append(round(loop.time() - before))
    assert waits == [1, 2, 3, 3]
    assert queue.requeues("a") == 4
    queue.forget("a")
    assert queue.requeues("a") == 0


async def test_shut_down_queue_drains_and_ends_its_getters() -> None:
    queue = WorkQueue()
    getters = [asyncio.create_task(queue.get()) for _ in range(2)]
    await asyncio.sleep(0)
    queue.add("a")
    queue.shutdown()
    queue.add("b")
    results = await asyncio.gather(*getters, return_exceptions=True)
    assert "a" in results
    assert any(isinstance(result, QueueShutDown) for result in results)


async def test_cancelled_getter_does_not_lose_the_key() -> None:
    queue = WorkQueue()
    first, second = asyncio.create_task(queue.get()), asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    first.cancel()
    assert await asyncio.wait_for(second, 1) == "a"


@virtual_time
async def test_reconcile_outcomes_decide_when_the_key_comes_again() -> None:
    loop = asyncio.get_running_loop()
    calls: dict[str, list[float]] = {"ok": [], "again": [], "fails": [], "never": []}

    async def reconcile(key: str) -> Result | None:
        calls[key].append(round(loop.time(), 1))
        if key == "fails" and len(calls[key]) < 3:
            raise errors.conflict("", "pods", "x", "newer")
        if key == "never":
            raise TerminalError("no use")
        return Result(7.0) if key == "again" and len(calls[key]) == 1 else None

    controller = Controller("test", reconcile, backoff=ItemBackoff(1, 100))
    for key in calls:
        controller.queue.add(key)
    controller.start()
    await asyncio.sleep(30)
    await controller.stop()
    start = calls["ok"][0]
    assert calls == {"ok": [start], "again": [start, start + 7], "fails": [start, start + 1, start + 3], "never": [start]}
    assert (controller.errors_total, controller.reconciles_total) == (3, 7)


@virtual_time
async def test_key_is_dropped_after_its_last_try() -> None:
    calls = 0

    async def reconcile(key: str) -> None:
        nonlocal calls
        calls += 1
        raise ValueError("always")

    controller = Controller("test", reconcile, max_retries=3, backoff=ItemBackoff(1, 1))
    controller.start()
    controller.queue.add("a")
    await asyncio.sleep(60)
    assert calls == 4
    controller.queue.add("a")
    await asyncio.sleep(60)
    assert calls == 8
    await controller.stop()


@virtual_time
async def test_one_key_is_never_worked_on_twice_at_once_and_workers_are_bounded() -> None:
    running: set[str] = set()
    most = 0

    async def reconcile(key: str) -> None:
        nonlocal most
        assert key not in running
        running.add(key)
        most = max(most, len(running))
        await asyncio.sleep(1)
        running.discard(key)

    controller = Controller("test", reconcile, workers=3)
    controller.start()
    for number in range(10):
        controller.queue.add(f"key{number % 5}")
        controller.queue.add("key0")
        await asyncio.sleep(0.3)
    await asyncio.sleep(10)
    assert most == 3
    assert controller.errors_total == 0
    await controller.stop()


def test_delays_of_less_than_a_millisecond_may_meet() -> None:
    """uvloop gives a handle without a time for them, which killed who asked for the next."""

    async def twice() -> str | None:
        queue = WorkQueue()
        for seconds in (0.0001, 0.00005, 0.0001):
            queue.add_after("a", seconds)
        return await asyncio.wait_for(queue.get(), 5)

    assert uvloop.run(twice()) == "a"
