"""Stopping containers and pods, and cleaning up after them. Called by pod_sync and by the worker's last stages.

Grace: preStop hook first, inside of the grace period; then the stop signal; KILL at the end of it. Sidecars stop after the main
containers, in reverse order. Source: pkg/kubelet/kuberuntime/kuberuntime_container.go killContainer, pkg/kubelet/kubelet.go
SyncTerminatingPod, SyncTerminatedPod.
"""

from __future__ import annotations

import asyncio
import shutil

import orjson

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import hooks, podutil, sandboxes
from knarr.kubelet.containers import GRACE_ANNOTATION, PRE_STOP_ANNOTATION
from knarr.kubelet.lifecycle import Kill, stop_order
from knarr.kubelet.observed import Observed
from knarr.kubelet.plugins.dra import ClaimError
from knarr.kubelet.pod_worker import PodWorker
from knarr.runtime.cri import ContainerState, ContainerStatus, NotFound, RuntimeFault

log = get_logger(__name__)

_LEAST_GRACE_SECONDS = 2.0


def _grace(worker: PodWorker, spec: Object, status: ContainerStatus | None, reason: str) -> float:
    pod = worker.pod
    if worker.grace_seconds is not None and worker.ending:
        return float(worker.grace_seconds)
    deletion = pod["metadata"].get("deletionGracePeriodSeconds")
    if deletion is not None:
        return float(deletion)
    probe = spec.get("startupProbe" if reason == "startup" else "livenessProbe") or {}
    if reason in ("startup", "liveness") and probe.get("terminationGracePeriodSeconds") is not None:
        return float(probe["terminationGracePeriodSeconds"])
    grace = pod["spec"].get("terminationGracePeriodSeconds")
    if grace is None and status is not None and status.annotations.get(GRACE_ANNOTATION):
        grace = int(status.annotations[GRACE_ANNOTATION])
    return float(grace) if grace is not None else _LEAST_GRACE_SECONDS


def _spec_of(worker: PodWorker, status: ContainerStatus) -> Object:
    """The container's spec; for a pod known from the runtime only, what its annotations keep of it."""
    spec = podutil.container(worker.pod, status.metadata.name)
    if spec is not None:
        return spec
    out: Object = {"name": status.metadata.name}
    if status.annotations.get(PRE_STOP_ANNOTATION):
        out["lifecycle"] = {"preStop": orjson.loads(status.annotations[PRE_STOP_ANNOTATION])}
    return out


async def stop_one(
    worker: PodWorker,
    spec: Object,
    container_id: str,
    message: str,
    *,
    reason: str = "",
    status: ContainerStatus | None = None,
    wait_turn: asyncio.Event | None = None,
) -> None:
    """Stop one container with its hook and its grace period. Raises RuntimeFault."""
    node, name = worker.node, spec["name"]
    grace = _grace(worker, spec, status, reason)
    node.container_event(worker.pod, name, "Normal", "Killing", message or f"Stopping container {name}")
    loop = asyncio.get_running_loop()
    end = loop.time() + grace
    hook = (spec.get("lifecycle") or {}).get("preStop")
    if hook and grace > 0 and container_id not in worker.hooks_done:
        worker.hooks_done.add(container_id)
        await _pre_stop(worker, spec, container_id, hook, grace)
    if wait_turn is not None and loop.time() < end:
        try:
            async with asyncio.timeout_at(end):
                await wait_turn.wait()
        except TimeoutError:
            log.info("container's turn to stop did not come in its grace period", pod=worker.key, container=name)
    least = min(_LEAST_GRACE_SECONDS, grace) if grace > 0 else _LEAST_GRACE_SECONDS
    await node.runtime.stop_container(container_id, max(least, end - loop.time()))


async def _pre_stop(worker: PodWorker, spec: Object, container_id: str, hook: Object, grace: float) -> None:
    """Run the hook, at most as long as the grace period; one that takes longer ends with its container, as a failure."""
    node, pod = worker.node, worker.pod
    ip = worker.ips[0] if worker.ips else (node.config.host_ips[0] if podutil.host_network(pod) else "")

    async def run() -> None:
        try:
            await hooks.run_hook(node, pod, spec, container_id, hook, ip)
        except hooks.HookError as e:
            log.info("preStop hook failed", pod=worker.key, container=spec["name"], error=str(e))
            node.container_event(pod, spec["name"], "Warning", "FailedPreStopHook", "PreStopHook failed")

    task = node.tasks.spawn(run(), f"pre-stop-{worker.key}/{spec['name']}")
    done, _ = await asyncio.wait({task}, timeout=grace)
    if not done:
        log.info("preStop hook not completed in grace period", pod=worker.key, container=spec["name"])
        if hook.get("sleep"):
            task.cancel()


async def kill_container(worker: PodWorker, observed: Observed, kill: Kill) -> None:
    """Carry out one kill of a plan."""
    status = next((c for c in observed.containers if c.id == kill.container_id), None)
    spec = podutil.container(worker.pod, kill.name) or {"name": kill.name}
    await stop_one(worker, spec, kill.container_id, kill.message, reason=kill.reason, status=status)


async def kill_pod(worker: PodWorker, observed: Observed, message: str | None) -> None:
    """Stop all containers, then the sandboxes.

    Raises:
      RuntimeFault: something could not be stopped; everything has been tried.
    """
    steps = stop_order(worker.pod, observed.running())
    ended = {step.container.metadata.name: asyncio.Event() for step in steps}
    turns: dict[str, asyncio.Event] = {}
    faults: list[Exception] = []

    async def turn(names: tuple[str, ...], ready: asyncio.Event) -> None:
        for name in names:
            await ended[name].wait()
        ready.set()

    async def stop(status: ContainerStatus, after: tuple[str, ...]) -> None:
        name = status.metadata.name
        try:
            await stop_one(worker, _spec_of(worker, status), status.id, message or "", status=status, wait_turn=turns.get(name))
        except (RuntimeFault, OSError) as e:
            faults.append(e)
        finally:
            ended[name].set()

    async with asyncio.TaskGroup() as group:
        for step in steps:
            if step.after:
                ready = turns[step.container.metadata.name] = asyncio.Event()
                group.create_task(turn(step.after, ready), name=f"turn-{worker.key}/{step.container.metadata.name}")
        for step in steps:
            group.create_task(stop(step.container, step.after), name=f"kill-{worker.key}/{step.container.metadata.name}")
    for sandbox in observed.sandboxes:
        try:
            await worker.node.runtime.stop_pod_sandbox(sandbox.id)
        except NotFound:
            continue
        except RuntimeFault as e:
            faults.append(e)
    if faults:
        raise faults[0]


async def prune_init_containers(worker: PodWorker, observed: Observed) -> None:
    """Keep one ended container of each init container; its others only cost disk."""
    names = {c["name"] for c in podutil.init_containers(worker.pod)}
    seen: set[str] = set()
    for status in list(observed.containers):
        name = status.metadata.name
        if name not in names or status.state not in (ContainerState.EXITED, ContainerState.UNKNOWN):
            continue
        if name in seen:
            await _remove(worker, status)
        seen.add(name)


async def purge_init_containers(worker: PodWorker, observed: Observed) -> None:
    """A new sandbox starts the pod's initialization anew."""
    names = {c["name"] for c in podutil.init_containers(worker.pod)}
    for status in list(observed.containers):
        if status.metadata.name in names:
            await _remove(worker, status)
            observed.containers.remove(status)


async def _remove(worker: PodWorker, status: ContainerStatus) -> None:
    try:
        await worker.node.runtime.remove_container(status.id)
    except RuntimeFault as e:
        log.warning("container not removed", pod=worker.key, container=status.metadata.name, error=str(e))
    worker.messages.pop(status.id, None)


async def _tell_readiness(worker: PodWorker, observed: Observed) -> None:
    """Publish what readiness probes find out while containers take their time to end; everything else is told when they have."""
    from knarr.kubelet import pod_sync

    results = worker.node.probes.readiness

    def found() -> list[bool | None]:
        return [results.get(container.id) for container in observed.containers]

    told = found()
    while True:
        await worker.woken()
        if (present := found()) != told:
            told = present
            pod_sync.publish(worker, observed)


async def terminate(worker: PodWorker) -> None:
    """Stop everything of the pod and publish its last container states.

    Raises:
      RuntimeFault: something still runs; call again.
    """
    from knarr.kubelet import pod_sync

    node, pod = worker.node, worker.pod
    observed = await pod_sync.look(worker)
    if not worker.orphan:
        pod_sync.publish(worker, observed)
    node.probes.stop_liveness_and_startup(worker.uid)
    while observed.running() or any(s.state.name == "READY" for s in observed.sandboxes):
        telling = None if worker.orphan else node.tasks.spawn(_tell_readiness(worker, observed), f"readiness-{worker.key}")
        try:
            if await worker.until_sooner(kill_pod(worker, observed, None)):
                break
        finally:
            if telling is not None:
                telling.cancel()
        observed = await pod_sync.look(worker)
    node.probes.remove(worker.uid)
    observed = await pod_sync.look(worker)
    running = [c.id for c in observed.containers if c.state is ContainerState.RUNNING]
    if running:
        node.event(pod, "Warning", "FailedKillPod", f"error killing pod: containers still running: {running}")
        raise RuntimeFault(f"containers still running after they were stopped: {running}")
    try:
        # Before the end is told: whoever hears of it may give the claims to others.
        await node.dynamic.unprepare(worker.uid)
    except ClaimError as e:
        raise RuntimeFault(f"unprepare dynamic resources: {e}") from e
    if not worker.orphan:
        pod_sync.publish(worker, observed, terminal=True, may_run=False)


async def clean_up(worker: PodWorker) -> None:
    """Give volumes, cgroup and ids back; then the API server may forget the pod.

    Raises:
      RuntimeFault, OSError, VolumeError: something is still busy; call again.
    """
    from knarr.kubelet import pod_sync

    node, pod = worker.node, worker.pod
    observed = await pod_sync.look(worker)
    await node.volumes.unmount(worker.uid)
    if node.config.cgroups_per_qos:
        # An orphan's QoS class is not known: its group is found by its uid.
        path = node.cgroups.pod_groups().get(worker.uid) if worker.orphan else node.cgroups.pod_path(pod)
        if path is not None:
            await node.cgroups.remove_path(path)
    node.userns.release(worker.uid)
    node.objects.release(worker.uid)
    node.tokens.forget(worker.uid)
    node.images.forget(worker.uid)
    node.devices.release(worker.uid)
    if worker.orphan:
        await remove_remains(worker)
    else:
        pod_sync.publish(worker, observed, terminal=True, may_run=False, finished=True)


async def remove_remains(worker: PodWorker) -> None:
    """Remove containers, sandboxes, logs and the pod's folder: the API server has no such pod any more. Raises RuntimeFault."""
    from knarr.kubelet.observed import observe

    node = worker.node
    observed = await observe(node.runtime, worker.uid)
    for status in observed.containers:
        await node.runtime.remove_container(status.id)
    for sandbox in observed.sandboxes:
        await node.runtime.stop_pod_sandbox(sandbox.id)
        await node.runtime.remove_pod_sandbox(sandbox.id)
    await node.volumes.remove_pod_dir(worker.uid)
    shutil.rmtree(sandboxes.log_directory(node.config, worker.pod), ignore_errors=True)
