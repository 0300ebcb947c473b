"""Informers, requests, events and leader election against a real API server."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import CONFIG_MAPS, EVENTS, EVENTS_V1, LEASES, NAMESPACES, PODS
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.informer import Informers
from knarr.client.leaderelection import LeaderElectionConfig, LeaderElector
from knarr.client.rest import Client
from knarr.testing.apiserver import RunningAPIServer


async def until(condition: Callable[[], Any | Awaitable[Any]], seconds: float = 10.0) -> None:
    async with asyncio.timeout(seconds):
        while True:
            held = condition()
            if held if not asyncio.iscoroutine(held) else await held:
                return
            await asyncio.sleep(0.01)


def _config_map(name: str, namespace: str = "default", **labels: str) -> Object:
    return {"metadata": {"name": name, "namespace": namespace, "labels": labels}, "data": {"a": "b"}}


async def test_informer_follows_the_server_and_keeps_indexes(apiserver: RunningAPIServer) -> None:
    client, informers = apiserver.client, Informers(apiserver.client)
    maps = informers.get(CONFIG_MAPS)
    assert informers.get(CONFIG_MAPS) is maps
    maps.add_index("team", lambda obj: [obj["metadata"].get("labels", {}).get("team", "")])
    seen: list[str] = []
    maps.add_handler(
        lambda obj: seen.append(f"add {obj['metadata']['name']}"),
        lambda old, new: seen.append(f"update {new['metadata']['name']}"),
        lambda obj: seen.append(f"delete {obj['metadata']['name']}"),
    )
    await client.create(CONFIG_MAPS, _config_map("before", team="x"))
    await informers.start()
    await informers.wait_synced()
    await client.create(CONFIG_MAPS, _config_map("after", team="x"))
    await until(lambda: len(maps.by_index("team", "x")) == 2)
    await client.patch(CONFIG_MAPS, "after", "default", {"metadata": {"labels": {"team": "y"}}})
    await until(lambda: [obj["metadata"]["name"] for obj in maps.by_index("team", "y")] == ["after"])
    await client.delete(CONFIG_MAPS, "before", "default")
    await until(lambda: not maps.by_index("team", "x"))
    assert [line for line in seen if line.split()[1] in ("before", "after")] == ["add before", "add after", "update after", "delete before"]
    assert maps.get_key("default/after") is maps.get("default", "after")
    late: list[Object] = []
    maps.add_handler(late.append)
    assert len(late) == len(maps)
    await informers.close()


async def test_informer_lists_again_when_its_version_has_expired(apiserver: RunningAPIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client, informers = apiserver.client, Informers(apiserver.client)
    maps = informers.get(CONFIG_MAPS, "default")
    calls: Counter[str] = Counter()
    real_watch, real_list = Client.watch, Client.list
    gate = asyncio.Event()

    async def watch(self: Client, *args: Any, **options: Any) -> Any:
        calls["watch"] += 1
        if calls["watch"] == 1:
            await gate.wait()
            raise errors.expired("too old")
        async for event in real_watch(self, *args, **options):
            yield event

    async def listing(self: Client, *args: Any, **options: Any) -> Object:
        calls["list"] += 1
        return await real_list(self, *args, **options)

    monkeypatch.setattr(Client, "watch", watch)
    monkeypatch.setattr(Client, "list", listing)
    gone = await client.create(CONFIG_MAPS, _config_map("gone"))
    await client.create(CONFIG_MAPS, _config_map("replaced"))
    deleted: list[str] = []
    maps.add_handler(on_delete=lambda obj: deleted.append(obj["metadata"]["uid"]))
    await informers.start()
    await informers.wait_synced()
    old = maps.get("default", "replaced")
    for name in ("gone", "replaced"):
        await client.delete(CONFIG_MAPS, name, "default")
    await client.create(CONFIG_MAPS, _config_map("replaced"))
    gate.set()
    await until(lambda: calls["list"] == 2 and maps.get("default", "gone") is None)
    assert old is not None
    assert set(deleted) == {gone["metadata"]["uid"], old["metadata"]["uid"]}
    await client.create(CONFIG_MAPS, _config_map("new"))
    await until(lambda: maps.get("default", "new"))
    assert calls["list"] == 2
    await informers.close()


async def test_broken_watch_resumes_without_listing(apiserver: RunningAPIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    client, informers = apiserver.client, Informers(apiserver.client)
    versions: list[str] = []
    real_watch = Client.watch

    async def watch(self: Client, *args: Any, **options: Any) -> Any:
        versions.append(options["resource_version"])
        async for event in real_watch(self, *args, **options):
            yield event
            if len(versions) == 1:
                raise ConnectionResetError

    monkeypatch.setattr(Client, "watch", watch)
    maps = informers.get(CONFIG_MAPS, "default")
    await informers.start()
    await informers.wait_synced()
    first = await client.create(CONFIG_MAPS, _config_map("one"))
    await client.create(CONFIG_MAPS, _config_map("two"))
    await until(lambda: len(maps) == 2)
    assert versions[1] == first["metadata"]["resourceVersion"]
    await informers.close()


async def test_fault_in_one_handler_does_not_stop_the_others(apiserver: RunningAPIServer, caplog: pytest.LogCaptureFixture) -> None:
    informers = Informers(apiserver.client)
    namespaces = informers.get(NAMESPACES)
    seen: list[Object] = []
    namespaces.add_handler(lambda obj: {}["fault"])
    namespaces.add_handler(seen.append)
    await informers.start()
    await informers.wait_synced()
    await until(lambda: seen)
    assert "informer handler failed" in caplog.text
    await informers.close()


async def test_selectors_and_transforms_make_informers_of_their_own(apiserver: RunningAPIServer) -> None:
    def only_names(obj: Object) -> Object:
        return {"metadata": {name: obj["metadata"][name] for name in ("name", "namespace", "resourceVersion", "uid")}}

    await apiserver.client.create(CONFIG_MAPS, _config_map("x", a="1"))
    await apiserver.client.create(CONFIG_MAPS, _config_map("y", a="2"))
    informers = Informers(apiserver.client)
    small = informers.get(CONFIG_MAPS, "default", transform=only_names, label_selector="a=1")
    named = informers.get(CONFIG_MAPS, "default", "metadata.name=y")
    await informers.start()
    await informers.wait_synced()
    assert [obj.keys() for obj in small] == [{"metadata"}]
    assert [obj["metadata"]["name"] for obj in named] == ["y"]
    await informers.close()


async def test_refusals_of_the_server_are_status_errors(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    with pytest.raises(StatusError) as caught:
        await client.get(PODS, "none", "default")
    assert errors.is_not_found(caught.value)
    assert str(caught.value) == 'pods "none" not found'
    created = await client.create(CONFIG_MAPS, _config_map("a"))
    with pytest.raises(StatusError) as caught:
        await client.create(CONFIG_MAPS, _config_map("a"))
    assert errors.is_already_exists(caught.value)
    await client.patch(CONFIG_MAPS, "a", "default", {"data": {"x": "y"}})
    with pytest.raises(StatusError) as caught:
        await client.update(CONFIG_MAPS, created)
    assert errors.is_conflict(caught.value)
    with pytest.raises(StatusError) as caught:
        await client.delete(CONFIG_MAPS, "a", "default", uid="another")
    assert errors.is_conflict(caught.value)


async def test_patches_of_every_kind(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await client.create(CONFIG_MAPS, _config_map("a"))
    await client.patch(CONFIG_MAPS, "a", "default", {"data": {"merge": "1"}})
    await client.patch(CONFIG_MAPS, "a", "default", {"data": {"strategic": "1"}}, type="strategic")
    await client.patch(CONFIG_MAPS, "a", "default", [{"op": "add", "path": "/data/json", "value": "1"}], type="json")
    applied = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a"}, "data": {"apply": "1"}}
    result = await client.patch(CONFIG_MAPS, "a", "default", applied, type="apply", field_manager="test")
    assert result["data"].keys() == {"a", "merge", "strategic", "json", "apply"}


async def test_equal_events_are_counted_and_similar_ones_combined(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    target = await client.create(CONFIG_MAPS, _config_map("target"))
    recorder = EventRecorder(client, "test-controller")
    for _ in range(3):
        recorder.event(target, "Normal", "Same", "the same")
    for number in range(14):
        recorder.event(target, "Warning", "Similar", f"failure {number}")
    await recorder.flush()
    found = {(event["reason"], event["message"]): event["count"] for event in (await client.list(EVENTS, "default"))["items"]}
    assert found["Same", "the same"] == 3
    combined = {key: count for key, count in found.items() if key[1].startswith("(combined from similar events)")}
    assert list(combined.values()) == [5]
    assert len(found) == 1 + 9 + 1
    await recorder.close()


async def test_one_object_cannot_flood_the_server_with_events(apiserver: RunningAPIServer) -> None:
    target = await apiserver.client.create(CONFIG_MAPS, _config_map("loud"))
    recorder = EventRecorder(apiserver.client, "test-controller")
    for _ in range(100):
        recorder.event(target, "Normal", "Loud", "again")
    await recorder.flush()
    (event,) = (await apiserver.client.list(EVENTS, "default"))["items"]
    assert event["count"] == 25
    await recorder.close()


async def test_of_an_object_that_is_gone_nothing_is_remembered(apiserver: RunningAPIServer) -> None:
    recorder = EventRecorder(apiserver.client, "test-controller")
    targets = [await apiserver.client.create(CONFIG_MAPS, _config_map(f"target-{number}")) for number in range(3)]
    for target in targets:
        recorder.event(target, "Normal", "Seen", "once")
        recorder.event(target, "Normal", "Seen", "twice")
        recorder.forget(target)
    recorder.event(targets[0], "Normal", "Seen", "once")
    await recorder.flush()
    assert len(recorder._memory) == 1
    events = (await apiserver.client.list(EVENTS, "default"))["items"]
    assert sorted(event["count"] for event in events) == [1] * 7
    await recorder.close()


async def test_only_the_newest_events_are_remembered(apiserver: RunningAPIServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.client.events._CACHE_ENTRIES", 6)
    recorder = EventRecorder(apiserver.client, "test-controller")
    for number in range(10):
        target = _config_map(f"target-{number}")
        recorder.event(target, "Normal", "Seen", "once")
        recorder.event(target, "Normal", "Seen", "twice")
        await recorder.flush()
    assert len(recorder._memory) == 6
    await recorder.close()


async def test_new_events_become_a_series(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    target = await client.create(CONFIG_MAPS, _config_map("target"))
    recorder = EventRecorder(client, "test-scheduler", api="events.k8s.io/v1")
    for _ in range(2):
        recorder.event(target, "Warning", "FailedScheduling", "no nodes", action="Scheduling")
    await recorder.flush()
    (event,) = (await client.list(EVENTS_V1, "default"))["items"]
    assert event["series"]["count"] == 2
    assert event["regarding"]["name"] == "target"
    await recorder.close()


async def test_standby_takes_over_when_the_leader_stops(apiserver: RunningAPIServer) -> None:
    working: list[str] = []

    async def work_as(name: str) -> None:
        working.append(name)
        try:
            await asyncio.Event().wait()
        finally:
            working.remove(name)

    def candidate(name: str) -> asyncio.Task[None]:
        config = LeaderElectionConfig("test", name, lease_seconds=2, renew_seconds=1, retry_seconds=0.1)
        return asyncio.create_task(LeaderElector(apiserver.client, config).run(lambda: work_as(name)))

    first = candidate("first")
    await until(lambda: working == ["first"])
    second = candidate("second")
    await asyncio.sleep(0.5)
    assert working == ["first"]
    first.cancel()
    await until(lambda: working == ["second"], 1.0)
    lease = await apiserver.client.get(LEASES, "test", "kube-system")
    assert (lease["spec"]["holderIdentity"], lease["spec"]["leaseTransitions"]) == ("second", 1)
    lease["spec"]["holderIdentity"] = "thief"
    await apiserver.client.update(LEASES, lease)
    await until(lambda: working == [], 3.0)
    await asyncio.wait([second])


async def test_held_lease_is_taken_only_after_it_ran_out(apiserver: RunningAPIServer) -> None:
    spec = {"holderIdentity": "dead", "leaseDurationSeconds": 1, "leaseTransitions": 4}
    await apiserver.client.create(LEASES, {"metadata": {"name": "test", "namespace": "kube-system"}, "spec": spec})
    done = asyncio.Event()

    async def work() -> None:
        done.set()

    config = LeaderElectionConfig("test", "me", lease_seconds=0.8, renew_seconds=0.5, retry_seconds=0.05)
    loop = asyncio.get_running_loop()
    started = loop.time()
    await LeaderElector(apiserver.client, config).run(work)
    assert done.is_set()
    assert loop.time() - started >= 0.8
