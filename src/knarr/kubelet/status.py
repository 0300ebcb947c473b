"""The API status of a pod, computed from what the runtime holds. Pure: no I/O; the present time is an argument.

Callers: pod_sync on every step. Input: pod, `Observed`, probe results, start failures, the previous status. Output: a whole
PodStatus in wire form, that status_manager compares, completes (start and transition times) and sends.
Source: pkg/kubelet/kubelet_pods.go generateAPIPodStatus, convertToAPIContainerStatuses, getPhase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from knarr.aiokits import clock
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.conditions import (
    containers_ready_condition,
    initialized_condition,
    plain_condition,
    ready_condition,
)
from knarr.kubelet.lifecycle import sandbox_changed, should_be_restarted
from knarr.kubelet.observed import Observed
from knarr.runtime.cri import ContainerState, ContainerStatus

IMAGE_ANNOTATION = "io.kubernetes.container.imageName"
LOST_MESSAGE = "The container could not be located when the pod was terminated"
LOST_RUNNING_MESSAGE = "The container could not be located when the pod was deleted.  The container used to be Running"


@dataclass(slots=True)
class StatusInput:
    """Everything that a status depends on beside the pod."""

    observed: Observed
    previous: Object
    """The last status made (or the API's, after a start of the kubelet)."""
    reasons: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    """Container name to (reason, message) of the last failed start."""
    readiness: Mapping[str, bool] = field(default_factory=dict)
    """Container id to the last readiness result."""
    startup: Mapping[str, bool] = field(default_factory=dict)
    terminal: bool = False
    """All containers have been stopped for good."""
    host_ips: tuple[str, ...] = ()
    scheme: str = "knarr"
    evict: tuple[str, str] | None = None
    """(reason, message) of an active deadline that is over."""
    resize_conditions: list[Object] = field(default_factory=list)
    actuated: Mapping[str, Object] = field(default_factory=dict)
    """Container name to the resources that its cgroup has now."""
    termination_messages: Mapping[str, str] = field(default_factory=dict)
    """Container id to the message that it left."""
    recursive_read_only: bool = True
    """The runtime can make whole mount trees read-only."""


def generate(pod: Object, given: StatusInput) -> Object:
    """Make the whole PodStatus; transition and start times are filled in by the status manager."""
    status: Object = {"observedGeneration": pod["metadata"].get("generation")} if pod["metadata"].get("generation") else {}
    previous = given.previous
    api = pod.get("status") or {}
    has_init = bool(podutil.init_containers(pod))
    main = _container_statuses(pod, given, podutil.containers(pod), previous.get("containerStatuses"), has_init)
    init = _container_statuses(pod, given, podutil.init_containers(pod), previous.get("initContainerStatuses"), has_init, init=True)
    ephemeral = _container_statuses(
        pod, given, podutil.ephemeral_containers(pod), previous.get("ephemeralContainerStatuses"), has_init
    )
    _add_probe_results(pod, given, main, init)
    status["phase"] = phase(pod, [*main, *init], terminal=given.terminal, initialized=_regular_started(pod, given.observed))
    _keep_terminal_phase(status, previous, api)
    if given.evict is not None and not podutil.is_terminal_phase(str(api.get("phase"))):
        status["phase"] = "Failed"
        status["reason"], status["message"] = given.evict
    _add_conditions(pod, given, status, [*init, *main])
    _add_addresses(pod, given, status)
    status["qosClass"] = podutil.qos_class(pod)
    status["containerStatuses"] = main
    if init:
        status["initContainerStatuses"] = init
    if ephemeral:
        status["ephemeralContainerStatuses"] = ephemeral
    return status


def _keep_terminal_phase(status: Object, previous: Object, api: Object) -> None:
    """A pod never leaves Failed or Succeeded; reason and message live as long as the phase that they explain."""
    if not podutil.is_terminal_phase(status["phase"]):
        for earlier in (previous, api):
            if podutil.is_terminal_phase(str(earlier.get("phase"))):
                status["phase"] = earlier["phase"]
                break
    if podutil.is_terminal_phase(str(api.get("phase"))):
        status["phase"] = api["phase"]
    if status["phase"] == previous.get("phase"):
        for name in ("reason", "message"):
            value = previous.get(name) or api.get(name)
            if value:
                status[name] = value


def _add_conditions(pod: Object, given: StatusInput, status: Object, statuses: list[Object]) -> None:
    generation = pod["metadata"].get("generation") or 0
    api_conditions = (pod.get("status") or {}).get("conditions") or []
    conditions = [c for c in api_conditions if c["type"] not in podutil.KUBELET_CONDITIONS]
    conditions += given.resize_conditions
    disruption = next((c for c in given.previous.get("conditions") or [] if c["type"] == "DisruptionTarget"), None)
    if disruption is not None:
        conditions = [*(c for c in conditions if c["type"] != "DisruptionTarget"), disruption]
    changed, _, _ = sandbox_changed(pod, given.observed)
    conditions.append(plain_condition("PodReadyToStartContainers", not changed, generation))
    conditions.append(initialized_condition(pod, statuses, status["phase"], generation))
    conditions.append(ready_condition(pod, conditions, statuses, status["phase"], generation))
    conditions.append(containers_ready_condition(pod, statuses, status["phase"], generation))
    conditions.append(plain_condition("PodScheduled", True, generation))
    status["conditions"] = conditions


def _add_addresses(pod: Object, given: StatusInput, status: Object) -> None:
    ips = list(given.observed.ips)
    if given.host_ips:
        status["hostIP"] = given.host_ips[0]
        status["hostIPs"] = [{"ip": ip} for ip in given.host_ips]
        if podutil.host_network(pod):
            ips = list(given.host_ips)
    if ips:
        status["podIP"] = ips[0]
        status["podIPs"] = [{"ip": ip} for ip in ips]


def _container_statuses(
    pod: Object, given: StatusInput, specs: list[Object], old: list[Object] | None, has_init: bool, *, init: bool = False
) -> list[Object]:
    out = [_one_container(pod, given, spec, podutil.status_of(old, spec["name"]), has_init, init=init) for spec in specs]
    return out if init else sorted(out, key=lambda s: str(s["name"]))


def _one_container(pod: Object, given: StatusInput, spec: Object, old: Object | None, has_init: bool, *, init: bool) -> Object:
    name = spec["name"]
    seen = [c for c in given.observed.containers if c.metadata.name == name][:2]
    waiting = {"waiting": {"reason": "PodInitializing" if has_init else "ContainerCreating"}}
    if seen:
        status = _from_runtime(given, spec, seen[0], old)
        if len(seen) > 1:
            status["lastState"] = _state(given, seen[1], old)
    elif old is not None and (old.get("state") or {}).get("terminated"):
        status = dict(old)
    else:
        status = {
            "name": name,
            "image": spec.get("image", ""),
            "imageID": "",
            "state": waiting,
            "lastState": dict(old.get("lastState") or {}) if old else {},
            "restartCount": old.get("restartCount", 0) if old else 0,
        }
        if old is not None and (old.get("state") or {}).get("running") and not status["lastState"].get("terminated"):
            # It ran and is gone without a trace: it must not look as if it had never been started.
            status["lastState"] = {"terminated": _lost(LOST_RUNNING_MESSAGE)}
            if not podutil.is_deleted(pod):
                status["restartCount"] += 1
    status.setdefault("ready", False)
    mounts = [_mount_status(m, given) for m in spec.get("volumeMounts") or []]
    if mounts:
        status["volumeMounts"] = mounts
    _apply_failed_start(pod, given, spec, status, seen[0] if seen else None, init=init)
    return status


def _apply_failed_start(
    pod: Object, given: StatusInput, spec: Object, status: Object, latest: ContainerStatus | None, *, init: bool
) -> None:
    """A container that should run, and whose last start failed, is Waiting with that reason."""
    if init and latest is not None and latest.state is ContainerState.EXITED and latest.exit_code == 0:
        if not podutil.is_sidecar(spec):
            return
    reason = given.reasons.get(spec["name"])
    if reason is None or not should_be_restarted(pod, spec, given.observed):
        return
    if (status.get("state") or {}).get("terminated"):
        status["lastState"] = status["state"]
    waiting: Object = {"reason": reason[0]}
    if reason[1]:
        waiting["message"] = reason[1]
    status["state"] = {"waiting": waiting}


def _lost(message: str) -> Object:
    return {"exitCode": 137, "reason": "ContainerStatusUnknown", "message": message, "startedAt": None, "finishedAt": None}


def _mount_status(mount: Object, given: StatusInput) -> Object:
    out: Object = {"name": mount["name"], "mountPath": mount["mountPath"]}
    if mount.get("readOnly"):
        wanted = mount.get("recursiveReadOnly")
        recursive = wanted == "Enabled" or (wanted == "IfPossible" and given.recursive_read_only)
        out["readOnly"] = True
        out["recursiveReadOnly"] = "Enabled" if recursive else "Disabled"
    return out


def _from_runtime(given: StatusInput, spec: Object, container: ContainerStatus, old: Object | None) -> Object:
    status: Object = {
        "name": spec["name"],
        "image": container.annotations.get(IMAGE_ANNOTATION) or container.image,
        "imageID": container.image_ref,
        "containerID": f"{given.scheme}://{container.id}",
        "restartCount": container.metadata.attempt,
        "state": _state(given, container, old),
        "lastState": {},
    }
    if container.state is ContainerState.UNKNOWN and "terminated" in status["state"]:
        status["restartCount"] = (old or {}).get("restartCount", 0) + 1
    resources = spec.get("resources") or {}
    if container.state is ContainerState.RUNNING:
        resources = given.actuated.get(spec["name"], resources)
    status["resources"] = resources
    if (spec.get("resources") or {}).get("requests"):
        status["allocatedResources"] = spec["resources"]["requests"]
    if container.user is not None:
        uid, gid, groups = container.user
        linux: Object = {"uid": uid, "gid": gid}
        if groups:
            linux["supplementalGroups"] = list(groups)
        status["user"] = {"linux": linux}
    if container.stop_signal and ((spec.get("lifecycle") or {}).get("stopSignal")):
        status["stopSignal"] = container.stop_signal
    return status


def _state(given: StatusInput, container: ContainerStatus, old: Object | None) -> Object:
    if container.state is ContainerState.RUNNING:
        return {"running": {"startedAt": clock.rfc3339(container.started_at_ns / 1e9)}}
    if container.state is ContainerState.EXITED:
        terminated: Object = {
            "exitCode": container.exit_code,
            "reason": container.reason or ("Completed" if container.exit_code == 0 else "Error"),
            "startedAt": clock.rfc3339(container.started_at_ns / 1e9),
            "finishedAt": clock.rfc3339(container.finished_at_ns / 1e9),
            "containerID": f"{given.scheme}://{container.id}",
        }
        message = given.termination_messages.get(container.id) or container.message
        if message:
            terminated["message"] = message
        return {"terminated": terminated}
    if container.state is ContainerState.UNKNOWN and old is not None and (old.get("state") or {}).get("running"):
        return {"terminated": _lost(LOST_MESSAGE)}
    return {"waiting": {}}


def _add_probe_results(pod: Object, given: StatusInput, main: list[Object], init: list[Object]) -> None:
    """Fill started and ready. Source: pkg/kubelet/prober/prober_manager.go UpdatePodStatus."""
    for status in (*main, *init):
        spec = podutil.container(pod, status["name"])
        if spec is None:
            continue
        is_plain_init = any(spec is c for c in podutil.init_containers(pod)) and not podutil.is_sidecar(spec)
        container_id = str(status.get("containerID", "")).partition("://")[2]
        running = bool((status.get("state") or {}).get("running"))
        started = running and (not spec.get("startupProbe") or bool(given.startup.get(container_id)))
        status["started"] = started
        if is_plain_init:
            terminated = (status.get("state") or {}).get("terminated")
            status["ready"] = bool(terminated and terminated.get("exitCode") == 0)
        elif started and running:
            status["ready"] = not spec.get("readinessProbe") or bool(given.readiness.get(container_id))
        else:
            status["ready"] = False


def _regular_started(pod: Object, observed: Observed) -> bool:
    """Whether a main container of the present sandbox has been started."""
    for spec in podutil.containers(pod):
        latest = observed.latest(spec["name"])
        if latest is not None and latest.state in (ContainerState.RUNNING, ContainerState.EXITED):
            if not observed.sandboxes or latest.sandbox_id == observed.sandboxes[0].id:
                return True
    return False


def phase(pod: Object, statuses: list[Object], *, terminal: bool, initialized: bool) -> str:
    """The phase that these container statuses add up to. Source: pkg/kubelet/kubelet_pods.go getPhase."""
    by_name = {s["name"]: s for s in statuses}
    pending_init, pending_sidecars, failed_for_good = 0, 0, False
    count = {"running": 0, "waiting": 0, "stopped": 0, "final": 0, "succeeded": 0, "unknown": 0}
    for spec in podutil.init_containers(pod):
        state, last = _states(by_name.get(spec["name"]))
        if podutil.is_sidecar(spec):
            if state is None:
                count["unknown"] += 1
            elif "running" in state:
                pending_sidecars += not by_name[spec["name"]].get("started")
                count["running"] += 1
            elif "terminated" not in state and "terminated" not in last:
                pending_sidecars += 1
                count["waiting"] += 1
            continue
        ended = (state or {}).get("terminated") or (last.get("terminated") if state and "waiting" in state else None)
        if ended is None:
            pending_init += 1
        elif ended["exitCode"] != 0 and not podutil.should_restart_after_exit(pod, spec, ended["exitCode"]):
            failed_for_good = True
    for spec in podutil.containers(pod):
        _count_main(pod, spec, by_name.get(spec["name"]), count)
    if failed_for_good:
        return "Failed"
    if pending_init or (pending_sidecars and not initialized) or count["waiting"]:
        return "Pending"
    if count["running"] and not count["unknown"]:
        return "Running"
    if count["stopped"] and not count["unknown"]:
        done = "Succeeded" if count["stopped"] == count["succeeded"] else "Failed"
        if terminal and not podutil.is_static(pod):
            return done
        return done if count["stopped"] == count["final"] else "Running"
    return "Pending"


def _states(status: Object | None) -> tuple[Object | None, Object]:
    if status is None:
        return None, {}
    return status.get("state") or {}, status.get("lastState") or {}


def _count_main(pod: Object, spec: Object, status: Object | None, count: dict[str, int]) -> None:
    state, last = _states(status)
    if state is None:
        count["unknown"] += 1
    elif "running" in state:
        count["running"] += 1
    elif "terminated" in state or "terminated" in last:
        ended: Any = state.get("terminated") or last["terminated"]
        count["stopped"] += 1
        count["final"] += not podutil.should_restart_after_exit(pod, spec, ended["exitCode"])
        count["succeeded"] += "terminated" in state and ended["exitCode"] == 0
    elif "waiting" in state:
        count["waiting"] += 1
    else:
        count["unknown"] += 1
