"""Two API servers on one etcd: each sees at once what the other has acknowledged, and one goes on when the other is gone."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator

import pytest

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, EVENTS, NAMESPACES
from knarr.testing.apiserver import RunningAPIServer, running_apiserver

pytestmark = pytest.mark.timeout(60)


def config_map(name: str, **data: str) -> dict[str, object]:
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name, "namespace": "default"}, "data": data}


@pytest.fixture
async def pair(etcd: str) -> AsyncIterator[tuple[RunningAPIServer, RunningAPIServer]]:
    url = f"etcd3://{etcd}/{uuid.uuid4().hex}"
    async with running_apiserver(url) as first, running_apiserver(url) as second:
        yield first, second


async def test_what_one_has_acknowledged_the_other_shows_in_its_next_answer(pair: tuple[RunningAPIServer, RunningAPIServer]) -> None:
    first, second = pair
    for number in range(30):
        made = await first.client.create(CONFIG_MAPS, config_map(f"c{number}", count="1"))
        listed = await second.client.list(CONFIG_MAPS, "default")
        assert f"c{number}" in {item["metadata"]["name"] for item in listed["items"]}
        assert int(listed["metadata"]["resourceVersion"]) >= int(made["metadata"]["resourceVersion"])
        made["data"] = {"count": "2"}
        # The version that the first server gave is the one to change at the second, however far its cache has come.
        changed = await second.client.update(CONFIG_MAPS, made)
        assert (await first.client.get(CONFIG_MAPS, f"c{number}", "default"))["data"] == {"count": "2"}
        await first.client.delete(CONFIG_MAPS, f"c{number}", "default")
        with pytest.raises(StatusError) as gone:
            await second.client.get(CONFIG_MAPS, f"c{number}", "default")
        assert errors.is_not_found(gone.value)
        again = await second.client.create(CONFIG_MAPS, config_map(f"c{number}"))
        assert int(again["metadata"]["resourceVersion"]) > int(changed["metadata"]["resourceVersion"])


async def test_a_namespace_made_at_one_takes_objects_at_the_other(pair: tuple[RunningAPIServer, RunningAPIServer]) -> None:
    first, second = pair
    for number in range(10):
        await first.client.create(NAMESPACES, {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": f"n{number}"}})
        await second.client.create(CONFIG_MAPS, {**config_map("c"), "metadata": {"name": "c", "namespace": f"n{number}"}})


async def test_updates_at_both_are_neither_lost_nor_doubled(pair: tuple[RunningAPIServer, RunningAPIServer]) -> None:
    await pair[0].client.create(CONFIG_MAPS, config_map("counter", count="0"))

    async def count(server: RunningAPIServer) -> None:
        for _ in range(15):
            while True:
                current = await server.client.get(CONFIG_MAPS, "counter", "default")
                current["data"]["count"] = str(int(current["data"]["count"]) + 1)
                with contextlib.suppress(StatusError):  # a conflict: read and try again
                    await server.client.update(CONFIG_MAPS, current)
                    break

    await asyncio.gather(*(count(server) for server in (*pair, *pair)))
    assert (await pair[1].client.get(CONFIG_MAPS, "counter", "default"))["data"]["count"] == "60"


async def test_a_watch_at_one_sees_the_writes_of_the_other_once_and_in_order(pair: tuple[RunningAPIServer, RunningAPIServer]) -> None:
    first, second = pair
    start = (await second.client.list(CONFIG_MAPS, "default"))["metadata"]["resourceVersion"]
    seen: list[str] = []

    async def watch() -> None:
        async for type, obj in second.client.watch(CONFIG_MAPS, "default", resource_version=start):
            if type == "ADDED":
                seen.append(obj["metadata"]["name"])
            if len(seen) == 20:
                return

    task = asyncio.ensure_future(watch())
    for number in range(20):
        await (first, second)[number % 2].client.create(CONFIG_MAPS, config_map(f"w{number}"))
    await asyncio.wait_for(task, 20)
    assert seen == [f"w{number}" for number in range(20)]


async def test_one_goes_on_when_the_other_is_gone_and_a_third_finds_everything(etcd: str) -> None:
    url = f"etcd3://{etcd}/{uuid.uuid4().hex}"
    async with running_apiserver(url) as first:
        async with contextlib.AsyncExitStack() as stack:
            second = await stack.enter_async_context(running_apiserver(url))
            await second.client.create(CONFIG_MAPS, config_map("of-second"))
        await first.client.create(CONFIG_MAPS, config_map("of-first"))
        async with running_apiserver(url) as third:
            names = {item["metadata"]["name"] for item in (await third.client.list(CONFIG_MAPS, "default"))["items"]}
            assert {"of-first", "of-second"} <= names


async def test_events_end_with_their_lease_at_every_server(etcd: str) -> None:
    url = f"etcd3://{etcd}/{uuid.uuid4().hex}"
    async with running_apiserver(url, event_ttl_seconds=1) as first, running_apiserver(url, event_ttl_seconds=1) as second:
        await first.client.create(EVENTS, {
            "apiVersion": "v1", "kind": "Event", "metadata": {"name": "e", "namespace": "default"},
            "involvedObject": {"kind": "Pod", "name": "p", "namespace": "default"}, "reason": "Why", "type": "Normal",
        })  # fmt: skip
        version = (await second.client.get(EVENTS, "e", "default"))["metadata"]["resourceVersion"]
        async for type, obj in second.client.watch(EVENTS, "default", resource_version=version):
            if type == "DELETED" and obj["metadata"]["name"] == "e":
                break
