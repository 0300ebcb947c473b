"""Keeps the last status of every pod and brings it to the API server, at once and latest only.

Callers: pod_sync (set, get), kubelet (on_api_update from the informer). One sender task per pod at most; while it waits for
the API server newer statuses replace each other, so the queue per pod is one entry deep. What only says how far the making of a
pod has come waits a moment: most pods run before it is over, and one write says it all. A finished pod that is marked for
deletion is deleted here, once, after its last status was stored.
Invariants: what other writers own (readiness gates, their conditions) is never overwritten; a terminal phase is not published
while containers may still run. Source: pkg/kubelet/status/status_manager.go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api import errors
from knarr.api.resources import PODS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.kubelet import podutil
from knarr.kubelet.faults import UNREACHABLE

log = get_logger(__name__)

_OWNED = (
    "phase",
    "reason",
    "message",
    "hostIP",
    "hostIPs",
    "podIP",
    "podIPs",
    "startTime",
    "qosClass",
    "containerStatuses",
    "initContainerStatuses",
    "ephemeralContainerStatuses",
    "observedGeneration",
)
_SENDERS = 8
"""Requests at a time: more would cost a TLS connection each and gain nothing on one API server."""
_PATIENCE_SECONDS, _PATIENCE_EACH_SECONDS = 0.1, 0.02
"""How long the progress of a starting pod waits: the first, and the more the more of them wait."""
_MAKING = ("ContainerCreating", "PodInitializing")
_TERMINATION_MESSAGES_BYTES = 12 * 1024
"""Room for the termination messages of all containers of a pod together."""


@dataclass(slots=True)
class _Record:
    pod: Object
    status: Object
    finished: bool = False
    may_run: bool = True
    dirty: bool = False
    sending: bool = False
    changed_at: float = 0.0
    """Since when (monotonic) there is something to send."""
    deleted: bool = False
    """The API server has been told to delete the pod."""
    timer: asyncio.TimerHandle | None = None
    """Sends a status that can wait."""
    echo: Object | None = None
    """The kubelet's part of the status as the API server answered it last."""
    echo_version: int = 0
    answer: Object | None = None
    """The pod as the last patch returned it; newer than the informer's copy for a moment."""


class StatusManager:
    """The statuses of this node's pods; see the module."""

    def __init__(
        self, client: Client, api_pod: Callable[[Object], Object | None], observe: Callable[[str, float], None] = lambda name, value: None
    ) -> None:
        """`api_pod` gives the API's newest copy of a pod (for a static pod: its mirror), None when there is none; `observe` takes times for a metric."""
        self._client = client
        self._observe = observe
        self._api_pod = api_pod
        self._records: dict[str, _Record] = {}
        self._tasks = Tasks()
        self._slots = asyncio.Semaphore(_SENDERS)
        self._patient = 0
        """Statuses that wait for their timer."""

    async def close(self) -> None:
        for record in self._records.values():
            self._hurry(record)
        await self._tasks.close()

    def get(self, uid: str) -> Object | None:
        """The last status set, None for an unknown pod. Not to be changed."""
        record = self._records.get(uid)
        return record.status if record else None

    def forget(self, uid: str) -> None:
        """The pod is gone from the API server."""
        record = self._records.pop(uid, None)
        if record is not None:
            self._hurry(record)

    def set(self, pod: Object, status: Object, *, may_run: bool = True, finished: bool = False) -> None:
        """Take a new status; it is sent in the background unless nothing changed.

        Args:
          may_run: containers may still run, so that a terminal phase must wait.
          finished: everything of the pod is cleaned up; it may be deleted.
        """
        uid = podutil.uid(pod)
        record = self._records.get(uid)
        old = record.status if record else (pod.get("status") or {})
        _complete(pod, status, old)
        if record is None:
            record = self._records[uid] = _Record(pod, status)
        elif record.status == status and record.finished == finished and record.may_run == may_run:
            record.pod = pod
            return
        record.pod, record.status, record.may_run = pod, status, may_run
        record.finished = record.finished or finished
        if record.sending or not _can_wait(pod, old, status):
            self._mark(uid, record)
        elif record.timer is None:
            delay = _PATIENCE_SECONDS + _PATIENCE_EACH_SECONDS * self._patient
            self._patient += 1
            record.timer = asyncio.get_running_loop().call_later(delay, self._mark, uid, record)

    def _hurry(self, record: _Record) -> None:
        """The status that waits is sent now, or needs no sending any more."""
        if record.timer is not None:
            record.timer.cancel()
            record.timer = None
            self._patient -= 1

    def on_api_update(self, pod: Object) -> None:
        """Send again when somebody else overwrote the kubelet's part of the status."""
        record = self._records.get(podutil.uid(pod))
        if record is None or record.sending or record.echo is None:
            return
        if _version(pod) > record.echo_version and _owned(pod.get("status") or {}) != record.echo:
            self._mark(podutil.uid(pod), record)

    def resend(self, uid: str) -> None:
        """Send once more, e.g. because a mirror pod has appeared or the pod was marked for deletion."""
        record = self._records.get(uid)
        if record is not None:
            self._mark(uid, record)

    def _mark(self, uid: str, record: _Record) -> None:
        self._hurry(record)
        if not record.dirty:
            record.changed_at = time.monotonic()
        record.dirty = True
        if not record.sending:
            record.sending = True
            self._tasks.spawn(self._send(uid, record), f"status-{podutil.key(record.pod)}")

    async def _send(self, uid: str, record: _Record) -> None:
        delay = 0.2
        try:
            while record.dirty and self._records.get(uid) is record:
                try:
                    async with self._slots:
                        # Only now: what became newer while this one waited for its turn goes out with it.
                        record.dirty = False
                        await self._send_once(uid, record)
                        self._observe("kubelet_pod_status_sync_duration_seconds", time.monotonic() - record.changed_at)
                    delay = 0.2
                except errors.StatusError as e:
                    if errors.is_not_found(e) or errors.is_conflict(e):
                        # Deleted, or deleted and made anew under the same name: this uid has no status any more.
                        if errors.is_not_found(e):
                            log.debug("pod of a status is gone", pod=podutil.key(record.pod))
                        continue
                    log.warning("pod status not stored", pod=podutil.key(record.pod), error=str(e))
                    if 400 <= e.code < 500 and e.code not in (408, 429, 401, 403):
                        continue
                    record.dirty = True
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, 10.0)
                except UNREACHABLE as e:
                    log.warning("API server not reached for a pod status", pod=podutil.key(record.pod), error=repr(e))
                    record.dirty = True
                    await asyncio.sleep(delay)
                    delay = min(delay * 2, 10.0)
        finally:
            record.sending = False

    async def _send_once(self, uid: str, record: _Record) -> None:
        api = self._api_pod(record.pod)
        if api is None:
            if podutil.is_static(record.pod):
                return
            api = record.pod
        if record.answer is not None and _version(record.answer) > _version(api) and record.answer["metadata"]["uid"] == api["metadata"]["uid"]:
            api = record.answer
        current = api.get("status") or {}
        wanted = _merged(record, current)
        meta = api["metadata"]
        if _owned(current) != _owned(wanted) or not _same_conditions(current, wanted):
            patch = {"metadata": {"uid": meta["uid"]}, "status": _patch(current, wanted)}
            api = await self._client.patch(PODS, meta["name"], meta.get("namespace"), patch, type="strategic", subresource="status")
            record.echo = _owned(api.get("status") or {})
            record.echo_version = _version(api)
            record.answer = api
        if record.finished and not record.dirty and podutil.is_deleted(api) and not podutil.is_mirror(api):
            if podutil.is_terminal_phase(podutil.phase(api)) and not record.deleted:
                await self._client.delete(PODS, meta["name"], meta.get("namespace"), grace_period_seconds=0, uid=meta["uid"])
                record.deleted = True


def _version(pod: Object) -> int:
    return int(pod["metadata"].get("resourceVersion") or 0)


def _can_wait(pod: Object, old: Object, status: Object) -> bool:
    """Whether a status tells no more than that the pod is being made."""
    if podutil.is_deleted(pod) or status["phase"] != "Pending" or (old.get("phase") or "Pending") != "Pending":
        return False
    containers = [c for kind in ("initContainerStatuses", "containerStatuses") for c in status.get(kind) or []]
    return all((c["state"].get("waiting") or {}).get("reason") in _MAKING for c in containers)


def _complete(pod: Object, status: Object, old: Object) -> None:
    """Fill start and transition times and cut termination messages to their share."""
    now = clock.now_rfc3339()
    previous = {c["type"]: c for c in old.get("conditions") or []}
    for condition in status.get("conditions") or []:
        if condition.get("lastTransitionTime") and condition["type"] not in podutil.KUBELET_CONDITIONS:
            continue
        before = previous.get(condition["type"])
        same = before is not None and before.get("status") == condition["status"]
        condition["lastTransitionTime"] = (before or {}).get("lastTransitionTime") or now if same else now
        condition.setdefault("lastProbeTime", None)
    status["startTime"] = old.get("startTime") or (pod.get("status") or {}).get("startTime") or now
    share = _TERMINATION_MESSAGES_BYTES // max(1, sum(1 for _ in podutil.all_containers(pod)))
    for kind in ("containerStatuses", "initContainerStatuses", "ephemeralContainerStatuses"):
        for container in status.get(kind) or []:
            for state in ("state", "lastState"):
                ended = (container.get(state) or {}).get("terminated")
                if ended and len(ended.get("message") or "") * 4 > share:
                    ended["message"] = ended["message"].encode()[:share].decode(errors="ignore")


def _owned(status: Object) -> Object:
    out = {k: status[k] for k in _OWNED if status.get(k) is not None}
    out["conditions"] = [
        (c["type"], c["status"], c.get("reason") or "", c.get("message") or "")
        for c in status.get("conditions") or []
        if c["type"] in podutil.KUBELET_CONDITIONS
    ]
    return out


def _same_conditions(current: Object, wanted: Object) -> bool:
    def shown(status: Object) -> dict[str, tuple[Any, ...]]:
        return {c["type"]: (c["status"], c.get("reason"), c.get("message")) for c in status.get("conditions") or []}

    return shown(current) == shown(wanted)


def _merged(record: _Record, current: Object) -> Object:
    """The status to be stored, given what the API holds. Source: mergePodStatus."""
    wanted = dict(record.status)
    to_terminal = not podutil.is_terminal_phase(str(current.get("phase"))) and podutil.is_terminal_phase(wanted["phase"])
    others = [c for c in current.get("conditions") or [] if c["type"] not in podutil.KUBELET_CONDITIONS]
    conditions = []
    for condition in wanted.get("conditions") or []:
        if condition["type"] in podutil.KUBELET_CONDITIONS:
            conditions.append(condition)
        elif condition["type"] == "DisruptionTarget" and to_terminal and not record.may_run:
            others = [*(c for c in others if c["type"] != "DisruptionTarget"), condition]
    if to_terminal and record.may_run:
        wanted["phase"] = current.get("phase") or "Pending"
        for name in ("reason", "message"):
            wanted[name] = current.get(name)
    elif podutil.is_terminal_phase(wanted["phase"]):
        reason = "PodFailed" if wanted["phase"] == "Failed" else "PodCompleted"
        conditions = [_not_ready(c, reason) if c["type"] in ("Ready", "ContainersReady") and c["status"] == "True" else c for c in conditions]
    wanted["conditions"] = others + conditions
    return wanted


def _not_ready(condition: Object, reason: str) -> Object:
    return {**condition, "status": "False", "reason": reason, "lastTransitionTime": clock.now_rfc3339()}


def _patch(current: Object, wanted: Object) -> Object:
    """A strategic merge patch that makes `current` into `wanted` and leaves everything else alone."""
    patch: Object = {}
    for name in _OWNED:
        new = wanted.get(name)
        if new == current.get(name):
            continue
        patch[name] = new
    for name in ("podIPs", "hostIPs"):
        if patch.get(name) and current.get(name):
            patch[name] = [{"$patch": "replace"}, *patch[name]] if name == "podIPs" else patch[name]
    before = {c["type"]: c for c in current.get("conditions") or []}
    after = {c["type"]: c for c in wanted["conditions"]}
    changes: list[Object] = []
    for kind, condition in after.items():
        old = before.get(kind)
        if old == condition:
            continue
        change = dict(condition)
        for gone in ("reason", "message"):
            if old is not None and gone in old and gone not in condition:
                change[gone] = None
        changes.append(change)
    changes += [{"$patch": "delete", "type": kind} for kind in before if kind not in after]
    if changes:
        patch["conditions"] = changes
        patch["$setElementOrder/conditions"] = [{"type": kind} for kind in after]
    return patch
