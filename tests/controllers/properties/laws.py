"""What upstream documents of each workload, as laws over the commits of its pods, and what holds when all has settled."""

from __future__ import annotations

from typing import Any

from knarr.aiokits import clock
from knarr.api.types import Object
from knarr.controllers import podutil
from tests.controllers.properties.world import SEEN_SECONDS, Change, Example, Ledger
from tests.controllers.sizes import GRACE_SECONDS

HASH = "pod-template-hash"
REVISION = "controller-revision-hash"


def scaled(value: Any, total: int, up: bool) -> int:
    """An amount or percentage of a total."""
    if isinstance(value, str):
        exact = int(value.rstrip("%")) * total
        return -(-exact // 100) if up else exact // 100
    return int(value)


def active(pods: dict[str, Object]) -> list[Object]:
    return [pod for pod in pods.values() if podutil.is_active(pod)]


def ready(pods: dict[str, Object]) -> list[Object]:
    return [pod for pod in active(pods) if podutil.is_ready(pod)]


# Deployments: https://kubernetes.io/docs/concepts/workloads/controllers/deployment/#rolling-update-deployment


def _bounds(spec: Object) -> tuple[int, int]:
    """(most pods, fewest available pods) of a rolling update."""
    replicas = spec.get("replicas", 1)
    rolling = spec["strategy"].get("rollingUpdate") or {}
    surge, unavailable = scaled(rolling.get("maxSurge", 0), replicas, True), scaled(rolling.get("maxUnavailable", 0), replicas, False)
    if surge == 0 and unavailable == 0:
        unavailable = 1
    return replicas + surge, replicas - unavailable


def deployment(ledger: Ledger) -> Any:
    """The laws of a Deployment's pods; those of its ReplicaSets are told to the ledger.

    What surge bounds, at every moment, is what ReplicaSets are told (see tests.controllers.sizes).
    """

    def sizes(grown: int) -> str | None:
        specs, now = ledger.window(), ledger.sizes.total()
        if grown <= 0 or {spec["strategy"]["type"] for spec in specs} != {"RollingUpdate"}:
            return None
        most = max(_bounds(spec)[0] for spec in specs)
        return f"the sets are told {now} replicas, at most {most} are allowed" if now > most else None

    def more_than_told(change: Change) -> None:
        metadata = change.pod["metadata"]
        name, version, at = f"w-{metadata['labels'][HASH]}", int(metadata["resourceVersion"]), clock.now()
        count = len([pod for pod in active(change.pods) if pod["metadata"]["labels"][HASH] == metadata["labels"][HASH]])

        def law() -> str | None:
            told = ledger.sizes.told(name, version, at)
            return f"{count} pods of {name}, it was told {told}" if count > told else None

        ledger.judge_later(law, SEEN_SECONDS)  # the set's own commit came before, but by another watch

    def excess_stays() -> str | None:
        specs = ledger.window()
        if {spec["strategy"]["type"] for spec in specs} != {"RollingUpdate"}:
            return None
        most, count = max(_bounds(spec)[0] for spec in specs), len(active(ledger.pods))
        return f"{count} pods, at most {most} are allowed" if count > most else None

    ledger.size_law = sizes

    def law(change: Change) -> str | None:
        specs = ledger.window()
        kinds = {spec["strategy"]["type"] for spec in specs}
        if change.kind == "ADDED":
            more_than_told(change)
            ledger.judge_later(excess_stays, GRACE_SECONDS)
        if change.kind == "ADDED" and kinds == {"Recreate"}:
            mine = change.pod["metadata"]["labels"][HASH]
            others = [pod for pod in change.pods.values() if pod["metadata"]["labels"][HASH] != mine and not podutil.is_finished(pod)]
            if others and len(specs) == 1:
                return "Recreate made a new pod while an old one was there"
        if change.kind == "DELETING" and kinds == {"RollingUpdate"} and change.pod["metadata"]["uid"] not in ledger.by_user:
            same = len({spec.get("replicas", 1) for _, spec in ledger.specs}) == 1 and len({str(spec["strategy"]) for _, spec in ledger.specs}) == 1
            fewest = min(_bounds(spec)[1] for spec in specs)
            if same and podutil.is_ready(change.pod) and len(ready(change.pods)) < fewest:
                return f"{len(ready(change.pods))} pods left available by a rollout, at least {fewest} are promised"
        return None

    return law


async def deployment_settled(example: Example, spec: Object, sets: list[Object]) -> None:
    """When nothing changes any more: as many pods as declared, of the newest template, and no more history than asked for."""
    if not sets:  # paused before its first set was made
        assert spec.get("paused")
        assert not example.ledger.pods
        return
    newest = max(sets, key=lambda item: int(item["metadata"]["annotations"]["deployment.kubernetes.io/revision"]))
    now = active(example.ledger.pods)
    if not spec.get("paused"):
        # History is cut when a rollout is complete; one that cannot complete keeps it, as upstream's does.
        if not is_bad(spec["template"]):
            limit = spec["revisionHistoryLimit"]
            old = [item for item in sets if item is not newest and item["spec"]["replicas"] == 0]
            assert len(old) <= limit, f"{len(old)} old sets, limit {limit}"
            assert {pod["metadata"]["labels"][HASH] for pod in now} <= {newest["metadata"]["labels"][HASH]}
            assert len(now) == len(ready(example.ledger.pods)) == spec.get("replicas", 1)
            status = (await example.workload())["status"]
            assert status.get("updatedReplicas", 0) == status.get("availableReplicas", 0) == spec.get("replicas", 1), status
    revisions = [item["metadata"]["annotations"]["deployment.kubernetes.io/revision"] for item in sets]
    assert len(set(revisions)) == len(revisions), f"revisions are not unique: {revisions}"


def is_bad(template: Object) -> bool:
    return bool(template["spec"]["containers"][0]["image"].startswith("rec.invalid"))


# StatefulSets: https://kubernetes.io/docs/concepts/workloads/controllers/statefulset/#deployment-and-scaling-guarantees


def ordinal(pod: Object) -> int:
    return _ordinal(pod["metadata"]["name"])


def _ordinal(name: str) -> int:
    return int(name.rpartition("-")[2])


def _most_away(spec: Object) -> int:
    """How many pods an update may take away at once."""
    amount = (spec["updateStrategy"].get("rollingUpdate") or {}).get("maxUnavailable")
    return 1 if amount is None else max(1, scaled(amount, spec["replicas"], False))


def statefulset(ledger: Ledger) -> Any:
    def law(change: Change) -> str | None:
        specs = ledger.window()
        number = ordinal(change.pod)
        ordered = {spec["podManagementPolicy"] for spec in specs} == {"OrderedReady"}
        replicas = {spec["replicas"] for spec in specs}
        seen_ready = {ordinal(pod) for pod in ready(change.pods)} | {_ordinal(name) for name in ledger.just_taken()}
        if change.kind == "ADDED" and number >= max(replicas):
            return f"pod {number} of {max(replicas)} was made"
        if change.kind == "ADDED" and ordered:
            missing = set(range(number)) - seen_ready
            if missing:
                return f"pod {number} was made before {sorted(missing)} were ready"
        if change.kind == "DELETING" and change.pod["metadata"]["uid"] not in ledger.by_user and ordered and len(replicas) == 1:
            above = [ordinal(pod) for pod in change.pods.values() if ordinal(pod) > number]
            if number >= min(replicas) and above:
                return f"pod {number} was ended before {above}"
            if number < min(replicas) and change.pod["metadata"]["labels"][REVISION] and not podutil.is_finished(change.pod):
                most = max(_most_away(spec) for spec in specs)
                late = set(range(number + 1 if most == 1 else 0, min(replicas))) - seen_ready
                if len(late) > (0 if most == 1 else most):
                    return f"pod {number} was updated before {sorted(late)} were ready, maxUnavailable is {most}"
        return None

    return law


async def statefulset_settled(example: Example, spec: Object, revisions: list[Object]) -> None:
    """When nothing changes any more, with a template that works: all ordinals, updated from the partition up."""
    status = (await example.workload())["status"]
    live = {status.get("currentRevision"), status.get("updateRevision")} | {pod["metadata"]["labels"][REVISION] for pod in example.ledger.pods.values()}
    old = [item for item in revisions if item["metadata"]["name"] not in live]
    assert len(old) <= spec["revisionHistoryLimit"], f"{len(old)} old revisions"
    if is_bad(spec["template"]):
        return
    pods = {ordinal(pod): pod for pod in ready(example.ledger.pods)}
    if not example.ledger.specs or any(is_bad(one["template"]) for _, one in example.ledger.specs):
        return  # upstream's known issue: a pod that never becomes ready has to be deleted by hand
    assert sorted(pods) == list(range(spec["replicas"]))
    update = spec["updateStrategy"]
    if update["type"] == "RollingUpdate":
        partition = (update.get("rollingUpdate") or {}).get("partition", 0)
        behind = [number for number, pod in pods.items() if number >= partition and pod["metadata"]["labels"][REVISION] != status["updateRevision"]]
        assert not behind, f"pods {behind} have an old revision"


# Jobs: https://kubernetes.io/docs/concepts/workloads/controllers/job/

TRACKED = "batch.kubernetes.io/job-tracking"
INDEX = "batch.kubernetes.io/job-completion-index"


def job(ledger: Ledger) -> Any:
    succeeded: dict[str, str] = {}

    def law(change: Change) -> str | None:
        specs = ledger.window()
        if change.kind == "ADDED":
            most = max(spec["parallelism"] for spec in specs)
            if len(active(change.pods)) > most:
                return f"{len(active(change.pods))} pods at once, parallelism is {most}"
            if all(spec.get("suspend") for spec in specs):
                return "a suspended job made a pod"
        if specs[-1].get("completionMode") != "Indexed":
            return None
        index = change.pod["metadata"]["annotations"][INDEX]
        running = [pod for pod in active(change.pods) if pod["metadata"]["annotations"][INDEX] == index]
        if len(running) > 1:
            return f"index {index} runs twice"
        if change.kind == "ADDED" and index in succeeded:
            return f"index {index} was done by {succeeded[index]} and runs again"
        # A pod that suspension or less parallelism has let go is not counted any more, whatever it comes to.
        if podutil.phase(change.pod) == "Succeeded" and TRACKED in (change.pod["metadata"].get("finalizers") or ()):
            succeeded[index] = change.pod["metadata"]["name"]
        return None

    return law


async def job_settled(example: Example, spec: Object) -> None:
    """When nothing changes any more: done, failed or suspended, each with its counts."""
    status = (await example.workload()).get("status") or {}
    conditions = {item["type"] for item in status.get("conditions") or () if item["status"] == "True"}
    if "Complete" in conditions:
        assert status["succeeded"] == spec["completions"], status
    elif "Failed" in conditions:
        assert status.get("failed", 0) > spec["backoffLimit"], status
    else:
        assert spec.get("suspend") or spec["parallelism"] == 0, f"nothing stopped it: {status}"
    assert not active(example.ledger.pods), "pods run on"
    assert (status.get("uncountedTerminatedPods") or {}) == {}, status
    assert status.get("active", 0) == 0


# DaemonSets: https://kubernetes.io/docs/tasks/manage-daemon/update-daemon-set/


def node_of(pod: Object) -> str:
    found = pod["spec"].get("nodeName")
    if not found:
        term = pod["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]["nodeSelectorTerms"][0]
        found = term["matchFields"][0]["values"][0]
    return str(found)


def daemonset(ledger: Ledger) -> Any:
    def law(change: Change) -> str | None:
        specs = ledger.window()
        rolling = [spec["updateStrategy"].get("rollingUpdate") or {} for spec in specs]
        surge = any(item.get("maxSurge") for item in rolling)
        if change.kind == "ADDED":
            here = [pod for pod in active(change.pods) if node_of(pod) == node_of(change.pod)]
            if len(here) > (2 if surge else 1):
                return f"{len(here)} pods on {node_of(change.pod)}"
        steady = len(specs) == 1 and specs[0]["updateStrategy"]["type"] == "RollingUpdate" and not surge
        if change.kind == "DELETING" and steady and podutil.is_ready(change.pod) and change.pod["metadata"]["uid"] not in ledger.by_user:
            nodes = {node_of(pod) for pod in change.pods.values()}
            lost = len(nodes) - len({node_of(pod) for pod in ready(change.pods)})
            most = max(1, scaled(rolling[0].get("maxUnavailable", 1), len(nodes), True))
            # Tainted nodes lose their pods for another reason.
            if lost > most and not ledger.by_user & {"taints"}:
                return f"{lost} pods away, maxUnavailable is {most}"
        return None

    return law


async def daemonset_settled(example: Example, spec: Object, revisions: list[Object], nodes: set[str]) -> None:
    """When nothing changes any more: one pod on each node that takes it, of the newest template unless updates wait for deletion."""
    pods = active(example.ledger.pods)
    old = {pod["metadata"]["labels"][REVISION] for pod in pods}
    spare = [item for item in revisions if item["metadata"]["labels"][REVISION] not in old]
    assert len(spare) <= spec["revisionHistoryLimit"] + 1, f"{len(spare)} revisions without pods"
    if any(is_bad(one["template"]) for _, one in example.ledger.specs):
        return
    assert sorted(node_of(pod) for pod in ready(example.ledger.pods)) == sorted(nodes)
    if spec["updateStrategy"]["type"] == "RollingUpdate":
        newest = max(revisions, key=lambda item: int(item["revision"]))
        assert old <= {newest["metadata"]["labels"][REVISION]}, f"{old}, newest {newest['metadata']['labels']}"
