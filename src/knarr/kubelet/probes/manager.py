"""Runs the probes of every container and keeps their last results by container id.

Caller: pod_sync (`update` after every look at the pod, `stop_*` at its end); on a changed result the pod's worker is woken.
One task per probe of a running container, on a timer: the first try comes at start + initialDelaySeconds, liveness and readiness
wait for the startup probe. Invariant: a result belongs to one container id and never outlives it.
Source: pkg/kubelet/prober.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from knarr.aiokits import clock
from knarr.aiokits.log import get_logger
from knarr.aiokits.tasks import Tasks
from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.observed import Observed
from knarr.kubelet.probes import actions, grpc
from knarr.kubelet.probes.actions import Outcome
from knarr.runtime.cri import ContainerState, ContainerStatus, RuntimeService

log = get_logger(__name__)

Kind = Literal["startup", "liveness", "readiness"]
Event = Callable[[Object, str, str, str, str], None]
"""(pod, container name, type, reason, message)"""

_TRIES = 3
_SETTLE_SECONDS = 1.0
_FIRST_PAUSE_SECONDS = 0.05
_FIELDS: tuple[tuple[Kind, str], ...] = (("startup", "startupProbe"), ("liveness", "livenessProbe"), ("readiness", "readinessProbe"))


@dataclass(slots=True)
class _Running:
    pod: Object
    tasks: dict[tuple[str, Kind], asyncio.Task[None]] = field(default_factory=dict)
    """By container id and kind."""
    ips: list[str] = field(default_factory=list)
    started: dict[str, asyncio.Event] = field(default_factory=dict)
    """Set when the startup probe of this container id has succeeded."""


class Probes:
    """All probes of this node."""

    def __init__(self, runtime: RuntimeService, event: Event, changed: Callable[[str], None], host_ip: Callable[[], str]) -> None:
        self._runtime = runtime
        self._event = event
        self._changed = changed
        self._host_ip = host_ip
        self._pods: dict[str, _Running] = {}
        self._tasks = Tasks()
        self.startup: dict[str, bool] = {}
        self.liveness: dict[str, bool] = {}
        self.readiness: dict[str, bool] = {}

    async def close(self) -> None:
        await self._tasks.close()

    def update(self, pod: Object, observed: Observed) -> None:
        """Start the probes of containers that run now and forget those of containers that do not."""
        specs = [c for c in podutil.all_containers(pod) if any(c.get(f) for _, f in _FIELDS)]
        uid = podutil.uid(pod)
        if not specs and uid not in self._pods:
            return
        running = self._pods.get(uid)
        if running is None:
            running = self._pods[uid] = _Running(pod)
            self._seed(pod)
        running.pod, running.ips = pod, observed.ips
        alive = set()
        for spec in specs:
            status = observed.latest(spec["name"])
            if status is None or status.state is not ContainerState.RUNNING:
                continue
            alive.add(status.id)
            for kind, name in _FIELDS:
                if spec.get(name) and (status.id, kind) not in running.tasks:
                    if kind == "startup":
                        running.started.setdefault(status.id, asyncio.Event())
                        if self.startup.get(status.id):
                            running.started[status.id].set()
                            continue
                    task = self._tasks.spawn(self._run(uid, running, spec, status, kind), f"{kind}-{podutil.key(pod)}/{spec['name']}")
                    running.tasks[status.id, kind] = task
        for container_id, kind in [k for k in running.tasks if k[0] not in alive]:
            running.tasks.pop((container_id, kind)).cancel()
            self._forget(container_id)
            running.started.pop(container_id, None)

    def _seed(self, pod: Object) -> None:
        """After a restart of the kubelet: what was ready and started stays so until a probe says otherwise."""
        status = pod.get("status") or {}
        for entry in (*(status.get("containerStatuses") or []), *(status.get("initContainerStatuses") or [])):
            container_id = str(entry.get("containerID") or "").partition("://")[2]
            if container_id and (entry.get("state") or {}).get("running"):
                if entry.get("started"):
                    self.startup.setdefault(container_id, True)
                if entry.get("ready"):
                    self.readiness.setdefault(container_id, True)

    def _forget(self, container_id: str) -> None:
        for results in (self.startup, self.liveness, self.readiness):
            results.pop(container_id, None)

    def stop_liveness_and_startup(self, pod_uid: str) -> None:
        """The pod is ending: nothing may kill its containers for their health any more."""
        running = self._pods.get(pod_uid)
        for key in [k for k in (running.tasks if running else {}) if k[1] != "readiness"]:
            assert running is not None
            running.tasks.pop(key).cancel()

    def remove(self, pod_uid: str) -> None:
        """Forget the pod."""
        running = self._pods.pop(pod_uid, None)
        if running is None:
            return
        for (container_id, _), task in running.tasks.items():
            task.cancel()
            self._forget(container_id)

    async def _run(self, uid: str, running: _Running, spec: Object, status: ContainerStatus, kind: Kind) -> None:
        """Probe one container until it ends; a failed liveness or startup probe has the last word."""
        probe = spec[dict(_FIELDS)[kind]]
        if kind != "startup" and status.id in running.started:
            await running.started[status.id].wait()
        started_at = status.started_at_ns / 1e9
        delay = started_at + probe.get("initialDelaySeconds", 0) - clock.now()
        if delay > 0:
            await asyncio.sleep(delay)
        results = {"startup": self.startup, "liveness": self.liveness, "readiness": self.readiness}[kind]
        if not probe.get("initialDelaySeconds") and await self._settle(running, spec, status, kind, probe):
            return
        period = max(1, probe.get("periodSeconds") or 10)
        last: bool | None = None
        streak = 0
        next_at = asyncio.get_running_loop().time()
        while True:
            outcome = await self._try(running, spec, status.id, probe)
            if outcome.success == last:
                streak += 1
            else:
                last, streak = outcome.success, 1
            self._tell(running.pod, spec, kind, outcome)
            threshold = probe.get("successThreshold" if outcome.success else "failureThreshold") or (1 if outcome.success else 3)
            if streak >= threshold and results.get(status.id) is not outcome.success:
                first_good_liveness = kind == "liveness" and outcome.success and status.id not in results
                results[status.id] = outcome.success
                if kind == "startup" and outcome.success:
                    running.started[status.id].set()
                if not first_good_liveness:
                    self._changed(uid)
            if kind != "readiness" and results.get(status.id) is False:
                return
            if kind == "startup" and results.get(status.id):
                return
            next_at += period
            await asyncio.sleep(max(0.0, next_at - asyncio.get_running_loop().time()))
            next_at = max(next_at, asyncio.get_running_loop().time() - period)

    async def _settle(self, running: _Running, spec: Object, status: ContainerStatus, kind: Kind, probe: Object) -> bool:
        """The first second of a container: a program that is still starting up is tried often and not blamed.

        Upstream's first try comes about a second after the start. A good answer here counts; True ends the probe (startup).
        """
        settled = status.started_at_ns / 1e9 + _SETTLE_SECONDS
        if kind == "liveness" or (probe.get("successThreshold") or 1) > 1:
            await asyncio.sleep(max(0.0, settled - clock.now()))
            return False
        results = self.startup if kind == "startup" else self.readiness
        pause = _FIRST_PAUSE_SECONDS
        while status.id not in results and clock.now() < settled:
            if (await self._once(running, spec, status.id, probe)).success:
                results[status.id] = True
                if kind == "startup":
                    running.started[status.id].set()
                self._changed(podutil.uid(running.pod))
                if kind == "readiness":
                    await asyncio.sleep(max(1, probe.get("periodSeconds") or 10))
                return kind == "startup"
            await asyncio.sleep(max(0.0, min(pause, settled - clock.now())))
            pause *= 2
        return False

    def _tell(self, pod: Object, spec: Object, kind: Kind, outcome: Outcome) -> None:
        word = kind.capitalize()
        if outcome.warning:
            self._event(pod, spec["name"], "Warning", "ProbeWarning", f"{word} probe warning: {outcome.output}")
        elif not outcome.success and outcome.errored:
            self._event(pod, spec["name"], "Warning", "Unhealthy", f"{word} probe errored and resulted in unknown state: {outcome.output}")
        elif not outcome.success:
            self._event(pod, spec["name"], "Warning", "Unhealthy", f"{word} probe failed: {outcome.output}")

    async def _try(self, running: _Running, spec: Object, container_id: str, probe: Object) -> Outcome:
        outcome = Outcome(False, errored=True)
        for _ in range(_TRIES):
            outcome = await self._once(running, spec, container_id, probe)
            if not outcome.errored:
                break
        return outcome

    async def _once(self, running: _Running, spec: Object, container_id: str, probe: Object) -> Outcome:
        timeout = float(probe.get("timeoutSeconds") or 1)
        try:
            if probe.get("exec"):
                return await actions.run_exec(self._runtime, container_id, probe["exec"].get("command") or [], timeout)
            ip = running.ips[0] if running.ips else self._host_ip()
            if podutil.host_network(running.pod):
                ip = self._host_ip()
            if probe.get("httpGet"):
                source = probe["httpGet"]
                port = actions.resolve_port(spec, source["port"])
                scheme = (source.get("scheme") or "HTTP").lower()
                headers = actions.http_headers(source)
                return await actions.http_get(scheme, source.get("host") or ip, port, source.get("path") or "/", headers, timeout)
            if probe.get("tcpSocket"):
                source = probe["tcpSocket"]
                return await actions.tcp(source.get("host") or ip, actions.resolve_port(spec, source["port"]), timeout)
            if probe.get("grpc"):
                return await grpc.check(ip, probe["grpc"]["port"], probe["grpc"].get("service") or "", timeout)
        except actions.UnknownPort as e:
            return Outcome(False, str(e))
        return Outcome(False, "missing probe handler")
