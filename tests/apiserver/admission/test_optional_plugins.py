"""The admission plugins that run only when asked for."""

from __future__ import annotations

from typing import Any

import pytest

from knarr.api import resources as R
from knarr.testing.apiserver import RunningAPIServer, running_apiserver
from tests.apiserver.identities import as_user, make_namespace, pod, refused


def service(**spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": "s", "namespace": "t"}, "spec": {"ports": [{"port": 80}], **spec}}


async def test_none_of_them_runs_by_default(apiserver: RunningAPIServer) -> None:
    await make_namespace(apiserver.client, "t")
    made = await apiserver.client.create(R.PODS, pod("p", "t"), "t")
    assert made["spec"]["containers"][0]["imagePullPolicy"] == "IfNotPresent"
    assert (await apiserver.client.create(R.SERVICES, service(externalIPs=["198.51.100.7"]), "t"))["spec"]["externalIPs"] == ["198.51.100.7"]


async def test_images_are_always_pulled() -> None:
    async with running_apiserver(admission_plugins_on=("AlwaysPullImages",)) as server:
        await make_namespace(server.client, "t")
        made = await server.client.create(R.PODS, pod("p", "t", initContainers=[{"name": "i", "image": "img:1", "imagePullPolicy": "Never"}]), "t")
        assert made["spec"]["containers"][0]["imagePullPolicy"] == "Always"
        assert made["spec"]["initContainers"][0]["imagePullPolicy"] == "Always"


async def test_services_take_no_external_addresses_but_keep_those_they_have() -> None:
    async with running_apiserver(admission_plugins_on=("DenyServiceExternalIPs",)) as server:
        await make_namespace(server.client, "t")
        with refused(403, "Use of external IPs is denied by admission control"):
            await server.client.create(R.SERVICES, service(externalIPs=["198.51.100.7"]), "t")
        made = await server.client.create(R.SERVICES, service(), "t")
        made["spec"]["externalIPs"] = ["198.51.100.7"]
        with refused(403, "Use of external IPs is denied by admission control"):
            await server.client.update(R.SERVICES, made)


async def test_a_pod_that_asks_for_a_device_tolerates_its_taint() -> None:
    async with running_apiserver(admission_plugins_on=("ExtendedResourceToleration",)) as server:
        await make_namespace(server.client, "t")
        device = {"example.com/gpu": "1"}
        containers = [{"name": "c", "image": "i", "resources": {"requests": {**device, "cpu": "1"}, "limits": device}}]
        made = await server.client.create(R.PODS, pod("p", "t", containers=containers), "t")
        added = [one for one in made["spec"]["tolerations"] if not one["key"].startswith("node.kubernetes.io")]
        assert added == [{"key": "example.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]


async def test_owner_references_need_the_powers_that_they_give() -> None:
    async with running_apiserver(admission_plugins_on=("OwnerReferencesPermissionEnforcement",)) as server:
        client = server.client
        await make_namespace(client, "t")
        rules = [{"apiGroups": [""], "resources": ["configmaps"], "verbs": ["create", "get", "update"]}]
        await client.create(R.CLUSTER_ROLES, {"metadata": {"name": "writer"}, "rules": rules})
        subjects = [{"kind": "User", "name": "eve", "apiGroup": "rbac.authorization.k8s.io"}]
        reference = {"kind": "ClusterRole", "name": "writer", "apiGroup": "rbac.authorization.k8s.io"}
        await client.create(R.CLUSTER_ROLE_BINDINGS, {"metadata": {"name": "writer"}, "roleRef": reference, "subjects": subjects})
        owner = await client.create(R.CONFIG_MAPS, {"metadata": {"name": "owner", "namespace": "t"}}, "t")
        plain = {"apiVersion": "v1", "kind": "ConfigMap", "name": "owner", "uid": owner["metadata"]["uid"]}
        async with as_user(server, "eve") as eve:
            made = await eve.create(R.CONFIG_MAPS, {"metadata": {"name": "a", "namespace": "t", "ownerReferences": [plain]}}, "t")
            made["metadata"]["ownerReferences"] = []
            with refused(403, "cannot set an ownerRef on a resource you can't delete"):
                await eve.update(R.CONFIG_MAPS, made)
            blocking = {"metadata": {"name": "b", "namespace": "t", "ownerReferences": [{**plain, "blockOwnerDeletion": True}]}}
            with refused(403, "cannot set blockOwnerDeletion if an ownerReference refers to a resource you can't set finalizers on"):
                await eve.create(R.CONFIG_MAPS, blocking, "t")
            lost = {**plain, "kind": "Nothing", "blockOwnerDeletion": True}
            with refused(403, "cannot find RESTMapping for APIVersion v1 Kind Nothing"):
                await eve.create(R.CONFIG_MAPS, {"metadata": {"name": "c", "namespace": "t", "ownerReferences": [lost]}}, "t")
        await client.create(R.CONFIG_MAPS, blocking, "t")


async def test_a_plugin_that_does_not_exist_is_named() -> None:
    with pytest.raises(ValueError, match="unknown admission plugins: Nonsense"):
        async with running_apiserver(admission_plugins_on=("Nonsense",)):
            pass
