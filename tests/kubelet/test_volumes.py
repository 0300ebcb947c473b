"""Volumes: content, atomic updates, and tricks with links."""

from __future__ import annotations

import asyncio
import os
import subprocess
from pathlib import Path

import pytest

from knarr.api.resources import CONFIG_MAPS, PODS
from knarr.kubelet.volumes import atomic_writer, host, mounts, subpath
from knarr.kubelet.volumes.atomic_writer import FileProjection
from knarr.kubelet.volumes.model import VolumeError
from tests.kubelet.conftest import Bench, container_state


def _file(text: str, mode: int = 0o644) -> FileProjection:
    return FileProjection(text.encode(), mode)


def test_an_update_swaps_all_files_at_once_and_removes_what_is_gone(tmp_path: Path) -> None:
    root = str(tmp_path)
    assert atomic_writer.write(root, {"a": _file("1"), "d/b": _file("2", 0o400)})
    assert (tmp_path / "d/b").read_text() == "2"
    assert (tmp_path / "d/b").stat().st_mode & 0o777 == 0o400
    assert not atomic_writer.write(root, {"a": _file("1"), "d/b": _file("2", 0o400)})
    first = os.readlink(tmp_path / "..data")
    assert atomic_writer.write(root, {"a": _file("3"), "e": _file("4")})
    assert os.readlink(tmp_path / "..data") != first
    assert sorted(n for n in os.listdir(root) if not n.startswith("..")) == ["a", "e"]
    assert len([n for n in os.listdir(root) if n.startswith("..2")]) == 1


@pytest.mark.parametrize("path", ["", "/abs", "../x", "a/../b", "..data", "x" * 256])
def test_paths_that_leave_a_volume_are_refused(tmp_path: Path, path: str) -> None:
    with pytest.raises(atomic_writer.PayloadPathError):
        atomic_writer.write(str(tmp_path), {path: _file("x")})


def test_links_in_a_sub_path_never_lead_out_of_the_volume(tmp_path: Path) -> None:
    root = tmp_path / "volume"
    root.mkdir()
    (tmp_path / "secret").write_text("host")
    (root / "inside").mkdir()
    (root / "inside/file").write_text("ok")
    (root / "good").symlink_to("inside")
    (root / "absolute").symlink_to("/etc")
    (root / "up").symlink_to("../secret")
    (root / "loop").symlink_to("loop")
    fd = subpath.open_beneath(str(root), "good/file", os.O_RDONLY)
    assert os.read(fd, 10) == b"ok"
    os.close(fd)
    for path in ("absolute/passwd", "up", "loop", "inside/../../secret"):
        with pytest.raises(OSError, match=r"leaves|too many|No such"):
            os.close(subpath.open_beneath(str(root), path, os.O_RDONLY))
    with pytest.raises(OSError, match="leaves"):
        subpath.make_directories(str(root), "absolute/made", 0o755)
    assert not os.path.exists("/etc/made")
    subpath.make_directories(str(root), "x/y", 0o750)
    assert (root / "x/y").is_dir()


def test_host_paths_are_held_to_their_types(tmp_path: Path) -> None:
    host.check_host_path(str(tmp_path / "made"), "DirectoryOrCreate")
    host.check_host_path(str(tmp_path / "file"), "FileOrCreate")
    host.check_host_path("/dev/null", "CharDevice")
    for path, kind in ((tmp_path / "none", "Directory"), (tmp_path / "made", "File"), (tmp_path / "file", "Socket"), ("/dev/null", "BlockDevice")):
        with pytest.raises(VolumeError, match="hostPath type check failed"):
            host.check_host_path(str(path), kind)


async def test_a_changed_config_map_reaches_a_running_pod(bench: Bench) -> None:
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "cm", "namespace": bench.namespace}, "data": {"k": "old"}}
    await bench.client.create(CONFIG_MAPS, config, bench.namespace)
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}, {"name": "i", "mountPath": "/i"}]}
    labels = {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}
    volumes = [{"name": "v", "configMap": {"name": "cm"}}, {"name": "i", "downwardAPI": labels}]
    script = "until grep -q new /v/k; do sleep 0.05; done; until grep -q 'x=\"y\"' /i/labels; do sleep 0.05; done; cat /v/k"
    await bench.run("p", script, container=mount, volumes=volumes)
    await bench.until_phase("p", "Running")
    await bench.client.patch(CONFIG_MAPS, "cm", bench.namespace, {"data": {"k": "new"}})
    await bench.client.patch(PODS, "p", bench.namespace, {"metadata": {"labels": {"x": "y"}}})
    await bench.until_phase("p", "Succeeded", 10)


async def test_a_missing_config_map_is_waited_for(bench: Bench) -> None:
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    await bench.run("p", "cat /v/k", container=mount, volumes=[{"name": "v", "configMap": {"name": "late"}}])
    await bench.until("p", lambda p: p and p["status"].get("conditions"))
    await asyncio.sleep(0.3)
    pod = await bench.client.get(PODS, "p", bench.namespace)
    assert container_state(pod) == {"waiting": {"reason": "ContainerCreating"}}
    config = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "late", "namespace": bench.namespace}, "data": {"k": "here"}}
    await bench.client.create(CONFIG_MAPS, config, bench.namespace)
    await bench.until_phase("p", "Succeeded", 10)
    assert await bench.log("p") == "here"


async def test_a_sub_path_that_a_container_turned_into_a_link_stays_inside(bench: Bench) -> None:
    both = [{"name": "v", "emptyDir": {}}]
    init = {"name": "i", "command": ["sh", "-c", "ln -s /etc /v/out; mkdir /v/in; echo safe > /v/in/f"], "volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    main = {"volumeMounts": [{"name": "v", "mountPath": "/x", "subPath": "out"}]}
    await bench.run("bad", "cat /x/shadow", container=main, initContainers=[init], volumes=both)
    pod = await bench.until("bad", lambda p: p if p and container_state_reason(p) == "CreateContainerConfigError" else None)
    assert "failed to" in container_state(pod)["waiting"]["message"]
    assert "/etc" not in container_state(pod)["waiting"]["message"]
    await bench.client.delete(PODS, "bad", bench.namespace)
    await bench.until_gone("bad")


def container_state_reason(pod: dict) -> str | None:  # type: ignore[type-arg]
    statuses = pod["status"].get("containerStatuses") or [{}]
    return ((statuses[0].get("state") or {}).get("waiting") or {}).get("reason")


async def test_mounts_propagate_as_each_container_asks_and_no_further(bench: Bench) -> None:
    shared = bench.folder / "shared"
    shared.mkdir()
    mounts.tmpfs(str(shared), size_bytes=1 << 20)
    subprocess.run(["mount", "--make-shared", str(shared)], check=True)
    names = {"master": "Bidirectional", "slave": "HostToContainer", "private": "None", "default": None}
    for name, propagation in names.items():
        mount = {"name": "h", "mountPath": "/mnt", **({"mountPropagation": propagation} if propagation else {})}
        container = {"volumeMounts": [mount], "securityContext": {"privileged": True}}
        await bench.run(name, f"mkdir -p /mnt/{name}; sleep 1000", container=container, volumes=[{"name": "h", "hostPath": {"path": str(shared)}}])
    ids = {}
    for name in names:
        pod = await bench.until_ready(name)
        ids[name] = pod["status"]["containerStatuses"][0]["containerID"].partition("://")[2]

    async def run(name: str, command: str) -> int:
        return (await bench.runtime.exec_sync(ids[name], ["sh", "-c", command], 10)).exit_code

    async with asyncio.timeout(10):
        while not all((shared / name).is_dir() for name in names):
            await asyncio.sleep(0.02)
    try:
        for name in names:
            assert await run(name, f"mount -t tmpfs t /mnt/{name} && echo {name} > /mnt/{name}/file") == 0
        (shared / "host").mkdir()
        mounts.tmpfs(str(shared / "host"), size_bytes=1 << 16)
        (shared / "host" / "file").write_text("host\n")
        seen = {name: {other for other in (*names, "host") if await run(name, f"test -e /mnt/{other}/file") == 0} for name in names}
        assert seen == {"master": {"master", "host"}, "slave": {"master", "slave", "host"}, "private": {"private"}, "default": {"default"}}
        assert {other for other in (*names, "host") if (shared / other / "file").exists()} == {"master", "host"}
    finally:
        for name in names:
            await run(name, f"umount /mnt/{name}")
        for point in mounts.mount_points(str(shared)):
            mounts.unmount(point)
