"""The DaemonSet controller.

Source: pkg/controller/daemon/daemon_controller.go, update.go.
"""

from __future__ import annotations

from collections.abc import Iterable

from knarr.aiokits import clock
from knarr.aiokits.backoff import ItemBackoff
from knarr.api import errors, meta
from knarr.api.errors import StatusError
from knarr.api.resources import CONTROLLER_REVISIONS, DAEMON_SETS, PODS
from knarr.api.selectors import LabelSelector, from_label_selector
from knarr.api.types import Object
from knarr.client.controller import Controller, Result
from knarr.controllers import history, podutil
from knarr.controllers.context import Context, object_key, possibly_owned
from knarr.controllers.daemonset import rolling, util
from knarr.controllers.expectations import Expectations
from knarr.controllers.hashing import template_hash
from knarr.controllers.history import History
from knarr.controllers.refs import Claims
from knarr.controllers.selectorcache import SelectorCache

_BURST = 250
_FAILED_BACKOFF = (1.0, 900.0)


class DaemonSetController:
    """Keeps the pods of all DaemonSets."""

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._sets = ctx.informer(DAEMON_SETS)
        self._pods = ctx.pods
        self._nodes = ctx.nodes
        self._revisions = ctx.informer(CONTROLLER_REVISIONS)
        self._recorder = ctx.recorder("daemonset-controller")
        self._control = podutil.PodControl(ctx.client, self._recorder)
        self._history = History(ctx.client, self._revisions, DAEMON_SETS)
        self._expectations = Expectations()
        self._selectors = SelectorCache(from_label_selector)
        self._failed = ItemBackoff(*_FAILED_BACKOFF)
        self._retry_at: dict[str, float] = {}
        self.controller = Controller("daemonset-controller", self._reconcile, workers=5)
        self._sets.add_handler(self._changed, lambda old, new: self._changed(new), self._set_deleted)
        self._pods.add_handler(self._pod_added, self._pod_updated, self._pod_deleted)
        self._nodes.add_handler(self._node_changed, self._node_updated, self._node_deleted)

    async def run(self) -> None:
        await self.controller.run()

    # Events

    def _changed(self, ds: Object) -> None:
        self.controller.queue.add(object_key(ds))

    def _set_deleted(self, ds: Object) -> None:
        self._expectations.forget(object_key(ds))
        self._selectors.forget(ds)
        prefix = ds["metadata"]["uid"] + "/"
        for key in [key for key in self._retry_at if key.startswith(prefix)]:
            del self._retry_at[key]
            self._failed.forget(key)
        self._changed(ds)

    def _owner(self, pod: Object) -> Object | None:
        reference = meta.controller_of(pod)
        if reference is None or reference["kind"] != "DaemonSet":
            return None
        owner = self._sets.get(pod["metadata"]["namespace"], reference["name"])
        return owner if owner is not None and owner["metadata"]["uid"] == reference["uid"] else None

    def _pod_added(self, pod: Object) -> None:
        if podutil.is_deleting(pod):
            self._pod_deleted(pod)
        elif meta.controller_of(pod) is None:
            self._wake_matching(pod)
        elif (owner := self._owner(pod)) is not None:
            self._expectations.created(object_key(owner))
            self._changed(owner)

    def _pod_updated(self, old: Object, new: Object) -> None:
        if podutil.is_deleting(new):
            self._pod_deleted(new)
            return
        old_ref, new_ref = meta.controller_of(old), meta.controller_of(new)
        if old_ref != new_ref and (owner := self._owner(old)) is not None:
            self._changed(owner)
        if new_ref is not None:
            owner = self._owner(new)
            if owner is None:
                return
            self._changed(owner)
            min_ready = owner["spec"].get("minReadySeconds") or 0
            if min_ready and podutil.is_ready(new) and not podutil.is_ready(old):
                self.controller.queue.add_after(object_key(owner), min_ready + 1)
        elif old_ref != new_ref or meta.labels(old) != meta.labels(new):
            self._wake_matching(new)

    def _pod_deleted(self, pod: Object) -> None:
        owner = self._owner(pod)
        if owner is not None:
            self._expectations.deleted(object_key(owner), object_key(pod))
            self._changed(owner)

    def _wake_matching(self, pod: Object) -> None:
        for ds in self._sets.list(pod["metadata"]["namespace"]):
            if self._selector(ds).matches(meta.labels(pod)):
                self._changed(ds)

    def _node_changed(self, node: Object) -> None:
        present = self._sets_on(node)
        for ds in self._sets:
            run, go_on = util.should_run(node, ds)
            scheduled = ds["metadata"]["uid"] in present
            misscheduled = (ds.get("status") or {}).get("numberMisscheduled") or 0
            if (run and not scheduled) or (not go_on and scheduled) or (scheduled and misscheduled):
                self._changed(ds)

    def _sets_on(self, node: Object) -> set[str]:
        pods = self._pods.by_index("node", node["metadata"]["name"])
        return {ref["uid"] for pod in pods if (ref := meta.controller_of(pod)) is not None and ref["kind"] == "DaemonSet"}

    def _node_updated(self, old: Object, new: Object) -> None:
        if meta.labels(old) != meta.labels(new) or (old.get("spec") or {}).get("taints") != (new.get("spec") or {}).get("taints"):
            for ds in self._sets:
                if util.should_run(old, ds) != util.should_run(new, ds):
                    self._changed(ds)
            self._node_changed(new)

    def _node_deleted(self, node: Object) -> None:
        for ds in self._sets:
            if util.should_run(node, ds)[1]:
                self._changed(ds)

    def _selector(self, ds: Object) -> LabelSelector:
        return self._selectors.get(ds, ds["spec"].get("selector"))

    # Reconcile

    async def _reconcile(self, key: str) -> Result | None:
        ds = self._sets.get_key(key)
        if ds is None:
            self._expectations.forget(key)
            return None
        if self._selector(ds).empty:
            message = "This daemon set is selecting all pods. A non-empty selector is required."
            self._recorder.event(ds, "Warning", "SelectingAll", message)
            return None
        if podutil.is_deleting(ds):
            return None
        current, old = await self._sort_revisions(ds)
        digest = meta.labels(current)[util.HASH]
        pods = await self._pods_of(ds)
        if not self._expectations.satisfied(key):
            return await self._write_status(ds, pods, digest, False)
        failure: Exception | None = None
        delay: float | None = None
        try:
            delay = await self._manage(key, ds, pods, digest)
            if self._expectations.satisfied(key) and (ds["spec"].get("updateStrategy") or {}).get("type") == "RollingUpdate":
                delete, create = rolling.plan(ds, self._nodes, _by_node(await self._pods_of(ds)), digest, clock.now())
                await self._sync(key, ds, delete, create, digest)
            await self._clean_history(ds, pods, old)
        except Exception as error:
            failure = error
        result = await self._write_status(ds, await self._pods_of(ds), digest, True)
        if failure is not None:
            raise failure
        if delay is not None:
            return Result(min(delay, result.requeue_after_seconds or delay) if result else delay)
        return result

    async def _pods_of(self, ds: Object) -> list[Object]:
        return await Claims(self._ctx.client, PODS, ds, DAEMON_SETS, self._selector(ds)).claim(possibly_owned(self._pods, ds))

    async def _manage(self, key: str, ds: Object, pods: list[Object], digest: str) -> float | None:
        """Start what is missing, stop what does not belong; gives seconds until a failed pod may be replaced."""
        by_node = _by_node(pods)
        create: list[str] = []
        delete: list[Object] = []
        delays: list[float] = []
        nodes = list(self._nodes)
        for node in nodes:
            name = node["metadata"]["name"]
            run, go_on = util.should_run(node, ds)
            here = by_node.get(name)
            if run and not here:
                create.append(name)
            elif go_on and here:
                self._sort_out(ds, name, run, here, digest, create, delete, delays)
            elif not go_on and here:
                delete += [pod for pod in here if not podutil.is_deleting(pod)]
        known = {node["metadata"]["name"] for node in nodes}
        delete += [pod for name, here in by_node.items() if name not in known for pod in here if not pod["spec"].get("nodeName")]
        await self._sync(key, ds, delete, create, digest)
        return min(delays) if delays else None

    def _sort_out(
        self, ds: Object, name: str, run: bool, here: list[Object], digest: str, create: list[str], delete: list[Object], delays: list[float]
    ) -> None:
        """Look at the pods of one node on which they may run."""
        running: list[Object] = []
        for pod in here:
            if podutil.is_deleting(pod):
                continue
            phase = podutil.phase(pod)
            if phase == "Failed":
                wait = self._failed_wait(ds, name)
                if wait > 0:
                    delays.append(wait)
                    continue
                message = f"Found failed daemon pod {object_key(pod)} on node {name}, will try to kill it"
                self._recorder.event(ds, "Warning", "FailedDaemonPod", message)
                delete.append(pod)
            elif phase == "Succeeded":
                message = f"Found succeeded daemon pod {object_key(pod)} on node {name}, will try to delete it"
                self._recorder.event(ds, "Normal", "SucceededDaemonPod", message)
                delete.append(pod)
            else:
                running.append(pod)
        if not util.allows_surge(ds):
            delete += util.by_age(running)[1:]
            return
        if len(running) <= 1:
            if not running and run:
                create.append(name)
            return
        self._sort_out_surge(ds, running, digest, delete)

    def _sort_out_surge(self, ds: Object, running: list[Object], digest: str, delete: list[Object]) -> None:
        newest: Object | None = None
        oldest: Object | None = None
        for pod in util.by_age(running):
            if meta.labels(pod).get(util.HASH) == digest:
                if newest is None:
                    newest = pod
                    continue
            elif oldest is None:
                oldest = pod
                continue
            delete.append(pod)
        if newest is not None and oldest is not None:
            min_ready = ds["spec"].get("minReadySeconds") or 0
            if not podutil.is_ready(oldest) or podutil.is_available(newest, min_ready, clock.now()):
                delete.append(oldest)

    def _failed_wait(self, ds: Object, node: str) -> float:
        """Seconds until a failed pod of the node may be replaced; counts the failure when it may be now."""
        key = f"{ds['metadata']['uid']}/{(ds.get('status') or {}).get('observedGeneration', 0)}/{node}"
        now = clock.now()
        due = self._retry_at.get(key, 0.0)
        if due > now:
            return due - now
        if now - due > 2 * _FAILED_BACKOFF[1]:
            self._failed.forget(key)
        self._retry_at[key] = now + self._failed.next_seconds(key)
        return 0.0

    async def _sync(self, key: str, ds: Object, delete: list[Object], create: list[str], digest: str) -> None:
        delete, create = delete[:_BURST], create[:_BURST]
        if not delete and not create:
            return
        self._expectations.expect(key, len(create), {object_key(pod) for pod in delete})
        template = util.pod_template(ds, digest)
        reference = meta.new_controller_ref(ds, "apps/v1", "DaemonSet")
        namespace = ds["metadata"]["namespace"]

        async def start(index: int) -> None:
            pod = podutil.pod_from_template(util.pin_to_node(template, create[index]), ds, reference)
            try:
                await self._control.create(pod, namespace, ds)
            except StatusError as error:
                if not errors.is_namespace_terminating(error):
                    raise

        async def stop(pod: Object) -> None:
            try:
                await self._control.delete(pod["metadata"]["name"], namespace, ds)
            except Exception as error:
                self._expectations.deleted(key, object_key(pod))
                if not errors.is_not_found(error):
                    raise

        successes, failure = await podutil.slow_start(len(create), start)
        for _ in range(len(create) - successes):
            self._expectations.created(key)
        await podutil.gather_all([stop(pod) for pod in delete])
        if failure is not None:
            raise failure

    # Revisions

    async def _sort_revisions(self, ds: Object) -> tuple[Object, list[Object]]:
        """(revision of the present template, all others)."""
        revisions = [await self._labelled(item) for item in await self._history.claim(ds, self._selector(ds), release=True)]
        current, others = await self._history.present(ds, revisions, lambda number: self._snapshot(ds, number))
        twins = [item for item in others if item.get("data") == current.get("data")]
        if twins:
            await self._relabel(ds, meta.labels(current)[util.HASH])
        for twin in twins:
            await self._history.delete(twin)
        return current, [item for item in others if item not in twins]

    async def _labelled(self, revision: Object) -> Object:
        """A revision that was adopted may lack the label that its pods are told apart by."""
        if util.HASH in meta.labels(revision):
            return revision
        name, namespace = revision["metadata"]["name"], revision["metadata"]["namespace"]
        return await self._ctx.client.patch(CONTROLLER_REVISIONS, name, namespace, {"metadata": {"labels": {util.HASH: name}}})

    async def _relabel(self, ds: Object, digest: str) -> None:
        """Pods of twin revisions, which are to go, become pods of the one that stays."""
        for pod in await self._pods_of(ds):
            if meta.labels(pod).get(util.HASH) != digest:
                patch = {"metadata": {"labels": {util.HASH: digest}}}
                await self._ctx.client.patch(PODS, pod["metadata"]["name"], pod["metadata"]["namespace"], patch)

    async def _snapshot(self, ds: Object, number: int) -> Object:
        status = ds.get("status") or {}
        digest = template_hash(ds["spec"]["template"], status.get("collisionCount"))
        revision = history.new_revision(ds, DAEMON_SETS, number, util.HASH, digest)
        made = await self._history.create(revision)
        if made is None:
            collisions = int(status.get("collisionCount") or 0) + 1
            await self._ctx.client.update(DAEMON_SETS, {**ds, "status": {**status, "collisionCount": collisions}}, subresource="status")
            raise errors.already_exists(CONTROLLER_REVISIONS, revision["metadata"]["name"])
        return made

    async def _clean_history(self, ds: Object, pods: list[Object], old: list[Object]) -> None:
        live = {meta.labels(pod).get(util.HASH) for pod in pods}
        await self._history.trim(old, lambda item: meta.labels(item).get(util.HASH) in live, len(old) - history.limit_of(ds))

    # Status

    async def _write_status(self, ds: Object, pods: list[Object], digest: str, observed: bool) -> Result | None:
        by_node = _by_node(pods)
        counts = dict.fromkeys(
            ("currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady", "updatedNumberScheduled", "numberAvailable"), 0
        )
        min_ready, now = ds["spec"].get("minReadySeconds") or 0, clock.now()
        for node in self._nodes:
            run, _ = util.should_run(node, ds)
            here = by_node.get(node["metadata"]["name"])
            if not run:
                counts["numberMisscheduled"] += bool(here)
                continue
            counts["desiredNumberScheduled"] += 1
            if not here:
                continue
            counts["currentNumberScheduled"] += 1
            pod = util.by_age(here)[0]
            if podutil.is_ready(pod):
                counts["numberReady"] += 1
                counts["numberAvailable"] += podutil.is_available(pod, min_ready, now)
            counts["updatedNumberScheduled"] += util.is_updated(pod, ds, digest)
        counts["numberUnavailable"] = counts["desiredNumberScheduled"] - counts["numberAvailable"]
        await self._store(ds, counts, observed)
        if min_ready and counts["numberReady"] != counts["numberAvailable"]:
            return Result(float(min_ready))
        return None

    async def _store(self, ds: Object, counts: dict[str, int], observed: bool) -> None:
        old = ds.get("status") or {}
        generation = ds["metadata"].get("generation") or 0
        seen = old.get("observedGeneration") or 0
        if all((old.get(name) or 0) == value for name, value in counts.items()) and (seen >= generation or not observed):
            return
        always = ("currentNumberScheduled", "numberMisscheduled", "desiredNumberScheduled", "numberReady")
        fields: Object = {name: value for name, value in counts.items() if value or name in always}
        fields["observedGeneration"] = generation if observed else seen
        for name in ("collisionCount", "conditions"):
            if old.get(name) is not None:
                fields[name] = old[name]
        try:
            await self._ctx.client.update(DAEMON_SETS, {**ds, "status": fields}, subresource="status")
        except StatusError as error:
            if not errors.is_conflict(error):
                raise
            fresh = await self._ctx.client.get(DAEMON_SETS, ds["metadata"]["name"], ds["metadata"]["namespace"])
            await self._ctx.client.update(DAEMON_SETS, {**fresh, "status": fields}, subresource="status")


def _by_node(pods: Iterable[Object]) -> dict[str, list[Object]]:
    result: dict[str, list[Object]] = {}
    for pod in pods:
        name = util.target_node(pod)
        if name:
            result.setdefault(name, []).append(pod)
    return result
