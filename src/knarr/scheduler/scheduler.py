"""The scheduler component: informers in, bindings out.

One loop takes pods from the queue and runs their cycles one after another; a cycle never awaits
(unless extenders are configured), so that it sees one state of the world. What it decides is
assumed in the node table at once and written to the API by the dispatcher. Event handlers keep
table, objects and queue current. Callers: the cluster's process for the control plane, tests.

Source: pkg/scheduler/scheduler.go, schedule_one.go, eventhandlers.go.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import Any

import numpy as np

from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.errors import StatusError
from knarr.api.resources import PODS
from knarr.client.events import EventRecorder
from knarr.client.informer import Family, Informers
from knarr.client.rest import Client
from knarr.http.errors import HTTPError
from knarr.scheduler import queue
from knarr.scheduler.algorithm import Algorithm, Found
from knarr.scheduler.announcer import Announcer
from knarr.scheduler.config import SchedulerConfig, shown_configuration
from knarr.scheduler.dispatcher import Dispatcher
from knarr.scheduler.dra.writer import ClaimWriter
from knarr.scheduler.events import ASSIGNED_POD_DELETE
from knarr.scheduler.extender import Extenders
from knarr.scheduler.framework import Cycle, Diagnosis, PluginError, Profile, Refusal, Rejection
from knarr.scheduler.handle import Handle
from knarr.scheduler.handlers import NOT_FINISHED, EventHandlers, pod_transform
from knarr.scheduler.metrics import Metrics
from knarr.scheduler.plugins.preemption import Candidate, Decision, DefaultPreemption, choose
from knarr.scheduler.podinfo import PodInfo
from knarr.scheduler.queue import QueuedPod, SchedulingQueue
from knarr.scheduler.registry import build_profile
from knarr.scheduler.status import StatusWriter
from knarr.scheduler.volume_writer import APIVolumeWriter
from knarr.scheduler.why import Diagnoses, report

log = get_logger(__name__)

_SLICE_SECONDS = 0.005
_NOTE_CHARACTERS = 1024
NO_NODES = "no nodes available to schedule pods"


class Scheduler:
    """See the module.

    Args:
      client: with the rights of system:kube-scheduler.
      informers: shared with other components of the process; own ones when None.
      family: whose informers keep objects together with its own.
    """

    def __init__(
        self, client: Client, config: SchedulerConfig | None = None, *, informers: Informers | None = None, family: Family | None = None
    ) -> None:
        self.config = config or SchedulerConfig()
        self.client = client
        self._own_informers = informers is None
        self.informers = informers or Informers(client, family)
        self.optional_informers = Informers(client)
        """Of kinds that need not be served."""
        self.handle = Handle(randomness=random.Random(self.config.random_seed), feature_gates=self.config.feature_gates)
        self.profiles: dict[str, Profile] = {p.scheduler_name: build_profile(p, self.handle) for p in self.config.profiles}
        self.pod_transform = pod_transform(self.config.extenders)
        self.metrics = Metrics()
        self.diagnoses = Diagnoses()
        self.ready = asyncio.Event()
        """Set once the first lists are in."""

    def _start(self) -> None:
        loop = asyncio.get_running_loop()
        config = self.config
        self.queue = SchedulingQueue(
            self.profiles,
            self.handle.shapes,
            loop.time,
            initial_backoff_seconds=config.pod_initial_backoff_seconds,
            maximum_backoff_seconds=config.pod_max_backoff_seconds,
        )
        self.algorithm = Algorithm(self.handle, self.queue.nominator, percentage_of_nodes_to_score=config.percentage_of_nodes_to_score)
        self.dispatcher = Dispatcher(config.binders)
        self.recorders = {name: EventRecorder(self.client, name, api="events.k8s.io/v1") for name in self.profiles}
        self.announcer = Announcer(self.recorders.get, self.dispatcher)
        self.extenders = Extenders(config.extenders, self.handle.table) if config.extenders else None
        self.volume_writer = self.handle.volume_writer = APIVolumeWriter(self.client, self.handle)
        self.handle.claim_writer = ClaimWriter(self.client, self.handle.claims)
        self.handle.submit = self.dispatcher.submit
        self.status = StatusWriter(self.client, self.handle, self.queue, self.dispatcher, self.recorders)
        self.handlers = EventHandlers(self)

    async def run(self) -> None:
        """Schedule until cancelled. Bindings under way at that moment may or may not have been written."""
        self._start()
        self.handlers.register(self.informers)
        await self.informers.start()
        await self.optional_informers.start()
        tasks = Tasks()
        tasks.spawn_eternal(self.announcer.run(), "scheduler-announcer")
        try:
            await self.informers.wait_synced()
            self.ready.set()
            log.info("scheduler is ready", profiles=",".join(self.profiles), nodes=len(self.handle.table))
            await self._loop()
        finally:
            self.ready.clear()
            await tasks.close()
            await self.dispatcher.close()
            for recorder in self.recorders.values():
                await recorder.close()
            if self.extenders is not None:
                await self.extenders.close()
            await self.optional_informers.close()
            if self._own_informers:
                await self.informers.close()

    def exposition(self) -> bytes:
        """Give the metrics as text, under upstream's names; to be called while it runs."""
        counts = self.queue.counts()
        gated = sum(queued.gated_by is not None for queued in self.queue.waiting())
        pending = {
            "active": counts[queue.ACTIVE],
            "backoff": counts[queue.BACKOFF] + counts[queue.ERROR_BACKOFF],
            "unschedulable": counts[queue.UNSCHEDULABLE] - gated,
            "gated": gated,
        }
        sizes = {"nodes": len(self.handle.table), "pods": len(self.handlers.placed), "assumed_pods": len(self.handlers.assumed)}
        held_back = Counter((plugin, queued.info.shape.scheduler_name) for queued in self.queue.waiting() for plugin in queued.plugins)
        incoming: Counter[tuple[str, str]] = Counter()
        for (place, happened), number in self.queue.incoming.items():
            incoming["backoff" if place == queue.ERROR_BACKOFF else place, happened] += number
        return self.metrics.exposition(pending, sizes, held_back, incoming)

    def settings(self) -> dict[str, Any]:
        """What /configz shows: a KubeSchedulerConfiguration."""
        return {"componentconfig": shown_configuration(self.config)}

    def why(self, namespace: str, name: str) -> dict[str, Any] | None:
        """All that this scheduler knows of a pod, see why.report; None for a pod that it has not seen or that has finished."""
        if not self.ready.is_set():
            return None
        pod = self.informers.get(PODS, field_selector=NOT_FINISHED, transform=self.pod_transform).get(namespace, name)
        if pod is None:
            return None
        queued = self.queue.pods.get(pod["metadata"]["uid"])
        info = queued.info if queued is not None else PodInfo(pod, self.handle.shapes)
        return report(self.handle, self.profiles, self.diagnoses, info, queued)

    async def _loop(self) -> None:
        while True:
            deadline = time.perf_counter() + _SLICE_SECONDS
            busy = False
            while (queued := self.queue.pop_nowait()) is not None:
                busy = True
                if self.extenders is not None:
                    await self._schedule_with_extenders(queued)
                else:
                    self.schedule_one(queued)
                if time.perf_counter() > deadline:
                    break
            if not busy:
                await self.queue.wait()
            elif self.dispatcher.full:
                # Deciding further ahead of the API gains nothing and makes the decisions older.
                await asyncio.sleep(0.001)
            else:
                await asyncio.sleep(0)

    # One pod.

    def _skip(self, queued: QueuedPod) -> bool:
        info = queued.info
        if info.deleting:
            self.record(info, "Warning", "FailedScheduling", f"skip schedule deleting pod: {info.key}", "Scheduling")
        elif info.uid not in self.handlers.assumed and info.shape.scheduler_name in self.profiles:
            return False
        self.queue.done(info.uid)
        return True

    def schedule_one(self, queued: QueuedPod) -> None:
        """Run the cycle of a popped pod to its end: assumed and on the way to its node, or back in the queue."""
        if self._skip(queued):
            return
        started = time.perf_counter()
        profile = self.profiles[queued.info.shape.scheduler_name]
        try:
            result = self.algorithm.schedule(profile, queued.info)
        except Exception as error:
            self._error(queued, error)
            return
        self.metrics.chosen(time.perf_counter() - started)
        self._conclude(profile, queued, result, started)

    async def _schedule_with_extenders(self, queued: QueuedPod) -> None:
        if self._skip(queued):
            return
        assert self.extenders is not None
        started = time.perf_counter()
        profile = self.profiles[queued.info.shape.scheduler_name]
        try:
            result = await self.algorithm.schedule_with(profile, queued.info, self.extenders)
            candidates = None
            if isinstance(result, Diagnosis):
                candidates = self._candidates(profile, queued.info, result)
                if isinstance(candidates, list):
                    candidates = await self.extenders.preempt(queued.info, candidates)
        except Exception as error:
            self._error(queued, error)
            return
        self._conclude(profile, queued, result, started, candidates)

    def _conclude(
        self,
        profile: Profile,
        queued: QueuedPod,
        result: Found | Diagnosis,
        started: float,
        candidates: Decision | list[Candidate] | None = None,
    ) -> None:
        if isinstance(result, Found):
            self.metrics.scheduled(profile.name, time.perf_counter() - started)
            self._assume(profile, queued, result)
            return
        self.metrics.unschedulable(profile.name, time.perf_counter() - started)
        if candidates is None:
            candidates = self._candidates(profile, queued.info, result)
        self._refuse(queued, result, candidates)

    def _candidates(self, profile: Profile, info: PodInfo, diagnosis: Diagnosis) -> Decision | list[Candidate]:
        if not diagnosis.nodes or diagnosis.cycle is None:
            return Decision(None, "")
        cycle = diagnosis.cycle
        told = [message for plugin in profile.post_filters if (message := plugin.post_filter(cycle))]
        plugin = profile.plugin("DefaultPreemption") if profile.post_filter_enabled else None
        if not isinstance(plugin, DefaultPreemption):
            return Decision(None, ", ".join(told))
        self.metrics.preemption_attempts.inc()
        found = plugin.find(profile, info, diagnosis, self.queue.nominator)
        if isinstance(found, Decision) and found.message:
            found.message = ", ".join([*told, found.message])
        return found

    # A node was found.

    def _assume(self, profile: Profile, queued: QueuedPod, found: Found) -> None:
        info, name = queued.info, found.node_name
        self.handlers.assume(info, name)
        self.queue.nominator.remove(info.uid)
        try:
            refusal = profile.reserve(found.cycle, name)
        except PluginError as error:
            self._unreserve(profile, found.cycle, info, name)
            self._error(queued, error)
            return
        if refusal is not None:
            self._unreserve(profile, found.cycle, info, name)
            self._refuse(queued, _refused_late(found, refusal), Decision(None, ""))
            return
        self.diagnoses.forget(info.uid)
        self.dispatcher.submit(info.uid, self._bind, profile, queued, found)

    def _unreserve(self, profile: Profile, cycle: Cycle, info: PodInfo, node_name: str) -> None:
        for plugin in reversed(profile.reserves):
            plugin.unreserve(cycle, node_name)
        self.handlers.forget(info)

    async def _bind(self, profile: Profile, queued: QueuedPod, found: Found) -> None:
        info, name = queued.info, found.node_name
        try:
            for plugin in profile.pre_binds:
                if not plugin.pre_bind_skips(found.cycle, name):
                    await plugin.pre_bind(found.cycle, name)
            if self.extenders is None or not await self.extenders.bind(info, name):
                await self.client.request(
                    "POST",
                    f"/api/v1/namespaces/{info.namespace}/pods/{info.name}/binding",
                    body={
                        "apiVersion": "v1",
                        "kind": "Binding",
                        "metadata": {"name": info.name, "namespace": info.namespace, "uid": info.uid},
                        "target": {"kind": "Node", "name": name},
                    },
                )
        except (StatusError, HTTPError, PluginError, OSError) as error:
            self._unreserve(profile, found.cycle, info, name)
            # The place it had counted on is free again for others.
            self.queue.move(ASSIGNED_POD_DELETE, info.pod, None)
            self._error(queued, error)
            return
        self.queue.done(info.uid)
        waited = asyncio.get_running_loop().time() - queued.added
        self.metrics.bound(profile.name, waited, queued.attempts)
        self.announcer.note(info, name)

    # No node was found, or something failed.

    def _refuse(self, queued: QueuedPod, diagnosis: Diagnosis, candidates: Decision | list[Candidate]) -> None:
        info = queued.info
        current = self.handlers.pending(info.uid)
        if current is None:
            # Deleted or bound meanwhile (only possible with extenders).
            self.queue.done(info.uid)
            return
        nominated: str | None = None
        chosen = choose(candidates) if isinstance(candidates, list) and candidates else None
        if chosen is not None:
            nominated = chosen.node_name
        elif isinstance(candidates, Decision):
            diagnosis.post_filter_message = candidates.message
            nominated = "" if candidates.clears else None
        message = diagnosis.message() if diagnosis.nodes else NO_NODES
        queued.info = current
        queued.plugins, queued.pending_plugins = set(diagnosis.plugins), set(diagnosis.pending_plugins)
        if not diagnosis.nodes:
            # Any node may help; waiting for one beats trying again and again.
            queued.plugins = {p.name for p in self.profiles[info.shape.scheduler_name].filters}
        self.diagnoses.note(current, diagnosis, message, self.handle.table)
        if chosen is not None:
            self.metrics.preemption_victims.observe(len(chosen.victims))
            self.status.preempt(current, chosen)
        self.queue.add_unschedulable(queued, is_error=False)
        if nominated is not None:
            self.queue.nominator.set(current, nominated)
        self.record(current, "Warning", "FailedScheduling", message, "Scheduling")
        self.status.refused(current, "Unschedulable", message, nominated)

    def _error(self, queued: QueuedPod, error: Exception) -> None:
        info = queued.info
        expected = isinstance(error, StatusError | HTTPError | PluginError | OSError)
        log.warning("scheduling a pod failed, will retry", pod=info.key, error=repr(error), exc_info=None if expected else error)
        self.metrics.errors(info.shape.scheduler_name)
        current = self.handlers.pending(info.uid)
        if current is None:
            self.queue.done(info.uid)
            return
        queued.info = current
        queued.plugins, queued.pending_plugins = set(), set()
        self.queue.add_unschedulable(queued, is_error=True)
        self.record(current, "Warning", "FailedScheduling", str(error), "Scheduling")
        self.status.refused(current, "SchedulerError", str(error), None)

    def record(self, info: PodInfo, kind: str, reason: str, message: str, action: str) -> None:
        """Record an event about a pod."""
        if len(message) > _NOTE_CHARACTERS:
            message = message[: _NOTE_CHARACTERS - 4] + " ..."
        recorder = self.recorders.get(info.shape.scheduler_name)
        if recorder is not None:
            recorder.event(info.pod, kind, reason, message, action=action)


def _refused_late(found: Found, refusal: Refusal) -> Diagnosis:
    """The chosen node was refused by reserve or permit: a diagnosis of that one node."""
    diagnosis = Diagnosis(nodes=1)
    rows = np.array([found.row], dtype=np.intp)
    diagnosis.add(Rejection(refusal.plugin, rows, [(refusal.reason, None)], refusal.unresolvable))
    return diagnosis
