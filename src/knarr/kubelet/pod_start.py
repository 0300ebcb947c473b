"""Starting one container: back-off, image, configuration, create, start, postStart hook. Called by pod_sync.

A failed start leaves its reason in worker.reasons, which becomes the container's Waiting state. Order as upstream, with its
events: Pulled/Pulling, Created, Started. Source: pkg/kubelet/kuberuntime/kuberuntime_container.go startContainer.
"""

from __future__ import annotations

import os
import re
import time

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import hooks, pod_stop, pod_sync, podutil, sandboxes
from knarr.kubelet.containers import ConfigError, ContainerContext, container_config
from knarr.kubelet.images import ImageProblem
from knarr.kubelet.observed import Observed
from knarr.kubelet.plugins.devices import NotEnoughDevices
from knarr.kubelet.plugins.dra import ClaimError
from knarr.kubelet.plugins.wire import PluginError
from knarr.kubelet.pod_worker import PodEnding, PodWorker
from knarr.kubelet.userns import NoRangeLeft
from knarr.runtime.cri import ContainerState, Image, RuntimeFault

log = get_logger(__name__)

_RETRY_SECONDS = 10.0


async def start(worker: PodWorker, name: str, sandbox_id: str, observed: Observed) -> bool:
    """Start a container if its back-off allows; True when the runtime's world changed.

    Raises:
      PodEnding: the pod is to end.
    """
    if worker.ending:
        raise PodEnding
    spec = podutil.container(worker.pod, name)
    if spec is None or _backs_off(worker, spec, observed):
        return False
    worker.node.count(f'kubelet_started_containers_total{{container_type="{_kind(worker.pod, name)}"}}')
    try:
        image = await _image(worker, spec)
        return await _create_and_start(worker, spec, image, sandbox_id, observed)
    except ImageProblem as e:
        worker.node.container_event(worker.pod, name, "Warning", "Failed", f"Error: {e.reason}")
        _failed(worker, observed, name, e.reason, str(e), e.retry_seconds)
    return False


def _kind(pod: Object, name: str) -> str:
    """The container's kind as metrics name it."""
    if any(c["name"] == name for c in podutil.init_containers(pod)):
        return "init_container"
    return "container" if any(c["name"] == name for c in podutil.containers(pod)) else "ephemeral_container"


def _failed(
    worker: PodWorker, observed: Observed, name: str, reason: str, message: str, retry_seconds: float | None = None
) -> None:
    worker.node.count(f'kubelet_started_containers_errors_total{{container_type="{_kind(worker.pod, name)}",code="{reason}"}}')
    worker.reasons[name] = (reason, message)
    worker.wake_after(_RETRY_SECONDS if retry_seconds is None else max(0.05, retry_seconds))
    pod_sync.publish(worker, observed)


def _backs_off(worker: PodWorker, spec: Object, observed: Observed) -> bool:
    """Whether the container must wait after its last end; its state and an event tell so."""
    name, last = spec["name"], observed.latest_exited(spec["name"])
    if last is None:
        return False
    # A new image or new resources deserve a new chance.
    key = f"{name}_{podutil.container_hash(spec)}_{spec.get('resources') or ''}"
    finished, now = last.finished_at_ns / 1e9, clock.now()
    wait = worker.back_off.remaining(key, finished, now)
    if wait <= 0:
        worker.back_off.next(key, finished, now)
        return False
    if worker.backing_off.get(name) != finished:
        worker.backing_off[name] = finished
        pod = worker.pod
        message = f"Back-off restarting failed container {name} in pod {podutil.full_name(pod)}"
        worker.node.container_event(pod, name, "Warning", "BackOff", message)
    worker.reasons[name] = ("CrashLoopBackOff", pod_sync.back_off_message(worker.back_off.delay(key), name, worker.pod))
    worker.wake_after(wait)
    pod_sync.publish(worker, observed)
    return True


async def _image(worker: PodWorker, spec: Object) -> Image:
    node, pod = worker.node, worker.pod
    secrets = await pod_sync.pull_secrets(worker)

    def event(kind: str, reason: str, message: str) -> None:
        node.container_event(pod, spec["name"], kind, reason, message)

    begun = time.monotonic()
    try:
        return await worker.interruptible(node.images.ensure(pod, spec["image"], spec.get("imagePullPolicy") or "", secrets, event))
    finally:
        worker.pulling_seconds += time.monotonic() - begun


def _attempt(worker: PodWorker, name: str, observed: Observed) -> int:
    """The new container's number: one more than the last, which may be known only from its log."""
    last = observed.latest(name)
    if last is not None:
        # One that was created and never started is replaced, not restarted.
        return last.metadata.attempt + (last.state is not ContainerState.CREATED)
    folder = os.path.join(sandboxes.log_directory(worker.node.config, worker.pod), name)
    try:
        entries = [e for e in os.scandir(folder) if e.stat().st_size]
        numbers = [int(m[1]) for m in (re.match(r"(\d+)\.log", entry.name) for entry in entries) if m]
    except OSError:
        return 0
    return max(numbers, default=-1) + 1


def _target(worker: PodWorker, spec: Object, observed: Observed) -> str:
    """The container whose processes an ephemeral container sees. Raises ConfigError."""
    name = spec.get("targetContainerName")
    if not name:
        return ""
    found = observed.latest(name)
    if found is None:
        raise ConfigError(f'unable to find target container "{name}"')
    return found.id


async def _create_and_start(worker: PodWorker, spec: Object, image: Image, sandbox_id: str, observed: Observed) -> bool:
    node, pod, name = worker.node, worker.pod, spec["name"]
    try:
        await worker.interruptible(_wait_services(worker))
        context = ContainerContext(
            config=node.config,
            env=node.env_context(pod, worker.ips if not podutil.host_network(pod) else list(node.config.host_ips)),
            volumes=node.volumes.of(worker.uid).volumes,
            subpaths=node.volumes.subpaths,
            memory_capacity_bytes=node.capacity.memory_bytes,
            group_oom=node.cgroups.is_v2,
            swap_accounting=node.cgroups.swap_accounting(),
            extra_groups=node.volumes.of(worker.uid).groups,
            mappings=pod_sync.mappings_of(worker),
            cpuset=node.affinity.cpuset(worker.uid, name),
            mems=node.affinity.mems(worker.uid, name),
            exclusive=node.affinity.exclusive(worker.uid, name),
        )
        granted = await node.devices.allocate(pod, spec)
        context.devices, context.device_mounts, context.device_env = granted.devices, granted.mounts, granted.env
        context.device_annotations = granted.annotations
        context.cdi_devices = [*granted.cdi_devices, *node.dynamic.cdi_devices(pod, spec)]
        target = _target(worker, spec, observed)
        config = await worker.interruptible(
            container_config(pod, spec, image, _attempt(worker, name, observed), context, target_id=target)
        )
    except (ConfigError, OSError, NoRangeLeft, NotEnoughDevices, PluginError, ClaimError) as e:
        node.container_event(pod, name, "Warning", "Failed", f"Error: {e}")
        _failed(worker, observed, name, "CreateContainerConfigError", str(e))
        return False
    if worker.ending:
        raise PodEnding
    last = observed.latest(name)
    try:
        if last is not None and last.state is ContainerState.CREATED:
            await node.runtime.remove_container(last.id)
        container_id = await node.runtime.create_container(sandbox_id, config)
    except RuntimeFault as e:
        node.container_event(pod, name, "Warning", "Failed", f"Error: {e}")
        _failed(worker, observed, name, "CreateContainerError", str(e))
        return False
    node.container_event(pod, name, "Normal", "Created", "Container created")
    try:
        await node.runtime.start_container(container_id)
    except RuntimeFault as e:
        node.container_event(pod, name, "Warning", "Failed", f"Error: {e}")
        _failed(worker, observed, name, "RunContainerError", str(e))
        return True
    node.container_event(pod, name, "Normal", "Started", "Container started")
    worker.reasons.pop(name, None)
    hook = (spec.get("lifecycle") or {}).get("postStart")
    if hook:
        await _post_start(worker, spec, container_id, hook)
    return True


async def _wait_services(worker: PodWorker) -> None:
    if not podutil.is_static(worker.pod):
        await worker.node.wait_services()  # type: ignore[misc]


async def _post_start(worker: PodWorker, spec: Object, container_id: str, hook: Object) -> None:
    """Run the hook; when it fails the container is killed and its restart policy decides."""
    node, pod, name = worker.node, worker.pod, spec["name"]
    ip = worker.ips[0] if worker.ips else (node.config.host_ips[0] if podutil.host_network(pod) else "")
    try:
        await worker.interruptible(hooks.run_hook(node, pod, spec, container_id, hook, ip))
    except hooks.HookError as e:
        node.container_event(pod, name, "Warning", "FailedPostStartHook", "PostStartHook failed")
        log.info("postStart hook failed", pod=worker.key, container=name, error=str(e))
        await worker.interruptible(pod_stop.stop_one(worker, spec, container_id, "FailedPostStartHook"))
        worker.reasons[name] = ("PostStartHookError", str(e))
