"""Priority and fairness: classification by FlowSchemas, seats, fair turns, refusal."""

from __future__ import annotations

import asyncio

import pytest

from knarr.api import errors
from knarr.api.resources import FLOW_SCHEMAS
from knarr.apiserver.attributes import Attributes, UserInfo
from knarr.apiserver.flow import PriorityLevel
from knarr.testing.apiserver import RunningAPIServer


def level(seats: int, *, queues: int = 0, length: int = 50, hand: int = 1) -> PriorityLevel:
    made = PriorityLevel("test")
    response = {"type": "Queue", "queuing": {"queues": queues, "handSize": hand, "queueLengthLimit": length}} if queues else {"type": "Reject"}
    limited = {"nominalConcurrencyShares": 1, "limitResponse": response}
    made.configure({"metadata": {}, "spec": {"type": "Limited", "limited": limited}}, seats, 1)
    return made


async def test_level_without_queue_refuses_when_its_seats_are_taken() -> None:
    full = level(2)
    await full.enter("a")
    await full.enter("a")
    with pytest.raises(errors.StatusError) as raised:
        await full.enter("b")
    assert (raised.value.code, raised.value.retry_after_seconds) == (429, 1)
    full.leave()
    await full.enter("b")


async def test_flows_take_turns_however_many_wait_in_one() -> None:
    busy = level(1, queues=8)
    await busy.enter("first")
    order: list[str] = []

    async def run(flow: str) -> None:
        await busy.enter(flow)
        order.append(flow)
        busy.leave()

    tasks = [asyncio.ensure_future(run("greedy")) for _ in range(5)]
    await asyncio.sleep(0)
    tasks += [asyncio.ensure_future(run("modest"))]
    await asyncio.sleep(0)
    busy.leave()
    await asyncio.gather(*tasks)
    assert order.index("modest") <= 1
    assert busy.inside == 0


async def test_cancelled_waiter_leaves_no_trace() -> None:
    busy = level(1, queues=2)
    await busy.enter("a")
    waiting = asyncio.ensure_future(busy.enter("b"))
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    busy.leave()
    assert (busy.inside, busy.waiting) == (0, 0)
    await busy.enter("c")


async def test_requests_are_classified_by_the_default_schemas(apiserver: RunningAPIServer) -> None:
    flow = apiserver.server.flow
    node = UserInfo("system:node:n1", groups=("system:nodes", "system:authenticated"))
    person = UserInfo("jane", groups=("system:authenticated",))
    admin = UserInfo("root", groups=("system:masters", "system:authenticated"))
    assert flow.classify(Attributes(node, "update", "", "v1", "nodes", "status", "", "n1")).level.name == "node-high"
    assert flow.classify(Attributes(node, "list", "", "v1", "pods")).level.name == "system"
    assert flow.classify(Attributes(person, "list", "", "v1", "pods", namespace="x")) [:2] == (flow._levels["global-default"], "global-default/jane")
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
