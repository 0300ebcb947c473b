"""What the watch cache keeps beside the bytes of its objects is bounded."""

from __future__ import annotations

import orjson
import pytest

from knarr.apiserver import cache as caches
from knarr.apiserver.cache import ResourceCache


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
