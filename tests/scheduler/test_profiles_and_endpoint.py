"""Several schedulers by name in one process, and what the components' endpoints tell to whom."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from knarr.api.resources import CLUSTER_ROLE_BINDINGS, NODES, PODS, SERVICE_ACCOUNTS
from knarr.client.config import ClientConfig
from knarr.client.endpoint import Endpoint
from knarr.client.rest import Client
from knarr.controllers.context import ControllersConfig
from knarr.controllers.manager import ControllerManager
from knarr.scheduler.config import read_text
from knarr.scheduler.scheduler import Scheduler
from knarr.testing import apiserver as testing
from knarr.testing.apiserver import RunningAPIServer, running_apiserver

CONFIGURATION = b"""
apiVersion: kubescheduler.config.k8s.io/v1
kind: KubeSchedulerConfiguration
profiles:
- schedulerName: default-scheduler
- schedulerName: packing
  plugins:
    multiPoint:
      disabled: [{name: NodeResourcesBalancedAllocation}]
  pluginConfig:
  - name: NodeResourcesFit
    args: {scoringStrategy: {type: MostAllocated, resources: [{name: cpu, weight: 1}]}}
- schedulerName: blind
  plugins:
    filter:
      disabled: [{name: NodeUnschedulable}]
"""


@pytest_asyncio.fixture
async def server() -> AsyncIterator[RunningAPIServer]:
    async with running_apiserver() as running:
        yield running


def _pod(name: str, scheduler: str, cpu: str = "100m") -> dict[str, Any]:
    container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": cpu}}}
    return {"metadata": {"name": name, "namespace": "default"}, "spec": {"schedulerName": scheduler, "containers": [container]}}


async def _node(client: Client, name: str, **spec: Any) -> None:
    allocatable = {"cpu": "4", "memory": "8Gi", "pods": "10"}
    await client.create(NODES, {"metadata": {"name": name}, "spec": spec, "status": {"allocatable": allocatable}})
    await client.patch(NODES, name, None, {"spec": {"taints": None}})
    if spec.get("unschedulable"):
        await client.patch(NODES, name, None, {"spec": {"taints": None, "unschedulable": True}})


async def _bound(client: Client, name: str) -> str:
    async with asyncio.timeout(15):
        while not (node := (await client.get(PODS, name, "default"))["spec"].get("nodeName")):
            await asyncio.sleep(0.02)
    return str(node)


async def _token(client: Client, account: str) -> str:
    await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": account, "namespace": "default"}})
    request: dict[str, Any] = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"audiences": []}}
    made = await client.create(SERVICE_ACCOUNTS, request, "default", name=account, subresource="token")
    return str(made["status"]["token"])


async def _text(client: Client, path: str) -> tuple[int, str]:
    answer = await client.http.request("GET", path, await client.headers(), None)
    return answer.status, answer.body.decode()


@pytest.mark.timeout(60)
async def test_each_profile_schedules_its_pods_by_its_own_rules_and_other_names_are_left_alone(server: RunningAPIServer) -> None:
    client, own = server.client, Client(server.client_config)
    scheduler = Scheduler(own, read_text(CONFIGURATION))
    task = asyncio.create_task(scheduler.run())
    try:
        await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": "default"}})
        await _node(client, "a")
        await client.create(PODS, _pod("first", "default-scheduler", "1"))
        assert await _bound(client, "first") == "a"
        await _node(client, "b")
        await client.create(PODS, _pod("stranger", "somebody-else"))
        await client.create(PODS, _pod("spreads", "default-scheduler", "1"))
        assert await _bound(client, "spreads") == "b"
        await client.create(PODS, _pod("more", "default-scheduler", "500m"))
        fuller = await _bound(client, "more")
        await client.create(PODS, _pod("packs", "packing", "100m"))
        assert await _bound(client, "packs") == fuller
        for name in ("a", "b"):
            await client.patch(NODES, name, None, {"spec": {"unschedulable": True}})
        await client.create(PODS, _pod("sees-nothing", "blind"))
        await _bound(client, "sees-nothing")
        assert not (await client.get(PODS, "stranger", "default"))["spec"].get("nodeName")
        text = scheduler.exposition().decode()
        assert 'scheduler_schedule_attempts_total{profile="packing",result="scheduled"} 1.0' in text
        assert 'scheduler_queue_incoming_pods_total{event="PodAdd",queue="active"} 5' in text
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await own.close()


@pytest.mark.timeout(60)
async def test_health_is_for_everybody_and_metrics_for_those_who_may_get_the_path(server: RunningAPIServer, tmp_path: Path) -> None:
    own = Client(server.client_config)
    manager = ControllerManager(own, ControllersConfig(enabled="namespace-controller,serviceaccount-controller"))
    pairs = testing.test_pki()
    serving = pairs.authority.issue(tmp_path / "serving", "component", hosts=["127.0.0.1"], server=True, client=False)
    endpoint = Endpoint(
        server.client,
        checks={"informer-sync": lambda: "" if manager.ready else "caches are not filled yet"},
        only_ready=frozenset({"informer-sync"}),
        metrics=manager.exposition,
        settings=manager.settings,
        certificate=str(serving.certificate),
        key=str(serving.key),
        client_ca=str(pairs.authority.pair.certificate),
    )
    port = await endpoint.listen("127.0.0.1", 0)
    url, ca = f"https://127.0.0.1:{port}", Path(pairs.authority.pair.certificate).read_bytes()
    nobody = Client(ClientConfig(server=url, ca_data=ca))
    scraper, stranger = [
        Client(ClientConfig(server=url, ca_data=ca, token=await _token(server.client, n))) for n in ("scraper", "stranger")
    ]
    subject = {"kind": "ServiceAccount", "name": "scraper", "namespace": "default"}
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "system:monitoring"}
    await server.client.create(CLUSTER_ROLE_BINDINGS, {"metadata": {"name": "scraper"}, "roleRef": role, "subjects": [subject]})
    task = None
    try:
        assert await _text(nobody, "/healthz") == (200, "ok")
        assert await _text(nobody, "/readyz") == (
            500,
            "[+]ping ok\n[-]informer-sync failed: caches are not filled yet\nreadyz check failed\n",
        )
        assert await _text(nobody, "/livez/ping") == (200, "ok")
        status, body = await _text(nobody, "/metrics")
        assert (status, 'User \\"system:anonymous\\" cannot get path \\"/metrics\\"' in body) == (403, True)
        assert (await _text(stranger, "/metrics"))[0] == 403
        task = asyncio.create_task(manager.run())
        await manager.wait_ready()
        assert await _text(nobody, "/readyz") == (200, "ok")
        status, body = await _text(scraper, "/metrics")
        assert status == 200
        assert 'running_managed_controllers{manager="kube-controller-manager",name="namespace-controller"} 1' in body
        assert 'workqueue_work_duration_seconds_bucket{name="serviceaccount-controller",le="+Inf"}' in body
        assert "process_resident_memory_bytes" in body
    finally:
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        for one in (nobody, scraper, stranger, own):
            await one.close()
        await endpoint.close()
