"""The CronJob controller: starts Jobs when they are due, clears old ones, keeps the list of active ones.

Source: pkg/controller/cronjob/cronjob_controllerv2.go, utils.go.
"""

from __future__ import annotations

from datetime import UTC, datetime, tzinfo

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError, go_quote
from knarr.api.resources import CRON_JOBS, JOBS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers.context import Context, object_key
from knarr.controllers.cronjob.schedule import Schedule, ScheduleError, load_zone, parse
from knarr.controllers.podutil import is_deleting

_SCHEDULED = "batch.kubernetes.io/cronjob-scheduled-timestamp"
# The clock of whoever wrote the last status may be a little ahead of ours.
_DELTA_SECONDS = 0.1
_MANY = 100


class CronJobController:
    """Runs all CronJobs."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._crons = ctx.informer(CRON_JOBS)
        self._jobs = ctx.informer(JOBS)
        self._jobs.add_index("controller", _owner_uid)
        self._recorder = ctx.recorder("cronjob-controller")
        self.controller = Controller("cronjob-controller", self._reconcile, workers=5)
        self._crons.add_handler(self._changed, lambda old, new: self._changed(new), self._changed)
        self._jobs.add_handler(self._job_changed, lambda old, new: self._job_changed(new), self._job_changed)

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, cron: Object) -> None:
        self.controller.queue.add(object_key(cron))

    def _job_changed(self, job: Object) -> None:
        reference = meta.controller_of(job)
        if reference is None or reference["kind"] != "CronJob":
            return
        owner = self._crons.get(job["metadata"]["namespace"], reference["name"])
        if owner is not None and owner["metadata"]["uid"] == reference["uid"]:
            self._changed(owner)

    def _warn(self, cron: Object, reason: str, message: str) -> None:
        self._recorder.event(cron, "Warning", reason, message)

    def _note(self, cron: Object, reason: str, message: str) -> None:
        self._recorder.event(cron, "Normal", reason, message)

    async def _reconcile(self, key: str) -> Result | None:
        cached = self._crons.get_key(key)
        if cached is None:
            return None
        cron = meta.deep_copy(cached)
        jobs = self._jobs.by_index("controller", cron["metadata"]["uid"])
        before = meta.deep_copy(cron.get("status") or {})
        try:
            await self._sync_active(cron, jobs)
            delay = None if is_deleting(cron) else await self._start_due(cron)
            await self._clear(cron, jobs)
        finally:
            await self._write_status(cron, before)
        return Result(delay) if delay is not None else None

    async def _write_status(self, cron: Object, before: Object) -> None:
        status = {name: value for name, value in (cron.get("status") or {}).items() if value}
        if status == {name: value for name, value in before.items() if value}:
            return
        await self._client.update(CRON_JOBS, {**cron, "status": status}, subresource="status")

    # The list of active Jobs

    async def _sync_active(self, cron: Object, jobs: list[Object]) -> None:
        status = cron.setdefault("status", {})
        for job in jobs:
            finished = _finished_condition(job)
            if finished is None:
                if not _is_active(status, job["metadata"]["uid"]):
                    await self._unexpected(cron, job)
                continue
            if _is_active(status, job["metadata"]["uid"]):
                _drop_active(status, job["metadata"]["uid"])
                self._note(cron, "SawCompletedJob", f"Saw completed job: {job['metadata']['name']}, condition: {finished}")
            completed = (job.get("status") or {}).get("completionTime")
            if finished == "Complete" and completed and completed > (status.get("lastSuccessfulTime") or ""):
                status["lastSuccessfulTime"] = completed
        known = {job["metadata"]["uid"] for job in jobs}
        for reference in list(status.get("active") or ()):
            if reference["uid"] not in known and not await self._exists(reference):
                self._note(cron, "MissingJob", f"Active job went missing: {reference['name']}")
                _drop_active(status, reference["uid"])

    async def _unexpected(self, cron: Object, job: Object) -> None:
        # The cached list may simply be older than the Job.
        fresh = await self._client.get(CRON_JOBS, cron["metadata"]["name"], cron["metadata"]["namespace"])
        if _is_active(fresh.get("status") or {}, job["metadata"]["uid"]):
            cron.clear()
            cron.update(fresh)
            return
        name = job["metadata"]["name"]
        self._warn(cron, "UnexpectedJob", f"Saw a job that the controller did not create or forgot: {name}")

    async def _exists(self, reference: Object) -> bool:
        try:
            await self._client.get(JOBS, reference["name"], reference["namespace"])
        except StatusError as error:
            if errors.is_not_found(error):
                return False
            raise
        return True

    # Starting

    def _schedule(self, cron: Object) -> tuple[Schedule, tzinfo] | None:
        spec = cron["spec"]
        name = spec.get("timeZone")
        try:
            zone = load_zone(name) if name is not None else UTC
        except ScheduleError as error:
            self._warn(cron, "UnknownTimeZone", f"invalid timeZone: {go_quote(name)}: {error}")
            return None
        if spec.get("suspend"):
            return None
        try:
            if "TZ" in spec["schedule"]:
                message = (
                    f"CRON_TZ or TZ used in schedule {go_quote(spec['schedule'])} is not officially supported, see "
                    "https://kubernetes.io/docs/concepts/workloads/controllers/cron-jobs/ for more details"
                )
                self._warn(cron, "UnsupportedSchedule", message)
            return parse(spec["schedule"], zone), zone
        except ScheduleError as error:
            self._warn(cron, "UnparseableSchedule", f"unparseable schedule: {go_quote(spec['schedule'])} : {error}")
            return None

    async def _start_due(self, cron: Object) -> float | None:
        """Start the Job that is due, if any; gives the seconds until the next one is."""
        found = self._schedule(cron)
        if found is None:
            return None
        schedule, zone = found
        now = clock.now()
        due, missed = _most_recent(cron, now, schedule, with_deadline=True)
        if due is not None and missed > _MANY:
            message = "too many missed start times. Set or decrease .spec.startingDeadlineSeconds or check clock skew"
            self._warn(cron, "TooManyMissedTimes", message)
        if due is not None and not await self._start(cron, due, zone, now):
            return None
        return _next_delay(cron, now, schedule)

    async def _start(self, cron: Object, due: float, zone: tzinfo, now: float) -> bool:
        """Start the Job of one time; False when there is nothing more to wait for."""
        spec, status = cron["spec"], cron.setdefault("status", {})
        deadline = spec.get("startingDeadlineSeconds")
        if deadline is not None and due + deadline < now:
            text = datetime.fromtimestamp(due, UTC).strftime("%a, %d %b %Y %H:%M:%S +0000")
            self._warn(cron, "MissSchedule", f"Missed scheduled time to start a job: {text}")
            return True
        name = f"{cron['metadata']['name']}-{int(due) // 60}"
        stamp = clock.rfc3339(due)
        if any(ref["name"] == name for ref in status.get("active") or ()) or status.get("lastScheduleTime") == stamp:
            return True
        policy = spec.get("concurrencyPolicy") or "Allow"
        if policy == "Forbid" and status.get("active"):
            message = "Not starting job because prior execution is running and concurrency policy is Forbid"
            self._note(cron, "JobAlreadyActive", message)
            return True
        if policy == "Replace":
            await self._replace_active(cron)
        job = await self._create(cron, name, due, zone)
        if job is None:
            return False
        reference = {
            "kind": "Job",
            "namespace": job["metadata"]["namespace"],
            "name": name,
            "uid": job["metadata"]["uid"],
            "apiVersion": "batch/v1",
            "resourceVersion": job["metadata"]["resourceVersion"],
        }
        status["active"] = [*(status.get("active") or ()), reference]
        status["lastScheduleTime"] = stamp
        return True

    async def _replace_active(self, cron: Object) -> None:
        for reference in list(cron["status"].get("active") or ()):
            if not await self._delete(cron, reference["name"], reference["uid"]):
                raise RuntimeError(f"could not replace job {reference['namespace']}/{reference['name']}")

    async def _create(self, cron: Object, name: str, due: float, zone: tzinfo) -> Object | None:
        template = cron["spec"]["jobTemplate"]
        template_meta = template.get("metadata") or {}
        local = datetime.fromtimestamp(due, UTC).astimezone(zone)
        stamp = local.strftime("%Y-%m-%dT%H:%M:%S") + ("Z" if not local.utcoffset() else local.isoformat()[19:])
        job: Object = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {
                "name": name,
                "namespace": cron["metadata"]["namespace"],
                "labels": dict(template_meta.get("labels") or {}),
                "annotations": {**(template_meta.get("annotations") or {}), _SCHEDULED: stamp},
                "ownerReferences": [meta.new_controller_ref(cron, "batch/v1", "CronJob")],
            },
            "spec": meta.deep_copy(template.get("spec") or {}),
        }
        try:
            created = await self._client.create(JOBS, job)
        except StatusError as error:
            if errors.is_already_exists(error):
                existing = await self._client.get(JOBS, name, cron["metadata"]["namespace"])
                uid = existing["metadata"]["uid"]
                ours = meta.is_controlled_by(existing, cron) and not _is_active(cron["status"], uid)
                return existing if ours else None
            if not errors.is_namespace_terminating(error):
                self._warn(cron, "FailedCreate", f"Error creating job: {error.message}")
            raise
        self._note(cron, "SuccessfulCreate", f"Created job {name}")
        return created

    # Clearing

    async def _clear(self, cron: Object, jobs: list[Object]) -> None:
        spec = cron["spec"]
        for type, name in (("Complete", "successfulJobsHistoryLimit"), ("Failed", "failedJobsHistoryLimit")):
            limit = spec.get(name)
            if limit is None:
                continue
            finished = [job for job in jobs if _finished_condition(job) == type and not is_deleting(job)]
            finished.sort(key=lambda job: ((job.get("status") or {}).get("startTime") or "9", job["metadata"]["name"]))
            for job in finished[: max(0, len(finished) - int(limit))]:
                await self._delete(cron, job["metadata"]["name"], job["metadata"]["uid"])

    async def _delete(self, cron: Object, name: str, uid: str) -> bool:
        try:
            await self._client.delete(JOBS, name, cron["metadata"]["namespace"], propagation_policy="Background")
        except StatusError as error:
            if not errors.is_not_found(error):
                self._warn(cron, "FailedDelete", f"Deleted job: {error.message}")
                return False
        _drop_active(cron["status"], uid)
        self._note(cron, "SuccessfulDelete", f"Deleted job {name}")
        return True


def _owner_uid(obj: Object) -> list[str]:
    reference = meta.controller_of(obj)
    return [reference["uid"]] if reference is not None else []


def _finished_condition(job: Object) -> str | None:
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            return str(condition["type"])
    return None


def _is_active(status: Object, uid: str) -> bool:
    return any(reference["uid"] == uid for reference in status.get("active") or ())


def _drop_active(status: Object, uid: str) -> None:
    status["active"] = [reference for reference in status.get("active") or () if reference["uid"] != uid]


def _earliest(cron: Object, now: float, with_deadline: bool) -> float:
    last = (cron.get("status") or {}).get("lastScheduleTime") or cron["metadata"]["creationTimestamp"]
    earliest = clock.parse_rfc3339(last)
    deadline = cron["spec"].get("startingDeadlineSeconds")
    if with_deadline and deadline is not None:
        earliest = max(earliest, now - deadline)
    return earliest


def _most_recent(cron: Object, now: float, schedule: Schedule, *, with_deadline: bool) -> tuple[float | None, int]:
    """(latest time that is due and not yet acted on, number of such times)."""
    first = schedule.next(_earliest(cron, now, with_deadline))
    if first is None or now < first:
        return None, 0
    second = schedule.next(first)
    if second is None or now < second:
        return first, 1
    period = max(1, round(second - first))
    missed = int(now - first) // period + 1
    # Jump close to now instead of walking through what may be years of minutes.
    latest: float = first
    moment = schedule.next(first + (missed - 2) * period)
    while moment is not None and moment <= now:
        latest = moment
        moment = schedule.next(moment)
    return latest, missed


def _next_delay(cron: Object, now: float, schedule: Schedule) -> float | None:
    due, missed = _most_recent(cron, now, schedule, with_deadline=False)
    base = due if due is not None else (now if missed else _earliest(cron, now, False))
    moment = schedule.next(base)
    return None if moment is None else max(0.0, moment + _DELTA_SECONDS - now)
