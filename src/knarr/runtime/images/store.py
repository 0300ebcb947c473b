"""The image store: which images there are, under which names, made of which layers.

Role: records of images (`images.json`), their configuration and manifest blobs, and the layers below them. Callers: archive
and registry add images, the image service lists and removes, containers hold layers. Invariants: an image is listed only when
all its layers are unpacked; a layer goes only when no image and no container needs it; images.json is replaced atomically.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.runtime import disk
from knarr.runtime.cri import Image, NotFound, RuntimeFault
from knarr.runtime.images.layers import Layer, LayerBlob, LayerStore, chain_ids
from knarr.runtime.images.reference import IMAGE_ID, Reference, parse_reference
from knarr.runtime.workers import Workers

log = get_logger(__name__)


@dataclass(slots=True)
class StoredImage:
    """One image: its id is the digest of its configuration."""

    id: str
    tags: list[str] = field(default_factory=list)
    """repository:tag, normalised."""
    digests: list[str] = field(default_factory=list)
    """repository@digest of manifests (or indexes) that led to this image."""
    chain: list[str] = field(default_factory=list)
    """Chain ids of its layers, lowest first."""
    size_bytes: int = 0
    pinned: bool = False
    user: str = ""
    loaded: bool = False
    """Put here by hand from an archive: serves when its registry cannot be reached, whatever the pull policy."""


@dataclass(frozen=True, slots=True)
class LayerSource:
    """How to get one layer's blob; digest "" when only the diff id is known (docker archives)."""

    digest: str
    fetch: Callable[[], Awaitable[LayerBlob]]


class ImageStore:
    """See the module."""

    def __init__(self, root: str, workers: Workers, tasks: Tasks, *, max_layer_bytes: int = 0) -> None:
        self.root = root
        self.blobs = os.path.join(root, "blobs", "sha256")
        self.ingest = os.path.join(root, "ingest")
        self.layers = LayerStore(root, workers, tasks, max_layer_bytes=max_layer_bytes)
        self._workers = workers
        self._images: dict[str, StoredImage] = {}
        self._names: dict[str, str] = {}
        self._held: dict[str, list[str]] = {}
        self._adding: dict[object, set[str]] = {}
        self._saving = asyncio.Lock()

    def load(self) -> None:
        """Read the store from disk; an image whose layers are not all there is dropped. Blocks."""
        for path in (self.blobs, self.ingest):
            os.makedirs(path, mode=0o700, exist_ok=True)
        self.layers.load()
        try:
            record = disk.read_record(os.path.join(self.root, "images.json")) or {"images": []}
        except disk.BadRecord as error:
            log.error("image records are unreadable, images must be loaded again", error=error)
            record = {"images": []}
        for item in record["images"]:
            image = StoredImage(**item)
            if all(self.layers.get(chain) for chain in image.chain) and os.path.exists(self._blob_path(image.id)):
                self._images[image.id] = image
        self._index()

    def _index(self) -> None:
        self._names = {}
        for image in self._images.values():
            for name in (*image.tags, *image.digests):
                self._names[name] = image.id

    def _blob_path(self, digest: str) -> str:
        return os.path.join(self.blobs, digest.removeprefix("sha256:"))

    async def _save(self) -> None:
        async with self._saving:
            images = [
                {name: getattr(image, name) for name in StoredImage.__slots__} for image in self._images.values()
            ]  # a snapshot, taken in the loop's thread
            path = os.path.join(self.root, "images.json")
            await self._workers.run(lambda: disk.write_record(path, {"images": images}, sync=True))

    # Reading

    def find(self, reference: str) -> StoredImage | None:
        """Find by id, id prefix-free, tag or digest; None when absent. Raises ImagePullError for a malformed reference."""
        if IMAGE_ID.match(reference):
            found = self._images.get(reference if ":" in reference else f"sha256:{reference}")
            if found is not None or ":" in reference:
                return found
        parsed = parse_reference(reference)
        name = f"{parsed.repository}@{parsed.digest}" if parsed.digest else parsed.tagged
        return self._images.get(self._names.get(name, ""))

    def get(self, reference: str) -> StoredImage:
        """As find, but absence raises NotFound."""
        image = self.find(reference)
        if image is None:
            raise NotFound(f'image "{reference}": not found')
        return image

    def all(self) -> list[StoredImage]:
        return list(self._images.values())

    def config(self, image: StoredImage) -> dict[str, Any]:
        """The image's configuration document (OCI image-spec config.md). Shared: do not change it."""
        return _read_config(self._blob_path(image.id))

    def layers_of(self, image: StoredImage) -> list[Layer]:
        """Unpacked layers, lowest first."""
        found = [self.layers.get(chain) for chain in image.chain]
        return [layer for layer in found if layer is not None]

    # Changing

    async def add(
        self, config: bytes, sources: Sequence[LayerSource], *, names: Sequence[Reference], digests: Sequence[str] = (), size_bytes: int = 0,
        loaded: bool = False,
    ) -> StoredImage:
        """Unpack an image's layers and record it under names; what is there already is not done again.

        Args:
          sources: One per layer, lowest first, as many as the configuration's diff ids.
          digests: repository@digest names.
          loaded: From an archive by hand, and not from a registry.

        Raises RuntimeFault when configuration and layers do not fit.
        """
        import hashlib

        image_id = "sha256:" + hashlib.sha256(config).hexdigest()
        document = parse_config(config)
        diff_ids: list[str] = document["rootfs"]["diff_ids"]
        if len(diff_ids) != len(sources):
            raise RuntimeFault(f"image has {len(sources)} layers but its configuration names {len(diff_ids)}")
        chain = chain_ids(diff_ids)
        token = object()
        self._adding[token] = set(chain)
        try:
            async with asyncio.TaskGroup() as group:
                for position, source in enumerate(sources):
                    group.create_task(self.layers.ensure(chain[position], diff_ids[position], source.digest, source.fetch))
            await self._workers.run(lambda: _write_blob(self._blob_path(image_id), config))
            image = self._images.get(image_id)
            if image is None:
                user = str((document.get("config") or {}).get("User") or "")
                image = self._images[image_id] = StoredImage(image_id, chain=chain, size_bytes=size_bytes, user=user)
            image.loaded = image.loaded or loaded
            for digest in digests:
                self._take_name(image, digest, image.digests)
            for name in names:
                if name.tagged:
                    self._take_name(image, name.tagged, image.tags)
        except BaseExceptionGroup as group_error:
            error = group_error.exceptions[0]
            raise error from None
        finally:
            del self._adding[token]
        await self._save()
        return image

    def _take_name(self, image: StoredImage, name: str, names: list[str]) -> None:
        before = self._images.get(self._names.get(name, ""))
        if before is not None and before is not image:
            for owned in (before.tags, before.digests):
                if name in owned:
                    owned.remove(name)
        if name not in names:
            names.append(name)
        self._names[name] = image.id

    async def tag(self, reference: str, name: Reference) -> None:
        """Give an image one more name."""
        image = self.get(reference)
        self._take_name(image, name.tagged, image.tags)
        await self._save()

    async def pin(self, reference: str, pinned: bool = True) -> None:
        """Protect an image from garbage collection."""
        self.get(reference).pinned = pinned
        await self._save()

    async def remove(self, reference: str) -> bool:
        """Remove an image by any of its names: all its names go, and what only it used. False when it was not there."""
        image = self.find(reference)
        if image is None:
            return False
        del self._images[image.id]
        self._index()
        await self._save()
        await self._workers.run(lambda: disk.remove_tree(self._blob_path(image.id)))
        await self.collect()
        return True

    async def untag(self, reference: str) -> bool:
        """Remove one name; the image goes with its last one. False when there is no such name."""
        image = self.find(reference)
        if image is None or IMAGE_ID.match(reference):
            return await self.remove(reference)
        parsed = parse_reference(reference)
        name = f"{parsed.repository}@{parsed.digest}" if parsed.digest else parsed.tagged
        for owned in (image.tags, image.digests):
            if name in owned:
                owned.remove(name)
        if not image.tags:
            return await self.remove(image.id)
        self._index()
        await self._save()
        return True

    async def prune(self, in_use: set[str]) -> list[str]:
        """Remove images that have no tag, or are not in use, and are not pinned; returns their ids."""
        doomed = [image.id for image in self._images.values() if image.id not in in_use and not image.pinned]
        for image_id in doomed:
            await self.remove(image_id)
        return doomed

    # References from containers

    def hold(self, holder: str, chain: list[str]) -> None:
        """Keep layers while a container stands on them."""
        self._held[holder] = chain

    async def release(self, holder: str) -> None:
        """Let go; layers that nobody else needs are removed."""
        chain = self._held.pop(holder, [])
        if any(item not in self._needed() for item in chain):
            await self.collect()

    def _needed(self) -> set[str]:
        needed: set[str] = set()
        for image in self._images.values():
            needed.update(image.chain)
        for chain in (*self._held.values(), *self._adding.values()):
            needed.update(chain)
        return needed

    async def collect(self) -> int:
        """Remove layers without any user; returns bytes freed."""
        return await self.layers.collect(self._needed())

    def to_cri(self, image: StoredImage) -> Image:
        """The image as CRI shows it."""
        user = image.user.partition(":")[0]
        number = int(user) if user.isdigit() else None
        return Image(
            image.id,
            list(image.tags),
            list(image.digests),
            image.size_bytes,
            uid=number,
            username="" if number is not None else user,
            pinned=image.pinned,
        )


def parse_config(config: bytes) -> dict[str, Any]:
    """Parse and check an image configuration. Raises RuntimeFault."""
    try:
        document = orjson.loads(config)
        diff_ids = document["rootfs"]["diff_ids"]
        if not isinstance(diff_ids, list) or not all(IMAGE_ID.match(item) and ":" in item for item in diff_ids):
            raise TypeError("bad diff_ids")
        if len(diff_ids) > 500:
            raise ValueError("more than 500 layers")
        if not isinstance(document.get("config") or {}, dict):
            raise TypeError("bad config")
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError) as error:
        raise RuntimeFault(f"malformed image configuration: {error}") from error
    return document  # type: ignore[no-any-return]


def _write_blob(path: str, data: bytes) -> None:
    if os.path.exists(path):
        return
    temporary = f"{path}.{os.urandom(4).hex()}.new"
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@lru_cache(maxsize=64)
def _read_config(path: str) -> dict[str, Any]:
    with open(path, "rb") as file:
        document: dict[str, Any] = orjson.loads(file.read())
    return document
