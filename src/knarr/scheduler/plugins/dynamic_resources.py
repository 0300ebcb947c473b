"""DynamicResources: the claims of a pod must be allocated for its node, out of the devices that drivers publish.

Claims with an allocation bind the pod to where its devices are; for the others the filter searches every node and keeps what
it found, reserve takes the devices of the chosen node, pre_bind writes them down.

Source: plugins/dynamicresources.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from knarr.scheduler.columns import Bools, Rows
from knarr.scheduler.config import seconds
from knarr.scheduler.dra.allocator import Features, Search, Timeout
from knarr.scheduler.dra.claims import ClaimProblem, allocation_of, is_reserved_for
from knarr.scheduler.dra.devices import AllocationError, read_selector
from knarr.scheduler.events import Action, ClusterEvent
from knarr.scheduler.framework import SKIP, Cycle, Hint, Plugin, PluginError, Refusal, Rejection
from knarr.scheduler.podinfo import Pod, PodInfo
from knarr.scheduler.terms import NodeSelector

if TYPE_CHECKING:
    from knarr.scheduler.handle import Handle, Object

CANNOT_ALLOCATE = "cannot allocate all claims"
TIMED_OUT = "timed out trying to allocate devices"
NOT_ON_NODE = "resourceclaim not available on the node"


class _State:
    """What one cycle knows of the pod's claims."""

    def __init__(self, claims: list[Object], selectors: list[NodeSelector | None]) -> None:
        self.claims = claims
        self.selectors = selectors
        """Where the claims are available; None: not allocated, or everywhere."""
        self.to_allocate = [index for index, claim in enumerate(claims) if allocation_of(claim) is None]
        self.by_row: dict[int, list[Object]] = {}
        self.allocations: dict[int, Object] = {}
        """By index into claims: decided by reserve."""
        self.unavailable: set[int] = set()


class DynamicResources(Plugin):
    name = "DynamicResources"

    def __init__(self, handle: Handle, args: dict[str, Any]) -> None:
        super().__init__(handle, args)
        self._timeout_seconds = seconds(args.get("filterTimeout"), 10.0)
        gates = handle.feature_gates
        self._features = Features(
            admin_access=gates.get("DRAAdminAccess", True),
            prioritized_list=gates.get("DRAPrioritizedList", True),
            partitionable_devices=gates.get("DRAPartitionableDevices", False),
            device_taints=gates.get("DRADeviceTaints", False),
        )

    # What wakes a pod up.

    def events(self) -> Iterable[tuple[ClusterEvent, Hint | None]]:
        change = Action.ADD | Action.UPDATE
        return (
            (ClusterEvent("Node", Action.ADD | Action.UPDATE_NODE_LABEL | Action.UPDATE_NODE_ALLOCATABLE), None),
            (ClusterEvent("ResourceClaim", change), self._claim_changed),
            (ClusterEvent("Pod", Action.UPDATE_POD_CLAIM), self._pod_changed),
            (ClusterEvent("DeviceClass", change), None),
            (ClusterEvent("ResourceSlice", change), None),
        )

    def _claim_changed(self, waiting: PodInfo, old: Object | None, new: Object | None) -> bool:
        if new is None:
            return False
        try:
            uids = {claim["metadata"]["uid"] for claim in self.handle.claims.of_pod(waiting.pod)}
        except ClaimProblem:
            return False
        if old is not None and allocation_of(old) and not allocation_of(new):
            # Its devices are free for anybody.
            return True
        if new["metadata"]["uid"] not in uids:
            return False
        return old is None or (old.get("status") or {}) != (new.get("status") or {})

    def _pod_changed(self, waiting: PodInfo, old: Pod | None, new: Pod | None) -> bool:
        if new is None or new["metadata"]["uid"] != waiting.uid:
            return False
        return self._missing(new) is None

    def _missing(self, pod: Pod) -> str | None:
        """Why the pod's claims are not all there; None when they are."""
        try:
            for _ in self.handle.claims.of_pod(pod):
                pass
        except ClaimProblem as problem:
            return str(problem)
        return None

    def pre_enqueue(self, pod: PodInfo) -> Refusal | None:
        if not pod.resource_claims:
            return None
        problem = self._missing(pod.pod)
        return None if problem is None else Refusal(self.name, problem)

    # Filter.

    def pre_filter(self, cycle: Cycle) -> Any:
        if not cycle.pod.resource_claims:
            return SKIP
        try:
            claims = list(self.handle.claims.of_pod(cycle.pod.pod))
        except ClaimProblem as problem:
            return Refusal(self.name, str(problem))
        if not claims:
            return SKIP
        for claim in claims:
            if allocation_of(claim) is None:
                reason = self._unallocatable(claim)
                if reason:
                    return Refusal(self.name, reason)
        selectors = [read_selector((allocation_of(claim) or {}).get("nodeSelector")) for claim in claims]
        cycle.data[self.name] = _State(claims, selectors)
        return None

    def _unallocatable(self, claim: Object) -> str:
        """Why a claim can be allocated nowhere now, or ""."""
        metadata = claim["metadata"]
        shown = f"{metadata['namespace']}/{metadata['name']}"
        if self.handle.claims.is_pending(metadata["uid"]):
            return f"resource claim {shown} is in the process of being allocated"
        for request in (claim["spec"].get("devices") or {}).get("requests") or ():
            subs = request.get("firstAvailable") or ()
            wanted = [(f"{request['name']}/{sub['name']}", sub) for sub in subs]
            if request.get("exactly") is not None:
                wanted = [(request["name"], request["exactly"])]
            elif not subs:
                return f"resource claim {shown}, request {request['name']}: unknown request type"
            elif not self._features.prioritized_list:
                return f"resource claim {shown}, request {request['name']}: has subrequests, but the DRAPrioritizedList feature is disabled"
            for name, spec in wanted:
                device_class = spec.get("deviceClassName") or ""
                if self.handle.objects.get("DeviceClass", device_class) is None:
                    return f"request {name}: device class {device_class} does not exist"
        return ""

    def filter(self, cycle: Cycle, rows: Rows) -> tuple[Bools, Rejection] | None:
        state: _State = cycle.data[self.name]
        parts: dict[str, Bools] = {}
        here = np.ones(len(rows), dtype=np.bool_)
        for index, selector in enumerate(state.selectors):
            if selector is not None:
                reached = cycle.table.labels.matching(selector)[rows]
                if not reached.all():
                    state.unavailable.add(index)
                    here &= reached
        if not here.all():
            parts[NOT_ON_NODE] = ~here
        ok = here
        if state.to_allocate:
            ok = self._search(cycle, state, rows, here, parts)
        if ok.all():
            return None
        return ok, Rejection(self.name, rows[~ok], [(reason, mask[~ok]) for reason, mask in parts.items()], True)

    def _search(self, cycle: Cycle, state: _State, rows: Rows, here: Bools, parts: dict[str, Bools]) -> Bools:
        """Rows on which all claims that need it can be allocated; keeps the allocations."""
        claims = [state.claims[index] for index in state.to_allocate]
        deadline = time.monotonic() + self._timeout_seconds if self._timeout_seconds else float("inf")
        objects, partitionable = self.handle.objects, self._features.partitionable_devices
        ok = here.copy()
        refused: dict[str, list[int]] = {}

        def device_class(name: str) -> Object | None:
            return objects.get("DeviceClass", name)

        for index in np.flatnonzero(here).tolist():
            row = int(rows[index])
            node = cycle.table.info(row).node
            assert node is not None
            pools = self.handle.slices.pools(node, partitionable=partitionable)
            search = Search(node, claims, pools, device_class, self.handle.claims.allocated, self._features, deadline)
            try:
                found = search.run()
                reason = CANNOT_ALLOCATE
            except AllocationError as error:
                raise PluginError(str(error)) from None
            except Timeout:
                found, reason = None, TIMED_OUT
            if found is not None:
                state.by_row[row] = found
            else:
                ok[index] = False
                refused.setdefault(reason, []).append(index)
        for reason, indexes in refused.items():
            mask = parts[reason] = np.zeros(len(rows), dtype=np.bool_)
            mask[indexes] = True
        return ok

    def post_filter(self, cycle: Cycle) -> str:
        state: _State | None = cycle.data.get(self.name)
        if state is None:
            return "no new claims to deallocate"
        for index in state.unavailable:
            claim = state.claims[index]
            users = (claim.get("status") or {}).get("reservedFor") or ()
            if not users or (len(users) == 1 and users[0]["uid"] == cycle.pod.uid):
                writer = self.handle.claim_writer
                if writer is not None:
                    self.handle.submit(f"claim/{claim['metadata']['uid']}", writer.deallocate, claim)
                return "deallocation of ResourceClaim completed"
        return "still not schedulable"

    # Reserve and bind.

    def reserve(self, cycle: Cycle, node_name: str) -> Refusal | None:
        state: _State | None = cycle.data.get(self.name)
        if state is None or not state.to_allocate:
            return None
        info = cycle.table.get(node_name)
        found = state.by_row.get(info.row) if info is not None else None
        if found is None:
            raise PluginError("claim allocation not found for node")
        for index, allocation in zip(state.to_allocate, found, strict=True):
            state.allocations[index] = allocation
            self.handle.claims.start(state.claims[index], allocation)
        return None

    def unreserve(self, cycle: Cycle, node_name: str) -> None:
        state: _State | None = cycle.data.get(self.name)
        if state is None:
            return
        for index, claim in enumerate(state.claims):
            if index in state.allocations:
                self.handle.claims.end(claim)
            writer = self.handle.claim_writer
            if allocation_of(claim) and is_reserved_for(claim, cycle.pod.uid) and writer is not None:
                self.handle.submit(f"claim/{claim['metadata']['uid']}", writer.release, cycle.pod, claim)
        state.allocations.clear()

    def pre_bind_skips(self, cycle: Cycle, node_name: str) -> bool:
        return self.name not in cycle.data

    async def pre_bind(self, cycle: Cycle, node_name: str) -> None:
        state: _State = cycle.data[self.name]
        writer = self.handle.claim_writer
        if writer is None:
            raise PluginError("binding claims: no API to write to")
        for index, claim in enumerate(state.claims):
            if not is_reserved_for(claim, cycle.pod.uid):
                state.claims[index] = await writer.bind(cycle.pod, claim, state.allocations.get(index))
