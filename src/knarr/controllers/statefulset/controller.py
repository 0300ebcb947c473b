"""The StatefulSet controller: one ordinal after the other, or all at once.

Source: pkg/controller/statefulset/stateful_set.go, stateful_set_control.go.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from knarr.aiokits import clock
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CONTROLLER_REVISIONS, PERSISTENT_VOLUME_CLAIMS, PODS, STATEFUL_SETS
from knarr.api.selectors import LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import history, podutil
from knarr.controllers.context import Context, object_key, possibly_owned
from knarr.controllers.history import History
from knarr.controllers.refs import Claims
from knarr.controllers.selectorcache import SelectorCache
from knarr.controllers.statefulset import util
from knarr.controllers.statefulset.pods import PodWriter


class _Stop(Exception):
    """Not an error: this reconcile goes no further, the coming events will."""


class StatefulSetController:
    """Keeps the pods of all StatefulSets."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._sets = ctx.informer(STATEFUL_SETS)
        self._pods = ctx.pods
        self._revisions = ctx.informer(CONTROLLER_REVISIONS)
        recorder = ctx.recorder("statefulset-controller")
        self._writer = PodWriter(ctx.client, recorder, ctx.informer(PERSISTENT_VOLUME_CLAIMS))
        self._history = History(ctx.client, self._revisions, STATEFUL_SETS)
        self._selectors = SelectorCache(from_label_selector)
        self._several = ctx.config.feature_gates.get("MaxUnavailableStatefulSet", False)
        self.controller = Controller("statefulset-controller", self._reconcile, workers=5)
        self._sets.add_handler(self._changed, lambda old, new: self._changed(new), self._changed)
        self._pods.add_handler(self._pod_added, self._pod_updated, self._pod_deleted)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _changed(self, set_: Object) -> None:
        self.controller.queue.add(object_key(set_))

    def _owner(self, pod: Object) -> Object | None:
        reference = meta.controller_of(pod)
        if reference is None or reference["kind"] != "StatefulSet":
            return None
        owner = self._sets.get(pod["metadata"]["namespace"], reference["name"])
        return owner if owner is not None and owner["metadata"]["uid"] == reference["uid"] else None

    def _pod_added(self, pod: Object) -> None:
        if meta.controller_of(pod) is None:
            self._wake_matching(pod)
        elif (owner := self._owner(pod)) is not None:
            self._changed(owner)

    def _pod_updated(self, old: Object, new: Object) -> None:
        old_ref, new_ref = meta.controller_of(old), meta.controller_of(new)
        if old_ref != new_ref and (owner := self._owner(old)) is not None:
            self._changed(owner)
        if new_ref is not None:
            owner = self._owner(new)
            if owner is None:
                return
            self._changed(owner)
            if util.min_ready(owner) and podutil.is_ready(new) and not podutil.is_ready(old):
                # One second more than needed: condition times are whole seconds.
                self.controller.queue.add_after(object_key(owner), util.min_ready(owner) + 1)
        elif old_ref != new_ref or meta.labels(old) != meta.labels(new):
            self._wake_matching(new)

    def _pod_deleted(self, pod: Object) -> None:
        if (owner := self._owner(pod)) is not None:
            self._changed(owner)

    def _wake_matching(self, pod: Object) -> None:
        for set_ in self._sets.list(pod["metadata"]["namespace"]):
            if self._selector(set_).matches(meta.labels(pod)) and util.is_member(set_, pod):
                self._changed(set_)

    def _selector(self, set_: Object) -> LabelSelector:
        return self._selectors.get(set_, set_["spec"].get("selector"))

    # Reconcile

    async def _reconcile(self, key: str) -> Result | None:
        set_ = self._sets.get_key(key)
        if set_ is None:
            return None
        selector = self._selector(set_)
        revisions = await self._history.claim(set_, selector, release=False)
        candidates = possibly_owned(self._pods, set_)
        members = [pod for pod in candidates if util.is_member(set_, pod)]
        pods = await Claims(self._ctx.client, PODS, set_, STATEFUL_SETS, selector).claim(members)
        current, update, collisions, revisions = await self._sort_revisions(set_, revisions)
        work = _Work(self._writer, set_, pods, current, update, collisions, several=self._several)
        failure = await work.run()
        await self._write_status(set_, work.status)
        if failure is not None:
            raise failure
        await self._truncate(set_, pods, revisions, current, update)
        if util.min_ready(set_) and (work.status.get("availableReplicas") or 0) != util.replicas(set_):
            return Result(float(util.min_ready(set_)))
        return None

    async def _sort_revisions(self, set_: Object, revisions: list[Object]) -> tuple[Object, Object, int, list[Object]]:
        """(current revision, update revision, collision count, all)."""
        status = set_.get("status") or {}
        collisions = int(status.get("collisionCount") or 0)

        async def make(number: int) -> Object:
            nonlocal collisions
            while (made := await self._history.create(util.new_revision(set_, number, collisions))) is None:
                collisions += 1
            return made

        update, others = await self._history.present(set_, revisions, make)
        revisions = [*others, update]
        name = status.get("currentRevision")
        current = next((item for item in revisions if item["metadata"]["name"] == name), update)
        return current, update, collisions, revisions

    async def _write_status(self, set_: Object, status: Object) -> None:
        old = set_.get("status") or {}
        wanted = util.replicas(set_)
        counts = [status.get(name) or 0 for name in ("updatedReplicas", "readyReplicas", "replicas")]
        if util.strategy(set_) == "RollingUpdate" and counts == [wanted, wanted, wanted]:
            status["currentReplicas"] = wanted
            status["currentRevision"] = status["updateRevision"]
        names = ("replicas", "readyReplicas", "currentReplicas", "updatedReplicas", "availableReplicas")
        if (
            all((old.get(name) or 0) == (status.get(name) or 0) for name in names)
            and (old.get("observedGeneration") or 0) >= status["observedGeneration"]
            and old.get("currentRevision") == status["currentRevision"]
            and old.get("updateRevision") == status["updateRevision"]
        ):
            return
        status = {name: value for name, value in status.items() if value or name in ("replicas", "collisionCount", "availableReplicas")}
        if old.get("conditions"):
            status["conditions"] = old["conditions"]
        try:
            await self._ctx.client.update(STATEFUL_SETS, {**set_, "status": status}, subresource="status")
        except StatusError as error:
            if not errors.is_conflict(error):
                raise
            fresh = await self._ctx.client.get(STATEFUL_SETS, set_["metadata"]["name"], set_["metadata"]["namespace"])
            if fresh["metadata"]["uid"] == set_["metadata"]["uid"]:
                await self._ctx.client.update(STATEFUL_SETS, {**fresh, "status": status}, subresource="status")

    async def _truncate(self, set_: Object, pods: list[Object], revisions: list[Object], current: Object, update: Object) -> None:
        live = {current["metadata"]["name"], update["metadata"]["name"], *(util.revision_of(pod) for pod in pods)}
        old = [item for item in revisions if item["metadata"]["name"] not in live]
        limit = history.limit_of(set_)
        if limit >= 0:
            await self._history.trim(old, lambda item: False, len(old) - limit)


class _Work:
    """One pass over the pods of one set; `status` is what was found and done.

    Args:
      several: whether an update may take away more than one pod at once, as maxUnavailable says.
    """

    def __init__(
        self, writer: PodWriter, set_: Object, pods: list[Object], current: Object, update: Object, collisions: int, *, several: bool
    ) -> None:
        self._writer = writer
        self._several = several
        self._set = set_
        self._update = update["metadata"]["name"]
        self._current = current["metadata"]["name"]
        self._current_template = history.template_of(current)
        self._update_template = set_["spec"]["template"]
        self._monotonic = not util.is_parallel(set_)
        by_ordinal = {util.ordinal(pod): pod for pod in pods if util.in_range(set_, pod)}
        first = util.start(set_)
        self._replicas = [by_ordinal.get(number) or self._new(number) for number in range(first, first + util.replicas(set_))]
        condemned = [pod for pod in pods if util.ordinal(pod) >= 0 and not util.in_range(set_, pod)]
        self._condemned = sorted(condemned, key=util.ordinal, reverse=True)
        self.status: Object = {
            "observedGeneration": set_["metadata"].get("generation") or 0,
            "currentRevision": self._current,
            "updateRevision": self._update,
            "collisionCount": collisions,
        }
        self._count(pods)
        unavailable = [pod for pod in [*self._replicas, *reversed(self._condemned)] if util.is_unavailable(set_, pod)]
        self._first_unavailable = unavailable[0] if unavailable else None

    def _new(self, number: int) -> Object:
        if util.is_old_revision(self._set, number):
            return util.new_pod(self._set, self._current_template, self._current, number)
        return util.new_pod(self._set, self._update_template, self._update, number)

    def _count(self, pods: list[Object]) -> None:
        now, min_ready = clock.now(), util.min_ready(self._set)
        counts = dict.fromkeys(("replicas", "readyReplicas", "availableReplicas", "currentReplicas", "updatedReplicas"), 0)
        for pod in pods:
            if not util.is_created(pod):
                continue
            counts["replicas"] += 1
            if podutil.phase(pod) == "Running" and podutil.is_ready(pod):
                counts["readyReplicas"] += 1
                counts["availableReplicas"] += podutil.is_available(pod, min_ready, now)
            if not podutil.is_deleting(pod):
                counts["currentReplicas"] += util.revision_of(pod) == self._current
                counts["updatedReplicas"] += util.revision_of(pod) == self._update
        self.status.update(counts)

    async def run(self) -> Exception | None:
        """Take the next steps; gives the failure instead of raising, since the status is written anyway."""
        if podutil.is_deleting(self._set):
            return None
        try:
            await self._for_all(self._replicas, self._keep)
            await self._for_all(self._condemned, self._keep_claims)
            await self._for_all(self._condemned, self._condemn)
        except _Stop:
            self._count([*self._replicas, *self._condemned])
            return None
        except Exception as error:
            self._count([*self._replicas, *self._condemned])
            return error
        self._count([*self._replicas, *self._condemned])
        if util.strategy(self._set) == "OnDelete":
            return None
        try:
            await self._roll()
        except Exception as error:
            return error
        return None

    async def _for_all(self, pods: list[Object], act: Callable[[Object], Awaitable[None]]) -> None:
        if self._monotonic:
            for pod in pods:
                await act(pod)
            return

        async def one(index: int) -> None:
            try:
                await act(pods[index])
            except _Stop:
                pass

        _, failure = await podutil.slow_start(len(pods), one)
        if failure is not None:
            raise failure

    async def _keep(self, pod: Object) -> None:
        """Bring one ordinal towards running; _Stop when the next ones have to wait for it."""
        set_, writer = self._set, self._writer
        if podutil.is_finished(pod):
            if not podutil.is_deleting(pod):
                await writer.delete(set_, pod)
            raise _Stop
        if not util.is_created(pod):
            if writer.has_stale_claim(set_, pod):
                raise _Stop
            await writer.create(set_, pod)
            if self._monotonic:
                raise _Stop
        elif podutil.phase(pod) == "Pending":
            await writer.create_claims(set_, pod)
            await writer.fix_claims(set_, pod)
        if self._monotonic and (podutil.phase(pod) != "Running" or util.is_unavailable(set_, pod)):
            raise _Stop
        if "uid" not in pod["metadata"]:
            return
        if util.identity_matches(set_, pod) and util.storage_matches(set_, pod) and writer.claims_are_right(set_, pod):
            return
        await writer.update(set_, pod)

    async def _keep_claims(self, pod: Object) -> None:
        if not self._writer.claims_are_right(self._set, pod):
            await self._writer.fix_claims(self._set, pod)

    async def _condemn(self, pod: Object) -> None:
        """Delete one pod beyond the range, when it is its turn."""
        if podutil.is_deleting(pod):
            raise _Stop
        available = podutil.is_available(pod, util.min_ready(self._set), clock.now())
        if self._monotonic and not available and pod is not self._first_unavailable:
            raise _Stop
        await self._delete(pod)
        raise _Stop

    async def _delete(self, pod: Object) -> None:
        try:
            await self._writer.delete(self._set, pod)
        except StatusError as error:
            if not errors.is_not_found(error):
                raise

    async def _roll(self) -> None:
        """Delete what has the old revision, highest ordinal first, never more at once than may be unavailable.

        One at a time, what is broken above it holds the update up, what is broken and old is replaced. Several at a time,
        all that is unavailable counts, the pods below the partition, too.
        """
        set_ = self._set
        lowest = util.partition(set_)
        if not self._several:
            for pod in reversed(self._replicas[lowest:]):
                if util.revision_of(pod) != self._update and not podutil.is_deleting(pod):
                    await self._delete(pod)
                    self.status["currentReplicas"] -= 1
                    return
                if util.is_unavailable(set_, pod):
                    return
            return
        room = util.max_unavailable(set_) - sum(util.is_unavailable(set_, pod) for pod in self._replicas)
        for pod in reversed(self._replicas[lowest:]):
            if room <= 0:
                return
            if util.revision_of(pod) != self._update and not podutil.is_deleting(pod):
                await self._delete(pod)
                self.status["currentReplicas"] -= 1
                room -= 1
