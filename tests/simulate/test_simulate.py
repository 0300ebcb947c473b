"""Simulated nodes and pods, with the real API server, controllers and scheduler, in virtual time."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from knarr.aiokits import clock
from knarr.aiokits.tasks import Tasks
from knarr.api.resources import DEPLOYMENTS, EVENTS, JOBS, LEASES, NAMESPACES, NODES, PODS
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.cluster import simverbs
from knarr.cluster.config import ClusterConfig
from knarr.cluster.progress import Progress
from knarr.controllers import podutil
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.scheduler import Scheduler
from knarr.simulate import nodes, stages, workload
from knarr.simulate.simulator import Simulator, SimulatorConfig
from knarr.testing.apiserver import running_apiserver
from tests import virtualtime


@contextlib.asynccontextmanager
async def _cluster(config: SimulatorConfig) -> AsyncIterator[Client]:
    async with running_apiserver() as server, Tasks() as tasks:
        manager = ControllerManager(server.client, ControllersConfig())
        tasks.spawn(manager.run(), "controllers")
        await manager.wait_ready()
        tasks.spawn(Scheduler(server.client, SchedulerConfig()).run(), "scheduler")
        simulator = Simulator(server.client, config)
        tasks.spawn(simulator.run(), "simulator")
        await simulator.wait_nodes()
        yield server.client


async def _until(holds: Callable[[list[Object]], bool], client: Client, seconds: float = 60.0) -> list[Object]:
    deadline = clock.now() + seconds
    while not holds(pods := (await client.list(PODS, workload.NAMESPACE))["items"]):
        assert clock.now() < deadline, [(pod["metadata"]["name"], pod["status"]) for pod in pods][:3]
        await asyncio.sleep(0.2)
    return pods


def _all_ready(count: int) -> Callable[[list[Object]], bool]:
    return lambda pods: len(pods) == count and all(podutil.is_ready(pod) for pod in pods)


def test_simulated_nodes_are_ready_and_stay_so_while_their_pods_run_scale_and_go() -> None:
    async def play() -> None:
        async with _cluster(SimulatorConfig(5)) as client:
            await workload.ensure(client, 30)
            pods = await _until(_all_ready(30), client)
            assert {pod["spec"]["nodeName"] for pod in pods} == {nodes.node_name(number) for number in range(5)}
            assert len({pod["status"]["podIP"] for pod in pods}) == 30
            await asyncio.sleep(300)
            for node in (await client.list(NODES))["items"]:
                assert podutil.is_ready(node)
                assert node["spec"]["taints"] == [nodes.TAINT]
            await workload.ensure(client, 10)
            await _until(_all_ready(10), client)
            await workload.ensure(client, 0)
            await _until(lambda found: not found, client)

    virtualtime.run(play())


def test_a_silent_node_loses_its_pods_to_others() -> None:
    async def play() -> None:
        async with _cluster(SimulatorConfig(3)) as client:
            await workload.ensure(client, 6)
            await _until(_all_ready(6), client)
            silent = nodes.node_name(1)
            await client.patch(NODES, silent, None, {"metadata": {"annotations": {nodes.SILENT: "true"}}})
            await asyncio.sleep(500)
            pods = await _until(lambda found: sum(podutil.is_active(pod) for pod in found) == 6, client)
            assert all(pod["spec"]["nodeName"] != silent for pod in pods if podutil.is_active(pod))
            await client.patch(NODES, silent, None, {"metadata": {"annotations": {nodes.SILENT: None}}})
            await _until(_all_ready(6), client)

    virtualtime.run(play())


_FLAKY = f"""
apiVersion: {stages.API_VERSION}
kind: Stage
metadata: {{name: pod-breaks}}
spec:
  resource: pods
  selector:
    matchExpressions:
    - {{path: status.phase, operator: In, values: [Running]}}
    - {{path: 'metadata.ownerReferences[kind=Job].name', operator: Exists}}
  delay: {{seconds: 2, jitterSeconds: 3}}
  next:
    phase: Failed
    exitCode: 137
    reason: OOMKilled
    event: {{type: Warning, reason: Oops, message: out of memory}}
---
apiVersion: {stages.API_VERSION}
kind: Stage
metadata: {{name: node-presses}}
spec:
  resource: nodes
  selector:
    matchAnnotations: {{press: "yes"}}
    matchExpressions:
    - {{path: 'status.conditions[type=MemoryPressure].status', operator: NotIn, values: ["True"]}}
  next:
    status:
      conditions: [{{type: MemoryPressure, status: "True", reason: Simulated}}]
"""


_RUNS = stages.DEFAULT.partition("---")[0]


@pytest.mark.parametrize("text", [stages.DEFAULT, _RUNS], ids=["built-in", "file"])
def test_pods_of_a_node_that_fell_silent_for_a_minute_are_ready_again(text: str) -> None:
    async def play() -> None:
        async with _cluster(SimulatorConfig(3, stages=text)) as client:
            await workload.ensure(client, 6)
            await _until(_all_ready(6), client)
            silent = nodes.node_name(1)
            await client.patch(NODES, silent, None, {"metadata": {"annotations": {nodes.SILENT: "true"}}})
            await _until(lambda pods: not all(podutil.is_ready(pod) for pod in pods), client, 120)
            await client.patch(NODES, silent, None, {"metadata": {"annotations": {nodes.SILENT: None}}})
            before = {pod["metadata"]["uid"] for pod in (await client.list(PODS, workload.NAMESPACE))["items"]}
            pods = await _until(_all_ready(6), client)
            assert {pod["metadata"]["uid"] for pod in pods} == before

    virtualtime.run(play())


def test_stages_of_a_file_break_pods_and_press_nodes() -> None:
    async def play() -> None:
        text = _FLAKY + "---" + "---".join(part for part in stages.DEFAULT.split("---") if "job-pod-completes" not in part)
        async with _cluster(SimulatorConfig(1, stages=text)) as client:
            await client.create(NAMESPACES, {"metadata": {"name": workload.NAMESPACE}})
            template = workload.make_deployment("x", 1)["spec"]["template"]
            template["spec"]["restartPolicy"] = "Never"
            del template["metadata"]
            job = {"metadata": {"name": "j"}, "spec": {"backoffLimit": 0, "template": template}}
            await client.create(JOBS, job, workload.NAMESPACE)
            pods = await _until(lambda found: bool(found) and podutil.is_finished(found[0]), client)
            ended = pods[0]["status"]["containerStatuses"][0]["state"]["terminated"]
            assert (ended["exitCode"], ended["reason"]) == (137, "OOMKilled")
            await asyncio.sleep(5)
            conditions = (await client.get(JOBS, "j", workload.NAMESPACE))["status"]["conditions"]
            assert conditions[-1]["type"] == "Failed"
            events = (await client.list(EVENTS, workload.NAMESPACE))["items"]
            assert any(event["reason"] == "Oops" for event in events)
            await client.patch(NODES, nodes.node_name(0), None, {"metadata": {"annotations": {"press": "yes"}}})
            await asyncio.sleep(10)
            taints = (await client.get(NODES, nodes.node_name(0)))["spec"]["taints"]
            assert "node.kubernetes.io/memory-pressure" in {taint["key"] for taint in taints}

    virtualtime.run(play())


_NEVER_READY = _RUNS.replace("{phase: Running}", "{phase: Running, ready: false}")


def test_pods_that_a_stage_keeps_from_being_ready_stay_so() -> None:
    async def play() -> None:
        async with _cluster(SimulatorConfig(1, stages=_NEVER_READY)) as client:
            await workload.ensure(client, 3)
            await _until(lambda pods: [pod["status"]["phase"] for pod in pods] == ["Running"] * 3, client)
            await asyncio.sleep(60)
            assert not any(podutil.is_ready(pod) for pod in (await client.list(PODS, workload.NAMESPACE))["items"])

    virtualtime.run(play())


@pytest.mark.parametrize("text", ["", _NEVER_READY], ids=["built-in", "file"])
def test_the_command_waits_for_pods_but_not_for_those_of_a_file(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ClusterConfig(name="simulated", slot=0, data_dir=str(tmp_path))
    (tmp_path / "stages.yaml").write_text(text)

    async def play() -> None:
        async with _cluster(SimulatorConfig(2, stages=text or stages.DEFAULT)) as client:
            own = Client(client.config)
            monkeypatch.setattr(simverbs, "admin_client", lambda _: own)
            async with asyncio.timeout(60):
                await simverbs.converge(config, simverbs.Simulation(2, 20), Progress())
            ready = sum(podutil.is_ready(pod) for pod in (await client.list(PODS, workload.NAMESPACE))["items"])
            assert ready == (0 if text else 20)

    virtualtime.run(play())


def test_fewer_nodes_are_fewer_nodes_and_real_ones_are_left_alone() -> None:
    async def play() -> None:
        async with running_apiserver() as server, Tasks() as tasks:
            await server.client.create(NODES, {"metadata": {"name": "real"}})
            for count in (4, 2):
                simulator = Simulator(server.client, SimulatorConfig(count))
                running = tasks.spawn(simulator.run(), "simulator")
                await simulator.wait_nodes()
                running.cancel()
                await asyncio.wait([running])
                names = {node["metadata"]["name"] for node in (await server.client.list(NODES))["items"]}
                assert names == {"real", *(nodes.node_name(number) for number in range(count))}
            assert len((await server.client.list(LEASES, "kube-node-lease"))["items"]) >= 2
            assert not (await server.client.list(DEPLOYMENTS))["items"]

    virtualtime.run(play())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("kind: Pod", "kind Stage"),
        (f"{{apiVersion: {stages.API_VERSION}, kind: Stage, metadata: {{name: a}}, spec: {{resource: services}}}}", "pods or nodes"),
        (f"{{apiVersion: {stages.API_VERSION}, kind: Stage, metadata: {{name: a}}, spec: {{resource: pods, nxt: {{}}}}}}", "unknown field spec.nxt"),
        (f"{{apiVersion: {stages.API_VERSION}, kind: Stage, metadata: {{name: a}}, spec: {{resource: pods, next: {{phase: Gone}}}}}}", "next.phase"),
        ("a: [", "not YAML"),
    ],
)
def test_a_bad_stage_is_told_by_name_and_field(text: str, words: str) -> None:
    with pytest.raises(stages.BadStage, match=words):
        stages.read(text)
