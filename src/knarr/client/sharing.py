"""Equal parts of many objects, kept once.

Pods of one workload differ in little; decoded, their equal parts are most of an informer's memory. Transforms of informers
(controllers, scheduler) put the known equal part in the place of each. Sound because cached objects are never changed.

Bound: MAXIMUM_PARTS; beyond it all are forgotten (objects keep theirs alive) and sharing begins anew.
"""

from __future__ import annotations

from typing import Any, TypeVar

import orjson

from knarr.api.encode import trimmed
from knarr.api.types import Object

Part = TypeVar("Part", bound=dict[str, Any] | list[Any])

MAXIMUM_PARTS = 8192
_OF_SPEC = ("tolerations", "nodeSelector", "affinity", "securityContext", "topologySpreadConstraints", "imagePullSecrets", "resources", "overhead")
_OF_STATUS = ("podIPs", "hostIPs", "initContainerStatuses", "ephemeralContainerStatuses")


class Parts:
    """The parts known so far."""

    def __init__(self) -> None:
        self._known: dict[bytes, Any] = {}

    def one(self, part: Part) -> Part:
        """Give the known part that equals this one, or this one from now on."""
        key = orjson.dumps(part)
        found: Part | None = self._known.get(key)
        if found is None:
            if len(self._known) >= MAXIMUM_PARTS:
                self._known.clear()
            found = self._known[trimmed(key)] = part
        return found

    def within(self, holder: Object, names: tuple[str, ...]) -> None:
        """Share these fields of an object of one's own, where they are there."""
        for name in names:
            part = holder.get(name)
            if part.__class__ is dict or part.__class__ is list:
                holder[name] = self.one(part)

    def pod(self, pod: Object) -> Object:
        """Share what pods of one workload, or of one moment, have in common; changes the given object, which must be fresh."""
        one = self.one
        self.within(pod["metadata"], ("labels", "ownerReferences", "annotations"))
        spec, status = pod.get("spec"), pod.get("status")
        if spec:
            self.within(spec, _OF_SPEC)
            for group in ("containers", "initContainers"):
                if spec.get(group):
                    spec[group] = one(spec[group])
            for volume in spec.get("volumes") or ():
                # The volume has a name of its own, what it holds is everybody's.
                self.within(volume, ("projected", "configMap", "secret", "emptyDir"))
        if status:
            self.within(status, _OF_STATUS)
            conditions = status.get("conditions")
            if conditions:
                status["conditions"] = one([one(condition) for condition in conditions])
            for container in status.get("containerStatuses") or ():
                self.within(container, ("state", "lastState", "resources", "allocatedResources"))
        return pod
