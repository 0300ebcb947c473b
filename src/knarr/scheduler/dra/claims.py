"""ResourceClaims as the scheduler counts on them: what the API shows, what it has written itself, what is under way.

An allocation that was decided is pending until it is written; its devices are taken from that moment. What was written is
assumed until the informer shows that version or a later one. `allocated` counts the devices of all of these. Callers: event
handlers, DynamicResources, its writer.

Source: plugins/dynamicresources dra_manager, allocateddevices; component-helpers resourceclaim.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from knarr.scheduler.dra.devices import DeviceID
from knarr.scheduler.objects import Object
from knarr.scheduler.podinfo import Pod

FINALIZER = "resource.kubernetes.io/delete-protection"


class ClaimProblem(Exception):
    """A claim of a pod is not there, or not the pod's: it must wait. The text is the reason."""


def claim_name(pod: Pod, entry: Object) -> tuple[str, bool]:
    """Name of the claim behind an entry of spec.resourceClaims, and whether the pod must own it.

    Returns:
      An empty name when there is none on purpose.

    Raises:
      ClaimProblem: it has not been made yet.
    """
    if entry.get("resourceClaimName"):
        return entry["resourceClaimName"], False
    metadata = pod["metadata"]
    if not entry.get("resourceClaimTemplateName"):
        raise ClaimProblem(
            f'pod "{metadata["namespace"]}/{metadata["name"]}", spec.resourceClaim "{entry["name"]}": none of the supported fields are set'
        )
    for status in (pod.get("status") or {}).get("resourceClaimStatuses") or ():
        if status["name"] == entry["name"]:
            return status.get("resourceClaimName") or "", True
    raise ClaimProblem(f'pod "{metadata["namespace"]}/{metadata["name"]}": ResourceClaim not created yet')


def allocation_of(claim: Object) -> Object | None:
    return (claim.get("status") or {}).get("allocation") or None


def is_reserved_for(claim: Object, pod_uid: str) -> bool:
    return any(user["uid"] == pod_uid for user in (claim.get("status") or {}).get("reservedFor") or ())


def _devices(claim: Object | None) -> list[DeviceID]:
    """Devices that nobody else may have; with admin access a device is only looked at."""
    allocation = allocation_of(claim) if claim is not None else None
    if not allocation:
        return []
    results = (allocation.get("devices") or {}).get("results") or ()
    return [(r["driver"], r["pool"], r["device"]) for r in results if not r.get("adminAccess")]


class Claims:
    """See the module."""

    def __init__(self) -> None:
        self._seen: dict[tuple[str, str], Object] = {}
        self._assumed: dict[tuple[str, str], Object] = {}
        self._pending: dict[str, Object] = {}
        self._counted: dict[str, list[DeviceID]] = {}
        self.allocated: Counter[DeviceID] = Counter()
        self.version = 0
        """Moves whenever a device is taken or given back."""

    @staticmethod
    def _key(claim: Object) -> tuple[str, str]:
        return claim["metadata"]["namespace"], claim["metadata"]["name"]

    def get(self, namespace: str, name: str) -> Object | None:
        """The newest version of a claim, without what is pending."""
        return self._assumed.get((namespace, name)) or self._seen.get((namespace, name))

    def of_pod(self, pod: Pod) -> Iterator[Object]:
        """All claims of a pod, in order. Raises ClaimProblem."""
        for entry in pod["spec"].get("resourceClaims") or ():
            name, own = claim_name(pod, entry)
            if not name:
                continue
            metadata = pod["metadata"]
            claim = self.get(metadata["namespace"], name)
            if claim is None:
                raise ClaimProblem(f'could not find v1.ResourceClaim "{metadata["namespace"]}/{name}"')
            if "deletionTimestamp" in claim["metadata"]:
                raise ClaimProblem(f'resourceclaim "{name}" is being deleted')
            if own and not any(o.get("controller") and o["uid"] == metadata["uid"] for o in claim["metadata"].get("ownerReferences") or ()):
                whole = f"{metadata['namespace']}/{name} was not created for pod {metadata['namespace']}/{metadata['name']}"
                raise ClaimProblem(f"ResourceClaim {whole} (pod is not owner)")
            yield claim

    def _count(self, uid: str, claim: Object | None) -> None:
        devices = _devices(self._pending.get(uid) or claim)
        old = self._counted.get(uid, [])
        if devices == old:
            return
        self.version += 1
        for device in old:
            self.allocated[device] -= 1
            if not self.allocated[device]:
                del self.allocated[device]
        self.allocated.update(devices)
        if devices:
            self._counted[uid] = devices
        else:
            self._counted.pop(uid, None)

    def set(self, claim: Object) -> None:
        """The informer shows a claim."""
        key = self._key(claim)
        old = self._seen.get(key)
        if old is not None and old["metadata"]["uid"] != claim["metadata"]["uid"]:
            self.remove(old)
        self._seen[key] = claim
        assumed = self._assumed.get(key)
        if assumed is not None:
            if int(assumed["metadata"]["resourceVersion"]) > int(claim["metadata"]["resourceVersion"]):
                return
            del self._assumed[key]
        self._count(claim["metadata"]["uid"], claim)

    def remove(self, claim: Object) -> None:
        """The informer shows that a claim is gone."""
        key = self._key(claim)
        self._seen.pop(key, None)
        self._assumed.pop(key, None)
        self._pending.pop(claim["metadata"]["uid"], None)
        self._count(claim["metadata"]["uid"], None)

    def assume(self, claim: Object) -> None:
        """A version that the API server has answered, which the informer has yet to show."""
        key = self._key(claim)
        seen = self._seen.get(key)
        if seen is None or seen["metadata"]["uid"] != claim["metadata"]["uid"]:
            return
        if int(seen["metadata"]["resourceVersion"]) < int(claim["metadata"]["resourceVersion"]):
            self._assumed[key] = claim
            self._count(claim["metadata"]["uid"], claim)

    # Allocations that are decided and not written.

    def start(self, claim: Object, allocation: Object) -> None:
        """Take the devices of an allocation that is about to be written."""
        uid = claim["metadata"]["uid"]
        self._pending[uid] = {**claim, "status": {**(claim.get("status") or {}), "allocation": allocation}}
        self._count(uid, claim)

    def is_pending(self, uid: str) -> bool:
        return uid in self._pending

    def end(self, claim: Object) -> bool:
        """The writing has ended, either way; True when it was under way."""
        uid = claim["metadata"]["uid"]
        if self._pending.pop(uid, None) is None:
            return False
        self._count(uid, self.get(*self._key(claim)))
        return True
