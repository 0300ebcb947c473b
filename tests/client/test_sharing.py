"""Equal parts of pods are kept once, what is dropped of pods changes nothing for their readers, and informers of one family keep them once."""

from __future__ import annotations

import asyncio
import tracemalloc
from typing import Any

import orjson

from knarr.api.encode import trimmed
from knarr.api.meta import deep_copy
from knarr.api.resources import CONFIG_MAPS
from knarr.client import sharing
from knarr.client.informer import Family, Informers
from knarr.client.leanpods import lean_pod, pod_ips
from knarr.client.sharing import Parts
from knarr.controllers.context import trim_to_metadata
from knarr.scheduler.podinfo import shape_key
from knarr.scheduler.resources import pod_requests
from knarr.testing.apiserver import running_apiserver


def _pod(name: str, node: str = "") -> dict[str, Any]:
    container = {"name": "main", "image": "x:1", "resources": {"requests": {"cpu": "1"}}, "env": [{"name": "A", "value": "b"}], "ports": [{"hostPort": 80}]}
    sidecar = {"name": "side", "image": "y:1", "restartPolicy": "Always", "resources": {"requests": {"cpu": "2"}}}
    volumes = [{"name": f"token-{name}", "projected": {"sources": []}}, {"name": "data", "persistentVolumeClaim": {"claimName": "c"}}]
    spec: dict[str, Any] = {"containers": [container], "initContainers": [sidecar], "volumes": volumes, "tolerations": [{"operator": "Exists"}]}
    resized = [{"name": "main", "image": "x:1", "resources": {"requests": {"cpu": "3"}}, "allocatedResources": {"cpu": "3"}, "state": {"running": {}}}]
    conditions = [{"type": "Ready", "status": "True"}, {"type": "PodScheduled", "status": "True"}]
    if node:
        spec["nodeName"] = node
    metadata = {"name": name, "namespace": "default", "uid": name, "labels": {"app": "x"}, "managedFields": []}
    return {"metadata": metadata, "spec": spec, "status": {"phase": "Running", "conditions": conditions, "containerStatuses": resized}}


def test_equal_parts_are_one_and_others_stay_themselves() -> None:
    parts = Parts()
    one, two = parts.pod(_pod("one")), parts.pod(_pod("two"))
    assert one["metadata"]["labels"] is two["metadata"]["labels"]
    assert one["spec"]["containers"] is two["spec"]["containers"]
    assert one["status"]["conditions"] is two["status"]["conditions"]
    assert (one, two) == (_pod("one"), _pod("two"))


def test_the_number_of_known_parts_is_bounded() -> None:
    parts = Parts()
    for number in range(sharing.MAXIMUM_PARTS + 10):
        parts.one({"n": number})
    assert len(parts._known) <= sharing.MAXIMUM_PARTS


def test_the_scheduler_sees_a_lean_pod_as_it_would_see_the_whole() -> None:
    whole = _pod("one", "node")
    lean = lean_pod(deep_copy(whole))
    assert pod_requests(lean) == pod_requests(whole)
    assert shape_key({**lean, "status": {}}) == shape_key({**whole, "status": {}})
    assert [volume["name"] for volume in lean["spec"]["volumes"]] == ["data"]
    assert "env" not in lean["spec"]["containers"][0]


def test_lean_pods_of_one_workload_share_all_but_who_and_where_they_are() -> None:
    one, two = (lean_pod(_pod(name, "node")) for name in ("one", "two"))
    for group, name in (("spec", "containers"), ("spec", "tolerations"), ("status", "conditions"), ("status", "containerStatuses")):
        assert one[group][name] is two[group][name]
    assert one["metadata"] == {"name": "one", "namespace": "default", "uid": "one", "labels": {"app": "x"}}


def test_the_only_address_of_a_pod_is_kept_once_and_read_from_either_field() -> None:
    for status, wanted in (
        ({}, []),
        ({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}, ["10.0.0.1"]),
        ({"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}]}, ["10.0.0.1", "fd00::1"]),
    ):
        pod = {"metadata": {"name": "one"}, "spec": {}, "status": status}
        assert pod_ips(deep_copy(pod)) == pod_ips(lean_pod(deep_copy(pod))) == wanted
    assert "podIPs" not in lean_pod({"metadata": {}, "spec": {}, "status": {"podIP": "10.0.0.1", "podIPs": [{"ip": "10.0.0.1"}]}})["status"]


async def test_informers_of_a_family_keep_one_object_between_them_and_part_when_one_closes() -> None:
    family = Family()
    async with running_apiserver() as server:
        await server.client.create(CONFIG_MAPS, {"metadata": {"name": "one"}}, "default")
        first, second = Informers(server.client, family), Informers(server.client, family)
        stranger = Informers(server.client)
        one, two, other = (each.get(CONFIG_MAPS, "default", transform=trim_to_metadata) for each in (first, second, stranger))
        for each in (first, second, stranger):
            await each.start()
            await each.wait_synced()
        assert one.get("default", "one") is two.get("default", "one")
        assert one.get("default", "one") == other.get("default", "one")
        assert one.get("default", "one") is not other.get("default", "one")
        await first.close()
        seen = asyncio.Event()
        two.add_handler(on_update=lambda _old, _new: seen.set())
        await server.client.patch(CONFIG_MAPS, "one", "default", {"metadata": {"labels": {"a": "b"}}})
        await asyncio.wait_for(seen.wait(), 10)
        assert two.get("default", "one")["metadata"]["labels"] == {"a": "b"}
        assert "labels" not in one.get("default", "one")["metadata"]
        await second.close()
        await stranger.close()


def test_what_is_kept_of_encoded_json_is_no_longer_than_its_text() -> None:
    value = {"a": "x" * 3000}
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        kept = [trimmed(orjson.dumps(value)) for _ in range(50)]
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert kept[0] == orjson.dumps(value)
    assert used < 50 * 3200
