"""RBAC, the Node authorizer, escalation, impersonation and the bootstrap policy."""

import asyncio
import json

from knarr.api import resources as R
from knarr.api.types import Object
from knarr.client.rest import Client
from knarr.testing.apiserver import RunningAPIServer
from tests.apiserver.identities import as_user, make_namespace, pod, refused, with_token

RBAC = "rbac.authorization.k8s.io"


def _role(name: str, namespace: str, *rules: Object) -> Object:
    return {"metadata": {"name": name, "namespace": namespace}, "rules": list(rules)}


def _binding(name: str, namespace: str, role: str, user: str, kind: str = "Role") -> Object:
    return {
        "metadata": {"name": name, "namespace": namespace}, "roleRef": {"apiGroup": RBAC, "kind": kind, "name": role},
        "subjects": [{"kind": "User", "apiGroup": RBAC, "name": user}],
    }  # fmt: skip


async def _may(client: Client, user: str, verb: str, resource: str, **more: str) -> bool:
    attributes = {"verb": verb, "resource": resource, **more}
    body = {"apiVersion": "authorization.k8s.io/v1", "kind": "SubjectAccessReview", "spec": {"user": user, "groups": [], "resourceAttributes": attributes}}
    answer = await client.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", body=body)
    return bool(json.loads(answer.body)["status"]["allowed"])


async def test_a_role_allows_what_it_says_from_the_moment_it_is_bound(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    await client.create(R.ROLES, _role("reader", "t", {"apiGroups": [""], "resources": ["configmaps"], "resourceNames": ["one"], "verbs": ["get"]}), "t")
    assert not await _may(client, "u", "get", "configmaps", namespace="t", name="one")
    await client.create(R.ROLE_BINDINGS, _binding("b", "t", "reader", "u"), "t")
    assert await _may(client, "u", "get", "configmaps", namespace="t", name="one")
    assert not await _may(client, "u", "get", "configmaps", namespace="t", name="two")
    assert not await _may(client, "u", "get", "configmaps", namespace="default", name="one")
    await client.delete(R.ROLE_BINDINGS, "b", "t")
    assert not await _may(client, "u", "get", "configmaps", namespace="t", name="one")


async def test_nobody_grants_what_they_do_not_hold(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    manage = {"apiGroups": [RBAC], "resources": ["roles", "rolebindings"], "verbs": ["*"]}
    await client.create(R.ROLES, _role("manager", "t", {**manage, "verbs": ["create", "update", "get", "patch"]}, {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}), "t")
    await client.create(R.ROLE_BINDINGS, _binding("m", "t", "manager", "boss"), "t")
    async with as_user(apiserver, "boss") as boss:
        await boss.create(R.ROLES, _role("ok", "t", {"apiGroups": [""], "resources": ["pods"], "verbs": ["get"]}), "t")
        with refused(403, 'user "boss" (groups=["system:authenticated"]) is attempting to grant RBAC permissions not currently held:\n'
                          '{APIGroups:[""], Resources:["secrets"], Verbs:["get" "list"]}'):
            await boss.create(R.ROLES, _role("evil", "t", {"apiGroups": [""], "resources": ["secrets"], "verbs": ["get", "list"]}), "t")
        with refused(403, "is attempting to grant RBAC permissions not currently held"):
            await boss.create(R.ROLE_BINDINGS, _binding("evil", "t", "cluster-admin", "boss", "ClusterRole"), "t")


async def test_impersonation_needs_the_right_to(apiserver: RunningAPIServer) -> None:
    async with as_user(apiserver, "somebody", "devs") as client:
        with refused(403, 'cannot list resource "nodes" in API group "" at the cluster scope'):
            await client.list(R.NODES)
    await make_namespace(apiserver.client, "t")
    request = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
    token = (await apiserver.client.create(R.SERVICE_ACCOUNTS, request, "t", subresource="token", name="default"))["status"]["token"]
    async with with_token(apiserver, token) as client:
        with refused(403, 'cannot impersonate resource "users" in API group "" at the cluster scope'):
            await client.request("GET", "/api/v1/nodes", headers={"Impersonate-User": "admin"})
        with refused(500, ""):
            await client.request("GET", "/api/v1/nodes", headers={"Impersonate-Group": "system:masters"})


async def test_aggregated_roles_follow_labelled_ones(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    labelled = {
        "metadata": {"name": "widgets", "labels": {"rbac.authorization.k8s.io/aggregate-to-view": "true"}},
        "rules": [{"apiGroups": ["example.com"], "resources": ["widgets"], "verbs": ["get"]}],
    }  # fmt: skip
    await client.create(R.CLUSTER_ROLES, labelled)
    async with asyncio.timeout(5):
        while not any("example.com" in (rule.get("apiGroups") or ()) for rule in (await client.get(R.CLUSTER_ROLES, "admin"))["rules"]):
            await asyncio.sleep(0.01)


async def test_a_kubelet_reads_only_what_its_pods_need(apiserver: RunningAPIServer) -> None:
    client = apiserver.client
    await make_namespace(client, "t")
    for name in ("mine", "theirs"):
        await client.create(R.SECRETS, {"metadata": {"name": name, "namespace": "t"}}, "t")
        await client.create(R.NODES, {"metadata": {"name": f"node-{name}"}})
        volumes = [{"name": "v", "secret": {"secretName": name}}]
        await client.create(R.PODS, pod(f"pod-{name}", "t", nodeName=f"node-{name}", volumes=volumes), "t")
    async with as_user(apiserver, "system:node:node-mine", "system:nodes") as node:
        await node.get(R.SECRETS, "mine", "t")
        with refused(403, "no relationship found between node 'node-mine' and this object"):
            await node.get(R.SECRETS, "theirs", "t")
        assert len((await node.list(R.PODS, field_selector="spec.nodeName=node-mine"))["items"]) == 1
        with refused(403, "can only list/watch pods with spec.nodeName field selector"):
            await node.list(R.PODS)
        await client.delete(R.PODS, "pod-mine", "t", grace_period_seconds=0)
        with refused(403, "no relationship found"):
            await node.get(R.SECRETS, "mine", "t")


async def test_a_kubelet_writes_only_its_own_node(apiserver: RunningAPIServer) -> None:
    async with as_user(apiserver, "system:node:n1", "system:nodes") as node:
        await node.create(R.NODES, {"metadata": {"name": "n1", "labels": {"kubernetes.io/hostname": "n1"}}})
        with refused(403, 'node "n1" is not allowed to modify node "n2"'):
            await node.create(R.NODES, {"metadata": {"name": "n2"}})
        with refused(403, "is not allowed to modify labels: node-restriction.kubernetes.io/x"):
            await node.patch(R.NODES, "n1", None, {"metadata": {"labels": {"node-restriction.kubernetes.io/x": "y"}}})
        with refused(403, 'node "n1" is not allowed to modify taints'):
            await node.patch(R.NODES, "n1", None, {"spec": {"taints": []}})
        with refused(403, "can only create mirror pods"):
            await make_namespace(apiserver.client, "t")
            await node.create(R.PODS, pod("p", "t", nodeName="n1"), "t")
