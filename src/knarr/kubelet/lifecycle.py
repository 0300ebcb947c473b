"""The life of a pod as a pure computation: what the runtime holds and what the spec wants in, instructions out.

Callers: pod_sync executes the plan; tests replay it. Nothing here does I/O, reads a clock, or changes its input. The only state is `CrashBackOff`, which the caller owns per pod and feeds with times.
Invariants: init containers run one after another, in order, before the main ones; a sidecar (restartable init container)
lets the next one start as soon as it has started; a pod whose every container is done gets `kill_pod` without a new sandbox.
Source: pkg/kubelet/kuberuntime/kuberuntime_manager.go computePodActions, kuberuntime_container.go
computeInitContainerActions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from knarr.api.types import Object
from knarr.kubelet import podutil
from knarr.kubelet.observed import Observed
from knarr.runtime.cri import ContainerState, ContainerStatus, SandboxState

KillReason = Literal["", "startup", "liveness", "unknown", "resize"]

HASH_ANNOTATION = "io.kubernetes.container.hash"


@dataclass(frozen=True, slots=True)
class Kill:
    """Stop one container; message becomes the Killing event."""

    container_id: str
    name: str
    message: str
    reason: KillReason = ""


@dataclass(slots=True)
class Plan:
    """Instructions in the order of their execution: kills, sandbox, ephemeral, init, updates, main containers."""

    kill_pod: bool = False
    create_sandbox: bool = False
    sandbox_id: str = ""
    """The newest sandbox; with create_sandbox, the one that is given up ("" at a pod's first start)."""
    attempt: int = 0
    kills: list[Kill] = field(default_factory=list)
    ephemeral: list[str] = field(default_factory=list)
    init: list[str] = field(default_factory=list)
    start: list[str] = field(default_factory=list)
    update: list[str] = field(default_factory=list)
    """Running containers whose cgroup must get new resources."""

    def nothing_to_do(self) -> bool:
        return not (self.kill_pod or self.create_sandbox or self.kills or self.ephemeral or self.init or self.start or self.update)


@dataclass(slots=True)
class ProbeView:
    """Last known probe results by container id; a missing id means that the probe has not answered yet."""

    liveness: Mapping[str, bool] = field(default_factory=dict)
    startup: Mapping[str, bool] = field(default_factory=dict)


def sandbox_changed(pod: Object, observed: Observed) -> tuple[bool, int, str]:
    """Whether a new sandbox is needed, its attempt number, and the newest sandbox's id.

    Source: pkg/kubelet/kuberuntime/util PodSandboxChanged.
    """
    if not observed.sandboxes:
        return True, 0, ""
    newest = observed.sandboxes[0]
    ready = sum(1 for s in observed.sandboxes if s.state is SandboxState.READY)
    if ready > 1 or newest.state is not SandboxState.READY:
        return True, newest.metadata.attempt + 1, newest.id
    wanted = "NODE" if podutil.host_network(pod) else "POD"
    if newest.namespaces.network != wanted:
        return True, newest.metadata.attempt + 1, ""
    if wanted == "POD" and not newest.ips:
        return True, newest.metadata.attempt + 1, newest.id
    return False, newest.metadata.attempt, newest.id


def compute(
    pod: Object, observed: Observed, probes: ProbeView, *, resizes: Mapping[str, Literal["update", "restart"]] | None = None
) -> Plan:
    """What to do next for a pod that should run.

    Args:
      resizes: container name to what a pending in-place resize asks for.
    """
    create, attempt, sandbox_id = sandbox_changed(pod, observed)
    plan = Plan(kill_pod=create, create_sandbox=create, sandbox_id=sandbox_id, attempt=attempt)
    if create:
        _plan_new_sandbox(pod, observed, plan)
        return plan
    for spec in podutil.ephemeral_containers(pod):
        if observed.latest(spec["name"]) is None:
            plan.ephemeral.append(spec["name"])
    if not _plan_init(pod, observed, probes, plan, resizes or {}) or plan.kill_pod:
        return plan
    keep = 0
    for spec in podutil.containers(pod):
        keep += _plan_main(pod, spec, observed, probes, plan, resizes or {})
    if keep == 0 and not plan.start:
        plan.kill_pod = True
        plan.init = []
    return plan


def _plan_new_sandbox(pod: Object, observed: Observed, plan: Plan) -> None:
    if podutil.restart_policy(pod) == "Never" and plan.attempt != 0 and observed.containers:
        if not any(podutil.is_restartable(pod, c) for c in podutil.containers(pod)):
            plan.create_sandbox = False
            return
    start = []
    for spec in podutil.containers(pod):
        policy = spec.get("restartPolicy") or podutil.restart_policy(pod)
        latest = observed.latest(spec["name"])
        succeeded = latest is not None and latest.state is ContainerState.EXITED and latest.exit_code == 0
        if policy == "OnFailure" and succeeded:
            continue
        start.append(spec["name"])
    if not start and any(observed.latest(c["name"]) for c in podutil.containers(pod)):
        plan.create_sandbox = False
        return
    inits = podutil.init_containers(pod)
    if inits:
        plan.init = [inits[0]["name"]]
    else:
        plan.start = start


def should_be_restarted(pod: Object, spec: Object, observed: Observed) -> bool:
    """Whether a container that does not run is to be started (again).

    Source: pkg/kubelet/container ShouldContainerBeRestarted.
    """
    if podutil.is_deleted(pod):
        return False
    latest = observed.latest(spec["name"])
    if latest is None:
        return True
    if latest.state is ContainerState.RUNNING:
        return False
    if latest.state is not ContainerState.EXITED:
        return True
    return podutil.should_restart_after_exit(pod, spec, latest.exit_code)


def definition_changed(spec: Object, status: ContainerStatus) -> bool:
    """Whether the spec's image is another one than that of the running container."""
    stored = status.annotations.get(HASH_ANNOTATION)
    return stored is not None and stored != podutil.container_hash(spec)


def _plan_main(
    pod: Object, spec: Object, observed: Observed, probes: ProbeView, plan: Plan, resizes: Mapping[str, Literal["update", "restart"]]
) -> int:
    """Plan one main container; 1 when it is kept running."""
    name = spec["name"]
    status = observed.latest(name)
    if status is None or status.state is not ContainerState.RUNNING:
        if should_be_restarted(pod, spec, observed):
            plan.start.append(name)
            if status is not None and status.state is ContainerState.UNKNOWN:
                plan.kills.append(
                    Kill(status.id, name, 'Container is in "unknown" state, try killing it before restart', "unknown")
                )
        return 0
    restart = (spec.get("restartPolicy") or podutil.restart_policy(pod)) != "Never"
    reason: KillReason = ""
    if definition_changed(spec, status):
        message, restart = f"Container {name} definition changed", True
    elif probes.liveness.get(status.id) is False:
        message, reason = f"Container {name} failed liveness probe", "liveness"
    elif probes.startup.get(status.id) is False:
        message, reason = f"Container {name} failed startup probe", "startup"
    elif resizes.get(name) == "restart":
        message, reason, restart = f"Container {name} resize requires restart", "resize", True
    else:
        if resizes.get(name) == "update":
            plan.update.append(name)
        return 1
    if restart:
        message += ", will be restarted"
        plan.start.append(name)
    plan.kills.append(Kill(status.id, name, message, reason))
    return 0


def _plan_init(
    pod: Object, observed: Observed, probes: ProbeView, plan: Plan, resizes: Mapping[str, Literal["update", "restart"]]
) -> bool:
    """Plan the init containers; True when the main containers may run.

    Walks backwards: finished init containers may be gone from the runtime, so only the last one found counts.
    """
    inits = podutil.init_containers(pod)
    if not inits:
        return True
    initialized = any(
        (s := observed.latest(c["name"])) is not None and s.state in (ContainerState.CREATED, ContainerState.RUNNING)
        for c in podutil.containers(pod)
    )
    previously = initialized
    backwards: list[int] = []
    for index in range(len(inits) - 1, -1, -1):
        spec = inits[index]
        sidecar = podutil.is_sidecar(spec)
        status = observed.latest(spec["name"])
        if status is None:
            if previously and sidecar:
                backwards.append(index)
            continue
        if previously and not sidecar:
            continue
        verdict = _plan_one_init(pod, inits, index, status, observed, probes, plan, resizes, previously=previously)
        if verdict is None:
            plan.kill_pod, plan.init = True, []
            return False
        starts, done = verdict
        backwards.extend(starts)
        initialized = initialized or done
        previously = True
    if not previously:
        backwards.append(0)
    plan.init = [inits[i]["name"] for i in reversed(backwards)]
    return initialized


def _plan_one_init(
    pod: Object,
    inits: list[Object],
    index: int,
    status: ContainerStatus,
    observed: Observed,
    probes: ProbeView,
    plan: Plan,
    resizes: Mapping[str, Literal["update", "restart"]],
    *,
    previously: bool,
) -> tuple[list[int], bool] | None:
    """(containers to start in backward order, initialization complete); None when the pod has failed."""
    spec = inits[index]
    last = index == len(inits) - 1
    if status.state is ContainerState.CREATED:
        return [index], False
    if podutil.is_sidecar(spec):
        if status.state is ContainerState.EXITED:
            return [index], False
        if status.state is ContainerState.UNKNOWN:
            plan.kills.append(
                Kill(status.id, spec["name"], 'Init container is in "unknown" state, try killing it before restart', "unknown")
            )
            return [index], False
        return _plan_running_sidecar(spec, index, last, status, probes, plan, resizes, previously=previously)
    if status.state is ContainerState.RUNNING:
        return [], False
    failed = status.state is ContainerState.UNKNOWN or status.exit_code != 0
    if not failed:
        return ([], True) if last else ([index + 1], False)
    if status.state is ContainerState.UNKNOWN:
        if (spec.get("restartPolicy") or podutil.restart_policy(pod)) == "Never":
            return None
        plan.kills.append(
            Kill(status.id, spec["name"], 'Init container is in "unknown" state, try killing it before restart', "unknown")
        )
        return [index], False
    if not should_be_restarted(pod, spec, observed):
        return None
    return [index], False


def _plan_running_sidecar(
    spec: Object,
    index: int,
    last: bool,
    status: ContainerStatus,
    probes: ProbeView,
    plan: Plan,
    resizes: Mapping[str, Literal["update", "restart"]],
    *,
    previously: bool,
) -> tuple[list[int], bool]:
    name = spec["name"]
    if spec.get("startupProbe"):
        started = probes.startup.get(status.id)
        if started is None:
            return [], False
        if not started:
            plan.kills.append(Kill(status.id, name, f"Init container {name} failed startup probe", "startup"))
            return [index], False
    starts: list[int] = [] if last or previously else [index + 1]
    if definition_changed(spec, status):
        plan.kills.append(Kill(status.id, name, f"Init container {name} definition changed"))
        return [*starts, index], last
    if spec.get("livenessProbe") and probes.liveness.get(status.id) is False:
        plan.kills.append(Kill(status.id, name, f"Init container {name} failed liveness probe", "liveness"))
        return [*starts, index], last
    if resizes.get(name) == "restart":
        plan.kills.append(Kill(status.id, name, f"Init container {name} resize requires restart", "resize"))
        return [*starts, index], last
    if resizes.get(name) == "update":
        plan.update.append(name)
    return starts, last


class CrashBackOff:
    """Delays between restarts of the containers of one pod: initial, doubling to a maximum, forgotten after a long run.

    Times are epoch seconds; the reference is the end of the last run. Source: client-go flowcontrol.Backoff.
    """

    def __init__(self, initial_seconds: float, maximum_seconds: float) -> None:
        self._initial = initial_seconds
        self._maximum = maximum_seconds
        self._entries: dict[str, tuple[float, float]] = {}

    def delay(self, key: str) -> float:
        """The current delay in seconds; 0 for an unknown key."""
        return self._entries.get(key, (0.0, 0.0))[0]

    def remaining(self, key: str, finished_at: float, now: float) -> float:
        """Seconds until a restart is allowed; 0 when it is allowed now."""
        entry = self._entries.get(key)
        if entry is None or self._expired(finished_at, entry[1]):
            return 0.0
        return max(0.0, finished_at + entry[0] - now)

    def next(self, key: str, finished_at: float, now: float) -> None:
        """Record a restart: the next one waits longer."""
        entry = self._entries.get(key)
        if entry is None or self._expired(finished_at, entry[1]):
            delay = self._initial
        else:
            delay = min(entry[0] * 2, self._maximum)
        self._entries[key] = (delay, now)

    def _expired(self, finished_at: float, updated: float) -> bool:
        return finished_at - updated > 2 * self._maximum


@dataclass(frozen=True, slots=True)
class StopStep:
    """One container to stop and the names whose end it waits for first."""

    container: ContainerStatus
    after: tuple[str, ...] = ()


def stop_order(pod: Object, running: list[ContainerStatus]) -> list[StopStep]:
    """In which order the containers of a pod end: main ones together, then sidecars in reverse of their start.

    Source: pkg/kubelet/kuberuntime/kuberuntime_termination_order.go, KEP-753.
    """
    if not podutil.has_sidecars(pod):
        return [StopStep(c) for c in running]
    names = {c.metadata.name for c in running}
    mains = tuple(c["name"] for c in podutil.containers(pod) if c["name"] in names)
    sidecars = [c["name"] for c in podutil.init_containers(pod) if podutil.is_sidecar(c)]
    steps = []
    for status in running:
        name = status.metadata.name
        if name in sidecars:
            later = tuple(n for n in sidecars[sidecars.index(name) + 1 :] if n in names)
            steps.append(StopStep(status, later + mains))
        else:
            steps.append(StopStep(status))
    return steps
