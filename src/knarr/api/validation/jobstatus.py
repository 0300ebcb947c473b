"""Rules for the status of a Job: what a controller, ours or another one (managedBy), may write.

Called by batch.py for updates of the status subresource. Rules about a field hold only for writes that change it, so that a
status which is wrong already does not keep others from being written.

Source: pkg/registry/batch/job/strategy.go getStatusValidationOptions, pkg/apis/batch/validation validateJobStatus.
"""

from __future__ import annotations

from knarr.api import times
from knarr.api.errors import OMIT_VALUE, duplicate, go_quote, invalid_value, required
from knarr.api.types import Object
from knarr.api.validation.metadata import Errors, nonnegative

_CONDITIONS = "status.conditions"
_FINAL = ("Complete", "Failed")


def condition_true(job: Object, kind: str) -> bool:
    """Whether the Job has the condition with status True."""
    return any(c.get("type") == kind and c.get("status") == "True" for c in (job.get("status") or {}).get("conditions") or ())


def _interval(text: str, completions: int) -> tuple[int, int]:
    limits = text.split("-")
    if len(limits) > 2:
        raise ValueError(f"the fragment {go_quote(text)} violates the requirement that an index interval can have at most two parts separated by '-'")
    ends: list[int] = []
    for limit in limits:
        try:
            ends.append(int(limit))
        except ValueError:
            raise ValueError(f"cannot convert string to integer for index: {go_quote(limit)}") from None
        if ends[-1] >= completions:
            raise ValueError(f"too large index: {go_quote(limit)}")
    if len(ends) == 2 and ends[0] >= ends[1]:
        raise ValueError(f"non-increasing order, previous: {ends[0]}, current: {ends[1]}")
    return ends[0], ends[-1]


def intervals(text: str, completions: int) -> int:
    """How many indexes "1,3-5" names.

    Raises:
      ValueError: not ascending intervals below completions; the message is upstream's.
    """
    total, last = 0, -1
    for part in text.split(","):
        first, end = _interval(part, completions)
        if last >= first:
            raise ValueError(f"non-increasing order, previous: {last}, current: {first}")
        last = end
        total += end - first + 1
    return total


def _overlap(completed: str, failed: str, completions: int) -> int | None:
    """The first index that both name, None if there is none; what cannot be read is left to the rules of the format."""
    def readable(text: str) -> list[tuple[int, int]]:
        found = []
        for part in text.split(",") if text else ():
            try:
                found.append(_interval(part, completions))
            except ValueError:
                continue
        return found

    ours, theirs = readable(completed), readable(failed)
    i = j = 0
    while i < len(ours) and j < len(theirs):
        if ours[i][0] <= theirs[j][1] and theirs[j][0] <= ours[i][1]:
            return max(ours[i][0], theirs[j][0])
        if ours[i][0] <= theirs[j][0]:
            i += 1
        else:
            j += 1
    return None


class _Change:
    """What an update of the status changes."""

    def __init__(self, new: Object, old: Object) -> None:
        self._new, self._old = new, old
        self._status, self._before = new.get("status") or {}, old.get("status") or {}
        self.finished = any(condition_true(old, kind) for kind in _FINAL) != any(condition_true(new, kind) for kind in _FINAL)

    def true(self, kind: str) -> bool:
        return condition_true(self._old, kind) != condition_true(self._new, kind)

    def field(self, *names: str) -> bool:
        return any((self._status.get(name) or None) != (self._before.get(name) or None) for name in names)


def update_job_status(new: Object, old: Object, errors: Errors) -> None:
    """Check an update of status."""
    status = new.get("status") or {}
    change = _Change(new, old)
    for key in ("active", "succeeded", "failed", "ready", "terminating"):
        nonnegative(errors, f"status.{key}", status.get(key))
    _uncounted(status, errors)
    _times_and_ends(new, change, errors)
    _finished(new, change, errors)
    _indexes(new, change, errors)
    _success_criteria(new, change, errors)
    _transitions(new, old, change, errors)


def _condition(errors: Errors, text: str) -> None:
    errors.append(invalid_value(_CONDITIONS, OMIT_VALUE, text))


def _uncounted(status: Object, errors: Errors) -> None:
    seen: set[str] = set()
    for key in ("succeeded", "failed"):
        for index, uid in enumerate((status.get("uncountedTerminatedPods") or {}).get(key) or ()):
            path = f"status.uncountedTerminatedPods.{key}[{index}]"
            if not uid:
                errors.append(invalid_value(path, uid, "must not be empty"))
            elif uid in seen:
                errors.append(duplicate(path, uid))
            seen.add(uid)


def _times_and_ends(new: Object, change: _Change, errors: Errors) -> None:
    status = new.get("status") or {}
    complete, failed = condition_true(new, "Complete"), condition_true(new, "Failed")
    start, end = status.get("startTime"), status.get("completionTime")
    if complete and failed and (change.true("Complete") or change.true("Failed")):
        _condition(errors, "cannot set Complete=True and Failed=true conditions")
    if complete and condition_true(new, "FailureTarget") and (change.true("Complete") or change.true("FailureTarget")):
        _condition(errors, "cannot set Complete=True and FailureTarget=true conditions")
    if change.true("Complete") or change.field("completionTime"):
        if end is not None and not complete:
            errors.append(invalid_value("status.completionTime", end, "cannot set completionTime when there is no Complete=True condition"))
        if end is None and complete:
            errors.append(required("status.completionTime", "completionTime is required for Complete jobs"))
    if start is not None and end is not None and change.field("startTime", "completionTime") and times.to_epoch(end) < times.to_epoch(start):
        errors.append(invalid_value("status.completionTime", end, "must be equal to or after `startTime`"))
    if failed and not condition_true(new, "FailureTarget") and (change.true("Failed") or change.field("failedIndexes")):
        _condition(errors, "cannot set Failed=True condition without the FailureTarget=true condition")
    if complete and not condition_true(new, "SuccessCriteriaMet") and (change.true("Complete") or change.true("SuccessCriteriaMet")):
        _condition(errors, "cannot set Complete=True condition without the SuccessCriteriaMet=true condition")


def _finished(new: Object, change: _Change, errors: Errors) -> None:
    if not any(condition_true(new, kind) for kind in _FINAL):
        return
    spec, status = new.get("spec") or {}, new.get("status") or {}
    if (status.get("active") or 0) > 0 and (change.finished or change.field("active")):
        errors.append(invalid_value("status.active", status["active"], "active>0 is invalid for finished job"))
    nothing_to_do = bool(spec.get("suspend")) and spec.get("completions") == 0
    if status.get("startTime") is None and (change.finished or change.field("startTime")) and not nothing_to_do:
        errors.append(required("status.startTime", "startTime is required for finished job"))
    uncounted = status.get("uncountedTerminatedPods") or {}
    if (uncounted.get("failed") or uncounted.get("succeeded")) and (change.finished or change.field("uncountedTerminatedPods")):
        errors.append(invalid_value("status.uncountedTerminatedPods", uncounted, "must be empty for finished job"))


def _indexes(new: Object, change: _Change, errors: Errors) -> None:
    spec, status = new.get("spec") or {}, new.get("status") or {}
    completed, failed = status.get("completedIndexes") or "", status.get("failedIndexes")
    completions, per_index = spec.get("completions"), spec.get("backoffLimitPerIndex")
    for key, text, wanted in (("completedIndexes", completed, True), ("failedIndexes", failed, per_index is not None)):
        if text and completions is not None and wanted and change.field(key):
            try:
                intervals(text, completions)
            except ValueError as error:
                errors.append(invalid_value(f"status.{key}", text, f"error parsing {key}: {error}"))
    if completed and spec.get("completionMode") != "Indexed" and change.field("completedIndexes"):
        errors.append(invalid_value("status.completedIndexes", completed, "cannot set non-empty completedIndexes when non-indexed completion mode"))
    if failed is not None and per_index is None and change.field("failedIndexes"):
        errors.append(invalid_value("status.failedIndexes", failed, "cannot set non-null failedIndexes when backoffLimitPerIndex is null"))
    if failed and completions is not None and change.field("failedIndexes", "completedIndexes"):
        both = _overlap(completed, failed, completions)
        if both is not None:
            errors.append(invalid_value("status.failedIndexes", failed, f"failedIndexes and completedIndexes overlap at index: {both}"))


def _success_criteria(new: Object, change: _Change, errors: Errors) -> None:
    status = new.get("status") or {}
    met = condition_true(new, "SuccessCriteriaMet")
    finished = any(condition_true(new, kind) for kind in _FINAL)
    if (status.get("terminating") or 0) > 0 and finished and (change.finished or change.field("terminating")):
        errors.append(invalid_value("status.terminating", status["terminating"], "terminating>0 is invalid for finished job"))
    if status.get("ready") is not None and status["ready"] > (status.get("active") or 0) and change.field("ready", "active"):
        errors.append(invalid_value("status.ready", status["ready"], "cannot set more ready pods than active"))
    if met and condition_true(new, "Failed"):
        _condition(errors, "cannot set SuccessCriteriaMet=True and Failed=true conditions")
    if met and condition_true(new, "FailureTarget"):
        _condition(errors, "cannot set SuccessCriteriaMet=True and FailureTarget=true conditions")
    if (new.get("spec") or {}).get("successPolicy") is not None and not met and condition_true(new, "Complete"):
        _condition(errors, "cannot set Complete=True for Job with SuccessPolicy unless SuccessCriteriaMet=True")


def _transitions(new: Object, old: Object, change: _Change, errors: Errors) -> None:
    spec, status, before = new.get("spec") or {}, new.get("status") or {}, old.get("status") or {}
    for kind in ("Failed", "Complete", "FailureTarget"):
        if condition_true(old, kind) and not condition_true(new, kind):
            _condition(errors, f"cannot disable the terminal {kind}=True condition")
    # Succeeded may go down where an indexed Job can be scaled down.
    scalable = spec.get("completionMode") == "Indexed" and spec.get("completions") == spec.get("parallelism")
    for key in ("failed", "succeeded"):
        if (status.get(key) or 0) < (before.get(key) or 0) and not (key == "succeeded" and scalable):
            errors.append(invalid_value(f"status.{key}", status.get(key) or 0, f"cannot decrease the {key} counter"))
    end, was = status.get("completionTime"), before.get("completionTime")
    if end is not None and was is not None and end != was:
        errors.append(invalid_value("status.completionTime", end, "field is immutable"))
    if before.get("startTime") is not None and change.field("startTime") and not spec.get("suspend"):
        errors.append(required("status.startTime", "startTime cannot be removed for unsuspended job"))
    met, was_met = condition_true(new, "SuccessCriteriaMet"), condition_true(old, "SuccessCriteriaMet")
    if was_met and not met:
        _condition(errors, "cannot disable the SuccessCriteriaMet=True condition")
    if condition_true(old, "Complete") and not was_met and met:
        _condition(errors, "cannot set SuccessCriteriaMet=True for Job already has Complete=true conditions")
