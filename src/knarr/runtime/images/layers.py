"""Unpacked layers on disk, shared by images and containers.

Role: one directory per chain id (a layer on top of particular layers), numbered so that an overlay's lower list stays short.
Callers: the image store and the snapshots. Invariants: a numbered directory with a layer.json is complete and never changes;
one without is a leftover, removed at start; a layer is removed only when neither an image nor a container names it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import sys
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import Any

import orjson

from knarr.aiokits.tasks import Tasks
from knarr.runtime import disk, process
from knarr.runtime.cri import RuntimeFault
from knarr.runtime.workers import Workers

_UNPACK = os.path.join(os.path.dirname(__file__), "unpack.py")


@dataclass(frozen=True, slots=True)
class LayerBlob:
    """Where a layer's compressed or plain tar lies: a file, or a part of one."""

    path: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class Layer:
    """An unpacked layer. `number` names its directory; `bytes` is the size of its tar, uncompressed."""

    chain_id: str
    number: int
    bytes: int
    inodes: int


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain id of each layer, lowest first. Source: OCI image-spec config.md."""
    chain: list[str] = []
    for diff_id in diff_ids:
        chain.append("sha256:" + hashlib.sha256(f"{chain[-1]} {diff_id}".encode()).hexdigest() if chain else diff_id)
    return chain


class LayerStore:
    """Layers below `<root>/layers`; see the module."""

    def __init__(self, root: str, workers: Workers, tasks: Tasks, *, parallel: int = 2, max_layer_bytes: int = 0) -> None:
        self.root = os.path.join(root, "layers")
        self._workers = workers
        self._tasks = tasks
        self._limit = max_layer_bytes
        self._layers: dict[str, Layer] = {}
        self._making: dict[str, asyncio.Task[Layer]] = {}
        self._slots = asyncio.Semaphore(parallel)
        self._next = 1

    def load(self) -> None:
        """Read what is on disk and remove leftovers. Blocks."""
        os.makedirs(self.root, mode=0o700, exist_ok=True)
        for name in os.listdir(self.root):
            path = os.path.join(self.root, name)
            try:
                record = disk.read_record(os.path.join(path, "layer.json")) if name.isdigit() else None
            except disk.BadRecord:
                record = None
            if record is None:
                disk.remove_tree(path)
                continue
            self._layers[record["chain_id"]] = Layer(record["chain_id"], int(name), record["bytes"], record["inodes"])
            self._next = max(self._next, int(name) + 1)

    def get(self, chain_id: str) -> Layer | None:
        return self._layers.get(chain_id)

    def path(self, layer: Layer) -> str:
        """The directory to mount as a lower layer."""
        return os.path.join(self.root, str(layer.number), "fs")

    async def ensure(self, chain_id: str, diff_id: str, digest: str, fetch: Callable[[], Awaitable[LayerBlob]]) -> Layer:
        """Unpack a layer unless it is there; concurrent calls for one chain id share the work.

        Args:
          digest: Expected digest of the blob as stored, "" when only the diff id is known.
          fetch: Brings the blob onto this machine; called only when needed.

        Raises RuntimeFault when the data does not have the expected digests or is malformed.
        """
        layer = self._layers.get(chain_id)
        if layer is not None:
            return layer
        task = self._making.get(chain_id)
        if task is None:
            task = self._tasks.spawn(self._make(chain_id, diff_id, digest, fetch), f"layer {chain_id[7:19]}")
            self._making[chain_id] = task
            task.add_done_callback(lambda _: self._making.pop(chain_id, None))
        return await asyncio.shield(task)

    async def _make(self, chain_id: str, diff_id: str, digest: str, fetch: Callable[[], Awaitable[LayerBlob]]) -> Layer:
        blob = await fetch()
        number, self._next = self._next, self._next + 1
        directory = os.path.join(self.root, str(number))
        target = os.path.join(directory, "fs")
        try:
            os.mkdir(directory, 0o700)
            os.mkdir(target, 0o755)
            async with self._slots:
                result = await self._unpack(target, blob)
            if result["diff_id"] != diff_id:
                raise RuntimeFault(f"layer has diff id {result['diff_id']}, the image says {diff_id}")
            if digest and result["digest"] != digest:
                raise RuntimeFault(f"layer has digest {result['digest']}, the manifest says {digest}")
            record = {"chain_id": chain_id, "diff_id": diff_id, "bytes": result["bytes"], "inodes": result["inodes"]}
            await self._workers.run(lambda: disk.write_record(os.path.join(directory, "layer.json"), record, sync=True))
        except BaseException:
            await asyncio.shield(self._workers.run(lambda: disk.remove_tree(directory)))
            raise
        layer = Layer(chain_id, number, int(result["bytes"]), int(result["inodes"]))
        self._layers[chain_id] = layer
        return layer

    async def _unpack(self, target: str, blob: LayerBlob) -> dict[str, Any]:
        argv = [sys.executable, "-I", "-S", _UNPACK, target, blob.path, str(blob.offset), str(blob.length), str(self._limit)]
        done = await process.run(argv, check=False, timeout_seconds=3600)
        if done.returncode != 0:
            raise RuntimeFault(f"failed to unpack layer: {done.stderr.decode(errors='replace').strip()[-500:]}")
        result: dict[str, Any] = orjson.loads(done.stdout)
        return result

    async def collect(self, in_use: set[str]) -> int:
        """Remove the layers that are not in use; returns their plain size in bytes."""
        freed = 0
        for layer in [layer for chain, layer in self._layers.items() if chain not in in_use and chain not in self._making]:
            del self._layers[layer.chain_id]
            directory = os.path.join(self.root, str(layer.number))
            # Without its record the directory is a leftover even if we die half-way through.
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(directory, "layer.json"))
            await self._workers.run(lambda path=directory: disk.remove_tree(path))  # type: ignore[misc]
            freed += layer.bytes
        return freed

    def usage(self) -> tuple[int, int]:
        """(bytes, inodes) of all layers, as unpacked."""
        return sum(layer.bytes for layer in self._layers.values()), sum(layer.inodes for layer in self._layers.values())
