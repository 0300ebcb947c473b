"""One pass over one Job: count what ended, decide whether it is over, make or delete pods.

A pod that ended is first noted in the status as not yet counted, then loses its finalizer, then is
counted: whatever dies in between, it is counted once. Terminal conditions wait until no pod of the
Job is left running or terminating.
Longer than most modules: it is one algorithm whose steps share all of their state.
Source: pkg/controller/job/job_controller.go; KEP-2307, KEP-3939, KEP-4368.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import JOBS
from knarr.api.types import Object
from knarr.client.events import EventRecorder
from knarr.client.rest import Client
from knarr.controllers import podutil
from knarr.controllers.context import object_key
from knarr.controllers.job import policies
from knarr.controllers.job.indexes import INDEX, Indexes, completion_index
from knarr.controllers.job.policies import BackoffRecord
from knarr.controllers.job.tracking import FINALIZER, Tracking, has_finalizer

_MOST_UNCOUNTED = 500
_MOST_PER_SYNC = 500
_INDEX_ENV = "JOB_COMPLETION_INDEX"
_GENERATED_NAME_CHARACTERS = 58


def is_finished(job: Object) -> bool:
    return any(
        item["type"] in ("Complete", "Failed") and item["status"] == "True" for item in (job.get("status") or {}).get("conditions") or ()
    )


def is_indexed(job: Object) -> bool:
    return bool(job["spec"].get("completionMode") == "Indexed")


def is_suspended(job: Object) -> bool:
    return bool(job["spec"].get("suspend"))


def new_condition(type: str, reason: str, message: str, status: str = "True") -> Object:
    now = clock.now_rfc3339()
    return {"type": type, "status": status, "lastProbeTime": now, "lastTransitionTime": now, "reason": reason, "message": message}


class JobSync:
    """One pass. `requeue_after_seconds` is set when the Job has to be looked at again by time.

    Args:
      job: a copy of its own, changed in place.
      pods: the pods that belong to the Job.
    """

    def __init__(self, client: Client, recorder: EventRecorder, tracking: Tracking, job: Object, pods: list[Object]) -> None:
        self._client = client
        self._recorder = recorder
        self._control = podutil.PodControl(client, recorder)
        self._tracking = tracking
        self._key = object_key(job)
        self._job = job
        self._spec = job["spec"]
        self._status: Object = job.setdefault("status", {})
        self._pods = pods
        self._removing = tracking.removing(self._key)
        self._active = [pod for pod in pods if podutil.is_active(pod)]
        self._ready = sum(podutil.is_ready(pod) for pod in self._active)
        self._terminating = sum(podutil.is_deleting(pod) and not podutil.is_finished(pod) for pod in pods)
        uncounted = self._status.get("uncountedTerminatedPods") or {}
        self._uncounted = {name: list(uncounted.get(name) or ()) for name in ("succeeded", "failed")}
        self._had_uncounted = self._status.get("uncountedTerminatedPods") is not None
        self._finished: Object | None = None
        self._succeeded_indexes = self._earlier_indexes = Indexes()
        self._failed_indexes: Indexes | None = None
        self._delayed: dict[int, Object] = {}
        self._succeeded = self._failed = 0
        self._backoff = BackoffRecord()
        self.requeue_after_seconds: float | None = None

    @property
    def _completions(self) -> int | None:
        value = self._spec.get("completions")
        return None if value is None else int(value)

    @property
    def _per_index(self) -> bool:
        return self._spec.get("backoffLimitPerIndex") is not None

    def _again_after(self, seconds: float) -> None:
        current = self.requeue_after_seconds
        self.requeue_after_seconds = seconds if current is None else min(current, seconds)

    async def run(self) -> Exception | None:
        """Do the pass; gives a failure of pod creation or deletion, which the written status already tells of.

        Raises:
          StatusError: the status could not be written.
        """
        satisfied = self._tracking.expectations.satisfied(self._key)
        new_succeeded, new_failed = self._new_finished()
        self._succeeded = (self._status.get("succeeded") or 0) + len(new_succeeded) + len(self._uncounted["succeeded"])
        counted = [pod for pod in new_failed if policies.judge(self._job, pod).counts]
        self._failed = (self._status.get("failed") or 0) + len(counted) + len(self._uncounted["failed"])
        if self._status.get("startTime") is None and not is_suspended(self._job):
            self._status["startTime"] = clock.now_rfc3339()
        self._backoff = self._tracking.backoff(self._key).after(new_succeeded, new_failed)
        self._decide_end()
        if is_indexed(self._job):
            self._decide_end_by_indexes()
        active = len(self._active)
        changed = False
        failure: Exception | None
        if self._finished is not None:
            deleted, failure = await self._delete_active()
            if deleted != active or not satisfied:
                # Not all is stopped yet: the verdict comes again with the next pass.
                self._finished = None
            active -= deleted
        else:
            active, failure, changed = await self._work(satisfied, active)
        changed = changed or active != (self._status.get("active") or 0) or self._ready != self._status.get("ready")
        changed = changed or self._terminating != self._status.get("terminating")
        self._status.update(active=active, ready=self._ready, terminating=self._terminating)
        await self._track(changed)
        return failure

    def _new_finished(self) -> tuple[list[Object], list[Object]]:
        uncounted = set(self._uncounted["succeeded"]), set(self._uncounted["failed"])
        succeeded, failed = [], []
        for pod in self._tracked():
            uid = pod["metadata"]["uid"]
            if podutil.phase(pod) == "Succeeded" and uid not in uncounted[0]:
                succeeded.append(pod)
            elif policies.is_failed(pod, self._job) and uid not in uncounted[1]:
                failed.append(pod)
        return succeeded, failed

    def _tracked(self) -> list[Object]:
        """Pods that still have our finalizer and, if indexed, a valid index."""
        result = [pod for pod in self._pods if has_finalizer(pod) and pod["metadata"]["uid"] not in self._removing]
        if is_indexed(self._job):
            result = [pod for pod in result if self._valid_index(pod) is not None]
        return result

    def _valid_index(self, pod: Object) -> int | None:
        index = completion_index(pod)
        return index if index is not None and index < (self._completions or 0) else None

    # Is it over?

    def _decide_end(self) -> None:
        conditions = self._status.get("conditions") or []
        criteria = meta.get_condition(conditions, "SuccessCriteriaMet")
        if criteria is not None and criteria["status"] == "True":
            self._finished = criteria
            return
        target = meta.get_condition(conditions, "FailureTarget")
        if target is not None and target["status"] == "True":
            self._finished = new_condition("Failed", target.get("reason", ""), target.get("message", ""))
            return
        if self._spec.get("podFailurePolicy") is not None:
            for pod in self._pods:
                if policies.is_failed(pod, self._job) and (message := policies.judge(self._job, pod).message):
                    self._finished = new_condition("FailureTarget", "PodFailurePolicy", message)
                    return
        limit = self._spec.get("backoffLimit")
        if self._failed > (6 if limit is None else limit) or self._restarted_too_often():
            self._finished = new_condition("FailureTarget", "BackoffLimitExceeded", "Job has reached the specified backoff limit")
        elif self._spec.get("activeDeadlineSeconds") is not None and not is_suspended(self._job):
            left = clock.parse_rfc3339(self._status["startTime"]) + self._spec["activeDeadlineSeconds"] - clock.now()
            if left <= 0:
                self._finished = new_condition("FailureTarget", "DeadlineExceeded", "Job was active longer than specified deadline")
            else:
                self._again_after(left)

    def _restarted_too_often(self) -> bool:
        if (self._spec["template"].get("spec") or {}).get("restartPolicy") != "OnFailure":
            return False
        restarts = 0
        for pod in self._pods:
            if podutil.phase(pod) in ("Running", "Pending"):
                status = pod.get("status") or {}
                for item in [*(status.get("initContainerStatuses") or ()), *(status.get("containerStatuses") or ())]:
                    restarts += item.get("restartCount") or 0
        limit = self._spec.get("backoffLimit")
        limit = 6 if limit is None else limit
        return restarts > 0 if limit == 0 else restarts >= limit

    def _decide_end_by_indexes(self) -> None:
        completions = self._completions or 0
        self._earlier_indexes = Indexes.parse(self._status.get("completedIndexes") or "", completions)
        # Their removal may be on its way already, but until it is counted a success is only here.
        ended = [pod for pod in self._pods if podutil.phase(pod) == "Succeeded" and has_finalizer(pod)]
        self._succeeded_indexes = self._earlier_indexes | Indexes.of(i for pod in ended if (i := self._valid_index(pod)) is not None)
        self._succeeded = len(self._succeeded_indexes)
        if self._per_index:
            failed = [pod for pod in self._pods if has_finalizer(pod) and policies.is_index_failed(pod, self._job)]
            earlier = Indexes.parse(self._status.get("failedIndexes") or "", completions)
            self._failed_indexes = earlier | Indexes.of(i for pod in failed if (i := self._valid_index(pod)) is not None)
            self._decide_end_by_failed_indexes(self._failed_indexes, completions)
            self._find_delayed()
        if self._finished is None and (message := policies.success_message(self._job, self._succeeded_indexes)):
            self._finished = new_condition("SuccessCriteriaMet", "SuccessPolicy", message)

    def _decide_end_by_failed_indexes(self, failed: Indexes, completions: int) -> None:
        most = self._spec.get("maxFailedIndexes")
        if self._finished is not None:
            return
        if most is not None and len(failed) > most:
            message = "Job has exceeded the specified maximal number of failed indexes"
            self._finished = new_condition("FailureTarget", "MaxFailedIndexesExceeded", message)
        elif len(failed) and len(failed) + len(self._succeeded_indexes) >= completions:
            self._finished = new_condition("FailureTarget", "FailedIndexes", "Job has failed indexes")

    def _find_delayed(self) -> None:
        """Failed pods that must stay until their index has a new pod, because they carry its failure count."""
        active = {index for pod in self._active if (index := completion_index(pod)) is not None}
        for pod in self._tracked():
            index = self._valid_index(pod)
            if index is None or not policies.is_failed(pod, self._job) or index in active:
                continue
            if index in self._succeeded_indexes or (self._failed_indexes is not None and index in self._failed_indexes):
                continue
            known = self._delayed.get(index)
            if known is None or (
                policies.all_index_failures(known) <= policies.all_index_failures(pod)
                and policies.finished_at(pod) >= policies.finished_at(known)
            ):
                self._delayed[index] = pod

    # Pods

    async def _delete_active(self) -> tuple[int, Exception | None]:
        results = await self._each(self._active, lambda pod: self._control.delete(pod["metadata"]["name"], pod["metadata"]["namespace"], self._job))
        deleted = 0
        failure: Exception | None = None
        for pod, error in zip(self._active, results, strict=True):
            if error is not None and not errors.is_not_found(error):
                failure = failure or error
                continue
            deleted += 1
            self._ready -= podutil.is_ready(pod)
        self._terminating += deleted
        return deleted, failure

    async def _each(self, pods: list[Object], act: Callable[[Object], Awaitable[None]]) -> list[Exception | None]:
        results: list[Exception | None] = [None] * len(pods)

        async def one(position: int, pod: Object) -> None:
            try:
                await act(pod)
            except Exception as error:
                results[position] = error

        await podutil.gather_all([one(position, pod) for position, pod in enumerate(pods)])
        return results

    async def _work(self, satisfied: bool, active: int) -> tuple[int, Exception | None, bool]:
        """Go on with the Job; gives (active pods then, failure, whether conditions changed)."""
        failure: Exception | None = None
        worked = satisfied and not podutil.is_deleting(self._job)
        if worked:
            active, failure = await self._manage(active)
        completions = self._completions
        complete = (self._succeeded > 0 if completions is None else self._succeeded >= completions) and active == 0
        if complete:
            self._finished = new_condition("SuccessCriteriaMet", "CompletionsReached", "Reached expected number of succeeded pods")
            return active, failure, False
        return active, failure, worked and self._note_suspension()

    def _note_suspension(self) -> bool:
        suspended = is_suspended(self._job)
        status, reason, message = ("True", "JobSuspended", "Job suspended") if suspended else ("False", "JobResumed", "Job resumed")
        conditions = self._status.setdefault("conditions", [])
        current = meta.get_condition(conditions, "Suspended")
        if current is None and not suspended:
            return False
        if current is not None and (current["status"], current.get("reason"), current.get("message")) == (status, reason, message):
            return False
        condition = new_condition("Suspended", reason, message, status)
        if current is None:
            conditions.append(condition)
        else:
            current.update(condition)
        self._recorder.event(self._job, "Normal", "Suspended" if suspended else "Resumed", message)
        if not suspended:
            self._status["startTime"] = clock.now_rfc3339()
        return True

    async def _manage(self, active: int) -> tuple[int, Exception | None]:
        parallelism = self._spec.get("parallelism")
        parallelism = 1 if parallelism is None else int(parallelism)
        if is_suspended(self._job):
            return await self._remove(self._for_removal(active), active)
        completions = self._completions
        if completions is None:
            wanted = active if self._succeeded > 0 else parallelism
        else:
            wanted = max(0, min(completions - self._succeeded, parallelism))
        surplus = self._for_removal(max(0, active - wanted))[:_MOST_PER_SYNC]
        if surplus:
            return await self._remove(surplus, active)
        terminating = self._terminating if policies.only_replaces_failed(self._job) else 0
        missing = wanted - terminating - active
        if missing <= 0:
            return active, None
        return await self._add(min(missing, _MOST_PER_SYNC), active)

    def _for_removal(self, count: int) -> list[Object]:
        pods = self._active
        removed: list[Object] = []
        if is_indexed(self._job):
            removed, pods = self._duplicates(pods)
        if len(removed) < count:
            removed += podutil.sort_for_deletion(pods, ())[: count - len(removed)]
        return removed

    def _duplicates(self, pods: list[Object]) -> tuple[list[Object], list[Object]]:
        """(pods without a valid index or beside another of their index, the rest)."""
        by_index: dict[int, list[Object]] = {}
        removed: list[Object] = []
        for pod in pods:
            index = self._valid_index(pod)
            if index is None:
                removed.append(pod)
            else:
                by_index.setdefault(index, []).append(pod)
        left = []
        for index in sorted(by_index):
            *surplus, last = podutil.sort_for_deletion(by_index[index], ())
            removed += surplus
            left.append(last)
        return removed, left

    async def _remove(self, pods: list[Object], active: int) -> tuple[int, Exception | None]:
        if not pods:
            return active, None
        self._tracking.expectations.expect(self._key, 0, {object_key(pod) for pod in pods})

        async def remove(pod: Object) -> None:
            try:
                await self._tracking.release(pod)
                await self._control.delete(pod["metadata"]["name"], pod["metadata"]["namespace"], self._job)
            except Exception:
                self._tracking.expectations.deleted(self._key, object_key(pod))
                raise

        failure: Exception | None = None
        for pod, error in zip(pods, await self._each(pods, remove), strict=True):
            if error is not None and not errors.is_not_found(error):
                failure = failure or error
                continue
            active -= 1
            self._terminating += 1
            self._ready -= podutil.is_ready(pod)
        return active, failure

    async def _add(self, count: int, active: int) -> tuple[int, Exception | None]:
        if not self._per_index and (wait := self._backoff.remaining_seconds()) > 0:
            self._again_after(wait)
            # Zero although some may run: a pass that waits reports no active pods, as upstream's does.
            return 0, None
        indexes: list[int] | None = None
        if is_indexed(self._job):
            indexes = self._pending_indexes(count)
            if self._per_index:
                waits = {index: self._index_wait(index) for index in indexes}
                indexes = [index for index in indexes if waits[index] <= 0]
                if not indexes:
                    if waits:
                        self._again_after(min(waits.values()))
                        return 0, None
                    return active, None
            count = len(indexes)
        self._tracking.expectations.expect(self._key, count)

        async def create(position: int) -> None:
            try:
                pod = self._new_pod(indexes[position] if indexes is not None else None)
                await self._control.create(pod, self._job["metadata"]["namespace"], self._job)
            except StatusError as error:
                if not errors.is_namespace_terminating(error):
                    raise

        successes, failure = await podutil.slow_start(count, create)
        for _ in range(count - successes):
            self._tracking.expectations.created(self._key)
        return active + successes, failure

    def _pending_indexes(self, count: int) -> list[int]:
        taken = {index for pod in self._active if (index := completion_index(pod)) is not None}
        if policies.only_replaces_failed(self._job):
            ending = [pod for pod in self._pods if podutil.is_deleting(pod) and not podutil.is_finished(pod)]
            taken |= {index for pod in ending if (index := completion_index(pod)) is not None}
        busy = self._succeeded_indexes | Indexes.of(taken)
        if self._failed_indexes is not None:
            busy |= self._failed_indexes
        return busy.first_missing(count, self._completions or 0)

    def _index_wait(self, index: int) -> float:
        pod = self._delayed.get(index)
        return 0.0 if pod is None else policies.remaining_seconds(policies.all_index_failures(pod) + 1, policies.finished_at(pod))

    def _new_pod(self, index: int | None) -> Object:
        reference = meta.new_controller_ref(self._job, "batch/v1", "Job")
        pod = podutil.pod_from_template(self._spec["template"], self._job, reference)
        pod_meta = pod["metadata"]
        meta.add_finalizer(pod, FINALIZER)
        if index is None:
            return pod
        for container in [*(pod["spec"].get("initContainers") or ()), *(pod["spec"].get("containers") or ())]:
            env = container.setdefault("env", [])
            if not any(item["name"] == _INDEX_ENV for item in env):
                env.append({"name": _INDEX_ENV, "valueFrom": {"fieldRef": {"fieldPath": f"metadata.labels['{INDEX}']"}}})
        name = self._job["metadata"]["name"]
        suffix = f"-{index}-"
        prefix = name + suffix
        pod_meta["generateName"] = prefix if len(prefix) <= _GENERATED_NAME_CHARACTERS else name[: _GENERATED_NAME_CHARACTERS - len(suffix)] + suffix
        meta.set_annotation(pod, INDEX, str(index))
        meta.set_label(pod, INDEX, str(index))
        pod["spec"]["hostname"] = f"{name}-{index}"
        if self._per_index:
            for annotation, value in policies.next_failure_annotations(self._job, self._delayed.get(index)).items():
                meta.set_annotation(pod, annotation, value)
        return pod

    # Counting

    async def _track(self, changed: bool) -> None:
        with_finalizer = {
            pod["metadata"]["uid"] for pod in self._pods if has_finalizer(pod) and pod["metadata"]["uid"] not in self._removing
        }
        changed = self._count_released(with_finalizer) or changed
        release, noted, full = self._note_ended()
        changed = changed or noted
        if is_indexed(self._job):
            changed = self._note_indexes() or changed
        changed = self._note_end() or changed
        if changed:
            await self._write()
            self._tracking.set_backoff(self._key, self._backoff)
            changed = False
        failure = await self._release(release, with_finalizer)
        changed = self._count_released(with_finalizer)
        if failure is not None:
            if changed:
                await self._write()
            raise failure
        ended = not full and self._enact_end()
        if changed or ended:
            await self._write()
        if ended:
            self._record_end()

    def _count_released(self, with_finalizer: set[str]) -> bool:
        """Count the noted pods whose finalizer is gone; says whether there were any."""
        changed = False
        for name, counter in (("succeeded", "succeeded"), ("failed", "failed")):
            left = [uid for uid in self._uncounted[name] if uid in with_finalizer]
            done = len(self._uncounted[name]) - len(left)
            if done:
                self._status[counter] = (self._status.get(counter) or 0) + done
                self._uncounted[name] = left
                changed = True
        return changed

    def _note_ended(self) -> tuple[list[Object], bool, bool]:
        """(pods to release, whether something was noted, whether the limit of notes was reached)."""
        release: list[Object] = []
        noted = False
        indexed = is_indexed(self._job)
        new_indexes: list[int] = []
        succeeded, failed = set(self._uncounted["succeeded"]), set(self._uncounted["failed"])
        pods = sorted(self._pods, key=lambda pod: completion_index(pod) or 0) if indexed else self._pods
        for pod in pods:
            uid = pod["metadata"]["uid"]
            if not has_finalizer(pod) or uid in self._removing:
                continue
            is_failed = policies.is_failed(pod, self._job)
            if not self._may_release(pod, is_failed):
                continue
            release.append(pod)
            index = self._valid_index(pod)
            if podutil.phase(pod) == "Succeeded" and uid not in failed:
                if indexed:
                    if index is not None and index not in self._earlier_indexes:
                        new_indexes.append(index)
                        noted = True
                elif uid not in succeeded:
                    self._uncounted["succeeded"].append(uid)
                    noted = True
            elif (is_failed or self._is_failing()) and uid not in failed and (not indexed or index is not None):
                if policies.judge(self._job, pod).counts:
                    self._uncounted["failed"].append(uid)
                    noted = True
            if len(new_indexes) + len(self._uncounted["succeeded"]) + len(self._uncounted["failed"]) >= _MOST_UNCOUNTED:
                return release, noted, True
        return release, noted, False

    def _is_failing(self) -> bool:
        return self._finished is not None and self._finished["type"] != "SuccessCriteriaMet"

    def _may_release(self, pod: Object, is_failed: bool) -> bool:
        if podutil.is_deleting(self._job) or self._finished is not None or podutil.phase(pod) == "Succeeded":
            return True
        if not is_failed:
            return False
        if self._per_index and (index := completion_index(pod)) is not None:
            delayed = self._delayed.get(index)
            return delayed is None or delayed["metadata"]["uid"] != pod["metadata"]["uid"]
        return True

    def _note_indexes(self) -> bool:
        text = str(self._succeeded_indexes)
        changed = text != (self._status.get("completedIndexes") or "")
        self._status["succeeded"] = len(self._succeeded_indexes)
        self._status["completedIndexes"] = text
        failed = None if self._failed_indexes is None else str(self._failed_indexes)
        if failed != self._status.get("failedIndexes"):
            changed = True
            if failed is None:
                self._status.pop("failedIndexes", None)
            else:
                self._status["failedIndexes"] = failed
        return changed

    def _note_end(self) -> bool:
        """Write down what the end will be; the terminal condition itself comes when all pods are gone."""
        if self._finished is None:
            return False
        type, reason, message = self._finished["type"], self._finished.get("reason", ""), self._finished.get("message", "")
        conditions = self._status.setdefault("conditions", [])
        noted = False
        if type == "FailureTarget":
            conditions.append(self._finished)
            noted = True
            self._finished = new_condition("Failed", reason, message)
        elif type == "SuccessCriteriaMet":
            if not meta.is_condition_true(conditions, "SuccessCriteriaMet"):
                conditions.append(self._finished)
                noted = True
            self._finished = new_condition("Complete", reason, message)
        return noted

    async def _release(self, pods: list[Object], with_finalizer: set[str]) -> Exception | None:
        if not pods:
            return None
        self._tracking.expect_removal(self._key, {pod["metadata"]["uid"] for pod in pods})
        failure: Exception | None = None
        for pod, error in zip(pods, await self._each(pods, self._tracking.release), strict=True):
            uid = pod["metadata"]["uid"]
            if error is not None:
                self._tracking.removed(self._key, uid)
                if not errors.is_not_found(error):
                    failure = failure or error
                    continue
            with_finalizer.discard(uid)
        return failure

    def _enact_end(self) -> bool:
        if self._finished is None or self._uncounted["succeeded"] or self._uncounted["failed"] or self._terminating > 0:
            return False
        conditions = self._status.setdefault("conditions", [])
        current = meta.get_condition(conditions, self._finished["type"])
        if current is None:
            conditions.append(self._finished)
        else:
            current.update(self._finished)
        if self._finished["type"] == "Complete":
            self._status["completionTime"] = self._finished["lastTransitionTime"]
        return True

    def _record_end(self) -> None:
        assert self._finished is not None
        self._tracking.finished.add(self._job["metadata"]["uid"])
        if self._finished["type"] != "Complete":
            self._recorder.event(self._job, "Warning", self._finished["reason"], self._finished["message"])
            return
        if self._completions is not None and (self._status.get("succeeded") or 0) > self._completions:
            message = "Too many succeeded pods running after completion count reached"
            self._recorder.event(self._job, "Warning", "TooManySucceededPods", message)
        self._recorder.event(self._job, "Normal", "Completed", "Job completed")

    async def _write(self) -> None:
        status = {name: value for name, value in self._status.items() if value not in (0, "", []) or name in ("ready", "terminating", "failedIndexes")}
        status["uncountedTerminatedPods"] = {name: uids for name, uids in self._uncounted.items() if uids}
        written = await self._client.update(JOBS, {**self._job, "status": status}, subresource="status")
        self._job["metadata"]["resourceVersion"] = written["metadata"]["resourceVersion"]


