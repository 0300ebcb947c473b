"""Root file systems, image volumes and a layer mount per user namespace: what a container's mounts need before its start.

Role: between container.py and snapshots.py. Everything mounted lies below the container's bundle (or its sandbox's state), so
that unmounting by folder finds all of it even after a crash.
"""

from __future__ import annotations

import contextlib
import os
import posixpath
import subprocess
from dataclasses import dataclass
from typing import Any

from knarr.runtime import syscalls
from knarr.runtime.cri import ContainerConfig, RuntimeFault
from knarr.runtime.images.store import ImageStore, StoredImage
from knarr.runtime.sandbox import Sandbox, Sandboxes
from knarr.runtime.snapshots import Root, Snapshots
from knarr.runtime.workers import Workers


@dataclass(frozen=True, slots=True)
class Prepared:
    """Directories for the mounts of image volumes and for the VOLUMEs that the image declares, by container path."""

    image_mounts: dict[str, str]
    volume_dirs: dict[str, str]
    mapped_mounts: dict[str, str]
    """Owner-shifted stand-ins of host paths, by container path."""


class Roots:
    """See the module."""

    def __init__(self, snapshots: Snapshots, images: ImageStore, sandboxes: Sandboxes, workers: Workers) -> None:
        self._snapshots, self._images, self._sandboxes, self._workers = snapshots, images, sandboxes, workers

    async def prepare(
        self, sandbox: Sandbox, config: ContainerConfig, layers: list[int], directory: str, bundle: str, image: StoredImage
    ) -> Prepared:
        """Mount a container's root at `<bundle>/rootfs` and its image volumes. Raises RuntimeFault; leftovers are the caller's."""
        return await self._workers.run(lambda: self._prepare(sandbox, config, layers, directory, bundle, image))

    def _prepare(
        self, sandbox: Sandbox, config: ContainerConfig, layers: list[int], directory: str, bundle: str, image: StoredImage
    ) -> Prepared:
        mappings = sandbox.config.namespaces.user_mappings
        base, owner = "", (0, 0)
        if mappings is not None:
            root_id = next((item.host_id for item in mappings if item.container_id == 0), 0)
            owner = (root_id, root_id)
            base = self._mapped_layers(sandbox)
        self._snapshots.mount(Root(layers, directory, os.path.join(bundle, "rootfs"), base, owner))
        image_mounts = {}
        for position, mount in enumerate(item for item in config.mounts if item.image):
            image_mounts[mount.container_path] = self._mount_image(mount.image, mount.image_sub_path, os.path.join(bundle, f"image{position}"))
        document: dict[str, Any] = self._images.config(image).get("config") or {}
        volumes = self._declared_volumes(document, config, bundle, directory)
        mapped = self._mapped_mounts(sandbox, config, bundle) if mappings is not None else {}
        return Prepared(image_mounts, volumes, mapped)

    def _mapped_mounts(self, sandbox: Sandbox, config: ContainerConfig, bundle: str) -> dict[str, str]:
        """Show volumes with the owners that the pod's user namespace expects: what root owns on disk, root owns inside.

        A file system that cannot shift owners is mounted as it is; its files then belong to nobody inside.
        """
        found: dict[str, str] = {}
        fd = os.open(self._sandboxes.namespace_path(sandbox, "user"), os.O_RDONLY | os.O_CLOEXEC)
        try:
            for position, mount in enumerate(config.mounts):
                if mount.image or not mount.host_path or mount.propagation != "PRIVATE":
                    continue
                target = os.path.join(bundle, f"mapped{position}")
                if os.path.isdir(mount.host_path):
                    os.mkdir(target)
                else:
                    os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
                with contextlib.suppress(OSError):
                    syscalls.bind_idmapped(mount.host_path, target, fd)
                    found[mount.container_path] = target
        finally:
            os.close(fd)
        return found

    def _mapped_layers(self, sandbox: Sandbox) -> str:
        """The layers' folder as seen from the sandbox's user namespace: one owner-shifting mount serves all its containers."""
        target = os.path.join(self._sandboxes.state_directory(sandbox.id), "layers")
        if not os.path.ismount(target):
            os.makedirs(target, exist_ok=True)
            fd = os.open(self._sandboxes.namespace_path(sandbox, "user"), os.O_RDONLY | os.O_CLOEXEC)
            try:
                syscalls.bind_idmapped(self._images.layers.root, target, fd)
            except OSError as error:
                raise RuntimeFault(f"this kernel or file system cannot shift owners for user namespaces: {error.strerror}") from error
            finally:
                os.close(fd)
        return target

    def _mount_image(self, reference: str, sub_path: str, target: str) -> str:
        image = self._images.get(reference)
        self._snapshots.mount_readonly([layer.number for layer in self._images.layers_of(image)], target)
        if not sub_path:
            return target
        try:
            fd = syscalls.open_in_root(target, sub_path, os.O_PATH | os.O_DIRECTORY)
        except OSError as error:
            raise RuntimeFault(f'image volume: sub path "{sub_path}" is not a directory of the image') from error
        try:
            return os.readlink(f"/proc/self/fd/{fd}")
        finally:
            os.close(fd)

    def _declared_volumes(self, document: dict[str, Any], config: ContainerConfig, bundle: str, directory: str) -> dict[str, str]:
        """With a read-only root the image's VOLUMEs must still be writable: a copy of each lies beside the writable layer."""
        if not config.security.readonly_rootfs:
            return {}
        taken = {posixpath.normpath(mount.container_path) for mount in config.mounts}
        found: dict[str, str] = {}
        for position, path in enumerate(sorted(document.get("Volumes") or {})):
            if posixpath.normpath(path) in taken or not path.startswith("/"):
                continue
            target = os.path.join(directory, f"volume{position}")
            os.makedirs(target, exist_ok=True)
            with contextlib.suppress(OSError):
                fd = syscalls.open_in_root(os.path.join(bundle, "rootfs"), path, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    # Not by Python: an image may have devices there, which must be copied and not read.
                    subprocess.run(["cp", "-a", f"/proc/self/fd/{fd}/.", target], pass_fds=[fd], stdin=subprocess.DEVNULL, capture_output=True, check=False)
                finally:
                    os.close(fd)
            found[path] = target
        return found

    def unmount(self, folder: str) -> None:
        """Unmount everything that we mounted directly inside a folder. Blocks; idempotent."""
        try:
            entries = [
                entry.path for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False) or entry.name.startswith("mapped")
            ]
        except OSError:
            return
        for path in entries:
            self._snapshots.unmount(path)
