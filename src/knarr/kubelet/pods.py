"""The set of pod workers: takes the pods of this node from their sources, and events of the runtime, to the right worker.

Callers: kubelet (informer, static pods, runtime events, probes, eviction). Owns one PodWorker per pod uid.
Invariant: a pod of the same full name starts only after the one before it is gone (static pods); a worker is dropped only
after its pod is finished and gone from the API server. Source: pkg/kubelet/kubelet.go HandlePod*, pod_workers.go.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import pod_stop, podutil
from knarr.kubelet.node import Node
from knarr.kubelet.pod_worker import PodWorker, Stage
from knarr.runtime.cri import PodSandboxStatus, RuntimeFault

log = get_logger(__name__)

Admit = Callable[[Object, Iterable[Object]], tuple[str, str] | None]
"""(pod, other pods) to (reason, message) of a refusal."""


class PodWorkers:
    """All pods that this node knows."""

    def __init__(self, node: Node, admit: Admit) -> None:
        self._node = node
        self._admit = admit
        self._workers: dict[str, PodWorker] = {}
        self._rejected: set[str] = set()
        self._after: dict[str, Object] = {}
        """Static pods waiting for the end of their predecessor, by namespace/name."""
        self.removed = 0
        """How many pods were here and are gone."""

    def get(self, uid: str) -> PodWorker | None:
        return self._workers.get(uid)

    def by_name(self, namespace: str, name: str) -> PodWorker | None:
        """The worker of a pod by its name; the newest when an old one is still ending."""
        found = [w for w in self._workers.values() if w.key == f"{namespace}/{name}"]
        return min(found, key=lambda w: w.stage, default=None)

    def workers(self) -> list[PodWorker]:
        return list(self._workers.values())

    def active_pods(self) -> list[Object]:
        """Pods that have a claim on the node's resources; one whose object is gone has none, even while it still ends."""
        return [w.pod for w in self._workers.values() if w.stage < Stage.TERMINATED and not w.orphan and not w.removed]

    def add(self, pod: Object) -> None:
        """A pod of this node appeared (also at the kubelet's start)."""
        uid = podutil.uid(pod)
        if uid in self._workers:
            self.update(pod)
            return
        if podutil.is_static(pod) and any(w.key == podutil.key(pod) for w in self._workers.values()):
            self._after[podutil.key(pod)] = pod
            return
        if not podutil.is_terminal_phase(podutil.phase(pod)) and not podutil.is_deleted(pod):
            refusal = self._admit(pod, self.active_pods())
            if refusal is not None:
                self._reject(pod, *refusal)
                return
        pod = self._allocated(pod)
        worker = PodWorker(self._node, pod)
        self._workers[uid] = worker
        self._node.meters.observe("kubelet_containers_per_pod_count", len(podutil.containers(pod)), bounds=(1, 2, 4, 8, 16))
        if podutil.is_deleted(pod) or podutil.is_terminal_phase(podutil.phase(pod)):
            worker.update(pod)
        self._spawn(worker)

    def _spawn(self, worker: PodWorker) -> None:
        self._node.pods_changed.set()
        worker.task = self._node.tasks.spawn(worker.run(), f"pod-{worker.key}")
        worker.task.add_done_callback(lambda _: self._ended(worker))

    def _ended(self, worker: PodWorker) -> None:
        if worker.stage >= Stage.TERMINATED:  # not when the kubelet itself ends
            self._node.affinity.release(worker.uid)
        self._room_made()
        if worker.orphan or podutil.is_static(worker.pod):
            if self._workers.get(worker.uid) is worker:
                del self._workers[worker.uid]
            self._next_static(worker.key)

    def _next_static(self, key: str) -> None:
        waiting = self._after.pop(key, None)
        if waiting is not None:
            self.add(waiting)

    def _reject(self, pod: Object, reason: str, message: str) -> None:
        """The pod may not run here: it fails without ever starting."""
        uid = podutil.uid(pod)
        log.info("pod refused", pod=podutil.key(pod), reason=reason, message=message)
        self._rejected.add(uid)
        self._node.count(f'kubelet_admission_rejections_total{{reason="{reason}"}}')
        self._node.event(pod, "Warning", reason, message)
        old = pod.get("status") or {}
        status: Object = {
            "phase": "Failed",
            "reason": reason,
            "message": f"Pod was rejected: {message}",
            "qosClass": podutil.qos_class(pod),
            "conditions": [dict(c) for c in old.get("conditions") or []],
            "observedGeneration": pod["metadata"].get("generation", 0),
        }
        self._node.status.set(pod, status, may_run=False, finished=True)

    def update(self, pod: Object) -> None:
        """A pod changed."""
        uid = podutil.uid(pod)
        if uid in self._rejected:
            self._node.status.resend(uid)
            return
        worker = self._workers.get(uid)
        if worker is None:
            self.add(pod)
            return
        before = worker.pod["spec"]
        if before != pod["spec"]:
            self._node.pods_changed.set()
        worker.update(self._allocated(pod))
        if before != worker.pod["spec"]:
            # It may have been made smaller.
            self._retry_resizes("pod_resized")
        self._node.status.on_api_update(pod)

    def _allocated(self, pod: Object) -> Object:
        """The pod with the resources that it really has; what was asked for may have to wait."""
        if self._node.resize is None:
            return pod
        return self._node.resize.allocated(pod, self.active_pods(), self._admit)

    def _room_made(self) -> None:
        """A pod ended: a resize that waits may fit now."""
        self._node.pods_changed.set()
        self._retry_resizes("pods_removed")

    def _retry_resizes(self, why: str) -> None:
        """Look again at the resizes that wait for room."""
        if self._node.resize is None:
            return
        self._node.resize.trigger = why
        for pod in self._node.resize.deferred():
            worker = self._workers.get(podutil.uid(pod))
            if worker is not None:
                worker.update(self._allocated(pod))

    def delete(self, pod: Object) -> None:
        """The pod is gone from its source: end it at once if it still runs, then remove every trace."""
        uid = podutil.uid(pod)
        self._rejected.discard(uid)
        waiting = self._after.get(podutil.key(pod))
        if waiting is not None and podutil.uid(waiting) == uid:
            del self._after[podutil.key(pod)]
        worker = self._workers.get(uid)
        if worker is None:
            self._node.status.forget(uid)
            self._node.forget_events(pod)
            return
        grace = pod["metadata"].get("deletionGracePeriodSeconds")
        if grace is None:
            grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        worker.pod, worker.removed = pod, True
        worker.terminate(int(grace))
        self._node.tasks.spawn(self._remove_when_finished(worker), f"remove-{worker.key}")

    async def _remove_when_finished(self, worker: PodWorker) -> None:
        if worker.task is not None:
            await asyncio.wait({worker.task})
        delay = 0.5
        while True:
            try:
                await pod_stop.remove_remains(worker)
                break
            except Exception as e:
                log.warning("remains of a pod not removed", pod=worker.key, error=repr(e))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 30.0)
        self._node.status.forget(worker.uid)
        self._node.forget_events(worker.pod)
        if self._node.resize is not None:
            self._node.resize.forget(worker.uid)
        if self._workers.get(worker.uid) is worker:
            del self._workers[worker.uid]
        self.removed += 1

    def wake(self, uid: str) -> None:
        """Something about a pod changed in the runtime or by a probe."""
        worker = self._workers.get(uid)
        if worker is not None:
            worker.wake()

    def objects_changed(self, uids: set[str]) -> None:
        """A ConfigMap or Secret changed that these pods use."""
        for uid in uids:
            worker = self._workers.get(uid)
            if worker is not None:
                worker.objects_changed()

    async def adopt_orphans(self) -> None:
        """At start: end and remove what runs on this node for pods that no source knows any more."""
        try:
            sandboxes = await self._node.runtime.list_pod_sandboxes()
        except RuntimeFault as e:
            log.error("sandboxes not listed", error=str(e))
            return
        for sandbox in sandboxes:
            uid = sandbox.metadata.uid
            if uid in self._workers or uid in self._rejected or podutil.POD_UID_LABEL not in sandbox.labels:
                continue
            self._node.count("kubelet_orphaned_runtime_pods_total")
            log.info("ending a pod that nobody knows", pod=f"{sandbox.metadata.namespace}/{sandbox.metadata.name}", uid=uid)
            worker = PodWorker(self._node, _pod_of_sandbox(sandbox))
            worker.orphan = True
            worker.terminate(None)
            self._workers[uid] = worker
            self._spawn(worker)


def _pod_of_sandbox(sandbox: PodSandboxStatus) -> Object:
    """As much of a pod object as its sandbox's labels tell."""
    labels = {k: v for k, v in sandbox.labels.items() if not k.startswith("io.kubernetes.")}
    meta = sandbox.metadata
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": meta.name,
            "namespace": meta.namespace,
            "uid": meta.uid,
            "labels": labels,
            "annotations": dict(sandbox.annotations),
        },
        "spec": {"containers": []},
        "status": {},
    }
