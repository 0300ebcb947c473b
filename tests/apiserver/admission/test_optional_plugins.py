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


async def annotate(server: RunningAPIServer, annotations: dict[str, str]) -> None:
    await server.client.patch(R.NAMESPACES, "t", None, {"metadata": {"annotations": annotations}}, type="merge")


async def test_pods_go_where_their_namespace_says() -> None:
    configuration = {"podNodeSelectorPluginConfig": {"clusterDefaultNodeSelector": "env=any", "t": "env=test,disk=ssd"}}
    async with running_apiserver(admission_plugins_on=("PodNodeSelector",), admission_config={"PodNodeSelector": configuration}) as server:
        await make_namespace(server.client, "t")
        await annotate(server, {"scheduler.alpha.kubernetes.io/node-selector": "env=test"})
        await make_namespace(server.client, "other")
        assert (await server.client.create(R.PODS, pod("p", "t"), "t"))["spec"]["nodeSelector"] == {"env": "test"}
        made = await server.client.create(R.PODS, pod("q", "t", nodeSelector={"disk": "ssd"}), "t")
        assert made["spec"]["nodeSelector"] == {"env": "test", "disk": "ssd"}
        assert (await server.client.create(R.PODS, pod("p", "other"), "other"))["spec"]["nodeSelector"] == {"env": "any"}
        with refused(403, "conflicts with its namespace node label selector"):
            await server.client.create(R.PODS, pod("r", "t", nodeSelector={"env": "production"}), "t")
        with refused(403, "labels conflict with its namespace whitelist"):
            await server.client.create(R.PODS, pod("r", "t", nodeSelector={"disk": "tape"}), "t")


async def test_tolerations_come_from_the_namespace_and_are_limited_by_it() -> None:
    annotations = {
        "scheduler.alpha.kubernetes.io/defaultTolerations": '[{"key":"a","operator":"Exists"}]',
        "scheduler.alpha.kubernetes.io/tolerationsWhitelist":
            '[{"key":"a","operator":"Exists"},{"key":"node.kubernetes.io/not-ready","operator":"Exists"},'
            '{"key":"node.kubernetes.io/unreachable","operator":"Exists"}]',
    }
    async with running_apiserver(admission_plugins_on=("PodTolerationRestriction",)) as server:
        await make_namespace(server.client, "t")
        await annotate(server, annotations)
        # The default takes in the pod's own, which says less.
        own = {"key": "a", "operator": "Equal", "value": "x", "effect": "NoSchedule"}
        made = await server.client.create(R.PODS, pod("p", "t", tolerations=[own]), "t")
        assert [one for one in made["spec"]["tolerations"] if not one["key"].startswith("node.")] == [{"key": "a", "operator": "Exists"}]
        with refused(500, "conflict with its namespace whitelist"):
            await server.client.create(R.PODS, pod("q", "t", tolerations=[{"key": "b", "operator": "Exists"}]), "t")


async def test_events_come_at_a_limited_rate() -> None:
    limits = {"limits": [{"type": "Namespace", "qps": 0.001, "burst": 2, "cacheSize": 10}]}

    def event(name: str, namespace: str) -> dict[str, Any]:
        return {
            "metadata": {"name": name, "namespace": namespace}, "reason": "Why", "type": "Normal",
            "involvedObject": {"kind": "Pod", "name": "p", "namespace": namespace},
        }  # fmt: skip

    async with running_apiserver(admission_plugins_on=("EventRateLimit",), admission_config={"EventRateLimit": limits}) as server:
        await make_namespace(server.client, "t")
        await server.client.create(R.EVENTS, event("one", "t"))
        await server.client.create(R.EVENTS, event("two", "t"))
        with refused(429, "limit reached on type Namespace for key t"):
            await server.client.create(R.EVENTS, event("three", "t"))
        await server.client.create(R.EVENTS, event("one", "default"))


async def test_hard_anti_affinity_is_for_hosts_only() -> None:
    def apart(key: str) -> dict[str, Any]:
        term = {"labelSelector": {"matchLabels": {"a": "b"}}, "topologyKey": key}
        return {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": [term]}}

    async with running_apiserver(admission_plugins_on=("LimitPodHardAntiAffinityTopology",)) as server:
        await make_namespace(server.client, "t")
        await server.client.create(R.PODS, pod("p", "t", affinity=apart("kubernetes.io/hostname")), "t")
        with refused(403, "has TopologyKey zone but only key kubernetes.io/hostname is allowed"):
            await server.client.create(R.PODS, pod("q", "t", affinity=apart("zone")), "t")


async def test_namespaces_can_come_with_what_is_created_in_them() -> None:
    async with running_apiserver(admission_plugins_on=("NamespaceAutoProvision", "NamespaceExists", "AlwaysAdmit")) as server:
        await server.client.create(R.CONFIG_MAPS, {"metadata": {"name": "c", "namespace": "new"}}, "new")
        assert (await server.client.get(R.NAMESPACES, "new"))["status"]["phase"] == "Active"


async def test_everything_can_be_denied() -> None:
    async with running_apiserver(admission_plugins_on=("AlwaysDeny",)) as server:
        with refused(403, "admission control is denying all modifications"):
            await server.client.create(R.CONFIG_MAPS, {"metadata": {"name": "c", "namespace": "default"}}, "default")
        assert (await server.client.list(R.CONFIG_MAPS, "default"))["items"] == []
