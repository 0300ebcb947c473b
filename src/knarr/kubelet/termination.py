"""What an ended container left behind: its termination message, and the last words on a pod that is finished.

Callers: pod_sync, pod_stop. Source: pkg/kubelet/kuberuntime/kuberuntime_container.go getTerminationMessage,
pkg/kubelet/status/status_manager.go TerminatePod.
"""

from __future__ import annotations

import os

from knarr.api.types import Object
from knarr.kubelet import logs, podutil
from knarr.kubelet.containers import TERMINATION_PATH_ANNOTATION, TERMINATION_POLICY_ANNOTATION
from knarr.kubelet.status import LOST_MESSAGE
from knarr.runtime.cri import ContainerStatus

_FILE_BYTES = 4096
_LOG_BYTES = 2048
_LOG_LINES = 80


async def message(container: ContainerStatus) -> str:
    """The container's termination message, "" when there is none.

    A container that fails may have its log's end taken instead.
    """
    path = container.annotations.get(TERMINATION_PATH_ANNOTATION) or ""
    text = ""
    for mount in container.mounts:
        if path and mount.container_path == path and mount.host_path:
            text = _read_file(mount.host_path)
    fallback = container.annotations.get(TERMINATION_POLICY_ANNOTATION) == "FallbackToLogsOnError"
    if not text and fallback and container.exit_code != 0 and container.reason != "ContainerCannotRun":
        text = await logs.tail_text(container.log_path, _LOG_LINES, _LOG_BYTES)
    if text and container.message:
        return f"{container.message}: {text}" if container.reason in ("StartError", "ContainerCannotRun") else text
    return text


def _read_file(path: str) -> str:
    """The file's first part; the file was the container's to write, so links are not followed."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return ""
    with os.fdopen(fd, "rb") as file:
        return file.read(_FILE_BYTES).decode(errors="replace")


def _lost() -> Object:
    return {
        "terminated": {
            "exitCode": 137,
            "reason": "ContainerStatusUnknown",
            "message": LOST_MESSAGE,
            "startedAt": None,
            "finishedAt": None,
        }
    }


def _has_initialized(pod: Object, status: Object) -> bool:
    """Whether the main containers may have run."""
    for entry in status.get("containerStatuses") or []:
        if entry.get("started") or (entry.get("lastState") or {}).get("terminated") or (entry.get("state") or {}).get("terminated"):
            return True
    if not podutil.init_containers(pod):
        return True
    # What the API server knew before the end counts: an init container that ends well because it was told to stop has not
    # made room for the main ones.
    inits = (pod.get("status") or {}).get("initContainerStatuses") or []
    if not inits or len(inits) != len(podutil.init_containers(pod)):
        return False
    last, spec = inits[-1], podutil.init_containers(pod)[-1]
    if podutil.is_sidecar(spec):
        return bool(last.get("started"))
    ended = (last.get("state") or {}).get("terminated") or (last.get("lastState") or {}).get("terminated")
    return bool(ended and ended.get("exitCode") == 0)


def finish(pod: Object, status: Object) -> None:
    """Make a status final in place: nothing runs any more, and the phase says so."""
    if _has_initialized(pod, status):
        for entry in status.get("containerStatuses") or []:
            if "terminated" not in (entry.get("state") or {}):
                entry["state"] = _lost()
    inits = status.get("initContainerStatuses") or []
    touched = 0
    for index, entry in enumerate(inits):
        if entry.get("started") or (entry.get("lastState") or {}).get("terminated") or (entry.get("state") or {}).get("terminated"):
            touched = index + 1
    for entry in inits[:touched]:
        if "terminated" not in (entry.get("state") or {}):
            entry["state"] = _lost()
    if not podutil.is_static(pod) and not podutil.is_terminal_phase(status["phase"]):
        status["phase"] = "Failed"
