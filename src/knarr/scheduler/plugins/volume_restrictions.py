"""VolumeRestrictions: disks that only one pod may write, and ReadWriteOncePod claims."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, Refusal, Rejection, reject
from knarr.scheduler.podinfo import Pod, PodInfo

DISK_CONFLICT = "node(s) had no available disk"
CLAIM_IN_USE = "node(s) unavailable due to PersistentVolumeClaim with ReadWriteOncePod access mode already in-use by another pod"


def disks_conflict(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether two volumes are the same disk and may not be used by two pods of one node."""

    def both_read_only(kind: str) -> bool:
        return bool(one[kind].get("readOnly") and other[kind].get("readOnly"))

    if "gcePersistentDisk" in one and "gcePersistentDisk" in other:
        kind = "gcePersistentDisk"
        if one[kind].get("pdName") == other[kind].get("pdName") and not both_read_only(kind):
            return True
    if "awsElasticBlockStore" in one and "awsElasticBlockStore" in other:
        if one["awsElasticBlockStore"].get("volumeID") == other["awsElasticBlockStore"].get("volumeID"):
            return True
    if "iscsi" in one and "iscsi" in other:
        if one["iscsi"].get("iqn") == other["iscsi"].get("iqn") and not both_read_only("iscsi"):
            return True
    if "rbd" in one and "rbd" in other:
        a, b = one["rbd"], other["rbd"]
        same = (a.get("pool") or "rbd") == (b.get("pool") or "rbd") and a.get("image") == b.get("image")
        if same and set(a.get("monitors") or ()) & set(b.get("monitors") or ()) and not both_read_only("rbd"):
            return True
    return False


class VolumeRestrictions(Plugin):
    name = "VolumeRestrictions"
    follows_pods = True

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return (
            (ClusterEvent("Pod", Action.DELETE), self._freed_volume),
            (ClusterEvent("Node", Action.ADD), None),
            (ClusterEvent("PersistentVolumeClaim", Action.ADD), self._is_own_claim),
        )

    def _freed_volume(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if old is None or old["metadata"].get("namespace", "") != waiting.namespace:
            return False
        gone = PodInfo(old, self.handle.shapes)
        if {name for name, _ in gone.claims} & {name for name, _ in waiting.claims}:
            return True
        return any(disks_conflict(a, b) for a in waiting.disks for b in gone.disks)

    def _is_own_claim(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if new is None or new["metadata"].get("namespace") != waiting.namespace:
            return False
        return any(name == new["metadata"]["name"] for name, _ in waiting.claims)

    def pre_filter(self, cycle: Cycle) -> Any:
        pod = cycle.pod
        if not pod.claims and not pod.disks:
            return SKIP
        conflicts = 0
        for name, is_ephemeral in pod.claims:
            if is_ephemeral:
                continue
            claim = self.handle.volumes.claim(pod.namespace, name)
            if claim is None:
                return Refusal(self.name, f'persistentvolumeclaim "{name}" not found')
            if "ReadWriteOncePod" in (claim["spec"].get("accessModes") or ()):
                conflicts += cycle.table.claim_uses.get((pod.namespace, name), 0) > 0
        if not conflicts and not pod.disks:
            return SKIP
        cycle.data[self.name] = conflicts
        return None

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        table, disks = cycle.table, cycle.pod.disks
        ok: Bools = np.ones(len(rows), dtype=np.bool_)
        if disks and table.disk_rows:
            for index, row in enumerate(rows.tolist()):
                if row in table.disk_rows:
                    others = (disk for other in table.info(row).pods.values() for disk in other.disks)
                    ok[index] = not any(disks_conflict(a, b) for b in others for a in disks)
        if cycle.data[self.name]:
            none: Bools = np.zeros(len(rows), dtype=np.bool_)
            return none, Rejection(self.name, rows, [(DISK_CONFLICT, ~ok), (CLAIM_IN_USE, ok)], False)
        return reject(self, rows, ok, DISK_CONFLICT, unresolvable=False)
