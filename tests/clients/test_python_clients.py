from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import kopf
import kr8s
import kubernetes
import lightkube
import pytest
from lightkube.models.meta_v1 import ObjectMeta
from lightkube.resources.core_v1 import ConfigMap
from lightkube.types import PatchType

DEPLOYMENT = {
    "apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "d", "namespace": "default", "labels": {"who": "kr8s"}},
    "spec": {"replicas": 2, "selector": {"matchLabels": {"a": "b"}}, "template": {"metadata": {"labels": {"a": "b"}}, "spec": {"containers": [{"name": "c", "image": "i"}]}}},
}  # fmt: skip


def test_the_official_client_creates_lists_watches_patches_and_deletes(config_path: Path) -> None:
    kubernetes.config.load_kube_config(str(config_path))
    core = kubernetes.client.CoreV1Api()
    made = core.create_namespaced_config_map("default", kubernetes.client.V1ConfigMap(metadata=kubernetes.client.V1ObjectMeta(name="official"), data={"a": "1"}))
    assert made.metadata.uid
    seen = []
    watch = kubernetes.watch.Watch()
    core.patch_namespaced_config_map("official", "default", {"data": {"b": "2"}})
    for event in watch.stream(core.list_namespaced_config_map, "default", field_selector="metadata.name=official", resource_version=made.metadata.resource_version, timeout_seconds=5):
        seen.append((event["type"], event["object"].data))
        watch.stop()
    assert seen == [("MODIFIED", {"a": "1", "b": "2"})]
    core.delete_namespaced_config_map("official", "default")
    with pytest.raises(kubernetes.client.ApiException) as error:
        core.read_namespaced_config_map("official", "default")
    assert error.value.status == 404
    version = kubernetes.client.VersionApi().get_code()
    assert (version.major, version.minor) == ("1", "35")


def test_the_official_dynamic_client_applies(config_path: Path) -> None:
    api = kubernetes.dynamic.DynamicClient(kubernetes.config.new_client_from_config(str(config_path)))
    maps = api.resources.get(api_version="v1", kind="ConfigMap")
    body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "dynamic"}, "data": {"k": "v"}}
    applied = maps.server_side_apply(body=body, namespace="default", field_manager="tests")
    assert applied.metadata.managedFields[0].manager == "tests"
    maps.delete(name="dynamic", namespace="default")


async def test_kr8s_scales_a_deployment_and_selects_by_label(config_path: Path) -> None:
    api = await kr8s.asyncio.api(kubeconfig=str(config_path))
    from kr8s.asyncio.objects import Deployment

    deployment = await Deployment(DEPLOYMENT, api=api)
    await deployment.create()
    await deployment.patch({"spec": {"replicas": 3}})
    found = [item async for item in api.get("deployments", namespace="default", label_selector="who=kr8s")]
    assert [item.replicas for item in found] == [3]
    await deployment.delete(propagation_policy="Background")


def test_lightkube_creates_applies_and_lists(config_path: Path) -> None:
    client = lightkube.Client(lightkube.KubeConfig.from_file(str(config_path)), field_manager="lightkube-tests")
    client.create(ConfigMap(metadata=ObjectMeta(name="light", namespace="default"), data={"a": "1"}))
    client.patch(ConfigMap, "light", {"data": {"a": "2"}}, patch_type=PatchType.MERGE)
    applied = client.apply(ConfigMap(metadata=ObjectMeta(name="light", namespace="default"), data={"b": "3"}))
    assert applied.data == {"a": "2", "b": "3"}
    assert "light" in [item.metadata.name for item in client.list(ConfigMap, namespace="default") if item.metadata]
    client.delete(ConfigMap, "light")


CRD = {
    "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition", "metadata": {"name": "boats.knarr.test"},
    "spec": {
        "group": "knarr.test", "scope": "Namespaced", "names": {"plural": "boats", "singular": "boat", "kind": "Boat"},
        "versions": [{"name": "v1", "served": True, "storage": True, "subresources": {"status": {}}, "schema": {"openAPIV3Schema": {"type": "object", "properties": {
            "spec": {"type": "object", "properties": {"oars": {"type": "integer", "minimum": 1}}}, "status": {"type": "object", "x-kubernetes-preserve-unknown-fields": True}}}}}],
    },
}  # fmt: skip


def test_a_kopf_operator_handles_a_custom_resource(config_path: Path) -> None:
    kubernetes.config.load_kube_config(str(config_path))
    kubernetes.client.ApiextensionsV1Api().create_custom_resource_definition(CRD)
    registry = kopf.OperatorRegistry()
    handled: list[tuple[str, int]] = []
    done = threading.Event()

    @kopf.on.login(registry=registry)
    def login(**arguments: Any) -> Any:
        return kopf.login_with_kubeconfig(**arguments)

    @kopf.on.create("knarr.test", "v1", "boats", registry=registry)
    def created(name: str, spec: kopf.Spec, **_: object) -> dict[str, int]:
        handled.append((name, spec["oars"]))
        return {"seats": 2 * spec["oars"]}

    @kopf.on.delete("knarr.test", "v1", "boats", registry=registry)
    def deleted(name: str, **_: object) -> None:
        handled.append((name, 0))
        done.set()

    ready, stop = threading.Event(), threading.Event()
    operator = threading.Thread(target=lambda: asyncio.run(kopf.operator(registry=registry, clusterwide=True, ready_flag=ready, stop_flag=stop)), daemon=True)
    operator.start()
    assert ready.wait(20)
    boats = kubernetes.client.CustomObjectsApi()
    boats.create_namespaced_custom_object("knarr.test", "v1", "default", "boats", {"apiVersion": "knarr.test/v1", "kind": "Boat", "metadata": {"name": "knarr"}, "spec": {"oars": 4}})
    watch = kubernetes.watch.Watch()
    for event in watch.stream(boats.list_namespaced_custom_object, "knarr.test", "v1", "default", "boats", timeout_seconds=20):
        if event["object"].get("status", {}).get("created", {}).get("seats") == 8:
            watch.stop()
    boats.delete_namespaced_custom_object("knarr.test", "v1", "default", "boats", "knarr")
    assert done.wait(20)
    stop.set()
    operator.join(20)
    assert handled == [("knarr", 4), ("knarr", 0)]
    with pytest.raises(kubernetes.client.ApiException) as error:
        boats.create_namespaced_custom_object("knarr.test", "v1", "default", "boats", {"apiVersion": "knarr.test/v1", "kind": "Boat", "metadata": {"name": "raft"}, "spec": {"oars": 0}})
    assert error.value.status == 422
    kubernetes.client.ApiextensionsV1Api().delete_custom_resource_definition("boats.knarr.test")
