"""Load images from archives: OCI archives and layouts, docker archives, plain or compressed.

Role: behind `knarr image load`. A tar that is not compressed is read in place (layers are unpacked straight from the archive);
a compressed one is first written out. Nothing of an archive is trusted: names only select members, digests are verified.
Source: OCI image-spec image-layout.md, docker image spec v1.2.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
import subprocess
import tarfile
import tempfile
import zlib
from collections.abc import Awaitable, Callable
from typing import Any

import orjson

from knarr.runtime.cri import ImagePullError, RuntimeFault
from knarr.runtime.images.layers import LayerBlob
from knarr.runtime.images.platform import choose
from knarr.runtime.images.reference import Reference, parse_reference
from knarr.runtime.images.store import ImageStore, LayerSource, StoredImage
from knarr.runtime.workers import Workers

_MAX_DOCUMENT = 8 << 20
_MAX_MEMBERS = 100_000
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}\Z")
_INDEXES = {"application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"}


class Archive:
    """Random access to the members of an archive or the files of a layout directory."""

    def __init__(self, path: str) -> None:
        self.path = path
        self._members: dict[str, LayerBlob] = {}
        self._links: dict[str, str] = {}
        if os.path.isdir(path):
            self._scan_directory()
        else:
            self._scan_tar()

    def _scan_directory(self) -> None:
        for base, _, files in os.walk(self.path):
            for name in files:
                full = os.path.join(base, name)
                if not os.path.islink(full):
                    self._members[os.path.relpath(full, self.path)] = LayerBlob(full, 0, os.path.getsize(full))

    def _scan_tar(self) -> None:
        try:
            with tarfile.open(self.path, "r:") as tar:
                for count, info in enumerate(tar):
                    if count > _MAX_MEMBERS:
                        raise RuntimeFault("the archive has too many members")
                    name = posixpath.normpath(info.name).lstrip("/")
                    if info.isreg():
                        self._members[name] = LayerBlob(self.path, info.offset_data, info.size)
                    elif info.issym():
                        self._links[name] = posixpath.normpath(posixpath.join(posixpath.dirname(name), info.linkname))
                    elif info.islnk():
                        self._links[name] = posixpath.normpath(info.linkname).lstrip("/")
        except (tarfile.TarError, OSError) as error:
            raise RuntimeFault(f"{self.path} is not an image archive: {error}") from error

    def find(self, name: str) -> LayerBlob | None:
        name = posixpath.normpath(name).lstrip("/")
        for _ in range(8):
            if name in self._members:
                return self._members[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None

    def blob(self, digest: str) -> LayerBlob:
        if not isinstance(digest, str) or not _DIGEST.match(digest):
            raise RuntimeFault(f"malformed digest {digest!r}")
        found = self.find("blobs/sha256/" + digest.removeprefix("sha256:"))
        if found is None:
            raise RuntimeFault(f"the archive lacks blob {digest}")
        return found

    def read(self, blob: LayerBlob) -> bytes:
        if blob.length > _MAX_DOCUMENT:
            raise RuntimeFault("a document of the archive is too large")
        with open(blob.path, "rb") as file:
            file.seek(blob.offset)
            return file.read(blob.length)

    def document(self, digest: str) -> tuple[dict[str, Any], bytes]:
        """A JSON blob, its digest verified."""
        data = self.read(self.blob(digest))
        if "sha256:" + hashlib.sha256(data).hexdigest() != digest:
            raise RuntimeFault(f"blob {digest} has other content than its digest says")
        return _json(data), data


def _json(data: bytes) -> Any:
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise RuntimeFault(f"malformed JSON in the archive: {error}") from error


def _plain_copy(path: str, directory: str) -> str | None:
    """Decompress a gzip or zstd archive into a temporary file; None when it is not compressed."""
    with open(path, "rb") as source:
        head = source.read(4)
        source.seek(0)
        if head[:2] != b"\x1f\x8b" and head != b"\x28\xb5\x2f\xfd":
            return None
        fd, temporary = tempfile.mkstemp(dir=directory, prefix="archive-")
        try:
            with open(fd, "wb") as target:
                if head[:2] == b"\x1f\x8b":
                    import gzip
                    import shutil

                    with gzip.open(source) as plain:
                        shutil.copyfileobj(plain, target, 1 << 20)
                else:
                    subprocess.run(["zstd", "-dcq"], stdin=source, stdout=target, stderr=subprocess.PIPE, check=True)
        except (OSError, EOFError, zlib.error, subprocess.CalledProcessError) as error:
            os.unlink(temporary)
            raise RuntimeFault(f"cannot decompress {path}: {error}") from error
    return temporary


def _names(annotations: dict[str, Any], default: str) -> list[Reference]:
    """Names of an image in an OCI index: containerd's annotation is a full one, the standard one may be a mere tag."""
    name = annotations.get("io.containerd.image.name") or annotations.get("org.opencontainers.image.ref.name") or default
    if not name:
        return []
    if "/" not in name and ":" not in name and default:
        name = f"{default}:{name}"
    try:
        return [parse_reference(name)]
    except ImagePullError:
        return []


class Loader:
    """Loads all images of one archive into a store."""

    def __init__(self, store: ImageStore, workers: Workers) -> None:
        self._store, self._workers = store, workers

    async def load(self, path: str, *, name: str = "") -> list[StoredImage]:
        """Load every image of an archive or layout that fits this machine.

        Args:
          name: Repository or reference for images whose archive has no name for them.

        Raises RuntimeFault: malformed archive, wrong digests, nothing for this platform.
        """
        temporary = None
        if not os.path.isdir(path):
            try:
                temporary = await self._workers.run(lambda: _plain_copy(path, self._store.ingest))
            except OSError as error:
                raise RuntimeFault(f"cannot read {path}: {error.strerror}") from error
        try:
            archive = await self._workers.run(lambda: Archive(temporary or path))
            if (index := archive.find("index.json")) is not None:
                images = await self._load_oci(archive, _json(archive.read(index)), name)
            elif (manifest := archive.find("manifest.json")) is not None:
                images = await self._load_docker(archive, _json(archive.read(manifest)), name)
            else:
                raise RuntimeFault(f"{path} is not an image archive: neither index.json nor manifest.json in it")
        except (KeyError, TypeError, AttributeError) as error:
            raise RuntimeFault(f"malformed image archive {path}: {error!r}") from error
        finally:
            if temporary is not None:
                os.unlink(temporary)
        if not images:
            raise RuntimeFault(f"{path} holds no image for this machine")
        return images

    async def _load_oci(self, archive: Archive, index: dict[str, Any], name: str) -> list[StoredImage]:
        images = []
        for entry in index["manifests"]:
            descriptor: dict[str, Any] | None = entry
            names = _names(entry.get("annotations") or {}, name)
            digests = [f"{names[0].repository}@{entry['digest']}"] if names else []
            depth = 0
            while descriptor is not None and descriptor.get("mediaType") in _INDEXES and depth < 4:
                document, _ = archive.document(descriptor["digest"])
                descriptor = choose(document["manifests"], lambda item: archive.find("blobs/sha256/" + item["digest"][7:]) is not None)
                depth += 1
            if descriptor is None or (descriptor is entry and not choose([entry])):
                continue
            images.append(await self._load_manifest(archive, descriptor["digest"], names, digests))
        return images

    async def _load_manifest(self, archive: Archive, digest: str, names: list[Reference], digests: list[str]) -> StoredImage:
        manifest, raw = archive.document(digest)
        _, config = archive.document(manifest["config"]["digest"])
        sources = [LayerSource(layer["digest"], _ready(archive.blob(layer["digest"]))) for layer in manifest["layers"]]
        size = len(raw) + len(config) + sum(archive.blob(layer["digest"]).length for layer in manifest["layers"])
        return await self._store.add(config, sources, names=names, digests=digests, size_bytes=size, loaded=True)

    async def _load_docker(self, archive: Archive, manifest: list[dict[str, Any]], name: str) -> list[StoredImage]:
        images = []
        for entry in manifest:
            blob = archive.find(entry["Config"])
            if blob is None:
                raise RuntimeFault(f"the archive lacks {entry['Config']}")
            config = archive.read(blob)
            sources, size = [], len(config)
            for path in entry["Layers"]:
                layer = archive.find(path)
                if layer is None:
                    raise RuntimeFault(f"the archive lacks {path}")
                size += layer.length
                sources.append(LayerSource("", _ready(layer)))
            tags = entry.get("RepoTags") or ([name] if name else [])
            images.append(await self._store.add(config, sources, names=[parse_reference(tag) for tag in tags], size_bytes=size, loaded=True))
        return images


def _ready(blob: LayerBlob) -> Callable[[], Awaitable[LayerBlob]]:
    async def fetch() -> LayerBlob:
        return blob

    return fetch
