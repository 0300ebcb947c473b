"""`knarr why deploy/NAME` (sts, ds, rs, job): what keeps a workload from what is declared."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from knarr.api import meta
from knarr.api.resources import DAEMON_SETS, DEPLOYMENTS, JOBS, NODES, PODS, REPLICA_SETS, STATEFUL_SETS
from knarr.api.scheme import Resource
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster.why.facts import condition, event_steps, find, owned, pod_state, pod_steps
from knarr.controllers import podutil
from knarr.controllers.daemonset import util as daemons
from knarr.controllers.deployment import util as deployments
from knarr.network.why import Step

_REVISION = "controller-revision-hash"


async def why(client: Client, resource: Resource, namespace: str, name: str) -> list[Step]:
    """What a workload's controller has said, and what its pods wait for. Raises StatusError."""
    workload = await find(client, resource, name, namespace)
    title = f"{resource.kind} {namespace}/{name}"
    if workload is None:
        return [Step(False, f"{title} does not exist")]
    metadata, steps = workload["metadata"], []
    if "deletionTimestamp" in metadata:
        kept = ", ".join(metadata.get("finalizers") or ()) or "nothing"
        steps.append(Step(False, f"{title} is being deleted since {metadata['deletionTimestamp']}, kept by {kept}"))
    managed = workload["spec"].get("managedBy")
    if resource == JOBS and managed not in (None, "kubernetes.io/job-controller"):
        return [*steps, Step(None, f"{title} is left to the controller {managed}")]
    seen = (workload.get("status") or {}).get("observedGeneration")
    # Jobs have no observed generation.
    if resource != JOBS and (seen or 0) < (metadata.get("generation") or 0):
        steps.append(Step(False, f"its controller has not seen generation {metadata.get('generation')} yet, only {seen or 'none'}: does it run?"))
    steps += await _KINDS[resource.plural](client, workload)
    if any(step.ok is False for step in steps):
        return steps + await event_steps(client, workload)
    return [*steps, Step(True, f"{title} is as declared")]


def _missing(status: Object, wanted: int, fields: dict[str, str]) -> list[Step]:
    """One refusal for each count that is short of what is wanted."""
    counts = ((words, int(status.get(field) or 0)) for field, words in fields.items())
    return [Step(False, f"{count} of {wanted} pods are {words}") for words, count in counts if count < wanted]


async def _pods(client: Client, owners: list[Object]) -> list[Object]:
    uids = {owner["metadata"]["uid"] for owner in owners}
    if not uids:
        return []
    found = (await client.list(PODS, owners[0]["metadata"]["namespace"])).get("items") or []
    return [pod for pod in found if (meta.controller_of(pod) or {}).get("uid") in uids]


async def _deployment(client: Client, workload: Object) -> list[Step]:
    spec, status, steps = workload["spec"], workload.get("status") or {}, []
    if spec.get("paused"):
        steps.append(Step(False, "it is paused: changes of its template wait until it is resumed"))
    sets = await owned(client, REPLICA_SETS, workload)
    new = deployments.find_new(workload, sets)
    if new is None:
        steps.append(Step(False, "there is no ReplicaSet of its present template"))
    wanted = deployments.replicas(workload)
    steps += _missing(status, wanted, {"updatedReplicas": "of the present template", "availableReplicas": "available"})
    old = [rs for rs in sets if new is None or rs["metadata"]["uid"] != new["metadata"]["uid"]]
    for rs in deployments.active(old):
        steps.append(Step(False, f"ReplicaSet {rs['metadata']['name']} of an older template still has {deployments.replicas(rs)} pods"))
    for kind, bad in (("ReplicaFailure", "True"), ("Progressing", "False")):
        found = condition(workload, kind)
        if found is not None and found.get("status") == bad:
            steps.append(Step(False, f"{found.get('reason')}: {found.get('message')}"))
    if steps:
        surge, unavailable = deployments.max_surge(workload), deployments.max_unavailable(workload)
        if deployments.is_rolling(workload):
            steps.append(Step(None, f"the rollout may have {wanted + surge} pods and needs {wanted - unavailable} available ones"))
        for rs in [new] if new is not None else []:
            steps += await event_steps(client, rs)
        # Pods of the present template first: they are what the others wait for.
        for group in ([new] if new is not None else [], old):
            steps += await pod_steps(client, await _pods(client, group), int(spec.get("minReadySeconds") or 0))
    return steps


async def _replica_set(client: Client, workload: Object) -> list[Step]:
    wanted, min_ready = deployments.replicas(workload), int(workload["spec"].get("minReadySeconds") or 0)
    steps = _missing(workload.get("status") or {}, wanted, {"replicas": "there", "availableReplicas": "available"})
    failure = condition(workload, "ReplicaFailure")
    if failure is not None and failure.get("status") == "True":
        steps.append(Step(False, f"{failure.get('reason')}: {failure.get('message')}"))
    return steps + (await pod_steps(client, await _pods(client, [workload]), min_ready) if steps else [])


async def _stateful_set(client: Client, workload: Object) -> list[Step]:
    spec, status = workload["spec"], workload.get("status") or {}
    wanted, min_ready = deployments.replicas(workload), int(spec.get("minReadySeconds") or 0)
    pods = sorted(await _pods(client, [workload]), key=_ordinal)
    steps = _missing(status, wanted, {"replicas": "there", "availableReplicas": "available"})
    steps += _revisions(workload, pods)
    blocking = next((pod for pod in pods if pod_state(pod, min_ready)), None)
    ordered = spec.get("podManagementPolicy") != "Parallel"
    if steps and ordered and blocking is not None:
        steps.append(Step(None, f"pods are made and updated one by one: all others wait for {blocking['metadata']['name']}"))
        if _is_stuck(blocking, status):
            text = f"pod {blocking['metadata']['name']} is of an older template and not ready: it has to be deleted before the newer template can take its place"
            steps.append(Step(False, text))
    return steps + (await pod_steps(client, pods, min_ready) if steps else [])


def _ordinal(pod: Object) -> int:
    return int(pod["metadata"]["name"].rpartition("-")[2])


def _is_stuck(pod: Object, status: Object) -> bool:
    """Upstream's known issue: a broken pod is not replaced by a rollout that waits for it to become ready."""
    return not podutil.is_ready(pod) and not podutil.is_deleting(pod) and meta.labels(pod).get(_REVISION) != status.get("updateRevision")


def _revisions(workload: Object, pods: list[Object]) -> list[Step]:
    """What the update strategy leaves of older templates."""
    target, update = (workload.get("status") or {}).get("updateRevision"), workload["spec"].get("updateStrategy") or {}
    behind = [pod for pod in pods if meta.labels(pod).get(_REVISION) != target]
    if not behind:
        return []
    if update.get("type") == "OnDelete":
        return [Step(False, f"{len(behind)} pods are of an older template; the strategy OnDelete updates each when it is deleted")]
    partition = int((update.get("rollingUpdate") or {}).get("partition") or 0)
    held = [pod for pod in behind if _ordinal(pod) < partition]
    steps = [Step(None, f"{len(held)} pods keep their older template: the partition is {partition}")] if held else []
    waiting = len(behind) - len(held)
    return steps + ([Step(False, f"{waiting} pods are of an older template")] if waiting else [])


async def _daemon_set(client: Client, workload: Object) -> list[Step]:
    spec, status = workload["spec"], workload.get("status") or {}
    nodes = (await client.list(NODES)).get("items") or []
    steps: list[Step] = []
    left_out = [node["metadata"]["name"] for node in nodes if not daemons.should_run(node, workload)[0]]
    if left_out:
        shown = ", ".join(left_out[:5])
        steps.append(Step(False if len(left_out) == len(nodes) else None, f"{len(left_out)} of {len(nodes)} nodes are left out by its node selector, affinity or their taints: {shown}"))
    wanted = int(status.get("desiredNumberScheduled") or 0)
    fields = {"currentNumberScheduled": "there", "updatedNumberScheduled": "of the present template", "numberAvailable": "available"}
    steps += _missing(status, wanted, fields)
    if not any(step.ok is False for step in steps):
        return steps
    if (spec.get("updateStrategy") or {}).get("type") == "OnDelete":
        steps.append(Step(None, "the strategy OnDelete updates each pod when it is deleted"))
    else:
        surge, away = daemons.surge(workload, wanted), daemons.unavailable(workload, wanted)
        steps.append(Step(None, f"the rollout may have {away} nodes without an available pod, and {surge} with two"))
    return steps + await pod_steps(client, await _pods(client, [workload]), int(spec.get("minReadySeconds") or 0))


async def _job(client: Client, workload: Object) -> list[Step]:
    spec, status = workload["spec"], workload.get("status") or {}
    if condition(workload, "Complete") is not None:
        return []
    steps: list[Step] = []
    failed = condition(workload, "Failed") or condition(workload, "FailureTarget")
    if failed is not None:
        steps.append(Step(False, f"it has failed: {failed.get('reason')}: {failed.get('message')}"))
    wanted = spec.get("completions")
    counts = ", ".join(f"{status.get(name) or 0} {name}" for name in ("active", "ready", "succeeded", "failed", "terminating"))
    steps.append(Step(False, f"{status.get('succeeded') or 0} of {'one or more' if wanted is None else wanted} completions are done (pods: {counts})"))
    if spec.get("suspend"):
        steps.append(Step(False, "it is suspended"))
    elif spec.get("parallelism") == 0:
        steps.append(Step(False, "its parallelism is 0: it makes no pods"))
    if status.get("failedIndexes"):
        steps.append(Step(False, f"indexes {status['failedIndexes']} have failed for good"))
    if status.get("failed") and failed is None:
        steps.append(Step(None, f"each failure makes the next try wait longer, up to {spec.get('backoffLimit')} failures (backoffLimit)"))
    pods = [pod for pod in await _pods(client, [workload]) if podutil.phase(pod) != "Succeeded"]
    return steps + await pod_steps(client, pods)


_KINDS: dict[str, Callable[[Client, Object], Awaitable[list[Step]]]] = {
    DEPLOYMENTS.plural: _deployment,
    REPLICA_SETS.plural: _replica_set,
    STATEFUL_SETS.plural: _stateful_set,
    DAEMON_SETS.plural: _daemon_set,
    JOBS.plural: _job,
}
