"""Eviction: deleting a pod if its disruption budgets allow.

Source: pkg/registry/core/pod/storage/eviction.go.
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.api import decode as decoding
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.selectors import SelectorError, from_label_selector
from knarr.api.types import Object
from knarr.apiserver.call import Call
from knarr.apiserver.verbs.create import check_namespace, read_body
from knarr.apiserver.verbs.delete import delete_object

MAX_DISRUPTED_PODS = 2000


async def evict(call: Call) -> None:
    """Answer POST pods/NAME/eviction."""
    body = read_body(call)
    call.write_options("CreateOptions")
    content_type = call.request.headers.get("content-type", "")
    kind = ("policy/v1beta1", "Eviction") if b"policy/v1beta1" in body else ("policy/v1", "Eviction")
    eviction, warnings = decoding.decode(kind, body, content_type, call.field_validation or "Warn")
    call.warnings += warnings
    call.log_object = eviction
    metadata = eviction.setdefault("metadata", {})
    check_namespace(call, metadata)
    name = call.info.name
    if metadata.get("name") and metadata["name"] != name:
        raise errors.bad_request("name in URL does not match name in Eviction object")
    options: Object = dict(eviction.get("deleteOptions") or {})
    if options.get("dryRun"):
        call.dry_run = True
    pods = call.endpoint.live_store
    pod = pods.get_nowait(call.namespace, name)
    if pod is None:
        raise errors.not_found("pods", name)
    budget = None if _may_ignore_budgets(pod) else _budget_of(call, pod)
    if budget is not None:
        if _unhealthy_may_go(pod, budget):
            # Nothing may have become healthy meanwhile: delete exactly the pod that was looked at.
            preconditions = dict(options.get("preconditions") or {})
            preconditions.setdefault("resourceVersion", pod["metadata"]["resourceVersion"])
            options["preconditions"] = preconditions
        else:
            await _charge(call, budget, name)
    await _mark_disrupted(call, name, options)
    await _delete(call, name, options)


async def _delete(call: Call, name: str, options: Object) -> None:
    await delete_object(call, name, options)
    call.answer_status({"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success", "code": 201})


def _may_ignore_budgets(pod: Object) -> bool:
    phase = (pod.get("status") or {}).get("phase")
    return phase in ("Succeeded", "Failed", "Pending") or bool(pod["metadata"].get("deletionTimestamp"))


def _is_ready(pod: Object) -> bool:
    return any(c.get("type") == "Ready" and c.get("status") == "True" for c in (pod.get("status") or {}).get("conditions") or [])


def _unhealthy_may_go(pod: Object, budget: Object) -> bool:
    if _is_ready(pod):
        return False
    policy = (budget.get("spec") or {}).get("unhealthyPodEvictionPolicy") or "IfHealthyBudget"
    if policy == "AlwaysAllow":
        return True
    status = budget.get("status") or {}
    return (status.get("currentHealthy") or 0) >= (status.get("desiredHealthy") or 0) and (status.get("desiredHealthy") or 0) > 0


def _budget_of(call: Call, pod: Object) -> Object | None:
    """Return the one budget that covers the pod. Raises 500 when several do."""
    labels = pod["metadata"].get("labels") or {}
    found: list[Object] = []
    for budget in call.server.store("policy", "poddisruptionbudgets").list_nowait(call.namespace):
        try:
            if labels and from_label_selector((budget.get("spec") or {}).get("selector")).matches(labels):
                found.append(budget)
        except SelectorError:
            continue
    if len(found) > 1:
        raise StatusError(500, "", "This pod has more than one PodDisruptionBudget, which the eviction subresource does not support.")
    return found[0] if found else None


async def _charge(call: Call, budget: Object, pod_name: str) -> None:
    """Take one disruption from the budget. Raises 429 when there is none."""
    name = budget["metadata"]["name"]
    store = call.server.registry.stores["policy", "poddisruptionbudgets"]

    def change(current: Object) -> Object:
        status = current.setdefault("status", {})
        if (status.get("observedGeneration") or 0) < (current["metadata"].get("generation") or 0):
            raise _refused(f"The disruption budget {name} is still being processed by the server.", 10)
        allowed = status.get("disruptionsAllowed") or 0
        if allowed < 0:
            raise errors.forbidden("poddisruptionbudgets.policy", name, "pdb disruptions allowed is negative")
        if len(status.get("disruptedPods") or {}) > MAX_DISRUPTED_PODS:
            raise errors.forbidden("poddisruptionbudgets.policy", name, "DisruptedPods map too big - too many evictions not confirmed by PDB controller")
        if allowed == 0:
            needed, healthy = status.get("desiredHealthy") or 0, status.get("currentHealthy") or 0
            error = _refused("Cannot evict pod as it would violate the pod's disruption budget.", 0)
            error.details = {"causes": [{
                "reason": "DisruptionBudget", "message": f"The disruption budget {name} needs {needed} healthy pods and has {healthy} currently"}]}
            raise error
        status["disruptionsAllowed"] = allowed - 1
        # The controller forgets the pod when it sees it gone, or after some minutes.
        status["disruptedPods"] = {**(status.get("disruptedPods") or {}), pod_name: clock.now_rfc3339()}
        return current

    if call.dry_run:
        change(store.cache.private(store.cache.objects[f"{call.namespace}/{name}"]))
        return
    await store.update(call.namespace, name, change)


def _refused(message: str, seconds: int) -> StatusError:
    error = errors.too_many_requests(message, seconds)
    if seconds:
        error.details.setdefault("causes", [{"reason": "DisruptionBudget", "message": message}])
    return error


async def _mark_disrupted(call: Call, name: str, options: Object) -> None:
    """Note on the pod why it ends, for controllers that count failures. Preconditions hold for this write already."""
    if call.dry_run:
        return
    preconditions = options.get("preconditions") or {}

    def change(pod: Object) -> Object | None:
        metadata = pod["metadata"]
        for key in ("uid", "resourceVersion"):
            if preconditions.get(key) is not None and preconditions[key] != metadata[key]:
                raise errors.conflict("Pod", name, (
                    f"the {'UID' if key == 'uid' else 'ResourceVersion'} in the precondition ({preconditions[key]}) does not match the "
                    f"{'UID' if key == 'uid' else 'ResourceVersion'} in record ({metadata[key]}). The object might have been modified"))
        status = pod.setdefault("status", {})
        conditions = [c for c in status.get("conditions") or [] if c.get("type") != "DisruptionTarget"]
        conditions.append({
            "type": "DisruptionTarget", "status": "True", "reason": "EvictionByEvictionAPI", "message": "Eviction API: evicting",
            "lastProbeTime": None, "lastTransitionTime": clock.now_rfc3339(),
        })
        status["conditions"] = conditions
        return pod

    written = await call.endpoint.live_store.update(call.namespace, name, change)
    if preconditions.get("resourceVersion") is not None:
        options["preconditions"] = {**preconditions, "resourceVersion": written["metadata"]["resourceVersion"]}
