"""containerd or CRI-O as the runtime: RuntimeService and ImageService over CRI v1 gRPC.

Role: the alternative to the embedded runtime, chosen by an option; the kubelet sees no difference. `await start()` first,
`await close()` last. Events come from the runtime where it sends them (containerd 1.7, CRI-O 1.26 and later); an older one is
listed once a second and compared, as upstream's kubelet does.
Invariants: a sandbox's configuration is kept on disk, because CRI wants it again with each container; gRPC's errors become the
faults of cri.py here. grpcio is an optional dependency (extra "cri"), imported on start only.
Source: k8s.io/cri-client, kubelet pkg/kubelet/pleg.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.runtime import disk, process, records
from knarr.runtime.cri import (
    AuthConfig,
    ContainerConfig,
    ContainerEvent,
    ContainerStats,
    ContainerStatus,
    DeadlineExceeded,
    ExecResult,
    FilesystemUsage,
    Image,
    ImagePullError,
    LinuxResources,
    NotFound,
    PodSandboxConfig,
    PodSandboxStatus,
    RuntimeCondition,
    RuntimeFault,
    RuntimeVersion,
    SandboxStats,
)
from knarr.runtime.criapi import codec, convert, streams
from knarr.runtime.events import Events
from knarr.runtime.images.reference import parse_reference
from knarr.runtime.images.registry import Progress

log = get_logger(__name__)
_CALL_SECONDS, _PULL_SECONDS, _RELIST_SECONDS = 120.0, 3600.0, 1.0
_MAX_MESSAGE = 16 << 20
_EVENT_TYPES: dict[str, Any] = {
    "CONTAINER_CREATED_EVENT": "CREATED",
    "CONTAINER_STARTED_EVENT": "STARTED",
    "CONTAINER_STOPPED_EVENT": "STOPPED",
    "CONTAINER_DELETED_EVENT": "DELETED",
}
_FEATURES = {
    "supplementalGroupsPolicy": "supplemental_groups_policy",
    "recursiveReadOnlyMounts": "recursive_read_only_mounts",
    "userNamespaces": "user_namespaces",
}


class GRPCRuntime:
    """Implements cri.RuntimeService and cri.ImageService; see the module.

    Args:
      endpoint: "unix:///run/containerd/containerd.sock".
      state: Folder for the sandboxes' configurations.
      image_endpoint: Another endpoint for images; the same when empty.
    """

    def __init__(self, endpoint: str, state: str, *, image_endpoint: str = "") -> None:
        self._endpoint, self._image_endpoint = endpoint, image_endpoint or endpoint
        self._state = os.path.join(state, "sandboxes")
        self._channels: dict[str, Any] = {}
        self._events, self._tasks = Events(), Tasks()
        self._sandbox_of: dict[str, str] = {}
        self._seen: dict[str, str] = {}
        self.features: frozenset[str] = frozenset()

    async def start(self) -> None:
        """Connect. Raises RuntimeFault when grpcio or the runtime is missing."""
        try:
            import grpc.aio
        except ImportError as error:
            raise RuntimeFault("a CRI runtime needs the package grpcio (pip install 'knarr[cri]')") from error
        options = [("grpc.max_receive_message_length", _MAX_MESSAGE), ("grpc.max_send_message_length", _MAX_MESSAGE)]
        for endpoint in {self._endpoint, self._image_endpoint}:
            self._channels[endpoint] = grpc.aio.insecure_channel(endpoint, options)
        os.makedirs(self._state, mode=0o700, exist_ok=True)
        await self.version()
        self._tasks.spawn_eternal(self._follow_events(), "cri events")

    async def close(self) -> None:
        await self._tasks.close()
        self._events.close()
        for channel in self._channels.values():
            await channel.close()

    # Calls

    def _stub(self, name: str, *, streaming: bool = False) -> Any:
        service, request, response = codec.method(name)
        channel = self._channels[self._image_endpoint if service == "ImageService" else self._endpoint]
        make = channel.unary_stream if streaming else channel.unary_unary
        return make(
            f"/runtime.v1.{service}/{name}",
            request_serializer=lambda message: codec.encode(request, message),
            response_deserializer=lambda data: codec.decode(response, data),
        )

    async def _call(self, name: str, request: dict[str, Any], timeout_seconds: float = _CALL_SECONDS) -> dict[str, Any]:
        import grpc

        try:
            answer: dict[str, Any] = await self._stub(name)(request, timeout=timeout_seconds)
        except grpc.aio.AioRpcError as error:
            raise _fault(error) from error
        return answer

    # Runtime service

    async def version(self) -> RuntimeVersion:
        answer = await self._call("Version", {})
        return RuntimeVersion(answer.get("runtime_name", ""), answer.get("runtime_version", ""), answer.get("runtime_api_version", "v1"))

    async def status(self) -> list[RuntimeCondition]:
        answer = await self._call("Status", {})
        handler: dict[str, Any] = next((item for item in answer.get("runtime_handlers", []) if not item.get("name")), {})
        told = {**answer.get("features", {}), **handler.get("features", {})}
        self.features = frozenset(name for name, field in _FEATURES.items() if told.get(field))
        conditions = answer.get("status", {}).get("conditions", [])
        return [RuntimeCondition(item["type"], item.get("status", False), item.get("reason", ""), item.get("message", "")) for item in conditions]

    async def run_pod_sandbox(self, config: PodSandboxConfig, runtime_handler: str = "") -> str:
        answer = await self._call("RunPodSandbox", {"config": convert.sandbox_config(config), "runtime_handler": runtime_handler})
        sandbox_id: str = answer["pod_sandbox_id"]
        disk.write_record(self._record(sandbox_id), {"config": records.to_record(config)})
        return sandbox_id

    def _record(self, sandbox_id: str) -> str:
        return os.path.join(self._state, f"{os.path.basename(sandbox_id)}.json")

    def _sandbox_config(self, sandbox_id: str) -> dict[str, Any]:
        try:
            record = disk.read_record(self._record(sandbox_id))
        except disk.BadRecord as error:
            raise RuntimeFault(f"the configuration of sandbox {sandbox_id} is lost: {error}") from error
        if record is None:
            raise NotFound(f'sandbox "{sandbox_id}": not found')
        return convert.sandbox_config(records.from_record(PodSandboxConfig, record["config"]))

    async def stop_pod_sandbox(self, sandbox_id: str) -> None:
        with contextlib.suppress(NotFound):
            await self._call("StopPodSandbox", {"pod_sandbox_id": sandbox_id})

    async def remove_pod_sandbox(self, sandbox_id: str) -> None:
        with contextlib.suppress(NotFound):
            await self._call("RemovePodSandbox", {"pod_sandbox_id": sandbox_id})
        disk.remove_tree(self._record(sandbox_id))

    async def pod_sandbox_status(self, sandbox_id: str) -> PodSandboxStatus:
        return convert.sandbox_status((await self._call("PodSandboxStatus", {"pod_sandbox_id": sandbox_id}))["status"])

    async def list_pod_sandboxes(self, labels: Mapping[str, str] | None = None) -> list[PodSandboxStatus]:
        answer = await self._call("ListPodSandbox", {"filter": {"label_selector": dict(labels or {})}})
        # The list lacks addresses and namespaces, which a caller of ours may rely on.
        results = await asyncio.gather(*(self.pod_sandbox_status(item["id"]) for item in answer.get("items", [])), return_exceptions=True)
        return _found(results)

    async def create_container(self, sandbox_id: str, config: ContainerConfig) -> str:
        request = {"pod_sandbox_id": sandbox_id, "config": convert.container_config(config), "sandbox_config": self._sandbox_config(sandbox_id)}
        container_id: str = (await self._call("CreateContainer", request))["container_id"]
        self._sandbox_of[container_id] = sandbox_id
        return container_id

    async def start_container(self, container_id: str) -> None:
        await self._call("StartContainer", {"container_id": container_id})

    async def stop_container(self, container_id: str, timeout_seconds: float, signal: str = "") -> None:
        # CRI has the stop signal in the container's configuration only.
        with contextlib.suppress(NotFound):
            request = {"container_id": container_id, "timeout": int(timeout_seconds + 0.999)}
            await self._call("StopContainer", request, timeout_seconds + _CALL_SECONDS)

    async def remove_container(self, container_id: str) -> None:
        with contextlib.suppress(NotFound):
            await self._call("RemoveContainer", {"container_id": container_id})
        self._sandbox_of.pop(container_id, None)

    async def container_status(self, container_id: str) -> ContainerStatus:
        answer = await self._call("ContainerStatus", {"container_id": container_id})
        return convert.container_status(answer["status"], await self._owner(container_id))

    async def _owner(self, container_id: str) -> str:
        if container_id not in self._sandbox_of:
            for item in (await self._call("ListContainers", {"filter": {"id": container_id}})).get("containers", []):
                self._sandbox_of[item["id"]] = item["pod_sandbox_id"]
        return self._sandbox_of.get(container_id, "")

    async def list_containers(self, labels: Mapping[str, str] | None = None, sandbox_id: str | None = None) -> list[ContainerStatus]:
        request = {"filter": {"label_selector": dict(labels or {}), "pod_sandbox_id": sandbox_id or ""}}
        found = (await self._call("ListContainers", request)).get("containers", [])
        self._sandbox_of.update({item["id"]: item["pod_sandbox_id"] for item in found})
        return _found(await asyncio.gather(*(self.container_status(item["id"]) for item in found), return_exceptions=True))

    async def update_container_resources(self, container_id: str, resources: LinuxResources) -> None:
        await self._call("UpdateContainerResources", {"container_id": container_id, "linux": convert.resources(resources)})

    async def reopen_container_log(self, container_id: str) -> None:
        await self._call("ReopenContainerLog", {"container_id": container_id})

    async def exec_sync(self, container_id: str, command: Sequence[str], timeout_seconds: float = 0) -> ExecResult:
        request = {"container_id": container_id, "cmd": list(command), "timeout": int(timeout_seconds + 0.999)}
        answer = await self._call("ExecSync", request, timeout_seconds + _CALL_SECONDS if timeout_seconds else _PULL_SECONDS)
        return ExecResult(answer.get("stdout", b""), answer.get("stderr", b""), answer.get("exit_code", 0))

    async def exec(self, container_id: str, command: Sequence[str], *, tty: bool, stdin: bool) -> streams.RemoteStream:
        request = {"container_id": container_id, "cmd": list(command), "tty": tty, "stdin": stdin, "stdout": True, "stderr": not tty}
        return await streams.open_process((await self._call("Exec", request))["url"], tty=tty, stdin=stdin)

    async def attach(self, container_id: str, *, tty: bool, stdin: bool) -> streams.RemoteStream:
        request = {"container_id": container_id, "tty": tty, "stdin": stdin, "stdout": True, "stderr": not tty}
        return await streams.open_process((await self._call("Attach", request))["url"], tty=tty, stdin=stdin)

    async def port_forward(self, sandbox_id: str, port: int) -> streams.RemoteConnection:
        answer = await self._call("PortForward", {"pod_sandbox_id": sandbox_id, "port": [port]})
        return await streams.open_connection(answer["url"], port)

    async def list_container_stats(self, labels: Mapping[str, str] | None = None) -> list[ContainerStats]:
        answer = await self._call("ListContainerStats", {"filter": {"label_selector": dict(labels or {})}})
        return [convert.container_stats(item, await self._owner(item.get("attributes", {}).get("id", ""))) for item in answer.get("stats", [])]

    async def list_pod_sandbox_stats(self) -> list[SandboxStats]:
        return [convert.sandbox_stats(item) for item in (await self._call("ListPodSandboxStats", {})).get("stats", [])]

    # Events

    def events(self) -> AsyncIterator[ContainerEvent]:
        return self._events.subscribe()

    async def _follow_events(self) -> None:
        import grpc

        while True:
            try:
                async for item in self._stub("GetContainerEvents", streaming=True)({}):
                    kind = _EVENT_TYPES[item.get("container_event_type", "CONTAINER_CREATED_EVENT")]
                    sandbox_id = item.get("pod_sandbox_status", {}).get("id", "")
                    self._events.publish(ContainerEvent(kind, item.get("container_id", ""), sandbox_id, item.get("created_at", 0)))
            except grpc.aio.AioRpcError as error:
                if error.code() == grpc.StatusCode.UNIMPLEMENTED:
                    break
                log.warning("runtime events broke off", error=error.details())
            await asyncio.sleep(_RELIST_SECONDS)
        log.info("the runtime sends no events; it is listed instead", endpoint=self._endpoint, seconds=_RELIST_SECONDS)
        while True:
            with contextlib.suppress(RuntimeFault):
                await self._relist()
            await asyncio.sleep(_RELIST_SECONDS)

    async def _relist(self) -> None:
        """Compare the containers' states with those of a second ago and publish what changed."""
        import time

        now = time.time_ns()
        found = (await self._call("ListContainers", {})).get("containers", [])
        current = {item["id"]: item.get("state", "CONTAINER_CREATED") for item in found}
        self._sandbox_of.update({item["id"]: item["pod_sandbox_id"] for item in found})
        order: list[Any] = ["CREATED", "STARTED", "STOPPED"]
        level = {"CONTAINER_CREATED": 1, "CONTAINER_RUNNING": 2, "CONTAINER_EXITED": 3, "CONTAINER_UNKNOWN": 3}
        for container_id, state in current.items():
            before = level.get(self._seen.get(container_id, ""), 0)
            for kind in order[before : level[state]]:
                self._events.publish(ContainerEvent(kind, container_id, self._sandbox_of[container_id], now))
        for container_id in self._seen.keys() - current.keys():
            if level[self._seen[container_id]] < 3:
                self._events.publish(ContainerEvent("STOPPED", container_id, self._sandbox_of.get(container_id, ""), now))
            self._events.publish(ContainerEvent("DELETED", container_id, self._sandbox_of.pop(container_id, ""), now))
        self._seen = current

    # Image service

    async def list_images(self) -> list[Image]:
        return [convert.image(item) for item in (await self._call("ListImages", {})).get("images", [])]

    async def image_status(self, reference: str) -> Image | None:
        answer = (await self._call("ImageStatus", {"image": {"image": reference}})).get("image")
        return None if answer is None else convert.image(answer)

    async def pull_image(
        self, reference: str, auth: Sequence[AuthConfig] = (), namespace: str = "", progress: Progress | None = None
    ) -> str:
        """As the Protocol says; CRI tells no progress, so `progress` is never called."""
        name = str(parse_reference(reference))
        last: RuntimeFault | None = None
        for credentials in auth or (None,):
            request: dict[str, Any] = {"image": {"image": name}}
            if credentials is not None:
                request["auth"] = convert.auth(credentials)
            try:
                pulled = (await self._call("PullImage", request, _PULL_SECONDS))["image_ref"]
            except RuntimeFault as error:
                last = error
                continue
            image = await self.image_status(pulled)
            return image.id if image is not None else str(pulled)
        raise ImagePullError(str(last), _pull_reason(str(last)))

    async def remove_image(self, reference: str) -> None:
        with contextlib.suppress(NotFound):
            await self._call("RemoveImage", {"image": {"image": reference}})

    async def image_fs_info(self) -> FilesystemUsage:
        found = (await self._call("ImageFsInfo", {})).get("image_filesystems", [])
        if not found:
            raise RuntimeFault("the runtime reports no image file system")
        return convert.filesystem(found[0])


    async def load_images(self, path: str, *, name: str = "") -> list[Image]:
        """Load an archive with containerd's own program, since CRI cannot. Raises RuntimeFault where there is none."""
        socket_path = self._image_endpoint.removeprefix("unix://")
        if shutil.which("ctr") is None:
            raise RuntimeFault("CRI cannot load archives: use the runtime's own tool (ctr, skopeo)")
        before = {image.id for image in await self.list_images()}
        done = await process.run(["ctr", "-a", socket_path, "-n", "k8s.io", "images", "import", path], timeout_seconds=_PULL_SECONDS)
        named = [line.split()[1] for line in done.stdout.decode(errors="replace").splitlines() if line.startswith("unpacking ")]
        found = [image for image in [await self.image_status(item) for item in named] if image is not None]
        return found or [image for image in await self.list_images() if image.id not in before]


def _found(results: Sequence[Any]) -> list[Any]:
    """Results of gathered calls without those that vanished meanwhile; other failures are raised."""
    for item in results:
        if isinstance(item, BaseException) and not isinstance(item, NotFound):
            raise item
    return [item for item in results if not isinstance(item, BaseException)]


def _fault(error: Any) -> RuntimeFault:
    import grpc

    text = f"rpc error: code = {error.code().name} desc = {error.details()}"
    if error.code() == grpc.StatusCode.NOT_FOUND:
        return NotFound(text)
    if error.code() == grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineExceeded(text)
    return RuntimeFault(text)


def _pull_reason(text: str) -> str:
    for reason in ("RegistryUnavailable", "SignatureValidationFailed"):
        if reason in text:
            return reason
    return "ErrImagePull"
