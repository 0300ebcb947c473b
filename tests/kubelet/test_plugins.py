"""CSI drivers and device plugins over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import inspect
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
import pytest_asyncio

from knarr.api.resources import (
    CSI_DRIVERS,
    CSI_NODES,
    EVENTS,
    NODES,
    PERSISTENT_VOLUME_CLAIMS,
    PERSISTENT_VOLUMES,
    PODS,
    VOLUME_ATTACHMENTS,
)
from knarr.kubelet.affinity.manager import Affinity
from knarr.kubelet.config import KubeletConfig
from knarr.kubelet.plugins import wire
from knarr.kubelet.plugins.devices import DeviceManager, _Resource
from knarr.kubelet.volumes import mounts
from tests.kubelet.conftest import Bench
from tests.kubelet.test_affinity import make_machine


class FakePlugin:
    """A gRPC server that answers by a table of (request message, answer message, function)."""

    def __init__(self, socket: Path, services: dict[str, dict[str, tuple[str, str, Any]]]) -> None:
        self.socket = socket
        self.calls: list[tuple[str, Any]] = []
        self.faults: dict[str, str] = {}
        """Method to the code with which it fails."""
        self._server = grpc.aio.server()
        for service, methods in services.items():
            handlers = {name: self._handler(name, *entry) for name, entry in methods.items()}
            self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(service, handlers)])

    def _handler(self, name: str, request: str, answer: str, function: Any) -> Any:
        if name == "ListAndWatch":

            async def stream(data: bytes, context: Any) -> AsyncIterator[bytes]:
                yield wire.encode(answer, function({}))
                await asyncio.sleep(3600)

            return grpc.unary_stream_rpc_method_handler(stream)

        async def unary(data: bytes, context: Any) -> bytes:
            message = wire.decode(request, data)
            self.calls.append((name, message))
            if name in self.faults:
                await context.abort(grpc.StatusCode[self.faults[name]], "told to fail")
            result = function(message)
            return wire.encode(answer, (await result if inspect.isawaitable(result) else result) or {})

        return grpc.unary_unary_rpc_method_handler(unary)

    async def start(self) -> None:
        self._server.add_insecure_port(f"unix://{self.socket}")
        await self._server.start()

    async def stop(self) -> None:
        await self._server.stop(0)


def registration(kind: str, name: str, endpoint: Path, version: str) -> dict[str, tuple[str, str, Any]]:
    info = {"type": kind, "name": name, "endpoint": str(endpoint), "supported_versions": [version]}
    return {
        "GetInfo": ("Empty", "PluginInfo", lambda m: info),
        "NotifyRegistrationStatus": ("RegistrationStatus", "Empty", lambda m: None),
    }


class CSIDriver(FakePlugin):
    """Serves directories of one folder as volumes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.endpoint = endpoint = folder / "csi.sock"
        """Where it says that it is."""
        node = {
            "NodeGetInfo": ("Empty", "NodeGetInfoResponse", lambda m: {"node_id": "n1", "max_volumes_per_node": 7, "accessible_topology": {"segments": {"topology.test/zone": "a"}}}),
            "NodeGetCapabilities": ("Empty", "NodeGetCapabilitiesResponse", lambda m: {"capabilities": [{"rpc": {"type": 1}}, {"rpc": {"type": 3}}]}),
            "NodeStageVolume": ("NodeStageVolumeRequest", "Empty", lambda m: None),
            "NodeUnstageVolume": ("NodeUnstageVolumeRequest", "Empty", lambda m: None),
            "NodeExpandVolume": ("NodeExpandVolumeRequest", "NodeExpandVolumeResponse", lambda m: {"capacity_bytes": m["capacity_range"]["required_bytes"]}),
            "NodePublishVolume": ("NodePublishVolumeRequest", "Empty", self._publish),
            "NodeUnpublishVolume": ("NodeUnpublishVolumeRequest", "Empty", self._unpublish),
        }
        super().__init__(endpoint, {"csi.v1.Node": node})

    def _publish(self, message: Any) -> Any:
        source = self.folder / message["volume_id"]
        source.mkdir(exist_ok=True)
        os.makedirs(message["target_path"])
        mounts.bind(str(source), message["target_path"])

    def _unpublish(self, message: Any) -> None:
        if os.path.isdir(message["target_path"]):
            mounts.unmount(message["target_path"])
            os.rmdir(message["target_path"])


@contextlib.asynccontextmanager
async def registered(bench: Bench, csi: CSIDriver) -> AsyncIterator[None]:
    """The driver serves, and the kubelet knows it as test.csi."""
    await csi.start()
    register = FakePlugin(
        bench.folder / "kubelet" / "plugins_registry" / "test.csi-reg.sock",
        {"pluginregistration.Registration": registration("CSIPlugin", "test.csi", csi.endpoint, "1.0.0")},
    )
    await register.start()
    try:
        async with asyncio.timeout(10):
            while not any(c[0] == "NotifyRegistrationStatus" for c in register.calls):
                await asyncio.sleep(0.02)
        assert register.calls[-1][1] == {"plugin_registered": True}
        yield
    finally:
        await register.stop()
        await csi.stop()


@pytest_asyncio.fixture
async def driver(bench: Bench) -> AsyncIterator[CSIDriver]:
    folder = bench.folder / "driver"
    folder.mkdir()
    csi = CSIDriver(folder)
    async with registered(bench, csi):
        yield csi


async def test_a_csi_volume_is_staged_published_and_taken_back(bench: Bench, driver: CSIDriver) -> None:
    client = bench.client
    node = await client.get(CSI_NODES, bench.node_name)
    assert node["spec"]["drivers"] == [{"name": "test.csi", "nodeID": "n1", "topologyKeys": ["topology.test/zone"], "allocatable": {"count": 7}}]
    assert (await client.get(NODES, bench.node_name))["metadata"]["labels"]["topology.test/zone"] == "a"
    spec = {"attachRequired": False, "podInfoOnMount": True}
    await client.create(CSI_DRIVERS, {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "test.csi"}, "spec": spec})
    shared = {"accessModes": ["ReadWriteOnce"], "storageClassName": ""}
    claim = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c", "namespace": bench.namespace}}
    claim["spec"] = {**shared, "resources": {"requests": {"storage": "1Gi"}}, "volumeName": "v"}
    claim = await client.create(PERSISTENT_VOLUME_CLAIMS, claim, bench.namespace)
    reference = {"kind": "PersistentVolumeClaim", "name": "c", "namespace": bench.namespace, "uid": claim["metadata"]["uid"]}
    source = {"driver": "test.csi", "volumeHandle": "h1", "volumeAttributes": {"x": "y"}}
    volume = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "v"}}
    volume["spec"] = {**shared, "capacity": {"storage": "1Gi"}, "csi": source, "claimRef": reference}
    await client.create(PERSISTENT_VOLUMES, volume)
    status = {"phase": "Bound", "accessModes": ["ReadWriteOnce"], "capacity": {"storage": "1Gi"}}
    await client.patch(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace, {"status": status}, type="merge", subresource="status")

    await bench.run(
        "p",
        "echo data > /v/file; sleep 1000",
        container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]},
        volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}],
    )
    await bench.until_ready("p")
    async with asyncio.timeout(5):
        while not (driver.folder / "h1" / "file").exists():
            await asyncio.sleep(0.02)
    published = next(m for n, m in driver.calls if n == "NodePublishVolume")
    assert published["volume_context"]["csi.storage.k8s.io/pod.name"] == "p"
    assert published["volume_context"]["x"] == "y"
    await client.patch(PERSISTENT_VOLUMES, "v", None, {"spec": {"capacity": {"storage": "2Gi"}}})
    pending = {"conditions": [{"type": "FileSystemResizePending", "status": "True"}], "allocatedResourceStatuses": {"storage": "NodeResizePending"}}
    await client.patch(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace, {"status": pending}, type="merge", subresource="status")
    assert bench.kubelet is not None
    bench.kubelet.csi.growth.look()
    async with asyncio.timeout(10):
        while (grown := (await client.get(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace))["status"])["capacity"] != {"storage": "2Gi"}:
            await asyncio.sleep(0.02)
    assert "conditions" not in grown
    assert "allocatedResourceStatuses" not in grown
    expanded = next(m for n, m in driver.calls if n == "NodeExpandVolume")
    assert (expanded["volume_id"], expanded["capacity_range"], expanded["volume_path"]) == ("h1", {"required_bytes": 2 << 30}, published["target_path"])
    await client.delete(PODS, "p", bench.namespace)
    await bench.until_gone("p")
    order = [n for n, _ in driver.calls if n not in ("NodeGetInfo", "NodeGetCapabilities")]
    assert order == ["NodeStageVolume", "NodePublishVolume", "NodeExpandVolume", "NodeUnpublishVolume", "NodeUnstageVolume"]
    assert (driver.folder / "h1" / "file").read_text() == "data\n"


class ContainedDriver(CSIDriver):
    """Mounts where a driver's own manifest says: in its container, which sees the kubelet's folder as /var/lib/kubelet."""

    def __init__(self, bench: Bench) -> None:
        folder = bench.folder / "kubelet" / "plugins" / "test.csi"
        folder.mkdir()
        super().__init__(folder)
        self.endpoint = Path("/var/lib/kubelet/plugins/test.csi/csi.sock")
        self._bench = bench
        self._container = ""

    async def deploy(self) -> None:
        names = {"pods": "pods", "plugins": "plugins"}
        mounted = [{"name": n, "mountPath": f"/var/lib/kubelet/{n}", "mountPropagation": "Bidirectional"} for n in names]
        container = {"volumeMounts": mounted, "securityContext": {"privileged": True}}
        volumes = [{"name": n, "hostPath": {"path": f"/var/lib/kubelet/{n}", "type": "Directory"}} for n in names]
        await self._bench.run("driver", "sleep 1000", container=container, volumes=volumes)
        pod = await self._bench.until_ready("driver")
        self._container = pod["status"]["containerStatuses"][0]["containerID"].partition("://")[2]

    async def run(self, command: str) -> None:
        result = await self._bench.runtime.exec_sync(self._container, ["sh", "-ec", command], 10)
        assert result.exit_code == 0, result.stderr

    async def _publish(self, message: Any) -> None:
        target = message["target_path"]
        await self.run(f"mkdir -p {target}; grep -q ' {target} ' /proc/mounts || mount -t tmpfs -o size=64k volume {target}; echo {message['volume_id']} > {target}/id")

    async def _unpublish(self, message: Any) -> None:  # type: ignore[override]
        await self.run(f"umount {message['target_path']}; rmdir {message['target_path']}")


async def test_a_driver_in_a_container_mounts_below_var_lib_kubelet_for_the_pods_of_its_node(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.kubelet.volumes.csi._REPUBLISH_SECONDS", 0.1)
    csi = ContainedDriver(bench)
    await csi.deploy()
    async with registered(bench, csi):
        spec = {"attachRequired": False, "volumeLifecycleModes": ["Ephemeral"], "requiresRepublish": True, "tokenRequests": [{"audience": "vault"}, {"audience": ""}]}
        await bench.client.create(CSI_DRIVERS, {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "test.csi"}, "spec": spec})
        container = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
        await bench.run("p", "cat /v/id; echo more > /v/more; sleep 1000", container=container, volumes=[{"name": "v", "csi": {"driver": "test.csi"}}])
        await bench.until_ready("p")
        published = next(m for n, m in csi.calls if n == "NodePublishVolume")
        assert published["target_path"].startswith("/var/lib/kubelet/pods/")
        own = str(bench.folder / "kubelet") + published["target_path"].removeprefix("/var/lib/kubelet")
        assert mounts.is_mount_point(own)
        async with asyncio.timeout(10):
            while not os.path.exists(f"{own}/more"):
                await asyncio.sleep(0.02)
        await csi.run(f"cat {published['target_path']}/more")
        given = json.loads(published["volume_context"]["csi.storage.k8s.io/serviceAccount.tokens"])
        assert {audience: sorted(status) for audience, status in given.items()} == {a: ["expirationTimestamp", "token"] for a in ("", "vault")}
        async with asyncio.timeout(10):
            while [n for n, _ in csi.calls].count("NodePublishVolume") < 2:
                await asyncio.sleep(0.02)
        await bench.client.delete(PODS, "p", bench.namespace)
        await bench.until_gone("p")
        assert not os.path.exists(own)
        assert [n for n, _ in csi.calls][-1] == "NodeUnpublishVolume"
        assert not mounts.mount_points(os.path.dirname(own))


async def test_a_pod_waits_until_its_volume_is_attached(bench: Bench, driver: CSIDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("knarr.kubelet.volumes.csi._ATTACH_LOOK_SECONDS", 3600.0)
    await _publish_claim(bench, "h", attach=True)
    name = "csi-" + hashlib.sha256(f"htest.csi{bench.node_name}".encode()).hexdigest()
    spec = {"attacher": "test.csi", "nodeName": bench.node_name, "source": {"persistentVolumeName": "v"}}
    await bench.client.create(VOLUME_ATTACHMENTS, {"apiVersion": "storage.k8s.io/v1", "kind": "VolumeAttachment", "metadata": {"name": name}, "spec": spec})
    await bench.run("p", "true", container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, volumes=[{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}])
    await bench.until("p", lambda p: p and p["status"].get("conditions"))
    attached = {"status": {"attached": True, "attachmentMetadata": {"lun": "7"}}}
    await bench.client.patch(VOLUME_ATTACHMENTS, name, None, attached, type="merge", subresource="status")
    held = {"status": {"volumesAttached": [{"name": "kubernetes.io/csi/test.csi^h", "devicePath": ""}]}}
    await bench.client.patch(NODES, bench.node_name, None, held, type="merge", subresource="status")
    await bench.until_phase("p", "Succeeded")
    published = next(m for n, m in driver.calls if n == "NodePublishVolume")
    assert published["publish_context"] == {"lun": "7"}


async def _publish_claim(bench: Bench, handle: str, *, attach: bool = False) -> None:
    """A claim `c` bound to a volume `v` of test.csi."""
    await bench.client.create(CSI_DRIVERS, {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "test.csi"}, "spec": {"attachRequired": attach}})
    shared = {"accessModes": ["ReadWriteOncePod"], "storageClassName": ""}
    claim: Any = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c", "namespace": bench.namespace}}
    claim["spec"] = {**shared, "resources": {"requests": {"storage": "1Gi"}}, "volumeName": "v"}
    claim = await bench.client.create(PERSISTENT_VOLUME_CLAIMS, claim, bench.namespace)
    reference = {"kind": "PersistentVolumeClaim", "name": "c", "namespace": bench.namespace, "uid": claim["metadata"]["uid"]}
    volume: Any = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "v"}}
    volume["spec"] = {**shared, "capacity": {"storage": "1Gi"}, "csi": {"driver": "test.csi", "volumeHandle": handle}, "claimRef": reference}
    await bench.client.create(PERSISTENT_VOLUMES, volume)
    status = {"phase": "Bound", "accessModes": shared["accessModes"], "capacity": {"storage": "1Gi"}}
    await bench.client.patch(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace, {"status": status}, type="merge", subresource="status")


async def test_only_what_a_driver_may_have_done_is_undone(bench: Bench, driver: CSIDriver) -> None:
    await _publish_claim(bench, "h")
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]
    for failing, code, undone in (
        ("NodeStageVolume", "INVALID_ARGUMENT", []),
        ("NodeStageVolume", "UNAVAILABLE", ["NodeUnstageVolume"]),
        ("NodePublishVolume", "INVALID_ARGUMENT", ["NodeUnstageVolume"]),
        ("NodePublishVolume", "UNAVAILABLE", ["NodeUnpublishVolume", "NodeUnstageVolume"]),
    ):
        driver.faults = {failing: code}
        driver.calls.clear()
        await bench.run("p", "true", container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, volumes=volumes)
        async with asyncio.timeout(10):
            while [n for n, _ in driver.calls].count(failing) < 2:
                await asyncio.sleep(0.02)
        staged = next(m for n, m in driver.calls if n == "NodeStageVolume")
        assert staged["volume_capability"]["access_mode"] == {"mode": 1}, "the driver does not tell one pod from many"
        await bench.client.delete(PODS, "p", bench.namespace, grace_period_seconds=0)
        await bench.until_gone("p")
        async with asyncio.timeout(10):
            while [n for n, _ in driver.calls if n in ("NodeUnpublishVolume", "NodeUnstageVolume")] != undone:
                await asyncio.sleep(0.02)
        left = bench.folder / "kubelet" / "plugins" / "kubernetes.io" / "csi" / "test.csi"
        async with asyncio.timeout(10):
            while left.exists() and list(left.iterdir()):
                await asyncio.sleep(0.02)


async def test_a_volume_for_one_pod_is_refused_to_a_second(bench: Bench, driver: CSIDriver) -> None:
    await _publish_claim(bench, "h")
    fields: Any = {"container": {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}
    await bench.run("first", "sleep 1000", **fields)
    await bench.until_ready("first")
    await bench.run("second", "true", **fields)
    async with asyncio.timeout(10):
        while not any("ReadWriteOncePod access mode and is already in use" in e["message"] for e in (await bench.client.list(EVENTS, bench.namespace))["items"]):
            await asyncio.sleep(0.05)
    await bench.client.delete(PODS, "first", bench.namespace, grace_period_seconds=0)
    await bench.until_phase("second", "Succeeded", 40)


async def test_a_volume_is_staged_anew_when_all_mounts_are_gone(bench: Bench, driver: CSIDriver) -> None:
    await _publish_claim(bench, "h")
    fields: Any = {"container": {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}]}
    await bench.run("p", "sleep 1000", restartPolicy="Always", **fields)
    await bench.until_ready("p")

    await bench.stop()
    for sandbox in await bench.runtime.list_pod_sandboxes():
        await bench.runtime.stop_pod_sandbox(sandbox.id)
    for point in mounts.mount_points(str(bench.folder / "kubelet")):
        mounts.unmount(point)
    await bench.start()
    async with asyncio.timeout(20):
        while [n for n, _ in driver.calls].count("NodeStageVolume") < 2:
            await asyncio.sleep(0.02)


async def test_a_device_plugin_registers_at_the_kubelets_socket(bench: Bench) -> None:
    folder = bench.folder / "kubelet" / "device-plugins"
    devices = {"ListAndWatch": ("Empty", "ListAndWatchResponse", lambda m: {"devices": [{"ID": "d0", "health": "Healthy"}]})}
    plugin = FakePlugin(folder / "own.sock", {"v1beta1.DevicePlugin": devices})
    await plugin.start()
    try:
        async with asyncio.timeout(10):
            while not (folder / "kubelet.sock").exists():
                await asyncio.sleep(0.02)
        kubelet = wire.Plugin(str(folder / "kubelet.sock"))
        await kubelet.call("/v1beta1.Registration/Register", "RegisterRequest", {"version": "v1beta1", "endpoint": "own.sock", "resource_name": "test.com/own"}, "Empty")
        await kubelet.close()
        async with asyncio.timeout(10):
            while (await bench.client.get(NODES, bench.node_name))["status"]["allocatable"].get("test.com/own") != "1":
                await asyncio.sleep(0.05)
    finally:
        await plugin.stop()


async def test_a_device_plugin_gives_containers_its_devices(bench: Bench) -> None:
    endpoint = bench.folder / "device.sock"
    granted = {"container_responses": [{"envs": {"GIVEN": "yes"}, "devices": [{"container_path": "/dev/given", "host_path": "/dev/null", "permissions": "rw"}]}]}
    service = {
        "ListAndWatch": ("Empty", "ListAndWatchResponse", lambda m: {"devices": [{"ID": "d0", "health": "Healthy"}, {"ID": "d1", "health": "Unhealthy"}]}),
        "Allocate": ("AllocateRequest", "AllocateResponse", lambda m: granted),
    }
    plugin = FakePlugin(endpoint, {"v1beta1.DevicePlugin": service})
    await plugin.start()
    register = FakePlugin(
        bench.folder / "kubelet" / "plugins_registry" / "dev-reg.sock",
        {"pluginregistration.Registration": registration("DevicePlugin", "test.com/thing", endpoint, "v1beta1")},
    )
    await register.start()
    try:
        async with asyncio.timeout(10):
            while (await bench.client.get(NODES, bench.node_name))["status"]["allocatable"].get("test.com/thing") != "1":
                await asyncio.sleep(0.05)
        amounts = {"test.com/thing": "1"}
        await bench.run("p", "echo $GIVEN; test -c /dev/given && echo device", container={"resources": {"limits": amounts, "requests": amounts}})
        await bench.until_phase("p", "Succeeded")
        assert await bench.log("p") == "yes\ndevice\n"
        assert plugin.calls == [("Allocate", {"container_requests": [{"devices_ids": ["d0"]}]})]
    finally:
        await register.stop()
        await plugin.stop()


def _numa_devices(**healthy: bool) -> dict[str, Any]:
    """Devices named <node>-<number>; "x" is near no node."""
    out = []
    for name, well in healthy.items():
        node = name[1]
        device = {"ID": name, "health": "Healthy" if well else "Unhealthy"}
        out.append(device if node == "x" else {**device, "topology": {"nodes": [{"ID": int(node)}]}})
    return {"devices": out}


def _asking(uid: str, count: str, init: str = "") -> Any:
    def container(name: str, amount: str) -> Any:
        return {"name": name, "resources": {"limits": {"test/dev": amount}}}

    spec = {"containers": [container("c", count)], "initContainers": [container("i", init)] if init else []}
    return {"metadata": {"uid": uid, "name": uid}, "spec": spec, "status": {"qosClass": "BestEffort"}}


def _given(devices: DeviceManager, uid: str, name: str = "c") -> list[str]:
    return devices._given[uid][name]["test/dev"]


def _offering(folder: Path, **healthy: bool) -> DeviceManager:
    devices = DeviceManager(str(folder), lambda: None)
    found = _numa_devices(**healthy)["devices"]
    devices._resources["test/dev"] = _Resource(
        None,  # type: ignore[arg-type]  # nobody calls it here
        {d["ID"]: d["health"] == "Healthy" for d in found},
        {d["ID"]: frozenset(n["ID"] for n in d.get("topology", {}).get("nodes", [])) for d in found},
    )
    devices._known.add("test/dev")
    return devices


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, [({0}, True), ({1}, True), ({0, 1}, False)]),
        (2, [({1}, True), ({0, 1}, False)]),
        (3, [({0, 1}, True)]),
        (4, []),
    ],
)
def test_devices_hint_at_the_nodes_near_which_enough_of_them_are(tmp_path: Path, count: int, expected: list[Any]) -> None:
    devices = _offering(tmp_path, n0a=True, n0b=False, n1a=True, n1b=True)
    (hints,) = devices.hints(_asking("p", str(count)), _asking("p", str(count))["spec"]["containers"][0], (0, 1))
    assert hints is not None
    assert [(set(h.nodes or ()), h.preferred) for h in hints] == expected


def test_devices_that_tell_nothing_of_nodes_prefer_none(tmp_path: Path) -> None:
    devices = _offering(tmp_path, nxa=True)
    assert devices.hints(_asking("p", "1"), _asking("p", "1")["spec"]["containers"][0], (0, 1)) == [None]


def _placing(folder: Path, devices: DeviceManager, policy: str) -> Affinity:
    config = KubeletConfig(node_name="n", root_dir=str(folder), topology_manager_policy=policy)
    return Affinity(config, None, make_machine(2, 2, 1), devices=devices)  # type: ignore[arg-type]


def test_a_pod_gets_devices_near_one_node_or_is_refused(tmp_path: Path) -> None:
    devices = _offering(tmp_path, n0a=True, n1a=True, n1b=True, nxa=True)
    affinity = _placing(tmp_path, devices, "single-numa-node")
    assert affinity.admit(_asking("two", "2")) is None
    assert _given(devices, "two") == ["n1a", "n1b"]
    assert affinity.admit(_asking("again", "2")) == ("TopologyAffinityError", "Resources cannot be allocated with Topology locality")
    assert not devices.holds("again")
    assert affinity.admit(_asking("one", "1")) is None
    assert _given(devices, "one") == ["n0a"]
    assert _placing(tmp_path, devices, "none").admit(_asking("five", "5")) == (
        "UnexpectedAdmissionError",
        "Allocate failed due to requested number of devices unavailable for test/dev. Requested: 5, Available: 1, which is unexpected",
    )
    devices.release("two")
    assert affinity.admit(_asking("again", "2")) is None


def test_containers_take_over_the_devices_of_init_containers_that_have_ended(tmp_path: Path) -> None:
    devices = _offering(tmp_path, n0a=True, n0b=True)
    assert _placing(tmp_path, devices, "none").admit(_asking("p", "2", init="1")) is None
    assert _given(devices, "p", "i") == ["n0a"]
    assert _given(devices, "p") == ["n0a", "n0b"]


def test_after_a_restart_devices_are_known_before_their_plugin_is_back(tmp_path: Path) -> None:
    devices = _offering(tmp_path, n0a=True)
    assert _placing(tmp_path, devices, "none").admit(_asking("p", "1")) is None
    again = DeviceManager(str(tmp_path), lambda: None)
    affinity = _placing(tmp_path, again, "none")
    assert affinity.admit(_asking("p", "1")) is None
    refused = affinity.admit(_asking("q", "1"))
    assert refused is not None
    assert "no healthy devices present; cannot allocate unhealthy devices test/dev" in refused[1]


async def test_a_plugin_is_asked_which_devices_go_best_together(bench: Bench) -> None:
    endpoint = bench.folder / "device.sock"
    methods = {
        "GetDevicePluginOptions": ("Empty", "DevicePluginOptions", lambda m: {"get_preferred_allocation_available": True}),
        "ListAndWatch": ("Empty", "ListAndWatchResponse", lambda m: _numa_devices(n0a=True, n0b=True, n0c=True)),
        "GetPreferredAllocation": ("PreferredAllocationRequest", "PreferredAllocationResponse", lambda m: {"container_responses": [{"device_ids": ["n0c", "n0a"]}]}),
        "Allocate": ("AllocateRequest", "AllocateResponse", lambda m: {"container_responses": [{"envs": {"IDS": " ".join(m["container_requests"][0]["devices_ids"])}}]}),
    }
    plugin = FakePlugin(endpoint, {"v1beta1.DevicePlugin": methods})
    await plugin.start()
    register = FakePlugin(
        bench.folder / "kubelet" / "plugins_registry" / "test.sock",
        {"pluginregistration.Registration": registration("DevicePlugin", "test/dev", endpoint, "v1beta1")},
    )
    await register.start()
    try:
        async with asyncio.timeout(10):
            while (await bench.client.get(NODES, bench.node_name))["status"]["allocatable"].get("test/dev") != "3":
                await asyncio.sleep(0.05)
        amounts = {"test/dev": "2"}
        await bench.run("p", "echo $IDS", container={"resources": {"limits": amounts, "requests": amounts}})
        await bench.until_phase("p", "Succeeded")
        assert await bench.log("p") == "n0c n0a\n"
        asked = next(m for name, m in plugin.calls if name == "GetPreferredAllocation")["container_requests"][0]
        assert asked == {"available_device_ids": ["n0a", "n0b", "n0c"], "allocation_size": 2}
    finally:
        await register.stop()
        await plugin.stop()
