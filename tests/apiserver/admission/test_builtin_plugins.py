"""The built-in admission plugins against a running server."""

import asyncio

from knarr.api import resources as R
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import make_namespace, pod, refused


async def test_nothing_is_created_in_a_missing_or_terminating_namespace(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    with refused(404, 'namespaces "nowhere" not found'):
        await client.create(R.CONFIG_MAPS, {"metadata": {"name": "x", "namespace": "nowhere"}}, "nowhere")
    await make_namespace(client, "t")
    await client.delete(R.NAMESPACES, "t")
    with refused(403, "unable to create new content in namespace t because it is being terminated") as caught:
        await client.create(R.CONFIG_MAPS, {"metadata": {"name": "x", "namespace": "t"}}, "t")
    assert caught.value.causes[0]["reason"] == "NamespaceTerminating"
    with refused(403, "this namespace may not be deleted"):
        await client.delete(R.NAMESPACES, "kube-system")


async def test_a_pod_gets_its_account_token_tolerations_and_priority(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    spec = (await client.create(R.PODS, pod("p", "t", initContainers=[{"name": "i", "image": "img:1"}]), "t"))["spec"]
    assert spec["serviceAccountName"] == spec["serviceAccount"] == "default"
    volume = spec["volumes"][0]
    assert volume["name"].startswith("kube-api-access-")
    assert [next(iter(source)) for source in volume["projected"]["sources"]] == ["serviceAccountToken", "configMap", "downwardAPI"]
    for container in (spec["containers"][0], spec["initContainers"][0]):
        assert container["volumeMounts"] == [{"name": volume["name"], "readOnly": True, "mountPath": "/var/run/secrets/kubernetes.io/serviceaccount"}]
    assert {toleration["key"] for toleration in spec["tolerations"]} == {"node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable"}
    assert (spec["priority"], spec["preemptionPolicy"]) == (0, "PreemptLowerPriority")
    quiet = await client.create(R.PODS, pod("q", "t", automountServiceAccountToken=False), "t")
    assert "volumes" not in quiet["spec"]
    with refused(403, 'error looking up service account t/none: serviceaccount "none" not found'):
        await client.create(R.PODS, pod("r", "t", serviceAccountName="none"), "t")


async def test_a_pod_waits_for_the_default_account_of_a_new_namespace(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await client.create(R.NAMESPACES, {"metadata": {"name": "new"}})
    creating = asyncio.ensure_future(client.create(R.PODS, pod("p", "new"), "new"))
    await asyncio.sleep(0.05)
    await client.create(R.SERVICE_ACCOUNTS, {"metadata": {"name": "default", "namespace": "new"}}, "new")
    assert (await creating)["spec"]["serviceAccountName"] == "default"


async def test_priority_classes_resolve_and_only_one_is_default(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    await client.create(R.PRIORITY_CLASSES, {"metadata": {"name": "high"}, "value": 1000, "globalDefault": True})
    made = await client.create(R.PODS, pod("p", "t"), "t")
    assert (made["spec"]["priorityClassName"], made["spec"]["priority"]) == ("high", 1000)
    with refused(403, "PriorityClass high is already marked as default"):
        await client.create(R.PRIORITY_CLASSES, {"metadata": {"name": "higher"}, "value": 2000, "globalDefault": True})
    with refused(403, "no PriorityClass with name none was found"):
        await client.create(R.PODS, pod("q", "t", priorityClassName="none"), "t")
    with refused(403, "the integer value of priority (5) must not be provided in pod spec"):
        await client.create(R.PODS, pod("q", "t", priority=5), "t")


async def test_limit_ranges_default_and_bound_containers(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    limit = {"type": "Container", "default": {"cpu": "500m"}, "defaultRequest": {"cpu": "100m"}, "max": {"cpu": "1"}}
    await client.create(R.LIMIT_RANGES, {"metadata": {"name": "l", "namespace": "t"}, "spec": {"limits": [limit]}}, "t")
    made = await client.create(R.PODS, pod("p", "t"), "t")
    assert made["spec"]["containers"][0]["resources"] == {"limits": {"cpu": "500m"}, "requests": {"cpu": "100m"}}
    assert made["metadata"]["annotations"]["kubernetes.io/limit-ranger"] == "LimitRanger plugin set: cpu request for container c; cpu limit for container c"
    greedy = pod("q", "t", containers=[{"name": "c", "image": "i", "resources": {"limits": {"cpu": "2"}, "requests": {"cpu": "2"}}}])
    with refused(403, "maximum cpu usage per Container is 1, but limit is 2"):
        await client.create(R.PODS, greedy, "t")


async def test_quota_is_charged_before_and_given_back_when_nothing_comes_of_it(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    hard = {"configmaps": "2", "pods": "1", "requests.cpu": "1"}
    quota = await client.create(R.RESOURCE_QUOTAS, {"metadata": {"name": "q", "namespace": "t"}, "spec": {"hard": hard}}, "t")
    quota["status"] = {"hard": hard, "used": dict.fromkeys(hard, "0")}
    await client.update(R.RESOURCE_QUOTAS, quota, subresource="status")

    async def used() -> dict[str, str]:
        found: dict[str, str] = (await client.get(R.RESOURCE_QUOTAS, "q", "t"))["status"]["used"]
        return found

    async def make(n: int) -> bool:
        from knarr.api.errors import StatusError

        try:
            await client.create(R.CONFIG_MAPS, {"metadata": {"name": f"c{n}", "namespace": "t"}}, "t")
            return True
        except StatusError as error:  # the expected outcome of all but two
            assert "exceeded quota: q, requested: configmaps=1, used: configmaps=2, limited: configmaps=2" in error.message  # noqa: PT017
            return False

    outcomes = await asyncio.gather(*(make(n) for n in range(8)))
    assert sum(outcomes) == 2
    assert (await used())["configmaps"] == "2"
    with refused(403, "failed quota: q: must specify requests.cpu for: c"):
        await client.create(R.PODS, pod("p", "t"), "t")
    asking = [{"name": "c", "image": "i", "resources": {"requests": {"cpu": "600m"}}}]
    await client.create(R.PODS, pod("p", "t", containers=asking), "t")
    assert (await used())["requests.cpu"] == "600m"
    await client.delete(R.CONFIG_MAPS, "c0", "t")
    with refused(409):
        quota = await client.get(R.RESOURCE_QUOTAS, "q", "t")
        quota["status"]["used"]["pods"] = "0"
        quota["status"]["used"]["requests.cpu"] = "0"
        await client.update(R.RESOURCE_QUOTAS, quota, subresource="status")
        await client.create(R.PODS, pod("p", "t", containers=asking), "t")
    async with asyncio.timeout(5):
        while (await used())["requests.cpu"] != "0":
            await asyncio.sleep(0.01)


async def test_pod_security_refuses_warns_and_checks_pods_that_are_there(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    labels = {"pod-security.kubernetes.io/enforce": "baseline", "pod-security.kubernetes.io/warn": "restricted"}
    await make_namespace(client, "t", labels)
    with refused(403, 'violates PodSecurity "baseline:latest": host namespaces (hostNetwork=true), privileged (container "c" must not set securityContext.privileged=true)'):
        await client.create(R.PODS, pod("p", "t", hostNetwork=True, containers=[{"name": "c", "image": "i", "securityContext": {"privileged": True}}]), "t")
    answer = await client.request("POST", "/api/v1/namespaces/t/pods", body=pod("p", "t"))
    assert answer.status == 201
    warning = answer.headers["warning"]
    assert 'would violate PodSecurity \\"restricted:latest\\": allowPrivilegeEscalation != false' in warning
    answer = await client.request(
        "PATCH", "/api/v1/namespaces/t", body={"metadata": {"labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
        headers={"Content-Type": "application/merge-patch+json"},
    )  # fmt: skip
    assert 'existing pods in namespace \\"t\\" violate the new PodSecurity enforce level \\"restricted:latest\\"' in answer.headers["warning"]
    with refused(422, "must be one of privileged, baseline, restricted"):
        await client.create(R.NAMESPACES, {"metadata": {"name": "bad", "labels": {"pod-security.kubernetes.io/enforce": "strict"}}})


async def test_storage_defaults_and_protection(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    annotations = {"storageclass.kubernetes.io/is-default-class": "true"}
    await client.create(R.STORAGE_CLASSES, {"metadata": {"name": "fast", "annotations": annotations}, "provisioner": "example.com/none"})
    claim = {"metadata": {"name": "c", "namespace": "t"}, "spec": {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "1Gi"}}}}
    made = await client.create(R.PERSISTENT_VOLUME_CLAIMS, claim, "t")
    assert made["spec"]["storageClassName"] == "fast"
    assert made["metadata"]["finalizers"] == ["kubernetes.io/pvc-protection"]
    node = await client.create(R.NODES, {"metadata": {"name": "n"}})
    assert node["spec"]["taints"] == [{"key": "node.kubernetes.io/not-ready", "effect": "NoSchedule"}]
