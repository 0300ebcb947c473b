"""NodeVolumeLimits: a CSI driver attaches only so many volumes to a node (CSINode.spec.drivers[].allocatable)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, Refusal, Rejection, reject
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.volumes import class_of

REASON = "node(s) exceed max volume count"
Volume = tuple[str, str]
"""(driver, handle)."""


class NodeVolumeLimits(Plugin):
    name = "NodeVolumeLimits"
    follows_pods = True

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        return (
            (ClusterEvent("CSINode", Action.ADD | Action.UPDATE), None),
            (ClusterEvent("Pod", Action.DELETE), self._freed_volume),
            (ClusterEvent("PersistentVolumeClaim", Action.ADD), self._is_own_claim),
            (ClusterEvent("VolumeAttachment", Action.DELETE), None),
        )

    def _freed_volume(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        return old is not None and any("persistentVolumeClaim" in v or "ephemeral" in v for v in old["spec"].get("volumes") or ())

    def _is_own_claim(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if new is None or new["metadata"].get("namespace") != waiting.namespace:
            return False
        return any(name == new["metadata"]["name"] for name, _ in waiting.claims)

    def _volume(self, namespace: str, claim_name: str) -> Volume | None:
        """The driver and handle behind a claim; a claim still to be provisioned counts by its own name."""
        volumes, objects = self.handle.volumes, self.handle.objects
        claim = volumes.claim(namespace, claim_name)
        if claim is None:
            return None
        name = claim["spec"].get("volumeName")
        volume = volumes.volume(name) if name else None
        if volume is not None:
            csi = volume["spec"].get("csi")
            return (csi["driver"], csi["volumeHandle"]) if csi else None
        storage_class = objects.get("StorageClass", class_of(claim))
        if storage_class is None:
            return None
        return storage_class.get("provisioner", ""), f"{storage_class['metadata']['name']}-{namespace}/{claim_name}"

    def pre_filter(self, cycle: Cycle) -> Any:
        pod = cycle.pod
        if not pod.claims:
            return SKIP
        for name, _ in pod.claims:
            if self.handle.volumes.claim(pod.namespace, name) is None:
                return Refusal(self.name, f'looking up PVC {pod.namespace}/{name}: persistentvolumeclaim "{name}" not found')
        wanted = {v for name, _ in pod.claims if (v := self._volume(pod.namespace, name)) is not None}
        if not wanted or not any(self._limits(node) for node in self.handle.objects.list("CSINode")):
            return SKIP
        cycle.data[self.name] = wanted
        return None

    @staticmethod
    def _limits(csi_node: dict[str, Any] | None) -> dict[str, int]:
        drivers = ((csi_node or {}).get("spec") or {}).get("drivers") or ()
        return {d["name"]: d["allocatable"]["count"] for d in drivers if (d.get("allocatable") or {}).get("count") is not None}

    def _attached_elsewise(self, node_name: str) -> set[Volume]:
        """Volumes attached to the node according to VolumeAttachments, by whatever pod."""
        result = set()
        for attachment in self.handle.objects.list("VolumeAttachment"):
            spec = attachment["spec"]
            volume = self.handle.volumes.volume((spec.get("source") or {}).get("persistentVolumeName") or "")
            if spec.get("nodeName") == node_name and volume is not None and volume["spec"].get("csi"):
                result.add((volume["spec"]["csi"]["driver"], volume["spec"]["csi"]["volumeHandle"]))
        return result

    def _fits(self, name: str, pods: Iterable[PodInfo], wanted: set[Volume]) -> bool:
        limits = self._limits(self.handle.objects.get("CSINode", name))
        if not any(driver in limits for driver, _ in wanted):
            return True
        used = {v for p in pods for claim, _ in p.claims if (v := self._volume(p.namespace, claim)) is not None}
        used |= self._attached_elsewise(name)
        total = used | wanted
        added = {driver for driver, _ in wanted - used}
        return all(sum(d == driver for d, _ in total) <= limits[driver] for driver in added if driver in limits)

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        wanted = cycle.data[self.name]
        infos = [cycle.table.info(row) for row in rows.tolist()]
        ok: Bools = np.array([self._fits(i.name, i.pods.values(), wanted) for i in infos], dtype=np.bool_)
        return reject(self, rows, ok, REASON, unresolvable=False)
