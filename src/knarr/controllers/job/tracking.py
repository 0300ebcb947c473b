"""What the Job controller did that its cache does not show yet: pods, finalizers, ended Jobs, back-off.

Source: pkg/controller/job/tracking_utils.go, backoff_utils.go.
"""

from __future__ import annotations

from knarr.api.resources import PODS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.controllers.expectations import Expectations
from knarr.controllers.job.policies import BackoffRecord

FINALIZER = "batch.kubernetes.io/job-tracking"


def has_finalizer(pod: Object) -> bool:
    return FINALIZER in (pod["metadata"].get("finalizers") or ())


class Tracking:
    """State by Job key, kept while the Job exists."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self.expectations = Expectations()
        self.finished: set[str] = set()
        """Uids of Jobs that we ended and whose cached copy does not say so yet."""
        self._removing: dict[str, set[str]] = {}
        self._backoff: dict[str, BackoffRecord] = {}

    def removing(self, key: str) -> set[str]:
        """Uids of pods whose finalizer was removed, as far as the cache lags behind."""
        return set(self._removing.get(key, ()))

    def expect_removal(self, key: str, uids: set[str]) -> None:
        self._removing.setdefault(key, set()).update(uids)

    def removed(self, key: str, uid: str) -> None:
        """A finalizer's removal was seen, or failed."""
        uids = self._removing.get(key)
        if uids is not None:
            uids.discard(uid)
            if not uids:
                del self._removing[key]

    def backoff(self, key: str) -> BackoffRecord:
        return self._backoff.get(key, BackoffRecord())

    def set_backoff(self, key: str, record: BackoffRecord) -> None:
        self._backoff[key] = record

    def forget_backoff(self, key: str) -> None:
        self._backoff.pop(key, None)

    def forget(self, key: str) -> None:
        """The Job is gone."""
        self.expectations.forget(key)
        self._removing.pop(key, None)
        self._backoff.pop(key, None)

    async def release(self, pod: Object) -> None:
        """Remove our finalizer from a pod."""
        if not has_finalizer(pod):
            return
        patch = {"metadata": {"$deleteFromPrimitiveList/finalizers": [FINALIZER], "uid": pod["metadata"]["uid"]}}
        await self._client.patch(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], patch, type="strategic")
