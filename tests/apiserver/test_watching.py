"""Watches: order, resuming, selectors, bookmarks, slow readers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest

from knarr.api import errors
from knarr.api.resources import CONFIG_MAPS, NODES, PODS
from knarr.http.client import HTTPClient
from knarr.testing.apiserver import RunningAPIServer

PATH = "/api/v1/namespaces/default/configmaps"


def config_map(name: str, **labels: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "labels": labels}, "data": {"k": "v"}}


@contextlib.asynccontextmanager
async def watching(server: RunningAPIServer, path: str, accept: str = "application/json") -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    client = HTTPClient(server.url, ssl_context=server.client_config.ssl_context())

    async def events(lines: AsyncIterator[bytes]) -> AsyncIterator[dict[str, Any]]:
        async for line in lines:
            yield orjson.loads(line)

    try:
        async with client.stream("GET", path, {"Accept": accept}) as stream:
            assert stream.status == 200, await stream.read()
            yield events(stream.iter_lines())
    finally:
        await client.close()


async def take(events: AsyncIterator[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    out = []
    async with asyncio.timeout(5):
        while len(out) < count:
            out.append(await anext(events))
    return out


async def test_watch_without_version_begins_with_what_is_there(apiserver: RunningAPIServer) -> None:
    await apiserver.client.create(CONFIG_MAPS, config_map("a"), "default")
    async with watching(apiserver, f"{PATH}?watch=true") as events:
        await apiserver.client.create(CONFIG_MAPS, config_map("b"), "default")
        names = [(e["type"], e["object"]["metadata"]["name"]) for e in await take(events, 2)]
    assert names == [("ADDED", "a"), ("ADDED", "b")]


async def test_watch_from_a_version_shows_everything_after_it_and_deletions_have_their_own_version(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    first = await client.create(CONFIG_MAPS, config_map("a"), "default")
    second = await client.update(CONFIG_MAPS, {**first, "data": {"k": "w"}})
    await client.delete(CONFIG_MAPS, "a", "default")
    version = first["metadata"]["resourceVersion"]
    async with watching(apiserver, f"{PATH}?watch=true&resourceVersion={version}") as events:
        changed, gone = await take(events, 2)
    assert (changed["type"], changed["object"]) == ("MODIFIED", second)
    assert gone["type"] == "DELETED"
    assert int(gone["object"]["metadata"]["resourceVersion"]) > int(second["metadata"]["resourceVersion"])


async def test_object_that_leaves_the_selection_is_deleted_for_that_watcher(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    async with watching(apiserver, f"{PATH}?watch=true&labelSelector=app%3Dx") as events:
        made = await client.create(CONFIG_MAPS, config_map("a", app="x"), "default")
        left = await client.update(CONFIG_MAPS, {**made, "metadata": {**made["metadata"], "labels": {"app": "y"}}})
        await client.update(CONFIG_MAPS, {**left, "data": {"k": "unseen"}})
        back = await client.get(CONFIG_MAPS, "a", "default")
        await client.update(CONFIG_MAPS, {**back, "metadata": {**back["metadata"], "labels": {"app": "x"}}})
        found = await take(events, 3)
    assert [e["type"] for e in found] == ["ADDED", "DELETED", "ADDED"]
    assert found[1]["object"]["metadata"]["labels"] == {"app": "x"}
    assert found[1]["object"]["metadata"]["resourceVersion"] == left["metadata"]["resourceVersion"]


async def test_pods_of_one_node_are_seen_by_its_watcher_only(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await client.create(NODES, {"metadata": {"name": "n1"}})
    await client.request("POST", "/api/v1/namespaces/default/serviceaccounts", body={"metadata": {"name": "default"}})
    pod = {"metadata": {"name": "p"}, "spec": {"containers": [{"name": "c", "image": "i"}]}}
    other = "/api/v1/pods?watch=true&fieldSelector=spec.nodeName%3Dn2"
    async with watching(apiserver, "/api/v1/pods?watch=true&fieldSelector=spec.nodeName%3Dn1") as mine, watching(apiserver, other) as theirs:
        await client.create(PODS, pod, "default")
        await client.request("POST", "/api/v1/namespaces/default/pods/p/binding", body={"metadata": {"name": "p"}, "target": {"kind": "Node", "name": "n1"}})
        (event,) = await take(mine, 1)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await anext(theirs)
    assert (event["type"], event["object"]["spec"]["nodeName"]) == ("ADDED", "n1")


async def test_watch_list_ends_its_initial_objects_with_a_marked_bookmark(apiserver: RunningAPIServer) -> None:
    await apiserver.client.create(CONFIG_MAPS, config_map("a"), "default")
    query = "watch=true&sendInitialEvents=true&resourceVersionMatch=NotOlderThan&allowWatchBookmarks=true"
    async with watching(apiserver, f"{PATH}?{query}") as events:
        first, mark = await take(events, 2)
    assert first["type"] == "ADDED"
    assert (mark["type"], mark["object"]["metadata"]["annotations"]) == ("BOOKMARK", {"k8s.io/initial-events-end": "true"})


async def test_watch_ends_in_time_with_a_bookmark(apiserver: RunningAPIServer) -> None:
    async with watching(apiserver, f"{PATH}?watch=true&allowWatchBookmarks=true&timeoutSeconds=1&resourceVersion=1") as events:
        found = [event async for event in events]
    assert [event["type"] for event in found] == ["BOOKMARK"]


async def test_version_too_old_is_expired(apiserver: RunningAPIServer) -> None:
    cache = apiserver.server.registry.stores["", "configmaps"].cache
    cache.ring.clear()
    cache.ring_start = 10_000
    await apiserver.client.create(CONFIG_MAPS, config_map("a"), "default")
    with pytest.raises(errors.StatusError) as raised:
        await apiserver.client.request("GET", f"{PATH}?watch=true&resourceVersion=1")
    assert errors.is_expired(raised.value)


async def test_slow_reader_is_cut_off_and_the_others_go_on(apiserver: RunningAPIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.apiserver.watching.BUFFER_BYTES", 1 << 20)
    reader, writer = await asyncio.open_connection("127.0.0.1", apiserver.server.port, ssl=apiserver.client_config.ssl_context(), limit=1024)
    writer.write(f"GET {PATH}?watch=true HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    await reader.readuntil(b"\r\n\r\n")
    group = lambda: list(apiserver.server.registry.stores["", "configmaps"].cache.groups.values())
    assert group()
    for number in range(40):
        await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": f"big-{number}"}, "data": {"k": "v" * 900_000}}, "default")
        if not group():
            break
    assert not group()
    writer.transport.abort()


async def test_a_hundred_watchers_see_every_event_once_and_in_order(apiserver: RunningAPIServer) -> None:
    count = 50

    async def watcher() -> list[str]:
        async with watching(apiserver, f"{PATH}?watch=true&resourceVersion=1") as events:
            return [e["object"]["metadata"]["name"] for e in await take(events, count)]

    tasks = [asyncio.ensure_future(watcher()) for _ in range(100)]
    await asyncio.sleep(0.3)
    await asyncio.gather(*[apiserver.client.create(CONFIG_MAPS, config_map(f"c{i}"), "default") for i in range(count)])
    found = await asyncio.gather(*tasks)
    assert all(names == found[0] for names in found)
    assert sorted(found[0]) == sorted(f"c{i}" for i in range(count))


async def test_table_watch_names_its_columns_once(apiserver: RunningAPIServer) -> None:
    accept = "application/json;as=Table;v=v1;g=meta.k8s.io,application/json"
    async with watching(apiserver, f"{PATH}?watch=true", accept) as events:
        await apiserver.client.create(CONFIG_MAPS, config_map("a"), "default")
        await apiserver.client.create(CONFIG_MAPS, config_map("b"), "default")
        first, second = await take(events, 2)
    assert [c["name"] for c in first["object"]["columnDefinitions"]] == ["Name", "Data", "Age"]
    assert second["object"]["columnDefinitions"] is None
