"""Images and archives made to break out or break us: everything stays inside, and a refused one leaves nothing."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import stat
import tarfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from knarr.runtime.cri import ContainerSecurity, Mount, RuntimeFault
from knarr.runtime.embedded import EmbeddedRuntime, RuntimeConfig
from knarr.runtime.images.store import StoredImage
from tests.runtime.conftest import Bench, LoopbackNetwork

Member = tuple[tarfile.TarInfo, bytes]


def entry(name: str, kind: bytes = tarfile.REGTYPE, data: bytes = b"", link: str = "", mode: int = 0o644, **fields: object) -> Member:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname, info.mode = kind, len(data), link, mode
    for key, value in fields.items():
        setattr(info, key, value)
    return info, data


def tar(*members: Member) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for info, data in members:
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def docker_archive(path: Path, layers: Sequence[bytes], name: str = "evil:1", config: object = None) -> Path:
    diff_ids = ["sha256:" + hashlib.sha256(layer).hexdigest() for layer in layers]
    document = json.dumps({"config": config or {}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()
    manifest = [{"Config": "config.json", "RepoTags": [name], "Layers": [f"l{number}/layer.tar" for number in range(len(layers))]}]
    members = [entry("config.json", data=document), entry("manifest.json", data=json.dumps(manifest).encode())]
    members += [entry(f"l{number}/layer.tar", data=layer) for number, layer in enumerate(layers)]
    path.write_bytes(tar(*members))
    return path


async def load(bench: Bench, *layers: bytes) -> list[Path]:
    """Load an image of these layers; returns the unpacked folders, lowest first."""
    await bench.runtime.load_images(str(docker_archive(bench.folder / "evil.tar", layers)))
    store = bench.runtime.images
    image: StoredImage = store.get("evil:1")
    return [Path(store.layers.path(layer)) for layer in store.layers_of(image)]


async def test_names_with_dots_or_slashes_stay_inside(bench: Bench) -> None:
    (folder,) = await load(bench, tar(entry("../../../escaped", data=b"x"), entry("/absolute", data=b"y"), entry("a/../../b", data=b"z")))
    assert sorted(item.name for item in folder.iterdir()) == ["absolute", "b", "escaped"]
    assert not Path("/absolute").exists()


async def test_links_made_earlier_do_not_lead_outside(bench: Bench) -> None:
    victim = bench.folder / "victim"
    victim.mkdir()
    layer = tar(
        entry("out", tarfile.SYMTYPE, link=str(victim)),
        entry("out/planted", data=b"x"),
        entry("up", tarfile.SYMTYPE, link="../../../../../../../.." + str(victim)),
        entry("up/planted", data=b"x"),
    )
    (folder,) = await load(bench, layer)
    assert list(victim.iterdir()) == []
    assert (folder / "out").is_symlink()


async def test_hard_links_reach_only_files_of_the_layer(bench: Bench) -> None:
    with pytest.raises(RuntimeFault, match="unpack"):
        await load(bench, tar(entry("x", tarfile.LNKTYPE, link="../../../../../../etc/passwd")))
    with pytest.raises(RuntimeFault, match="unpack"):
        await load(bench, tar(entry("l", tarfile.SYMTYPE, link="/etc"), entry("x", tarfile.LNKTYPE, link="l/passwd")))


async def test_modes_owners_links_and_attributes_are_kept(bench: Bench) -> None:
    layer = tar(
        entry("bin", tarfile.DIRTYPE, mode=0o1777, mtime=1000),
        entry("bin/su", data=b"x", mode=0o4755, uid=3, gid=4, mtime=2000),
        entry("bin/same", tarfile.LNKTYPE, link="bin/su"),
        entry("fifo", tarfile.FIFOTYPE),
        entry("attr", data=b"", pax_headers={"SCHILY.xattr.user.note": "hi", "SCHILY.xattr.trusted.overlay.redirect": "/etc"}),
    )
    (folder,) = await load(bench, layer)
    info = (folder / "bin/su").stat()
    assert (stat.S_IMODE(info.st_mode), info.st_uid, info.st_gid, int(info.st_mtime), info.st_nlink) == (0o4755, 3, 4, 2000, 2)
    assert int((folder / "bin").stat().st_mtime) == 1000
    assert stat.S_IMODE((folder / "bin").stat().st_mode) == 0o1777
    assert stat.S_ISFIFO((folder / "fifo").stat().st_mode)
    assert os.getxattr(folder / "attr", "user.note") == b"hi"
    assert os.listxattr(folder / "attr") == ["user.note"]


async def test_whiteouts_hide_files_and_whole_directories(bench: Bench) -> None:
    lower = tar(entry("d", tarfile.DIRTYPE, mode=0o755), entry("d/a", data=b"a"), entry("d/b", data=b"b"), entry("e/x", data=b"x"), entry("f", data=b"f"))
    upper = tar(entry("d/.wh.a"), entry("e/.wh..wh..opq"), entry("e/y", data=b"y"), entry(".wh.f"), entry(".wh..wh.plnk"))
    _, folder = await load(bench, lower, upper)
    info = (folder / "d/a").lstat()
    assert stat.S_ISCHR(info.st_mode)
    assert info.st_rdev == 0
    assert os.getxattr(folder / "e", "trusted.overlay.opaque") == b"y"
    mounted = bench.folder / "mounted"
    snapshots = bench.runtime._snapshots
    numbers = [layer.number for layer in bench.runtime.images.layers_of(bench.runtime.images.get("evil:1"))]
    await bench.runtime._workers.run(lambda: snapshots.mount_readonly(numbers, str(mounted)))
    seen = sorted(str(item.relative_to(mounted)) for item in mounted.rglob("*"))
    snapshots.unmount(str(mounted))
    assert seen == ["d", "d/b", "e", "e/y"]


async def test_a_file_after_its_own_whiteout_wins(bench: Bench) -> None:
    lower = tar(entry("d/a", data=b"old"))
    upper = tar(entry(".wh.d"), entry("d", tarfile.DIRTYPE, mode=0o755), entry("d/b", data=b"new"))
    _, folder = await load(bench, lower, upper)
    assert os.getxattr(folder / "d", "trusted.overlay.opaque") == b"y"
    assert (folder / "d/b").read_bytes() == b"new"


@pytest.mark.parametrize(
    "damage",
    ["truncated", "wrong-diff-id", "not-a-tar", "missing-layer", "bad-config", "bad-json", "link-loop", "gzip-garbage"],
)
async def test_damaged_archives_are_refused_and_leave_nothing(bench: Bench, damage: str) -> None:
    path = docker_archive(bench.folder / "evil.tar", [tar(entry("a", data=b"x" * 4000))])
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:3000])
    elif damage == "wrong-diff-id":
        path.write_bytes(path.read_bytes().replace(b"x" * 100, b"y" * 100))
    elif damage == "not-a-tar":
        path.write_bytes(os.urandom(5000))
    elif damage == "missing-layer":
        path.write_bytes(path.read_bytes().replace(b"l0/layer.tar", b"l1/layer.tar", 1))
    elif damage == "bad-config":
        path.write_bytes(path.read_bytes().replace(b'"diff_ids"', b'"diff_xxx"'))
    elif damage == "bad-json":
        path.write_bytes(path.read_bytes().replace(b'[{"Config"', b'[["Config"'))
    elif damage == "link-loop":
        path.write_bytes(tar(entry("manifest.json", tarfile.SYMTYPE, link="manifest.json")))
    else:
        path.write_bytes(gzip.compress(path.read_bytes())[:-30])
    before = sorted(os.listdir(bench.runtime.images.layers.root)), sorted(os.listdir(bench.runtime.images.ingest))
    with pytest.raises(RuntimeFault):
        await bench.runtime.load_images(str(path))
    assert (sorted(os.listdir(bench.runtime.images.layers.root)), sorted(os.listdir(bench.runtime.images.ingest))) == before
    assert len(await bench.runtime.list_images()) == 1


async def test_a_bomb_is_stopped_at_the_limit(bench: Bench) -> None:
    runtime = EmbeddedRuntime(
        RuntimeConfig(root=str(bench.folder / "r2"), state=str(bench.folder / "s2"), network=LoopbackNetwork(), max_layer_bytes=1 << 20)
    )
    await runtime.start()
    bomb = tar(entry("zeros", data=bytes(8 << 20)))
    with pytest.raises(RuntimeFault, match="larger than"):
        await runtime.load_images(str(docker_archive(bench.folder / "evil.tar", [bomb])))
    assert await runtime.list_images() == []
    await runtime.close()


async def test_image_names_of_an_archive_select_nothing_outside(bench: Bench) -> None:
    config = json.dumps({"config": {}, "rootfs": {"type": "layers", "diff_ids": ["sha256:" + "0" * 64]}}).encode()
    manifest = [{"Config": "config.json", "RepoTags": ["evil:1"], "Layers": ["../../../../../../etc/passwd"]}]
    path = bench.folder / "evil.tar"
    path.write_bytes(tar(entry("config.json", data=config), entry("manifest.json", data=json.dumps(manifest).encode())))
    with pytest.raises(RuntimeFault, match="lacks"):
        await bench.runtime.load_images(str(path))


async def test_oci_docker_and_compressed_archives_give_the_same_image(bench: Bench) -> None:
    from tests.images import build

    before = {image.id for image in await bench.runtime.list_images()}
    path = bench.folder / "packed.tar.gz"
    path.write_bytes(gzip.compress(build.busybox().read_bytes(), 1))
    assert {image.id for image in await bench.runtime.load_images(str(path))} == before
    layout = bench.folder / "layout"
    with tarfile.open(build.busybox()) as archive:
        archive.extractall(layout)  # our own archive; Debian 12's tarfile knows no filter
    assert {image.id for image in await bench.runtime.load_images(str(layout))} == before


async def test_names_move_to_the_newest_image(bench: Bench) -> None:
    await load(bench, tar(entry("a", data=b"1")))
    first = await bench.runtime.image_status("evil:1")
    await load(bench, tar(entry("a", data=b"2")))
    second = await bench.runtime.image_status("evil:1")
    assert first is not None
    assert second is not None
    assert first.id != second.id
    old = await bench.runtime.image_status(first.id)
    assert old is not None
    assert old.repo_tags == []
    assert first.id in await bench.runtime.prune_images()


async def test_whiteouts_through_links_hide_nothing_outside(bench: Bench) -> None:
    victim = bench.folder / "victim"
    victim.mkdir()
    (victim / "kept").write_text("x")
    lower = tar(entry("etc", tarfile.DIRTYPE, mode=0o755), entry("etc/kept", data=b"x"))
    upper = tar(
        entry("out", tarfile.SYMTYPE, link=str(victim)),
        entry("out/.wh.kept"),
        entry("out/.wh..wh..opq"),
        entry("up", tarfile.SYMTYPE, link="../../../../../../../.." + str(victim)),
        entry("up/.wh.kept"),
    )
    await load(bench, lower, upper)
    assert (victim / "kept").read_text() == "x"
    assert [item.name for item in victim.iterdir()] == ["kept"]
    assert os.listxattr(victim) == []
    for name in (".wh...", ".wh.."):
        with pytest.raises(RuntimeFault, match="unpack"):
            await load(bench, tar(entry(f"d/{name}")))


async def test_device_nodes_of_a_layer_are_made_but_open_nothing(bench: Bench) -> None:
    machine_disk = os.makedev(*next((int(line.split()[0]), int(line.split()[1])) for line in Path("/proc/partitions").read_text().splitlines()[2:]))
    layer = tar(
        entry("bin/sh", data=Path("/usr/bin/busybox").read_bytes(), mode=0o755),
        entry("disk", tarfile.BLKTYPE, mode=0o666, devmajor=os.major(machine_disk), devminor=os.minor(machine_disk)),
        entry("memory", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=1),
    )
    (folder,) = await load(bench, layer)
    assert stat.S_ISBLK((folder / "disk").stat().st_mode)
    script = "for f in /disk /memory; do head -c 1 $f >/dev/null 2>&1 && echo read $f; done; mknod /more b 7 0 && head -c 1 /more && echo read more; exit 0"
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    config = bench.container("/bin/sh", "-c", script)
    config.image = "evil:1"
    container_id = await bench.runtime.create_container(sandbox_id, config)
    await bench.runtime.start_container(container_id)
    status = await bench.ended(container_id)
    assert (status.exit_code, "read" in bench.log(status)) == (0, False)


async def test_declared_volumes_with_devices_and_pipes_are_copied_and_not_read(bench: Bench) -> None:
    layer = tar(
        entry("bin/sh", data=Path("/usr/bin/busybox").read_bytes(), mode=0o755),
        entry("data", tarfile.DIRTYPE, mode=0o755),
        entry("data/zero", tarfile.CHRTYPE, mode=0o666, devmajor=1, devminor=5),
        entry("data/pipe", tarfile.FIFOTYPE),
        entry("data/link", tarfile.SYMTYPE, link="/etc/hostname"),
        entry("data/file", data=b"kept", uid=5),
    )
    path = docker_archive(bench.folder / "evil.tar", [layer], config={"Volumes": {"/data": {}}})
    await bench.runtime.load_images(str(path))
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    config = bench.container("/bin/sh", "-c", "cd /data; [ -c zero ] && [ -p pipe ] && [ -L link ] && cat file && echo more >>file", security=ContainerSecurity(readonly_rootfs=True))
    config.image = "evil:1"
    container_id = await bench.runtime.create_container(sandbox_id, config)
    await bench.runtime.start_container(container_id)
    status = await bench.ended(container_id)
    assert (status.exit_code, bench.log(status)) == (0, "kept")


async def test_a_mount_point_that_the_image_made_a_link_stays_in_the_container(bench: Bench) -> None:
    victim, given = bench.folder / "victim", bench.folder / "given"
    victim.mkdir()
    given.mkdir()
    layer = tar(
        entry("bin/sh", data=Path("/usr/bin/busybox").read_bytes(), mode=0o755),
        entry("mnt", tarfile.SYMTYPE, link="../../../../../../.." + str(victim)),
        entry("etc", tarfile.SYMTYPE, link=str(victim)),
    )
    await load(bench, layer)
    sandbox_id = await bench.runtime.run_pod_sandbox(bench.sandbox())
    config = bench.container("/bin/sh", "-c", "echo x >/mnt/deep/f", mounts=[Mount("/mnt/deep", str(given))])
    config.image = "evil:1"
    container_id = await bench.runtime.create_container(sandbox_id, config)
    await bench.runtime.start_container(container_id)
    await bench.ended(container_id)
    assert list(victim.iterdir()) == []
    assert (given / "f").read_text() == "x\n"


async def test_a_layer_deeper_than_python_recurses_is_refused_or_removed_whole(bench: Bench) -> None:
    deep = tar(*(entry("/".join(["d"] * depth), tarfile.DIRTYPE, mode=0o755) for depth in range(1, 1100)))
    (folder,) = await load(bench, deep)
    assert (folder / "d/d/d").is_dir()
    await bench.runtime.remove_image("evil:1")
    await bench.runtime.prune_images()
    assert not folder.exists()
    before = os.listdir(bench.runtime.images.layers.root)
    with pytest.raises(RuntimeFault, match="failed to unpack layer"):
        await load(bench, tar(entry("/".join(["d"] * 1500) + "/f", data=b"x")))
    assert os.listdir(bench.runtime.images.layers.root) == before
