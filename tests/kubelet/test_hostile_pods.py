"""Pods that attack the node: nothing outside of them is read or changed, the node lives, and other pods answer."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from knarr.api.resources import EVENTS, PODS
from knarr.kubelet import envfile, logs
from knarr.kubelet.logs import LogOptions
from knarr.kubelet.volumes import mounts, ownership
from knarr.kubelet.volumes.model import MountedVolume
from knarr.kubelet.volumes.subpath_mounts import SubPathError, SubPaths
from knarr.runtime import disk
from tests.kubelet.conftest import Bench, container_state

SECRET = "only the host knows"


@contextlib.contextmanager
def swapping(path: Path, target: Path) -> Iterator[None]:
    """Somebody who puts a link to `target` in the place of a folder, and back, as quickly as can be."""
    libc = ctypes.CDLL(None, use_errno=True)
    over = threading.Event()
    link = path.with_name("link")
    link.symlink_to(target)

    def swap() -> None:
        while not over.is_set():
            libc.renameat2(-100, bytes(link), -100, bytes(path), 2)  # RENAME_EXCHANGE: at no moment is nothing there
            time.sleep(0)

    thread = threading.Thread(target=swap)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of the host with a secret in it."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "secret").write_text(SECRET)
    (folder / "sub/secret").write_text(SECRET)
    return folder


# Volumes


def test_a_folder_swapped_for_a_link_while_it_is_mounted_by_sub_path_never_shows_the_host(tmp_path: Path, outside: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "d/sub").mkdir(parents=True)
    (volume / "d/inside").touch()
    paths = SubPaths(str(tmp_path / "pods"))
    try:
        with swapping(volume / "d", outside):
            for number in range(300):
                try:
                    target = Path(paths.prepare("uid", "c", number % 3, MountedVolume("v", str(volume)), ("d", "d/sub", "d/new/er")[number % 3], "v"))
                except SubPathError:
                    continue
                assert not (target / "secret").exists()
    finally:
        paths.remove("uid")
    assert sorted(item.name for item in outside.iterdir()) == ["secret", "sub"]
    assert sorted(item.name for item in (outside / "sub").iterdir()) == ["secret"]
    assert mounts.mount_points(str(tmp_path)) == []


def test_files_swapped_for_links_while_a_volume_gets_its_group_leave_the_host_alone(tmp_path: Path, outside: Path) -> None:
    volume = tmp_path / "volume"
    (volume / "d").mkdir(parents=True)
    (outside / "secret").chmod(0o600)
    before = [(item.stat().st_gid, item.stat().st_mode) for item in (outside, outside / "secret", outside / "sub")]
    with swapping(volume / "d", outside):
        for _ in range(300):
            ownership.give_to_group(str(volume), 12345)
    assert [(item.stat().st_gid, item.stat().st_mode) for item in (outside, outside / "secret", outside / "sub")] == before


async def test_a_container_that_swaps_a_folder_for_a_link_shows_nothing_to_the_one_that_mounts_it(bench: Bench) -> None:
    shared, secret = bench.folder / "shared", bench.folder / "secret"
    (shared / "d").mkdir(parents=True)
    secret.mkdir()
    (secret / "key").write_text(SECRET)
    volume = [{"name": "v", "hostPath": {"path": str(shared), "type": "Directory"}}]
    script = f"cd /v; ln -s {secret} l; while :; do mv -T d x; mv -T l d; mv -T d l; mv -T x d; done"
    await bench.run("racer", script, container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, volumes=volume)
    await bench.until_ready("racer")
    main = {"volumeMounts": [{"name": "v", "mountPath": "/x", "subPath": "d"}]}
    names = [f"victim{number}" for number in range(6)]
    for name in names:
        await bench.run(name, "cat /x/key; true", container=main, volumes=volume)
    for name in names:
        await bench.until(name, lambda p: p and (p["status"]["phase"] in ("Succeeded", "Failed") or refusal(p) == "CreateContainerConfigError"))
    for pod in (await bench.client.list(PODS, bench.namespace))["items"]:
        if pod["status"]["phase"] == "Succeeded":
            assert SECRET not in await bench.log(pod["metadata"]["name"])
    assert os.listdir(secret) == ["key"]


def refusal(pod: dict) -> str:  # type: ignore[type-arg]
    statuses = pod["status"].get("containerStatuses") or [{}]
    return str(((statuses[0].get("state") or {}).get("waiting") or {}).get("reason") or "")


@pytest.mark.parametrize(
    ("kind", "path", "message"),
    [
        ("Directory", "file", "is not a directory"),
        ("File", "", "is not a file"),
        ("Socket", "file", "is not a socket file"),
        ("CharDevice", "file", "is not a character device"),
        ("BlockDevice", "file", "is not a block device"),
        ("DirectoryOrCreate", "file", "is not a directory"),
        ("FileOrCreate", "", "is not a file"),
    ],
)
def test_a_host_path_of_another_type_is_refused(tmp_path: Path, kind: str, path: str, message: str) -> None:
    from knarr.kubelet.volumes import host
    from knarr.kubelet.volumes.model import VolumeError

    (tmp_path / "file").touch()
    with pytest.raises(VolumeError, match=f"hostPath type check failed: .*{message}"):
        host.check_host_path(str(tmp_path / path), kind)


async def test_a_pod_with_a_host_path_of_another_type_waits_with_an_event(bench: Bench) -> None:
    (bench.folder / "file").touch()
    volume = [{"name": "v", "hostPath": {"path": str(bench.folder / "file"), "type": "Directory"}}]
    await bench.run("p", "true", container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}, volumes=volume)
    async with asyncio.timeout(10):
        while not (told := [e for e in (await bench.client.list(EVENTS, bench.namespace))["items"] if e["reason"] == "FailedMount"]):
            await asyncio.sleep(0.05)
    assert told[0]["message"] == f'MountVolume.SetUp failed for volume "v" : hostPath type check failed: {bench.folder}/file is not a directory'


async def test_a_tree_deeper_than_any_path_is_counted_and_goes_with_its_pod(bench: Bench) -> None:
    mount = {"volumeMounts": [{"name": "v", "mountPath": "/v"}]}
    script = "cd /v && mkdir -p $(printf 'd/%.0s' $(seq 1300))"
    await bench.run("deep", script, container=mount, volumes=[{"name": "v", "emptyDir": {}}])
    pod = await bench.until_phase("deep", "Succeeded", 60)
    await bench.client.delete(PODS, "deep", bench.namespace, grace_period_seconds=0)
    assert bench.kubelet is not None
    folder = Path(bench.kubelet.config.pods_dir, pod["metadata"]["uid"])
    async with asyncio.timeout(30):
        while folder.exists():
            await asyncio.sleep(0.05)


def test_trees_of_any_depth_are_counted_and_removed(tmp_path: Path) -> None:
    root = tmp_path / "tree"
    root.mkdir()
    fd = os.open(root, os.O_RDONLY)
    for number in range(1500):
        name = f"folder-with-a-long-name-{number % 2}"
        os.mkdir(name, dir_fd=fd)
        os.close(os.open("leaf", os.O_CREAT | os.O_WRONLY, dir_fd=fd))
        inner = os.open(name, os.O_RDONLY, dir_fd=fd)
        os.close(fd)
        fd = inner
    os.write(leaf := os.open("big", os.O_CREAT | os.O_WRONLY, dir_fd=fd), bytes(1 << 20))
    os.close(leaf)
    os.close(fd)
    size, inodes = disk.tree_usage(str(root))
    assert inodes == 1500 * 2 + 1
    assert size >= 1 << 20
    assert held_open(root) == []
    disk.remove_tree(str(root))
    assert not root.exists()


def test_what_is_mounted_in_a_tree_is_not_counted_with_it(tmp_path: Path) -> None:
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "own").write_bytes(bytes(1 << 16))
    before = disk.tree_usage(str(tmp_path / "tree"))
    assert before[1] == 2
    mounts.tmpfs(str(tmp_path / "tree" / "inner"), size_bytes=1 << 22)
    try:
        (tmp_path / "tree" / "inner" / "other").write_bytes(bytes(1 << 20))
        size, inodes = disk.tree_usage(str(tmp_path / "tree"))
        assert (before[0] - 4096 <= size <= before[0], inodes) == (True, 1)
        assert held_open(tmp_path) == []
        assert disk.tree_usage(str(tmp_path / "tree" / "inner")) == (1 << 20, 1)
    finally:
        mounts.unmount(str(tmp_path / "tree" / "inner"))


def held_open(root: Path) -> list[str]:
    """What of a folder this process has open."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{name}"))
    return [path for path in found if path.startswith(str(root))]


# Files that the kubelet reads


def test_an_environment_file_is_parsed_as_upstream_does_and_never_waited_for(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("# c\n\nA = one\nB=two \\\n  three\\\n four\nA=later\n")
    assert [envfile.read(str(tmp_path), "f", key) for key in ("A", "B", "C")] == ["one", "two three four", ""]
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "zero").symlink_to("/dev/zero")
    (tmp_path / "long").write_bytes(b"A=" + b"x" * (1 << 17))
    (tmp_path / "huge").write_bytes((b"#" * 4095 + b"\n") * 1025)
    (tmp_path / "bad").write_text("A\n")
    (tmp_path / "cut").write_text("A=b\\\n\nC=d\n")
    for name in ("fifo", "long", "huge", "bad", "cut", "zero"):
        with pytest.raises((envfile.EnvFileError, OSError)):
            envfile.read(str(tmp_path), name, "Z")


async def test_a_log_replaced_by_a_link_a_pipe_or_a_device_is_not_read(tmp_path: Path, outside: Path) -> None:
    async def over() -> bool:
        return True

    async def content(path: Path) -> bytes:
        return b"".join([chunk async for chunk in logs.read(str(path), LogOptions(), over)])

    folder = tmp_path / "logs/pod/c"
    folder.mkdir(parents=True)
    (folder / "0.log").write_text("2024-01-01T00:00:00Z stdout F own\n")
    (outside / "0.log").write_text(f"2024-01-01T00:00:00Z stdout F {SECRET}\n")
    assert await content(folder / "0.log") == b"own\n"
    (folder / "1.log").symlink_to(outside / "0.log")
    os.mkfifo(folder / "2.log")
    os.mknod(folder / "3.log", 0o20600, os.makedev(1, 5))
    (folder.parent / "linked").symlink_to(outside)
    (tmp_path / "logs/other").symlink_to(tmp_path)
    for path in (folder / "1.log", folder / "2.log", folder / "3.log", folder.parent / "linked/0.log", tmp_path / "logs/other/outside/0.log"):
        with pytest.raises(OSError, match=r"regular|levels|link"):
            await content(path)

    async def reopen() -> None:
        raise AssertionError("nothing to reopen")

    for path in (folder / "1.log", folder.parent / "linked/0.log"):
        with pytest.raises(OSError, match=r"levels|link"):
            await logs.rotate(str(path), reopen, 3)
    assert sorted(item.name for item in outside.iterdir()) == ["0.log", "secret", "sub"]


# Processes


async def test_a_fork_bomb_stays_in_its_pod_and_others_answer(bench: Bench) -> None:
    await bench.stop()
    bench.options["pod_pids_limit"] = 48
    await bench.start()
    await bench.run("neighbour", "sleep 1000")
    await bench.until_ready("neighbour")
    # Two containers, one of them privileged: neither can lift the limit of their pod from inside.
    bomb = "echo max 2>/dev/null >/sys/fs/cgroup/pids/pids.max; echo max 2>/dev/null >/sys/fs/cgroup/pids.max; b() { b | b & }; b; sleep 1000"
    containers = [
        {"name": "c", "command": ["sh", "-c", bomb], "resources": {"limits": {"memory": "128Mi"}}},
        {"name": "d", "command": ["sh", "-c", bomb], "resources": {"limits": {"memory": "128Mi"}}, "securityContext": {"privileged": True}},
    ]
    pod = await bench.create({"metadata": {"name": "bomb"}, "spec": {"containers": containers, "restartPolicy": "Never", "terminationGracePeriodSeconds": 0}})
    await bench.until("bomb", lambda p: p if p and p["status"]["phase"] in ("Running", "Failed") else None)
    assert bench.kubelet is not None
    cgroups = bench.kubelet.node.cgroups
    most = 0
    for _ in range(20):
        most = max(most, cgroups.process_count(cgroups.pod_path(pod)))
        await asyncio.sleep(0.05)
    assert 3 < most <= 48
    neighbour = await bench.client.get(PODS, "neighbour", bench.namespace)
    container_id = neighbour["status"]["containerStatuses"][0]["containerID"].partition("://")[2]
    assert (await bench.runtime.exec_sync(container_id, ["echo", "here"], 10)).stdout == b"here\n"
    await bench.run("later", "true")
    await bench.until_phase("later", "Succeeded")
    await bench.client.delete(PODS, "bomb", bench.namespace, grace_period_seconds=0)
    async with asyncio.timeout(20):
        while cgroups.process_count(cgroups.pod_path(pod)):
            await asyncio.sleep(0.05)


async def test_endless_output_of_a_probe_is_bounded_in_time_and_memory(bench: Bench) -> None:
    probe = {"exec": {"command": ["sh", "-c", "yes"]}, "periodSeconds": 1, "timeoutSeconds": 1}
    await bench.run("loud", "sleep 1000", container={"readinessProbe": probe})
    before = resident()
    pod = await bench.until_phase("loud", "Running")
    await asyncio.sleep(2.5)
    assert "running" in container_state(await bench.client.get(PODS, "loud", bench.namespace))
    assert resident() - before < 100 << 20
    await bench.run("next", "true")
    await bench.until_phase("next", "Succeeded")
    assert pod["status"]["phase"] == "Running"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
