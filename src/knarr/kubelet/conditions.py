"""The pod conditions that the kubelet owns, computed from container statuses. Pure; called by status.

Source: pkg/kubelet/status/generate.go.
"""

from __future__ import annotations

from knarr.api.types import Object
from knarr.kubelet import podutil


def plain_condition(kind: str, value: bool, generation: int, reason: str = "", message: str = "") -> Object:
    """One condition in wire form, without its transition time."""
    out: Object = {"type": kind, "status": "True" if value else "False"}
    if generation:
        out["observedGeneration"] = generation
    if reason:
        out["reason"] = reason
    if message:
        out["message"] = message
    return out


def _names(items: list[str]) -> str:
    return "[" + " ".join(items) + "]"


def containers_ready_condition(pod: Object, statuses: list[Object], phase: str, generation: int) -> Object:
    """ContainersReady: every main container and sidecar is ready."""
    kind = "ContainersReady"
    if not statuses:
        return plain_condition(kind, False, generation, "UnknownContainerStatuses")
    by_name = {s["name"]: s for s in statuses}
    specs = [*(c for c in podutil.init_containers(pod) if podutil.is_sidecar(c)), *podutil.containers(pod)]
    unknown = [c["name"] for c in specs if c["name"] not in by_name]
    unready = [c["name"] for c in specs if c["name"] in by_name and not by_name[c["name"]].get("ready")]
    if phase == "Succeeded" and not unknown:
        return plain_condition(kind, False, generation, "PodCompleted")
    if phase == "Failed":
        return plain_condition(kind, False, generation, "PodFailed")
    messages = []
    if unknown:
        messages.append(f"containers with unknown status: {_names(unknown)}")
    if unready:
        messages.append(f"containers with unready status: {_names(unready)}")
    if messages:
        return plain_condition(kind, False, generation, "ContainersNotReady", ", ".join(messages))
    return plain_condition(kind, True, generation)


def ready_condition(pod: Object, conditions: list[Object], statuses: list[Object], phase: str, generation: int) -> Object:
    """Ready: ContainersReady and every readiness gate."""
    ready = containers_ready_condition(pod, statuses, phase, generation)
    if ready["status"] != "True":
        return {**ready, "type": "Ready"}
    messages = []
    for gate in pod["spec"].get("readinessGates") or []:
        kind = gate["conditionType"]
        found = next((c for c in conditions if c["type"] == kind), None)
        if found is None:
            messages.append(f'corresponding condition of pod readiness gate "{kind}" does not exist.')
        elif found["status"] != "True":
            messages.append(f'the status of pod readiness gate "{kind}" is not "True", but {found["status"]}')
    if messages:
        return plain_condition("Ready", False, generation, "ReadinessGatesNotReady", ", ".join(messages))
    return plain_condition("Ready", True, generation)


def initialized_condition(pod: Object, statuses: list[Object], phase: str, generation: int) -> Object:
    """Initialized: all init containers have done their work (sidecars: have started)."""
    kind = "Initialized"
    inits = podutil.init_containers(pod)
    by_name = {s["name"]: s for s in statuses}
    if not statuses and inits:
        return plain_condition(kind, False, generation, "UnknownContainerStatuses")
    unknown = [c["name"] for c in inits if c["name"] not in by_name]
    incomplete = []
    for spec in inits:
        status = by_name.get(spec["name"])
        if status is not None and not status.get("started" if podutil.is_sidecar(spec) else "ready"):
            incomplete.append(spec["name"])
    if phase == "Succeeded" and not unknown:
        return plain_condition(kind, True, generation, "PodCompleted")
    if _any_main_started(pod, by_name):
        return plain_condition(kind, True, generation)
    messages = []
    if unknown:
        messages.append(f"containers with unknown status: {_names(unknown)}")
    if incomplete:
        messages.append(f"containers with incomplete status: {_names(incomplete)}")
    if messages:
        return plain_condition(kind, False, generation, "ContainersNotInitialized", ", ".join(messages))
    return plain_condition(kind, True, generation)


def _any_main_started(pod: Object, by_name: dict[str, Object]) -> bool:
    for spec in podutil.containers(pod):
        state = (by_name.get(spec["name"]) or {}).get("state") or {}
        if "running" in state or "terminated" in state:
            return True
    return False
