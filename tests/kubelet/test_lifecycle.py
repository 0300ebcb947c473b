"""The pod's life as a computation: what is there and what is wanted in, instructions out."""

from __future__ import annotations

from typing import Any

from knarr.kubelet.lifecycle import CrashBackOff, Plan, ProbeView, compute, stop_order
from knarr.kubelet.observed import Observed
from knarr.kubelet.podutil import container_hash
from knarr.runtime.cri import (
    ContainerMetadata,
    ContainerState,
    ContainerStatus,
    PodSandboxMetadata,
    PodSandboxStatus,
    SandboxState,
)


def pod(*containers: dict[str, Any], init: tuple[dict[str, Any], ...] = (), policy: str = "Always", **spec: Any) -> dict[str, Any]:
    body = {"containers": list(containers), "initContainers": list(init), "restartPolicy": policy, **spec}
    return {"metadata": {"name": "p", "namespace": "n", "uid": "u"}, "spec": body, "status": {}}


def c(name: str, **fields: Any) -> dict[str, Any]:
    return {"name": name, "image": "i", **fields}


def sandbox(state: SandboxState = SandboxState.READY, attempt: int = 0) -> PodSandboxStatus:
    return PodSandboxStatus(f"s{attempt}", PodSandboxMetadata("p", "u", "n", attempt), state, attempt, ["10.0.0.1"])


def ran(spec: dict[str, Any], state: ContainerState, code: int = 0, attempt: int = 0) -> ContainerStatus:
    return ContainerStatus(
        f"{spec['name']}{attempt}", "s0", ContainerMetadata(spec["name"], attempt), state, attempt, 1, 2, code, "i", "i", "i",
        annotations={"io.kubernetes.container.hash": container_hash(spec)},
    )  # fmt: skip


def plan(p: dict[str, Any], *containers: ContainerStatus, box: PodSandboxStatus | None = None, **probes: Any) -> Plan:
    ordered = sorted(containers, key=lambda s: -s.metadata.attempt)
    return compute(p, Observed([box or sandbox()], ordered, ["10.0.0.1"]), ProbeView(**probes))


RUNNING, EXITED, CREATED = ContainerState.RUNNING, ContainerState.EXITED, ContainerState.CREATED


def test_a_new_pod_gets_a_sandbox_and_its_containers() -> None:
    out = compute(pod(c("a"), c("b")), Observed(), ProbeView())
    assert (out.create_sandbox, out.attempt, out.start, out.init) == (True, 0, ["a", "b"], [])


def test_a_new_pod_starts_with_its_first_init_container() -> None:
    out = compute(pod(c("a"), init=(c("i1"), c("i2"))), Observed(), ProbeView())
    assert (out.create_sandbox, out.init, out.start) == (True, ["i1"], [])


def test_init_containers_run_one_after_another_then_the_main_ones() -> None:
    i1, i2, a = c("i1"), c("i2"), c("a")
    p = pod(a, init=(i1, i2))
    assert plan(p, ran(i1, RUNNING)).nothing_to_do()
    assert plan(p, ran(i1, EXITED)).init == ["i2"]
    assert plan(p, ran(i1, EXITED), ran(i2, EXITED)).start == ["a"]


def test_a_failed_init_container_is_tried_again_unless_the_policy_is_never() -> None:
    i1 = c("i1")
    assert plan(pod(c("a"), init=(i1,)), ran(i1, EXITED, 1)).init == ["i1"]
    out = plan(pod(c("a"), init=(i1,), policy="Never"), ran(i1, EXITED, 1))
    assert out.kill_pod
    assert not out.create_sandbox


def test_a_started_sidecar_lets_the_next_container_start() -> None:
    side, a = c("side", restartPolicy="Always"), c("a")
    p = pod(a, init=(side,))
    assert plan(p, ran(side, RUNNING)).start == ["a"]
    gated = c("side", restartPolicy="Always", startupProbe={"exec": {}})
    assert plan(pod(a, init=(gated,)), ran(gated, RUNNING)).start == []
    assert plan(pod(a, init=(gated,)), ran(gated, RUNNING), startup={"side0": True}).start == ["a"]
    assert plan(p, ran(side, EXITED), ran(a, RUNNING)).init == ["side"]


def test_exit_codes_meet_restart_policies() -> None:
    a = c("a")
    for policy, code, again in (("Always", 0, True), ("Always", 1, True), ("OnFailure", 0, False), ("OnFailure", 1, True), ("Never", 1, False)):
        assert bool(plan(pod(a, policy=policy), ran(a, EXITED, code)).start) is again, (policy, code)


def test_container_rules_win_over_the_pods_policy() -> None:
    rules = [{"action": "Restart", "exitCodes": {"operator": "In", "values": [42]}}]
    a = c("a", restartPolicy="Never", restartPolicyRules=rules)
    assert plan(pod(a, policy="Never"), ran(a, EXITED, 42)).start == ["a"]
    assert plan(pod(a, policy="Never"), ran(a, EXITED, 1)).start == []


def test_a_failed_liveness_probe_kills_and_restarts_as_the_policy_says() -> None:
    a = c("a")
    out = plan(pod(a), ran(a, RUNNING), liveness={"a0": False})
    assert out.kills[0].message == "Container a failed liveness probe, will be restarted"
    assert out.start == ["a"]
    out = plan(pod(a, c("b"), policy="Never"), ran(a, RUNNING), ran(c("b"), RUNNING), liveness={"a0": False})
    assert out.kills[0].message == "Container a failed liveness probe"
    assert out.start == []


def test_a_changed_image_restarts_the_container_even_with_policy_never() -> None:
    a = c("a")
    out = plan(pod(c("a", image="other"), policy="Never"), ran(a, RUNNING))
    assert out.kills[0].message == "Container a definition changed, will be restarted"


def test_a_dead_sandbox_is_replaced_and_finished_containers_of_onfailure_stay_finished() -> None:
    a, b = c("a"), c("b")
    out = plan(pod(a, b, policy="OnFailure"), ran(a, EXITED), ran(b, EXITED, 1), box=sandbox(SandboxState.NOTREADY))
    assert (out.create_sandbox, out.attempt, out.start) == (True, 1, ["b"])
    out = plan(pod(a, policy="Never"), ran(a, EXITED, 1), box=sandbox(SandboxState.NOTREADY))
    assert (out.create_sandbox, out.kill_pod) == (False, True)


def test_an_ephemeral_container_starts_once() -> None:
    a, e = c("a"), c("e")
    p = pod(a, ephemeralContainers=[e])
    assert plan(p, ran(a, RUNNING)).ephemeral == ["e"]
    assert plan(p, ran(a, RUNNING), ran(e, EXITED)).nothing_to_do()


def test_a_created_container_is_started_again() -> None:
    a = c("a")
    assert plan(pod(a, policy="Never"), ran(a, CREATED)).start == ["a"]


def test_sidecars_stop_after_the_main_containers_in_reverse_order() -> None:
    s1, s2, a = c("s1", restartPolicy="Always"), c("s2", restartPolicy="Always"), c("a")
    steps = stop_order(pod(a, init=(s1, s2)), [ran(x, RUNNING) for x in (s1, s2, a)])
    after = {s.container.metadata.name: set(s.after) for s in steps}
    assert after == {"a": set(), "s2": {"a"}, "s1": {"a", "s2"}}


def test_back_off_doubles_to_its_maximum_and_is_forgotten_after_a_long_run() -> None:
    back_off = CrashBackOff(10, 300)
    now = 1000.0
    delays = []
    for _ in range(8):
        assert back_off.remaining("a", now, now + back_off.delay("a")) == 0
        back_off.next("a", now, now)
        delays.append(back_off.delay("a"))
        now += delays[-1]
    assert delays == [10, 20, 40, 80, 160, 300, 300, 300]
    assert back_off.remaining("a", now, now + 100) == 200
    assert back_off.remaining("a", now + 10_000, now + 10_000) == 0
