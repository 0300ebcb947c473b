"""Tasks, clock, back-off, rate limit, queue and log; timers run in virtual time."""

from __future__ import annotations

import asyncio
import logging
import random

import pytest

from knarr.aiokits import clock, log
from knarr.aiokits.backoff import Backoff, ItemBackoff
from knarr.aiokits.queue import BoundedQueue, QueueClosed
from knarr.aiokits.ratelimit import RateLimit
from knarr.aiokits.tasks import Tasks

virtual_time = pytest.mark.looptime


async def _fail() -> None:
    raise ValueError("broken")


async def test_failure_of_one_task_leaves_others_running(caplog: pytest.LogCaptureFixture) -> None:
    async with Tasks() as tasks:
        other = tasks.spawn(asyncio.sleep(60), "other")
        broken = tasks.spawn(_fail(), "broken-part")
        await asyncio.wait([broken])
        await asyncio.sleep(0)
        assert not other.done()
        assert len(tasks) == 1
    assert other.cancelled()
    assert "broken-part" in caplog.text


async def test_closed_owner_takes_no_tasks() -> None:
    tasks = Tasks()
    await tasks.close()
    await tasks.close()
    with pytest.raises(RuntimeError):
        tasks.spawn(asyncio.sleep(0), "late")


@virtual_time
async def test_task_that_ignores_cancellation_is_reported_and_left(caplog: pytest.LogCaptureFixture) -> None:
    release = asyncio.Event()

    async def stubborn() -> None:
        while not release.is_set():
            try:
                await release.wait()
            except asyncio.CancelledError:
                continue

    tasks = Tasks()
    task = tasks.spawn(stubborn(), "stubborn-one")
    await asyncio.sleep(0)
    await tasks.close(timeout_seconds=1)
    assert "stubborn-one" in caplog.text
    release.set()
    await task


async def test_task_may_close_its_own_owner() -> None:
    tasks = Tasks()
    task = tasks.spawn(tasks.close(), "closes")
    await asyncio.wait_for(task, 1)


async def test_eternal_task_that_ends_is_reported(caplog: pytest.LogCaptureFixture) -> None:
    async with Tasks() as tasks:
        tasks.spawn_eternal(asyncio.sleep(0), "for-ever")
        await tasks.wait_idle()
    assert "for-ever" in caplog.text


@virtual_time
async def test_clock_follows_the_loop() -> None:
    clock.follow_loop(1000.0)
    try:
        await asyncio.sleep(30)
        assert clock.now() == pytest.approx(1030.0)
    finally:
        clock.follow_system()


@pytest.mark.parametrize(
    ("seconds", "whole", "fine"),
    [
        (0.0, "1970-01-01T00:00:00Z", "1970-01-01T00:00:00.000000Z"),
        (1.9999999, "1970-01-01T00:00:01Z", "1970-01-01T00:00:02.000000Z"),
        (1767225600.25, "2026-01-01T00:00:00Z", "2026-01-01T00:00:00.250000Z"),
    ],
)
def test_times_are_written_as_on_the_wire(seconds: float, whole: str, fine: str) -> None:
    assert clock.rfc3339(seconds) == whole
    assert clock.micro(seconds) == fine


def test_times_of_any_zone_are_read() -> None:
    assert clock.parse_rfc3339("1970-01-01T02:00:00+02:00") == 0
    assert clock.parse_rfc3339("1970-01-01T00:00:00.5Z") == 0.5
    with pytest.raises(ValueError, match="no zone"):
        clock.parse_rfc3339("1970-01-01T00:00:00")


@virtual_time
async def test_backoff_grows_to_its_maximum_and_starts_over() -> None:
    backoff = Backoff(1, 5, 2, 100)
    assert [backoff.next_seconds() for _ in range(4)] == [1, 2, 4, 5]
    await asyncio.sleep(101)
    assert backoff.next_seconds() == 1
    backoff.reset()
    assert backoff.next_seconds() == 1


async def test_jitter_adds_up_to_its_share() -> None:
    backoff = Backoff(10, 10, jitter=0.5, randomness=random.Random(1))
    values = [backoff.next_seconds() for _ in range(50)]
    assert all(10 <= value <= 15 for value in values)
    assert len(set(values)) > 40


def test_item_backoff_counts_each_key() -> None:
    backoff = ItemBackoff(1, 100)
    assert [backoff.next_seconds("a") for _ in range(3)] == [1, 2, 4]
    assert backoff.next_seconds("b") == 1
    backoff.forget("a")
    assert (backoff.failures("a"), backoff.failures("b")) == (0, 1)
    for _ in range(2000):
        backoff.next_seconds("c")
    assert backoff.next_seconds("c") == 100


@virtual_time
async def test_rate_limit_lets_a_burst_through_and_then_its_rate() -> None:
    limit = RateLimit(per_second=2, burst=3)
    started = asyncio.get_running_loop().time()
    for _ in range(5):
        await limit.take()
    assert asyncio.get_running_loop().time() - started == pytest.approx(1.0, abs=0.01)
    assert not limit.try_take()
    await asyncio.sleep(10)
    assert [limit.try_take() for _ in range(4)] == [True, True, True, False]


@virtual_time
async def test_cancelled_wait_gives_its_token_back() -> None:
    limit = RateLimit(per_second=1, burst=1)
    await limit.take()
    waiting = asyncio.create_task(limit.take())
    await asyncio.sleep(0.5)
    waiting.cancel()
    await asyncio.wait([waiting])
    assert limit.reserve_seconds() == pytest.approx(0.5, abs=0.01)


async def test_full_queue_says_no_and_closed_queue_drains() -> None:
    queue: BoundedQueue[int] = BoundedQueue(2)
    assert [queue.put_nowait(item) for item in (1, 2, 3)] == [True, True, False]
    assert await queue.get() == 1
    assert queue.put_nowait(4)
    queue.close()
    assert not queue.put_nowait(5)
    assert await queue.get_many() == [2, 4]
    with pytest.raises(QueueClosed):
        await queue.get()


async def test_waiting_consumer_learns_that_the_queue_closed() -> None:
    queue: BoundedQueue[int] = BoundedQueue(1)
    consumer = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.close()
    with pytest.raises(QueueClosed):
        await asyncio.wait_for(consumer, 1)


def test_log_lines_have_fields_after_the_message(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    logger = log.get_logger("knarr.test")
    logger.info("pod started", pod="a/b", reason='said "no"\n', nothing=None, empty="")
    logger.debug("not shown")
    assert caplog.messages == ['pod started pod=a/b reason="said \\"no\\"\\n" empty=""']
