"""Why a pod is where it is, or nowhere: the last diagnosis of each pod, and what would help.

`Diagnoses` keeps what the scheduler itself decided. `explain` asks every filter about every
node as things stand now, one line per node, the nearest fit first, with the smallest change
that would make it fit. Served on the component's HTTP endpoint for `knarr why pod/NAME`.
Bound: one diagnosis per unschedulable pod, at most MAXIMUM_DIAGNOSES, the oldest go first.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from knarr.aiokits import clock
from knarr.scheduler.framework import Cycle, Diagnosis, Profile
from knarr.scheduler.handle import Handle
from knarr.scheduler.nodes import NodeInfo, NodeTable
from knarr.scheduler.plugins.node_resources import NodeResourcesFit
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.queue import QueuedPod
from knarr.scheduler.terms import untolerated

MAXIMUM_DIAGNOSES = 5000
MAXIMUM_NODES_KEPT = 1000


@dataclass(slots=True)
class Noted:
    """The last refusal of a pod."""

    message: str
    at: float
    plugins: list[str]
    per_node: dict[str, list[str]] = field(default_factory=dict)


class Diagnoses:
    """The last diagnosis per pod (by uid)."""

    def __init__(self) -> None:
        self._notes: OrderedDict[str, Noted] = OrderedDict()

    def note(self, pod: PodInfo, diagnosis: Diagnosis, message: str, table: NodeTable) -> None:
        per_node = diagnosis.per_node(table) if diagnosis.nodes <= MAXIMUM_NODES_KEPT else {}
        self._notes[pod.uid] = Noted(message, clock.now(), sorted(diagnosis.plugins | diagnosis.pending_plugins), per_node)
        self._notes.move_to_end(pod.uid)
        if len(self._notes) > MAXIMUM_DIAGNOSES:
            self._notes.popitem(last=False)

    def forget(self, uid: str) -> None:
        self._notes.pop(uid, None)

    def get(self, uid: str) -> Noted | None:
        return self._notes.get(uid)


def _amount(resource: str, value: int) -> str:
    if resource == "cpu":
        return f"{value}m"
    if resource in ("memory", "ephemeral-storage") and value >= 1024 * 1024:
        return f"{-(-value // (1024 * 1024))}Mi"
    return str(value)


def _resource_changes(cycle: Cycle, info: NodeInfo) -> list[tuple[float, str]]:
    """(how far away, what to change) per lacking resource."""
    table, row = cycle.table, info.row
    result = []
    if table.pods_count[row] >= table.pods_allowed[row]:
        result.append((1.0, f"one pod fewer (it has {int(table.pods_count[row])} of {int(table.pods_allowed[row])})"))
    for name, wanted in cycle.shape.request_items:
        index = table.resource(name)
        have, used = int(table.allocatable[index, row]), int(table.requested[index, row])
        lacking = wanted - (have - used)
        if lacking > 0:
            distance = 1.0 + lacking / wanted
            if wanted > have:
                text = f"request {_amount(name, have)} {name} or less: the whole node has no more (asked: {_amount(name, wanted)})"
                distance += 5.0
            else:
                text = f"{_amount(name, lacking)} more {name} free (asked {_amount(name, wanted)}, free {_amount(name, have - used)})"
            result.append((distance, text))
    return result


def _changes(plugin_name: str, reasons: list[str], cycle: Cycle, info: NodeInfo) -> list[tuple[float, str]]:
    node, shape = info.node or {}, cycle.shape
    if plugin_name == NodeResourcesFit.name:
        return _resource_changes(cycle, info)
    if plugin_name == "NodeUnschedulable":
        return [(2.0, f"uncordon it (kubectl uncordon {info.name})")]
    if plugin_name == "TaintToleration":
        taint = untolerated(cycle.table.taint_sets[int(cycle.table.taint_codes[info.row])], shape.tolerations)
        return [(3.0, f"tolerate the taint {taint[0]}={taint[1]}:{taint[2]}, or remove it" if taint else reasons[0])]
    if plugin_name == "NodeAffinity" and shape.node_selector is not None:
        labels = node.get("metadata", {}).get("labels") or {}
        missing = [f"{key}={value}" for key, value in shape.node_selector.equal if labels.get(key) != value]
        text = f"label the node {', '.join(missing)}" if missing else "match the pod's required node affinity"
        return [(4.0, text)]
    if plugin_name == "NodePorts":
        ports = ", ".join(f"{port}/{protocol}" for _, protocol, port in shape.host_ports)
        return [(3.0, f"free host port {ports}")]
    return [(4.0, reason.removeprefix("node(s) ")) for reason in reasons]


def explain(handle: Handle, profile: Profile, pod: PodInfo) -> list[dict[str, Any]]:
    """Ask every filter about every node.

    Returns:
      One entry per node, the nearest fit first: {"node", "fits", "reasons", "changes"}; a single
      entry with an empty node when the pod is refused before nodes are looked at.
    """
    table = handle.table
    cycle = Cycle(table, pod)
    diagnosis = Diagnosis(nodes=len(table))
    names = profile.run_pre_filters(cycle, diagnosis)
    if diagnosis.pre_filter is not None:
        return [{"node": "", "fits": False, "reasons": [diagnosis.pre_filter.reason], "changes": [diagnosis.pre_filter.reason]}]
    entries = []
    for row in table.order.tolist():
        info = table.info(row)
        reasons: list[str] = []
        changes: list[tuple[float, str]] = []
        if names is not None and info.name not in names:
            reasons.append("node(s) didn't match the names the pod asks for")
            changes.append((20.0, "another node is named by the pod's affinity"))
        rows = np.array([row], dtype=np.intp)
        for plugin in profile.filters:
            if plugin.name in cycle.skipped_filters:
                continue
            answer = plugin.filter(cycle, rows)
            if answer is not None:
                found = answer[1].reasons(0)
                reasons.extend(found)
                changes.extend(_changes(plugin.name, found, cycle, info))
        distance = sum(d for d, _ in changes)
        entries.append((distance, {"node": info.name, "fits": not reasons, "reasons": reasons, "changes": [text for _, text in changes]}))
    entries.sort(key=lambda e: (e[0], e[1]["node"]))
    return [entry for _, entry in entries]


def report(handle: Handle, profiles: dict[str, Profile], diagnoses: Diagnoses, pod: PodInfo, queued: QueuedPod | None) -> dict[str, Any]:
    """Put together all that the scheduler knows of a pod.

    Returns:
      {"pod", "node", "queue", "gate", "attempts", "last": {"message", "at", "plugins", "nodes"}, "nodes": see explain}.
    """
    noted = diagnoses.get(pod.uid)
    profile = profiles.get(pod.shape.scheduler_name)
    result: dict[str, Any] = {
        "pod": pod.key,
        "node": pod.node_name,
        "queue": queued.place if queued is not None else "",
        "gate": queued.gated_by.reason if queued is not None and queued.gated_by is not None else "",
        "attempts": queued.attempts if queued is not None else 0,
        "last": None,
        "nodes": [],
    }
    if noted is not None:
        at = clock.rfc3339(noted.at)
        result["last"] = {"message": noted.message, "at": at, "plugins": noted.plugins, "nodes": noted.per_node}
    if profile is not None and not pod.node_name:
        result["nodes"] = explain(handle, profile, pod)
    return result
