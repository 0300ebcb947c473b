"""Node lifecycle: who does not report any more, and what that means for its pods.

Per node one timer runs to the moment at which its silence counts; leases and status updates push
it on, so a healthy cluster costs a look per node and grace period. Conditions become taints;
NoExecute taints, which evict, are rationed per zone, and held back when everything seems dead,
since then it is more likely us who cannot see.
Source: pkg/controller/nodelifecycle/node_lifecycle_controller.go.
"""

from __future__ import annotations

from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.ratelimit import RateLimit
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import LEASES, NODES, PODS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil, taints
from knarr.controllers.context import Context

log = get_logger(__name__)

_CONDITION_TAINTS: dict[str, dict[str, str]] = {
    "Ready": {"False": taints.NOT_READY, "Unknown": taints.UNREACHABLE},
    "MemoryPressure": {"True": "node.kubernetes.io/memory-pressure"},
    "DiskPressure": {"True": "node.kubernetes.io/disk-pressure"},
    "NetworkUnavailable": {"True": "node.kubernetes.io/network-unavailable"},
    "PIDPressure": {"True": "node.kubernetes.io/pid-pressure"},
}
_OUR_NO_SCHEDULE = {key for keys in _CONDITION_TAINTS.values() for key in keys.values()} | {taints.UNSCHEDULABLE}
_OUR_NO_EXECUTE = (taints.NOT_READY, taints.UNREACHABLE)
_WATCHED_CONDITIONS = ("Ready", "MemoryPressure", "DiskPressure", "PIDPressure")
_LABELS = {"kubernetes.io/os": "beta.kubernetes.io/os", "kubernetes.io/arch": "beta.kubernetes.io/arch"}
_EXCLUDED = "node.kubernetes.io/exclude-disruption"
_EVICTIONS_PER_SECOND = 0.1
_SLOW_EVICTIONS_PER_SECOND = 0.01
_UNHEALTHY_ZONE = 0.55
_LARGE_ZONE_NODES = 50


@dataclass(slots=True)
class _Health:
    """When a node was last heard of, by our own clock."""

    probed: float
    ready: str | None = None
    """Status of the Ready condition as last seen; None before the first."""
    heartbeat: str = ""
    renewed: str = ""


@dataclass(slots=True)
class _Zone:
    state: str
    limit: RateLimit | None
    """None: no evictions at all."""


class NodeLifecycleController:
    """Watches the health of nodes."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._config = ctx.config
        self._nodes = ctx.nodes
        self._pods = ctx.pods
        self._leases = ctx.informers.get(LEASES, "kube-node-lease", transform=_trim_lease)
        self._recorder = ctx.recorder("node-controller")
        self._health: dict[str, _Health] = {}
        self._zones: dict[str, _Zone] = {}
        self._all_disrupted = False
        self._zones_stale = True
        self.controller = Controller("node-lifecycle-controller", self._reconcile, workers=8)
        self._nodes.add_handler(self._node_added, self._node_updated, self._node_deleted)
        self._leases.add_handler(self._lease_renewed, lambda old, new: self._lease_renewed(new))
        self._pods.add_handler(self._pod_bound, self._pod_updated)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _node_added(self, node: Object) -> None:
        name = node["metadata"]["name"]
        self._observe(node)
        reference = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}
        self._recorder.event(reference, "Normal", "RegisteredNode", f"Node {name} event: Registered Node {name} in Controller")
        self._zone_changed()
        self.controller.queue.add(name)

    def _node_updated(self, old: Object, new: Object) -> None:
        name = new["metadata"]["name"]
        self._observe(new)
        if _ready_status(old) != _ready_status(new) or _zone_key(old) != _zone_key(new):
            self._zone_changed()
        if _relevant(old) != _relevant(new):
            self.controller.queue.add(name)

    def _node_deleted(self, node: Object) -> None:
        name = node["metadata"]["name"]
        self._health.pop(name, None)
        reference = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}
        self._recorder.event(reference, "Normal", "RemovingNode", f"Node {name} event: Removing Node {name} from Controller")
        self._zone_changed()

    def _observe(self, node: Object) -> None:
        """Take a status update as a sign of life when its heartbeat moved."""
        name = node["metadata"]["name"]
        ready = podutil.condition(node, "Ready")
        heartbeat = (ready or {}).get("lastHeartbeatTime") or ""
        health = self._health.get(name)
        if health is None:
            probed = clock.now() if ready is not None else podutil.created_at(node)
            self._health[name] = _Health(probed, ready["status"] if ready else None, heartbeat)
            return
        if (ready is not None) != (health.ready is not None) or heartbeat != health.heartbeat:
            health.probed = clock.now()
            health.heartbeat = heartbeat
        health.ready = ready["status"] if ready else None

    def _lease_renewed(self, lease: Object) -> None:
        health = self._health.get(lease["metadata"]["name"])
        renewed = (lease.get("spec") or {}).get("renewTime") or ""
        if health is not None and renewed > health.renewed:
            health.renewed = renewed
            health.probed = clock.now()

    def _pod_bound(self, pod: Object) -> None:
        self._check_pod(pod)

    def _pod_updated(self, old: Object, new: Object) -> None:
        if old["spec"].get("nodeName") != new["spec"].get("nodeName"):
            self._check_pod(new)

    def _check_pod(self, pod: Object) -> None:
        # A pod that lands on a silent node must not count as ready.
        health = self._health.get(pod["spec"].get("nodeName", ""))
        if health is not None and health.ready not in (None, "True") and podutil.is_ready(pod):
            self.controller.queue.add(pod["spec"]["nodeName"])

    # Zones

    def _zone_changed(self) -> None:
        self._zones_stale = True

    def _refresh_zones(self) -> None:
        """Work out anew how disrupted each zone is, and with it the pace of evictions."""
        if not self._zones_stale:
            return
        self._zones_stale = False
        members: dict[str, list[bool]] = {}
        for node in self._nodes:
            if _EXCLUDED not in meta.labels(node):
                members.setdefault(_zone_key(node), []).append(_ready_status(node) == "True")
        states = {key: _zone_state(ready) for key, ready in members.items()}
        was_all = self._all_disrupted
        self._all_disrupted = bool(states) and all(state == "full" for state in states.values())
        for key, state in states.items():
            zone = self._zones.get(key)
            if zone is None or zone.state != state:
                self._zones[key] = _Zone(state, _limit(state, len(members[key])))
        for key in self._zones.keys() - states.keys():
            del self._zones[key]
        if was_all != self._all_disrupted:
            log.info("all zones disrupted" if self._all_disrupted else "zones recovered")
            for name, health in self._health.items():
                if not self._all_disrupted:
                    # Nobody was heard for a while; give everyone a full period again.
                    health.probed = clock.now()
                self.controller.queue.add(name)

    # Reconcile

    async def _reconcile(self, name: str) -> Result | None:
        node = self._nodes.get(None, name)
        if node is None:
            return None
        self._refresh_zones()
        if name not in self._health:
            self._observe(node)
        health = self._health[name]
        before = _ready_status(node)
        grace = self._config.node_monitor_grace_seconds if before is not None else self._config.node_startup_grace_seconds
        wait = health.probed + grace - clock.now()
        if wait <= 0:
            node = await self._mark_unknown(node)
        after = _ready_status(node)
        if after not in (None, "True"):
            if before == "True":
                reference = {"apiVersion": "v1", "kind": "Node", "name": name, "uid": node["metadata"]["uid"]}
                self._recorder.event(reference, "Normal", "NodeNotReady", f"Node {name} status is now: NodeNotReady")
            await self._mark_pods_not_ready(name)
        retry = await self._sync_taints(node)
        await self._sync_labels(node)
        # A silent node is looked at again now and then: its status may change without a heartbeat.
        next_look = max(wait, 0.0) + 0.05 if wait > 0 else self._config.node_monitor_grace_seconds
        return Result(min(next_look, retry) if retry is not None else next_look)

    async def _mark_unknown(self, node: Object) -> Object:
        node = meta.deep_copy(node)
        now = clock.now_rfc3339()
        conditions = node.setdefault("status", {}).setdefault("conditions", [])
        changed = False
        for type in _WATCHED_CONDITIONS:
            current = meta.get_condition(conditions, type)
            if current is None:
                changed = True
                conditions.append(
                    {
                        "type": type,
                        "status": "Unknown",
                        "lastHeartbeatTime": node["metadata"]["creationTimestamp"],
                        "lastTransitionTime": now,
                        "reason": "NodeStatusNeverUpdated",
                        "message": "Kubelet never posted node status.",
                    }
                )
            elif current["status"] != "Unknown":
                changed = True
                current.update(
                    status="Unknown", reason="NodeStatusUnknown", message="Kubelet stopped posting node status.", lastTransitionTime=now
                )
        if not changed:
            return node
        # The cached node lacks its images; a patch of the conditions leaves them alone.
        patch = {"metadata": {"resourceVersion": node["metadata"]["resourceVersion"]}, "status": {"conditions": conditions}}
        return await self._client.patch(NODES, node["metadata"]["name"], None, patch, type="strategic", subresource="status")

    async def _mark_pods_not_ready(self, name: str) -> None:
        for pod in self._pods.by_index("node", name):
            ready = podutil.condition(pod, "Ready")
            if ready is None or ready["status"] == "False":
                continue
            condition = {"type": "Ready", "status": "False", "lastTransitionTime": clock.now_rfc3339()}
            patch = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {"conditions": [condition]}}
            try:
                await self._client.patch(
                    PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], patch, type="strategic", subresource="status"
                )
            except StatusError as error:
                if not errors.is_not_found(error) and not errors.is_conflict(error):
                    raise
                continue
            self._recorder.event(pod, "Warning", "NodeNotReady", "Node is not ready")

    async def _sync_taints(self, node: Object) -> float | None:
        """Make the node's taints follow its conditions; gives seconds to wait when evictions are rationed."""
        current = taints.of_node(node)
        wanted: list[Object] = []
        for condition in (node.get("status") or {}).get("conditions") or ():
            key = _CONDITION_TAINTS.get(condition["type"], {}).get(condition["status"])
            if key:
                wanted.append({"key": key, "effect": "NoSchedule"})
        if (node.get("spec") or {}).get("unschedulable"):
            wanted.append({"key": taints.UNSCHEDULABLE, "effect": "NoSchedule"})
        retry = self._want_no_execute(node, current, wanted)
        kept = [taint for taint in current if not _is_ours(taint) or any(taints.same(taint, other) for other in wanted)]
        added = [taint for taint in wanted if not any(taints.same(taint, other) for other in current)]
        if len(kept) == len(current) and not added:
            return retry
        now = clock.now_rfc3339()
        result = kept + [{**taint, "timeAdded": now} for taint in added]
        patch: Object = {"metadata": {"resourceVersion": node["metadata"]["resourceVersion"]}, "spec": {"taints": result or None}}
        await self._client.patch(NODES, node["metadata"]["name"], None, patch)
        return retry

    def _want_no_execute(self, node: Object, current: list[Object], wanted: list[Object]) -> float | None:
        key = _CONDITION_TAINTS["Ready"].get(_ready_status(node) or "")
        if key is None or self._all_disrupted:
            return None
        marked = any(taint.get("key") in _OUR_NO_EXECUTE and taint.get("effect") == "NoExecute" for taint in current)
        if not marked:
            zone = self._zones.get(_zone_key(node))
            if zone is None or zone.limit is None:
                return self._config.node_monitor_period_seconds
            if not zone.limit.try_take():
                return 1 / zone.limit.per_second / 10
        wanted.append({"key": key, "effect": "NoExecute"})
        return None

    async def _sync_labels(self, node: Object) -> None:
        labels = meta.labels(node)
        missing = {old: labels[new] for new, old in _LABELS.items() if new in labels and labels.get(old) != labels[new]}
        if missing:
            await self._client.patch(NODES, node["metadata"]["name"], None, {"metadata": {"labels": missing}}, type="strategic")


def _trim_lease(lease: Object) -> Object:
    meta_ = lease["metadata"]
    kept = {name: meta_[name] for name in ("name", "namespace", "uid", "resourceVersion") if name in meta_}
    return {"kind": "Lease", "metadata": kept, "spec": {"renewTime": (lease.get("spec") or {}).get("renewTime")}}


def _ready_status(node: Object) -> str | None:
    condition = podutil.condition(node, "Ready")
    return condition["status"] if condition is not None else None


def _relevant(node: Object) -> tuple[object, ...]:
    conditions = tuple((item["type"], item["status"]) for item in (node.get("status") or {}).get("conditions") or ())
    spec = node.get("spec") or {}
    return (conditions, spec.get("unschedulable"), spec.get("taints"), meta.labels(node))


def _is_ours(taint: Object) -> bool:
    if taint.get("effect") == "NoSchedule":
        return taint.get("key") in _OUR_NO_SCHEDULE
    return taint.get("effect") == "NoExecute" and taint.get("key") in _OUR_NO_EXECUTE


def _zone_key(node: Object) -> str:
    labels = meta.labels(node)
    zone = labels.get("failure-domain.beta.kubernetes.io/zone", labels.get("topology.kubernetes.io/zone", ""))
    region = labels.get("failure-domain.beta.kubernetes.io/region", labels.get("topology.kubernetes.io/region", ""))
    return f"{region}:\0:{zone}" if region or zone else ""


def _zone_state(ready: list[bool]) -> str:
    bad = ready.count(False)
    if bad == len(ready):
        return "full"
    return "partial" if bad > 2 and bad / len(ready) >= _UNHEALTHY_ZONE else "normal"


def _limit(state: str, size: int) -> RateLimit | None:
    if state == "partial":
        return RateLimit(_SLOW_EVICTIONS_PER_SECOND, 1) if size > _LARGE_ZONE_NODES else None
    # A zone that is wholly gone is emptied at the normal pace as long as others live.
    return RateLimit(_EVICTIONS_PER_SECOND, 1)
