"""The Job controller: events in, one `JobSync` per pass, and the release of pods whose Job is gone.

Source: pkg/controller/job/job_controller.go.
"""

from __future__ import annotations

from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import JOBS, PODS
from knarr.api.selectors import LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import podutil
from knarr.controllers.context import Context, object_key, possibly_owned
from knarr.controllers.job.sync import JobSync, is_finished
from knarr.controllers.job.tracking import FINALIZER, Tracking, has_finalizer
from knarr.controllers.refs import Claims
from knarr.controllers.selectorcache import SelectorCache

_CONTROLLER = "kubernetes.io/job-controller"
# Pods of one Job tend to end together; what ends within this time becomes one status.
_BATCH_SECONDS = 0.05


class JobController:
    """Runs all Jobs that are not managed by somebody else."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._jobs = ctx.informer(JOBS)
        self._pods = ctx.pods
        self._recorder = ctx.recorder("job-controller")
        self._selectors = SelectorCache(from_label_selector)
        self._tracking = Tracking(ctx.client)
        self.controller = Controller("job-controller", self._reconcile, workers=10)
        self._orphans = Controller("job-orphan-pods", self._release_orphan, workers=5)
        self._jobs.add_handler(self._changed, self._job_updated, self._job_deleted)
        self._pods.add_handler(self._pod_added, self._pod_updated, self._pod_deleted)

    async def run(self) -> None:
        self._orphans.start()
        try:
            await self.controller.run()
        finally:
            await self._orphans.stop()

    # Events

    def _changed(self, job: Object) -> None:
        self.controller.queue.add(object_key(job))

    def _batched(self, job: Object) -> None:
        self.controller.queue.add_after(object_key(job), _BATCH_SECONDS)

    def _job_updated(self, old: Object, new: Object) -> None:
        self._changed(new)
        if is_finished(new):
            self._wake_leftovers(new)

    def _job_deleted(self, job: Object) -> None:
        self._selectors.forget(job)
        self._tracking.finished.discard(job["metadata"]["uid"])
        self._changed(job)
        self._wake_leftovers(job)

    def _wake_leftovers(self, job: Object) -> None:
        for pod in self._pods.by_index("controller", job["metadata"]["uid"]):
            if has_finalizer(pod):
                self._orphans.queue.add(object_key(pod))

    def _owner(self, pod: Object) -> Object | None:
        reference = meta.controller_of(pod)
        if reference is None or reference["kind"] != "Job":
            return None
        owner = self._jobs.get(pod["metadata"]["namespace"], reference["name"])
        return owner if owner is not None and owner["metadata"]["uid"] == reference["uid"] else None

    def _pod_added(self, pod: Object) -> None:
        if podutil.is_deleting(pod):
            self._pod_deleted(pod, gone=False)
            return
        if meta.controller_of(pod) is None:
            self._wake_matching(pod)
        elif (owner := self._owner(pod)) is not None:
            self._tracking.expectations.created(object_key(owner))
            self._batched(owner)
        self._check_orphan(pod)

    def _pod_updated(self, old: Object, new: Object) -> None:
        if podutil.is_deleting(new):
            self._pod_deleted(new, gone=False)
            return
        old_ref, new_ref = meta.controller_of(old), meta.controller_of(new)
        if old_ref != new_ref and (before := self._owner(old)) is not None:
            self._note_release(before, old, not has_finalizer(new))
            self._batched(before)
        if new_ref is not None:
            owner = self._owner(new)
            if owner is not None:
                self._note_release(owner, new, not has_finalizer(new))
                self._batched(owner)
        elif old_ref != new_ref or meta.labels(old) != meta.labels(new):
            self._wake_matching(new)
        self._check_orphan(new)

    def _note_release(self, owner: Object, pod: Object, released: bool) -> None:
        if released:
            self._tracking.removed(object_key(owner), pod["metadata"]["uid"])

    def _pod_deleted(self, pod: Object, gone: bool = True) -> None:
        owner = self._owner(pod)
        if owner is None or is_finished(owner):
            if has_finalizer(pod) and not gone:
                self._check_orphan(pod)
            return
        key = object_key(owner)
        self._tracking.expectations.deleted(key, object_key(pod))
        self._note_release(owner, pod, gone or not has_finalizer(pod))
        self._batched(owner)

    def _check_orphan(self, pod: Object) -> None:
        """A pod with our finalizer whose Job is gone or over would never end."""
        if not has_finalizer(pod):
            return
        reference = meta.controller_of(pod)
        if reference is None:
            self._orphans.queue.add(object_key(pod))
        elif reference["kind"] == "Job":
            owner = self._owner(pod)
            if owner is None or is_finished(owner):
                self._orphans.queue.add(object_key(pod))

    def _wake_matching(self, pod: Object) -> None:
        for job in self._jobs.list(pod["metadata"]["namespace"]):
            if not is_finished(job) and self._selector(job).matches(meta.labels(pod)):
                self._batched(job)

    def _selector(self, job: Object) -> LabelSelector:
        return self._selectors.get(job, job["spec"].get("selector"))

    # Reconcile

    async def _release_orphan(self, key: str) -> None:
        pod = self._pods.get_key(key)
        if pod is None or not has_finalizer(pod):
            return
        reference = meta.controller_of(pod)
        if reference is not None:
            if reference["kind"] != "Job":
                return
            owner = self._owner(pod)
            if owner is not None and (not is_finished(owner) or _is_managed_elsewhere(owner)):
                return
            if owner is None and not await self._is_gone(pod, reference):
                return
        try:
            await self._tracking.release(pod)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _is_gone(self, pod: Object, reference: Object) -> bool:
        """Ask the server, since a cache may simply not have the Job yet."""
        try:
            job = await self._ctx.client.get(JOBS, reference["name"], pod["metadata"]["namespace"])
        except StatusError as error:
            if errors.is_not_found(error):
                return True
            raise
        return bool(job["metadata"]["uid"] != reference["uid"])

    async def _reconcile(self, key: str) -> Result | None:
        job = self._jobs.get_key(key)
        if job is None:
            self._tracking.forget(key)
            return None
        if _is_managed_elsewhere(job):
            return None
        if is_finished(job):
            self._tracking.forget_backoff(key)
            self._tracking.finished.discard(job["metadata"]["uid"])
            return None
        if job["metadata"]["uid"] in self._tracking.finished:
            return None
        pods = await self._pods_of(job)
        sync = JobSync(self._ctx.client, self._recorder, self._tracking, meta.deep_copy(job), pods)
        failure = await sync.run()
        if failure is not None:
            raise failure
        return Result(sync.requeue_after_seconds) if sync.requeue_after_seconds is not None else None

    async def _pods_of(self, job: Object) -> list[Object]:
        candidates = possibly_owned(self._pods, job)
        claims = Claims(self._ctx.client, PODS, job, JOBS, self._selector(job), finalizers=(FINALIZER,))
        return await claims.claim(candidates)


def _is_managed_elsewhere(job: Object) -> bool:
    return str(job["spec"].get("managedBy", _CONTROLLER)) != _CONTROLLER
