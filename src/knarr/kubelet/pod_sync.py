"""One look at a running pod: observe, publish the status, make what is missing. Called by the pod's worker, again and again.

Every pass is complete in itself: nothing is remembered but back-off and the reasons of failed starts, so a pass may be cut
short at any point and the next one goes on from what the runtime holds. Source: pkg/kubelet/kubelet.go SyncPod,
kuberuntime_manager.go SyncPod.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api import errors
from knarr.api.resources import SECRETS
from knarr.api.types import Object
from knarr.kubelet import identity, lifecycle, pod_start, pod_stop, podutil, sandboxes, status, termination
from knarr.kubelet.durations import go_duration
from knarr.kubelet.lifecycle import Plan, ProbeView
from knarr.kubelet.meters import POD_START_BUCKETS
from knarr.kubelet.observed import Observed, observe
from knarr.kubelet.plugins.dra import ClaimError
from knarr.kubelet.pod_worker import PodWorker
from knarr.kubelet.resources import pod_cgroup_limits
from knarr.kubelet.userns import NoRangeLeft
from knarr.kubelet.volumes.manager import MountsFailed
from knarr.runtime.cri import ContainerState, IDMapping, RuntimeFault

log = get_logger(__name__)

DEADLINE_MESSAGE = "Pod was active on the node longer than the specified deadline"
_FAILED_RETRY_SECONDS = 10.0
_NETWORK_RETRY_SECONDS = 1.0
"""Only for a network that comes without being told of (`Kubelet.network_changed`), such as the file of a CNI plugin."""


async def look(worker: PodWorker) -> Observed:
    """Observe the pod; its last addresses stay known after the sandbox is gone."""
    node, begun = worker.node, time.monotonic()
    observed = await observe(node.runtime, worker.uid)
    node.meters.observe("kubelet_pleg_relist_duration_seconds", time.monotonic() - begun)
    node.meters.gauges["kubelet_pleg_last_seen_seconds"] = clock.now()
    if observed.ips:
        worker.ips = observed.ips
    elif not observed.ready_sandbox():
        observed.ips = worker.ips or [e["ip"] for e in (worker.pod.get("status") or {}).get("podIPs") or []]
    for container in observed.containers:
        if container.state is ContainerState.EXITED and container.id not in worker.messages:
            worker.messages[container.id] = await termination.message(container)
    return observed


def publish(worker: PodWorker, observed: Observed, *, terminal: bool = False, may_run: bool = True, finished: bool = False) -> Object:
    """Compute the status and hand it to the status manager."""
    node, pod = worker.node, worker.pod
    previous = node.status.get(worker.uid)
    given = status.StatusInput(
        observed=observed,
        previous=previous if previous is not None else (pod.get("status") or {}),
        reasons=worker.reasons,
        readiness=node.probes.readiness,
        startup=node.probes.startup,
        terminal=terminal,
        host_ips=node.config.host_ips,
        scheme=node.config.runtime_scheme,
        evict=worker.evict,
        termination_messages=worker.messages,
    )
    if node.resize is not None:
        node.resize.fill(pod, observed, given)
    made = status.generate(pod, given)
    if worker.evict_condition is not None:
        made["conditions"] = [c for c in made["conditions"] if c["type"] != "DisruptionTarget"]
        made["conditions"].insert(0, dict(worker.evict_condition))
    if finished:
        termination.finish(pod, made)
    node.status.set(pod, made, may_run=may_run, finished=finished)
    if not worker.started and made["phase"] == "Running":
        worker.started = True
        _note_start(worker)
    return made


def _note_start(worker: PodWorker) -> None:
    """The pod's containers run for the first time: how long that took."""
    meters, now = worker.node.meters, clock.now()
    total = now - clock.parse_rfc3339(worker.pod["metadata"].get("creationTimestamp") or clock.now_rfc3339())
    meters.observe("kubelet_pod_start_duration_seconds", now - worker.admitted_at, bounds=POD_START_BUCKETS)
    meters.observe("kubelet_pod_start_total_duration_seconds", total, bounds=POD_START_BUCKETS)
    own = max(0.0, total - worker.pulling_seconds)
    meters.observe("kubelet_pod_start_sli_duration_seconds", own, bounds=POD_START_BUCKETS)
    if not podutil.host_network(worker.pod):
        meters.gauges.setdefault("kubelet_first_network_pod_start_sli_duration_seconds", own)


def _over_deadline(worker: PodWorker) -> bool:
    limit = worker.pod["spec"].get("activeDeadlineSeconds")
    if limit is None:
        return False
    started = ((worker.node.status.get(worker.uid) or {}).get("startTime")) or (worker.pod.get("status") or {}).get("startTime")
    if not started:
        worker.wake_after(float(limit))
        return False
    left = clock.parse_rfc3339(started) + limit - clock.now()
    if left <= 0:
        return True
    worker.wake_after(left)
    return False


async def sync(worker: PodWorker) -> None:
    """One pass. Raises PodEnding when the pod's end was asked for meanwhile; RuntimeFault when the runtime is out of order."""
    node, pod = worker.node, worker.pod
    observed = await look(worker)
    if _over_deadline(worker):
        node.event(pod, "Normal", "DeadlineExceeded", DEADLINE_MESSAGE)
        worker.terminate(None, ("DeadlineExceeded", DEADLINE_MESSAGE))
        return
    node.probes.update(pod, observed)
    made = publish(worker, observed)
    if podutil.is_terminal_phase(made["phase"]):
        worker.terminate(None)
        return
    if not await _prepare_host(worker, observed):
        return
    resizes = node.resize.pending(pod, observed) if node.resize is not None else {}
    plan = lifecycle.compute(pod, observed, ProbeView(node.probes.liveness, node.probes.startup), resizes=resizes)
    if worker.volumes_ready and worker.volumes_dirty:
        await _refresh_volumes(worker)
    if plan.nothing_to_do():
        return
    if await execute(worker, plan, observed):
        worker.wake()


async def _prepare_host(worker: PodWorker, observed: Observed) -> bool:
    """The pod's cgroup and folder; False when they cannot be made now."""
    node, pod = worker.node, worker.pod
    if node.config.cgroups_per_qos and not node.cgroups.exists(pod):
        try:
            begun = time.monotonic()
            node.cgroups.ensure_pod(pod)
            node.meters.observe("kubelet_cgroup_manager_duration_seconds", time.monotonic() - begun, 'operation_type="create"')
        except OSError as e:
            node.event(pod, "Warning", "FailedCreatePodContainer", f"unable to ensure pod container exists: {e}")
            worker.wake_after(_FAILED_RETRY_SECONDS)
            return False
    if node.config.cgroups_per_qos:
        # A resize may have changed the pod as a whole: its group makes room before a container grows in it.
        limits = pod_cgroup_limits(pod, enforce_cpu=node.config.enforce_cpu_limits)
        if worker.group_limits is not None and worker.group_limits != limits:
            node.cgroups.update_pod(pod)
        worker.group_limits = limits
    folder = os.path.join(node.config.pods_dir, worker.uid)
    try:
        for name in ("", "volumes", "plugins", "containers"):
            os.makedirs(os.path.join(folder, name), 0o750, exist_ok=True)
    except OSError as e:
        node.event(pod, "Warning", "Failed", f"error making pod data directories: {e}")
        worker.wake_after(_FAILED_RETRY_SECONDS)
        return False
    return True


async def pull_secrets(worker: PodWorker) -> list[Object]:
    """The pod's imagePullSecrets that exist; a missing one is told and left out."""
    pod, found = worker.pod, []
    for reference in pod["spec"].get("imagePullSecrets") or []:
        name = reference.get("name") or ""
        if not name:
            continue
        try:
            found.append(await worker.node.objects.get(SECRETS, pod["metadata"].get("namespace", ""), name, worker.uid))
        except errors.StatusError:
            worker.node.event(
                pod,
                "Warning",
                "FailedToRetrieveImagePullSecret",
                f"Unable to retrieve some image pull secrets ({name}); attempting to pull the image may not succeed.",
            )
    return found


async def _mount(worker: PodWorker) -> bool:
    """Set the volumes up; False when some are missing (tried again later)."""
    node = worker.node
    worker.volumes_dirty = False
    try:
        secrets = await pull_secrets(worker) if any("image" in v for v in worker.pod["spec"].get("volumes") or []) else []
        state = await node.volumes.mount(worker.pod, worker.ips, secrets)
    except MountsFailed as e:
        log.info("volumes not ready", pod=worker.key, error=str(e))
        worker.volumes_dirty = True
        worker.wake_after(e.retry_seconds)
        return False
    except BaseException:
        worker.volumes_dirty = True
        raise
    worker.volumes_ready = True
    if state.renew_at is not None:
        # The renewal makes new content; nothing else tells the worker that time has passed.
        delay = max(1.0, state.renew_at - clock.now())
        worker.refresh_after(delay)
    return True


async def _refresh_volumes(worker: PodWorker) -> None:
    """Bring new content into the volumes of a running pod; the old content stays when that fails."""
    await worker.interruptible(_mount(worker))


async def execute(worker: PodWorker, plan: Plan, observed: Observed) -> bool:
    """Carry a plan out; True when something changed, so that another look is due."""
    changed = await _carry_out(worker, plan, observed)
    if plan.create_sandbox and worker.reasons and worker.pod["spec"].get("hostUsers") is False:
        # What is wrong with a user namespace mostly shows only when the first container starts.
        worker.node.count("kubelet_started_user_namespaced_pods_errors_total")
    return changed


async def _carry_out(worker: PodWorker, plan: Plan, observed: Observed) -> bool:
    node, pod = worker.node, worker.pod
    changed = False
    if plan.kill_pod:
        if plan.create_sandbox and plan.sandbox_id:
            node.event(pod, "Normal", "SandboxChanged", "Pod sandbox changed, it will be killed and re-created.")
        if observed.sandboxes or observed.running():
            await worker.interruptible(pod_stop.kill_pod(worker, observed, None))
            changed = True
        if plan.create_sandbox:
            await pod_stop.purge_init_containers(worker, observed)
    for kill in plan.kills:
        await worker.interruptible(pod_stop.kill_container(worker, observed, kill))
        changed = True
    await pod_stop.prune_init_containers(worker, observed)
    sandbox_id = plan.sandbox_id
    starts = plan.create_sandbox or plan.init or plan.start or plan.ephemeral
    if starts:
        ready = await _volumes_and_sandbox(worker, plan)
        if ready is None:
            return changed
        sandbox_id = ready or sandbox_id
        changed = changed or bool(ready)
        if plan.create_sandbox:
            observed = await look(worker)
    for name in plan.ephemeral:
        changed = await pod_start.start(worker, name, sandbox_id, observed) or changed
    for name in plan.init:
        started = await pod_start.start(worker, name, sandbox_id, observed)
        changed = changed or started
        spec = podutil.container(pod, name)
        if not started and not (spec is not None and podutil.is_sidecar(spec)):
            return changed
    if plan.update and node.resize is not None:
        changed = await node.resize.apply(worker, plan.update, observed) or changed
    for name in plan.start:
        changed = await pod_start.start(worker, name, sandbox_id, observed) or changed
    return changed


async def _volumes_and_sandbox(worker: PodWorker, plan: Plan) -> str | None:
    """Volumes first, then the sandbox; at the same time when the volumes hold no surprise.

    Returns: the new sandbox's id, "" when none was to be made, None when something failed (told, tried again later).
    """
    need_volumes = not worker.volumes_ready or worker.volumes_dirty
    if plan.create_sandbox and need_volumes and worker.node.volumes.sure_to_mount(worker.pod):
        both = await asyncio.gather(worker.interruptible(_mount(worker)), _create_sandbox(worker, plan), return_exceptions=True)
        # Both have ended before anything is raised: no sandbox is made behind the back of a pod that ends.
        for result in both:
            if isinstance(result, BaseException):
                raise result
        return both[1] if both[0] and isinstance(both[1], str) and both[1] else None
    if need_volumes and not await worker.interruptible(_mount(worker)) and not worker.volumes_ready:
        return None
    return (await _create_sandbox(worker, plan)) if plan.create_sandbox else ""


def mappings_of(worker: PodWorker) -> list[IDMapping] | None:
    """The pod's user namespace, None for the host's. Raises NoRangeLeft."""
    if worker.pod["spec"].get("hostUsers") is not False:
        return None
    return worker.node.userns.mappings(worker.uid)


async def _create_sandbox(worker: PodWorker, plan: Plan) -> str | None:
    node, pod = worker.node, worker.pod
    try:
        if pod["spec"].get("resourceClaims"):
            await worker.interruptible(node.dynamic.prepare(pod))
    except ClaimError as e:
        message = f"Failed to prepare dynamic resources: prepare dynamic resources: {e}"
        node.event(pod, "Warning", "FailedPrepareDynamicResources", message)
        worker.wake_after(_FAILED_RETRY_SECONDS)
        return None
    try:
        handler = _runtime_handler(worker)
        parent = node.cgroups.pod_path(pod) if node.config.cgroups_per_qos else node.config.cgroup_root
        groups = node.volumes.of(worker.uid).groups
        config, notes = sandboxes.sandbox_config(
            pod, node.config, plan.attempt, parent, extra_groups=groups, mappings=mappings_of(worker)
        )
        for note in notes:
            node.event(pod, "Warning", "DNSConfigForming", note)
        os.makedirs(config.log_directory, 0o755, exist_ok=True)
        node.count("kubelet_started_pods_total")
        if config.namespaces.user_mappings:
            node.count("kubelet_started_user_namespaced_pods_total")
        begun = time.monotonic()
        try:
            return await node.runtime.run_pod_sandbox(config, handler)
        finally:
            node.meters.observe("kubelet_run_podsandbox_duration_seconds", time.monotonic() - begun, f'runtime_handler="{handler}"')
    except (RuntimeFault, OSError, identity.IdentityError, NoRangeLeft, LookupError) as e:
        if not worker.ending:
            await _sandbox_failed(worker, e)
        return None


async def _sandbox_failed(worker: PodWorker, error: Exception) -> None:
    """Tell why there is no sandbox. A pod network that is still to come is no fault of the pod: it is waited for."""
    node, pod = worker.node, worker.pod
    node.count("kubelet_started_pods_errors_total")
    if pod["spec"].get("hostUsers") is False:
        node.count("kubelet_started_user_namespaced_pods_errors_total")
    log.warning("pod sandbox not made", pod=worker.key, error=str(error))
    missing = None
    if not podutil.host_network(pod):
        with contextlib.suppress(RuntimeFault):
            missing = next((c for c in await node.runtime.status() if c.type == "NetworkReady" and not c.status), None)
    if missing is None:
        node.event(pod, "Warning", "FailedCreatePodSandBox", f"Failed to create pod sandbox: {error}")
        worker.wake_after(_FAILED_RETRY_SECONDS)
    else:
        why = f"NetworkReady=false reason:{missing.reason} message:{missing.message}"
        node.event(pod, "Warning", "NetworkNotReady", f"network is not ready: container runtime network not ready: {why}")
        worker.wake_after(_NETWORK_RETRY_SECONDS)


def _runtime_handler(worker: PodWorker) -> str:
    name = worker.pod["spec"].get("runtimeClassName")
    if not name:
        return ""
    found = worker.node.runtime_class(name)
    if found is None:
        raise LookupError(f'failed to get sandbox runtime: RuntimeClass "{name}" not found')
    return str(found.get("handler") or "")


def back_off_message(delay_seconds: float, name: str, pod: Object) -> str:
    """The message of a container in CrashLoopBackOff."""
    return f"back-off {go_duration(delay_seconds)} restarting failed container={name} pod={podutil.full_name(pod)}"
