"""Pulling from registries: tokens, mirrors, redirects, resumed downloads, compression, damage."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from collections.abc import AsyncIterator

import pytest

from knarr.runtime.cri import AuthConfig, ImagePullError
from knarr.runtime.images.registry import Mirrors
from tests.runtime.conftest import Bench
from tests.runtime.registry import Registry

GZIP = "application/vnd.oci.image.layer.v1.tar+gzip"


def layer(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def config(*plain: bytes) -> bytes:
    diff_ids = ["sha256:" + hashlib.sha256(item).hexdigest() for item in plain]
    return json.dumps({"architecture": "amd64", "os": "linux", "config": {"Cmd": ["x"], "User": "5"}, "rootfs": {"type": "layers", "diff_ids": diff_ids}}).encode()


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    made = Registry()
    await made.start()
    yield made
    await made.server.close()


def add(registry: Registry, name: str = "team/app", tag: str = "1", **options: bool) -> tuple[bytes, bytes, str]:
    first, second = layer({"a": os.urandom(200_000)}), layer({"b": b"two"})
    digest = registry.image(name, tag, config(first, second), [(GZIP, gzip.compress(first, 1)), (GZIP, gzip.compress(second))], **options)
    return first, second, digest


async def test_an_image_is_pulled_and_listed_under_tag_and_digest(bench: Bench, registry: Registry) -> None:
    _, _, digest = add(registry)
    name = f"127.0.0.1:{registry.port}/team/app"
    image_id = await bench.runtime.pull_image(f"{name}:1")
    image = await bench.runtime.image_status(f"{name}:1")
    assert image is not None
    assert (image.id, image.repo_tags, image.repo_digests, image.uid) == (image_id, [f"{name}:1"], [f"{name}@{digest}"], 5)
    assert (await bench.runtime.image_status(f"{name}@{digest}")) == image
    assert (await bench.runtime.image_status(image_id)) == image
    assert os.listdir(bench.runtime.images.ingest) == []


async def test_layers_that_are_there_are_not_downloaded_again(bench: Bench, registry: Registry) -> None:
    first, _, _ = add(registry)
    name = f"127.0.0.1:{registry.port}/team/app"
    await bench.runtime.pull_image(f"{name}:1")
    third = layer({"c": b"three"})
    registry.image("team/app", "2", config(first, third), [(GZIP, gzip.compress(first, 1)), (GZIP, gzip.compress(third))])
    registry.log.clear()
    await bench.runtime.pull_image(f"{name}:2")
    blobs = [path for _, path, _ in registry.log if "/blobs/" in path]
    assert len(blobs) == 2  # the configuration and the third layer
    await bench.runtime.remove_image(f"{name}:1")
    assert (await bench.runtime.image_status(f"{name}:2")) is not None
    kept = bench.runtime.images.layers_of(bench.runtime.images.get(f"{name}:2"))
    assert len(kept) == 2


async def test_an_index_is_resolved_for_this_machine(bench: Bench, registry: Registry) -> None:
    _, _, digest = add(registry, index=True)
    name = f"127.0.0.1:{registry.port}/team/app"
    await bench.runtime.pull_image(f"{name}@{digest}")
    image = await bench.runtime.image_status(f"{name}@{digest}")
    assert image is not None
    assert image.repo_tags == []
    assert f"{name}@{digest}" in image.repo_digests


@pytest.mark.parametrize("scheme", ["bearer", "basic"])
async def test_credentials_are_tried_in_order(bench: Bench, registry: Registry, scheme: str) -> None:
    add(registry)
    registry.credentials, registry.scheme = ("user", "secret"), scheme
    name = f"127.0.0.1:{registry.port}/team/app:1"
    with pytest.raises(ImagePullError, match=r"authorization failed|failed to authorize"):
        await bench.runtime.pull_image(name)
    import base64

    good = AuthConfig(auth=base64.b64encode(b"user:secret").decode())
    if scheme == "basic":
        await bench.runtime.pull_image(name, [AuthConfig("user", "wrong"), good])
    else:
        await bench.runtime.pull_image(name, [good])


async def test_redirects_do_not_carry_credentials(bench: Bench, registry: Registry) -> None:
    add(registry)
    registry.credentials, registry.redirect = ("user", "secret"), True
    await bench.runtime.pull_image(f"127.0.0.1:{registry.port}/team/app:1", [AuthConfig("user", "secret")])
    assert any(path.startswith("/store/") for _, path, _ in registry.log)


@pytest.mark.parametrize("ranges", [True, False])
async def test_a_broken_download_is_resumed(bench: Bench, registry: Registry, ranges: bool) -> None:
    add(registry)
    registry.break_after, registry.ranges = 100_000, ranges
    seen: list[tuple[int, int]] = []
    await bench.runtime.pull_image(f"127.0.0.1:{registry.port}/team/app:1", progress=lambda _, done, total: seen.append((done, total)))
    asked = [header for _, path, header in registry.log if "/blobs/" in path and header]
    assert asked
    assert all(header.startswith("bytes=") and int(header[6:-1]) > 0 for header in asked)
    assert any(done == total for done, total in seen)


async def test_mirrors_come_first_and_the_registry_stays_the_last_resort(bench: Bench, registry: Registry) -> None:
    add(registry, "library/thing", "latest")
    await bench.runtime.close()
    bench.runtime = bench.make(mirrors=Mirrors({"docker.io": ["http://127.0.0.1:1", f"http://127.0.0.1:{registry.port}"]}))
    await bench.runtime.start()
    await bench.runtime.pull_image("thing")
    image = await bench.runtime.image_status("thing")
    assert image is not None
    assert image.repo_tags == ["docker.io/library/thing:latest"]


async def test_zstd_layers_are_unpacked(bench: Bench, registry: Registry) -> None:
    plain = layer({"z": b"zstd" * 1000})
    packed = subprocess.run(["zstd", "-qc"], input=plain, capture_output=True, check=True).stdout
    registry.image("z", "1", config(plain), [("application/vnd.oci.image.layer.v1.tar+zstd", packed)])
    name = f"127.0.0.1:{registry.port}/z:1"
    await bench.runtime.pull_image(name)
    store = bench.runtime.images
    path = store.layers.path(store.layers_of(store.get(name))[0])
    with open(os.path.join(path, "z"), "rb") as file:
        assert file.read() == b"zstd" * 1000


async def test_damaged_layers_are_refused_and_leave_nothing(bench: Bench, registry: Registry) -> None:
    plain = layer({"a": b"x" * 5000})
    registry.image("bad", "1", config(plain), [(GZIP, gzip.compress(plain))])
    digest = next(key for key, value in registry.blobs.items() if value[:2] == b"\x1f\x8b")
    registry.blobs[digest] = registry.blobs[digest][:-20] + b"\0" * 20
    before = os.listdir(bench.runtime.images.layers.root)
    with pytest.raises(ImagePullError, match="digest"):
        await bench.runtime.pull_image(f"127.0.0.1:{registry.port}/bad:1")
    assert os.listdir(bench.runtime.images.layers.root) == before
    assert await bench.runtime.image_status(f"127.0.0.1:{registry.port}/bad:1") is None


async def test_what_is_not_there_says_so(bench: Bench, registry: Registry) -> None:
    with pytest.raises(ImagePullError, match=r"failed to pull and unpack image .*: not found") as caught:
        await bench.runtime.pull_image(f"127.0.0.1:{registry.port}/no/such:1")
    assert caught.value.reason == "ErrImagePull"
    with pytest.raises(ImagePullError, match=r"connection refused|Connect call failed") as caught:
        await bench.runtime.pull_image("127.0.0.1:1/no/such:1")
    with pytest.raises(ImagePullError) as caught:
        await bench.runtime.pull_image("Not/Valid:::")
    assert caught.value.reason == "InvalidImageName"


async def test_concurrent_pulls_of_one_image_share_the_download(bench: Bench, registry: Registry) -> None:
    import asyncio

    add(registry)
    name = f"127.0.0.1:{registry.port}/team/app:1"
    ids = await asyncio.gather(*(bench.runtime.pull_image(name) for _ in range(5)))
    assert len(set(ids)) == 1
    layers = [path for _, path, _ in registry.log if "/blobs/" in path]
    assert len(layers) <= 5 + 2  # five small configurations, each layer once
