"""What the watch cache keeps beside the bytes of its objects is bounded."""

from __future__ import annotations

import asyncio
import gc

import orjson
import pytest

from knarr.api.resources import CONFIG_MAPS
from knarr.apiserver import cache as caches
from knarr.apiserver.cache import ResourceCache
from knarr.apiserver.call import Call
from knarr.testing.apiserver import RunningAPIServer


def _value(name: str) -> bytes:
    return orjson.dumps({"kind": "Pod", "apiVersion": "v1", "metadata": {"name": name, "namespace": "d", "uid": name}, "data": "x" * 1000})


def _filled(number: int) -> ResourceCache:
    cache = ResourceCache("/registry/core/pods/")
    cache.head = b'{"kind":"Pod","apiVersion":"v1",'
    cache.publish([(f"d/{n}", _value(str(n)), n + 1) for n in range(number)])
    return cache


def test_only_so_many_objects_stay_decoded_and_the_latest_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(caches, "MEMO_BYTES", 20_000)
    cache = _filled(100)
    for cached in cache.in_order():
        assert cache.decoded(cached)["metadata"]["name"] == cached.name
    kept = [cached for cached in cache.in_order() if cached.obj is not None]
    assert sum(len(cached.item) for cached in kept) <= 20_000
    assert kept[-1] is cache.in_order()[-1]
    first = cache.in_order()[0]
    assert cache.decoded(first) is cache.decoded(first)


def test_old_events_go_although_nothing_is_written_any_more() -> None:
    cache = _filled(1000)
    assert len(cache.ring) == 1000
    cache.trim(cache.ring[-1].time + caches.RING_SECONDS + 1)
    assert len(cache.ring) == caches.RING_MINIMUM
    assert cache.events_after(cache.ring_start) == list(cache.ring)
    assert cache.events_after(cache.ring_start - 1) is None


def test_equal_labels_and_selectable_values_are_kept_once() -> None:
    cache = ResourceCache("/registry/core/pods/", ("spec.nodeName",), lambda obj: (obj["spec"]["nodeName"],))
    for n in range(caches.LABEL_SETS + 10):
        body = {"metadata": {"name": str(n), "namespace": "d", "labels": {"app": "x", "n": str(n // 2)}}, "spec": {"nodeName": f"node-{n // 2}"}}
        cache.publish([(f"d/{n}", orjson.dumps({"kind": "Pod", "apiVersion": "v1", **body}), n + 1)])
    one, two, other = (cache.objects[f"d/{n}"] for n in (0, 1, 2))
    assert one.labels is two.labels
    assert one.labels == {"app": "x", "n": "0"}
    assert other.labels == {"app": "x", "n": "1"}
    assert one.fields is not None
    assert two.fields is not None
    assert one.fields[0] is two.fields[0]
    assert len(cache._labels) <= caches.LABEL_SETS


async def test_what_a_request_has_made_goes_with_it_without_the_cycle_collector(apiserver: RunningAPIServer) -> None:
    gc.collect()
    gc.disable()
    try:
        for number in range(5):
            made = await apiserver.client.create(CONFIG_MAPS, {"metadata": {"name": f"of-{number}"}}, "default")
            await apiserver.client.update(CONFIG_MAPS, {**made, "data": {"a": "b"}})
        await asyncio.wait_for(_no_call_is_left(), 10)
    finally:
        gc.enable()


async def _no_call_is_left() -> None:
    while any(type(each) is Call for each in gc.get_objects()):
        await asyncio.sleep(0.01)
