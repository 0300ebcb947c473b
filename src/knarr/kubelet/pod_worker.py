"""One task per pod: brings the pod to what its newest spec says, then to its end.

Callers: pods.PodWorkers gives updates, wake-ups and termination requests; steps are in pod_sync, pod_start and pod_stop.
Only the latest update is kept. Stages never go back: sync, terminating, terminated, finished. A request to end interrupts what
may take long (image pull, volumes, hooks, waiting for a container to stop), never a call into the runtime that makes something.
Source: pkg/kubelet/pod_workers.go.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from enum import IntEnum
from typing import Any, TypeVar

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.lifecycle import CrashBackOff
from knarr.kubelet.node import Node
from knarr.runtime.cri import LinuxResources

log = get_logger(__name__)
T = TypeVar("T")

_RETRY_SECONDS = 10.0
_END_RETRY_SECONDS = 2.0


class Stage(IntEnum):
    """How far a pod is; only ever grows."""

    SYNC = 0
    TERMINATING = 1
    TERMINATED = 2
    FINISHED = 3


class PodEnding(Exception):
    """What was being done for a running pod is given up, because the pod is to end."""


class PodWorker:
    """The life of one pod on this node."""

    def __init__(self, node: Node, pod: Object) -> None:
        self.node = node
        self.pod = pod
        self.uid = podutil.uid(pod)
        self.key = podutil.key(pod)
        self.stage = Stage.SYNC
        self.orphan = False
        """Known from the runtime only: the API server has no such pod."""
        self.removed = False
        """Its source has no such pod any more: it was deleted without waiting for its end."""
        self.grace_seconds: int | None = None
        self.evict: tuple[str, str] | None = None
        """(reason, message) that the pod fails with when something other than its deletion ended it."""
        self.evict_condition: Object | None = None
        self.reasons: dict[str, tuple[str, str]] = {}
        self.back_off = CrashBackOff(node.config.crash_loop_initial_seconds, node.config.crash_loop_max_seconds)
        self.backing_off: dict[str, float] = {}
        """Container to the end of the run whose back-off has been told in an event."""
        self.ips: list[str] = []
        self.group_limits: LinuxResources | None = None
        """What the pod's own cgroup was last told."""
        self.volumes_ready = False
        self.volumes_dirty = True
        self.hooks_done: set[str] = set()
        """Containers whose preStop hook has been run."""
        self.messages: dict[str, str] = {}
        """Container id to its termination message."""
        self.admitted_at = clock.now()
        self.pulling_seconds = 0.0
        """Time spent on images so far: no matter of the node's."""
        self.started = podutil.phase(pod) == "Running"
        """Whether the pod's containers have been seen running."""
        self.task: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._wake.set()
        self._ending = asyncio.Event()
        self._sooner = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due = 0.0
        self._refresh: asyncio.TimerHandle | None = None

    # --- requests from outside: plain functions, never waiting ---

    def update(self, pod: Object) -> None:
        """Take a newer version of the pod."""
        self.pod = pod
        self.volumes_dirty = True
        if podutil.is_deleted(pod):
            grace = pod["metadata"].get("deletionGracePeriodSeconds")
            self.terminate(int(grace) if grace is not None else None)
        elif podutil.is_terminal_phase(podutil.phase(pod)):
            self.terminate(None)
        if self.stage is Stage.FINISHED:
            self.node.status.resend(self.uid)
        self.wake()

    def terminate(self, grace_seconds: int | None, evict: tuple[str, str] | None = None, condition: Object | None = None) -> None:
        """Ask for the pod's end; a shorter grace period than before takes effect at once."""
        if evict is not None and self.evict is None:
            self.evict, self.evict_condition = evict, condition
        if grace_seconds is not None:
            grace_seconds = max(1, grace_seconds)
            if self.grace_seconds is not None and grace_seconds >= self.grace_seconds:
                grace_seconds = self.grace_seconds
            elif self._ending.is_set():
                self._sooner.set()
            self.grace_seconds = grace_seconds
        self._ending.set()
        self.wake()

    @property
    def ending(self) -> bool:
        return self._ending.is_set()

    def wake(self) -> None:
        """Look at the pod again as soon as possible."""
        self._wake.set()

    async def woken(self) -> None:
        """Wait for a reason to look at the pod again. For who is the only one to wait."""
        await self._wake.wait()
        self._wake.clear()

    def wake_after(self, seconds: float) -> None:
        """Look at the pod again after this time, unless an earlier time was asked for."""
        loop = asyncio.get_running_loop()
        when = loop.time() + max(0.0, seconds)
        # Asked of ourselves: for less than a millisecond the loop gives a handle that knows no time.
        if self._timer is not None and not self._timer.cancelled() and loop.time() < self._timer_due <= when:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_due = loop.call_at(when, self.wake), when

    def refresh_after(self, seconds: float) -> None:
        """Write the volumes anew after this time, instead of when it was asked for before: a token will be old then."""
        if self._refresh is not None:
            self._refresh.cancel()
        self._refresh = asyncio.get_running_loop().call_later(seconds, self.objects_changed)

    def objects_changed(self) -> None:
        """A ConfigMap or Secret that the pod uses became another."""
        self.volumes_dirty = True
        self.wake()

    # --- for the steps ---

    async def interruptible(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Wait for something that the pod's end makes pointless.

        Raises:
          PodEnding: the end was asked for; the coroutine has been cancelled and has ended.
        """
        if self._ending.is_set():
            coroutine.close()
            raise PodEnding
        try:
            work = self.node.tasks.spawn(_shield_error(coroutine), f"step-{self.key}")
            ending = self.node.tasks.spawn(self._ending.wait(), f"ending-{self.key}")
        except RuntimeError as e:
            # The kubelet itself is ending.
            coroutine.close()
            raise PodEnding from e
        # A task cancelled before its first step never touched what it was to await.
        work.add_done_callback(lambda _: coroutine.close())
        try:
            await asyncio.wait({work, ending}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                work.cancel()
                await asyncio.wait({work})
                raise PodEnding
            value, error = work.result()
            if error is not None:
                raise error
            return value  # type: ignore[return-value]
        finally:
            ending.cancel()
            if not work.done():
                work.cancel()

    async def until_sooner(self, coroutine: Coroutine[Any, Any, None]) -> bool:
        """Wait for a stop; False when a shorter grace period interrupted it."""
        self._sooner.clear()
        work = self.node.tasks.spawn(_shield_error(coroutine), f"stop-{self.key}")
        work.add_done_callback(lambda _: coroutine.close())
        sooner = self.node.tasks.spawn(self._sooner.wait(), f"sooner-{self.key}")
        try:
            await asyncio.wait({work, sooner}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                return False
            _, error = work.result()
            if error is not None:
                raise error
            return True
        finally:
            sooner.cancel()
            if not work.done():
                work.cancel()
                await asyncio.wait({work})

    # --- the task ---

    async def run(self) -> None:
        """Live until the pod has ended and is cleaned up."""
        from knarr.kubelet import pod_stop, pod_sync

        operation = "create"
        self.node.meters.observe("kubelet_pod_worker_start_duration_seconds", clock.now() - self.admitted_at)
        try:
            while not self.ending:
                await self.woken()
                if self.ending:
                    break
                await self._guarded(pod_sync.sync(self), _RETRY_SECONDS, operation)
                operation = "sync"
            self.stage = max(self.stage, Stage.TERMINATING)
            while self.stage is Stage.TERMINATING:
                if await self._guarded(pod_stop.terminate(self), 0, "kill"):
                    self.stage = Stage.TERMINATED
                else:
                    await asyncio.sleep(_END_RETRY_SECONDS)
            while self.stage is Stage.TERMINATED:
                if await self._guarded(pod_stop.clean_up(self), 0, "cleanup"):
                    self.stage = Stage.FINISHED
                else:
                    await asyncio.sleep(_END_RETRY_SECONDS)
        finally:
            # Or the loop would keep the pod until then.
            for timer in (self._timer, self._refresh):
                if timer is not None:
                    timer.cancel()

    async def _guarded(self, step: Coroutine[Any, Any, None], retry_seconds: float, operation: str) -> bool:
        """Run a step; a fault is logged and the step tried again later. False on a fault. `operation` is its name in the metrics."""
        begun = time.monotonic()
        try:
            await step
            return True
        except PodEnding:
            return True
        except Exception as e:
            log.error("pod step failed", pod=self.key, stage=self.stage.name, error=repr(e), exc_info=e)
            if retry_seconds:
                self.wake_after(retry_seconds)
            return False
        finally:
            self.node.meters.observe("kubelet_pod_worker_duration_seconds", time.monotonic() - begun, f'operation_type="{operation}"')


async def _shield_error(coroutine: Coroutine[Any, Any, T]) -> tuple[T | None, Exception | None]:
    """Give an expected error back as a value, so that the task's owner does not log it as a fault."""
    try:
        return await coroutine, None
    except Exception as e:
        return None, e
