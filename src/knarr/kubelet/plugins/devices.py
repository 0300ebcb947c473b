"""Device plugins: which devices a node has, and which container got which.

Callers: kubelet (`run` serves the registration socket, capacity), affinity (hints and the choice, when a pod is admitted), pod_start
(what a container gets), pod_stop (release). Plugins announce themselves on <root>/device-plugins/kubelet.sock or through the
registration folder; what was given to whom is kept in a check-point, so a restarted kubelet knows it. Invariant: a device is in at most
one container's hands, but that containers take over those of their pod's init containers.
Source: pkg/kubelet/cm/devicemanager.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import orjson

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import quantity
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.affinity.hints import Hint, Hints, combinations
from knarr.kubelet.inotify import IN_CREATE, IN_MOVED_TO, Inotify
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
    nodes: dict[str, frozenset[int]] = field(default_factory=dict)
    """Device id to the NUMA nodes that it is near; empty for one that does not tell."""
    pre_start: bool = False
    preferring: bool = False
    """Whether the plugin wants to be asked which devices go well together."""
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
        self._aligned: dict[tuple[str, str], frozenset[int]] = {}
        """(Pod uid, container) whose devices are not in use yet to the NUMA nodes that they were to be near."""
        self._known: set[str] = set()
        """Resources that plugins ever offered here: known after a restart before their plugins are back."""
        self._tasks = Tasks()
        self._load()

    # --- check-point ---

    def _load(self) -> None:
        try:
            with open(os.path.join(self._folder, _CHECKPOINT), "rb") as file:
                stored = orjson.loads(file.read())
            self._given, self._known = stored["given"], set(stored.get("known", ()))
        except (OSError, ValueError, KeyError):
            self._given, self._known = {}, set()

    def _save(self) -> None:
        os.makedirs(self._folder, 0o750, exist_ok=True)
        path = os.path.join(self._folder, _CHECKPOINT)
        with open(path + ".new", "wb") as file:
            file.write(orjson.dumps({"version": 1, "given": self._given, "known": sorted(self._known)}))
        os.replace(path + ".new", path)

    # --- plugins ---

    async def run(self) -> None:
        """Serve the registration socket. Eternal."""
        server: Any = None
        try:
            try:
                await self._somebody()
                server = await self._serve()
                await asyncio.Event().wait()
            finally:
                if server is not None:
                    await server.stop(0)
        finally:
            await self._tasks.close()
            for resource in self._resources.values():
                await resource.plugin.close()

    async def _somebody(self) -> None:
        """Until there is something in the folder: a plugin makes its own socket there first, and gRPC is not loaded for nothing."""
        os.makedirs(self._folder, 0o750, exist_ok=True)
        watch = Inotify()
        try:
            watch.add(self._folder, IN_CREATE | IN_MOVED_TO)
            while not os.listdir(self._folder):
                await watch.wait()
        finally:
            watch.close()

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

    async def register(self, name: str, endpoint: str, versions: list[str], *, known_root: bool = False) -> None:
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
        resource = _Resource(Plugin(endpoint))
        _take_options(resource, options)
        self._resources[name] = resource
        if name not in self._known:
            self._known.add(name)
            self._save()
        resource.following = self._tasks.spawn(self._follow(name, resource), f"devices-{name}")

    async def _follow(self, name: str, resource: _Resource) -> None:
        with contextlib.suppress(PluginError):
            _take_options(resource, await resource.plugin.call(_SERVICE + "GetDevicePluginOptions", "Empty", {}, "DevicePluginOptions"))
        try:
            async for answer in resource.plugin.stream(_SERVICE + "ListAndWatch", "Empty", {}, "ListAndWatchResponse"):
                devices = answer.get("devices") or []
                resource.devices = {d["ID"]: d.get("health") == "Healthy" for d in devices}
                resource.nodes = {d["ID"]: frozenset(n.get("ID", 0) for n in (d.get("topology") or {}).get("nodes") or []) for d in devices}
                self._changed()
        except PluginError as e:
            log.warning("device plugin lost", resource=name, error=str(e))
        resource.devices = dict.fromkeys(resource.devices, False)
        self._changed()

    def capacity(self) -> dict[str, tuple[int, int]]:
        """Resource name to (all devices, healthy ones)."""
        return {n: (len(r.devices), sum(r.devices.values())) for n, r in self._resources.items()}

    # --- the choice, when a pod is admitted ---

    def wanted(self, pod: Object, container: Object) -> dict[str, int]:
        """Resource name to how many devices a container is to have."""
        limits = (container.get("resources") or {}).get("limits") or {}
        names = [n for n in limits if n in self._resources or n in self._known or self._held(pod, container, n)]
        return {n: count for n in names if (count := quantity.value(limits[n]))}

    def holds(self, pod_uid: str) -> bool:
        """Whether a pod has any devices."""
        return pod_uid in self._given

    def _held(self, pod: Object, container: Object, name: str) -> list[str]:
        return self._given.get(podutil.uid(pod), {}).get(container["name"], {}).get(name, [])

    def _free(self, name: str) -> set[str]:
        used = {i for c in self._given.values() for r in c.values() for i in r.get(name, [])}
        return {i for i, healthy in self._resources[name].devices.items() if healthy and i not in used}

    def _left(self, pod: Object, container: Object, name: str) -> set[str]:
        """Devices of the pod's init containers that will have ended when this one starts, and that none after them took over."""
        left: set[str] = set()
        ordinary = [c for c in podutil.init_containers(pod) if not podutil.is_sidecar(c)]
        for before in (*podutil.init_containers(pod), *podutil.containers(pod)):
            if before["name"] == container["name"]:
                break
            held = set(self._held(pod, before, name))
            left = left | held if before in ordinary else left - held
        return left

    def hints(self, pod: Object, container: Object, numa_nodes: Sequence[int]) -> list[Hints]:
        """For each resource that a container asks for, near which NUMA nodes enough devices are."""
        out: list[Hints] = []
        for name, count in self.wanted(pod, container).items():
            resource = self._resources.get(name)
            if resource is None or not any(resource.nodes.values()):
                out.append(None)
                continue
            held, left = set(self._held(pod, container, name)), self._left(pod, container, name)
            free = held or self._free(name) | left
            if len(free) < count or (held and len(held) != count):
                out.append([])
                continue
            sets = combinations(tuple(sorted(numa_nodes)))
            least = min((len(s) for s in sets if sum(bool(n & s) for n in resource.nodes.values()) >= count), default=len(numa_nodes))
            must = [resource.nodes.get(i, frozenset()) for i in left if not held and resource.nodes.get(i)]
            near = [s for s in sets if all(n & s for n in must) and sum(bool(resource.nodes.get(i, frozenset()) & s) for i in free) >= count]
            out.append([Hint(s, len(s) == least) for s in near])
        return out

    def place(self, pod: Object, container: Object, near: frozenset[int] | None) -> None:
        """Choose a container's devices, near these NUMA nodes as far as possible. Raises NotEnoughDevices."""
        uid, name = podutil.uid(pod), container["name"]
        for resource_name, count in self.wanted(pod, container).items():
            if self._held(pod, container, resource_name):
                continue
            resource = self._resources.get(resource_name)
            if resource is None or (resource.devices and not any(resource.devices.values())):
                raise NotEnoughDevices(f"no healthy devices present; cannot allocate unhealthy devices {resource_name}")
            left = self._left(pod, container, resource_name)
            free = self._free(resource_name) - left
            if len(free) + len(left) < count:
                available = len(free) + len(left)
                raise NotEnoughDevices(f"requested number of devices unavailable for {resource_name}. Requested: {count}, Available: {available}")

            def rank(device: str, resource: _Resource = resource, left: set[str] = left) -> tuple[bool, int, str]:
                own = resource.nodes.get(device, frozenset())
                return device not in left, 0 if near is None or own & near else 1 if own else 2, device

            self._given.setdefault(uid, {}).setdefault(name, {})[resource_name] = sorted(free | left, key=rank)[:count]
            self._aligned[uid, name] = near or frozenset()
            self._save()

    # --- what a container gets ---

    async def allocate(self, pod: Object, container: Object) -> Granted:
        """Give a container the devices that were chosen for it; the same ones again at a restart.

        Raises:
          NotEnoughDevices: none were chosen, and there are not enough. PluginError: the plugin refused.
        """
        out = Granted()
        self.place(pod, container, None)
        near = self._aligned.pop((podutil.uid(pod), container["name"]), None)
        for name in self.wanted(pod, container):
            resource = self._resources.get(name)
            if resource is None:
                continue
            if near is not None and resource.preferring:
                await self._prefer(pod, container, name, resource, near)
            ids = self._held(pod, container, name)
            request = {"container_requests": [{"devices_ids": ids}]}
            answer = await resource.plugin.call(_SERVICE + "Allocate", "AllocateRequest", request, "AllocateResponse")
            if resource.pre_start:
                await resource.plugin.call(_SERVICE + "PreStartContainer", "PreStartContainerRequest", {"devices_ids": ids}, "Empty")
            for part in answer.get("container_responses") or []:
                _merge(out, part)
        return out

    async def _prefer(self, pod: Object, container: Object, name: str, resource: _Resource, near: frozenset[int]) -> None:
        """Let the plugin say which of the devices in question go best together. What it may not say is not heard."""
        held, left = self._held(pod, container, name), self._left(pod, container, name)
        could = self._free(name) | set(held)
        if near and len(close := {i for i in could if resource.nodes.get(i, frozenset()) & near}) >= len(held):
            could = close
        must = sorted(left & set(held))
        request = {"available_device_ids": sorted(could | set(must)), "must_include_device_ids": must, "allocation_size": len(held)}
        call = {"container_requests": [request]}
        answer = await resource.plugin.call(_SERVICE + "GetPreferredAllocation", "PreferredAllocationRequest", call, "PreferredAllocationResponse")
        for part in answer.get("container_responses") or []:
            chosen = list(dict.fromkeys(part.get("device_ids") or []))
            # Another container may have taken one of them meanwhile.
            if len(chosen) == len(held) and set(chosen) <= self._free(name) | set(held) and set(must) <= set(chosen):
                self._given[podutil.uid(pod)][container["name"]][name] = chosen
                self._save()

    def release(self, pod_uid: str) -> None:
        """The pod is gone; its devices are free."""
        for key in [k for k in self._aligned if k[0] == pod_uid]:
            del self._aligned[key]
        if self._given.pop(pod_uid, None) is not None:
            self._save()


def _take_options(resource: _Resource, options: Message) -> None:
    resource.pre_start = resource.pre_start or bool(options.get("pre_start_required"))
    resource.preferring = resource.preferring or bool(options.get("get_preferred_allocation_available"))


def _merge(out: Granted, part: Message) -> None:
    out.env.update(part.get("envs") or {})
    out.annotations.update(part.get("annotations") or {})
    out.cdi_devices += [d["name"] for d in part.get("cdi_devices") or []]
    for m in part.get("mounts") or []:
        out.mounts.append(Mount(m["container_path"], m.get("host_path", ""), readonly=bool(m.get("read_only"))))
    for d in part.get("devices") or []:
        out.devices.append(Device(d["container_path"], d.get("host_path", ""), d.get("permissions") or "rwm"))
