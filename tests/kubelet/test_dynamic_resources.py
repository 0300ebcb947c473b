"""A driver of dynamic resources over real sockets: prepared before the pod starts, seen in its containers, taken back after it."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from knarr.api.resources import EVENTS, PODS, RESOURCE_CLAIMS, RESOURCE_SLICES
from tests.kubelet.conftest import Bench
from tests.kubelet.test_plugins import FakePlugin, registration

DRIVER = "test-driver.example.com"


class Driver(FakePlugin):
    """Prepares a claim by writing a CDI specification with one device per claim, as real drivers do."""

    def __init__(self, folder: Path, cdi: Path) -> None:
        self._cdi = cdi
        self.failing = ""
        calls = {
            "NodePrepareResources": ("NodePrepareResourcesRequest", "NodePrepareResourcesResponse", self._prepare),
            "NodeUnprepareResources": ("NodeUnprepareResourcesRequest", "NodeUnprepareResourcesResponse", self._unprepare),
        }
        super().__init__(folder / "dra.sock", {"k8s.io.kubelet.pkg.apis.dra.v1.DRAPlugin": calls})

    def path(self, uid: str) -> Path:
        return self._cdi / f"{DRIVER}-{uid}.json"

    def _prepare(self, message: Any) -> Any:
        answers = {}
        for claim in message["claims"]:
            if self.failing:
                answers[claim["uid"]] = {"error": self.failing}
                continue
            device = {"name": claim["uid"], "containerEdits": {"env": [f"CLAIM_{claim['name']}=prepared"]}}
            spec = {"cdiVersion": "0.6.0", "kind": f"{DRIVER}/claim", "devices": [device]}
            self.path(claim["uid"]).write_text(json.dumps(spec))
            name = f"{DRIVER}/claim={claim['uid']}"
            answers[claim["uid"]] = {"devices": [{"request_names": ["r"], "pool_name": "p", "device_name": "d0", "cdi_device_ids": [name]}]}
        return {"claims": answers}

    def _unprepare(self, message: Any) -> Any:
        for claim in message["claims"]:
            self.path(claim["uid"]).unlink(missing_ok=True)
        return {"claims": {claim["uid"]: {} for claim in message["claims"]}}

    def count(self, method: str) -> int:
        return sum(name == method for name, _ in self.calls)


class Place:
    """A kubelet with the driver registered."""

    def __init__(self, bench: Bench, driver: Driver, register: FakePlugin) -> None:
        self.bench, self.driver, self.register = bench, driver, register

    async def claim(self, name: str, *pods: Any) -> str:
        """An allocated claim; gives its uid."""
        spec = {"devices": {"requests": [{"name": "r", "exactly": {"deviceClassName": "any"}}]}}
        body = {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceClaim", "metadata": {"name": name, "namespace": "test"}, "spec": spec}
        made = await self.bench.client.create(RESOURCE_CLAIMS, body)
        result = {"request": "r", "driver": DRIVER, "pool": "p", "device": "d0"}
        status = {"allocation": {"devices": {"results": [result]}}}
        await self.bench.client.update(RESOURCE_CLAIMS, {**made, "status": status}, subresource="status")
        return str(made["metadata"]["uid"])

    async def reserve(self, name: str, pod: Any) -> None:
        claim = await self.bench.client.get(RESOURCE_CLAIMS, name, "test")
        user = {"resource": "pods", "name": pod["metadata"]["name"], "uid": pod["metadata"]["uid"]}
        status = {**claim["status"], "reservedFor": [*(claim["status"].get("reservedFor") or []), user]}
        await self.bench.client.update(RESOURCE_CLAIMS, {**claim, "status": status}, subresource="status")

    async def pod(self, name: str, claim: str) -> Any:
        command = ["sh", "-c", "env | grep ^CLAIM_ > /dev/termination-log; sleep 1000 & wait"]
        container = {"name": "c", "image": "busybox", "command": command, "resources": {"claims": [{"name": "gpu"}]}}
        spec = {
            "containers": [container],
            "resourceClaims": [{"name": "gpu", "resourceClaimName": claim}],
            "terminationGracePeriodSeconds": 1,
        }
        made = await self.bench.create({"metadata": {"name": name}, "spec": {**spec, "nodeName": None}})
        await self.reserve(claim, made)
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": {"kind": "Node", "name": "node-under-test"}}
        await self.bench.client.create(PODS, binding, "test", name=name, subresource="binding")
        return made

    async def running(self, name: str) -> None:
        await self.until(lambda: self._is(name, "Running"))

    async def _is(self, name: str, phase: str) -> bool:
        return bool((await self.bench.client.get(PODS, name, "test"))["status"].get("phase") == phase)

    async def until(self, condition: Any) -> None:
        async with asyncio.timeout(20):
            while not await condition():
                await asyncio.sleep(0.02)


@pytest_asyncio.fixture
async def place(bench: Bench, tmp_path: Path) -> AsyncIterator[Place]:
    cdi = Path("/var/run/cdi")
    existed = cdi.is_dir()
    cdi.mkdir(parents=True, exist_ok=True)
    registry = bench.folder / "kubelet" / "plugins_registry"
    registry.mkdir(parents=True, exist_ok=True)
    driver = Driver(tmp_path, cdi)
    # A name as long as those of plugins that are updated in place: too long for the address of a socket.
    folder = os.open(registry, os.O_PATH)
    socket = Path(f"/proc/self/fd/{folder}/{DRIVER}-{'x' * 50}-reg.sock")
    register = FakePlugin(socket, {"pluginregistration.Registration": registration("DRAPlugin", DRIVER, driver.socket, "v1.DRAPlugin")})
    await driver.start()
    await register.start()
    place = Place(bench, driver, register)

    async def known() -> bool:
        return register.calls[-1:] == [("NotifyRegistrationStatus", {"plugin_registered": True})]

    try:
        await place.until(known)
        yield place
    finally:
        await register.stop()
        await driver.stop()
        os.close(folder)
        for path in cdi.glob(f"{DRIVER}-*"):
            path.unlink()
        if not existed:
            cdi.rmdir()


@pytest.mark.timeout(60)
async def test_a_claim_is_prepared_once_for_all_its_pods_and_taken_back_after_the_last_even_over_a_restart(place: Place) -> None:
    bench, driver = place.bench, place.driver
    uid = await place.claim("shared")
    for name in ("one", "two"):
        await place.pod(name, "shared")
        await place.running(name)
    assert driver.count("NodePrepareResources") == 1
    assert driver.calls[0][1] == {"claims": [{"namespace": "test", "uid": uid, "name": "shared"}]}
    log = await _environment(bench, "one")
    assert log == "CLAIM_shared=prepared\n"

    await bench.restart()
    await bench.client.delete(PODS, "one", "test")
    await place.until(lambda: _gone(bench, "one"))
    assert driver.count("NodeUnprepareResources") == 0
    assert driver.path(uid).exists()
    await bench.client.delete(PODS, "two", "test")
    await place.until(lambda: _gone(bench, "two"))
    assert driver.count("NodePrepareResources") == 1
    assert driver.count("NodeUnprepareResources") == 1
    assert not driver.path(uid).exists()
    assert json.loads((bench.folder / "kubelet" / "dra_manager_state").read_text())["claims"] == []


@pytest.mark.timeout(60)
async def test_a_pod_waits_with_an_event_while_its_driver_refuses_or_its_claim_is_not_its_own(place: Place) -> None:
    bench, driver = place.bench, place.driver
    driver.failing = "device is on fire"
    await place.claim("c")
    await place.pod("p", "c")

    async def told() -> bool:
        events = (await bench.client.list(EVENTS, "test"))["items"]
        return any(
            e["reason"] == "FailedPrepareDynamicResources"
            and e["message"]
            == "Failed to prepare dynamic resources: prepare dynamic resources: NodePrepareResources failed for ResourceClaim c: device is on fire"
            for e in events
        )

    await place.until(told)
    assert (await bench.client.get(PODS, "p", "test"))["status"]["phase"] == "Pending"
    driver.failing = ""
    await place.running("p")


@pytest.mark.timeout(60)
async def test_a_starting_kubelet_takes_its_devices_off_offer_until_drivers_publish_them_again(bench: Bench) -> None:
    for node in ("node-under-test", "other"):
        pool = {"name": node, "generation": 1, "resourceSliceCount": 1}
        body = {"driver": DRIVER, "nodeName": node, "pool": pool, "devices": [{"name": "d"}]}
        await bench.client.create(
            RESOURCE_SLICES, {"apiVersion": "resource.k8s.io/v1", "kind": "ResourceSlice", "metadata": {"name": node}, "spec": body}
        )
    await bench.restart()
    async with asyncio.timeout(10):
        while len(left := (await bench.client.list(RESOURCE_SLICES))["items"]) > 1:
            await asyncio.sleep(0.02)
    assert [one["metadata"]["name"] for one in left] == ["other"]


async def _gone(bench: Bench, name: str) -> bool:
    return name not in {pod["metadata"]["name"] for pod in (await bench.client.list(PODS, "test"))["items"]}


async def _environment(bench: Bench, name: str) -> str:
    uid = (await bench.client.get(PODS, name, "test"))["metadata"]["uid"]
    folder = bench.folder / "kubelet" / "pods" / uid / "containers" / "c"
    async with asyncio.timeout(10):
        while True:
            for entry in os.scandir(folder):
                text = Path(entry.path).read_text()
                if text:
                    return text
            await asyncio.sleep(0.02)
