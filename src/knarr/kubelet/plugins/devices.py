"""Device plugins: which devices a node has, and which container got which.

Callers: kubelet (`run` serves the registration socket), node_status (capacity), pod_start (allocation), pods (release).
Plugins announce themselves on <root>/device-plugins/kubelet.sock or through the registration folder; what was given to whom is
kept in a check-point, so a restarted kubelet knows it. Invariant: a device is in at most one container's hands.
Source: pkg/kubelet/cm/devicemanager.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.plugins.wire import Message, Plugin, PluginError, decode, encode
from knarr.runtime.cri import Device, Mount

log = get_logger(__name__)

_SERVICE = "/v1beta1.DevicePlugin/"
_CHECKPOINT = "kubelet_internal_checkpoint"


class NotEnoughDevices(Exception):
    """The node cannot give a container the devices that it asks for."""


@dataclass(slots=True)
class _Resource:
    plugin: Plugin
    devices: dict[str, bool] = field(default_factory=dict)
    """Device id to whether it is healthy."""
    pre_start: bool = False
    following: asyncio.Task[None] | None = None


@dataclass(slots=True)
class Granted:
    """What a container gets for its devices."""

    env: dict[str, str] = field(default_factory=dict)
    mounts: list[Mount] = field(default_factory=list)
    devices: list[Device] = field(default_factory=list)
    annotations: dict[str, str] = field(default_factory=dict)
    cdi_devices: list[str] = field(default_factory=list)


class DeviceManager:
    """All extended resources of this node that plugins provide."""

    def __init__(self, folder: str, changed: Callable[[], None]) -> None:
        """`changed` is called when the node's capacity became another."""
        self._folder = folder
        self._changed = changed
        self._resources: dict[str, _Resource] = {}
        self._given: dict[str, dict[str, dict[str, list[str]]]] = {}
        """Pod uid to container to resource to device ids."""
        self._tasks = Tasks()
        self._load()

    # --- check-point ---

    def _load(self) -> None:
        try:
            with open(os.path.join(self._folder, _CHECKPOINT), "rb") as file:
                self._given = orjson.loads(file.read())["given"]
        except (OSError, ValueError, KeyError):
            self._given = {}

    def _save(self) -> None:
        os.makedirs(self._folder, 0o750, exist_ok=True)
        path = os.path.join(self._folder, _CHECKPOINT)
        with open(path + ".new", "wb") as file:
            file.write(orjson.dumps({"version": 1, "given": self._given}))
        os.replace(path + ".new", path)

    # --- plugins ---

    async def run(self) -> None:
        """Serve the registration socket when grpcio is there. Eternal."""
        server: Any = None
        try:
            try:
                import importlib.util

                if importlib.util.find_spec("grpc") is None or not os.path.isdir(self._folder):
                    # Nobody made the folder: no device plugin is deployed here, and gRPC is not loaded for nothing.
                    await asyncio.Event().wait()
                server = await self._serve()
                await asyncio.Event().wait()
            finally:
                if server is not None:
                    await server.stop(0)
        finally:
            await self._tasks.close()
            for resource in self._resources.values():
                await resource.plugin.close()

    async def _serve(self) -> Any:
        import grpc.aio

        async def register(data: bytes, context: Any) -> bytes:
            request = decode("RegisterRequest", data)
            try:
                if request.get("version") != "v1beta1":
                    raise PluginError(f"requested API version {request.get('version')} is not supported by kubelet, supported: v1beta1")
                endpoint = os.path.join(self._folder, os.path.basename(request.get("endpoint", "")))
                await self._add(request.get("resource_name", ""), endpoint, request.get("options") or {})
            except PluginError as e:
                await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
            return encode("Empty", {})

        handler = grpc.unary_unary_rpc_method_handler(register)
        server = grpc.aio.server()
        server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler("v1beta1.Registration", {"Register": handler})])
        path = os.path.join(self._folder, "kubelet.sock")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        server.add_insecure_port(f"unix://{path}")
        await server.start()
        return server

    async def register(self, name: str, endpoint: str, versions: list[str]) -> None:
        """A device plugin appeared in the registration folder. Raises PluginError."""
        if "v1beta1" not in versions:
            raise PluginError(f"device plugin versions {versions} are not supported")
        await self._add(name, endpoint, {})

    async def deregister(self, name: str, endpoint: str = "") -> None:
        """The plugin is gone: its devices are unhealthy until it comes back."""
        resource = self._resources.get(name)
        if resource is not None:
            resource.devices = dict.fromkeys(resource.devices, False)
            self._changed()

    async def _add(self, name: str, endpoint: str, options: Message) -> None:
        if "/" not in name:
            raise PluginError(f'invalid name of device plugin socket: "{name}"')
        old = self._resources.pop(name, None)
        if old is not None:
            if old.following is not None:
                old.following.cancel()
            await old.plugin.close()
        resource = _Resource(Plugin(endpoint), pre_start=bool(options.get("pre_start_required")))
        self._resources[name] = resource
        resource.following = self._tasks.spawn(self._follow(name, resource), f"devices-{name}")

    async def _follow(self, name: str, resource: _Resource) -> None:
        try:
            async for answer in resource.plugin.stream(_SERVICE + "ListAndWatch", "Empty", {}, "ListAndWatchResponse"):
                resource.devices = {d["ID"]: d.get("health") == "Healthy" for d in answer.get("devices") or []}
                self._changed()
        except PluginError as e:
            log.warning("device plugin lost", resource=name, error=str(e))
        resource.devices = dict.fromkeys(resource.devices, False)
        self._changed()

    def capacity(self) -> dict[str, tuple[int, int]]:
        """Resource name to (all devices, healthy ones)."""
        return {n: (len(r.devices), sum(r.devices.values())) for n, r in self._resources.items()}

    # --- allocation ---

    async def allocate(self, pod: Object, container: Object) -> Granted:
        """Give a container its devices; the same ones again at a restart.

        Raises:
          NotEnoughDevices: they are all in use or unhealthy. PluginError: the plugin refused.
        """
        out = Granted()
        limits = (container.get("resources") or {}).get("limits") or {}
        for name in [n for n in limits if n in self._resources or self._held(pod, container, n)]:
            ids = self._choose(pod, container, name, quantity.value(limits[name]))
            resource = self._resources.get(name)
            if resource is None or not ids:
                continue
            request = {"container_requests": [{"devices_ids": ids}]}
            answer = await resource.plugin.call(_SERVICE + "Allocate", "AllocateRequest", request, "AllocateResponse")
            if resource.pre_start:
                await resource.plugin.call(_SERVICE + "PreStartContainer", "PreStartContainerRequest", {"devices_ids": ids}, "Empty")
            for part in answer.get("container_responses") or []:
                _merge(out, part)
        return out

    def _held(self, pod: Object, container: Object, name: str) -> list[str]:
        return self._given.get(podutil.uid(pod), {}).get(container["name"], {}).get(name, [])

    def _choose(self, pod: Object, container: Object, name: str, count: int) -> list[str]:
        held = self._held(pod, container, name)
        if held:
            return held
        used = {i for c in self._given.values() for r in c.values() for i in r.get(name, [])}
        resource = self._resources[name]
        free = sorted(i for i, healthy in resource.devices.items() if healthy and i not in used)
        if len(free) < count:
            raise NotEnoughDevices(f"requested number of devices unavailable for {name}. Requested: {count}, Available: {len(free)}")
        self._given.setdefault(podutil.uid(pod), {}).setdefault(container["name"], {})[name] = free[:count]
        self._save()
        return free[:count]

    def release(self, pod_uid: str) -> None:
        """The pod is gone; its devices are free."""
        if self._given.pop(pod_uid, None) is not None:
            self._save()


def _merge(out: Granted, part: Message) -> None:
    out.env.update(part.get("envs") or {})
    out.annotations.update(part.get("annotations") or {})
    out.cdi_devices += [d["name"] for d in part.get("cdi_devices") or []]
    for m in part.get("mounts") or []:
        out.mounts.append(Mount(m["container_path"], m.get("host_path", ""), readonly=bool(m.get("read_only"))))
    for d in part.get("devices") or []:
        out.devices.append(Device(d["container_path"], d.get("host_path", ""), d.get("permissions") or "rwm"))
