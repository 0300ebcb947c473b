"""Priority and fairness: classification by FlowSchemas, seats, fair turns, refusal."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from knarr.api import errors
from knarr.api.resources import FLOW_SCHEMAS
from knarr.apiserver.attributes import Attributes, UserInfo
from knarr.apiserver.flowlevels import Claim, Place, PriorityLevel, adjust, share_out
from knarr.apiserver.flowqueues import QueueSet, deal
from knarr.testing.apiserver import RunningAPIServer


def level(seats: int, *, queues: int = 0, length: int = 50, hand: int = 1, now: list[float] | None = None) -> PriorityLevel:
    made = PriorityLevel("test", (lambda: now[0]) if now is not None else None)
    response = {"type": "Queue", "queuing": {"queues": queues, "handSize": hand, "queueLengthLimit": length}} if queues else {"type": "Reject"}
    limited = {"nominalConcurrencyShares": 1, "limitResponse": response}
    made.configure({"metadata": {}, "spec": {"type": "Limited", "limited": limited}}, seats, 1)
    return made


async def test_level_without_queue_refuses_when_its_seats_are_taken() -> None:
    full = level(2)
    place = await full.enter("a")
    await full.enter("a")
    with pytest.raises(errors.StatusError) as raised:
        await full.enter("b")
    assert (raised.value.code, raised.value.retry_after_seconds) == (429, 1)
    full.leave(place)
    await full.enter("b")


async def test_flows_take_turns_however_many_wait_in_one() -> None:
    now = [0.0]
    busy = level(1, queues=8, now=now)
    first = await busy.enter("first")
    order: list[str] = []

    async def run(flow: str) -> None:
        place = await busy.enter(flow)
        order.append(flow)
        now[0] += 0.01
        busy.leave(place)

    tasks = [asyncio.ensure_future(run("greedy")) for _ in range(5)]
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(run("modest"))]
    await asyncio.sleep(0)
    busy.leave(first)
    await asyncio.gather(*tasks)
    assert order.index("modest") <= 1
    assert busy.inside == 0


async def test_cancelled_waiter_leaves_no_trace() -> None:
    busy = level(1, queues=2)
    place = await busy.enter("a")
    waiting = asyncio.ensure_future(busy.enter("b"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    busy.leave(place)
    assert (busy.inside, busy.waiting) == (0, 0)
    await busy.enter("c")


async def test_requests_are_classified_by_the_default_schemas(apiserver: RunningAPIServer) -> None:
    flow = apiserver.server.flow
    node = UserInfo("system:node:n1", groups=("system:nodes", "system:authenticated"))
    person = UserInfo("jane", groups=("system:authenticated",))
    admin = UserInfo("root", groups=("system:masters", "system:authenticated"))
    assert flow.classify(Attributes(node, "update", "", "v1", "nodes", "status", "", "n1")).level.name == "node-high"
    assert flow.classify(Attributes(node, "list", "", "v1", "pods")).level.name == "system"
    found = flow.classify(Attributes(person, "list", "", "v1", "pods", namespace="x"))
    assert (found.level, found.flow) == (flow._levels["global-default"], "global-default/jane")
    assert flow.classify(Attributes(admin, "list", "", "v1", "pods")).level.exempt
    assert flow.classify(Attributes(person, "get", path="/healthz", is_resource=False)).level.exempt


async def test_answers_name_their_schema_and_a_dangling_schema_says_so(apiserver: RunningAPIServer) -> None:
    response = await apiserver.client.request("GET", "/api/v1/namespaces")
    assert response.headers["x-kubernetes-pf-flowschema-uid"]
    assert response.headers["x-kubernetes-pf-prioritylevel-uid"]
    assert (await apiserver.client.request("GET", "/version")).headers["x-kubernetes-pf-flowschema-uid"]
    body = {"metadata": {"name": "x"}, "spec": {"priorityLevelConfiguration": {"name": "nowhere"}, "matchingPrecedence": 5000}}
    await apiserver.client.create(FLOW_SCHEMAS, body)
    async with asyncio.timeout(5):
        while True:
            found = (await apiserver.client.get(FLOW_SCHEMAS, "x")).get("status", {}).get("conditions") or []
            if found:
                break
            await asyncio.sleep(0.01)
    assert (found[0]["type"], found[0]["status"], found[0]["reason"]) == ("Dangling", "True", "NotFound")


def lending(name: str, shares: int, now: list[float], *, lendable: int = 0, borrows: int | None = None) -> PriorityLevel:
    made = PriorityLevel(name, lambda: now[0])
    limited = {"nominalConcurrencyShares": shares, "lendablePercent": lendable, "limitResponse": {"type": "Queue", "queuing": {}}}
    if borrows is not None:
        limited["borrowingLimitPercent"] = borrows
    made.configure({"metadata": {}, "spec": {"type": "Limited", "limited": limited}}, 100, 100)
    return made


async def test_a_busy_level_borrows_what_an_idle_one_lends_and_gives_it_back() -> None:
    now = [0.0]
    busy, idle = lending("busy", 40, now), lending("idle", 60, now, lendable=50)
    assert (busy.nominal, idle.nominal, idle.least) == (40, 60, 30)
    places = [await busy.enter("a") for _ in range(40)]
    assert busy.enter_nowait("a") is None
    waiting = [asyncio.ensure_future(busy.enter("a")) for _ in range(30)]
    await asyncio.sleep(0)
    now[0] = 10.0
    adjust([busy, idle])
    # All that is lendable has moved, and those who waited sit.
    assert (busy.seats, idle.seats) == (70, 30)
    places += await asyncio.gather(*waiting)
    assert (busy.inside, busy.waiting) == (70, 0)
    for place in places:
        busy.leave(place)
    # Whoever lent gets up to its nominal seats back with the next adjustment after it wants them.
    returning = [asyncio.ensure_future(idle.enter("b")) for _ in range(60)]
    await asyncio.sleep(0)
    assert (idle.inside, idle.waiting) == (30, 30)
    now[0] = 20.0
    adjust([busy, idle])
    assert (busy.seats, idle.seats) == (40, 60)
    await asyncio.gather(*returning)
    assert idle.inside == 60


async def test_nobody_borrows_more_than_allowed() -> None:
    now = [0.0]
    busy, idle = lending("busy", 40, now, borrows=25), lending("idle", 60, now, lendable=100)
    for _ in range(40):
        busy.enter_nowait("a")
    waiting = [asyncio.ensure_future(busy.enter("a")) for _ in range(30)]
    await asyncio.sleep(0)
    now[0] = 10.0
    adjust([busy, idle])
    assert busy.seats == 50
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


@pytest.mark.parametrize(("total", "claims", "expected"), [
    (100, [(0, 100, 10), (0, 100, 30)], [25, 75]),
    (100, [(50, 100, 50), (0, 100, 10)], [83.333, 16.667]),
    (100, [(0, 20, 50), (0, 100, 10)], [20, 80]),
    (10, [(10, 10, 10), (0, 5, 0)], [10, 0]),
])  # fmt: skip
def test_seats_are_shared_in_proportion_within_bounds(total: int, claims: list[tuple[float, float, float]], expected: list[float]) -> None:
    given, _ = share_out(total, [Claim(*claim) for claim in claims])
    assert given == pytest.approx(expected, abs=0.01)


async def test_dumps_show_levels_and_the_request_that_asks(apiserver: RunningAPIServer) -> None:
    async def dump(name: str) -> list[list[str]]:
        response = await apiserver.client.request("GET", f"/debug/api_priority_and_fairness/{name}")
        return [[cell.strip() for cell in line.split(",")] for line in response.body.decode().splitlines()]

    levels = await dump("dump_priority_levels")
    assert levels[0][:3] == ["PriorityLevelName", "ActiveQueues", "IsIdle"]
    assert {row[0] for row in levels[1:]} >= {"catch-all", "exempt", "workload-low"}
    assert next(row for row in levels if row[0] == "exempt")[5] == "1"
    assert (await dump("dump_queues"))[0][1:3] == ["Index", "PendingRequests"]
    requests = await dump("dump_requests?includeRequestDetails=1")
    assert [requests[1][0], *requests[1][10:13]] == ["exempt", "kubernetes-admin", "get", "/debug/api_priority_and_fairness/dump_requests"]
    text = (await apiserver.client.request("GET", "/metrics")).body.decode()
    assert 'apiserver_flowcontrol_request_wait_duration_seconds_bucket{execute="true",flow_schema="exempt",priority_level="exempt",le="0"}' in text


@pytest.mark.parametrize(("number", "deck", "hand", "expected"), [
    (0, 5, 3, (0, 1, 2)), (0xFFFFFFFFFFFFFFFF, 5, 3, (0, 4, 1)), (2**63, 128, 6, (0, 2, 5, 30, 110, 4)), (7, 1, 1, (0,)),
    (1234567890123456789, 64, 6, (21, 34, 9, 32, 36, 28)),
])  # fmt: skip
def test_hands_are_dealt_as_upstreams(number: int, deck: int, hand: int, expected: tuple[int, ...]) -> None:
    dealt = deal(number, deck, hand)
    assert len(set(dealt)) == hand
    assert dealt == expected


def test_every_hand_is_as_likely_as_any_other() -> None:
    counts = Counter(card for number in range(5 * 4 * 3 * 50) for card in deal(number, 5, 3))
    assert set(counts.values()) == {5 * 4 * 3 * 50 * 3 // 5}
    assert len({deal(number, 5, 3) for number in range(60)}) == 60


async def test_an_elephant_fills_its_own_queues_and_mice_pass_it() -> None:
    now = [0.0]
    made = level(4, queues=64, hand=6, now=now)
    running: list[tuple[str, Place]] = []
    refused: Counter[str] = Counter()

    async def ask(flow: str) -> None:
        try:
            running.append((flow, await made.enter(flow)))
        except errors.StatusError:
            refused[flow] += 1

    tasks = [asyncio.ensure_future(ask("schema/elephant")) for _ in range(1000)]
    await asyncio.sleep(0)
    # Four run; the elephant's hand of six queues is full, and who comes on top is refused.
    assert (made.inside, made.waiting, refused["schema/elephant"]) == (4, 300, 696)
    mice = [f"schema/mouse-{number}" for number in range(12)]
    tasks += [asyncio.ensure_future(ask(mouse)) for mouse in mice]
    await asyncio.sleep(0)
    assert not sum(refused[mouse] for mouse in mice), "no mouse is refused"
    served: list[str] = []
    while running:
        now[0] += 0.01
        for flow, place in [running.pop(0) for _ in range(len(running))]:
            served.append(flow)
            made.leave(place)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)
    assert (made.inside, made.waiting) == (0, 0)
    last = max(served.index(mouse) for mouse in mice)
    # Eighteen queues with somebody in them take turns: mice are served while the elephant has had about as much as each of them a queue.
    assert last < 40, last
    assert not any(queue.waiting or queue.running for queue in made.set.queues)  # type: ignore[union-attr]


async def test_a_queue_that_was_idle_has_not_saved_its_share() -> None:
    now = [0.0]
    queues = QueueSet(lambda: now[0], 2, 1, 50)
    queues.seats = 1
    busy, other = queues.queues
    queues.run(busy)
    now[0] = 100.0
    queues.finish(busy, 100.0)
    waiters = [queues.wait(queue, asyncio.get_running_loop().create_future()) for queue in (busy, other, busy, other)]
    order = [queues.next().queue.index for _ in waiters]
    assert sorted(order[:2]) == sorted(order[2:]) == [0, 1]


async def test_fewer_queues_are_there_when_those_that_are_too_many_are_empty() -> None:
    queues = QueueSet(asyncio.get_running_loop().time, 4, 2, 50)
    queues.run(queues.queues[3])
    queues.configure(2, 1, 50)
    assert len(queues.queues) == 4
    assert {queues.pick(f"s/{number}").index for number in range(20)} == {0, 1}
    queues.finish(queues.queues[3], 0.1)
    assert len(queues.queues) == 2
