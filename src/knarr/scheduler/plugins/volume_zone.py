"""VolumeZone: zone and region labels of bound volumes must match the node's."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, Refusal, Rejection, reject
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.volumes import class_of

REASON = "node(s) had no available volume zone"
_BETA = "failure-domain.beta.kubernetes.io/"
_LABELS = (_BETA + "zone", _BETA + "region", "topology.kubernetes.io/zone", "topology.kubernetes.io/region")


class VolumeZone(Plugin):
    name = "VolumeZone"

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        change = Action.ADD | Action.UPDATE
        return (
            (ClusterEvent("StorageClass", Action.ADD), None),
            (ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_LABEL), None),
            (ClusterEvent("PersistentVolumeClaim", change), self._is_own_claim),
            (ClusterEvent("PersistentVolume", change), None),
        )

    def _is_own_claim(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if new is None or new["metadata"].get("namespace") != waiting.namespace:
            return False
        return any(name == new["metadata"]["name"] for name, _ in waiting.claims)

    def pre_filter(self, cycle: Cycle) -> Any:
        pod = cycle.pod
        volumes = self.handle.volumes
        wanted: list[tuple[str, frozenset[str]]] = []
        for name, is_ephemeral in pod.claims:
            if is_ephemeral:
                continue
            claim = volumes.claim(pod.namespace, name)
            if claim is None:
                return Refusal(self.name, f'persistentvolumeclaim "{name}" not found')
            volume_name = claim["spec"].get("volumeName")
            if not volume_name:
                refusal = self._unbound(claim)
                if refusal is not None:
                    return refusal
                continue
            volume = volumes.volume(volume_name)
            if volume is None:
                return Refusal(self.name, f'persistentvolume "{volume_name}" not found')
            labels = volume["metadata"].get("labels") or {}
            wanted.extend((key, frozenset(labels[key].split("__"))) for key in _LABELS if key in labels)
        if not wanted:
            return SKIP
        cycle.data[self.name] = wanted
        return None

    def _unbound(self, claim: dict[str, Any]) -> Refusal | None:
        class_name = class_of(claim)
        if not class_name:
            return Refusal(self.name, "PersistentVolumeClaim had no pv name and storageClass name")
        storage_class = self.handle.objects.get("StorageClass", class_name)
        if storage_class is None:
            return Refusal(self.name, f'storageclass.storage.k8s.io "{class_name}" not found')
        if storage_class.get("volumeBindingMode") == "WaitForFirstConsumer":
            return None
        return Refusal(self.name, "PersistentVolume had no name")

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        columns = cycle.table.labels
        unlabelled: Bools = np.ones(len(rows), dtype=np.bool_)
        for key in _LABELS:
            unlabelled &= columns.column(key).codes[rows] < 0
        ok: Bools = np.ones(len(rows), dtype=np.bool_)
        for key, values in cycle.data[self.name]:
            match = columns.column(key).where(values)[rows]
            if key.startswith(_BETA):
                # A volume with the old label also fits nodes that only have the new one.
                absent = columns.column(key).codes[rows] < 0
                match |= absent & columns.column("topology.kubernetes.io/" + key[len(_BETA) :]).where(values)[rows]
            ok &= match
        return reject(self, rows, ok | unlabelled, REASON, unresolvable=True)
