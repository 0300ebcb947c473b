"""Volumes on other machines and on disks: a network file system by FUSE end to end, block devices, and hosts that lack a helper."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from knarr.api.resources import CSI_DRIVERS, EVENTS, PERSISTENT_VOLUME_CLAIMS, PERSISTENT_VOLUMES, PODS, SECRETS
from knarr.api.types import Object
from knarr.kubelet.volumes import devices, iscsi, mounts
from knarr.kubelet.volumes.model import VolumeError
from tests.kubelet.conftest import Bench
from tests.kubelet.test_plugins import CSIDriver, registered

SFTP_SERVER = "/usr/lib/openssh/sftp-server"


class Store:
    """A file server on the network: each connection speaks SFTP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = 0
        self._children: set[asyncio.subprocess.Process] = set()

    async def start(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._socket.setblocking(False)
        self.port = self._socket.getsockname()[1]
        self._task = asyncio.create_task(self._serve())

    async def _serve(self) -> None:
        while True:
            connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
            with connection:
                connection.setblocking(True)
                self._children.add(await asyncio.create_subprocess_exec(SFTP_SERVER, "-d", str(self.folder), stdin=connection, stdout=connection))

    @property
    def clients(self) -> int:
        return sum(child.returncode is None for child in self._children)

    async def stop(self) -> None:
        self._task.cancel()
        self._socket.close()
        for child in self._children:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            await child.wait()


class RemoteDriver(CSIDriver):
    """Serves folders of the store as volumes, each mounted by FUSE where the kubelet wants it."""

    def __init__(self, folder: Path, store: Store) -> None:
        super().__init__(folder)
        self.store = store

    async def _publish(self, message: Any) -> None:
        target = message["target_path"]
        os.makedirs(target)
        source = f"127.0.0.1:{self.store.folder}/{message['volume_id']}"
        # Not with pipes: the mount's process lives on and would hold them.
        command = ["sshfs", "-o", f"directport={self.store.port},allow_other", source, target]
        process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        await process.wait()


@pytest_asyncio.fixture
async def store(bench: Bench) -> AsyncIterator[Store]:
    folder = bench.folder / "store"
    (folder / "shelf").mkdir(parents=True)
    made = Store(folder)
    await made.start()
    (bench.folder / "driver").mkdir()
    driver = RemoteDriver(bench.folder / "driver", made)
    known: Object = {"apiVersion": "storage.k8s.io/v1", "kind": "CSIDriver", "metadata": {"name": "test.csi"}, "spec": {"attachRequired": False}}
    await bench.client.create(CSI_DRIVERS, known)
    async with registered(bench, driver):
        yield made
    await made.stop()


async def claim(bench: Bench, source: Object, mode: str = "Filesystem") -> None:
    """A claim `c`, bound to a volume of this source."""
    shared = {"accessModes": ["ReadWriteMany"], "storageClassName": "", "volumeMode": mode}
    wanted: Object = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "c", "namespace": bench.namespace}}
    wanted["spec"] = {**shared, "resources": {"requests": {"storage": "1Gi"}}, "volumeName": "v"}
    wanted = await bench.client.create(PERSISTENT_VOLUME_CLAIMS, wanted, bench.namespace)
    reference = {"kind": "PersistentVolumeClaim", "name": "c", "namespace": bench.namespace, "uid": wanted["metadata"]["uid"]}
    volume: Object = {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": "v"}}
    volume["spec"] = {**shared, "capacity": {"storage": "1Gi"}, "claimRef": reference, **source}
    await bench.client.create(PERSISTENT_VOLUMES, volume)
    status = {"phase": "Bound", "accessModes": ["ReadWriteMany"], "capacity": {"storage": "1Gi"}}
    await bench.client.patch(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace, {"status": status}, type="merge", subresource="status")


USES: dict[str, Any] = {
    "container": {"volumeMounts": [{"name": "v", "mountPath": "/v"}]},
    "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "c"}}],
}


async def gone(bench: Bench, *names: str) -> None:
    for name in names:
        await bench.client.delete(PODS, name, bench.namespace, grace_period_seconds=0)
        await bench.until_gone(name)
    async with asyncio.timeout(20):
        while [m for m in mounts.mount_points(str(bench.folder / "kubelet")) if "~csi" in m or "~local" in m]:
            await asyncio.sleep(0.05)


async def test_pods_share_a_volume_of_a_network_store_that_outlives_them(bench: Bench, store: Store) -> None:
    await claim(bench, {"csi": {"driver": "test.csi", "volumeHandle": "shelf"}})
    await bench.run("writer", "grep ' /v ' /proc/self/mounts; echo from afar > /v/note; sleep 1000", **USES)
    await bench.until_ready("writer")
    async with asyncio.timeout(10):
        while not (store.folder / "shelf/note").exists():
            await asyncio.sleep(0.02)
    assert "fuse.sshfs" in await bench.log("writer")
    (store.folder / "shelf/answer").write_text("heard\n")
    await bench.run("reader", "cat /v/note /v/answer; mkdir /v/d; mv /v/note /v/d/", **USES)
    await bench.until_phase("reader", "Succeeded")
    assert await bench.log("reader") == "from afar\nheard\n"
    assert store.clients == 2
    await gone(bench, "writer", "reader")
    assert (store.folder / "shelf/d/note").read_text() == "from afar\n"
    async with asyncio.timeout(10):
        while store.clients:
            await asyncio.sleep(0.05)


async def test_a_store_that_goes_away_takes_neither_the_node_nor_the_end_of_its_pods(bench: Bench, store: Store) -> None:
    await claim(bench, {"csi": {"driver": "test.csi", "volumeHandle": "shelf"}})
    await bench.run("p", "until ! touch /v/x 2>/dev/null; do sleep 0.1; done; echo lost; sleep 1000", **USES)
    await bench.until_ready("p")
    await store.stop()
    async with asyncio.timeout(20):
        while "lost" not in await bench.log("p"):
            await asyncio.sleep(0.05)
    await bench.run("other", "true")
    await bench.until_phase("other", "Succeeded")
    await gone(bench, "p")


# Block devices


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[str]:
    """A block device of 32 MiB that holds nothing."""
    image = tmp_path / "disk"
    with open(image, "wb") as file:
        file.truncate(32 << 20)
    device = subprocess.run(["losetup", "--find", "--show", str(image)], check=True, capture_output=True, text=True).stdout.strip()
    yield device
    subprocess.run(["losetup", "--detach", device], check=True)


async def test_an_empty_block_device_gets_a_file_system_and_keeps_it(bench: Bench, disk: str) -> None:
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [bench.node_name]}]}
    await claim(bench, {"local": {"path": disk}, "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}}})
    await bench.run("first", "echo kept > /v/f; grep ' /v ' /proc/self/mounts", **USES)
    await bench.run("beside", "until [ -e /v/f ]; do sleep 0.05; done", **USES)
    for name in ("first", "beside"):
        await bench.until_phase(name, "Succeeded", 40)
    assert " ext4 " in await bench.log("first")
    await gone(bench, "first", "beside")
    await bench.run("second", "cat /v/f", **USES)
    await bench.until_phase("second", "Succeeded", 40)
    assert await bench.log("second") == "kept\n"
    await gone(bench, "second")


async def test_a_file_system_grows_with_its_device_while_a_pod_uses_it(bench: Bench, tmp_path: Path, disk: str) -> None:
    term = {"matchExpressions": [{"key": "kubernetes.io/hostname", "operator": "In", "values": [bench.node_name]}]}
    await claim(bench, {"local": {"path": disk}, "nodeAffinity": {"required": {"nodeSelectorTerms": [term]}}})
    await bench.run("p", "sleep 1000", **USES)
    await bench.until_ready("p", 40)
    (mounted,) = [m for m in mounts.mount_points(str(bench.folder / "kubelet")) if "~local" in m]
    before = os.statvfs(mounted).f_blocks
    os.truncate(tmp_path / "disk", 64 << 20)
    subprocess.run(["losetup", "--set-capacity", disk], check=True)
    await bench.client.patch(PERSISTENT_VOLUMES, "v", None, {"spec": {"capacity": {"storage": "2Gi"}}})
    pending = {"allocatedResources": {"storage": "2Gi"}, "allocatedResourceStatuses": {"storage": "NodeResizePending"}}
    await bench.client.patch(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace, {"status": pending}, type="merge", subresource="status")
    assert bench.kubelet is not None
    bench.kubelet.csi.growth.look()
    wanted = "FileSystemResizeSuccessful" if _may_grow() else "VolumeResizeFailed"
    async with asyncio.timeout(20):
        while not (told := [e for e in (await bench.client.list(EVENTS, bench.namespace))["items"] if e["reason"] == wanted]):
            await asyncio.sleep(0.05)
    held = (await bench.client.get(PERSISTENT_VOLUME_CLAIMS, "c", bench.namespace))["status"]
    if _may_grow():
        assert (held["capacity"], held.get("allocatedResourceStatuses")) == ({"storage": "2Gi"}, None)
        assert os.statvfs(mounted).f_blocks > 1.8 * before
    else:
        assert "resize2fs: Permission denied to resize filesystem" in told[0]["message"]
        assert held["capacity"] == {"storage": "1Gi"}
    await gone(bench, "p")


def _may_grow() -> bool:
    """The kernel lets a mounted ext4 grow only for holders of CAP_SYS_RESOURCE, which the root of some containers is not."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:"))
    return bool(int(line.split()[1], 16) >> 24 & 1)


async def test_a_device_that_holds_something_else_is_never_formatted(tmp_path: Path, disk: str) -> None:
    subprocess.run(["mkfs.ext4", "-q", disk], check=True)
    with pytest.raises(VolumeError, match=r'failed to mount the volume as "squashfs", it already contains ext4. Mount error: mount failed: exit status 32'):
        await devices.format_and_mount(disk, str(tmp_path / "v"), "squashfs", [])
    subprocess.run(["wipefs", "-a", "-q", disk], check=True)
    with pytest.raises(VolumeError, match="cannot mount unformatted disk"):
        await devices.format_and_mount(disk, str(tmp_path / "v"), "ext4", [], read_only=True)
    assert subprocess.run(["blkid", "-p", disk], capture_output=True).returncode == 2


# Helpers


async def test_a_kind_that_the_host_cannot_mount_is_told_as_upstream_does(tmp_path: Path) -> None:
    with pytest.raises(VolumeError) as caught:
        await devices.mount_program("server:/export", str(tmp_path / "v"), "nosuchfs", ["ro"])
    lines = str(caught.value).splitlines()
    assert lines[:3] == ["mount failed: exit status 32", "Mounting command: mount", f"Mounting arguments: -t nosuchfs -o ro server:/export {tmp_path}/v"]
    assert lines[3].startswith("Output: mount: ")
    assert not mounts.is_mount_point(str(tmp_path / "v"))


async def test_a_pod_waits_with_an_event_for_a_program_that_the_host_lacks(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(bench.folder))
    volume = [{"name": "v", "nfs": {"server": "192.0.2.1", "path": "/export"}}]
    await bench.run("p", "true", container=USES["container"], volumes=volume)
    async with asyncio.timeout(10):
        while not (told := [e for e in (await bench.client.list(EVENTS, bench.namespace))["items"] if e["reason"] == "FailedMount"]):
            await asyncio.sleep(0.05)
    assert told[0]["message"] == 'MountVolume.SetUp failed for volume "v" : mount failed: exec: "mount": executable file not found in $PATH'
    monkeypatch.undo()


ISCSIADM = """#!/bin/sh
echo "$*" >>{folder}/calls
case "$*" in
*--login*) mkdir -p {folder}/links; ln -s {disk} "{folder}/links/ip-192.0.2.7:3260-iscsi-iqn.2003-01.test:store-lun-3" ;;
*--logout*) rm {folder}/links/* ;;
esac
"""


async def test_an_iscsi_disk_is_logged_in_to_and_left_with_its_last_pod(bench: Bench, disk: str, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = bench.folder / "iscsi"
    folder.mkdir()
    (folder / "iscsiadm").write_text(ISCSIADM.format(folder=folder, disk=disk))
    (folder / "iscsiadm").chmod(0o755)
    monkeypatch.setattr(iscsi, "_LINKS", str(folder / "links"))
    source = {"targetPortal": "192.0.2.7", "iqn": "iqn.2003-01.test:store", "lun": 3, "chapAuthSession": True, "secretRef": {"name": "chap", "namespace": bench.namespace}}
    await claim(bench, {"iscsi": source})
    data = {"node.session.auth.username": "us", "node.session.auth.password": "pw"}
    await bench.client.create(SECRETS, {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "chap", "namespace": bench.namespace}, "stringData": data}, bench.namespace)
    with monkeypatch.context() as without:
        without.setenv("PATH", "/nonexistent")
        await bench.run("first", "echo kept >/v/f; sleep 1000", **USES)
        async with asyncio.timeout(10):
            while not (told := [e for e in (await bench.client.list(EVENTS, bench.namespace))["items"] if e["reason"] == "FailedMount"]):
                await asyncio.sleep(0.02)
        assert told[0]["message"] == 'MountVolume.WaitForAttach failed for volume "v" : exec: "iscsiadm": executable file not found in $PATH'
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    await bench.until_ready("first", 40)
    await bench.run("second", "until grep kept /v/f; do sleep 0.05; done", **USES)
    await bench.until_phase("second", "Succeeded", 40)
    node = "-m node -p 192.0.2.7:3260 -T iqn.2003-01.test:store"
    find = "-m discoverydb -t sendtargets -p 192.0.2.7:3260 -I default"
    logged_in = [
        "-m iface -I default -o show", f"{find} -o new", f"{find} --discover",
        *(f"{node} -I default -o update -n node.session.auth.{key} -v {value}" for key, value in (("authmethod", "CHAP"), ("username", "us"), ("password", "pw"))),
        f"{node} -I default --login", f"{node} -I default -o update -n node.startup -v manual",
    ]  # fmt: skip
    assert (folder / "calls").read_text().splitlines() == [*logged_in, "-m iface -I default -o show"]
    await left(bench, "second", 1)
    assert "--logout" not in (folder / "calls").read_text()
    await left(bench, "first", 0)
    async with asyncio.timeout(10):
        while f"{node} -o delete" not in (folder / "calls").read_text().splitlines():
            await asyncio.sleep(0.02)
    assert f"{node} --logout" in (folder / "calls").read_text().splitlines()


async def left(bench: Bench, name: str, mounted: int) -> None:
    """Delete a pod, and wait until so many mounts of iSCSI disks are left."""
    await bench.client.delete(PODS, name, bench.namespace, grace_period_seconds=0)
    async with asyncio.timeout(20):
        while len([m for m in mounts.mount_points(str(bench.folder / "kubelet")) if "~iscsi" in m]) != mounted:
            await asyncio.sleep(0.05)
