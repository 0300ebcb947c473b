"""A scheduler without a server: a node table, one profile, a queue on a hand-driven clock."""

from __future__ import annotations

import random
from typing import Any

from knarr.scheduler.algorithm import Algorithm, Found
from knarr.scheduler.config import ProfileConfig
from knarr.scheduler.framework import Diagnosis
from knarr.scheduler.handle import Handle
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.queue import SchedulingQueue
from knarr.scheduler.registry import build_profile

Object = dict[str, Any]
ZONE, HOST = "topology.kubernetes.io/zone", "kubernetes.io/hostname"


class World:
    def __init__(self, seed: int = 1) -> None:
        self.now = 1000.0
        self.handle = Handle(randomness=random.Random(seed))
        self.profile = build_profile(ProfileConfig(), self.handle)
        self.queue = SchedulingQueue({"default-scheduler": self.profile}, self.handle.shapes, lambda: self.now)
        self.algorithm = Algorithm(self.handle, self.queue.nominator)

    def node(self, name: str, *, zone: str = "", cpu: str = "4", taints: list[Object] | None = None, **labels: str) -> Object:
        found = {HOST: name, **({ZONE: zone} if zone else {}), **labels}
        allocatable = {"cpu": cpu, "memory": "8Gi", "pods": "110"}
        obj = {"metadata": {"name": name, "labels": found}, "spec": {"taints": taints or []}, "status": {"allocatable": allocatable}}
        self.handle.table.set_node(obj)
        return obj

    def pod(self, name: str, *, cpu: str = "100m", labels: dict[str, str] | None = None, **spec: Any) -> PodInfo:
        container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}
        metadata = {"name": name, "namespace": "default", "uid": name, "labels": labels or {}}
        return PodInfo({"metadata": metadata, "spec": {"containers": [container], **spec}}, self.handle.shapes)

    def place(self, pod: PodInfo, node: str) -> None:
        self.handle.table.add_pod(pod, node)

    def decide(self, pod: PodInfo) -> Found | Diagnosis:
        return self.algorithm.schedule(self.profile, pod)

    def feasible(self, pod: PodInfo) -> set[str]:
        """Names of all nodes that the filters let through."""
        cycle, diagnosis, rows = self.algorithm.prepare(self.profile, pod)
        passed = self.algorithm.feasible(self.profile, pod, cycle, diagnosis, rows)
        return {self.handle.table.info(int(row)).name for row in passed}
