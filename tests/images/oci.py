"""Packs folders as layers of OCI image archives, for tests, demos and documentation.

Nothing is pulled: layers come from Debian packages (see `debian.py`), static binaries and files of this repository.
"""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DEFAULT_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Layer:
    """One packed layer: its compressed bytes and both digests."""

    data: bytes
    diff_id: str

    @property
    def digest(self) -> str:
        return "sha256:" + hashlib.sha256(self.data).hexdigest()


@dataclass(frozen=True)
class ImageConfig:
    """What the image says of its process."""

    entrypoint: Sequence[str] = ()
    cmd: Sequence[str] = ()
    user: str = ""
    env: Sequence[str] = ()
    workdir: str = "/"
    ports: Sequence[str] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


def layer_from_folder(folder: Path) -> Layer:
    """Pack a folder as it stands (owners, modes, links), with a fixed time so that equal content gives an equal digest."""
    raw = subprocess.run(
        ["tar", "-C", str(folder), "--numeric-owner", "--sort=name", "--mtime=@0", "--exclude=./proc/*", "--exclude=./sys/*", "--exclude=./dev/*", "-cf", "-", "."],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    return _layer(raw)


def layer_from_files(files: Mapping[str, tuple[bytes, int]]) -> Layer:
    """Pack single files: path without leading slash to (content, mode)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, (content, mode) in sorted(files.items()):
            info = tarfile.TarInfo(name)
            info.size, info.mode = len(content), mode
            archive.addfile(info, io.BytesIO(content))
    return _layer(buffer.getvalue())


def _layer(raw: bytes) -> Layer:
    return Layer(gzip.compress(raw, compresslevel=1, mtime=0), "sha256:" + hashlib.sha256(raw).hexdigest())


def write_archive(path: Path, images: Sequence[tuple[Sequence[str], Sequence[Layer], ImageConfig]]) -> Path:
    """Write one OCI archive with several images; layers that they share are written once.

    Args:
      images: (names, layers, configuration) each; names are references such as "redis" or "registry.k8s.io/pause:3.10.1".
    """
    blobs: dict[str, bytes] = {}
    manifests: list[dict[str, Any]] = []
    for names, layers, config in images:
        process: dict[str, Any] = {"Env": [DEFAULT_PATH, *config.env], "WorkingDir": config.workdir, "User": config.user}
        if config.entrypoint:
            process["Entrypoint"] = list(config.entrypoint)
        if config.cmd:
            process["Cmd"] = list(config.cmd)
        if config.ports:
            process["ExposedPorts"] = {port: {} for port in config.ports}
        if config.labels:
            process["Labels"] = dict(config.labels)
        document = {
            "architecture": "amd64",
            "os": "linux",
            "created": "2026-01-01T00:00:00Z",
            "config": process,
            "rootfs": {"type": "layers", "diff_ids": [layer.diff_id for layer in layers]},
        }
        config_descriptor = _blob(blobs, json.dumps(document).encode(), "application/vnd.oci.image.config.v1+json")
        layer_descriptors = [_blob(blobs, layer.data, "application/vnd.oci.image.layer.v1.tar+gzip") for layer in layers]
        manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config_descriptor, "layers": layer_descriptors}
        descriptor = _blob(blobs, json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json")
        for name in names:
            manifests.append({**descriptor, "platform": {"architecture": "amd64", "os": "linux"}, "annotations": {"io.containerd.image.name": name, "org.opencontainers.image.ref.name": name}})
    index = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": manifests}
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".new")
    with tarfile.open(temporary, "w") as archive:
        for name, content in [("oci-layout", b'{"imageLayoutVersion":"1.0.0"}'), ("index.json", json.dumps(index).encode()), *((f"blobs/sha256/{digest}", data) for digest, data in blobs.items())]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    temporary.replace(path)
    return path


def _blob(blobs: dict[str, bytes], data: bytes, media_type: str) -> dict[str, Any]:
    digest = hashlib.sha256(data).hexdigest()
    blobs[digest] = data
    return {"mediaType": media_type, "digest": "sha256:" + digest, "size": len(data)}
