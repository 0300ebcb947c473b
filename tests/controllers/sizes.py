"""What the ReplicaSets of a Deployment were told: the bounds that a rollout keeps at every moment.

Upstream's controller counts `spec.replicas` of the sets and does not wait until the pods of a set that it has made smaller are
gone. So pods may be more than surge allows for a moment, but never more of one set than that set was told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from knarr.aiokits import clock
from knarr.api.types import Object

# What controllers decided on an older state may still come this long after it was changed.
GRACE_SECONDS = 2.0


@dataclass
class Size:
    """A commit of a ReplicaSet's size."""

    version: int
    at: float
    replicas: int


@dataclass
class Sizes:
    """The sizes of the sets of one Deployment, by name, oldest first."""

    known: dict[str, list[Size]] = field(default_factory=dict)

    def saw(self, kind: str, replica_set: Object) -> int:
        """Take in a commit; gives by how much the total grew."""
        before, metadata = self.total(), replica_set["metadata"]
        replicas = 0 if kind == "DELETED" else replica_set["spec"]["replicas"]
        self.known.setdefault(metadata["name"], []).append(Size(int(metadata["resourceVersion"]), clock.now(), replicas))
        return self.total() - before

    def total(self) -> int:
        return sum(sizes[-1].replicas for sizes in self.known.values())

    def told(self, name: str, version: int, at: float) -> int:
        """The most pods that a set was told when an object got this version at this time, or a moment before."""
        known = [size for size in self.known.get(name, ()) if size.version < version]
        ends = [size.at for size in known[1:]] + [at]
        return max((size.replicas for size, end in zip(known, ends, strict=True) if end >= at - GRACE_SECONDS), default=0)
