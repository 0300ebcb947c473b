"""Pods and nodes come and go at random; in the end no node is overcommitted and whatever fits has a node."""

from __future__ import annotations

import asyncio
import contextlib
import random

import pytest

from knarr.api.errors import StatusError
from knarr.api.resources import NAMESPACES, NODES, PODS, SERVICE_ACCOUNTS
from knarr.client.rest import Client
from knarr.scheduler.config import SchedulerConfig
from knarr.scheduler.scheduler import Scheduler
from knarr.testing.apiserver import running_apiserver

from .replay import by_plural

NODE_MILLI = 1000


async def _add_node(client: Client, name: str) -> None:
    status = {"allocatable": {"cpu": f"{NODE_MILLI}m", "memory": "8Gi", "pods": "20"}, "conditions": [{"type": "Ready", "status": "True"}]}
    await client.create(NODES, {"metadata": {"name": name}, "status": status})
    await client.patch(NODES, name, None, {"spec": {"taints": None}})


async def _add_pod(client: Client, name: str, milli: int, priority: int) -> None:
    container = {"name": "c", "image": "i", "resources": {"requests": {"cpu": f"{milli}m"}}}
    spec = {"containers": [container], "terminationGracePeriodSeconds": 0, "priorityClassName": f"p{priority}"}
    await client.create(PODS, {"metadata": {"name": name, "namespace": "churn", "labels": {"milli": str(milli)}}, "spec": spec})


async def _settled(client: Client) -> None:
    """Wait until every pod without a node fits nowhere; meanwhile no node may ever hold too much."""
    problem = "never looked"
    for _ in range(300):
        free = {node["metadata"]["name"]: NODE_MILLI for node in (await client.list(NODES))["items"]}
        waiting = []
        for pod in (await client.list(PODS, "churn"))["items"]:
            milli = int(pod["metadata"]["labels"]["milli"])
            node = pod["spec"].get("nodeName")
            if node:
                free[node] -= milli
                assert free[node] >= 0, f"{node} is overcommitted"
            else:
                waiting.append((milli, pod["metadata"]["name"]))
        problem = ", ".join(name for milli, name in waiting if milli <= max(free.values()))
        if not problem:
            return
        await asyncio.sleep(0.1)
    raise AssertionError(f"pods wait though they fit: {problem}")


@pytest.mark.timeout(90)
@pytest.mark.parametrize("seed", [1, 2])
async def test_churn_ends_in_a_full_but_not_overcommitted_cluster(seed: int) -> None:
    lot = random.Random(seed)
    async with running_apiserver() as server:
        client, own = server.client, Client(server.client_config)
        await client.create(NAMESPACES, {"metadata": {"name": "churn"}})
        await client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": "churn"}})
        for priority in (0, 100):
            body = {"apiVersion": "scheduling.k8s.io/v1", "kind": "PriorityClass", "metadata": {"name": f"p{priority}"}, "value": priority}
            await client.create(by_plural("priorityclasses"), body)
        scheduler = Scheduler(own, SchedulerConfig())
        task = asyncio.create_task(scheduler.run())
        try:
            nodes: list[str] = []
            pods: list[str] = []
            for step in range(150):
                action = lot.randrange(10)
                if action == 0 or not nodes:
                    nodes.append(f"n{step}")
                    await _add_node(client, nodes[-1])
                elif action == 1 and pods:
                    with contextlib.suppress(StatusError):  # a preemption may have been faster
                        await client.delete(PODS, pods.pop(lot.randrange(len(pods))), "churn", grace_period_seconds=0)
                else:
                    await _add_pod(client, f"a{step}", lot.choice([100, 250, 400]), lot.choice([0, 0, 0, 100]))
                    pods.append(f"a{step}")
            await _settled(client)
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            await own.close()
