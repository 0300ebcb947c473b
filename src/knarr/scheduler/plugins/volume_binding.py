"""VolumeBinding: bound volumes must reach the node; delayed claims are bound to volumes there, or provisioned.

The choice is made in the filter, assumed in reserve, written in pre_bind, which then waits until
the volume controller has bound everything.

Source: plugins/volumebinding.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, PluginError, Refusal, Rejection
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.volumes import ClaimProblem, NodeVolumes, PodClaims, Volumes, class_of, volume_selector

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle

UNBOUND_IMMEDIATE = "pod has unbound immediate PersistentVolumeClaims"
BIND_CONFLICT = "node(s) didn't find available persistent volumes to bind"
NODE_CONFLICT = "node(s) didn't match PersistentVolume's node affinity"
NOT_ENOUGH_SPACE = "node(s) did not have enough free storage"
VOLUME_GONE = "node(s) unavailable due to one or more pvc(s) bound to non-existent pv(s)"


class _State:
    def __init__(self, claims: PodClaims) -> None:
        self.claims = claims
        self.by_class: dict[str, list[dict[str, Any]]] = {}
        self.by_node: dict[str, NodeVolumes] = {}
        self.reserved: NodeVolumes | None = None


class VolumeBinding(Plugin):
    name = "VolumeBinding"

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self.volumes = handle.volumes
        self._timeout_seconds = float(args.get("bindTimeoutSeconds") or 600)

    # What wakes a pod up.

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        change = Action.ADD | Action.UPDATE
        return (
            (ClusterEvent("StorageClass", change), None),
            (ClusterEvent("PersistentVolumeClaim", change), self._is_own_claim),
            (ClusterEvent("PersistentVolume", change), None),
            (ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_LABEL), None),
            (ClusterEvent("CSINode", change), None),
            (ClusterEvent("CSIDriver", Action.UPDATE), None),
            (ClusterEvent("CSIStorageCapacity", change), None),
        )

    def _is_own_claim(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if new is None or new["metadata"].get("namespace") != waiting.namespace:
            return False
        return any(name == new["metadata"]["name"] for name, _ in waiting.claims)

    # Filter.

    def pre_filter(self, cycle: Cycle) -> Any:
        if not cycle.pod.claims:
            return SKIP
        try:
            claims = self.volumes.sort_claims(self.volumes.pod_claims(cycle.pod))
        except ClaimProblem as problem:
            return Refusal(self.name, str(problem))
        if claims.immediate:
            return Refusal(self.name, UNBOUND_IMMEDIATE)
        state = cycle.data[self.name] = _State(claims)
        for claim in claims.delayed:
            name = class_of(claim)
            if name not in state.by_class:
                state.by_class[name] = self.volumes.volumes_of_class(name)
        return None

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        state: _State = cycle.data[self.name]
        table = cycle.table
        parts: dict[str, Bools] = {}
        bad = np.zeros(len(rows), dtype=np.bool_)

        def fail(reason: str, mask: Bools) -> None:
            nonlocal bad
            parts[reason] = parts[reason] | mask if reason in parts else mask
            bad = bad | mask

        for claim in state.claims.bound:
            volume = self.volumes.volume(claim["spec"]["volumeName"])
            if volume is None:
                fail(VOLUME_GONE, np.ones(len(rows), dtype=np.bool_))
                break
            wanted = volume_selector(volume)
            if wanted is not None:
                unreached = ~table.labels.matching(wanted)[rows]
                if unreached.any():
                    fail(NODE_CONFLICT, unreached)
        if state.claims.delayed:
            conflict, space = np.zeros(len(rows), dtype=np.bool_), np.zeros(len(rows), dtype=np.bool_)
            for index, row in enumerate(rows.tolist()):
                node = table.info(row).node
                assert node is not None
                chosen, lacking = self.volumes.place(state.claims.delayed, node, state.by_class)
                if not lacking:
                    state.by_node[node["metadata"]["name"]] = chosen
                elif lacking == "space":
                    space[index] = True
                else:
                    conflict[index] = True
            if conflict.any():
                fail(BIND_CONFLICT, conflict)
            if space.any():
                fail(NOT_ENOUGH_SPACE, space)
        if not parts:
            return None
        return ~bad, Rejection(self.name, rows[bad], [(reason, mask[bad]) for reason, mask in parts.items()], True)

    # Reserve and bind.

    def reserve(self, cycle: Cycle, node_name: str) -> Refusal | None:
        state: _State | None = cycle.data.get(self.name)
        if state is None:
            return None
        chosen = state.by_node.get(node_name)
        if chosen is not None and (chosen.bindings or chosen.provisions):
            state.reserved = self.volumes.assume_placement(chosen, node_name)
        return None

    def unreserve(self, cycle: Cycle, node_name: str) -> None:
        state: _State | None = cycle.data.get(self.name)
        if state is not None and state.reserved is not None:
            self.volumes.revert(state.reserved)
            state.reserved = None

    def pre_bind_skips(self, cycle: Cycle, node_name: str) -> bool:
        state: _State | None = cycle.data.get(self.name)
        return state is None or state.reserved is None

    async def pre_bind(self, cycle: Cycle, node_name: str) -> None:
        state: _State = cycle.data[self.name]
        if state.reserved is None:
            return
        writer = self.handle.volume_writer
        if writer is None:
            raise PluginError("binding volumes: no API to write to")
        await writer.bind(cycle.pod, node_name, state.reserved, self._timeout_seconds)


__all__ = ["VolumeBinding", "Volumes"]
