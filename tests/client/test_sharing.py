"""Equal parts of pods are kept once, and what is dropped of bound pods changes nothing for the scheduler."""

from __future__ import annotations

from typing import Any

from knarr.api.meta import deep_copy
from knarr.client import sharing
from knarr.client.sharing import Parts
from knarr.scheduler.handlers import slim_pod
from knarr.scheduler.podinfo import shape_key
from knarr.scheduler.resources import pod_requests


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


def test_the_scheduler_sees_a_slim_pod_as_it_would_see_the_whole() -> None:
    whole = _pod("one", "node")
    slim = slim_pod(deep_copy(whole))
    assert pod_requests(slim) == pod_requests(whole)
    assert shape_key({**slim, "status": {}}) == shape_key({**whole, "status": {}})
    assert [volume["name"] for volume in slim["spec"]["volumes"]] == ["data"]
    assert "env" not in slim["spec"]["containers"][0]


def test_a_pod_without_a_node_stays_whole_for_extenders() -> None:
    whole = _pod("one")
    del whole["metadata"]["managedFields"]
    assert slim_pod(_pod("one")) == whole
