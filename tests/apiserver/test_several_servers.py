"""Two API servers on one etcd: each sees at once what the other has acknowledged, and one goes on when the other is gone."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import AsyncIterator
from typing import Any

import pytest

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, ENDPOINT_SLICES, ENDPOINTS, EVENTS, IP_ADDRESSES, NAMESPACES, SERVICES
from knarr.client.leaderelection import LeaderElectionConfig, LeaderElector
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


async def test_the_kubernetes_service_names_all_servers_and_no_other(etcd: str) -> None:
    url = f"etcd3://{etcd}/{uuid.uuid4().hex}"

    async def named(server: RunningAPIServer) -> tuple[list[str], list[str]]:
        endpoints = await server.client.get(ENDPOINTS, "kubernetes", "default")
        part = await server.client.get(ENDPOINT_SLICES, "kubernetes", "default")
        return [each["ip"] for each in endpoints["subsets"][0]["addresses"]], [each["addresses"][0] for each in part["endpoints"]]

    async with running_apiserver(url, advertise_address="10.9.0.1") as first:
        assert await named(first) == (["10.9.0.1"], ["10.9.0.1"])
        async with running_apiserver(url, advertise_address="10.9.0.2") as second:
            both = ["10.9.0.1", "10.9.0.2"]
            assert await named(first) == await named(second) == (both, both)
        assert await named(first) == (["10.9.0.1"], ["10.9.0.1"])


async def test_addresses_and_ports_are_given_once(pair: tuple[RunningAPIServer, RunningAPIServer]) -> None:
    async def make(number: int) -> dict[str, Any]:
        server = pair[number % 2]
        spec = {"type": "NodePort", "ports": [{"name": "a", "port": 80}, {"name": "b", "port": 81}]}
        return await server.client.create(SERVICES, {"metadata": {"name": f"s{number}", "namespace": "default"}, "spec": spec})

    made = await asyncio.gather(*(make(number) for number in range(60)))
    addresses = [one["spec"]["clusterIP"] for one in made]
    ports = [port["nodePort"] for one in made for port in one["spec"]["ports"]]
    assert len(set(addresses)) == 60
    assert len(set(ports)) == 120
    known = {item["metadata"]["name"] for item in (await pair[1].client.list(IP_ADDRESSES))["items"]}
    assert set(addresses) <= known
    # The very same address and port, asked for at both in the same moment: one gets it.
    wanted = {"type": "NodePort", "clusterIP": _free(addresses), "ports": [{"port": 80, "nodePort": next(p for p in range(30000, 32768) if p not in ports)}]}
    outcomes = await asyncio.gather(*(
        server.client.create(SERVICES, {"metadata": {"name": f"same{number}", "namespace": "default"}, "spec": wanted})
        for number, server in enumerate(pair)
    ), return_exceptions=True)  # fmt: skip
    assert sorted(isinstance(outcome, StatusError) for outcome in outcomes) == [False, True]


def _free(addresses: list[str]) -> str:
    return next(address for number in range(2, 250) if (address := f"10.96.7.{number}") not in addresses)


async def test_one_of_two_candidates_leads_whichever_server_they_ask(pair: tuple[RunningAPIServer, RunningAPIServer]) -> None:
    leading: list[str] = []

    async def candidate(name: str, server: RunningAPIServer) -> None:
        elector = LeaderElector(server.client, LeaderElectionConfig(
            name="leader", namespace="default", identity=name, lease_seconds=2, renew_seconds=1.5, retry_seconds=0.1))  # fmt: skip
        await elector.run(lambda: lead(name))

    async def lead(name: str) -> None:
        leading.append(name)
        await asyncio.Event().wait()

    tasks = [asyncio.ensure_future(candidate(name, server)) for name, server in zip("ab", pair, strict=True)]
    async with asyncio.timeout(10):
        while not leading:
            await asyncio.sleep(0.02)
    await asyncio.sleep(1)
    assert len(leading) == 1
    tasks["ab".index(leading[0])].cancel()
    async with asyncio.timeout(10):
        while len(leading) < 2:
            await asyncio.sleep(0.02)
    assert sorted(leading) == ["a", "b"]
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
