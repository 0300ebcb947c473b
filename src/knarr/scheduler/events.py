"""What can happen in the cluster that may make a waiting pod schedulable.

An event is a resource and one or more actions; a plugin registers the events that concern it.
Source: kube-scheduler framework ClusterEvent, pkg/scheduler/framework/events.go.
"""

from __future__ import annotations

from enum import IntFlag
from typing import Any, NamedTuple

from knarr.scheduler.resources import pod_requests


class Action(IntFlag):
    ADD = 1
    DELETE = 2
    UPDATE_NODE_ALLOCATABLE = 4
    UPDATE_NODE_LABEL = 8
    UPDATE_NODE_TAINT = 16
    UPDATE_NODE_CONDITION = 32
    UPDATE_NODE_ANNOTATION = 64
    UPDATE_POD_LABEL = 128
    UPDATE_POD_SCALE_DOWN = 256
    UPDATE_POD_TOLERATION = 512
    UPDATE_POD_GATES = 1024
    UPDATE_POD_CLAIM = 2048
    UPDATE_OTHER = 4096
    UPDATE = 4 | 8 | 16 | 32 | 64 | 128 | 256 | 512 | 1024 | 2048 | 4096
    ALL = 1 | 2 | UPDATE


class ClusterEvent(NamedTuple):
    """`resource` is a kind, "AssignedPod" or "UnscheduledPod" (both are matched by "Pod"), or "*"."""

    resource: str
    action: Action
    label: str = ""

    @property
    def text(self) -> str:
        """What metrics call it, e.g. "AssignedPodDelete"."""
        if self.label:
            return self.label
        name = self.action.name or ""
        return self.resource + ("Update" if self.action == Action.UPDATE_OTHER else name.title().replace("_", ""))

    def covers(self, happened: ClusterEvent) -> bool:
        """Whether a plugin that registered this event wants to know of what happened."""
        if not self.action & happened.action:
            return False
        return self.resource == happened.resource or (self.resource == "Pod" and happened.resource in POD_RESOURCES)


POD_RESOURCES = ("AssignedPod", "UnscheduledPod", "TargetPod")

ASSIGNED_POD_ADD = ClusterEvent("AssignedPod", Action.ADD)
ASSIGNED_POD_DELETE = ClusterEvent("AssignedPod", Action.DELETE)
NODE_ADD = ClusterEvent("Node", Action.ADD)
NODE_DELETE = ClusterEvent("Node", Action.DELETE)
TIMEOUT = ClusterEvent("*", Action.ALL, "UnschedulableTimeout")
FORCE_ACTIVATE = ClusterEvent("*", Action.ALL, "ForceActivate")


def _conditions(node: dict[str, Any]) -> dict[str, str]:
    return {c["type"]: c["status"] for c in (node.get("status") or {}).get("conditions") or ()}


def node_changes(old: dict[str, Any], new: dict[str, Any]) -> list[ClusterEvent]:
    """Name what changed about a node, as far as scheduling goes."""
    action = Action(0)
    old_spec, new_spec = old.get("spec") or {}, new.get("spec") or {}
    old_status, new_status = old.get("status") or {}, new.get("status") or {}
    if old_status.get("allocatable") != new_status.get("allocatable"):
        action |= Action.UPDATE_NODE_ALLOCATABLE
    if old["metadata"].get("labels") != new["metadata"].get("labels"):
        action |= Action.UPDATE_NODE_LABEL
    if old_spec.get("taints") != new_spec.get("taints") or old_spec.get("unschedulable") != new_spec.get("unschedulable"):
        action |= Action.UPDATE_NODE_TAINT
    if old_status.get("conditions") != new_status.get("conditions") and _conditions(old) != _conditions(new):
        action |= Action.UPDATE_NODE_CONDITION
    if old["metadata"].get("annotations") != new["metadata"].get("annotations"):
        action |= Action.UPDATE_NODE_ANNOTATION
    return [ClusterEvent("Node", single) for single in Action if single & action]


def pod_changes(old: dict[str, Any], new: dict[str, Any]) -> list[ClusterEvent]:
    """Name what changed about a pod, as far as scheduling goes; at least a general update."""
    action = Action(0)
    old_spec, new_spec = old["spec"], new["spec"]
    if (old["metadata"].get("labels") or {}) != (new["metadata"].get("labels") or {}):
        action |= Action.UPDATE_POD_LABEL
    if old_spec is not new_spec and old_spec != new_spec:
        if old_spec.get("schedulingGates") and not new_spec.get("schedulingGates"):
            action |= Action.UPDATE_POD_GATES
        if old_spec.get("tolerations") != new_spec.get("tolerations"):
            action |= Action.UPDATE_POD_TOLERATION
    if _resources_differ(old, new):
        before, after = pod_requests(old), pod_requests(new)
        if any(after.get(name, 0) < value for name, value in before.items()):
            action |= Action.UPDATE_POD_SCALE_DOWN
    if (old.get("status") or {}).get("resourceClaimStatuses") != (new.get("status") or {}).get("resourceClaimStatuses"):
        action |= Action.UPDATE_POD_CLAIM
    resource = "AssignedPod" if new_spec.get("nodeName") else "UnscheduledPod"
    return [ClusterEvent(resource, single) for single in Action if single & action] or [ClusterEvent(resource, Action.UPDATE_OTHER)]


def _resources_differ(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """A cheap look before requests are summed up: most updates of running pods change only conditions."""
    for key in ("containers", "initContainers"):
        if old["spec"].get(key) != new["spec"].get(key):
            return True
    statuses = [
        [(s["name"], s.get("resources"), s.get("allocatedResources")) for s in (pod.get("status") or {}).get("containerStatuses") or ()]
        for pod in (old, new)
    ]
    return statuses[0] != statuses[1]
