"""What a failed pod means for its Job, when a Job counts as successful, and how long to wait after failures.

Source: pkg/controller/job/pod_failure_policy.go, success_policy.go, backoff_utils.go.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.types import Object
from knarr.controllers import podutil
from knarr.controllers.job.indexes import Indexes

FAILURE_COUNT = "batch.kubernetes.io/job-index-failure-count"
IGNORED_FAILURE_COUNT = "batch.kubernetes.io/job-index-ignored-failure-count"
_FIRST_BACKOFF_SECONDS = 10.0
_LONGEST_BACKOFF_SECONDS = 600.0


def only_replaces_failed(job: Object) -> bool:
    """Whether a terminating pod still counts as running until it has failed."""
    return job["spec"].get("podReplacementPolicy") == "Failed" or job["spec"].get("podFailurePolicy") is not None


def is_failed(pod: Object, job: Object) -> bool:
    phase = podutil.phase(pod)
    if phase == "Failed":
        return True
    return not only_replaces_failed(job) and podutil.is_deleting(pod) and phase != "Succeeded"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the pod failure policy says of one failed pod."""

    counts: bool = True
    action: str = ""
    message: str = ""
    """Why the Job fails; only with action FailJob."""


def judge(job: Object, pod: Object) -> Verdict:
    """Apply the pod failure policy to a failed pod."""
    policy = job["spec"].get("podFailurePolicy")
    name = f"{pod['metadata']['namespace']}/{pod['metadata']['name']}"
    for position, rule in enumerate((policy or {}).get("rules") or ()):
        action = rule["action"]
        message = ""
        if rule.get("onExitCodes") is not None:
            status = _matching_container(pod, rule["onExitCodes"])
            if status is None:
                continue
            code = status["state"]["terminated"]["exitCode"]
            message = f"Container {status['name']} for pod {name} failed with exit code {code} matching {action} rule at index {position}"
        else:
            condition = _matching_condition(pod, rule.get("onPodConditions") or ())
            if condition is None:
                continue
            message = f"Pod {name} has condition {condition['type']} matching {action} rule at index {position}"
        return Verdict(action != "Ignore", action, message if action == "FailJob" else "")
    return Verdict()


def _matching_container(pod: Object, requirement: Object) -> Object | None:
    status = pod.get("status") or {}
    wanted = requirement.get("containerName")
    values = requirement.get("values") or ()
    for listed in ("containerStatuses", "initContainerStatuses"):
        for item in status.get(listed) or ():
            terminated = (item.get("state") or {}).get("terminated")
            if terminated is None or not terminated.get("exitCode") or (wanted is not None and wanted != item["name"]):
                continue
            if (terminated["exitCode"] in values) == (requirement["operator"] == "In"):
                return item  # type: ignore[no-any-return]
    return None


def _matching_condition(pod: Object, patterns: Sequence[Object]) -> Object | None:
    for condition in (pod.get("status") or {}).get("conditions") or ():
        for pattern in patterns:
            if condition["type"] == pattern["type"] and condition["status"] == pattern.get("status", "True"):
                return condition  # type: ignore[no-any-return]
    return None


def success_message(job: Object, succeeded: Indexes) -> str:
    """Why the success policy is met, "" when it is not."""
    policy = job["spec"].get("successPolicy")
    if policy is None or not len(succeeded):
        return ""
    completions = int(job["spec"]["completions"])
    for position, rule in enumerate(policy.get("rules") or ()):
        count = rule.get("succeededCount")
        if rule.get("succeededIndexes") is not None:
            required = Indexes.parse(rule["succeededIndexes"], completions)
            if not len(required):
                continue
            reached = succeeded.overlap(required)
            met = reached == len(required) or (count is not None and reached >= count)
        else:
            met = count is not None and len(succeeded) >= count
        if met:
            return f"Matched rules at index {position}"
    return ""


# Failures of an index


def _number(pod: Object, annotation: str) -> int:
    text = meta.annotations(pod).get(annotation, "")
    return int(text) if text.isdigit() else 0


def index_failures(pod: Object) -> int:
    return _number(pod, FAILURE_COUNT)


def all_index_failures(pod: Object) -> int:
    """Counted and ignored ones."""
    return _number(pod, FAILURE_COUNT) + _number(pod, IGNORED_FAILURE_COUNT)


def is_index_failed(pod: Object, job: Object) -> bool:
    """Whether with this pod its index has failed for good."""
    if not is_failed(pod, job):
        return False
    verdict = judge(job, pod)
    if verdict.action == "FailIndex":
        return True
    return verdict.counts and index_failures(pod) >= int(job["spec"]["backoffLimitPerIndex"])


def next_failure_annotations(job: Object, replaced: Object | None) -> dict[str, str]:
    """The failure counts that the next pod of an index carries."""
    counted = ignored = 0
    if replaced is not None:
        counted, ignored = _number(replaced, FAILURE_COUNT), _number(replaced, IGNORED_FAILURE_COUNT)
        if judge(job, replaced).counts:
            counted += 1
        else:
            ignored += 1
    result = {FAILURE_COUNT: str(counted)}
    if ignored:
        result[IGNORED_FAILURE_COUNT] = str(ignored)
    return result


# Back-off


def finished_at(pod: Object) -> float:
    """Epoch seconds of a pod's end, as well as it can be told."""
    status = pod.get("status") or {}
    sidecars = {item["name"] for item in pod["spec"].get("initContainers") or () if item.get("restartPolicy") == "Always"}
    states = [*(status.get("containerStatuses") or ())]
    states += [item for item in status.get("initContainerStatuses") or () if item["name"] in sidecars]
    ends = [((item.get("state") or {}).get("terminated") or {}).get("finishedAt") for item in states]
    if ends and all(ends):
        return max(clock.parse_rfc3339(end) for end in ends if end)
    ready = podutil.condition(pod, "Ready")
    if ready is not None and ready["status"] == "False" and ready.get("lastTransitionTime"):
        return clock.parse_rfc3339(ready["lastTransitionTime"])
    deleted = pod["metadata"].get("deletionTimestamp")
    if deleted:
        return clock.parse_rfc3339(deleted) - float(pod["metadata"].get("deletionGracePeriodSeconds") or 0)
    return podutil.created_at(pod)


@dataclass(frozen=True, slots=True)
class BackoffRecord:
    """Failures in a row and when the last one was."""

    failures: int = 0
    last: float = 0.0

    def after(self, succeeded: Sequence[Object], failed: Sequence[Object]) -> BackoffRecord:
        """The record with newly finished pods taken in."""
        if not succeeded and not failed:
            return self
        if not succeeded:
            return BackoffRecord(self.failures + len(failed), max(finished_at(pod) for pod in failed))
        last_success = max(finished_at(pod) for pod in succeeded)
        later = [end for pod in failed if (end := finished_at(pod)) > last_success]
        return BackoffRecord(len(later), max(later)) if later else BackoffRecord()

    def remaining_seconds(self) -> float:
        return remaining_seconds(self.failures, self.last)


def remaining_seconds(failures: int, last: float) -> float:
    """Seconds until the next pod may be made; 0 now."""
    if failures == 0:
        return 0.0
    backoff = min(_FIRST_BACKOFF_SECONDS * float(2 ** min(failures - 1, 30)), _LONGEST_BACKOFF_SECONDS)
    return max(0.0, last + backoff - clock.now())
