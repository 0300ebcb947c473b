"""The Deployment controller: what to do next for one Deployment.

Source: pkg/controller/deployment/deployment_controller.go, sync.go, progress.go, rollback.go.
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.resources import DEPLOYMENTS, REPLICA_SETS
from knarr.api.selectors import LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key, possibly_owned
from knarr.controllers.deployment import util
from knarr.controllers.deployment.replicasets import Rollout
from knarr.controllers.refs import Claims
from knarr.controllers.selectorcache import SelectorCache


class DeploymentController:
    """Moves every Deployment towards its template and size."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._deployments = ctx.informer(DEPLOYMENTS)
        self._sets = ctx.informer(REPLICA_SETS)
        self._pods = ctx.pods
        self._recorder = ctx.recorder("deployment-controller")
        self._selectors = SelectorCache(from_label_selector)
        self.controller = Controller("deployment-controller", self._reconcile, workers=10, max_retries=15)
        self._sets.add_index("namespace", lambda obj: [obj["metadata"].get("namespace", "")])
        self._deployments.add_handler(self._changed, lambda old, new: self._changed(new), self._deployment_deleted)
        self._sets.add_handler(self._set_added, self._set_updated, self._set_deleted)
        self._pods.add_handler(on_delete=self._pod_deleted)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _changed(self, deployment: Object) -> None:
        self.controller.queue.add(object_key(deployment))

    def _deployment_deleted(self, deployment: Object) -> None:
        self._selectors.forget(deployment)
        self.controller.queue.add(object_key(deployment))

    def _owner(self, rs: Object) -> Object | None:
        reference = meta.controller_of(rs)
        if reference is None or reference["kind"] != "Deployment":
            return None
        owner = self._deployments.get(rs["metadata"].get("namespace"), reference["name"])
        return owner if owner is not None and owner["metadata"]["uid"] == reference["uid"] else None

    def _set_added(self, rs: Object) -> None:
        if meta.controller_of(rs) is None:
            self._wake_matching(rs)
        elif (owner := self._owner(rs)) is not None:
            self._changed(owner)

    def _set_updated(self, old: Object, new: Object) -> None:
        old_ref, new_ref = meta.controller_of(old), meta.controller_of(new)
        if old_ref != new_ref and (owner := self._owner(old)) is not None:
            self._changed(owner)
        if new_ref is not None:
            if (owner := self._owner(new)) is not None:
                self._changed(owner)
        elif old_ref != new_ref or meta.labels(old) != meta.labels(new):
            self._wake_matching(new)

    def _set_deleted(self, rs: Object) -> None:
        if (owner := self._owner(rs)) is not None:
            self._changed(owner)

    def _wake_matching(self, rs: Object) -> None:
        labels = meta.labels(rs)
        if not labels:
            return
        for deployment in self._deployments.list(rs["metadata"].get("namespace")):
            if self._selector(deployment).matches(labels):
                self._changed(deployment)

    def _pod_deleted(self, pod: Object) -> None:
        # Only Recreate waits for pods to be gone; rolling updates count ReplicaSets.
        reference = meta.controller_of(pod)
        if reference is None or reference["kind"] != "ReplicaSet":
            return
        rs = self._sets.get(pod["metadata"].get("namespace"), reference["name"])
        owner = self._owner(rs) if rs is not None and rs["metadata"]["uid"] == reference["uid"] else None
        if owner is None or (owner["spec"].get("strategy") or {}).get("type") != "Recreate":
            return
        if not any(self._pods.by_index("controller", item["metadata"]["uid"]) for item in self._owned(owner)):
            self._changed(owner)

    def _selector(self, deployment: Object) -> LabelSelector:
        return self._selectors.get(deployment, deployment["spec"].get("selector"))

    def _owned(self, deployment: Object) -> list[Object]:
        return self._sets.by_index("controller", deployment["metadata"]["uid"])

    # Reconcile

    async def _reconcile(self, key: str) -> Result | None:
        cached = self._deployments.get_key(key)
        if cached is None:
            return None
        deployment = meta.deep_copy(cached)
        if self._selector(deployment).empty:
            message = "This deployment is selecting all pods. A non-empty selector is required."
            self._recorder.event(deployment, "Warning", "SelectingAll", message)
            return None
        candidates = possibly_owned(self._sets, deployment)
        claims = Claims(self._ctx.client, REPLICA_SETS, deployment, DEPLOYMENTS, self._selector(deployment))
        owned = await claims.claim(candidates)
        rollout = Rollout(self._ctx.client, self._recorder, self._sets, deployment, owned)
        if podutil.is_deleting(deployment):
            await rollout.find_sets(False)
            return await self._write_plain_status(rollout)
        await self._check_paused(rollout)
        if deployment["spec"].get("paused"):
            return await self._sync(rollout)
        if util.ROLLBACK_TO in meta.annotations(deployment):
            await self._rollback(rollout)
            return None
        await rollout.find_sets(False)
        if self._is_scaling(rollout):
            return await self._sync(rollout)
        if util.is_rolling(deployment):
            return await self._roll(rollout)
        return await self._recreate(rollout)

    async def _check_paused(self, rollout: Rollout) -> None:
        d = rollout.deployment
        condition = util.get_condition(d.get("status") or {}, "Progressing")
        if not util.has_deadline(d) or (condition is not None and condition.get("reason") == "ProgressDeadlineExceeded"):
            return
        marked = condition is not None and condition.get("reason") == "DeploymentPaused"
        paused = bool(d["spec"].get("paused"))
        if paused == marked:
            return
        reason, message = ("DeploymentPaused", "Deployment is paused") if paused else ("DeploymentResumed", "Deployment is resumed")
        util.set_condition(d.setdefault("status", {}), util.new_condition("Progressing", "Unknown", reason, message))
        await rollout.write_status()

    def _is_scaling(self, rollout: Rollout) -> bool:
        wanted = util.replicas(rollout.deployment)
        desired = (util.annotation_number(rs, util.DESIRED_REPLICAS) for rs in util.active(rollout.all))
        return any(number is not None and number != wanted for number in desired)

    async def _sync(self, rollout: Rollout) -> Result | None:
        """Scale without rolling: paused, or only the size changed."""
        await rollout.find_sets(False)
        await rollout.scale_proportionally()
        if rollout.deployment["spec"].get("paused") and util.ROLLBACK_TO not in meta.annotations(rollout.deployment):
            await rollout.clean_up()
        return await self._write_plain_status(rollout)

    async def _roll(self, rollout: Rollout) -> Result | None:
        if rollout.new is None:
            await rollout.find_sets(True)
        if not await rollout.grow_new() and not await rollout.shrink_old():
            if util.is_complete(rollout.deployment, rollout.deployment.get("status") or {}):
                await rollout.clean_up()
        return await self._write_rollout_status(rollout)

    async def _recreate(self, rollout: Rollout) -> Result | None:
        scaled = False
        for rs in util.active(rollout.old):
            scaled = await rollout.scale_to(rs, 0) or scaled
        if scaled or self._old_pods_running(rollout):
            return await self._write_rollout_status(rollout)
        if rollout.new is None:
            await rollout.find_sets(True)
        assert rollout.new is not None
        await rollout.scale_to(rollout.new, util.replicas(rollout.deployment))
        if util.is_complete(rollout.deployment, rollout.deployment.get("status") or {}):
            await rollout.clean_up()
        return await self._write_rollout_status(rollout)

    def _old_pods_running(self, rollout: Rollout) -> bool:
        if util.total_actual(rollout.old):
            return True
        new_uid = rollout.new["metadata"]["uid"] if rollout.new is not None else ""
        for rs in rollout.sets:
            if rs["metadata"]["uid"] != new_uid:
                pods = self._pods.by_index("controller", rs["metadata"]["uid"])
                if any(not podutil.is_finished(pod) for pod in pods):
                    return True
        return False

    async def _rollback(self, rollout: Rollout) -> None:
        await rollout.find_sets(True)
        d = rollout.deployment
        name = d["metadata"]["name"]
        try:
            revision = int(meta.annotations(d)[util.ROLLBACK_TO])
        except ValueError:
            revision = -1
        if revision == 0 and (revision := util.last_revision(rollout.all)) == 0:
            self._recorder.event(d, "Warning", "DeploymentRollbackRevisionNotFound", "Unable to find last revision.")
            await self._clear_rollback(d)
            return
        target = next((rs for rs in rollout.all if util.revision(rs) == revision), None)
        if target is None:
            self._recorder.event(d, "Warning", "DeploymentRollbackRevisionNotFound", "Unable to find the revision to rollback to.")
            await self._clear_rollback(d)
        elif util.template_equal(d["spec"]["template"], target["spec"]["template"]):
            message = f'The rollback revision contains the same template as current deployment "{name}"'
            self._recorder.event(d, "Warning", "DeploymentRollbackTemplateUnchanged", message)
            await self._clear_rollback(d)
        else:
            template = meta.deep_copy(target["spec"]["template"])
            (template.get("metadata") or {}).get("labels", {}).pop(util.HASH_LABEL, None)
            d["spec"]["template"] = template
            kept = {key: value for key, value in meta.annotations(d).items() if key in util.NOT_COPIED}
            copied = {key: value for key, value in meta.annotations(target).items() if key not in util.NOT_COPIED}
            d["metadata"]["annotations"] = {**kept, **copied}
            await self._clear_rollback(d)
            self._recorder.event(d, "Normal", "DeploymentRollback", f'Rolled back deployment "{name}" to revision {revision}')

    async def _clear_rollback(self, deployment: Object) -> None:
        deployment["metadata"]["annotations"].pop(util.ROLLBACK_TO, None)
        await self._ctx.client.update(DEPLOYMENTS, deployment)

    # Status

    async def _write_plain_status(self, rollout: Rollout) -> Result | None:
        status = _calculate(rollout)
        if status != _without_zeros(rollout.deployment.get("status") or {}):
            rollout.deployment["status"] = status
            await rollout.write_status()
        return None

    async def _write_rollout_status(self, rollout: Rollout) -> Result | None:
        d = rollout.deployment
        status = _calculate(rollout)
        if not util.has_deadline(d):
            util.remove_condition(status, "Progressing")
        else:
            _update_progress(rollout, status)
        failure = _replica_failure(rollout)
        if failure is not None:
            util.set_condition(status, failure)
        else:
            util.remove_condition(status, "ReplicaFailure")
        if status == _without_zeros(d.get("status") or {}):
            return _progress_check(d, status)
        d["status"] = status
        await rollout.write_status()
        return None


def _without_zeros(status: Object) -> Object:
    return {name: value for name, value in status.items() if value not in (0, None, [])}


def _calculate(rollout: Rollout) -> Object:
    d = rollout.deployment
    old = d.get("status") or {}
    available = util.total_actual(rollout.all, "availableReplicas")
    wanted_total = util.total(rollout.all)
    status: Object = {
        "observedGeneration": d["metadata"].get("generation") or 0,
        "replicas": util.total_actual(rollout.all),
        "updatedReplicas": util.total_actual([rollout.new]),
        "readyReplicas": util.total_actual(rollout.all, "readyReplicas"),
        "availableReplicas": available,
        "unavailableReplicas": max(0, wanted_total - available),
    }
    status = _without_zeros(status)
    if old.get("collisionCount") is not None:
        status["collisionCount"] = old["collisionCount"]
    if old.get("conditions"):
        status["conditions"] = list(old["conditions"])
    if available >= util.replicas(d) - util.max_unavailable(d):
        condition = util.new_condition("Available", "True", "MinimumReplicasAvailable", "Deployment has minimum availability.")
    else:
        condition = util.new_condition("Available", "False", "MinimumReplicasUnavailable", "Deployment does not have minimum availability.")
    util.set_condition(status, condition)
    return status


def _update_progress(rollout: Rollout, status: Object) -> None:
    d = rollout.deployment
    current = util.get_condition(d.get("status") or {}, "Progressing")
    if (
        (status.get("replicas") or 0) == (status.get("updatedReplicas") or 0)
        and current is not None
        and current.get("reason") == "NewReplicaSetAvailable"
    ):
        return
    if rollout.new is not None:
        subject = f'ReplicaSet "{rollout.new["metadata"]["name"]}"'
    else:
        subject = f'Deployment "{d["metadata"]["name"]}"'
    if util.is_complete(d, status):
        condition = util.new_condition("Progressing", "True", "NewReplicaSetAvailable", f"{subject} has successfully progressed.")
        util.set_condition(status, condition)
    elif util.is_progressing(d, status):
        condition = util.new_condition("Progressing", "True", "ReplicaSetUpdated", f"{subject} is progressing.")
        if current is not None:
            # Replaced even when nothing but its time changes: the deadline counts from here.
            if current["status"] == "True":
                condition["lastTransitionTime"] = current.get("lastTransitionTime")
            util.remove_condition(status, "Progressing")
        util.set_condition(status, condition)
    elif util.is_timed_out(d, status):
        condition = util.new_condition("Progressing", "False", "ProgressDeadlineExceeded", f"{subject} has timed out progressing.")
        util.set_condition(status, condition)


def _replica_failure(rollout: Rollout) -> Object | None:
    for rs in ([rollout.new] if rollout.new is not None else []) + rollout.all:
        condition = util.get_condition(rs.get("status") or {}, "ReplicaFailure")
        if condition is not None:
            return {
                "type": condition["type"],
                "status": condition["status"],
                "lastUpdateTime": condition.get("lastTransitionTime"),
                "lastTransitionTime": condition.get("lastTransitionTime"),
                "reason": condition.get("reason", ""),
                "message": condition.get("message", ""),
            }
    return None


def _progress_check(deployment: Object, status: Object) -> Result | None:
    """Ask for another look when the progress deadline will have passed."""
    current = util.get_condition(deployment.get("status") or {}, "Progressing")
    if not util.has_deadline(deployment) or current is None:
        return None
    if util.is_complete(deployment, status) or current.get("reason") == "ProgressDeadlineExceeded":
        return None
    updated = clock.parse_rfc3339(current["lastUpdateTime"]) if current.get("lastUpdateTime") else 0.0
    after = updated + float(deployment["spec"]["progressDeadlineSeconds"]) - clock.now()
    return Result(max(after, 0.0) + 1.0)
