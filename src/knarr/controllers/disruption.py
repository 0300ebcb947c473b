"""PodDisruptionBudget: how many pods may be evicted now, and clearing marks of disruptions that did not happen.

Source: pkg/controller/disruption/disruption.go, pkg/apis/policy helper.
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import DEPLOYMENTS, POD_DISRUPTION_BUDGETS, PODS, REPLICA_SETS, REPLICATION_CONTROLLERS, STATEFUL_SETS
from knarr.api.scheme import SCHEME
from knarr.api.selectors import EVERYTHING, LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.client.discovery import server_resources
from knarr.controllers import podutil
from knarr.controllers.context import Context, matching, object_key
from knarr.controllers.selectorcache import SelectorCache

_DELETION_SECONDS = 120.0
_STALE_SECONDS = 120.0


class DisruptionController:
    """Keeps the status of all budgets."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._budgets = ctx.informer(POD_DISRUPTION_BUDGETS)
        self._pods = ctx.pods
        self._owners = {res.kind: ctx.informer(res) for res in (REPLICATION_CONTROLLERS, REPLICA_SETS, DEPLOYMENTS, STATEFUL_SETS)}
        self._recorder = ctx.recorder("controllermanager")
        self._selectors = SelectorCache(_compile)
        self.controller = Controller("disruption-controller", self._reconcile, workers=5)
        self._stale = Controller("disruption-stale-pods", self._clear_stale, workers=5)
        self._budgets.add_handler(self._changed, lambda old, new: self._changed(new), self._selectors.forget)
        self._pods.add_handler(self._pod_changed, self._pod_updated, self._pod_changed)

    async def run(self) -> None:
        self._stale.start()
        try:
            await self.controller.run()
        finally:
            await self._stale.stop()

    def _changed(self, budget: Object) -> None:
        self.controller.queue.add(object_key(budget))

    def _pod_changed(self, pod: Object) -> None:
        for budget in self._budgets.list(pod["metadata"]["namespace"]):
            if self._selector(budget).matches(meta.labels(pod)):
                self._changed(budget)
        wait = _stale_wait(pod)
        if wait is not None:
            self._stale.queue.add_after(object_key(pod), wait)

    def _pod_updated(self, old: Object, new: Object) -> None:
        if meta.labels(old) != meta.labels(new):
            self._pod_changed(old)
        self._pod_changed(new)

    def _selector(self, budget: Object) -> LabelSelector:
        return self._selectors.get(budget, budget["spec"].get("selector"))

    # Budgets

    async def _reconcile(self, key: str) -> Result | None:
        budget = self._budgets.get_key(key)
        if budget is None:
            return None
        try:
            return await self._sync(budget)
        except StatusError as error:
            if errors.is_conflict(error) or errors.is_not_found(error):
                raise
            await self._fail_safe(budget, error.message)
        except _CannotCount as error:
            await self._fail_safe(budget, str(error))
        return None

    async def _sync(self, budget: Object) -> Result | None:
        wanted = (budget["spec"].get("selector") or {}).get("matchLabels")
        pods = matching(self._pods, budget["metadata"]["namespace"], wanted, self._selector(budget))
        if not pods:
            self._recorder.event(budget, "Normal", "NoPods", "No matching pods found")
        try:
            expected, desired, unmanaged = await self._expected(budget, pods)
        except _CannotCount as error:
            message = f"Failed to calculate the number of expected pods: {error}"
            self._recorder.event(budget, "Warning", "CalculateExpectedPodCountFailed", message)
            raise
        if unmanaged:
            message = (
                f"Pods selected by this PodDisruptionBudget (selector: {_selector_text(budget)}) were found to be unmanaged. As a result, the "
                "status of the PDB cannot be calculated correctly, which may result in undefined behavior. To account for these pods please set "
                '".spec.minAvailable" field of the PDB to an integer value.'
            )
            self._recorder.event(budget, "Warning", "UnmanagedPods", message)
        now = clock.now()
        disrupted, recheck = self._disrupted(budget, pods, now)
        healthy = sum(1 for pod in pods if not podutil.is_deleting(pod) and pod["metadata"]["name"] not in disrupted and podutil.is_ready(pod))
        await self._write(budget, healthy, desired, expected, disrupted)
        return Result(recheck - now) if recheck is not None else None

    async def _expected(self, budget: Object, pods: list[Object]) -> tuple[int, int, list[str]]:
        """(expected pods, pods that must stay healthy, names of pods without a controller)."""
        spec = budget["spec"]
        if spec.get("maxUnavailable") is not None:
            expected, unmanaged = await self._expected_scale(pods)
            return expected, max(0, expected - podutil.scaled_value(spec["maxUnavailable"], expected, True)), unmanaged
        if isinstance(spec.get("minAvailable"), int):
            return len(pods), spec["minAvailable"], []
        if spec.get("minAvailable") is not None:
            expected, unmanaged = await self._expected_scale(pods)
            return expected, podutil.scaled_value(spec["minAvailable"], expected, True), unmanaged
        return 0, 0, []

    async def _expected_scale(self, pods: list[Object]) -> tuple[int, list[str]]:
        scales: dict[str, int] = {}
        seen: set[str] = set()
        unmanaged = []
        for pod in pods:
            reference = meta.controller_of(pod)
            if reference is None:
                unmanaged.append(pod["metadata"]["name"])
                continue
            if reference["uid"] in seen:
                continue
            found = await self._scale_of(reference, pod["metadata"]["namespace"])
            if found is None:
                raise _CannotCount(f'found no controllers for pod "{pod["metadata"]["name"]}"')
            seen.add(reference["uid"])
            scales[found[0]] = found[1]
        return sum(scales.values()), unmanaged

    async def _scale_of(self, reference: Object, namespace: str) -> tuple[str, int] | None:
        """(uid, replicas) of what finally decides on the number of a controller's pods."""
        informer = self._owners.get(reference["kind"])
        builtin = SCHEME.for_kind(reference["apiVersion"], reference["kind"])
        if informer is None or builtin is None:
            return await self._scale_subresource(reference, namespace)
        owner = informer.get(namespace, reference["name"])
        if owner is None or owner["metadata"]["uid"] != reference["uid"]:
            return None
        above = meta.controller_of(owner)
        if reference["kind"] == "ReplicaSet" and above is not None and above["kind"] == "Deployment":
            return await self._scale_of(above, namespace)
        replicas = owner["spec"].get("replicas")
        return owner["metadata"]["uid"], 1 if replicas is None else int(replicas)

    async def _scale_subresource(self, reference: Object, namespace: str) -> tuple[str, int] | None:
        group = reference["apiVersion"].rpartition("/")[0]
        resources, _ = await server_resources(self._client)
        for res in resources:
            if (res.group, res.kind) == (group, reference["kind"]) and "scale" in res.subresources:
                try:
                    scale = await self._client.get(res, reference["name"], namespace, subresource="scale")
                except StatusError as error:
                    if errors.is_not_found(error):
                        return None
                    raise
                if scale["metadata"]["uid"] != reference["uid"]:
                    return None
                return reference["uid"], int((scale.get("spec") or {}).get("replicas") or 0)
        return None

    def _disrupted(self, budget: Object, pods: list[Object], now: float) -> tuple[dict[str, str], float | None]:
        """(pods whose eviction was granted and whose deletion is still to come, when to look again)."""
        noted = (budget.get("status") or {}).get("disruptedPods") or {}
        result: dict[str, str] = {}
        recheck: float | None = None
        for pod in pods:
            name = pod["metadata"]["name"]
            if name not in noted or podutil.is_deleting(pod):
                continue
            due = clock.parse_rfc3339(noted[name]) + _DELETION_SECONDS
            if due < now:
                namespace = budget["metadata"]["namespace"]
                message = f"Pod was expected by PDB {namespace}/{namespace} to be deleted but it wasn't"
                self._recorder.event(pod, "Warning", "NotDeleted", message)
            else:
                recheck = due if recheck is None else min(recheck, due)
                result[name] = noted[name]
        return result, recheck

    async def _write(self, budget: Object, healthy: int, desired: int, expected: int, disrupted: dict[str, str]) -> None:
        allowed = max(0, healthy - desired) if expected > 0 else 0
        old = budget.get("status") or {}
        generation = budget["metadata"].get("generation") or 0
        status: Object = {
            "observedGeneration": generation,
            "disruptionsAllowed": allowed,
            "currentHealthy": healthy,
            "desiredHealthy": desired,
            "expectedPods": expected,
        }
        if disrupted:
            status["disruptedPods"] = disrupted
        conditions = meta.deep_copy(old.get("conditions") or [])
        sufficient = allowed > 0
        meta.set_condition(
            conditions,
            "DisruptionAllowed",
            "True" if sufficient else "False",
            reason="SufficientPods" if sufficient else "InsufficientPods",
            now=clock.now_rfc3339(),
            observedGeneration=generation,
        )
        conditions = [{**item, "message": item.get("message", "")} for item in conditions]
        status["conditions"] = conditions
        if _normal(status) == _normal(old):
            return
        await self._client.update(POD_DISRUPTION_BUDGETS, {**budget, "status": status}, subresource="status")

    async def _fail_safe(self, budget: Object, message: str) -> None:
        """Allow nothing when it cannot be worked out."""
        status = meta.deep_copy(budget.get("status") or {})
        status["disruptionsAllowed"] = 0
        conditions = status.setdefault("conditions", [])
        observed = status.get("observedGeneration") or 0
        changed = meta.set_condition(
            conditions, "DisruptionAllowed", "False", reason="SyncFailed", message=message, now=clock.now_rfc3339(), observedGeneration=observed
        )
        if changed or (budget.get("status") or {}).get("disruptionsAllowed"):
            for name in ("currentHealthy", "desiredHealthy", "expectedPods"):
                status.setdefault(name, 0)
            await self._client.update(POD_DISRUPTION_BUDGETS, {**budget, "status": status}, subresource="status")

    # Pods marked for a disruption that did not come

    async def _clear_stale(self, key: str) -> Result | None:
        pod = self._pods.get_key(key)
        wait = _stale_wait(pod) if pod is not None else None
        if pod is None or wait is None:
            return None
        if wait > 0:
            return Result(wait)
        condition = {"type": "DisruptionTarget", "status": "False", "lastTransitionTime": clock.now_rfc3339(), "reason": None, "message": None}
        patch = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {"conditions": [condition]}}
        await self._client.patch(
            PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], patch, type="strategic", subresource="status"
        )
        return None


class _CannotCount(Exception):
    """The number of pods that should be there is not known."""


def _compile(selector: Object | None) -> LabelSelector:
    # policy/v1: an empty selector takes every pod of the namespace, none at all takes no pod.
    return EVERYTHING if selector == {} else from_label_selector(selector)


def _selector_text(budget: Object) -> str:
    labels = (budget["spec"].get("selector") or {}).get("matchLabels") or {}
    inner = ",".join(f"{name}: {value}" for name, value in sorted(labels.items()))
    return "&LabelSelector{MatchLabels:map[string]string{" + inner + ",},MatchExpressions:[]LabelSelectorRequirement{},}"


def _normal(status: Object) -> Object:
    result = {name: value for name, value in status.items() if value not in (0, None, {}, [])}
    result["conditions"] = [{name: value for name, value in item.items() if value != ""} for item in status.get("conditions") or ()]
    return result


def _stale_wait(pod: Object) -> float | None:
    """Seconds until a mark counts as stale; None when there is none."""
    if podutil.is_deleting(pod) or podutil.is_finished(pod):
        return None
    condition = podutil.condition(pod, "DisruptionTarget")
    if condition is None or condition["status"] != "True" or condition.get("reason") == "TerminationByKubelet":
        return None
    since = clock.parse_rfc3339(condition["lastTransitionTime"]) if condition.get("lastTransitionTime") else 0.0
    return max(0.0, since + _STALE_SECONDS - clock.now())
