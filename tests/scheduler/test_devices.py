"""Devices for pods: what the search allocates, and what the scheduler makes of it with a real API server."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from knarr.api.errors import StatusError
from knarr.api.resources import (
    DEVICE_CLASSES,
    NAMESPACES,
    NODES,
    PODS,
    RESOURCE_CLAIM_TEMPLATES,
    RESOURCE_CLAIMS,
    RESOURCE_SLICES,
    SERVICE_ACCOUNTS,
)
from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.dra.allocator import Features, Search
from knarr.scheduler.dra.devices import AllocationError, Slices
from knarr.scheduler.scheduler import Scheduler
from knarr.testing.apiserver import running_apiserver

Object = dict[str, Any]
DRIVER = "gpu.example.com"


def device(name: str, *, model: str = "a", **more: Any) -> Object:
    return {"name": name, "attributes": {"model": {"string": model}, "memory": {"int": 16}}, "capacity": {"ram": {"value": "8Gi"}}, **more}


def slice_of(
    node: str, devices: list[Object], *, name: str = "", count: int = 1, generation: int = 1, pool: str = "", **spec: Any
) -> Object:
    where = spec if spec else {"nodeName": node}
    body = {
        "driver": DRIVER,
        "pool": {"name": pool or node, "generation": generation, "resourceSliceCount": count},
        "devices": devices,
        **where,
    }
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": name or f"{node}-slice"}, "spec": body}


def device_class(*expressions: str, **spec: Any) -> Object:
    selectors = [{"cel": {"expression": e}} for e in (f'device.driver == "{DRIVER}"', *expressions)]
    return {
        "apiVersion": "resource.k8s.io/v1",
        "kind": "DeviceClass",
        "metadata": {"name": "gpu"},
        "spec": {"selectors": selectors, **spec},
    }


def claim(*requests: Object, name: str = "c", **devices: Any) -> Object:
    meta = {"name": name, "namespace": "default", "uid": name}
    spec = {"devices": {"requests": list(requests), **devices}}
    return {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": meta, "spec": spec}


def exactly(name: str = "r", *expressions: str, **more: Any) -> Object:
    selectors = [{"cel": {"expression": e}} for e in expressions]
    return {"name": name, "exactly": {"deviceClassName": "gpu", **({"selectors": selectors} if selectors else {}), **more}}


def first_available(name: str, *subs: Object) -> Object:
    return {"name": name, "firstAvailable": [{"deviceClassName": "gpu", **sub} for sub in subs]}


def node(name: str = "n", **labels: str) -> Object:
    return {"metadata": {"name": name, "labels": labels}}


class Devices:
    """Slices and classes to search."""

    def __init__(self, *slices: Object, classes: Object | None = None) -> None:
        self.slices = Slices()
        for one in slices:
            self.slices.set(one)
        self.classes = {"gpu": classes or device_class()}

    def allocate(
        self, *claims: Object, on: Object | None = None, taken: tuple[str, ...] = (), pool: str = "n", features: Features | None = None
    ) -> list[Object] | None:
        features = features or Features()
        where = on or node()
        pools = self.slices.pools(where, partitionable=features.partitionable_devices)
        allocated = {(DRIVER, pool, name): 1 for name in taken}
        return Search(where, claims, pools, self.classes.get, allocated, features, time.monotonic() + 10).run()

    def names(self, *claims: Object, **options: Any) -> list[list[tuple[str, str]]] | None:
        found = self.allocate(*claims, **options)
        if found is None:
            return None
        return [[(r["request"], r["device"]) for r in allocation["devices"]["results"]] for allocation in found]


def test_the_first_free_device_that_all_selectors_pick_is_allocated_for_its_node() -> None:
    devices = Devices(slice_of("n", [device("d0", model="b"), device("d1"), device("d2")]))
    picked = exactly("r", f'device.attributes["{DRIVER}"].model == "a" && device.capacity["{DRIVER}"].ram.isGreaterThan(quantity("1Gi"))')
    assert devices.names(claim(picked), taken=("d1",)) == [[("r", "d2")]]
    [allocation] = devices.allocate(claim(picked)) or []
    assert allocation == {
        "devices": {"results": [{"request": "r", "driver": DRIVER, "pool": "n", "device": "d1"}]},
        "nodeSelector": {"nodeSelectorTerms": [{"matchFields": [{"key": "metadata.name", "operator": "In", "values": ["n"]}]}]},
    }
    assert devices.names(claim(picked), on=node("other")) is None
    assert devices.names(claim(exactly("r", 'has(device.attributes["unknown.domain"].x)'))) is None
    with pytest.raises(AllocationError, match="no such key: missing"):
        devices.names(claim(exactly("r", f'device.attributes["{DRIVER}"].missing == 1')))


def test_counts_and_everything_are_met_across_claims_or_not_at_all() -> None:
    devices = Devices(slice_of("n", [device(f"d{number}") for number in range(4)]))
    assert devices.names(claim(exactly(count=2)), claim(exactly(count=2), name="c2")) == [
        [("r", "d0"), ("r", "d1")],
        [("r", "d2"), ("r", "d3")],
    ]
    assert devices.names(claim(exactly(count=2)), claim(exactly(count=3), name="c2")) is None
    everything = exactly(allocationMode="All")
    assert devices.names(claim(everything)) == [[("r", f"d{number}") for number in range(4)]]
    assert devices.names(claim(everything), taken=("d3",)) is None
    assert devices.names(claim(exactly("r", "false", allocationMode="All"))) is None
    with pytest.raises(AllocationError, match="exceeds the claim limit of 32"):
        devices.names(claim(exactly(count=33)))


def test_earlier_choices_are_taken_back_when_later_requests_need_the_device() -> None:
    devices = Devices(slice_of("n", [device("small"), device("large", model="b")]))
    wants_large = exactly("second", f'device.attributes["{DRIVER}"].model == "b"')
    reverse = Devices(slice_of("n", [device("large", model="b"), device("small")]))
    assert devices.names(claim(exactly("first"), wants_large)) == [[("first", "small"), ("second", "large")]]
    assert reverse.names(claim(exactly("first"), wants_large)) == [[("first", "small"), ("second", "large")]]


def test_a_constraint_gives_devices_that_share_an_attribute() -> None:
    numa = [device(f"d{number}", attributes={"numa": {"int": number % 2}}) for number in range(4)]
    same = {"constraints": [{"matchAttribute": f"{DRIVER}/numa"}]}
    devices = Devices(slice_of("n", numa))
    assert devices.names(claim(exactly("a"), exactly("b"), **same)) == [[("a", "d0"), ("b", "d2")]]
    assert devices.names(claim(exactly("a"), exactly("b"), **same), taken=("d0",)) == [[("a", "d1"), ("b", "d3")]]
    assert devices.names(claim(exactly("a"), exactly("b"), **same), taken=("d0", "d1")) is None
    only_b = {"constraints": [{"matchAttribute": f"{DRIVER}/numa", "requests": ["b"]}]}
    assert devices.names(claim(exactly("a"), exactly("b"), **only_b)) == [[("a", "d0"), ("b", "d1")]]
    with pytest.raises(AllocationError, match="because a claim constraint would not be satisfied"):
        devices.names(claim(exactly(allocationMode="All"), **same))


def test_alternatives_are_tried_in_order_and_bring_their_configuration() -> None:
    devices = Devices(slice_of("n", [device("d0", model="b"), device("d1")]), classes=device_class(config=[{"opaque": {"driver": DRIVER}}]))
    best = {"name": "best", "selectors": [{"cel": {"expression": f'device.attributes["{DRIVER}"].model == "z"'}}]}
    pair = {"name": "pair", "count": 2}
    one = {"name": "one"}
    config = [{"requests": [name], "opaque": {"driver": DRIVER, "parameters": {"for": name}}} for name in ("r/pair", "r/one", "r", "x")]
    wanted = claim(first_available("r", best, pair, one), config=config)
    assert devices.names(wanted) == [[("r/pair", "d0"), ("r/pair", "d1")]]
    assert devices.names(wanted, taken=("d0",)) == [[("r/one", "d1")]]
    [allocation] = devices.allocate(wanted, taken=("d0",)) or []
    found = allocation["devices"]["config"]
    assert [(c["source"], c.get("requests")) for c in found] == [("FromClass", None), ("FromClaim", ["r/one"]), ("FromClaim", ["r"])]


def test_admin_access_looks_at_devices_that_others_use() -> None:
    devices = Devices(slice_of("n", [device("d0"), device("d1")]))
    [allocation] = devices.allocate(claim(exactly(allocationMode="All", adminAccess=True)), taken=("d0", "d1")) or []
    assert [(r["device"], r["adminAccess"]) for r in allocation["devices"]["results"]] == [("d0", True), ("d1", True)]


def test_pools_count_in_their_newest_generation_and_only_when_whole() -> None:
    old = slice_of("n", [device("old")], name="s1", generation=1)
    new = slice_of("n", [device("new")], name="s2", generation=2, count=2)
    devices = Devices(old, new)
    assert devices.names(claim(exactly())) == [[("r", "new")]]
    with pytest.raises(AllocationError, match="n is currently being updated"):
        devices.names(claim(exactly(allocationMode="All")))
    devices.slices.set(slice_of("n", [device("new")], name="s3", generation=2, count=2))
    with pytest.raises(AllocationError, match="pool n is invalid: duplicate device name new"):
        devices.names(claim(exactly()))


def test_devices_reached_over_the_network_select_their_nodes_by_label() -> None:
    selector = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "rack", "operator": "In", "values": ["r1"]}]}]}
    devices = Devices(slice_of("", [device("d0")], name="net", pool="n", nodeSelector=selector))
    assert devices.allocate(claim(exactly()), on=node("n", rack="r2")) is None
    [allocation] = devices.allocate(claim(exactly()), on=node("n", rack="r1")) or []
    assert allocation["nodeSelector"] == selector
    everywhere = Devices(slice_of("", [device("d0")], name="net", pool="n", allNodes=True))
    [allocation] = everywhere.allocate(claim(exactly())) or []
    assert "nodeSelector" not in allocation


def test_taints_and_shared_counters_count_when_their_gates_are_on() -> None:
    on = Features(device_taints=True, partitionable_devices=True)
    taint = {"key": "broken", "value": "yes", "effect": "NoSchedule"}
    tainted = Devices(slice_of("n", [device("d0", taints=[taint])]))
    tolerant = exactly(tolerations=[{"key": "broken", "operator": "Exists"}])
    assert tainted.names(claim(exactly())) == [[("r", "d0")]]
    assert tainted.names(claim(exactly()), features=on) is None
    assert tainted.names(claim(tolerant), features=on) == [[("r", "d0")]]
    part = [{"counterSet": "whole", "counters": {"memory": {"value": "4Gi"}}}]
    half = [device(f"half{number}", consumesCounters=part) for number in range(3)]
    shared = [{"name": "whole", "counters": {"memory": {"value": "8Gi"}}}]
    parts = Devices(slice_of("n", half, nodeName="n", sharedCounters=shared))
    assert parts.names(claim(exactly())) is None
    assert parts.names(claim(exactly(count=2)), features=on) == [[("r", "half0"), ("r", "half1")]]
    assert parts.names(claim(exactly(count=3)), features=on) is None
    assert parts.names(claim(exactly(count=2)), taken=("half1",), features=on) is None
    assert parts.names(claim(exactly()), taken=("half1",), features=on) == [[("r", "half0")]]


# With an API server.


async def _wait(client: Client, what: Any) -> Any:
    async with asyncio.timeout(20):
        while not (found := await what()):
            await asyncio.sleep(0.02)
    return found


async def _node(client: Client, name: str) -> None:
    resources = {"cpu": "4", "memory": "8Gi", "pods": "20"}
    await client.create(NODES, {"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}, "status": {"allocatable": resources}})
    await client.patch(NODES, name, None, {"spec": {"taints": None}})


def _pod(name: str, **entry: str) -> Object:
    container = {"name": "c", "image": "i", "resources": {"claims": [{"name": "gpu"}]}}
    spec = {"containers": [container], "resourceClaims": [{"name": "gpu", **entry}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "namespace": "default"}, "spec": spec}


@pytest.mark.timeout(60)
async def test_pods_with_claims_are_bound_to_the_nodes_of_their_devices_which_come_back_after_them() -> None:
    async with running_apiserver() as server:
        clients = [Client(server.client_config) for _ in range(2)]
        client = server.client
        controllers = ControllerManager(
            clients[0], ControllersConfig(enabled="resourceclaim-controller,serviceaccount-controller,namespace-controller")
        )
        tasks = [asyncio.create_task(Scheduler(clients[1], SchedulerConfig()).run()), asyncio.create_task(controllers.run())]

        async def pod(name: str) -> Object:
            return await client.get(PODS, name, "default")

        async def bound(name: str) -> Any:
            return (await pod(name))["spec"].get("nodeName")

        async def refused(name: str) -> Any:
            return [c["message"] for c in (await pod(name)).get("status", {}).get("conditions") or () if c["status"] == "False"]

        try:
            for name in ("n1", "n2"):
                await _node(client, name)
            await client.create(DEVICE_CLASSES, device_class())
            await client.create(RESOURCE_SLICES, slice_of("n2", [device("d0"), device("d1")]))
            template = {"metadata": {"name": "t", "namespace": "default"}, "spec": {"spec": {"devices": {"requests": [exactly()]}}}}
            await client.create(RESOURCE_CLAIM_TEMPLATES, template)
            await _wait(client, lambda: _has_account(client))
            shared = claim(exactly(), name="shared")
            await client.create(PODS, _pod("early", resourceClaimName="shared"))
            await client.create(PODS, _pod("own", resourceClaimTemplateName="t"))
            assert await _wait(client, lambda: bound("own")) == "n2"
            del shared["metadata"]["uid"]
            await client.create(RESOURCE_CLAIMS, shared)
            assert await _wait(client, lambda: bound("early")) == "n2"
            await client.create(PODS, _pod("second-user", resourceClaimName="shared"))
            assert await _wait(client, lambda: bound("second-user")) == "n2"
            written = await client.get(RESOURCE_CLAIMS, "shared", "default")
            assert sorted(user["name"] for user in written["status"]["reservedFor"]) == ["early", "second-user"]
            assert written["metadata"]["finalizers"] == ["resource.kubernetes.io/delete-protection"]
            await client.create(PODS, _pod("late", resourceClaimTemplateName="t"))
            [message] = await _wait(client, lambda: refused("late"))
            assert message.startswith(
                "0/2 nodes are available: 2 cannot allocate all claims. still not schedulable, preemption: 0/2 nodes are"
            )
            await client.delete(PODS, "own", "default", grace_period_seconds=0)
            assert await _wait(client, lambda: bound("late")) == "n2"
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for one in clients:
                await one.close()


async def _has_account(client: Client) -> bool:
    return bool((await client.list(SERVICE_ACCOUNTS, "default"))["items"])


@pytest.mark.timeout(60)
async def test_admin_access_is_for_marked_namespaces_and_fields_behind_gates_are_dropped() -> None:
    async with running_apiserver() as server:
        client = server.client
        wanted = claim(exactly(adminAccess=True, tolerations=[{"operator": "Exists"}]), name="admin")
        del wanted["metadata"]["uid"]
        with pytest.raises(
            StatusError, match=r"requires the `resource\.kubernetes\.io/admin-access: true` label on the containing namespace"
        ):
            await client.create(RESOURCE_CLAIMS, wanted)
        await client.patch(NAMESPACES, "default", None, {"metadata": {"labels": {"resource.kubernetes.io/admin-access": "true"}}})
        made = await client.create(RESOURCE_CLAIMS, wanted)
        assert made["spec"]["devices"]["requests"][0]["exactly"]["adminAccess"] is True
        assert made["spec"]["devices"]["requests"][0]["exactly"]["tolerations"] == [{"operator": "Exists"}]
        result = {"request": "r", "driver": DRIVER, "pool": "n", "device": "d0", "adminAccess": True}
        allocated = {**made, "status": {"allocation": {"devices": {"results": [result]}}}}
        await client.patch(NAMESPACES, "default", None, {"metadata": {"labels": {"resource.kubernetes.io/admin-access": None}}})
        with pytest.raises(StatusError, match=r"status\.allocation\.devices\.results\[0\]\.adminAccess"):
            await client.update(RESOURCE_CLAIMS, allocated, subresource="status")
        taint = {"key": "k", "effect": "NoSchedule"}
        stored = await client.create(RESOURCE_SLICES, slice_of("n", [device("d0", taints=[taint], allowMultipleAllocations=True)]))
        assert sorted(stored["spec"]["devices"][0]) == ["attributes", "capacity", "name"]
