"""TTL after finished: Jobs with spec.ttlSecondsAfterFinished are deleted when their time is up.

Source: pkg/controller/ttlafterfinished/ttlafterfinished_controller.go.
"""

from __future__ import annotations

from knarr.aiokits import clock
from knarr.api import errors
from knarr.api.errors import StatusError
from knarr.api.resources import JOBS
from knarr.api.types import Object
from knarr.client.controller import Controller, Result, TerminalError
from knarr.controllers.context import Context, object_key
from knarr.controllers.podutil import is_deleting


class TTLAfterFinishedController:
    """Deletes finished Jobs."""

    def __init__(self, ctx: Context) -> None:
        self._client = ctx.client
        self._jobs = ctx.informer(JOBS)
        self.controller = Controller("ttl-after-finished-controller", self._reconcile, workers=5)
        self._jobs.add_handler(self._changed, lambda old, new: self._changed(new))

    async def run(self) -> None:
        await self.controller.run()

    def _changed(self, job: Object) -> None:
        if _due(job) is not None:
            self.controller.queue.add(object_key(job))

    async def _reconcile(self, key: str) -> Result | None:
        job = self._jobs.get_key(key)
        due = _due(job) if job is not None else None
        if job is None or due is None:
            return None
        if due > clock.now():
            return Result(due - clock.now())
        try:
            # The time may just have been prolonged, and deletion cannot be taken back.
            fresh = await self._client.get(JOBS, job["metadata"]["name"], job["metadata"]["namespace"])
            due = _due(fresh)
            if due is None:
                return None
            if due > clock.now():
                return Result(due - clock.now())
            meta = fresh["metadata"]
            await self._client.delete(
                JOBS,
                meta["name"],
                meta["namespace"],
                propagation_policy="Foreground",
                uid=meta["uid"],
                resource_version=meta["resourceVersion"],
            )
        except StatusError as error:
            if not errors.is_not_found(error):
                raise
        return None


def _due(job: Object) -> float | None:
    """When to delete the Job (epoch seconds); None when that is not to be."""
    ttl = job["spec"].get("ttlSecondsAfterFinished")
    if ttl is None or is_deleting(job):
        return None
    for condition in (job.get("status") or {}).get("conditions") or ():
        if condition["type"] in ("Complete", "Failed") and condition["status"] == "True":
            if not condition.get("lastTransitionTime"):
                raise TerminalError(f"unable to find the time when the Job {object_key(job)} finished")
            return clock.parse_rfc3339(condition["lastTransitionTime"]) + float(ttl)
    return None
