"""Autoscalers by every kind of metric, from a metrics server behind APIServices, with the behavior that is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections.abc import AsyncIterator
from typing import Any

import orjson
import pytest
import pytest_asyncio

from knarr.aiokits import clock
from knarr.api import meta
from knarr.api.resources import (
    API_SERVICES,
    HORIZONTAL_POD_AUTOSCALERS,
    NAMESPACES,
    PODS,
    REPLICATION_CONTROLLERS,
    SERVICE_ACCOUNTS,
    SERVICES,
)
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.http.server import Request
from knarr.testing.apiserver import running_apiserver
from knarr.testing.controllers import running_controllers
from tests.servers import https_server

_GROUPS = (("metrics.k8s.io", "v1beta1"), ("custom.metrics.k8s.io", "v1beta2"), ("external.metrics.k8s.io", "v1beta1"))
_PODS = ("web-0", "web-1")
_namespaces = (f"hpa-{number}" for number in itertools.count())


class MetricsServer:
    """Serves what `values` says, by namespace and metric; "cpu" and "memory" are of container c, another one uses much more memory."""

    def __init__(self) -> None:
        self.values: dict[tuple[str, str], list[str]] = {}

    def answer(self, path: str) -> Object | None:
        if not path.startswith("/apis/"):
            return None
        _, group, version, *rest = path.strip("/").split("/")
        if not rest:
            return {"kind": "APIResourceList", "groupVersion": f"{group}/{version}", "resources": []}
        _, namespace, *rest = rest
        now = clock.now_rfc3339()
        if group == "metrics.k8s.io":
            usage = {name: self.values[namespace, name][0] for name in ("cpu", "memory") if (namespace, name) in self.values}
            containers = [{"name": "c", "usage": usage}, {"name": "side", "usage": {"memory": "8Gi"}}]
            if "cpu" in usage:
                containers = containers[:1]
            return {"items": [{"metadata": {"name": name}, "timestamp": now, "window": "30s", "containers": containers} for name in _PODS] if usage else []}
        found = self.values.get((namespace, rest[-1]))
        if found is None:
            return None
        names = _PODS if rest[0] == "pods" else ("web",)
        return {"items": [{"describedObject": {"name": name}, "timestamp": now, "value": value} for name in names for value in found]}


@contextlib.asynccontextmanager
async def metrics_server() -> AsyncIterator[tuple[int, MetricsServer]]:
    metrics = MetricsServer()

    async def handle(request: Request) -> None:
        found = metrics.answer(request.path)
        missing = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": "NotFound", "message": "no such metric", "code": 404}
        request.respond(404 if found is None else 200, [("Content-Type", "application/json")], orjson.dumps(missing if found is None else found))

    async with https_server(handle) as port:
        yield port, metrics


class World:
    """A namespace with a target "web" of two running pods."""

    def __init__(self, client: Client, metrics: MetricsServer, namespace: str) -> None:
        self.client = client
        self.metrics = metrics
        self.namespace = namespace

    async def prepare(self) -> None:
        labels, ago = {"app": "web"}, "2020-01-01T00:00:00Z"
        container = {"image": "i", "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}}}
        template = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "c", **container}]}}
        target = {"metadata": {"name": "web"}, "spec": {"replicas": 2, "selector": labels, "template": template}}
        await self.client.create(SERVICE_ACCOUNTS, {"metadata": {"name": "default"}}, self.namespace)
        made = await self.client.create(REPLICATION_CONTROLLERS, target, self.namespace)
        await self.client.update(REPLICATION_CONTROLLERS, {**made, "status": {"replicas": 2}}, subresource="status")
        conditions = [{"type": "Ready", "status": "True", "lastTransitionTime": ago}]
        for name in _PODS:
            pod = await self.client.create(PODS, {"metadata": {"name": name, "labels": labels}, "spec": template["spec"]}, self.namespace)
            await self.client.update(PODS, {**pod, "status": {"phase": "Running", "startTime": ago, "conditions": conditions}}, subresource="status")

    async def scale_by(self, metrics: list[Object], replicas: int, active: str = "True", **spec: Any) -> Object:
        """The autoscaler once it wants so many replicas; it may have looked before it knew all pods."""
        reference = {"apiVersion": "v1", "kind": "ReplicationController", "name": "web"}
        made = {"metadata": {"name": "h"}, "spec": {"scaleTargetRef": reference, "minReplicas": 1, "maxReplicas": 20, "metrics": metrics, **spec}}
        await self.client.create(HORIZONTAL_POD_AUTOSCALERS, made, self.namespace)
        async with asyncio.timeout(10):
            while True:
                found = await self.client.get(HORIZONTAL_POD_AUTOSCALERS, "h", self.namespace)
                status = found.get("status") or {}
                condition = meta.get_condition(status.get("conditions") or [], "ScalingActive")
                if condition is not None and condition["status"] == active and await self.replicas() == replicas:
                    if active == "False" or status["desiredReplicas"] == replicas:
                        return found
                await asyncio.sleep(0.05)

    async def replicas(self) -> int:
        return int((await self.client.get(REPLICATION_CONTROLLERS, "web", self.namespace))["spec"]["replicas"])


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def served() -> AsyncIterator[tuple[Client, MetricsServer]]:
    async with metrics_server() as (port, metrics), running_apiserver() as server, running_controllers(server, "horizontalpodautoscaling", hpa_sync_seconds=0.5):
        client = server.client
        await client.create(SERVICES, {"metadata": {"name": "m"}, "spec": {"type": "ExternalName", "externalName": "localhost", "ports": [{"port": port}]}}, "default")
        for group, version in _GROUPS:
            spec = {"group": group, "version": version, "groupPriorityMinimum": 100, "versionPriority": 10, "insecureSkipTLSVerify": True}
            spec["service"] = {"namespace": "default", "name": "m", "port": port}
            await client.create(API_SERVICES, {"metadata": {"name": f"{version}.{group}"}, "spec": spec})
        async with asyncio.timeout(10):
            for group, version in _GROUPS:
                while True:
                    found = await client.get(API_SERVICES, f"{version}.{group}")
                    available = meta.get_condition((found.get("status") or {}).get("conditions") or [], "Available")
                    if available is not None and available["status"] == "True":
                        break
                    await asyncio.sleep(0.02)
        yield client, metrics


@pytest_asyncio.fixture(loop_scope="module")
async def web(served: tuple[Client, MetricsServer]) -> World:
    client, metrics = served
    world = World(client, metrics, next(_namespaces))
    await client.create(NAMESPACES, {"metadata": {"name": world.namespace}})
    await world.prepare()
    return world


pytestmark = pytest.mark.asyncio(loop_scope="module")


def resource(name: str, **target: Any) -> Object:
    kind = "Utilization" if "averageUtilization" in target else "AverageValue"
    return {"type": "Resource", "resource": {"name": name, "target": {"type": kind, **target}}}


def external(**target: Any) -> Object:
    kind = "Value" if "value" in target else "AverageValue"
    return {"type": "External", "external": {"metric": {"name": "queue"}, "target": {"type": kind, **target}}}


def of_service(**target: Any) -> Object:
    kind = "Value" if "value" in target else "AverageValue"
    described = {"apiVersion": "v1", "kind": "Service", "name": "web"}
    return {"type": "Object", "object": {"metric": {"name": "hits"}, "describedObject": described, "target": {"type": kind, **target}}}


CONTAINER = {"type": "ContainerResource", "containerResource": {"name": "memory", "container": "c", "target": {"type": "AverageValue", "averageValue": "50Mi"}}}
BY_PODS = {"type": "Pods", "pods": {"metric": {"name": "rps"}, "target": {"type": "AverageValue", "averageValue": "10"}}}


@pytest.mark.parametrize(
    ("metric", "served_as", "values", "replicas", "current"),
    [
        (resource("cpu", averageUtilization=50), "cpu", ["100m"], 4, {"averageUtilization": 100, "averageValue": "100m"}),
        (resource("cpu", averageValue="80m"), "cpu", ["120m"], 3, {"averageValue": "120m"}),
        (CONTAINER, "memory", ["100Mi"], 4, {"averageValue": "100Mi"}),
        (BY_PODS, "rps", ["15"], 3, {"averageValue": "15"}),
        (of_service(value="10"), "hits", ["20"], 4, {"value": "20"}),
        (of_service(averageValue="10"), "hits", ["30"], 3, {"averageValue": "15"}),
        (external(value="10"), "queue", ["15"], 3, {"value": "15"}),
        (external(averageValue="10"), "queue", ["13", "17"], 3, {"averageValue": "15"}),
        (external(averageValue="10"), "queue", ["21900m"], 2, {"averageValue": "10950m"}),
    ],
    ids=["resource-utilization", "resource-value", "container", "pods", "object-value", "object-share", "external-value", "external-share", "in-tolerance"],
)
async def test_each_kind_of_metric_gives_the_size(web: World, metric: Object, served_as: str, values: list[str], replicas: int, current: Object) -> None:
    web.metrics.values[web.namespace, served_as] = values
    found = await web.scale_by([metric], replicas)
    shown = found["status"]["currentMetrics"][0]
    assert shown[{"Resource": "resource", "ContainerResource": "containerResource"}.get(metric["type"], metric["type"].lower())]["current"] == current


@pytest.mark.parametrize(
    ("behavior", "value", "replicas", "limited"),
    [
        ({"scaleUp": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}, "60", 3, "True"),
        ({"scaleUp": {"policies": [{"type": "Percent", "value": 100, "periodSeconds": 60}, {"type": "Pods", "value": 5, "periodSeconds": 60}]}}, "90", 7, "True"),
        ({"scaleUp": {"selectPolicy": "Disabled"}}, "60", 2, "True"),
        ({"scaleDown": {"selectPolicy": "Disabled", "stabilizationWindowSeconds": 0}}, "1", 2, "True"),
        ({"scaleDown": {"stabilizationWindowSeconds": 0}}, "1", 1, "False"),
        ({"scaleDown": {"stabilizationWindowSeconds": 300}}, "1", 2, "False"),
    ],
    ids=["pods", "highest-policy", "up-disabled", "down-disabled", "down-at-once", "stabilized"],
)
async def test_behavior_bounds_the_step(web: World, behavior: Object, value: str, replicas: int, limited: str) -> None:
    web.metrics.values[web.namespace, "queue"] = [value]
    found = await web.scale_by([external(averageValue="10")], replicas, behavior=behavior)
    condition = meta.get_condition(found["status"]["conditions"], "ScalingLimited")
    assert condition is not None
    assert condition["status"] == limited, condition


async def test_of_several_metrics_the_highest_counts(web: World) -> None:
    web.metrics.values[web.namespace, "queue"] = ["30"]
    web.metrics.values[web.namespace, "rps"] = ["20"]
    await web.scale_by([external(averageValue="10"), BY_PODS], 4)


async def test_a_missing_metric_does_not_stop_growth(web: World) -> None:
    web.metrics.values[web.namespace, "queue"] = ["30"]
    await web.scale_by([of_service(value="1"), external(averageValue="10")], 3)


async def test_a_missing_metric_stops_shrinking(web: World) -> None:
    web.metrics.values[web.namespace, "queue"] = ["1"]
    behavior = {"scaleDown": {"stabilizationWindowSeconds": 0}}
    await web.client.create(SERVICES, {"metadata": {"name": "web"}, "spec": {"ports": [{"port": 80}]}}, web.namespace)
    found = await web.scale_by([of_service(value="1"), external(averageValue="10")], 2, "False", behavior=behavior)
    active = meta.get_condition(found["status"]["conditions"], "ScalingActive")
    assert active is not None
    assert active["reason"] == "FailedGetObjectMetric"
