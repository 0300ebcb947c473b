"""The queue on a hand-driven clock: order, back-off, gates, events."""

from __future__ import annotations

import asyncio

import pytest

from knarr.scheduler.events import NODE_ADD
from knarr.scheduler.queue import QueuedPod

from .world import World


def _pop(world: World) -> QueuedPod:
    queued = world.queue.pop_nowait()
    assert queued is not None
    return queued


def test_higher_priority_first_then_first_come() -> None:
    world = World()
    for name, priority in (("a", 0), ("b", 5), ("c", 0), ("d", 5)):
        world.queue.add(world.pod(name, priority=priority))
        world.now += 1
    assert [_pop(world).info.uid for _ in range(4)] == ["b", "d", "a", "c"]
    assert world.queue.pop_nowait() is None


def test_a_refused_pod_waits_for_an_event_its_refuser_cares_about() -> None:
    world = World()
    world.queue.add(world.pod("a", nodeSelector={"disk": "fast"}))
    queued = _pop(world)
    queued.plugins = {"NodeAffinity"}
    world.queue.add_unschedulable(queued, is_error=False)
    world.now += 30
    assert world.queue.pop_nowait() is None
    world.queue.move(NODE_ADD, None, world.node("slow", disk="slow"))
    assert world.queue.pop_nowait() is None
    world.queue.move(NODE_ADD, None, world.node("fast", disk="fast"))
    assert _pop(world).info.uid == "a"


def test_errors_back_off_twice_as_long_each_time_up_to_ten_seconds() -> None:
    world = World()
    world.queue.add(world.pod("a"))
    waits = []
    for _ in range(6):
        world.queue.add_unschedulable(_pop(world), is_error=True)
        start = world.now
        while True:
            world.now += 0.25
            if world.queue._has_ready():
                break
        waits.append(round(world.now - start))
    assert waits == sorted(waits)
    assert waits[0] <= 2
    assert 10 <= waits[-1] <= 12


def test_gated_pods_stay_out_until_their_gates_are_gone() -> None:
    world = World()
    gated = world.pod("a", schedulingGates=[{"name": "wait"}])
    world.queue.add(gated)
    assert world.queue.pop_nowait() is None
    free = world.pod("a")
    world.queue.update(free, gated.pod)
    assert _pop(world).info is free


def test_a_preemptor_waits_until_its_last_victim_is_seen_going() -> None:
    world = World()
    world.node("n")
    victim = world.pod("victim")
    world.place(victim, "n")
    world.handle.preemption_started("a")
    assert world.handle.is_preempting("a")
    world.handle.last_victim("a", "n", "victim")
    world.queue.add(world.pod("a"))
    assert world.queue.pop_nowait() is None
    world.handle.table.remove_pod(victim)
    assert not world.handle.is_preempting("a")
    world.queue.activate("a")
    assert _pop(world).info.uid == "a"


def test_a_deleted_pod_is_not_popped() -> None:
    world = World()
    world.queue.add(world.pod("a"))
    world.queue.delete("a")
    assert world.queue.pop_nowait() is None
    assert sum(world.queue.counts().values()) == 0


async def test_waiting_ends_when_it_is_cancelled_in_the_moment_in_which_a_pod_comes() -> None:
    world = World()
    waiting = asyncio.create_task(world.queue.wait())
    await asyncio.sleep(0)
    world.queue.add(world.pod("a"))
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
