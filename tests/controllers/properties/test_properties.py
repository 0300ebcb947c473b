"""Random sequences of what users and machines do to workloads, in virtual time, against upstream's documented promises.

The examples are the same in every run; KNARR_PROPERTY_EXAMPLES makes more of them, KNARR_PROPERTY_RANDOM=1 others each time.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from knarr.api.resources import CONTROLLER_REVISIONS, DAEMON_SETS, DEPLOYMENTS, JOBS, NODES, REPLICA_SETS, STATEFUL_SETS
from knarr.api.types import Object
from tests.controllers.properties import laws, world
from tests.controllers.properties.world import LABELS, Example, World

_EXAMPLES = int(os.environ.get("KNARR_PROPERTY_EXAMPLES", "8"))
_RANDOM = "KNARR_PROPERTY_RANDOM" in os.environ
_SETTLE_SECONDS = 400.0

_checked = settings(
    max_examples=_EXAMPLES,
    derandomize=not _RANDOM,
    # Making a failing example smaller takes minutes; who looks for new ones has them.
    phases=[Phase.generate, Phase.shrink] if _RANDOM else [Phase.generate],
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

Action = tuple[str, Any]
Act = Callable[[Example, str, Any], Awaitable[None]]


@pytest.fixture(scope="module")
def virtual_world() -> Iterator[World]:
    with World() as running:
        yield running


def _template(number: int, command: list[str] | None = None, restart: str = "Always") -> Object:
    """Templates 0 to 2 work, 3 never becomes ready."""
    container: Object = {"name": "c", "image": "rec.invalid/none:1" if number == 3 else "pause", "env": [{"name": "N", "value": str(number)}]}
    if command:
        container["command"] = command
    return {"metadata": {"labels": LABELS}, "spec": {"containers": [container], "restartPolicy": restart, "terminationGracePeriodSeconds": 1}}


def _waits() -> st.SearchStrategy[Action]:
    return st.tuples(st.just("wait"), st.sampled_from([0.0, 0.3, 1.0, 3.0, 20.0]))


def _pods() -> st.SearchStrategy[Action]:
    return st.tuples(st.sampled_from(["delete pod", "fail pod"]), st.integers(0, 9))


def _sequence(*more: st.SearchStrategy[Action]) -> st.SearchStrategy[list[Action]]:
    return st.lists(st.one_of(_waits(), _pods(), *more), min_size=3, max_size=10)


async def _act(example: Example, what: str, value: Any) -> None:
    if what == "wait":
        await asyncio.sleep(value)
    elif what == "delete pod":
        await example.delete_pod(value)
    elif what == "fail pod":
        await example.fail_pod(value)
    elif what == "template":
        await example.patch({"template": _template(value)})
    else:
        await example.patch({what: value})


_templates = st.tuples(st.just("template"), st.integers(0, 3))
_replicas = st.tuples(st.just("replicas"), st.integers(0, 5))
_amounts = st.sampled_from([0, 1, 2, "25%", "50%"])
_rolling = st.builds(
    lambda surge, away: {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": surge, "maxUnavailable": away}}, _amounts, _amounts
).filter(lambda item: str(item["rollingUpdate"]["maxSurge"]) != "0" or str(item["rollingUpdate"]["maxUnavailable"]) != "0")
_recreate = st.just({"type": "Recreate", "rollingUpdate": None})


@_checked
@given(
    replicas=st.integers(1, 5),
    strategy=st.one_of(_rolling, _recreate),
    limit=st.integers(0, 2),
    actions=_sequence(_templates, _templates, _replicas, st.tuples(st.just("paused"), st.booleans()), st.tuples(st.just("strategy"), _rolling)),
)
def test_deployments_keep_their_promises(virtual_world: World, replicas: int, strategy: Object, limit: int, actions: list[Action]) -> None:
    async def play(example: Example) -> None:
        example.ledger.law = laws.deployment(example.ledger)
        spec = {"replicas": replicas, "strategy": strategy, "revisionHistoryLimit": limit, "selector": {"matchLabels": LABELS}}
        await example.create({**spec, "template": _template(0)})
        for what, value in actions:
            await _act(example, what, value)
        await asyncio.sleep(_SETTLE_SECONDS)
        await laws.deployment_settled(example, (await example.workload())["spec"], await example.list(REPLICA_SETS))

    virtual_world.run(DEPLOYMENTS, play)


_ordinals = st.builds(
    lambda partition, away: {"type": "RollingUpdate", "rollingUpdate": {"partition": partition, "maxUnavailable": away}},
    st.integers(0, 3),
    st.sampled_from([None, None, 1, 2, "50%"]),
)


@_checked
@given(
    replicas=st.integers(1, 4),
    policy=st.sampled_from(["OrderedReady", "OrderedReady", "Parallel"]),
    limit=st.integers(0, 2),
    actions=_sequence(_templates, _replicas, st.tuples(st.just("updateStrategy"), _ordinals)),
)
def test_statefulsets_keep_their_order(virtual_world: World, replicas: int, policy: str, limit: int, actions: list[Action]) -> None:
    async def play(example: Example) -> None:
        example.ledger.law = laws.statefulset(example.ledger)
        spec = {"replicas": replicas, "podManagementPolicy": policy, "revisionHistoryLimit": limit, "serviceName": "w", "selector": {"matchLabels": LABELS}}
        await example.create({**spec, "template": _template(0)})
        for what, value in actions:
            await _act(example, what, value)
        await asyncio.sleep(_SETTLE_SECONDS)
        await laws.statefulset_settled(example, (await example.workload())["spec"], await example.list(CONTROLLER_REVISIONS))

    virtual_world.run(STATEFUL_SETS, play)


_commands = st.sampled_from(["exit 0", "sleep 3", "sleep 1; exit 1", "test $JOB_COMPLETION_INDEX != 1"])


@_checked
@given(
    completions=st.integers(1, 5),
    parallelism=st.integers(0, 3),
    mode=st.sampled_from(["Indexed", "Indexed", "NonIndexed"]),
    backoff=st.integers(0, 2),
    command=_commands,
    actions=_sequence(st.tuples(st.just("parallelism"), st.integers(0, 3)), st.tuples(st.just("suspend"), st.booleans())),
)
def test_jobs_do_each_thing_once(
    virtual_world: World, completions: int, parallelism: int, mode: str, backoff: int, command: str, actions: list[Action]
) -> None:
    async def play(example: Example) -> None:
        example.ledger.law = laws.job(example.ledger)
        template = _template(0, ["sh", "-c", command], "Never")
        field = {"fieldRef": {"fieldPath": "metadata.labels['batch.kubernetes.io/job-completion-index']"}}
        template["spec"]["containers"][0]["env"] = [{"name": "JOB_COMPLETION_INDEX", "valueFrom": field}]
        spec = {"completions": completions, "parallelism": parallelism, "completionMode": mode, "backoffLimit": backoff}
        await example.create({**spec, "template": template})
        for what, value in actions:
            await _act(example, what, value)
        await asyncio.sleep(_SETTLE_SECONDS)
        await laws.job_settled(example, (await example.workload())["spec"])

    virtual_world.run(JOBS, play)


_daemon_updates = st.sampled_from(
    [
        {"type": "OnDelete", "rollingUpdate": None},
        {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1, "maxSurge": 0}},
        {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 2, "maxSurge": 0}},
        {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 0, "maxSurge": 1}},
    ]
)
_TAINT = {"key": "knarr.test/away", "effect": "NoSchedule"}


@_checked
@given(
    update=_daemon_updates,
    limit=st.integers(0, 2),
    actions=_sequence(_templates, _templates, st.tuples(st.just("updateStrategy"), _daemon_updates), st.tuples(st.just("taint"), st.sampled_from(world.NODES))),
)
def test_daemonsets_have_one_pod_on_each_node(virtual_world: World, update: Object, limit: int, actions: list[Action]) -> None:
    async def play(example: Example) -> None:
        example.ledger.law = laws.daemonset(example.ledger)
        await example.create({"updateStrategy": update, "revisionHistoryLimit": limit, "selector": {"matchLabels": LABELS}, "template": _template(0)})
        tainted: set[str] = set()
        try:
            for what, value in actions:
                if what != "taint":
                    await _act(example, what, value)
                    continue
                tainted ^= {value}
                example.ledger.by_user.add("taints")
                await example.client.patch(NODES, value, None, {"spec": {"taints": [_TAINT] if value in tainted else None}})
            await asyncio.sleep(_SETTLE_SECONDS)
            # NoSchedule ends no pod, neither one that runs nor one that waits for the taint to go: such a node may or may not have one.
            kept = {laws.node_of(pod) for pod in laws.ready(example.ledger.pods)} & tainted
            await laws.daemonset_settled(
                example, (await example.workload())["spec"], await example.list(CONTROLLER_REVISIONS), (set(world.NODES) - tainted) | kept
            )
        finally:
            for name in tainted:
                await example.client.patch(NODES, name, None, {"spec": {"taints": None}})

    virtual_world.run(DAEMON_SETS, play)
