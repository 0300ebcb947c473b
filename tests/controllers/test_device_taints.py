"""Devices with taints: pods leave them when their claims do not tolerate that, or not any longer; in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import orjson
import pytest

from knarr.aiokits import clock
from knarr.api.errors import StatusError
from knarr.api.resources import DEVICE_CLASSES, DEVICE_TAINT_RULES, EVENTS, NODES, PODS, RESOURCE_CLAIMS, RESOURCE_SLICES, SERVICE_ACCOUNTS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.scheduler import Scheduler
from knarr.testing.apiserver import running_apiserver
from knarr.testing.controllers import running_controllers
from tests import virtualtime

GATES = {"DRADeviceTaints": True}
DRIVER = "gpu.example.com"
NAMES = "device-taint-eviction-controller,resourceclaim-controller,serviceaccount-controller"
BROKEN = {"key": "example.com/broken", "value": "yes", "effect": "NoExecute"}


def _slice(*devices: Object) -> Object:
    spec = {"driver": DRIVER, "nodeName": "n", "pool": {"name": "n", "generation": 1, "resourceSliceCount": 1}, "devices": list(devices)}
    return {"metadata": {"name": "s"}, "spec": spec}


def _device(name: str, *taints: Object) -> Object:
    found: Object = {"name": name, "attributes": {"model": {"string": "old" if name == "d0" else "new"}}}
    return {**found, "taints": list(taints)} if taints else found


def _claim(name: str, *tolerations: Object) -> Object:
    exactly: Object = {"deviceClassName": "gpu", "selectors": [{"cel": {"expression": "device.attributes['gpu.example.com'].model == 'old'"}}]}
    request = {"name": "r", "exactly": {**exactly, **({"tolerations": list(tolerations)} if tolerations else {})}}
    return {"metadata": {"name": name}, "spec": {"devices": {"requests": [request]}}}


def _pod(name: str) -> Object:
    container = {"name": "c", "image": "i", "resources": {"claims": [{"name": "gpu"}]}}
    spec = {"containers": [container], "resourceClaims": [{"name": "gpu", "resourceClaimName": name}], "terminationGracePeriodSeconds": 0}
    return {"metadata": {"name": name}, "spec": spec}


def _rule(**selector: Any) -> Object:
    return {"metadata": {"name": "r"}, "spec": {"deviceSelector": selector, "taint": BROKEN}}


def play(story: Callable[[Client], Coroutine[Any, Any, None]], *, rules: bool = True) -> None:
    """Run a story against API server, scheduler and controllers with the gate on."""

    async def within() -> None:
        served = ("resource.k8s.io/v1alpha3",) if rules else ()
        async with running_apiserver(feature_gates=GATES, runtime_config=served) as server, running_controllers(server, NAMES, feature_gates=GATES):
            client, own = server.client, Client(server.client_config)
            scheduler = asyncio.create_task(Scheduler(own, SchedulerConfig(feature_gates=GATES)).run())
            try:
                resources = {"cpu": "4", "memory": "8Gi", "pods": "20"}
                await client.create(NODES, {"metadata": {"name": "n"}, "status": {"allocatable": resources}})
                await client.patch(NODES, "n", None, {"spec": {"taints": None}})
                await client.create(DEVICE_CLASSES, {"metadata": {"name": "gpu"}, "spec": {}})
                await until(lambda: _holds(client.list(SERVICE_ACCOUNTS, "default"), lambda found: bool(found["items"])))
                await story(client)
            finally:
                scheduler.cancel()
                await asyncio.gather(scheduler, return_exceptions=True)
                await own.close()

    virtualtime.run(within())


async def _holds(answer: Awaitable[Object], test: Callable[[Object], bool]) -> bool:
    return test(await answer)


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    deadline = clock.now() + 60
    while not await condition():
        assert clock.now() < deadline
        await asyncio.sleep(0.1)


async def exists(client: Client, name: str) -> bool:
    return any(pod["metadata"]["name"] == name for pod in (await client.list(PODS, "default"))["items"])


async def runs(client: Client, name: str, *tolerations: Object) -> None:
    """Make a claim and its pod, and wait until it is bound."""
    await client.create(RESOURCE_CLAIMS, _claim(name, *tolerations), "default")
    await client.create(PODS, _pod(name), "default")
    await until(lambda: _holds(client.get(PODS, name, "default"), lambda pod: bool(pod["spec"].get("nodeName"))))


async def told(client: Client, name: str) -> list[str]:
    await asyncio.sleep(5)
    events = (await client.list(EVENTS, "default"))["items"]
    return [one["message"] for one in events if one["reason"] == "DeviceTaintManagerEviction" and one["involvedObject"]["name"] == name]


def test_a_driver_that_taints_a_device_sends_its_pod_away_at_once() -> None:
    async def story(client: Client) -> None:
        await client.create(RESOURCE_SLICES, _slice(_device("d0"), _device("d1")))
        await runs(client, "p")
        pod = await client.get(PODS, "p", "default")
        await client.patch(PODS, "p", "default", {"metadata": {"finalizers": ["example.com/look"]}})
        await client.patch(RESOURCE_SLICES, "s", None, {"spec": _slice(_device("d0"), _device("d1", BROKEN))["spec"]})
        await asyncio.sleep(60)
        assert "deletionTimestamp" not in (await client.get(PODS, "p", "default"))["metadata"], "another device is none of its business"
        await client.patch(RESOURCE_SLICES, "s", None, {"spec": _slice(_device("d0", BROKEN))["spec"]})
        await until(lambda: _holds(client.get(PODS, "p", "default"), lambda pod: "deletionTimestamp" in pod["metadata"]))
        gone = await client.get(PODS, "p", "default")
        assert gone["metadata"]["uid"] == pod["metadata"]["uid"]
        [condition] = [one for one in gone["status"]["conditions"] if one["type"] == "DisruptionTarget"]
        assert (condition["status"], condition["reason"]) == ("True", "DeletionByDeviceTaintManager")
        assert condition["message"] == "Device Taint manager: deleting due to NoExecute taint"
        assert await told(client, "p") == ["Marking for deletion"]

    play(story, rules=False)


def test_tolerations_bound_how_long_a_pod_may_stay() -> None:
    async def story(client: Client) -> None:
        await client.create(RESOURCE_SLICES, _slice(_device("d0")))
        await runs(client, "p", {"key": BROKEN["key"], "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300})
        claim = await client.get(RESOURCE_CLAIMS, "p", "default")
        assert claim["status"]["allocation"]["devices"]["results"][0]["tolerations"][0]["tolerationSeconds"] == 300
        await client.create(DEVICE_TAINT_RULES, _rule(driver=DRIVER))
        await asyncio.sleep(290)
        assert await exists(client, "p")
        # The rule goes, so the pod stays; it comes back, and the time begins anew.
        await client.delete(DEVICE_TAINT_RULES, "r")
        await asyncio.sleep(600)
        assert await exists(client, "p")
        assert await told(client, "p") == ["Cancelling deletion"]
        start = clock.now()
        await client.create(DEVICE_TAINT_RULES, _rule(driver=DRIVER, pool="n", device="d0"))
        while await exists(client, "p"):
            await asyncio.sleep(0.5)
        assert 298 <= clock.now() - start <= 302

    play(story)


def test_rules_pick_devices_by_expressions_and_those_who_tolerate_for_ever_stay() -> None:
    async def story(client: Client) -> None:
        await client.create(RESOURCE_SLICES, _slice(_device("d0"), _device("d1")))
        await runs(client, "p", {"operator": "Exists", "effect": "NoExecute"})
        await client.create(DEVICE_TAINT_RULES, _rule(selectors=[{"cel": {"expression": "device.attributes['gpu.example.com'].model == 'old'"}}]))
        await asyncio.sleep(3600)
        assert await exists(client, "p")
        await client.delete(PODS, "p", "default", grace_period_seconds=0)
        await client.delete(RESOURCE_CLAIMS, "p", "default")
        await until(lambda: _holds(client.list(RESOURCE_CLAIMS, "default"), lambda found: not found["items"]))
        # Who does not tolerate the rule's taint is not put there, until it goes.
        await client.create(RESOURCE_CLAIMS, _claim("q"), "default")
        await client.create(PODS, _pod("q"), "default")
        await asyncio.sleep(30)
        [condition] = (await client.get(PODS, "q", "default"))["status"]["conditions"]
        assert (condition["reason"], condition["message"][:57]) == ("Unschedulable", "0/1 nodes are available: 1 cannot allocate all claims. st")
        await client.delete(DEVICE_TAINT_RULES, "r")
        await until(lambda: _holds(client.get(PODS, "q", "default"), lambda pod: bool(pod["spec"].get("nodeName"))))

    play(story)


async def test_rules_are_served_on_request_and_judged() -> None:
    async with running_apiserver() as server:
        with pytest.raises(StatusError) as refused:
            await server.client.list(DEVICE_TAINT_RULES)
        assert refused.value.code == 404
    async with running_apiserver(feature_gates=GATES, runtime_config=("resource.k8s.io/v1alpha3",)) as server:
        client = server.client
        made = await client.create(DEVICE_TAINT_RULES, _rule(driver=DRIVER))
        assert made["metadata"]["generation"] == 1
        assert made["spec"]["taint"]["timeAdded"]
        table = {"Accept": "application/json;as=Table;v=v1;g=meta.k8s.io"}
        shown = orjson.loads((await client.request("GET", DEVICE_TAINT_RULES.path(None, "r"), headers=table)).body)
        assert shown["rows"][0]["cells"][:4] == ["r", BROKEN["key"], "yes", "NoExecute"]
        bad = {"metadata": {"name": "bad"}, "spec": {"deviceSelector": {"device": "A_b", "pool": ""}, "taint": {"key": "", "effect": "Maybe"}}}
        with pytest.raises(StatusError) as refused:
            await client.create(DEVICE_TAINT_RULES, bad)
        fields = {cause["field"] for cause in refused.value.details["causes"]}
        assert fields == {"spec.deviceSelector.device", "spec.deviceSelector.pool", "spec.taint.key", "spec.taint.effect"}
        taints = [{"key": f"k{number}", "effect": "NoSchedule"} for number in range(5)]
        with pytest.raises(StatusError, match=r"spec.devices\[0\].taints: Too many: 5: must have at most 4 items"):
            await client.create(RESOURCE_SLICES, _slice(_device("d0", *taints)))
