"""What a kubelet would report of a pod that runs or has ended: the status that a stage's phase stands for.

Pure. Source: pkg/kubelet/status/generate.go, pkg/kubelet/kubelet_pods.go (generateAPIPodStatus).
"""

from __future__ import annotations

from knarr.api.types import Object
from knarr.simulate.stages import Next

_KUBELET_CONDITIONS = ("PodReadyToStartContainers", "Initialized", "Ready", "ContainersReady")


def status_of(pod: Object, what: Next, now: str, address: str, host: str) -> Object:
    """The whole status of a pod after a stage with a phase.

    Args:
      address: for the pod when it has none yet; "" gives none.
      host: address of its node; "" leaves it out.
    """
    spec, old = pod["spec"], pod.get("status") or {}
    running = what.phase == "Running"
    pod_ip = old.get("podIP") or address
    status: Object = {
        "observedGeneration": pod["metadata"].get("generation", 1),
        "phase": what.phase,
        "startTime": old.get("startTime") or now,
        "conditions": _conditions(pod, what, now),
    }
    if host:
        status.update(hostIP=host, hostIPs=[{"ip": host}])
    if pod_ip:
        status.update(podIP=pod_ip, podIPs=[{"ip": pod_ip}])
    if what.reason and not running:
        status["reason"] = what.reason
    before = {item["name"]: item for group in ("initContainerStatuses", "containerStatuses") for item in old.get(group) or ()}
    init = spec.get("initContainers") or ()
    if init:
        status["initContainerStatuses"] = [_container(item, before, what, now, sidecar=item.get("restartPolicy") == "Always", init=True) for item in init]
    status["containerStatuses"] = [_container(item, before, what, now, sidecar=False, init=False) for item in spec["containers"]]
    return status


def _container(spec: Object, before: dict[str, Object], what: Next, now: str, *, sidecar: bool, init: bool) -> Object:
    old = before.get(spec["name"]) or {}
    started = ((old.get("state") or {}).get("running") or {}).get("startedAt") or now
    live = what.phase == "Running" and (sidecar or not init)
    if live:
        state: Object = {"running": {"startedAt": started}}
    else:
        failed = what.phase == "Failed" and not init
        code = what.exit_code if what.exit_code is not None and not init else int(failed)
        state = {
            "terminated": {"exitCode": code, "reason": what.reason or ("Error" if code else "Completed"), "startedAt": started, "finishedAt": now}
        }
    return {
        "name": spec["name"],
        "image": spec["image"],
        "imageID": "",
        "ready": (live and what.ready) or (init and not sidecar),
        "started": live,
        "restartCount": old.get("restartCount", 0),
        "state": state,
    }


def _conditions(pod: Object, what: Next, now: str) -> list[Object]:
    running = what.phase == "Running"
    reason = {} if running and what.ready else {"reason": {"Succeeded": "PodCompleted", "Failed": "PodFailed"}.get(what.phase, "ContainersNotReady")}
    wanted = {
        "PodReadyToStartContainers": (running, {}),
        "Initialized": (True, {}),
        "Ready": (running and what.ready, reason),
        "ContainersReady": (running and what.ready, reason),
    }
    generation = pod["metadata"].get("generation", 1)
    listed = (pod.get("status") or {}).get("conditions") or ()
    old = {item["type"]: item for item in listed}
    made: list[Object] = []
    for kind in _KUBELET_CONDITIONS:
        value, extra = wanted[kind]
        status = "True" if value else "False"
        known = old.get(kind)
        since = known["lastTransitionTime"] if known is not None and known.get("status") == status and known.get("lastTransitionTime") else now
        made.append(
            {"type": kind, "status": status, "observedGeneration": generation, "lastProbeTime": None, "lastTransitionTime": since, **extra}
        )
    return made + [item for item in listed if item["type"] not in wanted]


def merged(status: Object, more: Object) -> Object:
    """A status with more of it from a stage's file: mappings merge, conditions by their type, other lists are replaced."""
    result = dict(status)
    for key, value in more.items():
        if key == "conditions" and isinstance(value, list):
            kinds = {item.get("type") for item in value}
            result[key] = [item for item in status.get(key) or () if item["type"] not in kinds] + value
        elif isinstance(value, dict) and isinstance(status.get(key), dict):
            result[key] = merged(status[key], value)
        else:
            result[key] = value
    return result
