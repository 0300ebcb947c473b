"""What was recorded of a real node's object, Lease, events and kubelet endpoints is on ours; what is not is named here with its reason."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import orjson
import pytest
import pytest_asyncio

from knarr.api.resources import EVENTS, LEASES, NODES
from knarr.http.client import HTTPClient
from tests.kubelet.conftest import Bench
from tests.kubelet.test_server import client_of, serve

_NO_RELIST = "the runtime streams its events; there is no relist of all pods with an interval or with events to discard"
REASONS = {
    "feature-gates-apiserver": "gates of upstream's programs; what is on or off here is fixed and tested with each feature",
    "feature-gates-kubelet": "as feature-gates-apiserver",
}
"""Recordings that are not replayed."""
MISSING = {
    "kubelet_evented_pleg_connection_error_count": _NO_RELIST,
    "kubelet_evented_pleg_connection_latency_seconds": _NO_RELIST,
    "kubelet_evented_pleg_connection_success_count": _NO_RELIST,
    "kubelet_pleg_discard_events": _NO_RELIST,
    "kubelet_pleg_relist_interval_seconds": _NO_RELIST,
    "kubelet_cri_losing_support": "only told of a runtime of an old version",
    "kubelet_restarted_pods_total": "a static pod that was changed has another uid and is another pod here",
    "kubelet_orphan_pod_cleaned_volumes": "volumes of unknown pods are removed once, at start, each told in the log",
    "kubelet_orphan_pod_cleaned_volumes_errors": "volumes of unknown pods are removed once, at start, each told in the log",
    "machine_nvm_avg_power_budget_watts": "hardware that the kernel of nearly no machine shows",
    "machine_nvm_capacity": "hardware that the kernel of nearly no machine shows",
    "kubelet_run_podsandbox_duration_seconds": "",
}
"""Metrics of the recording that ours does not have, with the reason."""
WHEN_IT_HAPPENS = {
    "kubelet_volume_metric_collection_duration_seconds",
    "kubelet_pod_resize_duration_milliseconds",
    "kubelet_topology_manager_admission_duration_ms",
}
"""Families that are not shown before the first time."""
CONFIG_MISSING = dict.fromkeys(
    """containerRuntimeEndpoint contentType cpuManagerReconcilePeriod enableDebugFlagsHandler enableProfilingHandler enableSystemLogQuery eventBurst
    eventRecordQPS fileCheckFrequency hairpinMode healthzBindAddress healthzPort httpCheckFrequency imageMaximumGCAge iptablesDropBit
    iptablesMasqueradeBit kubeAPIBurst kubeAPIQPS logging makeIPTablesUtilChains maxOpenFiles memorySwap memoryThrottlingFactor
    mergeDefaultEvictionSettings oomScoreAdj registryBurst registryPullQPS runtimeRequestTimeout streamingConnectionIdleTimeout syncFrequency
    volumePluginDir volumeStatsAggPeriod""".split(),
    "set the pace or the ways of a mechanism that is not here: polling, iptables, QPS limits, Go's own handlers",
)
"""Fields of the configuration that ours does not show."""


def recorded() -> dict[str, dict[str, Any]]:
    path = Path(__file__).parent / "recorded" / "node.jsonl"
    return {one["scenario"]: one for one in map(orjson.loads, path.read_bytes().splitlines())}


@pytest_asyncio.fixture
async def node(bench: Bench) -> AsyncIterator[Bench]:
    """A node with its port open and a pod."""
    await serve(bench)
    await bench.run("p", "echo one; sleep 1000", container={"resources": {"limits": {"memory": "64Mi", "cpu": "1"}}})
    await bench.until_ready("p")
    yield bench


def shape(value: Any) -> Any:
    """The recording's description of a JSON value: types at the leaves, one item of a list."""
    if isinstance(value, dict):
        return {key: shape(item) for key, item in value.items()}
    if isinstance(value, list):
        return [shape(value[0])] if value else []
    return {bool: "bool", int: "int", float: "float", str: "string"}[type(value)]


def lacks(ours: Any, theirs: Any, path: str = "") -> list[str]:
    """Paths of a recorded shape that ours does not have, or has with another type. A number may be whole or not."""
    if isinstance(theirs, dict):
        if not isinstance(ours, dict):
            return [path]
        return [found for key, item in theirs.items() for found in (lacks(ours[key], item, f"{path}.{key}") if key in ours else [f"{path}.{key}"])]
    if isinstance(theirs, list):
        return lacks(ours[0], theirs[0], path + "[]") if ours and theirs else ([path] if theirs else [])
    same = ours == theirs or {ours, theirs} <= {"int", "float"} if isinstance(ours, str) else theirs == "object"
    return [] if same else [path]


def families(page: str) -> set[str]:
    return {line.removeprefix("# TYPE ") for line in page.splitlines() if line.startswith("# TYPE ")}


async def test_the_node_object_is_as_recorded(node: Bench) -> None:
    want, have = recorded()["node-object"], await node.client.get(NODES, node.node_name)
    status = have["status"]
    arch = want["labels"]["kubernetes.io/arch"]
    for label, value in want["labels"].items():
        assert have["metadata"]["labels"][label] == (have["metadata"]["labels"]["kubernetes.io/arch"] if value == arch else node.node_name if value == "*" else value)
    kubelets = {k: v for k, v in want["annotations"].items() if "controller-managed-attach-detach" in k}
    assert kubelets.items() <= have["metadata"]["annotations"].items()
    assert have["metadata"].get("finalizers") == want["finalizers"]
    assert set(want["capacityKeys"]) - {"hugepages-1Gi", "hugepages-2Mi"} <= set(status["capacity"])
    assert sorted(status["allocatable"]) == sorted(status["capacity"])
    for name, same in want["allocatableEqualsCapacity"].items():
        if name in status["capacity"] and name != "ephemeral-storage":
            assert (status["capacity"][name] == status["allocatable"][name]) is same, name
    sizes = [int(status[kind]["memory"].removesuffix("Ki")) for kind in ("capacity", "allocatable")]
    assert sizes[0] - sizes[1] == 100 * 1024
    assert [[c["type"], c["status"], c["reason"]] for c in status["conditions"]] == want["conditions"]
    assert all(sorted(c) == want["conditionFields"] for c in status["conditions"])
    assert {a["type"] for a in status["addresses"]} == set(want["addressTypes"])
    assert lacks(shape(status["daemonEndpoints"]), shape(want["daemonEndpoints"])) == []
    assert set(want["nodeInfo"]) <= set(status["nodeInfo"]) | {"kubeProxyVersion"}
    for name in ("kubeletVersion", "operatingSystem"):
        assert status["nodeInfo"][name] == want["nodeInfo"][name]
    assert set(want["statusKeys"]) <= set(status)
    assert lacks(shape(status["images"]), want["imagesShape"]) == []


async def test_the_lease_is_as_recorded(node: Bench) -> None:
    want = recorded()["node-lease"]
    lease = await node.client.get(LEASES, node.node_name, "kube-node-lease")
    assert sorted(k for k in lease["spec"] if k != "strategy") == want["specKeys"]
    assert lease["spec"]["holderIdentity"] == node.node_name
    assert lease["spec"]["leaseDurationSeconds"] == want["leaseDurationSeconds"]
    (owner,) = lease["metadata"]["ownerReferences"]
    expected = want["ownerReferences"][0]
    assert (owner["apiVersion"], owner["kind"], owner["name"], set(owner)) == (expected["apiVersion"], expected["kind"], node.node_name, set(expected))
    assert node.kubelet is not None
    # Seen about every ten seconds on the recorded node.
    assert node.kubelet.config.lease_renew_seconds == pytest.approx(want["renewSeenAtSeconds"][-1] - want["renewSeenAtSeconds"][-2], abs=0.5)


async def test_the_events_about_the_node_are_as_recorded(node: Bench) -> None:
    want = [(kind, reason, source) for kind, reason, _, source, _ in recorded()["node-events"]["events"] if source == "kubelet"]
    # The first is of that runtime's file system figures, which come late there; the second is told on hosts of version 1 alone.
    want = [e for e in want if e[1] not in ("InvalidDiskCapacity", "CgroupV1")]
    async with asyncio.timeout(10):
        while True:
            items = (await node.client.list(EVENTS, "default"))["items"]
            found = [(e["type"], e["reason"], e["source"]["component"]) for e in items if e["involvedObject"]["kind"] == "Node"]
            if set(want) <= set(found):
                break
            await asyncio.sleep(0.05)
    assert all(e["involvedObject"]["uid"] == node.node_name for e in items if e["involvedObject"]["kind"] == "Node")


async def _get(client: HTTPClient, path: str) -> tuple[int, bytes]:
    answer = await client.request("GET", path)
    return answer.status, answer.body


async def test_the_kubelets_endpoints_are_as_recorded(node: Bench) -> None:
    client, missing = client_of(certificate=True), []
    try:
        for name, want in recorded().items():
            if not name.startswith("kubelet-endpoint-") or name in REASONS:
                continue
            status, body = await _get(client, want["path"])
            assert status == want["code"], name
            if "body" in want:
                assert body.decode() == want["body"]
            if "metrics" in want:
                ours = families(body.decode())
                missing += [f"{name}: {metric}" for metric in want["metrics"] if metric not in ours and metric.split()[0] not in MISSING.keys() | WHEN_IT_HAPPENS]
            if "kubeletconfigKeys" in want:
                have = orjson.loads(body)["kubeletconfig"]
                missing += [f"{name}: {key}" for key in want["kubeletconfigKeys"] if key not in have and key not in CONFIG_MISSING]
            if "shape" in want and "itemKeys" in want["shape"]:
                document = orjson.loads(body)
                assert (document["kind"], document["apiVersion"]) == (want["shape"]["kind"], want["shape"]["apiVersion"])
                assert all(sorted(item) == want["shape"]["itemKeys"] for item in document["items"])
            elif "shape" in want:
                missing += [f"{name}: {path}" for path in lacks(shape(orjson.loads(body)), want["shape"])]
    finally:
        await client.close()
    assert not missing, "\n".join(missing)


def test_every_recording_is_replayed_or_named() -> None:
    replayed = {"node-object", "node-lease", "node-events"}
    assert {name for name in recorded() if not name.startswith("kubelet-endpoint-")} == replayed | set(REASONS)
